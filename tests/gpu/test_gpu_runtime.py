"""What surrounds the arithmetic: poisoned memory, repeatability, streams, devices, CUDA graphs, torch.compile, huge
tensors."""

import pytest
import torch
from cases import Case, gradients_of, make, run, run_plain
from measure import assert_close, oracle

import seal_ops
from seal_ops import rope_frequencies, rope_tables
from seal_ops.ops.dispatch import why_not


def call(backend, **options):
    return lambda **arguments: seal_ops.attention(**arguments, **options, backend=backend, return_lse=True)


def skip_unless(backend, op, head_dim):
    reason = why_not(backend, op, torch.device("cuda", 0), torch.bfloat16, head_dim)
    if reason:
        pytest.skip(reason)


ODD = [
    Case(113, 203, heads=(6, 2), batch=2, scale="channel", offset=True),
    Case(203, 113, heads=(4, 1), head_dim=128, scale="head"),
    Case(217, 217, heads=(4, 2), head_dim=128, window=33, scale="row-channel", batch=2, lse=True),
    Case(129, 129, heads=(4, 4), head_dim=256, causal=False, scale="channel"),
    Case((70, 0, 65, 1), (0, 65, 70, 1), heads=(4, 2), scale="channel"),
]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("case", ODD, ids=str)
def test_nothing_reads_memory_that_nobody_wrote(backend, device, case, deterministic, poisoned):
    """Outputs and workspaces start as NaN, and so does everything around q, k, v and the incoming gradient."""
    inputs = make(case, torch.bfloat16, device)
    grad_out, grad_lse = gradients_of(case, inputs)
    expected, plain = oracle(case, inputs, (grad_out, grad_lse)), run_plain(case, inputs, (grad_out, grad_lse))

    def framed(t):
        frame = torch.full([n + 8 for n in t.shape[:-1]] + [t.shape[-1]], torch.nan, dtype=t.dtype, device=t.device)
        inside = frame[tuple(slice(0, n) for n in t.shape)]
        return inside.copy_(t)

    leaves = {n: framed(inputs[n]).requires_grad_() for n in ("q", "k", "v")}
    leaves |= {n: inputs[n].requires_grad_() for n in ("scale", "offset") if inputs[n] is not None}
    out, lse = call(backend, deterministic=deterministic)(**{**inputs, **leaves})
    outputs, cotangents = [out], [framed(grad_out)]
    if grad_lse is not None:
        outputs, cotangents = [out, lse], [*cotangents, torch.where(lse.isfinite(), grad_lse, torch.nan)]
    grads = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
    got = {"out": out.detach(), "lse": lse.detach(), **{f"grad_{n}": g for n, g in zip(leaves, grads)}}
    assert_close(got, expected, plain)


REPEATED = [
    (Case(512, 512, heads=(8, 2), head_dim=64, batch=2, scale="channel", offset=True), "attention"),
    (Case(640, 640, heads=(8, 2), head_dim=128, batch=2, scale="channel"), "rope_attention"),
    (Case(384, 384, heads=(4, 4), head_dim=256, batch=2, scale="head"), "attention"),
    (Case((300, 0, 129, 211), (300, 0, 129, 211), heads=(8, 2), head_dim=128, scale="channel"), "attention"),
]


def backward_of(backend, case, op, deterministic):
    """A function that runs the backward op once on fixed inputs and returns its five gradients, and the forward's
    out."""
    device = torch.device("cuda", 0)
    inputs = make(case, torch.bfloat16, device)
    grad_out, _ = gradients_of(case, inputs)
    packed = {n: inputs.get(n) for n in ("cu_seqlens", "cu_seqlens_k")}
    rotation = {}
    if op == "rope_attention":
        cos, sin = rope_tables(case.sq, rope_frequencies(case.head_dim)[0], device=device)
        rotation = dict(cos=cos, sin=sin)
    out, lse = call(backend)(**inputs)
    needs = [True, True, True, inputs["scale"] is not None, inputs["offset"] is not None]
    arguments = [grad_out, None, *(inputs[n] for n in ("q", "k", "v")), out, lse, inputs["scale"], inputs["offset"]]
    options = dict(needs=needs, deterministic=deterministic, backend=backend, causal=case.causal, **rotation, **packed)
    return lambda: torch.ops.seal.attention_backward(*arguments, **options)


