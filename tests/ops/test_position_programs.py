"""Position programs against their own definition: one matrix of distances, written here, and nothing rotated in parts."""  # noqa: E501

import functools
import math

import position_matrices
import pytest
import torch

import seal_ops
from seal_ops.ops import position_programs

D, HEADS, KV = 16, 4, 2
FREQUENCIES = 100.0 ** -(torch.arange(0, D, 2, dtype=torch.float64) / D)


def table(rows=80):
    angle = torch.arange(rows, dtype=torch.float64)[:, None] * FREQUENCIES
    return angle.cos(), angle.sin()


PROGRAMS = {
    "self_extend": (position_matrices.self_extend, [dict(group=4, window=8), dict(group=3, window=7), dict(group=1, window=5), dict(group=5, window=1)]),  # noqa: E501
    "dual_chunk": (position_matrices.dual_chunk, [dict(chunk=8, length=12), dict(chunk=5, length=5), dict(chunk=7, length=20), dict(chunk=64, length=70)]),  # noqa: E501
    "capped": (position_matrices.capped, [dict(sinks=4, window=9), dict(sinks=2, window=6, limit=11), dict(sinks=0, window=5), dict(sinks=10, window=3)]),  # noqa: E501
    "streaming": (position_matrices.streaming, [dict(sinks=4, window=9), dict(sinks=1, window=1), dict(sinks=0, window=7), dict(sinks=12, window=5)]),  # noqa: E501
}  # fmt: skip
CASES = [(name, options) for name, (_, variants) in PROGRAMS.items() for options in variants]


def direct(q, k, v, scale, distances, options, sink=None):
    """One batch row: q [Sq, Hq, D], k and v [Sk, Hkv, D]."""
    sq, sk = q.shape[0], k.shape[0]
    p, j = torch.arange(sk - sq, sk)[:, None], torch.arange(sk)[None]
    out, lse = position_matrices.attention(q, k, v, *distances(p, j, **options), FREQUENCIES, D**-0.5, sink)
    return out * scale, lse


def inputs(*lead, sq, sk, seed=0):
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()
    return rand(*lead, sq, HEADS, D), rand(*lead, sk, KV, D), rand(*lead, sk, KV, D)


def compare(found, want, leaves):
    g = torch.Generator().manual_seed(5)
    seen = want[1] > -math.inf
    assert torch.equal(found[1] > -math.inf, seen)
    weights = [torch.randn(t.shape, generator=g, dtype=torch.float64) for t in want]
    total = lambda pair: (pair[0] * weights[0]).sum() + (pair[1][seen] * weights[1][seen]).sum()
    grads = [torch.autograd.grad(total(pair), leaves) for pair in (found, want)]
    for a, b in zip((found[0], found[1][seen], *grads[0]), (want[0], want[1][seen], *grads[1])):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("sq, sk", [(37, 37), (9, 37), (1, 37), (3, 3), (40, 33)])
@pytest.mark.parametrize("name, options", CASES, ids=str)
def test_dense_rows(name, options, sq, sk):
    """Outputs, log-sum-exp and all gradients of two rows, with a channel scale."""
    q, k, v = inputs(2, sq=sq, sk=sk)
    scale = torch.randn(HEADS, D, dtype=torch.float64).requires_grad_()
    program = getattr(position_programs, name)
    found = program(q, k, v, *table(), scale=scale, return_lse=True, **options)
    rows = [direct(q[b], k[b], v[b], scale, PROGRAMS[name][0], options) for b in range(2)]
    compare(found, [torch.stack(t) for t in zip(*rows)], [q, k, v, scale])


@pytest.mark.parametrize(
    "lengths", [((20, 0, 31, 3), None), ((5, 1, 0, 9), (30, 17, 4, 9)), ((1, 1, 1), (37, 2, 11))], ids=str
)
@pytest.mark.parametrize("name, options", CASES, ids=str)
def test_packed_sequences(name, options, lengths):
    """Positions, chunks and sinks restart in each; also where a cache holds more keys than there are queries."""
    rows, keys = lengths
    keys = rows if keys is None else keys
    cu = lambda n: torch.tensor([0, *n]).cumsum(0).to(torch.int32)
    q, k, v = inputs(sq=sum(rows), sk=sum(keys))
    scale = torch.randn(len(rows), HEADS, 1, dtype=torch.float64).requires_grad_()
    packing = dict(cu_seqlens=cu(rows)) | ({} if lengths[1] is None else dict(cu_seqlens_k=cu(keys)))
    found = getattr(position_programs, name)(q, k, v, *table(), scale=scale, return_lse=True, **packing, **options)
    parts = [
        direct(a, b, c, s, PROGRAMS[name][0], options)
        for a, b, c, s in zip(q.split(rows), k.split(keys), v.split(keys), scale)
    ]
    compare(found, [torch.cat([o for o, _ in parts]), torch.cat([l for _, l in parts], 1)], [q, k, v, scale])


