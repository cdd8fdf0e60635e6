"""One optimiser step: forward, loss, backward, clipping and AdamW."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .collator import Collator
from .losses import summed_cross_entropy
from .memory_plan.planned_model import PlannedModel
from .processes import Processes
from .random_state import get_random_state, gpus_of, set_random_state
from .samples import Row, label_count


class OptimizerStep:
    """Takes the steps of one run.

    Args:
        planned: the model, as it runs in training.
        trained: the parameters that are trained, by name.
        optimizer: of these parameters.
        processes: among which the forward passes of a step are divided.
        max_grad_norm: the gradient's norm is clipped to it; None for no clipping.
    """

    def __init__(
        self,
        planned: PlannedModel,
        trained: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        processes: Processes,
        max_grad_norm: float | None = None,
    ):
        self.planned, self.trained, self.optimizer, self.processes = planned, trained, optimizer, processes
        self.max_grad_norm = max_grad_norm
        self.gpus = gpus_of(trained.values())
        self.collate = Collator(label_positions_only=True)
        self.device = next(iter(trained.values())).device
        # The first weights may be on the disk, as accelerate leaves them.
        self.input_device = next(p.device for p in planned.model.parameters() if not p.is_meta)

    def take(self, micro_batches: Sequence[Sequence], number: int) -> float:
        """The ``number``-th step of the run, counted from 1; returns the mean loss of its answer tokens.

        Raises:
            RuntimeError: a gradient at the first step, or a loss, that is missing or not finite.
            torch.OutOfMemoryError: the step does not fit, nor with a plan that keeps less.
        """
        tokens = sum(label_count(sample) for batch in micro_batches for sample in batch)
        mine, total = self.processes.share(micro_batches), None
        while total is None:
            random = get_random_state(self.gpus)
            try:
                total = self._accumulated(mine, tokens)
            except torch.OutOfMemoryError as error:
                reason = str(error).splitlines()[0]
            if total is None:  # not inside `except`, which keeps the tensors of the failed step alive
                self.optimizer.zero_grad(set_to_none=True)
                self.planned.lower(reason)
                set_random_state(random)
        if number == 1 and mine:
            self._check_gradients()
        self.processes.add_up(self.trained, total)
        value = total.item()
        if not torch.isfinite(total):
            raise RuntimeError(
                f"seal_ops.train: the loss must stay finite, got {value} at step {number} with lr "
                f"{self.optimizer.param_groups[0]['lr']:g}; try a lower rate"
            )
        if self.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(list(self.trained.values()), self.max_grad_norm)
        self.optimizer.step()
        return value

    def gradients(self, row: Row, seed: int) -> list[Tensor]:
        """Of all that is trained, on one row, whose layers are recomputed; parameters and random state stay."""
        leaves = list(self.trained.values())
        with torch.random.fork_rng(devices=self.gpus), self.planned.recomputing():
            torch.manual_seed(seed)
            found = torch.autograd.grad(self._loss([row]), leaves, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(leaves, found)]

    def _accumulated(self, micro_batches, tokens) -> Tensor:
        """The step's loss, its gradients in the parameters."""
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for batch in micro_batches:
            loss = self._loss(batch) / tokens
            if not loss.requires_grad:
                raise RuntimeError(
                    "seal_ops.train: the loss must depend on what is trained, got one that does not; inside "
                    "seal_ops.disabled a model computes without its scales, and some quantised layers pass no gradient"
                )
            loss.backward()
            total += loss.detach().to(self.device)
        return total

    def _loss(self, samples) -> Tensor:
        """Sum of the answer tokens' cross entropy."""
        batch = self.processes.tokens(self.collate(samples))
        inputs = {"input_ids": batch["input_ids"].to(self.input_device), "use_cache": False}
        if "position_ids" in batch:
            inputs["position_ids"] = batch["position_ids"].to(self.input_device)
        elif len({len(sample) for sample in samples}) > 1:
            inputs["attention_mask"] = batch["attention_mask"].to(self.input_device)
        keep = batch["logits_to_keep"]  # on the CPU: it indexes on whichever device the last layer is
        logits = self.planned.logits_at(keep, **inputs)
        targets = batch["shift_labels"].to(logits.device)
        return summed_cross_entropy(logits.flatten(0, 1), targets.flatten())

    def _check_gradients(self):
        for name, parameter in self.trained.items():
            if parameter.grad is None or not torch.isfinite(parameter.grad).all():
                got = "no gradient" if parameter.grad is None else "a gradient that is not finite"
                raise RuntimeError(
                    f"seal_ops.train: every trained parameter needs a finite gradient at the first step, got {got} for "
                    f"{name}"
                    + (" (with gradient checkpointing, use_reentrant must be False)" if parameter.grad is None else "")
                )