@pytest.mark.parametrize("case, op", REPEATED, ids=lambda x: str(x))
def test_a_thousand_deterministic_backwards_are_equal_bit_for_bit(backend, device, case, op):
    again = backward_of(backend, case, op, True)
    first = again()
    different = torch.zeros(
        (), dtype=torch.int64, device=device
    )  # counted on the device: a comparison on the host would sync
    for _ in range(1000):
        for a, b in zip(first, again()):
            different += (a != b).sum()
    assert different.item() == 0 and all(g.isfinite().all() for g in first)


@pytest.mark.parametrize("case, op", REPEATED, ids=lambda x: str(x))
def test_other_backwards_repeat_within_rounding(backend, device, case, op):
    again = backward_of(backend, case, op, False)
    first = again()
    worst = [torch.zeros((), device=device) for _ in first]
    for _ in range(200):
        for n, (a, b) in enumerate(zip(first, again())):
            if a.numel():
                worst[n] = torch.maximum(worst[n], (a.float() - b.float()).norm() / a.float().norm())
    assert max(w.item() for w in worst) < 1e-3


def test_the_forward_repeats_bit_for_bit(backend, device):
    inputs = make(Case(1023, 1024, heads=(8, 2), head_dim=128, batch=2, scale="channel"), torch.bfloat16, device)
    first = call(backend)(**inputs)
    for _ in range(100):
        assert all(torch.equal(a, b) for a, b in zip(first, call(backend)(**inputs)))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_another_stream(backend, device, head_dim):
    """The kernels wait for work queued before them on the current stream, and for nothing else."""
    case = Case(300, 300, heads=(4, 2), head_dim=head_dim, scale="channel", offset=True)
    inputs = make(case, torch.bfloat16, device)
    want = run(call(backend, deterministic=True), case, inputs)
    late = {n: torch.full_like(inputs[n], torch.nan) for n in ("q", "k", "v")}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # about 10 ms: a kernel on any other stream would read the NaN
        for name, tensor in late.items():
            tensor.copy_(inputs[name])
        got = run(call(backend, deterministic=True), case, {**inputs, **late})
    stream.synchronize()
    for name, value in want.items():
        assert torch.equal(got[name], value), name


def test_a_second_device(backend, device):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs a second GPU")
    case = Case(300, 300, heads=(4, 2), head_dim=128, scale="channel", offset=True)
    want = run(call(backend, deterministic=True), case, make(case, torch.bfloat16, device))
    assert torch.cuda.current_device() == 0
    got = run(call(backend, deterministic=True), case, make(case, torch.bfloat16, torch.device("cuda", 1)))
    for name, value in want.items():
        assert got[name].device.index == 1 and torch.equal(got[name].to(device), value), name
    cos, sin = rope_tables(300, rope_frequencies(128)[0])
    inputs = make(case, torch.bfloat16, torch.device("cuda", 1))
    here = seal_ops.rope(
        inputs["q"].to(device), inputs["k"].to(device), cos.to(device), sin.to(device), backend=backend
    )
    there = seal_ops.rope(inputs["q"], inputs["k"], cos.to("cuda:1"), sin.to("cuda:1"), backend=backend)
    assert all(torch.equal(a, b.to(device)) for a, b in zip(here, there))


