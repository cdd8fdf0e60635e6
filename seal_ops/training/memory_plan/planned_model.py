"""A model in training that runs as a plan says, and as one that keeps less once a step has not fitted."""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ..processes import Processes
from ..samples import label_count
from . import memory as memories
from .planning import Plan, Planner


class PlannedModel(contextlib.AbstractContextManager):
    """A model and the plan by which it runs; at the end of the block it is as before.

    Args:
        model: in training mode, with all that a run puts on it.
        samples: of the run; the longest decides how large a step is.
        batch_size: samples in one forward pass.
        processes: of the run.
        frozen_linears: in what its frozen linear layers multiply while it is measured; None for as they are.
    """

    def __init__(
        self,
        model: nn.Module,
        samples: Sequence,
        batch_size: int = 1,
        processes: Processes | None = None,
        frozen_linears: str | None = None,
    ):
        processes = processes or Processes()
        length, rows = max(map(len, samples)), min(batch_size, len(samples))
        labels = min(length, max(map(label_count, samples)) * rows)
        padded = rows > 1 and len({len(sample) for sample in samples}) > 1
        ids = max(samples, key=len).input_ids
        self.model, self.plan = model, None
        self._planner = Planner(model, length, labels, rows, padded, ids, processes, frozen_linears)
        self._setting: bool | str = "auto"
        self._alone = processes.count == 1  # others would go on without this one
        self._running, self._execution = contextlib.ExitStack(), None

    def __exit__(self, *error):
        self._running.close()

    def follow(self, setting: bool | str, tile: int | None | bool = True, allowed: int | None = None) -> None:
        """Plans the steps as `train`'s ``gradient_checkpointing`` says, and runs the model so from now on.

        ``tile``: of the run that this one continues, whose bits it decides; True for none.  ``allowed``: bytes of a
        step; None for what is free.
        """
        self._setting, planner = setting, self._planner
        self._run_as(planner.plan(allowed, tile) if setting == "auto" else planner.uniform(setting, tile))
        if setting == "auto" and any("measuring it failed" in note for note in self.plan.notes):
            warnings.warn(f"seal_ops.train: {'; '.join(self.plan.notes)}", stacklevel=3)
        if not self.plan.fits:
            warnings.warn(f"seal_ops.train: the step may not fit into memory\n{self.plan}", stacklevel=3)

    def lower(self, reason: str) -> None:
        """Goes on with a plan that keeps less after a step that did not fit, and says so.

        Raises:
            torch.OutOfMemoryError: there is no such plan; one sentence, which ends with ``reason``.
        """
        self._running.close()  # the samples of another plan are to meet the model itself
        gc.collect()
        memories.give_back(self._planner.device)
        before = self.plan
        step = f"a step of {before.batch_size} x {before.length} tokens does not fit into memory"
        found = self._planner.lower(before) if self._setting == "auto" and self._alone else None
        if found is None:
            first = "" if self._setting == "auto" else "gradient_checkpointing='auto', "
            if self._setting == "auto" and not self._alone:  # the others are under way, with the plan that they know
                first = f"memory below {before.memory} bytes, "
            raise torch.OutOfMemoryError(
                f"seal_ops.train: {step} with {before.summary()}; try {first}a smaller batch_size with accumulate, "
                f"shorter samples, or a model in 4 bits ({reason})"
            )
        self._run_as(found)
        warnings.warn(
            f"seal_ops.train: {step} with {before.summary()}; going on with {found.summary()} ({reason})", stacklevel=4
        )

    def logits_at(self, positions: Tensor, **inputs) -> Tensor:
        """Logits [B, K, vocabulary] at ``positions`` [K] of ``input_ids``, as `huggingface.logits.logits_at`."""
        return self._execution.logits_at(self.model, positions, **inputs)

    @contextlib.contextmanager
    def recomputing(self) -> Iterator[None]:
        """Inside, before a plan is followed, every layer is recomputed in the backward pass."""
        with self._planner.running(self._planner.uniform(True)) as self._execution:
            yield

    def _run_as(self, plan: Plan) -> None:
        self._running.close()
        self.plan, self._execution = plan, self._running.enter_context(self._planner.running(plan))
