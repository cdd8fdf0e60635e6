"""A cache of constant size for models that are extended by streaming or lm_infinite: first tokens and a window.

Both programs read nothing else, and count distances from the end of the keys, so a cache from which the tokens between
are taken out gives token for token what a whole one gives.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from ..context_window import EXTENSION, extension_of
from ..wrappers import unwrapped

CALL = "seal_ops.streaming_cache"
METHODS = ("streaming", "lm_infinite")


class RollingLayer(DynamicLayer):
    """Unrotated keys and values [B, Hkv, n, D] of the first ``sinks`` and the last ``window`` - 1 tokens of each row.

    ``first`` [B]: the column of each row's first real token; None where no row begins with padding.  Between two calls
    n is at most sinks + window - 1; the next token is the window's last.
    """

    is_croppable = False

    def __init__(self, sinks: int, window: int, first: Tensor | None, extension):
        super().__init__()
        self.sinks, self.before, self.first = sinks, window - 1, first
        self.start: Tensor | None = None  # the column of each row's first kept token, where `first` is given
        self.cumulative_length = 0
        self._extension = weakref.ref(extension)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Appends keys and values; returns all that are there, and keeps the first and the last ones."""
        extension = self._extension()
        if extension is None or extension.owner.__dict__.get(EXTENSION) is not extension:
            raise ValueError(
                f"{CALL}: the cache must be used under the extension that it was made for, got a model without it"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.cumulative_length += key_states.shape[-2]
        keys = torch.cat([self.keys, key_states], dim=-2)
        values = torch.cat([self.values, value_states], dim=-2)
        self.keys, self.values = self._kept(keys, values)
        return keys, values

    def _kept(self, *tensors: Tensor) -> list[Tensor]:
        count = tensors[0].shape[-2]
        tail = count - self.before
        if tail <= self.sinks:
            return list(tensors)
        if self.first is None:
            return [torch.cat([t[..., : self.sinks, :], t[..., tail:, :]], -2) for t in tensors]
        # A row that is longer than what is kept holds its sinks; a shorter one holds the last columns, padding first.
        first = self.first.to(tensors[0].device)
        before = torch.zeros_like(first) if self.start is None else self.start.to(first.device)
        self.start = torch.minimum(first, torch.full_like(first, self.cumulative_length - self.before - self.sinks))
        at = (self.start - before)[:, None] + torch.arange(self.sinks, device=first.device)
        kept = []
        for t in tensors:
            index = at[:, None, :, None].expand(-1, t.shape[1], -1, t.shape[3])
            kept.append(torch.cat([t.gather(2, index), t[..., tail:, :]], -2))
        return kept

    def get_seq_length(self) -> int:
        """How many tokens came, kept or not."""
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys of the next call, and how many columns of the padding mask lie before them."""
        kept = min(self.cumulative_length, self.sinks + self.before)
        return kept + query_length, self.cumulative_length - kept

    def reset(self) -> None:
        self.keys = self.values = self.start = None
        self.is_initialized, self.cumulative_length = False, 0

    def crop(self, *args, **kwargs) -> None:
        raise ValueError(f"{CALL}: a rolling cache must only grow (its tokens are gone), got a call of crop")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._rows(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._rows(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._rows(lambda t: t[indices])

    def _rows(self, change) -> None:
        self.first, self.start = (t if t is None else change(t) for t in (self.first, self.start))


class RollingCache(DynamicCache):
    """transformers' cache of a model, with a `RollingLayer` for each layer that runs the extension's program."""

    def __init__(self, extension, first: Tensor | None):
        super().__init__(config=extension.owner.config)
        self.padded = first is not None
        options = extension.options
        for layer in extension.patch.layers:
            if layer.program is None:
                continue
            place = layer.module.layer_idx
            if place >= len(self.layers) or type(self.layers[place]) is not DynamicLayer:
                raise ValueError(
                    f"{CALL}: model must keep keys and values of all tokens in layer {place}, "
                    f"{type(extension.owner).__name__} does not"
                )
            self.layers[place] = RollingLayer(options["sinks"], options["window"], first, extension)


def streaming_cache(model: nn.Module, attention_mask: Tensor | None = None) -> RollingCache:
    """A cache of constant size for `generate` on a model that `seal_ops.extend` streams: first tokens and a window.

    Pass it as ``past_key_values`` (since transformers 5.24: ``cache``); what is written is token for token what a cache
    of all tokens gives.  One cache serves one text or batch.

    Args:
        model: extended by "streaming" or "lm_infinite".
        attention_mask: [B, S] of the prompts, where rows are padded, on the left.

    Returns:
        The cache.  A layer keeps at most sinks + window - 1 keys and values of each row between two calls.

    Raises:
        ValueError: a model that is not extended so, or a mask with padding elsewhere than on the left.

    Source:
        StreamingLLM (arXiv 2309.17453), section 3.2.
    """
    extension = extension_of(unwrapped(model, "streaming_cache"))
    if extension is None or extension.method not in METHODS:
        got = "none" if extension is None else extension.method
        raise ValueError(f"{CALL}: model must be extended by {' or '.join(METHODS)}, got {got}")
    first = None
    if attention_mask is not None:
        real = attention_mask.bool()
        if real.dim() != 2 or bool((real[:, 1:] < real[:, :-1]).any()):
            raise ValueError(
                f"{CALL}: attention_mask must be [B, S] with padding on the left only, got "
                f"{list(attention_mask.shape) if real.dim() != 2 else 'padding elsewhere'}"
            )
        first = (~real).sum(1)
    return RollingCache(extension, first)


def check_padding(values: Iterable) -> None:
    """Refuses a mask with padding beside a rolling cache that knows of none.

    Args:
        values: the arguments of an attention module.

    Raises:
        ValueError: there are both among them.
    """
    values = list(values)
    cache = next((value for value in values if isinstance(value, RollingCache)), None)
    if cache is None or cache.padded:
        return
    if any(isinstance(value, Tensor) and value.dim() == 4 and value.shape[2] for value in values):
        raise ValueError(
            f"{CALL}: attention_mask must be given to streaming_cache for a padded batch, got a mask without it"
        )
