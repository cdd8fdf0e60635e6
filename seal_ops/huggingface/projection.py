"""Which module reads the attention output, and whether a scale could multiply what it reads.

Observed on values: the attention module is run with a known attention output, then with every channel of it times its
own factor, then with every head times its own.  The factors are powers of two, so a step that is linear shows them
exactly.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .layers import AttentionLayer

RUNS = (None, "channel", "head")  # what is multiplied in each run
_FACTORS = (2.0, -1.0, 0.5, 4.0, -2.0, 1.0, -0.5, 0.25)


def is_linear(module: nn.Module) -> bool:
    """Whether a module looks like a matrix product: torch's, GPT-2's, an adapter's wrapper, or a quantised one."""
    if isinstance(module, (nn.Linear, Conv1D)) or hasattr(module, "in_features"):
        return True
    tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return (
        not any(True for _ in module.children())
        and not isinstance(module, nn.Embedding)
        and any(t.dim() == 2 and min(t.shape) > 1 for t in tensors)
    )


def holds_numbers(weight: Tensor | None) -> bool:
    """Whether a weight is a tensor of PyTorch's own, in 16 or more bits.

    torchao keeps packed values in tensors of its own classes, which give the dtype that they stand for.
    """
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.element_size() < 2:
        return False
    return type(weight.data) is Tensor or hasattr(weight, "full_tensor")  # the second is a sharded one


def in_words(module: nn.Module) -> str:
    """A layer's class and what its weight is, for messages."""
    weight = getattr(module, "weight", None)
    own = type(weight.data) if isinstance(weight, Tensor) else Tensor
    return f"{type(module).__name__} with {getattr(weight, 'dtype', 'no') if own is Tensor else own.__name__} weight"


def attention_output(query: Tensor, head_dim: int, run: str | None) -> Tensor:
    """A known output [B, S, Hq, D] for query [B, Hq, S, Dq]; its values show a permutation, a gate or a norm."""
    batch, heads, length, _ = query.shape
    size = batch * length * heads * head_dim
    out = (torch.arange(size, device=query.device) % 251 - 125).to(query.dtype).reshape(batch, length, heads, head_dim)
    return out if run is None else out * _factor(run, heads, head_dim).to(out)


def _factor(run: str, heads: int, head_dim: int) -> Tensor:
    """[Hq, D] or [Hq, 1] of powers of two, neighbours unequal in both directions."""
    width = head_dim if run == "channel" else 1
    index = torch.arange(heads, device="cpu")[:, None] * 3 + torch.arange(width, device="cpu")
    return torch.tensor(_FACTORS, dtype=torch.float32, device="cpu")[index % len(_FACTORS)]


@dataclasses.dataclass
class Reading:
    """What one linear module was given in each run."""

    module: nn.Module
    inputs: dict[str | None, Tensor] = dataclasses.field(default_factory=dict)


class Readers:
    """The linear modules called after the attention call of one layer, in order."""

    def __init__(self):
        self.readings: dict[int, Reading] = {}

    def note(self, run: str | None, module: nn.Module, value: Tensor) -> None:
        # The first call of a module counts: what a second one reads comes later than the attention output.
        self.readings.setdefault(id(module), Reading(module)).inputs.setdefault(run, value.detach().clone())

    def conclude(self, layer: AttentionLayer, out: Tensor) -> None:
        """Fills in ``output_projection`` and ``commutes``; ``out`` is the attention output of the first run."""
        known = [r for r in self.readings.values() if None in r.inputs]
        reached = [r for r in known if _changed(r) or _equals(r.inputs[None], out)]
        if not reached:
            return
        first = reached[0]
        layer.output_projection = first.module
        inside = {id(m) for m in first.module.modules()}
        # A second module that reads the output as well would have to be scaled with the first.
        others = [r for r in reached[1:] if id(r.module) not in inside]
        layer.commutes = tuple(
            g
            for g in ("head", "channel")
            if self._commutes(first, g, layer, out) and not any(self._commutes(r, g, layer, out) for r in others)
        )

    @staticmethod
    def _commutes(reading: Reading, granularity: str, layer: AttentionLayer, out: Tensor) -> bool:
        plain, scaled = reading.inputs[None], reading.inputs.get(granularity)
        if plain.numel() != out.numel() or plain.shape[-1] != layer.num_heads * layer.head_dim:
            return False
        if scaled is None:  # outside the attention module, or one whose forward cannot be run again
            return _equals(plain, out)
        factor = _factor(granularity, layer.num_heads, layer.head_dim).to(plain).expand(-1, layer.head_dim).reshape(-1)
        size = plain.abs().max().item()
        return size > 0 and torch.allclose(scaled.to(plain), plain * factor, rtol=1e-2, atol=1e-4 * size)


def _changed(reading: Reading) -> bool:
    values = list(reading.inputs.values())
    return any(v.shape != values[0].shape or not torch.equal(v.to(values[0].device), values[0]) for v in values[1:])


def _equals(value: Tensor, out: Tensor) -> bool:
    return value.numel() == out.numel() and bool(torch.equal(value.reshape(-1), out.reshape(-1).to(value)))
