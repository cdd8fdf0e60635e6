"""The measure itself: what a kernel could get wrong in one head, channel, slab or sequence has to fail, in every
result.

Right results come from the cpu backend; each test spoils one of them and expects `assert_close` to name it.
"""

import pytest
import torch
from cases import Case, make, run, run_plain
from measure import assert_close, excess, norms, oracle

import seal_ops

FACTORS = [
    dict(scale="channel"),
    dict(scale="head", offset=True),
    dict(scale=None, lse=True),
    dict(scale="row-channel", lse=True),
    dict(scale="row-head", offset=True),
    dict(scale="channel", offset=True),
]
SHAPES = [
    dict(sq=60, sk=93, heads=(4, 4), batch=2),
    dict(sq=97, sk=97, heads=(6, 2), batch=2),
    dict(sq=64, sk=97, heads=(4, 2), batch=2, causal=False),
    dict(sq=128, sk=128, heads=(4, 4), batch=2, window=37),
    dict(sq=(70, 0, 33, 40), sk=(70, 0, 33, 40), heads=(4, 2)),
    dict(sq=(40, 1, 64), sk=(64, 30, 70), heads=(6, 2), causal=False, window=31, head_dim=128),
]
CASES = [Case(**shape, **FACTORS[(n + 3 * i) % 6]) for n, shape in enumerate(SHAPES) for i in (0, 1)]
GRADIENTS = ("grad_q", "grad_k", "grad_v")


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
def results(request):
    """(case, right results, oracle, plain PyTorch's) of every case in one dtype."""
    found = []
    for case in CASES:
        inputs = make(case, request.param, "cpu")
        function = lambda **arguments: seal_ops.attention(**arguments, return_lse=True, backend="cpu")
        found.append((case, run(function, case, inputs), oracle(case, inputs), run_plain(case, inputs)))
    return found


def assert_seen(what: str, case: Case, right: dict, name: str, change, exact, plain) -> None:
    wrong = right[name].clone()
    change(wrong)
    if torch.equal(wrong, right[name]):  # a head whose factor is 0 is zero as it stands
        return
    share, where = excess(name, wrong, exact, plain)
    assert share > 1, f"{case}: {what} of {name} went unseen ({share:.2f} of what is allowed; {where})"


def rows_of(name: str, tensor: torch.Tensor, case: Case) -> list:
    """Views [S, H, ..] of every batch row or packed sequence that has rows."""
    if name == "lse":
        tensor = tensor.transpose(-1, -2)
    if not case.packed:
        return list(tensor)
    return [view for view in tensor.split(case.sk if name in ("grad_k", "grad_v") else case.sq) if len(view)]


def drowned(case: Case, name: str, head: int) -> bool:
    """A factor of 1e-3 for the whole head under an offset of ordinary size: delta is formed from the rounded `out`,
    and its error is larger than what a channel of grad_q and grad_k holds."""
    return name in ("grad_q", "grad_k") and case.offset and (case.scale or "").endswith("head") and case.heads[0] > 4


def each(results, names=("out", "lse", *GRADIENTS)):
    for case, right, exact, plain in results:
        for name in names:
            yield case, right, exact, plain, name


def test_right_results_pass_and_wrong_ones_are_named(results):
    for _, right, exact, plain in results:
        assert_close(right, exact, plain)
        for name in right:
            with pytest.raises(AssertionError, match=f"^{name}: row or sequence .* allowed"):
                assert_close({**right, name: torch.where(right[name].isfinite(), 0.0, right[name])}, exact, plain)
            with pytest.raises(AssertionError, match=f"^{name}: not finite exactly where the oracle is"):
                assert_close({**right, name: torch.full_like(right[name], torch.nan)}, exact, plain)
            with pytest.raises(AssertionError, match=f"^{name}: shape "):
                assert_close({**right, name: right[name][None]}, exact, plain)


@pytest.mark.parametrize("head", [1, -1])
def test_all_heads_but_one_zero(results, head):
    for case, right, exact, plain, name in each(results):

        def change(tensor):
            for view in rows_of(name, tensor, case):
                kept = view[:, head].clone()
                view.zero_()[:, head] = kept

        assert_seen(f"all but head {head}", case, right, name, change, exact, plain)


