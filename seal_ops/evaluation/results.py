"""What an evaluation found: records, accuracy with intervals, files."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from ..utils.files import atomic_write, write_csv
from ..utils.runs import load_result
from .statistics import wilson


@dataclass(frozen=True)
class Cell:
    """Accuracy of one group of cases with its 95 % Wilson interval."""

    accuracy: float
    low: float
    high: float
    correct: float
    cases: int

    @classmethod
    def of(cls, scores) -> "Cell":
        """The cell of some scores in [0, 1]."""
        low, high = wilson(sum(scores), len(scores))
        return cls(sum(scores) / len(scores), low, high, sum(scores), len(scores))

    def __str__(self):
        return f"{self.accuracy:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass
class Evaluation:
    """What an evaluation found.

    Attributes:
        task: name of the task.
        name: what was evaluated ("base", "SEAL-H"), for tables and plots.
        settings: what decides the outcome: task, tokenizer, chat format, lengths, cases, seed, fingerprint of the
            model.
        records: one dict a case: ``length``, ``index``, ``prompt_tokens``, ``answer``, ``output``, ``score`` and the
            sample's ``meta``.
        seconds: time spent on generating and decoding, summed over resumed runs.
        provenance: model and versions that wrote it, for people (:mod:`seal_ops.huggingface.origin`).
    """

    task: str
    name: str
    settings: dict
    records: list[dict] = field(default_factory=list)
    seconds: float = 0.0
    provenance: dict = field(default_factory=dict)

    def by(self, *keys: str | Callable[[dict], object]) -> dict:
        """Accuracy by the values of record fields (or of functions of a record): ``{value or tuple: Cell}``, sorted."""
        groups: dict = {}
        for record in self.records:
            value = tuple(key(record) if callable(key) else record.get(key) for key in keys)
            groups.setdefault(value[0] if len(keys) == 1 else value, []).append(record["score"])
        return {value: Cell.of(groups[value]) for value in sorted(groups)}

    @property
    def accuracy(self) -> dict[int, Cell]:
        """Accuracy by length."""
        return self.by("length")

    @property
    def overall(self) -> Cell:
        """Accuracy of all cases together."""
        return Cell.of([record["score"] for record in self.records])

    def line(self) -> str:
        """Name and accuracy by length in one line."""
        return f"{self.name}: " + ", ".join(f"{length}: {cell.accuracy:.2f}" for length, cell in self.accuracy.items())

    def cells(self) -> list[dict]:
        """Accuracy by length as JSON values."""
        return [{"length": length, **asdict(cell)} for length, cell in self.accuracy.items()]

    def table(self) -> str:
        """Accuracy by length as text."""
        rows = [f"{'tokens':>8}  {'accuracy':>8}  {'95 % interval':>14}  {'cases':>5}"]
        for length, cell in self.accuracy.items():
            interval = f"{cell.low:.2f} to {cell.high:.2f}"
            rows.append(f"{length:>8}  {cell.accuracy:>8.3f}  {interval:>14}  {cell.cases:>5}")
        return "\n".join(rows)

    def save(self, path) -> None:
        """Writes everything as JSON; the file is replaced in one step."""
        atomic_write(path, json.dumps({**vars(self), "accuracy": self.cells()}, indent=1, ensure_ascii=False) + "\n")

    def __str__(self):
        return f"{self.task}, {self.name}\n{self.table()}" if self.name else f"{self.task}\n{self.table()}"

    @classmethod
    def load(cls, path) -> "Evaluation":
        """Reads what :meth:`save` wrote.

        Raises:
            ValueError: the file is something else, or damaged.
        """
        found = load_result(cls, path, "evaluation")
        without = next((n for n, record in enumerate(found.records) if "score" not in record), None)
        if without is not None or not isinstance(found.seconds, (int, float)):
            got = "seconds that are no number" if without is None else f"records[{without}] without a score"
            raise ValueError(f"seal_ops.Evaluation.load: {path} must be a saved evaluation, got {got}")
        return found

    def save_csv(self, path) -> None:
        """Writes one row a case as CSV; the file is replaced in one step."""
        columns = list(dict.fromkeys(key for record in self.records for key in record))
        rows = [{"task": self.task, "name": self.name, **record} for record in self.records]
        write_csv(path, ["task", "name", *columns], rows)
