"""Scale and offset of every legal shape and of extreme values, on every backend."""

import pytest
import torch
from cases import Case, make, plain_pytorch, run, run_plain
from measure import assert_close, oracle

import seal_ops


def call(backend, **more):
    return lambda **inputs: seal_ops.attention(**{**inputs, **more}, backend=backend, return_lse=True)


def inputs_of(case, backend, device) -> dict:
    dtype = torch.float32 if device.type == "cpu" and backend != "cpu" else torch.bfloat16
    return make(case, dtype, device)


SHAPES = [
    Case(33, 33, heads=(4, 2), batch=3, scale="row-head-2d"),
    Case(20, 33, heads=(4, 1), batch=3, scale="one-head", offset="row"),
    Case(33, 20, heads=(2, 2), batch=2, scale="one-channel", offset="row", lse=True),
    Case(33, 33, batch=3, scale=None, offset="row"),
    Case((9, 0, 33), (9, 0, 33), heads=(4, 2), scale="row-head-2d", offset="row"),
    Case((9, 12), (30, 12), heads=(4, 2), scale="row-channel", offset="row"),
    Case((9, 12), (30, 12), scale="one-channel", offset=True),
]


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_every_shape_of_scale_and_offset(backend, device, case):
    inputs = inputs_of(case, backend, device)
    assert_close(run(call(backend), case, inputs), oracle(case, inputs), run_plain(case, inputs))


@pytest.mark.parametrize("view", ["rows", "channels", "heads", "transposed"])
def test_expanded_and_strided_factors(backend, device, view):
    """The same numbers as a broadcast or transposed view; the gradient arrives at what was expanded."""
    case = Case(
        21,
        21,
        heads=(4, 2),
        head_dim=16,
        batch=3,
        scale={"channels": "head", "heads": "one-head"}.get(view, "channel"),
        offset=True,
    )
    inputs = inputs_of(case, backend, device)
    if view == "heads":  # one factor for all heads
        inputs["scale"] = inputs["scale"][:, 1:2]

    def function(scale, offset, **others):
        if view == "rows":
            scale, offset = scale.expand(3, 4, 16), offset.expand(3, 4, 16)
        elif view == "channels":
            scale = scale[:, None].expand(4, 16)
        elif view == "heads":
            scale = scale.expand(1, 4, 1)
        else:
            scale, offset = (t.T.contiguous().T for t in (scale, offset))
        return others["backend_call"](
            scale=scale, offset=offset, **{n: t for n, t in others.items() if n != "backend_call"}
        )

    got, plain = (run(lambda **a: function(**a, backend_call=f), case, inputs) for f in (call(backend), plain_pytorch))
    expanded = {**inputs, "scale": inputs["scale"].expand(1, 4, 1).clone()} if view == "heads" else inputs
    exact = oracle(case, expanded)
    if view == "heads":  # the oracle's gradient is one a head
        for results in (got, plain):
            assert results["grad_scale"].shape == (1, 1, 1)
        torch.testing.assert_close(
            got["grad_scale"].double(), exact["grad_scale"].sum(1, keepdim=True), rtol=2e-2, atol=2e-2
        )
        del exact["grad_scale"]
    assert_close(got, exact, plain)


@pytest.mark.parametrize("value", [1e3, -1e3, 1e-5])
@pytest.mark.parametrize("scale", ["head", "channel"])
def test_extreme_factors(backend, device, value, scale):
    """A thousand and almost nothing beside zeros and usual factors: what one head or channel holds, hides no other."""
    case = Case(40, 40, heads=(4, 2), scale=scale)
    inputs = inputs_of(case, backend, device)
    flat = inputs["scale"].view(4, -1)
    flat[1, -1], flat[3, 0], flat[0, 0] = value, value, 0.0
    assert_close(run(call(backend), case, inputs), oracle(case, inputs), run_plain(case, inputs))


@pytest.mark.parametrize("heads", [(48, 1), (71, 1)], ids=str)
def test_many_heads_of_a_group(backend, device, heads):
    case = Case(11, 11, heads=heads, head_dim=16, scale="channel")
    inputs = inputs_of(case, backend, device)
    assert_close(run(call(backend), case, inputs), oracle(case, inputs), run_plain(case, inputs))


MASKS = [dict(), dict(causal=False), dict(window=7), dict(window=5, causal=False)]


@pytest.mark.parametrize("masked", MASKS, ids=str)
@pytest.mark.parametrize("softmax_scale", [0.0, -0.3, 0.7])
def test_any_softmax_scale(backend, device, softmax_scale, masked):
    """With 0 every allowed key counts alike; below 0 the least similar counts most. The mask comes after the
    multiplication."""
    if device.type == "cuda" and backend == "cuda" and softmax_scale <= 0:
        pytest.skip("the cuda kernels take positive softmax scales")
    for sq, sk in ((21, 21), (21, 30), (30, 21)):
        case = Case(sq, sk, heads=(4, 2), lse=True, **masked)
        inputs = {**inputs_of(case, backend, device), "softmax_scale": softmax_scale}
        assert_close(run(call(backend), case, inputs), oracle(case, inputs), run_plain(case, inputs))
