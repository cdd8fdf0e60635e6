"""The checking of `train`'s arguments, and the settings of a run as `training.json` holds them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

from torch import nn

from ..utils.arguments import integer, number, path, shown
from .frozen_linears.conversion import FORMATS
from .long_context import CALL, LongContextRecipe, recipe_of
from .memory_plan.memory import host_memory
from .memory_plan.planning import SETTINGS
from .recipe import COLUMNS_CLIP

_MOST_SEED = 1 << 40  # so that the seeds of all epochs fit into 64 bits


@dataclass(kw_only=True)
class Settings:
    """Those arguments of `train` that are right or wrong whatever the model and the samples are.

    Making one checks them all, before anything is written or put on the model.  Each then has the type that `train`
    documents.

    Attributes:
        long_context: the recipe that ``recipe`` and ``recipe_options`` name; None for none.

    Raises:
        ValueError: a setting that is wrong by itself or beside another one; one sentence.
    """

    recipe: str | None
    recipe_options: dict | None
    lr: float | None
    column_lr: float | None
    epochs: int
    batch_size: int
    accumulate: int
    weight_decay: float
    betas: tuple[float, float]
    max_grad_norm: float | None
    seed: int
    gradient_checkpointing: bool | str
    memory: int | None
    frozen_linears: str | None
    output_dir: str | os.PathLike | None
    checkpoint_every: int
    resume: bool
    on_step: Callable[[int, float], None] | None
    long_context: LongContextRecipe | None = field(init=False, default=None)

    def __post_init__(self):
        self.checkpoint_every = integer(CALL, "checkpoint_every", self.checkpoint_every, 1)
        if self.on_step is not None and not callable(self.on_step):
            raise ValueError(f"{CALL}: on_step must be a function, got {shown(self.on_step)}")
        self._check_memory()
        if self.frozen_linears not in (None, *FORMATS):
            raise ValueError(f"{CALL}: frozen_linears must be None or 'fp8', got {shown(self.frozen_linears)}")
        self._check_output()
        self._check_recipe()
        self._check_optimiser()

    def _check_memory(self):
        if self.gradient_checkpointing not in ("auto", *SETTINGS):
            raise ValueError(
                f"{CALL}: gradient_checkpointing must be 'auto', False, True or 'selective', got "
                f"{self.gradient_checkpointing!r}"
            )
        host_memory()  # what the user says of it is checked first
        if self.memory is not None:
            self.memory = integer(CALL, "memory", self.memory, 1)
            if self.gradient_checkpointing != "auto":
                raise ValueError(
                    f"{CALL}: memory needs gradient_checkpointing='auto', got {self.gradient_checkpointing!r}"
                )

    def _check_output(self):
        if self.output_dir is not None:
            self.output_dir = path(CALL, "output_dir", self.output_dir)
        elif self.resume:
            raise ValueError(f"{CALL}: resume needs output_dir, got None")

    def _check_recipe(self):
        if self.recipe is not None:
            self.long_context = recipe_of(self.recipe, self.recipe_options or {})
        elif self.recipe_options is not None:
            raise ValueError(f"{CALL}: recipe must be given with recipe_options, got None and {self.recipe_options}")

    def _check_optimiser(self):
        self.epochs = integer(CALL, "epochs", self.epochs, 1)
        self.batch_size = integer(CALL, "batch_size", self.batch_size, 1)
        self.accumulate = integer(CALL, "accumulate", self.accumulate, 1)
        self.weight_decay = number(CALL, "weight_decay", self.weight_decay, 0)
        self.betas = _betas(self.betas)
        self.seed = integer(CALL, "seed", self.seed, -_MOST_SEED, _MOST_SEED)
        if self.max_grad_norm is not None:
            self.max_grad_norm = number(CALL, "max_grad_norm", self.max_grad_norm, above=0, infinite=True)
        for name in ("lr", "column_lr"):
            if getattr(self, name) is not None:
                setattr(self, name, number(CALL, name, getattr(self, name), 0))

    def completed(self, model: nn.Module, samples: Sequence, lr: float | None, column_lr: float | None) -> dict:
        """The settings as `training.json` holds them; with all that decides the outcome, as a checkpoint needs it.

        ``lr`` and ``column_lr``: of scales and other adapters, and of weak columns; None where there are none.
        """
        scales, columns = getattr(model, "seal_scales", None), getattr(model, "seal_weak_columns", None)
        clip = COLUMNS_CLIP if self.max_grad_norm is None and column_lr is not None else self.max_grad_norm
        found = {
            "granularity": None if scales is None else scales.config.granularity,
            "samples": len(samples),
            "tasks": sorted({sample.meta["task"] for sample in samples if "task" in getattr(sample, "meta", ())}),
            "tokens": max(map(len, samples)),
            "lr": float(column_lr if lr is None else lr),
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "accumulate": self.accumulate,
            "weight_decay": self.weight_decay,
            "betas": list(self.betas),
            "max_grad_norm": clip,
            "seed": self.seed,
        }
        if columns is not None:
            found |= {"columns": columns.columns, "column_lr": column_lr}
        if self.long_context is not None:
            found["recipe"] = asdict(self.long_context)
        if self.frozen_linears is not None:
            found["frozen_linears"] = self.frozen_linears
        return found


def _betas(betas) -> tuple[float, float]:
    try:
        first, second = (number(CALL, "betas", beta, 0) for beta in betas)
    except (TypeError, ValueError):
        first = second = 1.0
    if not (first < 1 and second < 1):
        raise ValueError(f"{CALL}: betas must be two numbers from 0 to below 1, got {shown(betas)}")
    return first, second
