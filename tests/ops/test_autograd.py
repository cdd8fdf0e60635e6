"""What differentiation asks of the ops, in C++ and in Python alike: no more than is wanted, and nothing dropped."""

import pytest
import torch
from wrong_calls import right_call

import seal_ops
from seal_ops.ops.backends import cpu
from seal_ops.ops.dispatch import extension


@pytest.fixture
def calls(monkeypatch):
    """Every call of the CPU backend: (op, arguments)."""
    seen = []
    for op in ("attention", "attention_backward", "rope"):
        body = getattr(cpu, op)
        monkeypatch.setattr(cpu, op, lambda *a, op=op, body=body, **k: seen.append((op, k)) or body(*a, **k))
    return seen


def leaves(*names, op="attention"):
    a = right_call(op, "cpu")
    a |= dict(scale=torch.randn(4, 16), offset=torch.randn(4, 16)) if op != "rope" else {}
    return {n: t.requires_grad_(n in names) for n, t in a.items()}


@pytest.mark.parametrize("op", ["attention", "rope_attention"])
@pytest.mark.parametrize("wanted", [("scale",), ("q", "v"), ("q", "k", "v", "scale", "offset")], ids="-".join)
def test_only_inputs_that_ask_get_gradients(calls, op, wanted):
    a = leaves(*wanted, op=op)
    getattr(seal_ops, op)(**a).sum().backward()
    (needs,) = [k["needs"] for op, k in calls if op == "attention_backward"]
    assert needs == [n in wanted for n in ("q", "k", "v", "scale", "offset", "sink", "gate")]
    assert all((a[n].grad is not None) == (n in wanted) for n in ("q", "k", "v", "scale", "offset"))


@pytest.mark.skipif(
    isinstance(extension(), str), reason="torch tells functions written in Python only what the forward was asked for"
)
def test_a_partial_backward_computes_a_part(calls):
    """torch.autograd.grad of one input, though all ask for gradients."""
    a = leaves("q", "k", "v", "scale", "offset")
    torch.autograd.grad(seal_ops.attention(**a).sum(), a["scale"])
    (needs,) = [k["needs"] for op, k in calls if op == "attention_backward"]
    assert needs == [False, False, False, True, False, False, False]


def test_the_backward_gets_what_the_forward_got(calls):
    a = leaves("q")
    options = dict(softmax_scale=0.25, causal=False, window=3, deterministic=True)
    seal_ops.attention(**a, **options).sum().backward()
    (found,) = [k for op, k in calls if op == "attention_backward"]
    assert {n: found[n] for n in options} == options
    calls.clear()
    b = right_call("rope_attention", "cpu", packed=True) | dict(max_seqlen=5, max_seqlen_k=6, interleaved=True)
    b["v"].requires_grad_()
    seal_ops.rope_attention(**b).sum().backward()
    (found,) = [k for op, k in calls if op == "attention_backward"]
    assert (found["max_seqlen"], found["max_seqlen_k"], found["interleaved"]) == (5, 6, True)
    for name in ("cos", "sin", "positions", "cu_seqlens"):
        assert torch.equal(found[name], b[name]), name


@pytest.mark.parametrize("side", ["q", "k"])
@pytest.mark.parametrize("lengths", [(6, 6), (3, 6)])
def test_rope_turns_back_only_the_gradient_that_is_wanted(calls, side, lengths):
    a = leaves(side, op="rope")
    a["q"] = a["q"].detach()[:, : lengths[0]].requires_grad_(side == "q")
    rotated = dict(zip("qk", seal_ops.rope(**a)))
    g = torch.randn_like(rotated[side])
    calls.clear()
    (grad,) = torch.autograd.grad(rotated[side], a[side], g)
    (found,) = [k for op, k in calls if op == "rope"]
    assert found["inverse"] and found["k" if side == "q" else "q"].shape[-2] == 0
    first = lengths[1] - lengths[0] if side == "q" else 0
    cos, sin = (a[n][first : first + g.shape[1]] for n in ("cos", "sin"))
    want, _ = seal_ops.rope(g, g, cos, sin, inverse=True)
    torch.testing.assert_close(grad, want)


def test_a_gradient_into_the_log_sum_exp_alone():
    a = leaves("q", "k", "v", "scale")
    _, lse = seal_ops.attention(**a, return_lse=True)
    lse.sum().backward()
    assert a["q"].grad.abs().sum() > 0 and not a["v"].grad.any() and not a["scale"].grad.any()


@pytest.mark.parametrize("raw", [False, True])
def test_global_determinism_reaches_every_op(calls, raw):
    a = leaves("q")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        out = torch.ops.seal.attention(**a)[0] if raw else seal_ops.attention(**a)
        out.sum().backward()
    finally:
        torch.use_deterministic_algorithms(before)
    assert [k["deterministic"] for op, k in calls] == [True, True]
    seal_ops.attention(**a)
    assert calls[-1][1]["deterministic"] is False
