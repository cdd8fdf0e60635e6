"""attention on every backend: against the oracle, under autograd and torch.compile, on ugly inputs."""

import pytest
import torch
from cases import SMALL, Case, gradients_of, make, run, run_plain
from layouts import dtypes, half, strided
from measure import assert_close, oracle
from torch.library import opcheck

import seal_ops
from seal_ops.ops.dispatch import why_not

seal = torch.ops.seal


def call(backend, **more):
    return lambda **inputs: seal_ops.attention(**inputs, **more, backend=backend, return_lse=True)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_against_the_oracle(backend, device, case):
    for dtype in dtypes(backend, device):
        if (reason := why_not(backend, "attention", device, dtype, case.head_dim)) is not None:
            assert str(case.head_dim) in reason  # only a head_dim may be left out by a backend that runs at all
            continue
        inputs = make(case, dtype, device)
        assert_close(run(call(backend), case, inputs), oracle(case, inputs), run_plain(case, inputs))


@pytest.mark.parametrize("case", [SMALL[5], SMALL[7], SMALL[12]], ids=str)
def test_deterministic_gradients_repeat_bit_for_bit(backend, device, case):
    inputs = make(case, half(backend, device), device)
    first, second = (run(call(backend, deterministic=True), case, inputs) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_rows_without_a_key_are_empty_not_nan(backend, device):
    """Sq > Sk under a causal mask: the first queries see nothing."""
    case = Case(9, 4, scale="channel", offset=True)
    inputs = make(case, half(backend, device), device)
    got = run(call(backend), case, inputs)
    offset = inputs["offset"].to(got["out"].dtype)
    assert torch.equal(got["out"][:, :5], offset.expand(1, 5, -1, -1))
    assert torch.equal(got["lse"][..., :5], torch.full_like(got["lse"][..., :5], -torch.inf))
    assert torch.equal(got["grad_q"][:, :5], torch.zeros_like(got["grad_q"][:, :5]))
    assert all(torch.isfinite(t).all() for n, t in got.items() if n != "lse")


def test_zero_scale_has_an_exact_gradient(backend, device):
    case = Case(21, 21, scale="channel")
    inputs = make(case, half(backend, device), device)
    inputs["scale"].zero_()
    got, exact = run(call(backend), case, inputs), oracle(case, inputs)
    assert torch.equal(got["out"], torch.zeros_like(got["out"])) and exact["grad_scale"].abs().max() > 0.1
    assert_close(got, exact, run_plain(case, inputs))


def test_only_what_needs_a_gradient_is_computed(backend, device):
    case = Case(19, 19, scale="channel", offset=True)
    inputs = make(case, half(backend, device), device)
    out, lse = call(backend)(**inputs)
    grad_out, _ = gradients_of(case, inputs)
    whole = run(call(backend), case, inputs)
    names = ("grad_q", "grad_k", "grad_v", "grad_scale", "grad_offset")
    tolerance = max(1e-5, 2 * torch.finfo(inputs["q"].dtype).eps)
    for wanted in [(0,), (1, 2), (3,), (4,), (2, 3), ()]:
        needs = [n in wanted for n in range(5)]
        got = seal.attention_backward(
            grad_out,
            None,
            inputs["q"],
            inputs["k"],
            inputs["v"],
            out,
            lse,
            inputs["scale"],
            inputs["offset"],
            needs=needs,
            backend=backend,
        )
        for n, name in enumerate(names):
            if needs[n]:  # another path through the kernels and another order of summation may round differently
                error, size = (got[n] - whole[name]).abs().max().item(), whole[name].abs().max().item()
                assert error <= tolerance * size, f"{name} differs by {error} of {size}"
            else:
                assert got[n].shape == (0,), f"{name} was not asked for"


@pytest.mark.parametrize("how", ["transposed", "packed-qkv", "odd-stride", "misaligned", "last-not-1"])
def test_strides(backend, device, how):
    case = Case(29, 29, heads=(2, 2), batch=2, scale="head")
    inputs = make(case, half(backend, device), device)
    plain = run(call(backend), case, inputs)
    views = {n: strided(inputs[n], how) for n in ("q", "k", "v")}
    grads = gradients_of(case, inputs)
    leaves = {n: t.requires_grad_() for n, t in views.items()}
    out, lse = call(backend)(**{**inputs, **leaves})
    got = torch.autograd.grad(out, list(leaves.values()), strided(grads[0], how))
    for name, value in zip(("out", "grad_q", "grad_k", "grad_v"), (out, *got)):
        torch.testing.assert_close(value, plain[name], rtol=0, atol=1e-5 if value.dtype == torch.float32 else 1e-2)


def test_expanded_batch_and_grad_out(backend, device):
    case = Case(12, 12, batch=3)
    inputs = make(case, half(backend, device), device)
    one = {**inputs, **{n: inputs[n][:1].expand(3, -1, -1, -1) for n in ("q", "k", "v")}}
    copies = {**inputs, **{n: one[n].contiguous() for n in ("q", "k", "v")}}
    ones = torch.ones((), dtype=inputs["q"].dtype, device=device).expand(inputs["q"].shape)
    for a, b in zip(
        run(call(backend), case, one, (ones, None)).values(),
        run(call(backend), case, copies, (ones.contiguous(), None)).values(),
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("case", [SMALL[2], SMALL[4], SMALL[8], SMALL[12]], ids=str)
def test_opcheck(backend, device, case):
    if backend == "triton" and device.type == "cpu" and case is not SMALL[2]:
        pytest.skip("one case is enough under the interpreter")
    inputs = make(case, half(backend, device), device)
    leaves = {
        n: t.requires_grad_() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for n, t in inputs.items()
    }
    positional = [leaves.pop(n, None) for n in ("q", "k", "v", "scale", "offset", "cu_seqlens", "cu_seqlens_k")]
    opcheck(seal.attention.default, positional, dict(leaves, backend=backend), rtol=1e-2, atol=1e-2)
    out, lse = (t.detach() for t in seal.attention(*positional, **leaves, backend=backend))
    detached = [t if t is None else t.detach() for t in positional]
    grad_out, grad_lse = gradients_of(case, inputs)
    needs = [True, True, True, detached[3] is not None, detached[4] is not None]
    opcheck(
        seal.attention_backward.default,
        [grad_out, grad_lse, *detached[:3], out, lse, *detached[3:5], None, None, None, None, *detached[5:]],
        dict(leaves, needs=needs, backend=backend, deterministic=True),
        rtol=1e-2,
        atol=1e-2,
    )


def test_gradients_that_are_not_there_share_no_memory(backend, device):
    """Outputs of an op may not alias each other: what is wanted of no input comes as an empty tensor of its own."""
    case = Case(3, 2, scale=None)
    inputs = make(case, half(backend, device), device)
    q, k, v = (inputs[n] for n in "qkv")
    out, lse = seal.attention(q, k, v, backend=backend)
    for needs in ([True] * 7, [False] * 7):
        opcheck(
            seal.attention_backward.default,
            [gradients_of(case, inputs)[0], None, q, k, v, out, lse],
            dict(needs=needs, backend=backend),
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    "case",
    [
        Case(4, 6, heads=(2, 1), head_dim=8, scale="channel", offset=True, lse=True),
        Case(5, 3, head_dim=8, scale="head"),
        Case(6, 6, head_dim=8, window=2, causal=False, scale=None, lse=True),
        Case((2, 0, 4), (3, 1, 4), heads=(2, 1), head_dim=8, scale="row-channel"),
    ],
    ids=str,
)
def test_gradcheck_in_fp64(backend, case):
    inputs = make(case, torch.float64, "cpu")
    if inputs["scale"] is not None:
        inputs["scale"].clamp_(-3, 3)
    names = [n for n in ("q", "k", "v", "scale", "offset") if inputs[n] is not None]

    def function(*leaves):
        out, lse = call(backend)(**{**inputs, **dict(zip(names, leaves))})
        return (out, torch.where(torch.isfinite(lse), lse, 0.0)) if case.lse else out

    torch.autograd.gradcheck(function, [inputs[n].requires_grad_() for n in names])


def test_compiles_as_one_graph_and_not_again_for_a_new_length(backend, device):
    torch._dynamo.reset()
    case = Case(24, 24, heads=(4, 2), scale="channel")
    inputs = make(case, half(backend, device), device)
    scale = inputs["scale"].requires_grad_()

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def layer(q, k, v):
        return seal_ops.attention(2 * q, k, v, scale, backend=backend).float().square().sum()

    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (24, 31, 40):
            q, k, v = (inputs[n][:, :1].expand(-1, length, -1, -1).contiguous().requires_grad_() for n in "qkv")
            layer(q, k, v).backward()
            compiled, scale.grad = scale.grad.clone(), None
            seal_ops.attention(2 * q, k, v, scale, backend=backend).float().square().sum().backward()
            torch.testing.assert_close(compiled, scale.grad, rtol=2e-2, atol=2e-2)
            scale.grad = None


@pytest.mark.parametrize("function", ["attention", "rope_attention"])
def test_second_derivatives_are_refused(function):
    q, k, v = (torch.randn(1, 3, 1, 8, requires_grad=True) for _ in range(3))
    table = () if function == "attention" else (torch.ones(3, 4), torch.zeros(3, 4))
    (first,) = torch.autograd.grad(getattr(seal_ops, function)(q, k, v, *table).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"\(second derivatives of attention\) are not implemented"):
        first.sum().backward()


def test_autocast_and_no_grad_leave_the_op_alone():
    q, k, v = (torch.randn(1, 6, 2, 16, requires_grad=True) for _ in range(3))
    with torch.no_grad():
        quiet = seal_ops.attention(q, k, v)
    assert not quiet.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(seal_ops.attention(q, k, v), quiet)


def test_the_raw_op_is_the_wrapper():
    q, k, v = (torch.randn(2, 6, 2, 16) for _ in range(3))
    out, lse = torch.ops.seal.attention(q, k, v)
    assert torch.equal(out, seal_ops.attention(q, k, v)) and lse.shape == (2, 2, 6)
