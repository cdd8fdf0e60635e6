"""The short samples that a plan is measured on, and what they say of the real length."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Sequence

import torch
from torch import nn

from ...ops.launch_overrides import key_tiles, launched_as
from ...quantized import bases
from ..processes import Processes
from .decoder import device_of

# Tokens of the shortest sample. An allocator that tells rounded sizes alone would show that in shorter ones.
SHORT = {"cuda": 512}
SHORT_ELSEWHERE = 64
MOST_TILES = 32  # of a sample: each takes its time


@dataclasses.dataclass(frozen=True)
class Growth:
    """A quantity by tokens ``n`` of a row and rows with labels ``k``: ``constant + linear n + square n² + label k``."""

    constant: float = 0.0
    linear: float = 0.0
    square: float = 0.0
    label: float = 0.0

    def __call__(self, length: int, labels: int) -> int:
        value = self.constant + self.linear * length + self.square * length**2 + self.label * labels
        return max(0, round(value))

    @classmethod
    def through(cls, points: Sequence[tuple[int, int]], values: Sequence[float], straight: bool = False) -> Growth:
        """Through four points ``(n, k)``: the first two differ in k alone, the others are at twice and four times n.

        A bend below a hundredth of the value is rounding of an allocator's; it would be gigabytes at a million tokens.
        ``straight``: any bend is that of a maximum of straight lines, of which the last one goes on.
        """
        n = points[0][0]
        label = (values[1] - values[0]) / (points[1][1] - points[0][1])
        one, _, two, four = (value - label * k for value, (_, k) in zip(values, points))
        square = ((four - two) / (2 * n) - (two - one) / n) / (3 * n)
        if straight or abs(square) * (4 * n) ** 2 < 0.01 * abs(four):
            square = 0.0
        linear = (four - two) / (2 * n) - square * 6 * n
        return cls(four - 4 * n * linear - square * (4 * n) ** 2, linear, square, label)


@dataclasses.dataclass(frozen=True, eq=False)
class ShortSamples:
    """The short samples of a measurement.

    Attributes:
        model: in training mode, inside whatever a training run puts on it.
        length, labels: tokens of the longest row that will be trained on, and its rows whose logits the loss reads; in
            this process, where several divide the tokens among themselves.
        batch_size: rows of a sample.
        padded: whether rows differ in length.
        ids: tokens to take; None for any.
        processes: of the run.
    """

    model: nn.Module
    length: int
    labels: int
    batch_size: int = 1
    padded: bool = False
    ids: Sequence[int] | None = None
    processes: Processes = Processes()

    @property
    def device(self) -> torch.device:
        return device_of(self.model)

    @functools.cached_property
    def shortest(self) -> int:
        least = SHORT.get(self.device.type, SHORT_ELSEWHERE)
        return max(4, min(max(least, -(-_tokens_of_a_weight(self.model) // self.batch_size)), self.length // 4))

    def alike(self, tile: int) -> bool:
        """Whether tiles of ``tile`` tokens are cut so that the samples are, too: into as many tiles as a real row."""
        return tile * MOST_TILES >= self.batch_size * self.length

    def tile_of(self, tile: int, length: int) -> int:
        """Tokens of a tile in a sample of ``length`` tokens a row, as many times shorter than one of ``tile`` tokens as
        the row is than a real one.  Where that would be too many tiles, few tokens in every sample."""
        if self.alike(tile):
            return max(1, -(-length * min(tile, self.batch_size * self.length) // self.length))
        return max(1, self.batch_size * self.shortest // 8)

    @property
    def points(self) -> list[tuple[int, int]]:
        """Tokens and labels of the samples: few labels or many, as the real ones, so that both take the same way."""
        n = self.shortest
        lengths, more = (n, n, 2 * n, 4 * n), max(1, n // 8)
        if 2 * self.labels <= self.length:
            return [(m, max(1, n // 4) + (more if i == 1 else 0)) for i, m in enumerate(lengths)]
        return [(m, m - (0 if i == 1 else more)) for i, m in enumerate(lengths)]

    def inputs(self, length: int) -> dict:
        """Of a sample: ``input_ids`` [B, S], and where rows differ in length a mask; where processes divide the tokens,
        S of them in each, with the positions that they have in the whole row."""
        count = self.batch_size * length
        if self.ids is None:
            vocabulary = self.model.get_input_embeddings().weight.shape[0]
            ids = torch.arange(count, device=self.device) % vocabulary
        else:
            ids = torch.tensor(self.ids[:count], device=self.device).repeat(-(-count // len(self.ids)))[:count]
        inputs = {"input_ids": ids.view(self.batch_size, length), "use_cache": False}
        if self.processes.parts > 1:
            first = self.processes.part * length
            positions = torch.arange(first, first + length, device=self.device)
            return inputs | {"position_ids": positions.expand(self.batch_size, -1)}
        if self.padded:
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            inputs["attention_mask"][-1, length - length // 8 - 1 :] = 0
        return inputs

    def launched(self, length: int) -> contextlib.AbstractContextManager[None]:
        """Inside, kernels share out the work of a sample of ``length`` tokens a row as they do that of real rows, whose
        workspace is then as many times larger."""
        return launched_as(self._key_tiles(length), self._key_tiles(self.length), self.device)

    def _key_tiles(self, length: int) -> int:
        tokens = self.batch_size * length - (length // 8 + 1) * self.padded
        config = self.model.config.get_text_config()
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return key_tiles(tokens, head_dim, self.batch_size, self.padded)

    def fit(self, values: Sequence[float], straight: bool = False) -> int:
        """What a quantity is at the real length and labels, from its values in the samples; ``straight``: no square."""
        return Growth.through(self.points, values, straight)(self.length, self.labels)


def _tokens_of_a_weight(model: nn.Module) -> int:
    """Tokens with which a layer's outputs outweigh by far one weight in few bits that is written out.

    With fewer, that weight decides where the peak lies, and longer rows have it elsewhere.
    """
    sizes = [bases.sizes(m) for m in model.modules() if bases.is_packed(m)]
    if not sizes:
        return 0
    layers = max(1, getattr(model.config.get_text_config(), "num_hidden_layers", 1))
    return 4 * layers * max(columns * rows for columns, rows in sizes) // sum(rows for _, rows in sizes)
