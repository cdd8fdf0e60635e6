"""What is particular to the cpu backend: how a masked attention divides into calls of ATen."""

import dataclasses
import math

import pytest
import torch
from cases import Case, make, run, run_plain
from measure import assert_close, oracle

import seal_ops
from seal_ops import masks
from seal_ops.ops.backends import cpu
from seal_ops.ops.visibility import Visibility

MASKS = [
    masks.causal(),
    masks.full(),
    masks.window(1),
    masks.window(100),
    masks.band(0, 0),
    masks.band(-69, 69),
    masks.band(-1999, 1999),
    masks.band(3, 40),
    masks.band(None, -300),
    masks.streaming(4, 100),
    masks.streaming(300, 20),
    masks.streaming(2000, 1),
    masks.chunks(100),
    masks.chunks(256, before=(1, 1)),
    masks.chunks(70, before=(2, None)),
    dataclasses.replace(masks.chunks(90, before=(1, 2)), upper=-60, lower=-200, sinks=5),
]


def pairs(sq: int, sk: int, seen: Visibility) -> tuple[torch.Tensor, torch.Tensor]:
    """How often each pair is computed, and the rows that the pieces hold."""
    found, rows = torch.zeros(sq, sk, dtype=torch.int32), torch.zeros(sq, dtype=torch.int32)
    for piece in cpu._pieces(sq, sk, seen):
        keys = torch.cat([torch.arange(span.start, span.stop) for span in piece.keys])
        count = piece.queries.stop - piece.queries.start
        rows[piece.queries] += 1
        part = torch.ones(count, len(keys), dtype=torch.int32)
        if piece.causal:
            assert count == len(keys)  # what ATen's flag means is not in doubt there
            part = part.tril()
        elif (bias := piece.bias(seen, sk - sq, torch.float32)) is not None:
            part = (bias == 0).int()
        found[torch.arange(sq)[piece.queries, None], keys] += part
    return found, rows


@pytest.mark.parametrize(
    "sq, sk", [(1, 1), (1, 700), (300, 300), (600, 600), (256, 257), (257, 512), (200, 900), (513, 514), (600, 200)]
)
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_pieces_hold_every_pair_once_and_no_other(sq, sk, mask):
    seen = Visibility(*mask.resolve(1))
    (want,) = seen.allowed(sq, sk).int()
    found, rows = pairs(sq, sk, seen)
    alive = want.any(1)
    assert torch.equal(found[alive], want[alive]) and (rows[alive] == 1).all() and (rows <= 1).all()


@pytest.mark.parametrize(
    "mask, most",
    [
        (masks.window(256), 0.1),
        (masks.band(-255, 255), 0.15),
        (masks.causal(), 1.0),
        (masks.streaming(16, 256), 0.1),
        (masks.chunks(1500), 0.15),
        (masks.chunks(1500, before=(1, 1)), 0.25),
    ],
    ids=str,
)
def test_a_mask_costs_what_it_sees(mask, most):
    """Pairs computed and elements of the largest bias for 6,000 queries at the end of 8,000 keys."""
    seen = Visibility(*mask.resolve(1))
    pieces = list(cpu._pieces(6000, 8000, seen))
    keys = [sum(span.stop - span.start for span in piece.keys) for piece in pieces]
    assert sum((piece.queries.stop - piece.queries.start) * n for piece, n in zip(pieces, keys)) <= most * 6000 * 8000
    assert all(piece.whole or piece.queries.stop - piece.queries.start <= cpu._CHUNK for piece in pieces)
    assert max(keys) <= min(8000, most * 8000 + 3 * cpu._CHUNK + 1500)


