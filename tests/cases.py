"""The shapes every backend is tested on, and what their results are held against.

Tolerance by argument: the largest error of each result against the fp64 oracle is at most twice that of plain PyTorch in
the same precision, plus one rounding of the result itself.
"""
from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from seal_ops import mask, reference

STATISTICS = {torch.float64: torch.float64}


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: lengths `sq`, `sk` (tuples: packed sequences), heads, mask, and which factors go with it."""
    sq: int | tuple
    sk: int | tuple
    heads: tuple = (2, 2)
    head_dim: int = 64
    batch: int = 1
    causal: bool = True
    window: int | None = None
    scale: str | None = "channel"
    offset: bool = False
    lse: bool = False

    @property
    def packed(self) -> bool:
        return isinstance(self.sq, tuple)

    def __str__(self) -> str:
        name = lambda s: ",".join(map(str, s)) if isinstance(s, tuple) else str(s)
        parts = [f"{name(self.sq)}x{name(self.sk)}", f"h{self.heads[0]}/{self.heads[1]}", f"d{self.head_dim}"]
        parts += [f"b{self.batch}"] * (self.batch > 1) + ["causal" if self.causal else "full"]
        parts += [f"w{self.window}"] * (self.window is not None) + [self.scale or "noscale"]
        return "-".join(parts + ["offset"] * self.offset + ["lse"] * self.lse)


# Small enough for Triton's interpreter; the GPU suite adds the long ones.
SMALL = [
    Case(1, 1, scale=None),
    Case(3, 3, batch=2, scale="head"),
    Case(17, 17, heads=(4, 2), causal=False, scale="channel", offset=True),
    Case(33, 65, heads=(4, 1), head_dim=32, scale="channel"),
    Case(65, 33, heads=(2, 1), scale="channel", lse=True),
    Case(40, 40, window=7, scale="head", lse=True),
    Case(40, 23, window=5, causal=False, scale="channel", offset=True),
    Case(70, 70, head_dim=128, batch=2, scale="row-channel"),
    Case(20, 20, head_dim=128, batch=3, scale="row-head", offset=True),
    Case(37, 37, head_dim=80, scale="channel"),
    Case(18, 18, head_dim=256, scale="channel"),
    Case((5, 0, 33, 1), (5, 0, 33, 1), heads=(4, 2), scale="channel"),
    Case((7, 20, 0, 3), (12, 9, 4, 0), heads=(2, 1), scale="row-head", lse=True, offset=True),
    Case((30, 40), (30, 40), window=9, causal=False, scale="head"),
    Case(0, 5, scale="channel"),
    Case(5, 0, scale="channel", offset=True),
]


def make(case: Case, dtype: torch.dtype, device, seed: int = 0) -> dict:
    """Random normal inputs of a case. Scales hold zeros, negatives and a thousand; q, k and v are strided views."""
    g = torch.Generator().manual_seed(seed)
    hq, hkv, d = *case.heads, case.head_dim
    randn = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    if case.packed:
        tq, tk, rows = sum(case.sq), sum(case.sk), len(case.sq)
        q, k, v = randn(tq, hq, d), randn(tk, hkv, d), randn(tk, hkv, d)
        cu = lambda s: torch.tensor([0, *s]).cumsum(0).to(torch.int32).to(device)
        extra = {"cu_seqlens": cu(case.sq), "cu_seqlens_k": None if case.sq == case.sk else cu(case.sk)}
    else:
        rows = case.batch
        q, k, v = randn(rows, case.sq, hq, d), randn(rows, case.sk, hkv, d), randn(rows, case.sk, hkv, d)
        extra = {}
    shapes = {None: None, "head": (hq,), "channel": (hq, d), "row-head": (rows, hq, 1), "row-channel": (rows, hq, d)}
    scale = offset = None
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    if case.scale is not None:
        scale = randn(*shapes[case.scale])
        flat = scale.reshape(-1)
        flat[0] = 0.0
        flat[-1] = -1.5
        if flat.numel() > 2:
            flat[flat.numel() // 2] = 1e3
        scale = scale.to(statistics).to(device)
    if case.offset:
        offset = randn(hq, d).to(statistics).to(device)
    tensors = {n: t.to(dtype).to(device) for n, t in (("q", q), ("k", k), ("v", v))}
    return dict(tensors, scale=scale, offset=offset, causal=case.causal, window=case.window, **extra)


def gradients_of(case: Case, inputs: dict, seed: int = 1) -> tuple[Tensor, Tensor | None]:
    """grad_out and, for an `lse` case, grad_lse."""
    g = torch.Generator().manual_seed(seed)
    q = inputs["q"]
    grad_out = torch.randn(q.shape, generator=g, dtype=torch.float64).to(q.dtype).to(q.device)
    if not case.lse:
        return grad_out, None
    shape = (*q.shape[:-3], q.shape[-2], q.shape[-3])
    statistics = torch.float64 if q.dtype == torch.float64 else torch.float32
    return grad_out, torch.randn(shape, generator=g, dtype=torch.float64).to(statistics).to(q.device)


def plain_pytorch(q, k, v, scale=None, offset=None, *, causal=True, window=None, cu_seqlens=None, cu_seqlens_k=None):
    """What a user would write by hand, in the dtype of q: matmul, softmax, matmul, scale. For its rounding error only."""
    from seal_ops import factors

    left, right = mask.bounds(causal, window)
    rows = [(b, b) for b in range(q.shape[0])] if cu_seqlens is None else mask.sequences(q, k, cu_seqlens, cu_seqlens_k)
    group, outs, lses = q.shape[-2] // k.shape[-2], [], []
    for n, (rq, rk) in enumerate(rows):
        qs, ks, vs = q[rq].transpose(0, 1), k[rk].transpose(0, 1), v[rk].transpose(0, 1)
        ks, vs = ks.repeat_interleave(group, 0), vs.repeat_interleave(group, 0)
        scores = (qs @ ks.transpose(1, 2)) / math.sqrt(q.shape[-1])
        seen = mask.allowed(qs.shape[1], ks.shape[1], left, right, q.device)
        lse = torch.logsumexp(scores.masked_fill(~seen, -math.inf).float(), -1)
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
        p = torch.softmax(scores, -1) * seen.any(-1)[None, :, None]
        o = (p @ vs).transpose(0, 1)
        if scale is not None:
            o = (o * factors.row(scale, n, *q.shape[-2:])).to(q.dtype)
        if offset is not None:
            o = (o + factors.row(offset, n, *q.shape[-2:])).to(q.dtype)
        outs.append(o)
        lses.append(lse)
    return (torch.stack(outs), torch.stack(lses)) if cu_seqlens is None else (torch.cat(outs), torch.cat(lses, 1))


NAMES = ("out", "lse", "grad_q", "grad_k", "grad_v", "grad_scale", "grad_offset")


def run(function, case: Case, inputs: dict, grads=None) -> dict[str, Tensor]:
    """out, lse and all gradients of a function with attention's signature, by autograd."""
    leaves = {n: t.detach().clone().requires_grad_() for n in ("q", "k", "v", "scale", "offset")
              if (t := inputs[n]) is not None}
    out, lse = function(**{**inputs, **leaves})
    grad_out, grad_lse = grads or gradients_of(case, inputs)
    outputs, cotangents = [out], [grad_out.to(out.dtype)]
    if grad_lse is not None:
        alive = torch.isfinite(lse)  # the contract ignores gradients into an empty row's lse
        outputs, cotangents = [out, lse], [cotangents[0], torch.where(alive, grad_lse.to(lse.dtype), 0.0)]
    found = torch.autograd.grad(outputs, list(leaves.values()), cotangents, allow_unused=True)
    named = {f"grad_{n}": torch.zeros_like(leaves[n]) if g is None else g for n, g in zip(leaves, found)}
    return {"out": out.detach(), "lse": lse.detach(), **named}


