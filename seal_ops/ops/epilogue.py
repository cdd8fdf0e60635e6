"""What may follow a softmax over keys: a sink in its denominator, and a gate on its output.

Here they are composed from the output and log-sum-exp of a backend whose kernels have no such term (`dispatch.TERMS`):
a sink's share of the softmax is known from the log-sum-exp alone, and a gate commutes with the scale."""

from __future__ import annotations

import torch
from torch import Tensor

GATE_FUNCTIONS = {
    "sigmoid": torch.sigmoid,
    "softplus": torch.nn.functional.softplus,
    "identity": lambda gate: gate,
}


def apply(
    out: Tensor, lse: Tensor, sink: Tensor | None, gate: Tensor | None, gate_function: str
) -> tuple[Tensor, Tensor]:
    """(out, lse) of an attention without an offset, out `[..., S, H, D]` and lse `[..., H, S]`, with what follows it;
    rounded once."""
    if sink is None and gate is None:
        return out, lse
    changed = out
    if sink is not None:
        sink = sink.to(lse.dtype)[:, None]
        changed = changed * torch.sigmoid(lse - sink).transpose(-1, -2)[..., None]
        lse = torch.logaddexp(lse, sink)
    if gate is not None:
        changed = changed * GATE_FUNCTIONS[gate_function](gate.to(lse.dtype))
    return changed.to(out.dtype), lse
