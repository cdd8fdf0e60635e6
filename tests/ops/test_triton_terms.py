"""Sinks, output gates and soft caps inside the Triton kernels, in every cell against the oracle; and who runs what.

Triton's interpreter runs them on the CPU. What `seal_ops.attention` composes elsewhere is tests/ops/test_epilogue.py's.
"""

import pytest
import torch
from devices import device_of

import seal_ops
from seal_ops import masks
from seal_ops.ops import dispatch

if (_reason := dispatch.why_not("triton", "attention", device_of("triton"), torch.float16, 64)) is not None:
    pytest.skip(_reason, allow_module_level=True)

from cases import Case, make, run, run_plain  # noqa: E402
from measure import assert_close, excess, oracle  # noqa: E402

import seal_ops.ops.backends.triton as kernels  # noqa: E402
from seal_ops.ops.backends.triton import configs, decode, forward  # noqa: E402

DEVICE = device_of("triton")
STREAMING = masks.streaming(4, 20)
CASES = [
    Case(33, 33, heads=(2, 1), sink=True, lse=True),
    Case(40, 23, heads=(2, 1), gate="sigmoid"),
    Case(23, 40, heads=(4, 2), head_dim=32, gate="softplus-head", sink=True, scale="head", lse=True),
    Case(33, 65, heads=(2, 1), softcap=5.0, lse=True),
    Case(
        (7, 20, 0, 3), (12, 9, 4, 0), heads=(2, 1), sink=True, gate="softplus", softcap=2.0, lse=True, scale="row-head"
    ),
    Case(50, 50, mask=STREAMING, sink=True, gate="sigmoid-head", softcap=50.0, scale=None),
    Case(40, 40, head_dim=80, window=9, causal=False, softcap=3.0, offset=True, scale="zeros"),
    Case(20, 20, head_dim=32, blocks=32, gate="sigmoid", sink=True),
    Case(5, 0, sink=True, gate="sigmoid"),
    Case(0, 5, sink=True, gate="softplus-head"),
]
DECODING = [
    Case(4, 70, heads=(4, 2), head_dim=32, sink=True, gate="sigmoid", softcap=50.0),
    Case((2, 1, 0), (50, 40, 9), heads=(4, 2), head_dim=32, sink=True, gate="softplus-head", softcap=5.0, scale="head"),
]


def ours(**inputs):
    return torch.ops.seal.attention(**inputs, backend="triton")


def close(case, dtype, function=ours):
    inputs = make(case, dtype, DEVICE)
    assert_close(run(function, case, inputs), oracle(case, inputs), run_plain(case, inputs))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients(case):
    close(case, torch.float16)


SMALL_SCORES = Case(12, 12, head_dim=16, softcap=50.0, scale=None, lse=True)


@pytest.mark.parametrize("dtype, case", [(torch.float32, SMALL_SCORES), (torch.bfloat16, CASES[2])], ids=str)
def test_other_precisions(dtype, case):
    """In fp32 the tanh of small scores has to be right relative to itself."""
    close(case, dtype)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("case", DECODING, ids=str)
def test_decoding_with_and_without_splits(case, splits, monkeypatch):
    """The sink joins a row once, whatever the number of splits."""
    monkeypatch.setattr(decode, "splits_for", lambda *_: splits)
    inputs = make(case, torch.float16, DEVICE)
    ran = []
    monkeypatch.setattr(decode, "attention", lambda *a, f=decode.attention, **k: (ran.append(1), f(*a, **k)))
    with torch.no_grad():
        out, lse = ours(**inputs)
    exact, plain = oracle(case, inputs), run_plain(case, inputs)
    assert ran, "another kernel ran"
    for name, value in (("out", out), ("lse", lse)):
        share, where = excess(name, value, exact, plain)
        assert share <= 1, where


def test_pointers_give_what_descriptors_give(monkeypatch):
    case = CASES[4]
    inputs = make(case, torch.float16, DEVICE)
    through_descriptors = run(ours, case, inputs)
    monkeypatch.setenv("SEAL_TRITON_TMA", "0")
    monkeypatch.setattr(configs, "_chosen", dict(configs._chosen))
    for name, value in run(ours, case, inputs).items():
        if DEVICE.type == "cpu":
            assert torch.equal(value, through_descriptors[name]), name
        else:
            largest = through_descriptors[name].abs().nan_to_num(posinf=0.0).max().item()
            torch.testing.assert_close(value, through_descriptors[name], rtol=2e-3, atol=1e-3 * largest, msg=name)


def test_nan_of_the_next_sequence_does_not_leak():
    case = Case((21, 30), (21, 30), heads=(2, 1), sink=True, gate="sigmoid", scale=None)
    inputs = make(case, torch.float16, DEVICE)

    def first_sequence():
        found = run(ours, case, inputs)
        found["lse"] = found["lse"].T
        return {n: t[:21] for n, t in found.items() if n not in ("grad_sink", "grad_scale")}

    clean = first_sequence()
    for name in ("q", "k", "v", "gate"):
        inputs[name][21:] = torch.nan
    for name, value in first_sequence().items():
        assert torch.isfinite(value).all() and torch.equal(value, clean[name]), name


