"""Batches of samples, for our loop and for transformers' ``Trainer``."""
from collections.abc import Sequence

import torch

from ..tasks.base import IGNORE_INDEX, Sample


class Collator:
    """Batches samples for transformers' ``Trainer`` (and for :func:`train`): pads on the right.

    Args:
        pad_token_id: what fills the padding; masked, so that any id will do.
        label_positions_only: also pass ``logits_to_keep`` and ``shift_labels``, so that the model computes logits where
            there are labels and nowhere else.

    Returns tensors ``input_ids``, ``attention_mask``, ``labels`` ``[B, S]`` (int64), and with ``label_positions_only``
    ``logits_to_keep`` ``[K]`` (positions whose next token is a label in some row) and ``shift_labels`` ``[B, K]``.
    """

    def __init__(self, pad_token_id: int = 0, label_positions_only: bool = True):
        self.pad_token_id, self.label_positions_only = pad_token_id, label_positions_only

    def __call__(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        width = max(map(len, samples))

        def stack(rows, fill):
            return torch.tensor([row + [fill] * (width - len(row)) for row in rows])

        labels = stack([s.labels for s in samples], IGNORE_INDEX)
        batch = {
            "input_ids": stack([s.input_ids for s in samples], self.pad_token_id),
            "attention_mask": stack([[1] * len(s) for s in samples], 0),
            "labels": labels,
        }
        if self.label_positions_only:
            keep = (labels[:, 1:] != IGNORE_INDEX).any(0).nonzero().squeeze(1)
            batch |= {"logits_to_keep": keep, "shift_labels": labels[:, keep + 1]}
        return batch
