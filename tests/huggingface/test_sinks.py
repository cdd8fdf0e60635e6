"""Learned attention sinks through the seam: fused, packed and composed, and their own gradient."""

import causal_lms
import pytest
import torch
from families import close, largest, logits, tokens, untouched

import seal_ops


@pytest.fixture
def pair():
    """gpt-oss with scales, and an untouched copy with its own eager attention."""
    model = causal_lms.build("gpt_oss")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.normal_(1.0, 1.0)
    own = untouched(model)
    seal_ops.attach(model, "channel")
    return model, own


def test_the_sinks_count_and_learn(pair):
    model, own = pair
    model.requires_grad_(True)
    ids = tokens(2, 13)
    assert close(logits(model, ids), logits(own, ids))
    name = "model.layers.{}.self_attn.sinks"
    grads = []
    for m in pair:
        leaves = [m.get_parameter(name.format(n)) for n in range(2)]
        grads.append(torch.autograd.grad(m(ids, use_cache=False).logits.square().sum(), leaves))
    for a, b in zip(*grads):
        assert b.abs().min() > 0 and largest(a, b) <= 1e-4 * b.abs().max()


@pytest.mark.parametrize("cached", [False, True])
def test_padding(pair, cached):
    """Packed without a cache; with one the mask is a tensor and attention composed."""
    model, own = pair
    ids = tokens(2, 13)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    found = []
    for m in pair:
        if not cached:
            out = logits(m, ids, attention_mask=mask)
        else:
            with torch.no_grad():
                first = m(ids[:, :9], attention_mask=mask[:, :9], use_cache=True)
                cache = {"past_key_values": first.past_key_values}
                out = m(ids[:, 9:], attention_mask=mask, use_cache=True, **cache).logits
        found.append(out[mask[:, -out.shape[1] :].bool()])
    assert close(*found)


def test_the_mask_column_is_not_lost():
    """Without sinks the model is another."""
    model = causal_lms.build("gpt_oss")
    ids = tokens(1, 13)
    before = logits(model, ids)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.fill_(3.0)
    assert largest(logits(model, ids), before) > 1e-3 * before.abs().max()
