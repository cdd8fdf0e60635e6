"""Batches of samples, for our loop and for transformers' ``Trainer``."""

import os
from collections.abc import Sequence

import torch
from torch.utils.data._utils import fetch

from ..tasks.sample import IGNORE_INDEX
from ..utils.arguments import integer
from ..utils.frames import callers
from .samples import to_rows


class Collator:
    """Batches samples for transformers' ``Trainer`` (and for :func:`train`): pads on the right.

    Args:
        pad_token_id: what fills the padding; masked, so that any id will do.
        label_positions_only: also pass ``logits_to_keep`` and ``shift_labels``, so that the model computes logits where
            there are labels and nowhere else.  None for true, except where every tensor of a batch is cut along its
            first dimension: by ``nn.DataParallel``, which ``Trainer`` uses for several GPUs without a launcher, and by
            accelerate for an ``IterableDataset``.
        tokenizer, chat_template, chat_template_kwargs: for samples that are text: see :func:`.samples.to_rows`.

    Samples are those of :func:`.samples.to_rows`: of a task, token ids with labels, texts or conversations. Returns
    tensors ``input_ids``, ``attention_mask``, ``labels`` ``[B, S]`` (int64), and with ``label_positions_only``
    ``logits_to_keep`` ``[K]`` (positions whose next token is a label in some row) and ``shift_labels`` ``[B, K]``.
    ``Trainer`` needs ``remove_unused_columns=False``.
    """

    def __init__(
        self, pad_token_id: int = 0, label_positions_only: bool | None = None, tokenizer=None, chat_template=None,
        chat_template_kwargs: dict | None = None,
    ):  # fmt: skip
        self.pad_token_id = integer("seal_ops.Collator", "pad_token_id", pad_token_id, 0)
        self.label_positions_only = label_positions_only
        self.tokenizer, self.chat_template, self.chat_template_kwargs = tokenizer, chat_template, chat_template_kwargs

    def __call__(self, samples: Sequence) -> dict[str, torch.Tensor]:
        rows = to_rows(samples, self.tokenizer, self.chat_template, self.chat_template_kwargs, "seal_ops.Collator")
        width = max(map(len, rows))

        def stack(values, fill):
            return torch.tensor([row + [fill] * (width - len(row)) for row in values], device="cpu")

        labels = stack([row.labels for row in rows], IGNORE_INDEX)
        batch = {
            "input_ids": stack([row.input_ids for row in rows], self.pad_token_id),
            "attention_mask": stack([[1] * len(row) for row in rows], 0),
            "labels": labels,
        }
        whole = not (_in_data_parallel() or _reads_a_stream())
        if whole if self.label_positions_only is None else self.label_positions_only:
            keep = (labels[:, 1:] != IGNORE_INDEX).any(0).nonzero().squeeze(1)
            batch |= {"logits_to_keep": keep, "shift_labels": labels[:, keep + 1]}
        return batch


def _in_data_parallel():
    """Whether ``Trainer`` would use ``nn.DataParallel``: several GPUs and no launcher of one process each."""
    return torch.cuda.device_count() > 1 and "LOCAL_RANK" not in os.environ


def _reads_a_stream():
    """Whether torch's ``DataLoader`` asks for a batch of an ``IterableDataset``, which accelerate hands out in
    slices."""
    for frame in callers():
        caller = frame.f_locals.get("self")
        if isinstance(caller, (fetch._IterableDatasetFetcher, fetch._MapDatasetFetcher)):
            return isinstance(caller, fetch._IterableDatasetFetcher)
    return False
