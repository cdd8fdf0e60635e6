"""Sinks, output gates and soft caps against the softmax with one more column, in fp64: composed around the cpu backend,
and inside the oracle."""

import math

import pytest
import torch
import torch.nn.functional as F

import seal_ops
from seal_ops.ops.backends.reference import rope as turned
from seal_ops.ops.epilogue import GATE_FUNCTIONS

HEADS, KV, D = 4, 2, 16


def inputs(packed=False, sq=9, sk=13, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)
    lead = () if packed else (2,)
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    a = dict(q=rand(*lead, sq, HEADS, D), k=rand(*lead, sk, KV, D), v=rand(*lead, sk, KV, D))
    a |= dict(scale=rand(HEADS, D).to(statistics), sink=rand(HEADS) + 1)
    return {name: t.requires_grad_() for name, t in a.items()}, rand


def by_hand(q, k, v, scale, sink=None, gate=None, function=None, seen=None, softcap=None):
    """The whole matrix of one batch, causal and aligned to the end, with the sink as one more column."""
    group = q.shape[-2] // k.shape[-2]
    k, v = (t.repeat_interleave(group, -2) for t in (k, v))
    scores = torch.einsum("...ihd,...jhd->...hij", q, k) / math.sqrt(q.shape[-1])
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if seen is None:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(scores.shape[-1] - scores.shape[-2])
    scores = scores.masked_fill(~seen, -1e300)
    if sink is not None:
        scores = torch.cat([scores, sink[:, None, None].expand(*scores.shape[:-1], 1)], -1)
    weights = scores.softmax(-1)[..., : k.shape[-3]]
    out = torch.einsum("...hij,...jhd->...ihd", weights, v) * scale
    out = out if gate is None else out * function(gate)
    return out, scores.logsumexp(-1)


def compare(found, want, leaves, seed=3):
    g = torch.Generator().manual_seed(seed)
    weights = [torch.randn(t.shape, generator=g, dtype=torch.float64) for t in want]
    grads = [torch.autograd.grad(sum((t * w).sum() for t, w in zip(pair, weights)), leaves) for pair in (found, want)]
    for a, b in zip((*found, *grads[0]), (*want, *grads[1])):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("sq, sk", [(9, 13), (13, 13), (1, 13)])