@pytest.mark.parametrize("function, far", [("sigmoid", -200.0), ("softplus", -200.0), ("softplus", 200.0)])
def test_gates_far_from_zero(function, far):
    """Closed gates give 0 and no NaN, open ones themselves."""
    q, k, v = (torch.randn(1, 20, 2, 32, dtype=torch.float16, device=DEVICE) for _ in range(3))
    gate = torch.full_like(q, far, requires_grad=True)
    out = seal_ops.attention(q, k, v, gate=gate, gate_function=function, backend="triton")
    out.float().sum().backward()
    assert gate.grad.isfinite().all()
    want = seal_ops.attention(q, k, v, backend="triton").float() * (200.0 if far > 0 else 0.0)
    torch.testing.assert_close(out.float(), want, rtol=2e-3, atol=2e-3 * want.abs().max().item())


def test_a_gate_with_any_strides_and_a_sink_of_another_type():
    """A slice of a projection, as models have it, and the gradient in the gate's own shape."""
    case = Case(20, 20, heads=(4, 2), sink=True, gate="sigmoid", head_dim=32)
    inputs = make(case, torch.float16, DEVICE)
    want = run(ours, case, inputs)
    both = torch.cat([inputs["gate"].transpose(1, 2), torch.zeros_like(inputs["gate"]).transpose(1, 2)], -1)
    inputs |= dict(gate=both[..., :32].transpose(1, 2), sink=inputs["sink"].float())
    assert not inputs["gate"].is_contiguous()
    leaves = [inputs[n].detach().requires_grad_() for n in ("gate", "sink")]
    out, _ = ours(**inputs | dict(zip(("gate", "sink"), leaves)))
    assert torch.equal(out.detach(), want["out"])
    out.float().square().sum().backward()
    assert leaves[0].grad.shape == (1, 20, 4, 32) and leaves[1].grad.dtype == torch.float32


class Ops(torch.utils._python_dispatch.TorchDispatchMode):
    """The arguments that the op's calls had, by name."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.seal.attention.default:
            self.calls.append(kwargs)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("function", ["sigmoid", "softplus", "identity"])
@pytest.mark.parametrize("backend", ["triton", "reference", "cpu"])
def test_what_goes_into_the_op_and_what_is_composed(backend, function):
    if backend == "cpu" and DEVICE.type != "cpu":
        pytest.skip("runs on CPU tensors")
    q, k, v = (torch.randn(1, 6, 2, 16, device=DEVICE) for _ in range(3))
    options = dict(sink=torch.randn(2, device=DEVICE), gate=torch.randn(1, 6, 2, 16, device=DEVICE))
    want = seal_ops.attention(q, k, v, **options, gate_function=function, backend="reference")
    with Ops() as ops:
        found = seal_ops.attention(q, k, v, **options, gate_function=function, backend=backend)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
    ((call),) = ops.calls
    assert ("sink" in call) == (backend != "cpu")
    assert ("gate" in call) == (backend != "cpu" and function != "identity")


def test_who_takes_what_is_said():
    ask = lambda backend, *terms: dispatch.why_not(backend, "attention", torch.device("cpu"), torch.float32, 64, terms)
    assert ask("cpu", "sink") == "backend cpu takes no sink (seal_ops.attention composes it)"
    assert ask("cpu", "softcap") == "backend cpu takes no softcap"
    assert ask("reference", "sink", "gate", "softcap") is None
    table = seal_ops.backends("cpu", torch.float32, 64, terms=("softcap",))
    assert table["attention"]["cpu"] == "backend cpu takes no softcap" and table["attention"]["chosen"] == "reference"
    assert table["rope"]["chosen"] == "cpu"
    q = torch.randn(1, 6, 2, 16)
    with pytest.raises(ValueError, match="seal::attention: backend cpu takes no softcap"):
        seal_ops.attention(q, q, q, softcap=5.0, backend="cpu")
    with pytest.raises(ValueError, match=r"backend cpu takes no sink \(seal_ops.attention composes it\)"):
        torch.ops.seal.attention(q, q, q, sink=torch.zeros(2), backend="cpu")
    assert kernels.why_not("attention", torch.float16, 64) is None and forward is not None


def test_one_graph():
    """Choosing the backend does not break torch.compile's graph."""
    q, k, v, gate = (torch.randn(1, 6, 2, 16, device=DEVICE, requires_grad=True) for _ in range(4))
    sink = torch.zeros(2, device=DEVICE)
    call = lambda: seal_ops.attention(q, k, v, sink=sink, gate=gate, softcap=4.0, backend="triton")
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    eager, traced = (torch.autograd.grad(f().square().sum(), (q, gate)) for f in (call, compiled))
    assert all(torch.equal(a, b) for a, b in zip(eager, traced))
