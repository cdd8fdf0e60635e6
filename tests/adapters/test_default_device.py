"""Another default device or dtype of torch: everything lies where the model does, and draws from the same numbers."""

import json

import pytest
import torch
from families import FAMILIES, close, logits, randomise, tokens

import seal_ops
from seal_ops.ops.attention_maps import column_sums

LLAMA = FAMILIES["llama"]


@pytest.fixture
def elsewhere():
    """A default device that nothing may be on: on a GPU machine it is the GPU beside a model on the CPU."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def samples():
    return [{"input_ids": row.tolist(), "labels": row.tolist()} for row in tokens(3, 20).cpu()]


def test_a_life_under_another_default_device(tmp_path, request):
    model, plain = LLAMA.build(), LLAMA.build()
    ids, padding = tokens(), torch.ones_like(tokens())
    padding[0, :5] = 0
    rows = samples()
    expected = seal_ops.attach(plain, "channel")
    losses = seal_ops.train(plain, rows, lr=1e-2).losses
    request.getfixturevalue("elsewhere")
    scales = seal_ops.attach(model, "channel")
    assert seal_ops.train(model, rows, lr=1e-2, output_dir=tmp_path / "run").losses == losses
    assert all(torch.equal(a, b) for a, b in zip(scales.parameters(), expected.parameters()))
    scales.save_pretrained(tmp_path / "scales")
    scales.add_adapter("other", "head")
    with scales.adapters_per_row(["default", "other"]):
        assert not logits(model, ids, attention_mask=padding).is_meta
    assert close(logits(model, ids), logits(plain, ids))
    assert model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (2, ids.shape[1] + 3)
    seal_ops.load(model, tmp_path / "scales")
    before = logits(model, ids)
    seal_ops.merge(model)
    assert close(logits(model, ids), before)
    assert json.loads((tmp_path / "run" / "training.json").read_text())["losses"] == losses


@pytest.mark.parametrize("method", ["self_extend", "lm_infinite", "minference"])
def test_extended_models_under_another_default_device(method, request):
    options = {"self_extend": {"window": 8, "group": 2}, "lm_infinite": {}, "minference": {"dense": 16}}
    ids, model, plain = tokens(1, 60), LLAMA.build(), LLAMA.build()
    seal_ops.extend(plain, method, trained=32, **options[method])
    expected = logits(plain, ids)
    request.getfixturevalue("elsewhere")
    seal_ops.extend(model, method, trained=32, **options[method])
    assert close(logits(model, ids), expected)


def test_sums_of_attention_maps_under_another_default_device(request):
    q, k = torch.randn(1, 70, 4, 16), torch.randn(1, 70, 2, 16)
    _, lse = seal_ops.attention(q, k, k, return_lse=True)
    expected = column_sums(q, k, lse)
    request.getfixturevalue("elsewhere")
    assert torch.equal(column_sums(q, k, lse), expected)


def test_new_adapters_are_fp32_under_another_default_dtype(tmp_path):
    model = LLAMA.build()
    scales = seal_ops.attach(model, "head")
    randomise(scales)
    torch.set_default_dtype(torch.bfloat16)
    try:
        scales.add_adapter("other")
        scales.save_pretrained(tmp_path)
        with scales.adapters_per_row(["base", "base"]):
            base = logits(model, tokens())
    finally:
        torch.set_default_dtype(torch.float32)
    assert seal_ops.load(LLAMA.build(), tmp_path / "other").config.granularity == "head"
    assert close(base, logits(LLAMA.build(), tokens()))


def test_an_attach_that_fails_half_way_leaves_the_model_as_it_was(monkeypatch):
    model = LLAMA.build()
    before = logits(model, tokens())

    def fail(self):
        self.layers[0].module.config._attn_implementation_internal = "seal"
        raise OSError("half way")

    with monkeypatch.context() as patched:
        patched.setattr("seal_ops.huggingface.patch.Patch._put_on", fail)
        with pytest.raises(ValueError, match="failed on two tokens"):
            seal_ops.attach(model)
    assert model.config._attn_implementation != "seal" and torch.equal(logits(model, tokens()), before)
