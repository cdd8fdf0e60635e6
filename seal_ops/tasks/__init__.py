"""Generated tasks: prompts that fill a token length, with answers, label masks and scores.

``tasks.lines(tokenizer, length=31_000, samples=50)`` returns training samples; ``tasks.lines`` itself (or its name,
"lines") is what ``seal_ops.evaluate`` takes.  :class:`Task` says how a new task is written.
"""

import importlib

from .base import IGNORE_INDEX, Encoder, Sample, Task
from .lines import LineRetrieval

__all__ = ["IGNORE_INDEX", "Encoder", "LineRetrieval", "Sample", "Task", "get", "lines", "names", "read", "write"]

lines = LineRetrieval()

_TASKS = {task.name: task for task in (lines,)}


def names() -> list[str]:
    """Names of the tasks that :func:`get` knows."""
    return list(_TASKS)


def get(task) -> Task:
    """The task of a name, of ``"module:Class"`` (a task of one's own), or the task itself.

    Raises:
        ValueError: no task of that name; the message lists the names.
    """
    if isinstance(task, Task):
        return task
    if task in _TASKS:
        return _TASKS[task]
    if isinstance(task, str) and ":" in task:
        module, _, attribute = task.partition(":")
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"tasks.get: task {task!r} must name an importable module:Class, got {error}") from None
        found = found() if isinstance(found, type) else found
        if isinstance(found, Task):
            return found
    raise ValueError(f"tasks.get: task must be one of {', '.join(_TASKS)}, a Task or 'module:Class', got {task!r}")


def write(path, samples) -> None:
    """Writes samples as JSON lines; the file is replaced in one step."""
    from ..files import atomic_write

    atomic_write(path, "".join(sample.to_json() + "\n" for sample in samples))


def read(path) -> list[Sample]:
    """Reads what :func:`write` wrote.

    Raises:
        ValueError: a line is not a sample (named by its number), or there is none.
    """
    samples = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                samples.append(Sample.from_json(line))
            except ValueError as error:
                raise ValueError(f"tasks.read: {path}, line {number}: {error}") from None
    if not samples:
        raise ValueError(f"tasks.read: {path} must hold at least one sample, got an empty file")
    return samples
