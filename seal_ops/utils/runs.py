"""Results that belong to one run: what its settings say decides whether another run may continue them."""

import dataclasses
import json
import time
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def differing(found: dict, wanted: dict) -> list[str]:
    """The settings in which a stored run differs from the one that is wanted."""
    wanted = json.loads(json.dumps(wanted))
    return [key for key in {**wanted, **found} if found.get(key) != wanted.get(key)]


def resume(load: Callable[[object], Result], output, settings: dict, call: str) -> Result:
    """What ``load(output)`` gives; ``ValueError`` where its ``settings`` are others."""
    found = load(output)
    if names := differing(found.settings, settings):
        raise ValueError(
            f"{call}: output {output} must come from the same model and settings to resume, got another {', '.join(names)}"  # noqa: E501
        )
    return found


def load_result(kind: type[Result], path, what: str) -> Result:
    """A dataclass from the JSON that its ``save`` wrote, which may hold more; ``ValueError`` where it is no
    ``what``.

    What the file says of its own run is checked as far as it is used here: settings, and records with length and
    index."""
    fields = dataclasses.fields(kind)
    with open(path, encoding="utf-8") as file:
        try:
            content = json.load(file)
            _check_shape(content)
            return kind(**{f.name: content[f.name] for f in fields if f.name in content or f.name != "provenance"})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"seal_ops.{kind.__name__}.load: {path} must be a saved {what}, got {error!r}") from None


def _check_shape(content: dict) -> None:
    for name in ("settings", "provenance"):
        if not isinstance(content.get(name, {}), dict):
            raise TypeError(f"{name} that are no object")
    records = content.get("records", [])
    if not isinstance(records, list):
        raise TypeError("records that are no list")
    for number, record in enumerate(records):
        if not isinstance(record, dict) or not all(type(record.get(key)) is int for key in ("length", "index")):
            raise TypeError(f"records[{number}] without length and index")
        if not isinstance(record.get("score", 0.0), (int, float)):
            raise TypeError(f"records[{number}] with a score that is no number")


class Growing:
    """A result whose ``records`` (dicts with ``length`` and ``index``) are saved while they are found.

    Args:
        result: has ``records`` and ``save(path)``.
        output: the file; None for none.
        every: seconds between writes.
    """

    def __init__(self, result, output, every: float):
        self.result, self.output, self.every = result, output, every
        self.saved = time.monotonic()

    def missing(self, length: int, cases: int) -> list[int]:
        """Which of the first ``cases`` cases of a length are not there."""
        done = {record["index"] for record in self.result.records if record["length"] == length}
        return [index for index in range(cases) if index not in done]

    def add(self, records) -> None:
        self.result.records.extend(records)
        if self.output is not None and time.monotonic() - self.saved > self.every:
            self.result.save(self.output)
            self.saved = time.monotonic()

    def finish(self):
        """Brings the records into order, saves, and returns the result."""
        self.result.records.sort(key=lambda record: (record["length"], record["index"]))
        if self.output is not None:
            self.result.save(self.output)
        return self.result
