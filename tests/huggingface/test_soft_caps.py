"""Gemma 2's soft cap through the seam: in the op where Triton (or the oracle, asked for) runs it, else composed."""

import pytest
import torch
from devices import device_of
from families import FAMILIES, close, largest, logits, randomise, tokens

import seal_ops
from seal_ops.huggingface import attention as attention_module
from seal_ops.huggingface import decoding
from seal_ops.ops import dispatch

if (_reason := dispatch.why_not("triton", "attention", device_of("triton"), torch.float32, 16)) is not None:
    pytest.skip(_reason, allow_module_level=True)
if device_of("triton").type != "cpu":
    pytest.skip("small models on the CPU, in Triton's interpreter", allow_module_level=True)


def model_on(backend):
    model = FAMILIES["gemma2"].build()
    scales = seal_ops.attach(model, "channel", backend=backend)
    randomise(scales)
    return model, scales


@pytest.fixture
def composed(monkeypatch):
    """How often attention was put together from PyTorch's parts."""
    calls, parts = [], attention_module._composed
    monkeypatch.setattr(attention_module, "_composed", lambda *a: calls.append(1) or parts(*a))
    return calls


@pytest.mark.parametrize("padded", [False, True])
def test_it_is_in_the_op_where_triton_runs(composed, padded):
    ids = tokens(2 if padded else 1, 8)
    mask = torch.arange(8)[None] >= torch.tensor([[0], [3]]) if padded else torch.ones_like(ids, dtype=torch.bool)
    results = []
    for backend, number in (("cpu", 2), ("triton", 0)):
        model, scales = model_on(backend)
        composed.clear()
        out = model(ids, attention_mask=mask.long() if padded else None, use_cache=False).logits[mask]
        assert len(composed) == number, backend
        grads = () if padded else torch.autograd.grad(out.square().mean(), list(scales.parameters()))
        results.append((out.detach(), grads))
        assert ("soft-capped scores" in repr(scales)) == (number > 0)
    (want, want_grads), (got, got_grads) = results
    assert close(got, want)
    for a, b in zip(got_grads, want_grads):
        assert largest(a, b) <= 1e-4 * b.abs().max().item()


def test_a_padded_decoding_step_keeps_its_cap(composed, monkeypatch):
    """The step on a cache padded on the left that runs in the op on GPUs, here on the oracle."""
    monkeypatch.setattr(decoding, "DEVICES", {"cpu"})
    ran = []
    monkeypatch.setattr(decoding, "attend", lambda *a, f=decoding.attend: ran.append(1) or f(*a))
    ids, mask = tokens(2, 8), (torch.arange(8)[None] >= torch.tensor([[0], [3]])).long()
    results = []
    for backend in ("cpu", "reference"):
        model, _ = model_on(backend)
        with torch.no_grad():
            cache = model(ids[:, :7], attention_mask=mask[:, :7], use_cache=True).past_key_values
            ran.clear()
            results.append(model(ids[:, 7:], attention_mask=mask, past_key_values=cache, use_cache=True).logits)
        assert bool(ran) == (backend == "reference")
    assert close(results[1], results[0])


def test_an_extended_model_keeps_its_cap():
    """On the oracle: far and near keys merge exactly, each under the cap: no far key, nothing changes."""
    model, _ = model_on("reference")
    ids = tokens(1, 12)
    want = logits(model, ids)
    seal_ops.extend(model, "self_extend", group=2, window=64)
    assert close(logits(model, ids), want)
    seal_ops.unextend(model)
    for layer in model.seal_scales.attachment.patch.layers:
        assert layer.composed is None


def test_a_backend_without_it_is_composed_and_says_so(composed):
    model, scales = model_on(None)
    logits(model, tokens(1, 6))
    assert len(composed) == 2 and "attention composed in 2 (soft-capped scores)" in repr(scales)