@pytest.mark.parametrize("op", ["attention", "rope_attention"])
def test_cuda_graph(backend, device, op):
    """Forward and backward captured once, replayed on new contents of the same tensors."""
    case = Case(513, 513, heads=(8, 2), head_dim=128, batch=2, scale="channel")
    inputs = make(case, torch.bfloat16, device)
    leaves = [inputs[n].requires_grad_() for n in ("q", "k", "v", "scale")]
    grad_out, _ = gradients_of(case, inputs)
    table = rope_tables(513, rope_frequencies(128)[0], device=device)

    def step():
        if op == "attention":
            out = seal_ops.attention(*leaves, deterministic=True, backend=backend)
        else:
            out = seal_ops.rope_attention(*leaves[:3], *table, scale=leaves[3], deterministic=True, backend=backend)
        return (out.detach(), *torch.autograd.grad(out, leaves, grad_out))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):  # loads modules and compiles outside the capture
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (2, 3):
        fresh = make(case, torch.bfloat16, device, seed)
        with torch.no_grad():
            for leaf, name in zip(leaves, ("q", "k", "v", "scale")):
                leaf.copy_(fresh[name])
        for tensor in captured:
            tensor.fill_(torch.nan)
        graph.replay()
        for replayed, eager in zip(captured, step()):
            assert torch.equal(replayed, eager)


@pytest.mark.parametrize("op", ["attention", "rope_attention"])
def test_inductor_compiles_one_graph(backend, device, op):
    torch._dynamo.reset()
    table = rope_tables(400, rope_frequencies(64)[0], device=device)
    scale = torch.randn(4, 64, device=device, requires_grad=True)

    def layer(q, k, v):
        if op == "attention":
            return seal_ops.attention(q * 2, k, v, scale, backend=backend).float().square().sum()
        return seal_ops.rope_attention(q * 2, k, v, *table, scale=scale, backend=backend).float().square().sum()

    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (257, 391):
            q, k, v = (
                torch.randn(2, length, heads, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
                for heads in (4, 2, 2)
            )
            gradients = [torch.autograd.grad(f(q, k, v), (q, k, v, scale)) for f in (compiled, layer)]
            for a, b in zip(*gradients):
                torch.testing.assert_close(a, b, rtol=3e-2, atol=3e-2 * float(b.abs().max()))


@pytest.mark.parametrize("layout", ["many rows", "wide rows"])
def test_more_than_2_31_elements(backend, device, layout, alone):
    """Offsets beyond 32 bits: many batch rows, and long strides of a slice of a packed projection."""
    if layout == "many rows":
        batch, seqlen, width = 8200, 512, 4  # q: 2.15e9 elements
    else:
        batch, seqlen, width = 1, 4100, 4100  # a row stride of 4,100 heads of 128
    whole = torch.empty(batch, seqlen, width, 128, device=device, dtype=torch.bfloat16).normal_()
    assert whole.numel() > 2**31
    q = whole if layout == "many rows" else whole[:, :, -4:]
    k, v = whole[:, :, -1:], whole[:, :, :1]
    scale = torch.randn(4, 128, device=device)
    arguments = dict(causal=True, backend=backend)
    out, lse = torch.ops.seal.attention(q, k, v, scale, **arguments)
    needs = [True, True, True, True, False]
    grads = torch.ops.seal.attention_backward(
        q, None, q, k, v, out, lse, scale, needs=needs, deterministic=True, **arguments
    )
    for rows in (slice(0, 1), slice(batch - 1, batch)):
        small = [t[rows].contiguous() for t in (q, k, v)]
        want, want_lse = torch.ops.seal.attention(*small, scale, **arguments)
        torch.testing.assert_close(out[rows], want, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(lse[rows], want_lse, rtol=1e-4, atol=1e-4)
        expected = torch.ops.seal.attention_backward(
            small[0], None, *small, want, want_lse, scale, needs=needs, deterministic=True, **arguments
        )
        for got, exact in zip(grads[:3], expected[:3]):
            torch.testing.assert_close(got[rows], exact, rtol=2e-2, atol=2e-2 * float(exact.abs().max()))