@pytest.mark.parametrize("gated", [None, *GATE_FUNCTIONS])
@pytest.mark.parametrize("with_sink", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_sink_and_gate_with_every_gradient(backend, with_sink, gated, sq, sk):
    a, rand = inputs(sq=sq, sk=sk)
    sink = a.pop("sink")
    leaves = [*a.values()] + [sink] * with_sink
    sink = sink if with_sink else None
    gate = rand(2, sq, HEADS, 1 if gated == "softplus" else D).requires_grad_() if gated else None
    leaves += [gate] * bool(gated)
    found = seal_ops.attention(
        **a, sink=sink, gate=gate, gate_function=gated or "sigmoid", return_lse=True, backend=backend
    )
    function = {"sigmoid": torch.sigmoid, "softplus": F.softplus, "identity": lambda x: x, None: None}[gated]
    compare(found, by_hand(**a, sink=sink, gate=gate, function=function), leaves)


@pytest.mark.parametrize("with_sink", [False, True])
def test_a_soft_cap_with_every_gradient(with_sink):
    a, _ = inputs()
    sink = a.pop("sink") if with_sink else a.pop("sink") * 0 - torch.inf  # of no weight
    found = seal_ops.attention(**a, sink=sink, softcap=0.7, return_lse=True, backend="reference")
    want = by_hand(**a, sink=sink if with_sink else None, softcap=0.7)
    compare(found, want, [*a.values()] + [sink] * with_sink)


def test_with_the_rotation():
    a, rand = inputs(sq=13, sk=13)
    cos, sin = seal_ops.rope_tables(16, *seal_ops.rope_frequencies(D))
    gate = rand(2, 13, HEADS, D).requires_grad_()
    found = seal_ops.rope_attention(**a, cos=cos, sin=sin, gate=gate, return_lse=True)
    q, k = turned(a["q"], a["k"], cos.double(), sin.double())
    want = by_hand(q, k, a["v"], a["scale"], a["sink"], gate, torch.sigmoid)
    compare(found, want, [*a.values(), gate])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_packed_sequences(backend):
    a, rand = inputs(packed=True, sq=12, sk=12)
    cu = torch.tensor([0, 5, 5, 12], dtype=torch.int32)
    gate = rand(12, HEADS, 1).requires_grad_()
    found = seal_ops.attention(**a, gate=gate, cu_seqlens=cu, return_lse=True, backend=backend)
    parts = [
        by_hand(*(a[n][s] for n in "qkv"), a["scale"], a["sink"], gate[s], torch.sigmoid)
        for s in (slice(5), slice(5, 12))
    ]
    compare(found, (torch.cat([o for o, _ in parts]), torch.cat([l for _, l in parts], -1)), [*a.values(), gate])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_row_that_sees_no_key(backend):
    """Its output is 0, its log-sum-exp the sink, and no gradient is NaN."""
    a = inputs(sq=9, sk=4)[0] | dict(backend=backend)
    out, lse = seal_ops.attention(**a, return_lse=True)
    assert not out[:, :5].any() and torch.equal(lse[..., :5], a["sink"][None, :, None].expand(2, HEADS, 5))
    (out.sum() + lse.sum()).backward()
    assert all(t.grad.isfinite().all() for t in a.values() if t is not backend)
    share = torch.sigmoid(a["sink"][:, None] - seal_ops.attention(**a | dict(sink=None), return_lse=True)[1])
    through_lse = share.sum((0, 2))
    alone = torch.autograd.grad(seal_ops.attention(**a, return_lse=True)[1].sum(), a["sink"])[0]
    torch.testing.assert_close(alone, through_lse, rtol=1e-12, atol=1e-12)


def test_without_a_sink_or_gate_nothing_is_added():
    a, _ = inputs(dtype=torch.float32)
    a.pop("sink")
    raw = torch.ops.seal.attention(*(a[n] for n in ("q", "k", "v", "scale")))
    assert all(torch.equal(x, y) for x, y in zip(seal_ops.attention(**a, return_lse=True), raw))


def test_16_bit_is_rounded_once_more():
    a, _ = inputs(dtype=torch.bfloat16)
    out = seal_ops.attention(**a)
    want, _ = by_hand(*(a[n].double() for n in ("q", "k", "v", "scale", "sink")))
    assert out.dtype == torch.bfloat16 and (out.double() - want).abs().max() <= 2**-6 * want.abs().max()
    out.sum().backward()
    assert a["sink"].grad.dtype == torch.bfloat16 and a["sink"].grad.any()


WRONG = {
    "sink per row": (dict(sink=torch.zeros(2, HEADS)), "sink must have shape [4] (one logit a query head), got [2, 4]"),
    "sink of integers": (dict(sink=torch.zeros(HEADS, dtype=torch.int64)), "sink must be bfloat16, float16, float32 or float64, got torch.int64"),  # noqa: E501
    "sink elsewhere": (dict(sink=torch.zeros(HEADS, device="meta")), "sink must be on q's device cpu, got meta"),
    "gate": (dict(gate=torch.zeros(2, 9, HEADS)), "gate must have q's shape [2, 9, 4, 16] or [2, 9, 4, 1], got [2, 9, 4]"),  # noqa: E501
    "function": (dict(gate_function="tanh"), "gate_function must be one of sigmoid, softplus, identity, got 'tanh'"),
    "offset": (dict(sink=torch.zeros(HEADS), offset=torch.zeros(HEADS, D)), "offset must be None with a sink (add it to the output), got [4, 16]"),  # noqa: E501
}  # fmt: skip


@pytest.mark.parametrize("op", ["attention", "rope_attention"])
@pytest.mark.parametrize("name", WRONG)
def test_bad_sinks_and_gates(op, name):
    change, sentence = WRONG[name]
    a = {n: t.detach() for n, t in inputs(sq=9, sk=9, dtype=torch.float32)[0].items() if n != "sink"}
    tables = dict(cos=torch.ones(9, D // 2), sin=torch.zeros(9, D // 2)) if op == "rope_attention" else {}
    with pytest.raises(ValueError) as e:
        getattr(seal_ops, op)(**a, **tables, **change)
    assert str(e.value) == f"seal::{op}: {sentence}"
