"""One training run in several processes, as torchrun and accelerate start them.

The forward passes of an optimiser step are divided among the processes and their gradients are summed, so that the
settings mean what they mean in one process, and the result is that of one process but for the order of the sums.  Under
DeepSpeed's sequence parallelism the processes of a group run the same forward passes, each on its part of the tokens.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..huggingface.model_parallel import tensor, ulysses
from ..huggingface.wrappers import PARALLEL, unwrapped
from ..utils.locks import only_writer


@dataclass(frozen=True)
class Processes:
    """The processes of a run.

    ``rank`` of ``count`` in all; ``turn`` of ``turns`` among those that divide the forward passes, and ``part`` of
    ``parts`` among those that divide the tokens of one.  ``alike``: they do the same and have the same gradients.
    """

    rank: int = 0
    count: int = 1
    turn: int = 0
    turns: int = 1
    part: int = 0
    parts: int = 1
    alike: bool = False

    @classmethod
    def of_run(cls, model: nn.Module, samples: int, batch_size: int, accumulate: int) -> Processes:
        """Those that train ``model``.

        Raises:
            ValueError: processes that do not know of each other, a wrapped or sharded model, or work that cannot be
                divided evenly.
        """
        wrapper = next((base.__name__ for base in type(model).__mro__ if base.__name__ in PARALLEL), None)
        group = tensor.group_of(unwrapped(model, "train")) if wrapper is None else None
        sharded = any(hasattr(p, "full_tensor") and (group is None or p.requires_grad) for p in model.parameters())
        if wrapper is not None or sharded or (group is not None and dist.get_world_size(group) < dist.get_world_size()):
            raise ValueError(
                f"seal_ops.train: model must be whole in every process (train sums the gradients itself) or tensor "
                f"parallel over all of them with whole trained parameters, got "
                f"{'one that is sharded otherwise' if wrapper is None else wrapper}; transformers' Trainer or a loop "
                f"of your own trains it"
            )
        if not (dist.is_available() and dist.is_initialized()):
            launched = os.environ.get("WORLD_SIZE", "1")
            if launched not in ("", "1"):
                raise ValueError(
                    f"seal_ops.train: torch.distributed must be initialised where a launcher has started several "
                    f"processes, got WORLD_SIZE={launched} without a process group; call "
                    f"torch.distributed.init_process_group() first"
                )
            return cls()
        found = cls._of_world(alike=group is not None)
        if found.alike:
            return found
        if accumulate % found.turns:
            raise ValueError(
                f"seal_ops.train: accumulate must be a multiple of {found.turns}, the processes among which the "
                f"forward passes of a step are divided, got {accumulate}"
            )
        if found.parts > 1 and batch_size > 1 and samples % batch_size:
            raise ValueError(
                f"seal_ops.train: samples must be a multiple of batch_size under sequence parallelism, which knows one "
                f"size of batch, got {samples} samples and batch_size {batch_size}"
            )
        return found

    @classmethod
    def of_forward(cls, model: nn.Module) -> Processes:
        """Those that meet in a forward pass of ``model``; this one alone where none do."""
        base = model.get_base_model() if callable(getattr(model, "get_base_model", None)) else model
        alike = tensor.group_of(base) is not None
        return cls._of_world(alike) if alike or ulysses.place() is not None else cls()

    @classmethod
    def _of_world(cls, alike: bool) -> Processes:
        part, parts = ulysses.place() or (0, 1)
        rank, count = dist.get_rank(), dist.get_world_size()
        if alike:  # all of them run the same forward passes, and each gets whole gradients
            return cls(rank, count, alike=True)
        return cls(rank, count, rank // parts, count // parts, part, parts)

    @property
    def main(self) -> bool:
        """Whether this one writes."""
        return self.rank == 0

    def share(self, micro_batches: Sequence) -> list:
        """This process' part of the forward passes of a step; it may be empty."""
        return list(micro_batches[self.turn :: self.turns])

    def tokens(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This process' part of the tokens of a batch of `Collator`, with their positions; whole, all of it."""
        if self.parts == 1:
            return dict(batch)
        ids, keep = batch["input_ids"], batch["logits_to_keep"]
        ids = F.pad(ids, (0, -ids.shape[1] % self.parts))  # on the right, where a causal mask hides it
        length = ids.shape[1] // self.parts
        first = self.part * length
        mine = (keep >= first) & (keep < first + length)
        positions = torch.arange(first, first + length, device=ids.device).expand(ids.shape[0], -1)
        return {
            "input_ids": ids[:, first : first + length],
            "position_ids": positions,
            "logits_to_keep": keep[mine] - first,
            "shift_labels": batch["shift_labels"][:, mine],
        }

    def begin(self, trained: Mapping[str, nn.Parameter], settings: Mapping, samples: Sequence) -> None:
        """Gives every process the first one's values.

        Raises:
            ValueError: another process was given other samples, settings or trained parameters than the first one.
        """
        if self.count == 1:
            return
        facts = [sorted(settings.items(), key=str), [[name, list(p.shape)] for name, p in trained.items()]]
        digest = hashlib.sha256(json.dumps(facts, default=str).encode())
        for sample in samples:
            digest.update(json.dumps([list(sample.input_ids), list(sample.labels)]).encode())
        found = [None] * self.count
        dist.all_gather_object(found, digest.hexdigest())
        others = [rank for rank, value in enumerate(found) if value != found[0]]
        if others:
            raise ValueError(
                f"seal_ops.train: every process must be given the same model, samples and settings, got others in "
                f"process {others[0]} than in process 0"
            )
        with torch.no_grad():
            for parameter in trained.values():
                dist.broadcast(parameter, 0)

    def agree(self, value):
        """What the first process says."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, 0)
        return box[0]

    @property
    def meet_in_forward(self) -> bool:
        """Whether a forward pass waits for other processes, so that none may run one alone."""
        return self.alike or self.parts > 1

    def least(self, value: int) -> int:
        """The smallest value that any process has."""
        if self.count == 1:
            return value
        return min(self.all(value))

    def all(self, value) -> list:
        """What every process has, in their order."""
        if self.count == 1:
            return [value]
        found = [None] * self.count
        dist.all_gather_object(found, value)
        return found

    def met(self, value) -> list:
        """What every process has where they meet in a forward pass; else what this one has."""
        return self.all(value) if self.meet_in_forward else [value]

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            dist.barrier()

    @contextlib.contextmanager
    def alone_in(self, folder: str | os.PathLike | None, call: str) -> Iterator[None]:
        """Inside the block no other run writes to ``folder``; None for no folder.

        Raises:
            RuntimeError: another run writes there; raised in all processes.
        """
        with contextlib.ExitStack() as held:
            refused = None
            try:
                held.enter_context(only_writer(folder if self.main else None, call))
            except RuntimeError as error:
                refused = str(error)
            if (refused := self.agree(refused)) is not None:
                raise RuntimeError(refused)
            yield

    def add_up(self, trained: Mapping[str, nn.Parameter], total: Tensor) -> None:
        """Sums the gradients and ``total`` over the processes, in place; one without a forward pass adds nothing."""
        if self.count == 1 or self.alike:
            return
        for parameter in trained.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
        dist.all_reduce(total)
