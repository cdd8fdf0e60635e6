"""Training on one task against another: train on each of some tasks, measure on each of some tasks."""
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

from .. import tasks
from ..evaluation.results import Evaluation
from ..evaluation.runner import evaluate
from ..evaluation.statistics import paired
from ..training.loop import RESULT, train
from ..utils.files import atomic_write
from .comparison import BASE, METHODS, RATES, adapted
from .runs import read_json_file, reserve

# -------------------------------------------------------------------------------------------------------- transfer


@dataclass
class Transfer:
    """What :func:`transfer` found: ``evaluations[trained][measured]``; the first row is the untrained base."""

    settings: dict
    evaluations: dict[str, dict[str, Evaluation]] = field(default_factory=dict)
    training: dict[str, dict] = field(default_factory=dict)

    def matrix(self) -> tuple[list[str], list[str], list[list[float]]]:
        """``(rows, columns, accuracy)``; trained tasks in rows, measured tasks in columns."""
        rows, columns = list(self.evaluations), self.settings["measured"]
        return rows, columns, [[_cell(self.evaluations[row][column]).accuracy for column in columns] for row in rows]

    def save(self, path) -> None:
        """Writes every cell with its interval as JSON, with the paired test against the base."""
        cells = []
        for trained, measured in self.evaluations.items():
            for name, evaluation in measured.items():
                base = [record["score"] for record in self.evaluations[BASE][name].records]
                test = asdict(paired(base, [record["score"] for record in evaluation.records]))
                cells.append({"trained": trained, "measured": name, **asdict(_cell(evaluation)), "against_base": test})
        training = {name: {k: v for k, v in t.items() if k != "losses"} for name, t in self.training.items()}
        content = {"kind": "seal_ops.transfer", "settings": self.settings, "cells": cells, "training": training}
        atomic_write(path, json.dumps(content, indent=1) + "\n")

    def save_csv(self, path) -> None:
        """Writes the matrix as CSV."""
        rows, columns, values = self.matrix()
        lines = [",".join(["trained", *columns])]
        lines += [",".join([row, *(f"{v:.4f}" for v in line)]) for row, line in zip(rows, values, strict=True)]
        atomic_write(path, "\n".join(lines) + "\n")


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
    backend: str | None = None,
    progress: bool | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> Transfer:
    """Trains ``method`` on each task of ``trained`` and measures on each of ``measured``, all at ``length`` tokens.

    Arguments are those of :func:`compare`.
    """
    trained, measured = [tasks.get(task) for task in trained], [tasks.get(task) for task in measured]
    if method not in METHODS:
        raise ValueError(f"seal_ops.transfer: method must be one of {', '.join(METHODS)}, got {method!r}")
    lr = RATES[method] if lr is None else lr
    settings = {
        "trained": [task.name for task in trained], "measured": [task.name for task in measured], "length": length,
        "cases": cases, "method": method, "lr": lr, "samples": samples, "seed": seed, "chat_template": chat_template,
    }  # fmt: skip
    reserve(output, settings, "seal_ops.transfer")
    result = Transfer(settings)
    for source in [None, *trained]:
        if source is None:
            name, (model, tokenizer) = BASE, load_model_fn()
        else:
            name, folder = source.name, os.path.join(output, "adapters", source.name)
            model, tokenizer, done = adapted(load_model_fn, method, folder, backend=backend)
            if done is None:
                drawn = source.generate(tokenizer, length, samples, seed, chat_template=chat_template)
                train(model, drawn, lr=lr, seed=seed, output_dir=folder, resume=True, progress=progress)
            result.training[name] = read_json_file(os.path.join(folder, RESULT))
        result.evaluations[name] = {
            target.name: evaluate(
                model, tokenizer, target, length, cases, seed=seed, chat_template=chat_template,
                name=f"{name}, measured on {target.name}", output=os.path.join(output, f"{name}-on-{target.name}.json"),
                resume=True, progress=progress,
            )
            for target in measured
        }  # fmt: skip
        cells = ", ".join(f"{n}: {_cell(e).accuracy:.2f}" for n, e in result.evaluations[name].items())
        log(f"{'untrained' if source is None else 'trained on ' + name}: {cells}")
    return result


def _cell(evaluation):
    (cell,) = evaluation.accuracy.values()
    return cell
