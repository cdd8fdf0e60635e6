"""Training on one task against another: train on each of some tasks, measure on each of some tasks."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

from .. import tasks
from ..evaluation.results import Evaluation
from ..evaluation.runner import evaluate
from ..evaluation.statistics import paired
from ..huggingface.origin import provenance
from ..tasks.description import describe_options, describe_prompts, prompt_options
from ..training.recipe import LEARNING_RATES
from ..utils.files import atomic_write, write_csv
from .comparison import BASE, METHODS
from .comparison import trained as trained_model
from .runs import reserved


@dataclass
class Transfer:
    """What :func:`transfer` found: ``evaluations[trained][measured]``; the first row is the untrained base."""

    settings: dict
    evaluations: dict[str, dict[str, Evaluation]] = field(default_factory=dict)
    training: dict[str, dict] = field(default_factory=dict)
    provenance: dict = field(default_factory=dict)

    def matrix(self) -> tuple[list[str], list[str], list[list[float]]]:
        """``(rows, columns, accuracy)``; trained tasks in rows, measured tasks in columns."""
        rows, columns = list(self.evaluations), self.settings["measured"]
        return rows, columns, [[self.evaluations[row][column].overall.accuracy for column in columns] for row in rows]

    def save(self, path) -> None:
        """Writes every cell with its interval as JSON, with the paired test against the base."""
        cells = []
        for trained, measured in self.evaluations.items():
            for name, evaluation in measured.items():
                base = [record["score"] for record in self.evaluations[BASE][name].records]
                test = asdict(paired(base, [record["score"] for record in evaluation.records]))
                cells.append({"trained": trained, "measured": name, **asdict(evaluation.overall), "against_base": test})
        training = {name: {k: v for k, v in t.items() if k != "losses"} for name, t in self.training.items()}
        content = {
            "kind": "seal_ops.transfer",
            "settings": self.settings,
            "cells": cells,
            "training": training,
            "provenance": self.provenance,
        }
        atomic_write(path, json.dumps(content, indent=1) + "\n")

    def save_csv(self, path) -> None:
        """Writes the matrix as CSV."""
        rows, columns, values = self.matrix()
        lines = [[row, *(f"{v:.4f}" for v in line)] for row, line in zip(rows, values, strict=True)]
        write_csv(path, ["trained", *columns], lines)


def transfer(
    load_model_fn: Callable[[], tuple],
    trained: Sequence,
    measured: Sequence,
    length: int,
    cases: int = 50,
    *,
    output: str | os.PathLike,
    method: str = "SEAL-C",
    lr: float | None = None,
    samples: int = 50,
    seed: int = 0,
    chat_template=None,
    chat_template_kwargs: dict | None = None,
    backend: str | None = None,
    progress: bool | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> Transfer:
    """Trains ``method`` on each task of ``trained`` and measures on each of ``measured``, all at ``length`` tokens.

    Arguments are those of :func:`compare`.

    Raises:
        ValueError: an unknown method, tasks of the same name, or an output folder of other settings.
    """
    trained, measured = [tasks.get(task) for task in trained], [tasks.get(task) for task in measured]
    if method not in METHODS:
        raise ValueError(f"seal_ops.transfer: method must be one of {', '.join(METHODS)}, got {method!r}")
    lr = LEARNING_RATES[method] if lr is None else lr
    known = {task.name: describe_options(task) for task in [*trained, *measured]}
    for kind, chosen in {"trained": trained, "measured": measured}.items():
        names = [task.name for task in chosen]
        if len(set(names)) < len(names) or any(known[task.name] != describe_options(task) for task in chosen):
            raise ValueError(f"seal_ops.transfer: {kind} must hold tasks of different names, got {names}")
    model, tokenizer = load_model_fn()
    prompts = prompt_options(chat_template, chat_template_kwargs)
    origin = provenance(model)
    settings = {
        "trained": [task.name for task in trained], "measured": [task.name for task in measured], "task_options": known,
        **describe_prompts(tokenizer, **prompts), "length": length, "cases": cases, "method": method, "lr": lr,
        "samples": samples, "seed": seed, "model": origin["model"]["fingerprint"],
    }  # fmt: skip
    with reserved(output, settings, "seal_ops.transfer"):
        result = Transfer(settings, provenance=origin)
        for source in [None, *trained]:
            name = BASE if source is None else source.name
            if source is not None:
                model, tokenizer, result.training[name] = trained_model(
                    load_model_fn, method, os.path.join(output, "adapters", name),
                    lambda source=source, tokenizer=tokenizer: source.generate(
                        tokenizer, length, samples, seed, progress=progress, **prompts
                    ),
                    lr=lr, seed=seed, progress=progress, backend=backend,
                )  # fmt: skip
            result.evaluations[name] = {
                target.name: evaluate(
                    model, tokenizer, target, length, cases, seed=seed, name=f"{name}, measured on {target.name}",
                    output=os.path.join(output, f"{name}-on-{target.name}.json"), resume=True,
                    progress=progress, **prompts,
                )
                for target in measured
            }  # fmt: skip
            cells = ", ".join(f"{n}: {e.overall.accuracy:.2f}" for n, e in result.evaluations[name].items())
            log(f"{'untrained' if source is None else 'trained on ' + name}: {cells}")
        return result
