"""Whole models on the GPU: attached ones, which run the kernels, against the untouched model and plain PyTorch."""

import pytest
import torch
from families import FAMILIES, largest, logits, randomise, scale_by_hooks, tokens, untouched
from transformers import DynamicCache, StaticCache

import seal_ops
from seal_ops.ops.dispatch import why_not

SIZES = {64: dict(hidden_size=256, head_dim=64), 128: dict(hidden_size=512, head_dim=128)}
each_family = pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma2", "gemma3", "phi3"])
each_size = pytest.mark.parametrize("head_dim", SIZES)


@pytest.fixture(params=["cuda", "triton"])
def backend(request) -> str:
    return request.param


def build(family: str, head_dim: int, backend: str, dtype=torch.bfloat16):
    reason = why_not(backend, "rope_attention", torch.device("cuda"), dtype, head_dim)
    if reason is not None:
        pytest.skip(reason)
    # Weights that grow with the width would drown the logits in rounding.
    return FAMILIES[family].build(dtype, **SIZES[head_dim], initializer_range=0.05, max_position_embeddings=512).cuda()


def assert_as_good(got, own, exact):
    """At most twice the rounding error of PyTorch in the same precision, plus one rounding of the result."""
    assert torch.isfinite(got).all()
    assert largest(got, exact) <= 2 * largest(own, exact) + torch.finfo(got.dtype).eps * exact.abs().max().item()


@each_size
@each_family
def test_scale_one(family, head_dim, backend):
    model = build(family, head_dim, backend)
    ids = tokens(2, 301).cuda()
    exact, own = logits(untouched(model, torch.float64), ids), logits(model, ids)
    seal_ops.attach(model, "channel", backend=backend)
    assert_as_good(logits(model, ids), own, exact)


@each_size
@each_family
def test_padding_and_caches(family, head_dim, backend):
    model = build(family, head_dim, backend)
    scales = seal_ops.attach(model, "channel", backend=backend)
    randomise(scales)
    ids = tokens(2, 150).cuda()
    plain, double = (
        FAMILIES[family]
        .build(torch.bfloat16, **SIZES[head_dim], initializer_range=0.05, max_position_embeddings=512)
        .to("cuda", d)
        for d in (None, torch.float64)
    )
    for reference in (plain, double):
        scale_by_hooks(reference, dict(scales.items()), head_dim)
    own, exact = logits(plain, ids), logits(double, ids)
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=256)):
        with torch.no_grad():
            pieces = [
                model(p, past_key_values=cache).logits
                for p in (ids[:, :100], ids[:, 100:140], *ids[:, 140:].split(1, 1))
            ]
        assert_as_good(torch.cat(pieces, 1), own, exact)
    for side in ("left", "right"):
        at = slice(40, None) if side == "left" else slice(None, 110)
        padded, attention_mask = torch.zeros_like(ids), torch.zeros_like(ids)
        padded[0], attention_mask[0] = ids[0], 1
        padded[1, at], attention_mask[1, at] = ids[1, :110], 1
        position_ids = (attention_mask.cumsum(1) - 1).clamp_min(0)
        got = logits(model, padded, attention_mask=attention_mask, position_ids=position_ids)
        assert_as_good(got[0], own[0], exact[0])
        assert_as_good(got[1, at], own[1, :110], exact[1, :110])


@each_size
@each_family
def test_gradients(family, head_dim, backend):
    model = build(family, head_dim, backend)
    plain, double = untouched(model), untouched(model, torch.float64)
    scales = seal_ops.attach(model, "channel", backend=backend)
    randomise(scales)
    ids = tokens(2, 200).cuda()
    model.train()
    model.gradient_checkpointing_enable(dict(use_reentrant=False))
    model(ids, labels=ids, use_cache=False).loss.backward()
    leaves = []
    for reference in (plain, double):
        leaves.append(scale_by_hooks(reference, dict(scales.items()), head_dim))
        reference(ids, labels=ids, use_cache=False).loss.backward()
    for (_, scale), own, exact in zip(scales.items(), *leaves):
        # Through whole layers in bf16 the largest error is a matter of luck; its root mean square is not.
        error, usual = ((t.grad.double() - exact.grad).square().mean().sqrt() for t in (scale, own))
        assert error <= 2 * usual


def test_generate_with_a_compiled_static_cache():
    """transformers compiles decoding on a static cache; tokens equal those of the dynamic cache, in fp32 (Triton)."""
    model = build("llama", 64, "triton", torch.float32)
    randomise(seal_ops.attach(model, "channel", backend="triton"))
    ids = tokens(2, 33).cuda()
    options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(ids, **options), model.generate(ids, cache_implementation="static", **options))
