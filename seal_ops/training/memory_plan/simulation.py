"""The expected peak and time of a step, from what the layers cost and what each of them keeps."""

from __future__ import annotations

import dataclasses

from .costs import Costs, LayerCost
from .execution import ATTENTION, EVERYTHING, OFFLOADED
from .memory import Throughput


@dataclasses.dataclass(frozen=True)
class Expected:
    """Bytes beside what is in use before the step: at most at once, kept after the forward pass, in pinned memory."""

    peak: int
    kept: int
    host: int


def units(layers: tuple[LayerCost, ...], group: int) -> list[list[int]]:
    """The numbers of the layers that lie under one checkpoint, group by group; a layer without a gradient is alone."""
    first = next((n for n, layer in enumerate(layers) if layer.differentiates), len(layers))
    return [[n] for n in range(first)] + [
        list(range(n, min(n + group, len(layers)))) for n in range(first, len(layers), group)
    ]


def expected(costs: Costs, keeps: tuple[str, ...], group: int, trained: int) -> Expected:
    """Walks through a step.

    Args:
        keeps: what each layer keeps.
        group: layers under one checkpoint.
        trained: bytes of the trained parameters; their gradients and AdamW's two moments are as large each, and a
            fourth tensor lives while the optimiser steps.
    """
    layers, kept, peak, host, stack = costs.layers, 0.0, 0.0, 0.0, []
    for unit in units(layers, group):
        what, first = keeps[unit[0]], layers[unit[0]]
        entered = 0.0
        for number in unit:
            layer = layers[number]
            inside = layer.forward if what == EVERYTHING else layer.free
            inside += layer.attention if what == ATTENTION else 0
            peak = max(peak, kept + first.entry * bool(entered) + layer.entry + inside)
            entered += layer.entry
        size = _kept(first, what)
        stack.append((unit, what, kept, size))
        kept += size
        host += first.result if what == OFFLOADED and first.differentiates else 0
    end = kept
    peak = max(peak, kept + layers[-1].result + costs.head)
    for unit, what, below, _ in reversed(stack):
        if not layers[unit[0]].differentiates:
            continue
        entries = sum(layers[n].entry for n in unit)
        for number in unit:
            layer = layers[number]
            if what == EVERYTHING:
                inside = layer.backward + layer.entry * layer.keeps_entry
            else:
                inside = max(layer.forward, layer.backward) + entries
            peak = max(peak, below + layer.result + inside)
    constant = costs.before + 3 * trained
    return Expected(round(max(constant + peak, 4 * trained)), round(end), round(host))


def _kept(layer: LayerCost, what: str) -> float:
    if not layer.differentiates:
        return 0.0
    if what == EVERYTHING:
        return layer.kept + layer.entry * layer.keeps_entry
    return {OFFLOADED: 0.0, ATTENTION: layer.entry + layer.attention}.get(what, layer.entry)


def seconds(costs: Costs, keeps: tuple[str, ...], group: int, tiled: bool, speed: Throughput) -> float:
    """Of forward and backward: products and attention at the rates that were measured, nothing else counted.

    The backward pass of a product with frozen weights takes as many operations as its forward, that of attention 2.5
    times as many.
    """
    total = 3 * costs.head_operations / speed.linear
    for layer, what in zip(costs.layers, keeps):
        linear = layer.linear_operations / speed.linear
        attention = layer.attention_operations / speed.attention
        total += linear + attention
        if not layer.differentiates:
            continue
        total += linear + 2.5 * layer.attention_operations / speed.attention_backward
        if what != EVERYTHING or tiled:
            total += linear
        if what not in (EVERYTHING, ATTENTION):
            total += attention
        if group > 1:
            total += linear + attention
    return total