def oracle(case: Case, inputs: dict, grads=None) -> "Exact":
    """The fp64 results, through the oracle's explicit backward."""
    up = {n: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for n, t in inputs.items()}
    grad_out, grad_lse = grads or gradients_of(case, inputs)
    out, lse = reference.attention(**up)
    keep = {n: up[n] for n in up if n not in ("q", "k", "v")}
    found = reference.attention_backward(
        grad_out.double(), None if grad_lse is None else grad_lse.double(), up["q"], up["k"], up["v"], out, lse,
        needs=(True, True, True, inputs["scale"] is not None, inputs["offset"] is not None), **keep)
    named = {n: g for n, g in zip(NAMES[2:], found) if g.numel() or n in ("grad_q", "grad_k", "grad_v")}
    # dS = P (dP - delta) cancels: what rounds is dP and delta (formed from the rounded output), so grad_q and grad_k carry
    # an error of eps * |delta| * softmax_scale * |k| or |q| even where they themselves vanish (one key: exactly zero).
    delta = (grad_out.double() * out).abs().sum(-1).amax() if out.numel() else out.new_zeros(())
    sigma = 1 / math.sqrt(case.head_dim)
    largest = lambda t: t.abs().amax() if t.numel() else t.new_zeros(())
    floors = {"grad_q": delta * sigma * largest(up["k"]), "grad_k": 2 * delta * sigma * largest(up["q"])}
    if inputs["scale"] is not None:
        # grad_scale is fp32, but sums g * O, with P or the output rounded to the inputs' precision: errors that add up as a random
        # walk over the tokens (and, for a factor per head, the channels).
        unscaled, _ = reference.attention(**{**up, "scale": None, "offset": None})
        tokens = (grad_out.double() * unscaled).square().flatten(0, -3).sum(0)
        walk = (tokens if inputs["scale"].shape[-1] == case.head_dim else tokens.sum(-1)).sqrt()
        precision = torch.finfo(inputs["q"].dtype).eps / torch.finfo(inputs["scale"].dtype).eps
        floors["grad_scale"] = precision * largest(walk)
    return Exact({"out": out, "lse": lse, **named}, floors)


