"""Generated tasks: prompts that fill a token length, with answers, label masks and scores.

``tasks.lines(tokenizer, length=31_000, samples=50)`` returns training samples; ``tasks.lines`` itself (or its name,
"lines") is what ``seal_ops.evaluate`` takes.  :class:`Task` says how a new task is written, docs/tasks.md what each of
these does.
"""

import importlib
import inspect
import io

from ..utils.files import atomic_write, read_text
from .base import Task
from .document_qa import DocumentQA
from .encoding import Encoder
from .key_threads import KeyThreads
from .line_retrieval import LineRetrieval
from .magic_numbers import MagicNumbers
from .needle_in_haystack import Needle
from .passkey_retrieval import Passkey
from .sample import IGNORE_INDEX, Sample
from .variable_tracking import Variables
from .word_extraction import CommonWords

__all__ = [
    "IGNORE_INDEX", "CommonWords", "DocumentQA", "Encoder", "KeyThreads", "LineRetrieval", "MagicNumbers", "Needle",
    "Passkey", "Sample", "Task", "Variables", "common_words", "documents", "get", "lines", "magic", "make", "multikey",
    "multivalue", "names", "needle", "passkey", "read", "threads", "variables", "write",
]  # fmt: skip

# What makes the task of a name; options of `make` are these callables' arguments.
_MAKERS = {
    "lines": (LineRetrieval, {}),
    "needle": (Needle, {}),
    "passkey": (Passkey, {}),
    "magic": (MagicNumbers, {}),
    "multikey": (MagicNumbers, {"name": "multikey", "keys": 8}),
    "multivalue": (MagicNumbers, {"name": "multivalue", "values": 4}),
    "words": (CommonWords, {}),
    "variables": (Variables, {}),
    "threads": (KeyThreads, {}),
}
_TASKS = {name: maker(**options) for name, (maker, options) in _MAKERS.items()}

lines, needle, passkey, magic, multikey, multivalue, common_words, variables, threads = _TASKS.values()
documents = DocumentQA  # made from a file, so there is no ready one


def names() -> list[str]:
    """Names of the tasks that :func:`get` knows."""
    return list(_TASKS)


def make(name: str, **options) -> Task:
    """A task with options of its own: ``make("multikey", keys=32)``, ``make("documents", path="qa.jsonl")``.

    Raises:
        ValueError: no task of that name, an option that it does not have, or a bad value.
    """
    if name == "documents":
        maker, given = DocumentQA, {}
    elif isinstance(name, str) and name in _MAKERS:
        maker, given = _MAKERS[name]
    else:
        raise ValueError(f"seal_ops.tasks.make: name must be one of {', '.join([*_MAKERS, 'documents'])}, got {name!r}")
    known = [] if maker.__init__ is object.__init__ else list(inspect.signature(maker).parameters)
    known = [option for option in known if option != "name"]
    for option in options:
        if option not in known:
            listed = ", ".join(known) or "none"
            raise ValueError(f"seal_ops.tasks.make: options of {name} must be among {listed}, got {option!r}")
    if name == "documents" and "path" not in options:
        raise ValueError("seal_ops.tasks.make: documents needs the option path (a jsonl file), got none")
    return maker(**{**given, **options})


def get(task) -> Task:
    """The task that a name stands for, or the task itself.

    Args:
        task: a name, ``"documents:FILE.jsonl"``, ``"module:Class"`` (a task of one's own), or a :class:`Task`.

    Raises:
        ValueError: no task of that name; the message lists the names.
    """
    if isinstance(task, Task):
        return task
    if isinstance(task, str) and task in _TASKS:
        return _TASKS[task]
    if isinstance(task, str) and task.startswith("documents:"):
        return DocumentQA(task.partition(":")[2])
    if isinstance(task, str) and ":" in task:
        module, _, attribute = task.partition(":")
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(
                f"seal_ops.tasks.get: task {task!r} must name an importable module:Class, got {error}"
            ) from None
        found = found() if isinstance(found, type) else found
        if isinstance(found, Task):
            return found
    raise ValueError(
        f"seal_ops.tasks.get: task must be one of {', '.join(_TASKS)}, 'documents:FILE', a Task or 'module:Class', got {task!r}"  # noqa: E501
    )


def write(path, samples) -> None:
    """Writes samples as JSON lines; the file is replaced in one step."""
    atomic_write(path, "".join(sample.to_json() + "\n" for sample in samples))


def read(path) -> list[Sample]:
    """Reads what :func:`write` wrote.

    Raises:
        ValueError: a line is not a sample (named by its number), or there is none.
    """
    samples = []
    for number, line in enumerate(io.StringIO(read_text(path)), 1):
        try:
            samples.append(Sample.from_json(line))
        except ValueError as error:
            raise ValueError(f"seal_ops.tasks.read: {path}, line {number}: {error}") from None
    if not samples:
        raise ValueError(f"seal_ops.tasks.read: {path} must hold at least one sample, got an empty file")
    return samples
