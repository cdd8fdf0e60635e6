"""Random calls with sinks, gates and soft caps, and random merges: held to the formulae in fp64, as in test_fuzz.

The calls are test_fuzz's (layouts, masks, packing, lengths of 0), with what follows the softmax added to them. A sink,
a gate of either shape and a soft cap may come alone or together, in any floating dtype and layout.
"""

import math
import pathlib
import random
import warnings

import pytest
import torch
from test_fuzz import TOLERANCE, assert_cells, by_hand, describe, random_call, scattered

import seal_ops
from seal_ops.ops.dispatch import TERMS, why_not

CALLS = 40
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FUNCTIONS = {"sigmoid": torch.sigmoid, "softplus": torch.nn.functional.softplus, "identity": lambda t: t}


def with_terms(seed: str, backend: str, device: torch.device) -> tuple[str, dict, random.Random]:
    """A right call of attention or rope_attention with one term or more."""
    rng = random.Random(seed)
    op, a = random_call(rng, backend, device)
    while op == "rope" or not a["q"].shape[-2]:
        op, a = random_call(rng, backend, device)
    a.pop("offset", None)
    q, own = a["q"], random.Random(f"terms-{seed}")
    generator = torch.Generator().manual_seed(own.getrandbits(32))
    made = lambda *shape: scattered(torch.randn(shape, generator=generator).to(own.choice(DTYPES)).to(device), own)
    terms = [t for t in TERMS if own.random() < 0.5] or [own.choice(TERMS)]
    if why_not(backend, op, device, q.dtype, q.shape[-1], ("softcap",)) is not None:
        terms = [t for t in terms if t != "softcap"] or ["sink"]
    if "sink" in terms:
        a["sink"] = made(q.shape[-2])
    if "gate" in terms:
        a |= dict(gate=made(*q.shape[:-1], own.choice((1, q.shape[-1]))), gate_function=own.choice(list(FUNCTIONS)))
    if "softcap" in terms:
        a["softcap"] = own.choice((0.5, 2.0, 30.0))
    return op, a, rng


def terms_by_hand(op: str, a: dict, exact: dict) -> list[torch.Tensor]:
    """(out, lse) from those without a sink and gate; a soft cap bends the scores, so it goes into them."""
    if (cap := a.get("softcap")) is not None:
        out, lse = capped_by_hand(op, exact, cap)
    else:
        out, lse = by_hand(op, exact)
    if exact.get("sink") is not None:
        joined = torch.logaddexp(lse, exact["sink"][:, None])
        out = out * torch.exp(lse - joined).transpose(-1, -2)[..., None]
        lse = joined
    if exact.get("gate") is not None:
        out = out * FUNCTIONS[a["gate_function"]](exact["gate"])
    return [out, lse]


def capped_by_hand(op: str, exact: dict, cap: float) -> list[torch.Tensor]:
    """by_hand, whose only hidings of scores are masked_fill and where: its einsum of scores is bent here."""
    einsum, scale = torch.einsum, exact.get("softmax_scale")
    sigma = scale if scale is not None else exact["q"].shape[-1] ** -0.5

    def bent(equation, *tensors):
        scores = einsum(equation, *tensors)
        return cap * torch.tanh(scores * sigma / cap) if equation == "ihd,jhd->hij" else scores

    torch.einsum = bent
    try:
        return by_hand(op, exact | dict(softmax_scale=1.0))
    finally:
        torch.einsum = einsum


def refusal(op: str, a: dict, backend: str) -> str | None:
    """The sentence with which a backend leaves a right call to another one (docs/ops.md); None where it answers.

    The dtypes, head_dims and terms of a backend are those that are drawn for it.
    """
    sigma = a.get("softmax_scale")
    if backend == "cuda" and sigma is not None and sigma <= 0:
        return f"seal::{op}: backend cuda takes a softmax_scale above 0 (in fp32), got {sigma:g}"
    return None