CASES = [
    Case(600, 600, heads=(2, 1), head_dim=32, window=90, lse=True),
    Case(520, 520, heads=(2, 1), head_dim=32, window=70, causal=False),
    Case(300, 900, heads=(4, 2), head_dim=32, scale="head", offset=True),
    Case(700, 300, heads=(2, 2), head_dim=32, window=50, lse=True),
    Case((300, 0, 513, 20), (300, 0, 513, 20), heads=(2, 1), head_dim=32, window=40),
    Case(600, 600, heads=(2, 2), head_dim=32),
    Case(600, 700, heads=(4, 2), head_dim=32, mask=masks.shifted_groups(150, sinks=4), lse=True),
    Case((300, 513), (300, 600), heads=(2, 1), head_dim=32, mask=masks.streaming(300, 30), scale="row-head"),
    Case(700, 700, heads=(2, 1), head_dim=32, mask=masks.chunks(300, before=(1, 1)), offset=True, lse=True),
    # Two pieces with keys at the same distance, the border of two chunks in one of them alone.
    Case(800, 800, heads=(2, 1), head_dim=32, mask=dataclasses.replace(masks.chunks(400), lower=-50), lse=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_several_chunks(case, dtype):
    inputs = make(case, dtype, "cpu")
    function = lambda **arguments: seal_ops.attention(**arguments, return_lse=True, backend="cpu")
    assert_close(run(function, case, inputs), oracle(case, inputs), run_plain(case, inputs))


@pytest.mark.parametrize("softmax_scale", [0.0, -0.4, None])
def test_gradcheck_over_chunks(softmax_scale, monkeypatch):
    monkeypatch.setattr(cpu, "_CHUNK", 3)
    q, k, v = (torch.randn(1, 8, heads, 4, dtype=torch.float64, requires_grad=True) for heads in (2, 1, 1))
    for window, causal in ((3, True), (2, False), (None, True)):
        function = lambda *qkv: seal_ops.attention(
            *qkv, softmax_scale=softmax_scale, window=window, causal=causal, return_lse=True, backend="cpu"
        )
        assert torch.autograd.gradcheck(function, (q, k, v))
        assert torch.autograd.gradcheck(lambda *qkv: function(qkv[0][:, :5], *qkv[1:]), (q, k, v))


def test_a_query_that_sees_nothing_stays_out_of_the_gradients_of_large_scores():
    q, k, v = (torch.full((1, 40, 1, 16), 20.0, requires_grad=True) for _ in range(3))
    out = seal_ops.attention(q, k, v, mask=dataclasses.replace(masks.chunks(10), upper=-1), backend="cpu")
    grads = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert not out[:, ::10].any() and all(torch.isfinite(g).all() for g in grads)


MASKS = [None, masks.full(), masks.window(5), masks.streaming(4, 32), masks.chunks(16)]


def wrong_numbers(where):
    """q, k and v, some of whose numbers are none."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 70, heads, 16, generator=g) for heads in (4, 2, 2))
    q[:, 0] = 0  # one score of 0: a log-sum-exp of 0 that is right
    if where.endswith("q"):
        q[0, 60, 1] = math.nan if where == "q" else math.inf
    elif where == "one value":
        v[0, 33, 1] = math.nan
    else:
        found = {"keys": slice(20), "all keys": slice(None)}.get(where, slice(33, 34))
        k[0, found, 1] = math.inf if where == "infinite key" else math.nan
    return q, k, v


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("where", ["q", "infinite q", "keys", "one key", "infinite key", "all keys", "one value"])
def test_what_is_no_number_stays_none_and_reaches_who_sees_it_alone(where, mask):
    """ATen answers 0 for a row of scores that are all NaN, and hides a pair by adding -inf, which leaves NaN."""
    q, k, v = wrong_numbers(where)
    got = seal_ops.attention(q, k, v, mask=mask, backend="cpu", return_lse=True)
    expected = seal_ops.attention(q, k, v, mask=mask, backend="reference", return_lse=True)
    for a, b in zip(got, expected):
        assert b.isnan().any() or (where == "one value" and b is expected[1])
        torch.testing.assert_close(a, b, equal_nan=True, rtol=1e-4, atol=1e-5)
        assert not a[1].isnan().any()  # the other row of the batch


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("where", ["one key", "one value"])
def test_triton_lets_what_is_no_number_reach_no_more_queries_than_the_oracle(where, mask):
    q, k, v = wrong_numbers(where)
    got, expected = (seal_ops.attention(q, k, v, mask=mask, backend=name) for name in ("triton", "reference"))
    assert got.isnan().any() and not (got.isnan() & ~expected.isnan()).any()
    if where == "one key":  # a value of a tile that is left out does not reach the output by 0 times NaN, either
        assert torch.equal(got.isnan(), expected.isnan())
