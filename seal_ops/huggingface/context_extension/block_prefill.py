"""MInference on a model: long prompts are read through blocks that each head chooses, everything else densely."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops import masks
from ...ops.block_selection import a_shape, cheaper_a_shape, vertical_slash
from ...ops.functional import attention

VERTICAL_SLASH, A_SHAPE, AUTO = PATTERNS = ("vertical_slash", "a_shape", "auto")


def check_pattern(pattern) -> str | None:
    """What is wrong with the option ``pattern``, in words; None where nothing is."""
    by_layer = pattern if isinstance(pattern, dict) else {0: pattern}
    for layer, own in by_layer.items():
        heads = own if isinstance(own, (list, tuple)) and isinstance(pattern, dict) else [own]
        if not isinstance(layer, int) or not heads or any(name not in PATTERNS for name in heads):
            named = f"{', '.join(PATTERNS[:-1])} or {PATTERNS[-1]}"
            return f"pattern must be {named}, or a dict of them by layer, for all heads or for each, got {pattern!r}"
    return None


def head_patterns(pattern, layers: dict[int, int]) -> list[list[str]]:
    """The pattern of every head of every layer; ``layers``: index -> number of query heads.

    Raises ValueError for a layer that is not there, or another number of heads.
    """
    by_layer = pattern if isinstance(pattern, dict) else dict.fromkeys(layers, pattern)
    if unknown := sorted(set(by_layer) - set(layers)):
        raise ValueError(f"pattern must be of layers among {sorted(layers)}, got {unknown}")
    found = []
    for layer, heads in layers.items():
        own = by_layer.get(layer, VERTICAL_SLASH)
        own = [own] * heads if isinstance(own, str) else list(own)
        if len(own) != heads:
            raise ValueError(
                f"pattern of layer {layer} must be one for each of its {heads} query heads, got {len(own)}"
            )
        found.append(own)
    return found


class BlockPrefill:
    """Attention of one layer, through block lists where a call brings more than ``last_q`` queries and ``dense`` keys.

    Keys come rotated, so the cache and decoding stay the model's own.
    """

    unrotated = False

    def __init__(self, patterns: list[str], options: dict):
        self.patterns, self.options = patterns, options

    def serves(self, queries: int, keys: int) -> bool:
        """Whether a call reads through block lists; if not, it is the model's own attention."""
        return queries > self.options["last_q"] and keys > self.options["dense"]

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        longest: int,
        *,
        scale: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen: int | None = None,
        **call,
    ) -> Tensor:
        """Dense q, k, v, or packed sequences, which are read one by one (block lists take no packed ones): their
        lengths come from the device."""
        if cu_seqlens is None:
            return self._read(q, k, v, scale, **call)
        ends = cu_seqlens.tolist()
        ends_k = ends if cu_seqlens_k is None else cu_seqlens_k.tolist()
        parts = []
        for n, (first, last) in enumerate(zip(ends, ends[1:])):
            own = scale[n : n + 1] if scale is not None and scale.dim() == 3 and scale.shape[0] > 1 else scale
            keys = slice(ends_k[n], ends_k[n + 1])
            parts.append(self._read(q[None, first:last], k[None, keys], v[None, keys], own, **call)[0])
        return torch.cat(parts) if parts else torch.empty_like(q)

    def _read(self, q: Tensor, k: Tensor, v: Tensor, scale: Tensor | None, softmax_scale=None, **call) -> Tensor:
        mask = masks.causal()
        if self.serves(q.shape[1], k.shape[1]):
            mask = masks.blocks(self.visited(q, k, softmax_scale), self.options["block"])
        return attention(q, k, v, scale, mask=mask, softmax_scale=softmax_scale, **call)

    def visited(self, q: Tensor, k: Tensor, softmax_scale: float | None) -> Tensor:
        """The map of `masks.blocks` for q [B, Sq, Hq, D] and k [B, Sk, Hkv, D], both rotated."""
        o = self.options
        shared = dict(last=o["last_q"], softmax_scale=softmax_scale)
        first_and_last = a_shape(q, k, o["sinks"], o["window"], size=o["block"])
        streams, free = ([name == wanted for name in self.patterns] for wanted in (A_SHAPE, AUTO))
        if all(streams):
            return first_and_last
        chosen = torch.tensor(streams, device=q.device)[None]
        if any(free):
            enough = cheaper_a_shape(q, k, o["sinks"], o["window"], o["keeps"], **shared)
            chosen = chosen | (enough & torch.tensor(free, device=q.device))
        own = vertical_slash(q, k, o["vertical"], o["slash"], size=o["block"], **shared)
        return torch.where(chosen[:, :, None, None], first_and_last, own)