@pytest.mark.parametrize("name, options", [c for c in CASES if c[1] == PROGRAMS[c[0]][1][0]], ids=str)
def test_a_cache_of_unrotated_keys(name, options):
    """Token by token, and in uneven pieces, what the whole gives."""
    q, k, v = (t.detach() for t in inputs(2, sq=41, sk=41))
    program = functools.partial(getattr(position_programs, name), **options)
    whole = program(q, k, v, *table())
    for cuts in (range(42), [0, 11, 12, 30, 41]):
        pieces = [program(q[:, a:b], k[:, :b], v[:, :b], *table()) for a, b in zip(cuts, list(cuts)[1:])]
        torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_learned_sink(name):
    options = PROGRAMS[name][1][0]
    q, k, v = inputs(1, sq=30, sk=30)
    scale, sink = (torch.randn(*s, dtype=torch.float64).requires_grad_() for s in ((HEADS, D), (HEADS,)))
    found = getattr(position_programs, name)(q, k, v, *table(), scale=scale, sink=sink, return_lse=True, **options)
    want = direct(q[0], k[0], v[0], scale, PROGRAMS[name][0], options, sink)
    compare(found, [t[None] for t in want], [q, k, v, scale, sink])


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_backend(name, backend, device):
    """In half precision on CUDA's kernels; the parts are rounded before they are merged."""
    options, dtype = PROGRAMS[name][1][0], torch.float16 if backend == "cuda" else torch.float32
    q, k, v = (t.detach().to(dtype) for t in inputs(2, sq=40, sk=40))
    cos, sin = (t.to(device, torch.float32) for t in table())
    program = getattr(position_programs, name)
    got = program(*(t.to(device) for t in (q, k, v)), cos, sin, backend=backend, **options)
    rows = [[t[b].double() for t in (q, k, v)] for b in range(2)]
    want = torch.stack([direct(*row, 1.0, PROGRAMS[name][0], options)[0] for row in rows])
    bound = 4e-3 if backend == "cuda" else 1e-4
    torch.testing.assert_close(got.cpu().double(), want, rtol=bound, atol=bound)


def test_short_texts_are_plain_attention():
    """Within the window, the chunk or the sinks nothing is changed."""
    q, k, v = (t.detach() for t in inputs(1, sq=12, sk=12))
    cos, sin = table()
    plain = seal_ops.rope_attention(q, k, v, cos, sin)
    for name, options in [
        ("self_extend", dict(group=4, window=12)), ("dual_chunk", dict(chunk=12, length=16)),
        ("dual_chunk", dict(chunk=6, length=12)), ("capped", dict(sinks=2, window=12)), ("streaming", dict(sinks=4, window=8)),  # noqa: E501
    ]:  # fmt: skip
        got = getattr(position_programs, name)(q, k, v, cos, sin, **options)
        torch.testing.assert_close(got, plain, rtol=1e-12, atol=1e-12)


def test_keys_that_no_query_sees_are_not_turned(monkeypatch):
    """A step of decoding reads the window and the sinks, not the whole cache."""
    seen = []
    body = position_programs.rope_attention
    monkeypatch.setattr(
        position_programs, "rope_attention", lambda q, k, *a, **b: seen.append(k.shape[1]) or body(q, k, *a, **b)
    )
    q, k, v = (t.detach() for t in inputs(1, sq=1, sk=70))
    position_programs.capped(q, k, v, *table(), sinks=4, window=9)
    position_programs.dual_chunk(q, k, v, *table(), chunk=8, length=12)
    assert seen == [9, 4, 6, 14, 70]


WRONG = [
    ("self_extend", dict(group=0, window=4), "group must be an integer of at least 1, got 0"),
    ("self_extend", dict(group=2.5, window=4), "group must be an integer of at least 1, got 2.5"),
    ("self_extend", dict(group=2, window=0), "window must be an integer of at least 1, got 0"),
    ("dual_chunk", dict(chunk=0, length=4), "chunk must be an integer of at least 1, got 0"),
    ("dual_chunk", dict(chunk=9, length=8), "chunk must be at most the trained length 8, got 9"),
    ("dual_chunk", dict(chunk=9, length=99), "cos must have a row for each of 99 positions, got [80, 8]"),
    ("capped", dict(sinks=-1, window=4), "sinks must be an integer of at least 0, got -1"),
    ("capped", dict(sinks=1, window=0), "window must be an integer of at least 1, got 0"),
    ("capped", dict(sinks=1, window=4, limit=80), "limit must be below the 80 rows of cos, got 80"),
    ("streaming", dict(sinks=True, window=4), "sinks must be an integer of at least 0, got True"),
]  # fmt: skip


@pytest.mark.parametrize("name, options, sentence", WRONG, ids=str)
def test_bad_options(name, options, sentence):
    with pytest.raises(ValueError) as e:
        getattr(position_programs, name)(*inputs(1, sq=5, sk=5), *table(), **options)
    assert str(e.value) == f"seal_ops.{name}: {sentence}"


@pytest.mark.parametrize("name", ["self_extend", "capped", "streaming"])
def test_a_short_table(name):
    with pytest.raises(ValueError, match=f"seal_ops.{name}: cos must have a row for each of 21 positions, got .20, 8."):
        getattr(position_programs, name)(*inputs(1, sq=5, sk=21), *table(20), **PROGRAMS[name][1][0])
    with pytest.raises(ValueError, match="cos must be a table"):
        cos, sin = (t[None] for t in table(21))
        getattr(position_programs, name)(*inputs(1, sq=21, sk=21), cos, sin, **PROGRAMS[name][1][0])
