"""Merging: what becomes of the weights, what is refused, and that nothing is half written."""
import pytest
import torch
from families import FAMILIES, logits, randomise, tokens
from torch import nn

import seal_ops

LLAMA = FAMILIES["llama"]


def test_saving_after_merging(tmp_path):
    model = LLAMA.build()
    scales = seal_ops.attach(model, "head")
    randomise(scales)
    expected = logits(model, tokens())
    seal_ops.merge(model)
    scales.save_pretrained(tmp_path)
    fresh = LLAMA.build()
    seal_ops.load(fresh, tmp_path)
    assert torch.equal(logits(fresh, tokens()), expected)


def test_merging_leaves_biases_and_rounds_once():
    model = LLAMA.build(torch.bfloat16, attention_bias=True)
    scales = seal_ops.attach(model, "channel")
    randomise(scales)
    before = {n: t.clone() for n, t in model.state_dict().items() if not n.startswith("seal_scales")}
    factors = [s.detach().clone() for s in scales.parameters()]
    after = seal_ops.merge(model).state_dict()
    assert set(after) == set(before)
    for name, tensor in after.items():
        if name.endswith("o_proj.weight"):
            layer = int(name.split(".")[2])
            assert torch.equal(tensor, (before[name].float() * factors[layer].reshape(1, -1)).bfloat16())
        else:
            assert torch.equal(tensor, before[name])


class Quantised(nn.Linear):
    """Stands for the linear layers of a quantisation library: a subclass whose weight means something else."""


def quantise(model):
    model.model.layers[1].self_attn.o_proj.__class__ = Quantised


def share(model):
    model.model.layers[1].self_attn.o_proj.weight = model.model.layers[0].self_attn.o_proj.weight


def overflow(model):
    model.half()
    model.seal_scales.layers["1"].scale.data.fill_(1e6)


@pytest.mark.parametrize("change, message", [
    (quantise, "layers.1.self_attn.o_proj must be a plain torch.nn.Linear in 16 or more bits, got Quantised"),
    (share, "layers.1.self_attn.o_proj must have a weight of its own, got a weight that two layers share"),
    (overflow, "layers.1.self_attn.o_proj must stay finite in torch.float16, got scales that overflow it"),
])
def test_refused_merges_change_nothing(change, message):
    model = LLAMA.build()
    randomise(seal_ops.attach(model, "head"))
    change(model)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        seal_ops.merge(model)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert model.config._attn_implementation == "seal"
