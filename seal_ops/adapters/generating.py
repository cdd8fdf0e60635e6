"""``generate`` of a model with scales: an adapter a row, and its copies where a search makes several of a row."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class GenerateRows:
    """Stands in for ``generate`` of one model while its scales are attached; copied and pickled with it.

    ``adapter_names=`` chooses an adapter for every row of the prompt, as `Scales.adapters_per_row`.  Rows that have
    scales of their own keep them in all copies that ``generate`` makes of them.
    """

    def __init__(self, model: nn.Module, scales: nn.Module):
        self.model, self.scales = model, scales

    def install(self) -> None:
        self.model.__dict__["generate"] = self

    def remove(self) -> None:
        if self.model.__dict__.get("generate") is self:
            del self.model.__dict__["generate"]

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(type(self.model).generate.__get__(self.model))

    def __call__(self, *args, adapter_names: Sequence[str] | None = None, **kwargs):
        with contextlib.ExitStack() as stack:
            if adapter_names is not None:
                with torch.no_grad():  # whether rows learn, too, is what compiled code is tied to
                    stack.enter_context(self.scales.adapters_per_row(adapter_names))
            holders = [attn.scaling for attn in self.scales.attachment.patch.layers if attn.scaling is not None]
            rows = _rows(args, kwargs)
            for holder in holders:
                if rows is not None and holder.per_row is not None:
                    holder(batch=rows)  # of the prompt, before copies are made: as many as there are scales
            before = [holder.copied for holder in holders]
            try:
                for holder in holders:
                    holder.copied = True
                return type(self.model).generate(self.model, *args, **kwargs)
            finally:
                for holder, copied in zip(holders, before):
                    holder.copied = copied


def _rows(args: tuple, kwargs: dict) -> int | None:
    """How many rows a prompt has; None where ``generate`` is given no tensor."""
    given = [*args[:1], *(kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))]
    return next((len(tensor) for tensor in given if isinstance(tensor, Tensor)), None)