@pytest.mark.parametrize("head", [1, -1])
def test_one_head_zero(results, head):
    for case, right, exact, plain, name in each(results):
        change = lambda tensor: [view[:, head].zero_() for view in rows_of(name, tensor, case)]
        assert_seen(f"head {head}", case, right, name, change, exact, plain)


@pytest.mark.parametrize("channel", [2, 33, -1])
def test_one_channel_of_one_head_zero(results, channel):
    for case, right, exact, plain, name in each(results, ("out", *GRADIENTS)):
        for head in range(right[name].shape[-2]):
            if drowned(case, name, head):
                continue
            change = lambda tensor: [view[:, head, channel].zero_() for view in rows_of(name, tensor, case)]
            assert_seen(f"channel {channel} of head {head}", case, right, name, change, exact, plain)


@pytest.mark.parametrize("quarter", range(4))
def test_one_quarter_of_the_rows_zero(results, quarter):
    for case, right, exact, plain, name in each(results):

        def change(tensor):
            for view in rows_of(name, tensor, case):
                view.tensor_split(4)[quarter].zero_()

        assert_seen(f"quarter {quarter}", case, right, name, change, exact, plain)


@pytest.mark.parametrize("quarter", range(4))
def test_one_quarter_of_one_head_zero(results, quarter):
    for case, right, exact, plain, name in each(results):

        def change(tensor):
            for view in rows_of(name, tensor, case):
                view.tensor_split(4)[quarter][:, -1].zero_()

        assert_seen(f"quarter {quarter} of the last head", case, right, name, change, exact, plain)


@pytest.mark.parametrize("row", [0, 1, -1])
def test_one_batch_row_or_packed_sequence_zero(results, row):
    for case, right, exact, plain, name in each(results):
        change = lambda tensor: rows_of(name, tensor, case)[row].zero_()
        assert_seen(f"row {row}", case, right, name, change, exact, plain)


@pytest.mark.parametrize("heads", [(0, 1), (0, -1)])
def test_swapped_heads(results, heads):
    for case, right, exact, plain, name in each(results):

        def change(tensor):
            for view in rows_of(name, tensor, case):
                view[:, list(heads)] = view[:, list(heads[::-1])].clone()

        assert_seen(f"heads {heads} swapped", case, right, name, change, exact, plain)


def factor_gradients(results):
    for case, right, exact, plain in results:
        for name in ("grad_scale", "grad_offset"):
            if name in right:
                yield case, right, exact, plain, name


def test_factor_gradients_of_one_head_channel_or_row_zero_or_swapped(results):
    for case, right, exact, plain, name in factor_gradients(results):
        like = right[name]
        at = 0 if like.dim() < 3 else 1  # the dimension of heads
        for head in range(like.shape[at]):
            assert_seen(f"head {head}", case, right, name, lambda t: t.select(at, head).zero_(), exact, plain)
        swap = lambda t: t.copy_(t.roll(1, at))
        assert_seen("heads moved by one", case, right, name, swap, exact, plain)
        if like.shape[-1] == case.head_dim:
            order = (
                exact[name].select(at, 0).flatten(0, -2).abs().sum(0).argsort()
                if like.dim() == 3
                else exact[name][0].abs().argsort()
            )
            for channel in order[[len(order) // 2, -1]]:  # a sum over all tokens may come out near 0 by itself
                change = lambda t: t.select(at, 0).select(-1, channel).zero_()
                assert_seen(f"channel {channel}", case, right, name, change, exact, plain)
        if like.dim() == 3:
            assert_seen("row 0", case, right, name, lambda t: t[0].zero_(), exact, plain)


def test_a_cell_never_has_fewer_than_eight_rows_of_a_sequence_that_has_them():
    case = Case((5, 17, 64, 0, 200), (5, 17, 64, 0, 200), scale=None)
    inputs = make(case, torch.float32, "cpu")
    exact = oracle(case, inputs)
    cells, _ = norms("out", torch.ones_like(exact["out"]), exact)
    assert cells == [(0, 0), (1, 0), (1, 1), *((2, i) for i in range(4)), *((4, i) for i in range(4))]
