"""Runs a model as a plan says: what each decoder layer keeps, and what is tiled or left out."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from ...huggingface.logits import logits_at, virtual_tokens
from ...huggingface.modes import attention_ops
from .decoder import Decoder, replaced_forwards, states_of
from .last_rows import LastRows
from .tiling import run_tiled

EVERYTHING, ATTENTION, INPUT, OFFLOADED = "everything", "attention", "input", "offloaded"


class Execution:
    """The changes to one decoder while a plan runs.

    Args:
        decoder: whose layers are run.
        keeps: what each layer keeps: `EVERYTHING`, `ATTENTION` (the fused attention's results and the input), `INPUT`,
            or `OFFLOADED` (the input, in pinned host memory).
        group: so many layers, from the first that has a gradient on, lie under one checkpoint; above 1 the layers must
            keep `INPUT` or `OFFLOADED`, and only a group's first input is kept.
        tile: tokens that ``tiled`` modules treat at once; None for all.
        rows: the last layer, where only some of its rows need be computed.
    """

    def __init__(
        self,
        decoder: Decoder,
        keeps: tuple[str, ...],
        group: int = 1,
        tile: int | None = None,
        tiled: tuple[nn.Module, ...] = (),
        rows: LastRows | None = None,
    ):
        self.decoder, self.keeps, self.group = decoder, keeps, group
        self.tile, self.tiled, self.rows = tile, tiled, rows
        self._trains = decoder.trains
        self._waiting: list[Callable] = []
        self._handed_on: Tensor | None = None

    @contextlib.contextmanager
    def on(self) -> Iterator[Execution]:
        """Inside, the model runs as described; afterwards as before."""
        changes = [(layer, functools.partial(self._layer, n)) for n, layer in enumerate(self.decoder.layers)]
        if self.tile is not None:
            changes += [(module, functools.partial(run_tiled, module, self.tile)) for module in self.tiled]
        with replaced_forwards(changes):
            try:
                yield self
            finally:
                self._waiting, self._handed_on = [], None

    def logits_at(self, model: nn.Module, positions: Tensor, **inputs) -> Tensor:
        """Logits [B, K, vocabulary] at ``positions`` [K] of ``input_ids``, as `huggingface.logits.logits_at`."""
        if not use_rows(self.rows, len(positions), inputs["input_ids"].shape[1]):
            return logits_at(model, positions, **inputs)
        self.rows.positions = positions + virtual_tokens(model)
        try:
            return model(**inputs).logits
        finally:
            self.rows.positions = None

    def _layer(self, number: int, forward: Callable, *args, **kwargs):
        last = number == len(self.keeps) - 1
        if last and self.rows is not None and self.rows.positions is not None:
            # The positions of this call stay those of its recomputation.
            forward = at_rows(self.rows, self.rows.positions, forward)
        if number == 0:
            self._waiting = []
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        states = states_of(args, kwargs)
        if not (states.requires_grad or self._trains[number] or self._waiting):
            return forward(*args, **kwargs)
        function = functools.partial(_on_states, forward, args[1:], kwargs)
        if self.group == 1:
            return run_keeping(self.keeps[number], function, states)
        return self._grouped(number, last, function, states)

    def _grouped(self, number: int, last: bool, function: Callable, states: Tensor) -> Tensor:
        """Waits with a layer until the last one of its group is called; all of them run then."""
        if self._waiting and states is not self._handed_on:
            raise RuntimeError(
                "seal_ops: a model whose layers are grouped must hand the states from layer to layer as they are, "
                f"layer {number} was called with others"
            )
        self._waiting.append(function)
        if not last and len(self._waiting) < self.group:
            self._handed_on = states
            return states
        functions, self._waiting, self._handed_on = tuple(self._waiting), [], None
        if len(functions) == 1:
            return run_keeping(self.keeps[number], functions[0], states)
        return run_keeping(self.keeps[number], functools.partial(_one_by_one, functions), states)


class Whole:
    """In the place of an `Execution` for a model whose layers are not known: it runs as it is."""

    logits_at = staticmethod(logits_at)


def use_rows(rows: LastRows | None, labels: int, length: int) -> bool:
    """Whether the last layer is cut: decided by the labels alone, so that every plan computes the same."""
    return rows is not None and 2 * labels <= length


def run_keeping(what: str, function: Callable[[Tensor], Tensor], states: Tensor) -> Tensor:
    """``function(states)``, of which the graph keeps ``what``."""
    if what == EVERYTHING:
        return function(states)
    options = {"use_reentrant": False}
    if what == ATTENTION:
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, attention_ops())
    # The checkpoint's hooks lie within these, so that the states alone go to the host.
    with save_on_cpu(pin_memory=True) if what == OFFLOADED else contextlib.nullcontext():
        return checkpoint(function, states, **options)


def _one_by_one(functions: tuple[Callable, ...], states: Tensor) -> Tensor:
    for function in functions:
        states = run_keeping(INPUT, function, states)
    return states


def _on_states(forward: Callable, args: tuple, kwargs: dict, states: Tensor) -> Tensor:
    return forward(states, *args, **kwargs)


def at_rows(rows: LastRows, positions: Tensor, forward: Callable) -> Callable:
    """The last layer's ``forward``, which gives the rows at ``positions`` whenever it is called."""

    def cut(states: Tensor, *args, **kwargs) -> Tensor:
        before, rows.positions = rows.positions, positions
        try:
            return rows(forward, states, *args, **kwargs)
        finally:
            rows.positions = before

    return cut