class Exact(dict):
    """fp64 results by name, with the magnitudes whose rounding each of them inherits."""

    def __init__(self, results: dict[str, Tensor], floors: dict[str, Tensor]):
        super().__init__(results)
        self.floors = {n: float(v) for n, v in floors.items()}


def assert_close(got: dict, exact: Exact, plain: dict, factor: float = 2.0) -> None:
    """Every result of `got`: finite where the oracle is, and within `factor` times plain PyTorch's error of it.

    Two exceptions by argument. In fp64 the oracle rounds as much as what it judges: 32 roundings. In fp32 on the CPU ATen's
    vectorised exponential is accurate to 20 units in the last place where torch.exp is to 1: 20 roundings.
    """
    roundings = {torch.float64: 32, torch.float32: 20}.get(got["out"].dtype if got["out"].device.type == "cpu" else None, 1)
    for name, want in exact.items():
        have = got[name]
        assert have.shape == want.shape, f"{name}: shape {tuple(have.shape)} instead of {tuple(want.shape)}"
        alive = torch.isfinite(want)
        assert torch.equal(torch.isfinite(have), alive), f"{name}: not finite exactly where the oracle is"
        if not want[alive].numel():
            continue
        error = (have.double() - want)[alive].abs().max().item()
        other = (plain[name].double() - want)[alive].abs().max().item()
        rounding = roundings * torch.finfo(have.dtype).eps * max(want[alive].abs().max().item(), exact.floors.get(name, 0.0))
        if not math.isfinite(other):  # plain PyTorch overflowed on the way (fp16 under a scale of a thousand)
            other = 2 * rounding
        allowed = factor * other + rounding + 1e-30
        assert error <= allowed, f"{name}: error {error:.3e} exceeds {allowed:.3e} (PyTorch's own {other:.3e})"
