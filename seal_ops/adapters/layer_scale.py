"""The learned scale of one layer, as a module: fp32 whatever the model is cast to."""

from __future__ import annotations

import contextlib
import threading

import torch
from torch import Tensor, nn

from .freezing import warn_if_frozen

_GIVING = threading.Lock()


class LayerScale(nn.Module):
    """The scale of one layer, fp32, ``[Hq]`` or ``[Hq, D]``."""

    def __init__(self, shape: tuple[int, ...], device=None):
        super().__init__()
        with torch.inference_mode(False):  # a tensor made in inference mode never learns
            self.scale = nn.Parameter(torch.ones(shape, dtype=torch.float32, device=device))
        self.per_row: Tensor | None = None  # [B, Hq, 1 or D], in the place of `scale`; see `Scales.rows`
        self.thread: int | None = None  # that has given them
        self.copied = False  # whether a batch may hold every row several times, as `generate` makes it
        self.may_be_frozen = False
        self.left_alone = False  # by the state dict that is being loaded

    def forward(self, learned: bool = False, batch: int | None = None) -> Tensor:
        """What attention multiplies by: the scale, or one a row inside `Scales.rows`; ``learned``: always the scale.

        ``batch``: the number of rows that are asked for.  Raises ValueError where the scales are for another number.

        A call, so that the hooks of offloading and of sharding bring the parameter here first.
        """
        if self.per_row is not None and not learned:
            # A backward pass recomputes in threads of its own.
            if not torch.compiler.is_compiling() and self.thread != threading.get_ident() and _outside_backward():
                raise ValueError(
                    "seal_ops.Scales: rows with scales of their own must run in the thread that gave them, got a call "
                    "in another one; give each call its adapter_names, and let one thread at a time use the model"
                )
            return self.per_row if batch is None else self._for_rows(batch)
        if self.scale.dtype not in (torch.float32, torch.float64):  # `_apply` does not see these casts
            raise ValueError(
                f"seal_ops: scales must stay torch.float32, got {self.scale.dtype}; leave the mixed precision of "
                f"DeepSpeed or FSDP out and load the model in 16 bits instead, which leaves the scales as they are"
            )
        warn_if_frozen(self, self.scale, self.may_be_frozen, "scales", "scales")
        return self.scale

    @contextlib.contextmanager
    def given_rows(self, rows: Tensor):
        """Inside, these rows stand in the place of the scale, for the present thread alone.

        Raises:
            ValueError: another thread has given rows, and is not done.
        """
        with _GIVING:
            before, thread = self.per_row, threading.get_ident()
            if before is not None and self.thread != thread:
                raise ValueError(
                    "seal_ops.Scales: rows must get scales of their own in one thread at a time, got a second one; "
                    "take a lock, or put the rows of both into one batch"
                )
            self.per_row, self.thread = rows, thread
        try:
            yield
        finally:
            self.per_row = before

    def _for_rows(self, batch: int) -> Tensor:
        rows = self.per_row.shape[0]
        if batch == rows:
            return self.per_row
        if self.copied and batch % rows == 0:  # beams of a row lie side by side
            return self.per_row.repeat_interleave(batch // rows, 0)
        raise ValueError(f"seal_ops.Scales: the batch must have {rows} rows, one for each given scale, got {batch}")

    def _apply(self, fn, recurse=True):
        # `model.to(torch.bfloat16)` reaches here too. Near 1 bf16 moves in steps of 2^-7, larger than an optimiser's.
        before = self.scale.detach()
        super()._apply(fn, recurse)
        if self.scale.dtype != before.dtype and self.scale.device.type != "meta":
            self.scale.data = before.to(self.scale.device)
        return self

    def _load_from_state_dict(self, *args):
        # The base model's weights leave the scales as they are, also in a strict load; `Scales` warns then.
        if not self.left_alone:
            super()._load_from_state_dict(*args)

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.scale.shape))


def _outside_backward() -> bool:
    return torch._C._current_graph_task_id() == -1
