"""accelerate around a model with scales: preparing, mixed precision, accumulation, state on disk, unwrapping."""

import pytest
import torch
from families import FAMILIES, close, logits, randomise, tokens

import seal_ops

accelerate = pytest.importorskip("accelerate")
LLAMA = FAMILIES["llama"]


@pytest.fixture(autouse=True)
def _no_state_of_others():
    """accelerate keeps one precision a process."""
    forget()
    yield
    forget()


def forget():
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def attached(dtype=torch.float32):
    model = LLAMA.build(dtype)
    randomise(seal_ops.attach(model, "channel"))
    return model


def optimiser_of(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


def scales_of(model):
    return [scale.detach().clone() for _, scale in model.seal_scales.items()]


def steps(accelerator, model, optimiser, batches):
    for ids in batches:
        with accelerator.accumulate(model):
            accelerator.backward(model(ids, labels=ids, use_cache=False).loss)
            optimiser.step()
            optimiser.zero_grad()


def test_accumulation_is_the_larger_batch():
    ids = tokens(4, 12)
    large = attached()
    optimiser = optimiser_of(large)
    large(ids, labels=ids, use_cache=False).loss.backward()
    optimiser.step()
    model = attached()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    prepared, optimiser = accelerator.prepare(model, optimiser_of(model))
    steps(accelerator, prepared, optimiser, ids.split(2))
    for a, b, start in zip(scales_of(model), scales_of(large), scales_of(attached())):
        assert (a - b).abs().max() <= 1e-5 < (a - start).abs().max()


def test_mixed_precision_leaves_the_scales_in_fp32(monkeypatch):
    """Under bf16 autocast as in a model whose weights are bf16; the scales, their gradients and steps stay fp32."""
    from seal_ops.huggingface import attention

    dtypes = []

    def spy(q, *args, _function=attention.rope_attention, **kwargs):
        dtypes.append((q.dtype, kwargs["scale"].dtype))
        return _function(q, *args, **kwargs)

    monkeypatch.setattr(attention, "rope_attention", spy)
    model = attached()
    expected = model(tokens(), labels=tokens(), use_cache=False).loss
    gradients = torch.autograd.grad(expected, list(model.seal_scales.parameters()))
    dtypes.clear()
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    prepared, optimiser = accelerator.prepare(model, optimiser_of(model))
    loss = prepared(tokens(), labels=tokens(), use_cache=False).loss
    accelerator.backward(loss)
    assert dtypes == [(torch.bfloat16, torch.float32)] * 2
    assert loss.item() == pytest.approx(expected.item(), rel=2e-2)
    for scale, gradient in zip(model.seal_scales.parameters(), gradients):
        assert scale.dtype == scale.grad.dtype == torch.float32
        assert (scale.grad - gradient).norm() <= 0.1 * gradient.norm()
    optimiser.step()
    small = attached()
    assert all((a - b).abs().max() > 0 for a, b in zip(scales_of(model), scales_of(small)))


def test_state_is_saved_and_loaded_and_the_model_unwrapped(tmp_path):
    ids = tokens(6, 12)
    model = attached()
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    prepared, optimiser = accelerator.prepare(model, optimiser_of(model))
    steps(accelerator, prepared, optimiser, [ids[:2]])
    accelerator.save_state(str(tmp_path / "state"))
    steps(accelerator, prepared, optimiser, [ids[2:4]])
    whole = scales_of(model)
    accelerator.load_state(str(tmp_path / "state"))
    assert not all(torch.equal(a, b) for a, b in zip(scales_of(model), whole))
    steps(accelerator, prepared, optimiser, [ids[2:4]])
    assert all(torch.equal(a, b) for a, b in zip(scales_of(model), whole))
    plain = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert plain is model
    plain.save_pretrained(tmp_path / "model")
    loaded = type(model).from_pretrained(tmp_path / "model")
    seal_ops.load(loaded, tmp_path / "model")
    assert close(logits(loaded.eval(), ids), logits(model.eval(), ids))
