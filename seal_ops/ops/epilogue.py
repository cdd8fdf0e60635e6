"""What may follow a softmax over keys: a sink in its denominator, and a gate on its output.

Composed from the op's output and log-sum-exp: a sink's share of the softmax is known from the log-sum-exp alone, and a
gate commutes with the scale."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks

GATE_FUNCTIONS = {
    "sigmoid": torch.sigmoid,
    "softplus": torch.nn.functional.softplus,
    "identity": lambda gate: gate,
}


def apply(
    op: str,
    out: Tensor,
    lse: Tensor,
    offset: Tensor | None,
    sink: Tensor | None,
    gate: Tensor | None,
    gate_function: str,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of an attention, out `[..., S, H, D]` and lse `[..., H, S]`, with what follows it; rounded once.

    Raises ValueError, one sentence, for a sink or gate that does not fit, or where there is an offset as well.
    """
    _check(op, out, offset, sink, gate, gate_function)
    changed = out
    if sink is not None:
        sink = sink.to(lse.dtype)[:, None]
        changed = changed * torch.sigmoid(lse - sink).transpose(-1, -2)[..., None]
        lse = torch.logaddexp(lse, sink)
    if gate is not None:
        changed = changed * GATE_FUNCTIONS[gate_function](gate.to(lse.dtype))
    return changed.to(out.dtype), lse


def _check(op, out, offset, sink, gate, gate_function) -> None:
    if gate_function not in GATE_FUNCTIONS:
        checks.fail(op, "gate_function", f"be one of {', '.join(GATE_FUNCTIONS)}", repr(gate_function))
    given = [(name, t) for name, t in (("sink", sink), ("gate", gate)) if t is not None]
    for name, t in given:
        checks.tensor(op, name, t)
        if t.dtype not in checks.FLOATS:
            checks.fail(op, name, "be bfloat16, float16, float32 or float64", t.dtype)
        if t.device != out.device:
            checks.fail(op, name, f"be on q's device {out.device}", t.device)
    if given and offset is not None:
        checks.fail(op, "offset", f"be None with a {given[0][0]} (add it to the output)", list(offset.shape))
    heads, one = out.shape[-2], (*out.shape[:-1], 1)
    if sink is not None and tuple(sink.shape) != (heads,):
        checks.fail(op, "sink", f"have shape [{heads}] (one logit a query head)", list(sink.shape))
    if gate is not None and tuple(gate.shape) not in (tuple(out.shape), one):
        checks.fail(op, "gate", f"have q's shape {list(out.shape)} or {list(one)}", list(gate.shape))
