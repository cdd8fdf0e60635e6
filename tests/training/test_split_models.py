"""Models that accelerate splits over devices: here the CPU and the disk, since one machine without GPUs has no more."""

import pytest
import torch
import transformers
from families import FAMILIES

import seal_ops
from seal_ops.huggingface.logits import logits_at

pytest.importorskip("accelerate")
MAP = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"} | dict.fromkeys(
    ("model.norm", "model.rotary_emb", "lm_head"), "cpu"
)
FIRST_ON_DISK = MAP | {"model.embed_tokens": "disk", "model.layers.0": "disk"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("split")
    FAMILIES["llama"].build().save_pretrained(path / "model")
    return path


def samples():
    ids = torch.randint(3, 97, (4, 10), generator=torch.Generator().manual_seed(0)).tolist()
    return [{"input_ids": row, "labels": row} for row in ids]


def trained(model, granularity, output):
    scales = seal_ops.attach(model, granularity)
    result = seal_ops.train(model, samples(), lr=0.05, output_dir=output, progress=False)
    return result, scales


@pytest.mark.parametrize("granularity, device_map", [("head", MAP), ("channel", FIRST_ON_DISK)])
def test_a_split_model_trains(folder, tmp_path, granularity, device_map):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "model", device_map=device_map, offload_folder=tmp_path / "offloaded"
    )
    assert any(p.is_meta for p in model.parameters()), "nothing lies on the disk"
    expected, whole = trained(FAMILIES["llama"].build(), granularity, tmp_path / "whole")
    result, scales = trained(model, granularity, tmp_path / "split")
    assert result.losses == expected.losses and result.losses[-1] < result.losses[0]
    for layer, value in whole.values().items():
        assert torch.equal(scales.values()[layer], value)
    found = scales.attachment.patch.layers
    assert [scale.device for _, scale in scales.items()] == [layer.device for layer in found]
    saved = seal_ops.load(FAMILIES["llama"].build(), tmp_path / "split").values()
    assert all(torch.equal(saved[layer], value) for layer, value in whole.values().items())


def test_positions_of_a_split_model_come_as_numbers(folder, tmp_path):
    """accelerate moves tensors to the first device, where they index nothing on the last one."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "model", device_map=MAP, offload_folder=tmp_path / "offloaded"
    )
    ids, seen = torch.randint(3, 97, (2, 10)), []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["logits_to_keep"]), with_kwargs=True
    )
    found = logits_at(model, torch.tensor([2, 7]), input_ids=ids)
    assert seen == [[2, 7]]
    assert torch.equal(found, FAMILIES["llama"].build()(input_ids=ids).logits[:, [2, 7]])


def test_positions_of_a_collator_come_as_numbers_to_a_split_model(folder, tmp_path):
    """In transformers' Trainer nothing but the model itself can know that it is split."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "model", device_map=MAP, offload_folder=tmp_path / "offloaded"
    )
    seal_ops.attach(model)
    batch, seen = seal_ops.Collator()(samples()), []
    expected = FAMILIES["llama"].build()(**batch).loss
    taken = model._old_forward  # behind accelerate's hook
    model._old_forward = lambda *args, **kwargs: seen.append(kwargs["logits_to_keep"]) or taken(*args, **kwargs)
    assert torch.allclose(model(**batch).loss, expected, rtol=1e-5)
    assert seen == [list(range(9))]
    model.hf_device_map = {"": "cpu"}
    model(**batch)
    assert torch.equal(seen[1], batch["logits_to_keep"]), "a whole model compiles tensors better"
