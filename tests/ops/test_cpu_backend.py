"""What is particular to the cpu backend: how a masked attention divides into calls of ATen."""

import pytest
import torch
from cases import Case, make, run, run_plain
from measure import assert_close, oracle

import seal_ops
from seal_ops.ops import masks as mask
from seal_ops.ops.backends import cpu


@pytest.mark.parametrize(
    "sq, sk", [(1, 1), (1, 700), (300, 300), (600, 600), (256, 257), (257, 512), (200, 900), (513, 514)]
)
@pytest.mark.parametrize(
    "causal, window",
    [(True, None), (False, None), (True, 1), (True, 100), (False, 1), (False, 70), (True, 599), (False, 2000)],
)
def test_pieces_hold_every_pair_once_and_no_other(sq, sk, causal, window):
    left, right = mask.bounds(causal, window)
    want, found = mask.allowed(sq, sk, left, right).int(), torch.zeros(sq, sk, dtype=torch.int32)
    for queries, keys, flagged, seen in cpu._pieces(sq, sk, left, right):
        rows, columns = queries.stop - queries.start, keys.stop - keys.start
        if flagged:
            assert rows == columns  # what ATen's flag means is not in doubt there
            found[queries, keys] += torch.ones(rows, columns, dtype=torch.int32).tril()
        elif seen is None:
            found[queries, keys] += 1
        else:
            assert seen[:2] == (rows, columns)
            found[queries, keys] += mask.allowed(rows, columns, left, right, first=seen[2])
    assert torch.equal(found, want)


@pytest.mark.parametrize("window, causal, most", [(256, True, 0.1), (256, False, 0.15), (None, True, 1.0)])
def test_a_window_costs_what_it_sees(window, causal, most):
    """Pairs computed and elements of the largest mask for 6,000 queries at the end of 8,000 keys."""
    pieces = list(cpu._pieces(6000, 8000, *mask.bounds(causal, window)))
    pairs = sum((q.stop - q.start) * (k.stop - k.start) for q, k, _, _ in pieces)
    assert pairs <= most * 6000 * 8000
    assert max(seen[0] * seen[1] for *_, seen in pieces) <= cpu._CHUNK * min(8000, 2 * (window or 8000) + cpu._CHUNK)


CASES = [
    Case(600, 600, heads=(2, 1), head_dim=32, window=90, lse=True),
    Case(520, 520, heads=(2, 1), head_dim=32, window=70, causal=False),
    Case(300, 900, heads=(4, 2), head_dim=32, scale="head", offset=True),
    Case(700, 300, heads=(2, 2), head_dim=32, window=50, lse=True),
    Case((300, 0, 513, 20), (300, 0, 513, 20), heads=(2, 1), head_dim=32, window=40),
    Case(600, 600, heads=(2, 2), head_dim=32),
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