def run_one(seed: str, backend: str, device: torch.device) -> bool:
    """One call; whether it was answered by a result."""
    op, a, rng = with_terms(seed, backend, device)
    what = f"seed {seed}: {describe(op, a)}"
    leaves = [n for n in ("q", "k", "v", "scale", "sink", "gate") if a.get(n) is not None and rng.random() < 0.8]
    call = {n: t.detach().requires_grad_() if n in leaves else t for n, t in a.items()}
    if (blocks := call.pop("blocks", None)) is not None:
        mask = call.pop("mask", None) or (seal_ops.masks.causal() if call["causal"] else seal_ops.masks.full())
        if call.get("window") is not None or not isinstance(mask, seal_ops.masks.Mask):
            return False  # the function takes block lists of a named mask only
        call.update(causal=True, mask=seal_ops.masks.BlockMask(mask, blocks, call.pop("block_size")))
    if (sentence := refusal(op, a, backend)) is not None:
        with pytest.raises(ValueError) as refused:
            getattr(seal_ops, op)(**call, backend=backend, return_lse=True)
        assert str(refused.value) == sentence, what
        return False
    got = getattr(seal_ops, op)(**call, backend=backend, return_lse=True)
    floating = lambda t: isinstance(t, torch.Tensor) and t.is_floating_point()
    exact = {n: t.detach().double().requires_grad_(n in leaves) if floating(t) else t for n, t in a.items()}
    want = terms_by_hand(op, a, {"positions": None, **exact})
    tolerance, of_gradients = TOLERANCE[a["q"].dtype]
    for name, x, y in zip(("out", "lse"), got, want):
        assert_cells(name, x, y, tolerance, -2, what)
    if not leaves:
        return True
    cotangents = [scattered(torch.randn_like(t), rng) for t in got]
    used = [n for n in range(2) if got[n].requires_grad and want[n].requires_grad]
    finite = lambda n: torch.where(torch.isfinite(want[n].detach()), cotangents[n].to(want[n].dtype), 0.0)
    found = torch.autograd.grad(
        [got[n] for n in used], [call[n] for n in leaves], [cotangents[n] for n in used], allow_unused=True
    )
    known = torch.autograd.grad(
        [want[n] for n in used], [exact[n] for n in leaves], [finite(n) for n in used], allow_unused=True
    )
    sigma = abs(a["softmax_scale"] if a.get("softmax_scale") is not None else a["q"].shape[-1] ** -0.5)
    cancels = 0.1 * max(1.0, sigma * math.sqrt(a["q"].shape[-1]))
    for n, x, y in zip(leaves, found, known):
        rounding = max(of_gradients, TOLERANCE[a[n].dtype][0])  # a gradient comes in its input's dtype
        if x is None or y is None:
            assert (x is None or not x.any()) and (y is None or not y.any()), f"grad_{n}: {x} instead of {y}: {what}"
            continue
        assert x.dtype == a[n].dtype and x.shape == a[n].shape, f"grad_{n} is {x.dtype} {list(x.shape)}: {what}"
        heads_at = 0 if y.dim() < 2 or (n == "scale" and y.dim() == 2) else -2
        assert_cells(f"grad_{n}", x, y, rounding, heads_at, what, 0.0 if n == "v" else cancels)
    return True


@pytest.mark.parametrize("chunk", range(3))
def test_a_random_call_with_terms_is_right(backend, device, chunk):
    dtype = torch.float16 if backend == "cuda" else torch.float32
    if (reason := why_not(backend, "attention", device, dtype, 16)) is not None:
        pytest.skip(reason)
    interpreted = backend == "triton" and device.type == "cpu"
    if interpreted and chunk:
        pytest.skip("few calls in the interpreter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, in Triton's interpreter
        calls = 4 if interpreted else CALLS
        answered = sum(run_one(f"terms-{backend}-{chunk}-{n}", backend, device) for n in range(calls))
    assert answered >= 0.7 * calls, f"{answered} of {calls} calls gave a result"
    assert backend != "cuda" or answered < calls, "a softmax_scale of 0 or below is drawn, too"


class OnTheCpu:
    """Stands for the backend cuda, with its refusal: sinks and gates are composed around the backend cpu as well."""

    def __init__(self, op: str, sentence: str | None):
        self.op, self.function, self.sentence = op, getattr(seal_ops, op), sentence

    def __call__(self, *, backend, **call):
        sigma = call.get("softmax_scale")
        if self.sentence is not None and sigma is not None and sigma <= 0:
            raise ValueError(self.sentence.format(self.op, sigma))
        return self.function(**call, backend="cpu")


@pytest.mark.parametrize("fault", [None, "answers", "another sentence"])
def test_what_is_drawn_for_cuda_is_compared_or_refused(monkeypatch, fault):
    """Without a GPU: the draws, and that the refusal is expected where it is due, and no other."""
    sentence = "seal::{}: backend cuda takes a softmax_scale above 0 (in fp32), got {:g}"
    given = {None: sentence, "answers": None, "another sentence": sentence.replace("above", "below")}[fault]
    source = (pathlib.Path(__file__).parents[2] / "csrc" / "ops" / "dispatch.cpp").read_text()
    assert '"backend cuda takes a softmax_scale above 0 (in fp32), got ", call.sigma' in source
    for op in ("attention", "rope_attention"):
        monkeypatch.setattr(seal_ops, op, OnTheCpu(op, given))
    calls, cpu = [f"terms-cuda-0-{n}" for n in range(14)], torch.device("cpu")
    drawn = [with_terms(seed, "cuda", cpu)[:2] for seed in calls]
    wanted = [refusal(op, a, "cuda") is None for op, a in drawn]
    assert 0 < wanted.count(False) < 5 and {a["q"].dtype for _, a in drawn} == {torch.float16, torch.bfloat16}
    if fault is None:
        assert [run_one(seed, "cuda", cpu) for seed in calls] == wanted
        return
    with pytest.raises(pytest.fail.Exception if fault == "answers" else AssertionError):
        run_one(calls[wanted.index(False)], "cuda", cpu)
