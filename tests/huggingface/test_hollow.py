"""A model without weights: what `find_attention_layers` sees of it is what it sees of the whole one."""

import pytest
import torch
from families import FAMILIES

from seal_ops.huggingface import hollow
from seal_ops.huggingface.discovery import find_attention_layers


def facts(layers):
    return [
        (a.index, a.name, a.num_heads, a.num_kv_heads, a.head_dim, a.projection_name, a.commutes, a.rotation)
        for a in layers
    ]


@pytest.mark.filterwarnings("ignore:seal_ops.attach")
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_layers_as_of_the_whole_model(family, tmp_path):
    model = FAMILIES[family].build()
    model.config.save_pretrained(tmp_path)
    found = hollow.read_hollow(tmp_path, "test")
    assert all(p.is_meta for p in found.parameters()) and not any(b.is_meta for b in found.buffers())
    assert facts(hollow.attention_layers_of(found)) == facts(find_attention_layers(model))
    assert all(p.is_meta for p in found.parameters()) and not any(hasattr(m, "_hf_hook") for m in found.modules())
    assert torch.nn.Module.register_parameter.__name__ == "register_parameter", "PyTorch's own again"


def test_a_part_at_a_time_has_stand_ins(tmp_path, monkeypatch):
    FAMILIES["llama"].build(num_hidden_layers=6).config.save_pretrained(tmp_path)
    model = hollow.read_hollow(tmp_path, "test")
    layer, real = sum(p.numel() for p in model.model.layers[0].parameters()), hollow._filled
    most = []

    def filled(parameter, block):
        most.append(parameter.numel() + sum(p.numel() for p in model.parameters() if not p.is_meta))
        return real(parameter, block)

    monkeypatch.setattr(hollow, "_filled", filled)
    found = hollow.attention_layers_of(model, at_once=layer)
    assert len(found) == 6 and max(most) <= layer


def test_a_folder_that_describes_no_model(tmp_path):
    with pytest.raises(OSError, match=f"^test: {tmp_path} could not be read: "):
        hollow.read_hollow(tmp_path, "test")
