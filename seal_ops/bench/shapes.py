"""The one registry of benchmark shapes: attention geometries of real models, and suites of (model, batch, length)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from ..ops import masks
from ..ops.visibility import Visibility


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Attention sizes of a model, from its published config.json."""

    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float = 10_000.0
    window: int | None = None  # keys a query sees in the model's sliding-window layers; None: full causal attention
    mask: Callable[[int], masks.Mask] | None = None  # of a sequence length, in place of causal attention


MODELS = {
    "llama-2-7b": Geometry(32, 32, 128),
    "llama-3.1-8b": Geometry(32, 8, 128, 500_000.0),
    "qwen3-8b": Geometry(32, 8, 128, 1_000_000.0),
    "qwen3-14b": Geometry(40, 8, 128, 1_000_000.0),
    "llama-3.1-70b": Geometry(64, 8, 128, 500_000.0),
    "gemma-7b": Geometry(16, 16, 256),
    "qwen3.5-heads": Geometry(32, 2, 256, 10_000_000.0),  # Qwen3.5's grouping; all 256 channels turn here
    "gemma-2-9b": Geometry(16, 8, 256),
    "gemma-3-4b-local": Geometry(8, 4, 256, window=1024),
    "pythia-4096": Geometry(64, 64, 64),  # 4096 channels in heads of 64, no GQA: the head_dim 64 row of peers' papers
    "falcon-7b": Geometry(71, 1, 64),  # one KV head for all
    # LongLoRA's training attention, and StreamingLLM's, on the heads of Llama 3.1 8B
    "llama-3.1-8b-s2": Geometry(32, 8, 128, 500_000.0, mask=lambda length: masks.shifted_groups(max(1, length // 4))),
    "llama-3.1-8b-streaming": Geometry(32, 8, 128, 500_000.0, mask=lambda length: masks.streaming(4, 4096)),
    "tiny": Geometry(4, 2, 32),
    "tiny-s2": Geometry(4, 2, 32, mask=lambda length: masks.shifted_groups(max(1, length // 4), sinks=2)),
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """One row of the benchmark: causal attention of a model at a batch size and a sequence length (decoding: the keys
    in the cache)."""

    model: str
    batch: int
    seqlen: int

    @property
    def geometry(self) -> Geometry:
        return MODELS[self.model]

    @property
    def mask(self) -> masks.Mask | None:
        return None if self.geometry.mask is None else self.geometry.mask(self.seqlen)

    @property
    def visibility(self) -> Visibility:
        """What the heads see, as the ops read it."""
        return Visibility.of(True, self.geometry.window, self.mask and self.mask.resolve(self.geometry.heads))

    @property
    def pairs(self) -> float:
        """(query, key) pairs that attention computes in one head: causal half the square; with a window its band."""
        s, w = self.seqlen, self.geometry.window
        if self.mask is not None:
            return self.visibility.count(s, s, self.geometry.heads)
        return s * s / 2 if w is None or w >= s else w * s - w * w / 2

    @property
    def forward_flops(self) -> float:
        """4 B H D per pair: two products of 2 D each. The field counts the backward as 2.5 times that."""
        g = self.geometry
        return 4.0 * self.batch * g.heads * g.head_dim * self.pairs

    @property
    def rope_elements(self) -> int:
        g = self.geometry
        return self.batch * self.seqlen * (g.heads + g.kv_heads) * g.head_dim

    def moved_elements(self, operation: str) -> int:
        """What an operation that is counted in bytes moves at least: rope reads and writes Q and K, decode reads keys
        and values."""
        g = self.geometry
        if operation == "rope":
            return 2 * self.rope_elements
        return 2 * self.batch * min(self.seqlen, g.window or self.seqlen) * g.kv_heads * g.head_dim

    def __str__(self) -> str:
        return f"{self.model} {length_name(self.seqlen)} x {self.batch}"


def length_name(seqlen: int) -> str:
    return f"{seqlen // 1024}k" if seqlen % 1024 == 0 else str(seqlen)


def _tokens(model: str, lengths: tuple[int, ...], tokens: int) -> list[Shape]:
    """A fixed number of tokens in all: the batch shrinks as the sequence grows."""
    return [Shape(model, max(1, tokens // s), s) for s in lengths]


_K = 1024
SUITES: dict[str, list[Shape]] = {
    # Most telling first: what a time limit cuts off is at the end.
    "headline": [
        *_tokens("llama-3.1-8b", (2 * _K, 8 * _K, 32 * _K), 32 * _K),
        *_tokens("pythia-4096", (4 * _K, 16 * _K), 32 * _K),
        *_tokens("gemma-7b", (8 * _K,), 32 * _K),
        Shape("llama-3.1-8b", 1, 128 * _K),
    ],
    "models": [
        shape
        for model in ("llama-2-7b", "llama-3.1-8b", "qwen3-14b", "gemma-7b", "gemma-2-9b", "gemma-3-4b-local")
        for shape in _tokens(model, (1 * _K, 4 * _K, 16 * _K), 16 * _K)
    ],
    "lengths": _tokens("llama-3.1-8b", tuple(2**n * _K for n in range(8)), 32 * _K),
    # Where a peer was ahead when it was last looked at.
    "hard": [
        Shape("llama-2-7b", 32, 1 * _K),
        Shape("llama-2-7b", 8, 4 * _K),
        Shape("llama-3.1-70b", 4, 8 * _K),
        Shape("pythia-4096", 8, 4 * _K),
        Shape("gemma-7b", 4, 8 * _K),
        Shape("qwen3.5-heads", 4, 8 * _K),
    ],
    # Each mask beside full causal attention of its length.
    "masks": [
        *(Shape(model, 1, 32 * _K) for model in ("llama-3.1-8b", "llama-3.1-8b-s2", "llama-3.1-8b-streaming")),
        *(Shape(model, 1, 128 * _K) for model in ("llama-3.1-8b-streaming", "llama-3.1-8b", "llama-3.1-8b-s2")),
    ],
    "smoke": [Shape("tiny", 2, 48)],
    "decode": [
        *(Shape("llama-3.1-8b", batch, keys) for keys in (32 * _K, 128 * _K) for batch in (1, 8, 32)),
        *(Shape(model, batch, 32 * _K) for model in ("pythia-4096", "gemma-2-9b", "falcon-7b") for batch in (1, 8)),
        Shape("gemma-2-9b", 1, 128 * _K),
        Shape("falcon-7b", 32, 32 * _K),
        Shape("llama-3.1-8b", 1, 4 * _K),
    ],
}


def part_of(shapes: list[Shape], text: str) -> list[Shape]:
    """The i-th of n parts of about equal work, from "i/n"; together the parts are `shapes`. Raises ValueError in one
    sentence."""
    try:
        part, parts = map(int, text.split("/"))
    except ValueError:
        part, parts = 0, 0
    if not 1 <= part <= parts:
        raise ValueError(f"--part must be I/N with 1 <= I <= N, got {text!r}")
    # Start-up, compilation and the gate of a shape take about as long as 2e13 FLOPs of every contestant.
    cost = {shape: 2e13 + shape.forward_flops for shape in shapes}
    mine: list[set[Shape]] = [set() for _ in range(parts)]
    for shape in sorted(shapes, key=lambda s: -cost[s]):
        min(mine, key=lambda chosen: sum(cost[s] for s in chosen)).add(shape)
    return [shape for shape in shapes if shape in mine[part - 1]]


def parse_shape(text: str) -> Shape:
    """`model:length` or `model:length:batch`, lengths as 8192 or 8k. Raises ValueError in one sentence."""
    parts = text.split(":")
    if len(parts) not in (2, 3) or parts[0] not in MODELS:
        raise ValueError(
            f"--shape must be MODEL:LENGTH or MODEL:LENGTH:BATCH with MODEL one of {', '.join(MODELS)}, got {text!r}"
        )
    try:
        seqlen = int(parts[1][:-1]) * _K if parts[1].endswith("k") else int(parts[1])
        batch = int(parts[2]) if len(parts) == 3 else max(1, 32 * _K // seqlen)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"--shape must have a length like 8192 or 8k and a whole batch size, got {text!r}") from None
    if seqlen < 1 or batch < 1:
        raise ValueError(f"--shape must have a length and a batch size of at least 1, got {text!r}")
    return Shape(parts[0], batch, seqlen)
