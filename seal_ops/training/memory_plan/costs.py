"""What a step of a decoder costs: bytes and operations of each layer and of the rest, at one length."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """Of one decoder layer: bytes, its input left out unless said, and operations.

    Attributes:
        differentiates: whether anything in it or before it asks for a gradient.
        keeps_entry: whether the graph of a plain call keeps the states that the layer was called with.
        entry, result: those states (0 for the first layer, whose are the embeddings), and the states that it returns.
        kept: what else the graph of a plain call keeps.
        attention: what the fused attention returns.
        free: most at once in a call without a graph, with the result.
        forward: most at once in a call with a graph, with the result.
        backward: most at once in the backward pass, with what the graph keeps, without the gradient of the result.
        linear_operations, attention_operations: of a forward call.
    """

    differentiates: bool
    keeps_entry: bool
    entry: float
    result: float
    kept: float
    attention: float
    free: float
    forward: float
    backward: float
    linear_operations: float
    attention_operations: float


@dataclasses.dataclass(frozen=True)
class Costs:
    """Of a whole model, at one length.

    Attributes:
        layers: one for each layer.
        before: bytes that live when the first layer is called: embeddings, rotary tables, masks.
        head: most bytes from the last layer's result, left out, to its gradient.
        head_operations: of the forward part of that.
    """

    layers: tuple[LayerCost, ...]
    before: float
    head: float
    head_operations: float


def largest(found: Sequence[Costs]) -> Costs:
    """Of the costs that several processes have measured of the same model, the largest of each."""
    layers = tuple(
        LayerCost(*(max(values) for values in zip(*map(_values, same)))) for same in zip(*(c.layers for c in found))
    )
    return Costs(layers, *(max(getattr(c, name) for c in found) for name in ("before", "head", "head_operations")))


def _values(cost: LayerCost) -> tuple:
    return tuple(getattr(cost, field.name) for field in dataclasses.fields(cost))
