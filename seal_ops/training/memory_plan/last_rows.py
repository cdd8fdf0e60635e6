"""In the last decoder layer, only the rows that the loss reads go on after attention.

Attention needs every row of q, k and v.  What comes behind it (output projection, residual, norms, MLP, final norm)
works on each row by itself, so that the rows without a label need not be there.  How a layer comes apart is observed:
the layer runs until the output projection is called, and once more on the chosen rows with the projected ones in the
place of its attention.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .decoder import Decoder, UnknownStructure, no_dropout, offloaded, replaced_forwards


class _Reached(Exception):
    """The output projection is called; ends the first part of the layer."""


class LastRows:
    """The last layer of a decoder, cut behind its attention.

    ``positions``, int64 [K], are the rows that the next call gives, [B, K, H]; None for the whole layer.
    """

    def __init__(self, layer: nn.Module, attention: nn.Module, projection: nn.Module):
        self.layer, self.attention, self.projection = layer, attention, projection
        self.positions: Tensor | None = None
        self._rest: tuple = ()

    def __call__(self, forward: Callable, states: Tensor, *args, **kwargs) -> Tensor:
        if self.positions is None:
            return forward(states, *args, **kwargs)
        positions = self.positions.to(states.device)
        attended = self._attended(forward, states, args, kwargs).index_select(1, positions)

        def answer(*_args, **_kwargs):
            projected = self.projection(attended)
            return projected if self._rest is None else (projected, *self._rest)

        with replaced_forwards([(self.attention, lambda _forward, *a, **k: answer())]):
            return forward(states.index_select(1, positions), *args, **kwargs)

    def _attended(self, forward: Callable, states: Tensor, args: tuple, kwargs: dict) -> Tensor:
        """What the output projection reads, [B, S, C]."""
        found: list[Tensor] = []

        def reached(_module, inputs):
            found.append(inputs[0])
            raise _Reached

        hook = self.projection.register_forward_pre_hook(reached, prepend=True)
        try:
            forward(states, *args, **kwargs)
        except _Reached:
            pass
        finally:
            hook.remove()
        if not found or found[0].shape[:2] != states.shape[:2] or found[0].dim() != 3:
            raise UnknownStructure("its last layer does not hand its output projection one row a token")
        return found[0]

    def check(self, forward: Callable, states: Tensor, positions: Tensor, *args, **kwargs) -> None:
        """Compares the cut layer with the whole one on a call.  Raises UnknownStructure where they differ."""
        results = []
        hook = self.attention.register_forward_hook(lambda _module, _inputs, result: results.append(result))
        try:
            self.positions = None
            whole = self(forward, states, *args, **kwargs)
        finally:
            hook.remove()
        if len(results) != 1:
            raise UnknownStructure("its last layer does not call its attention once")
        self._rest = self._others(results[0])
        try:
            self.positions = positions
            cut = self(forward, states, *args, **kwargs)
        except UnknownStructure:
            raise
        except Exception as error:  # the layer uses tensors of all rows beside its states
            raise UnknownStructure(f"its last layer fails on some rows alone ({type(error).__name__})") from None
        finally:
            self.positions = None
        expected = whole.index_select(1, positions.to(whole.device)).double()
        error = (cut.double() - expected).norm() if cut.shape == expected.shape else torch.tensor(torch.inf)
        if not error <= 32 * torch.finfo(whole.dtype).eps * expected.norm():
            raise UnknownStructure("its last layer gives other rows when only some are computed")

    @staticmethod
    def _others(result) -> tuple | None:
        """What attention returns beside its output; None where it returns a tensor alone."""
        if isinstance(result, Tensor):
            return None
        if not isinstance(result, tuple) or not result or any(isinstance(t, Tensor) for t in result[1:]):
            raise UnknownStructure("its attention returns several tensors")
        return result[1:]


def cut_last_layer(decoder: Decoder) -> LastRows:
    """The last layer of ``decoder``, to be checked on a call.  Raises UnknownStructure."""
    layer, attention = decoder.layers[-1], decoder.attention[-1]
    if attention is None or attention.output_projection is None:
        raise UnknownStructure("its last layer has no attention with a known output projection")
    if not any(child is attention.module for child in layer.children()):
        raise UnknownStructure("something lies between its last layer and the attention in it")
    if not any(m is attention.output_projection for m in attention.module.modules()):
        raise UnknownStructure("its last output projection lies outside the attention")
    if not no_dropout(layer):
        raise UnknownStructure("its last layer has dropout, which would draw other numbers")
    if offloaded(layer):
        raise UnknownStructure("weights of its last layer are brought by hooks")
    return LastRows(layer, attention.module, attention.output_projection)
