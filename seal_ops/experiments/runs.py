"""What all runs over many steps share: a folder that belongs to one run, and its files."""

import contextlib
import json
import os

from ..utils.files import atomic_write, check_folder
from ..utils.locks import only_writer
from ..utils.runs import differing

SETTINGS = "settings.json"


@contextlib.contextmanager
def reserved(output, settings: dict, call: str, hint: str = ""):
    """Inside the block the folder ``output`` is this run's alone.

    Raises:
        ValueError: it holds a run with other settings.
        RuntimeError: another process works in it.
        OSError: it cannot be written.
    """
    check_folder(output, call, "output")
    with only_writer(output, call):
        _claim(output, settings, call, hint)
        yield


def _claim(output, settings, call, hint):
    path = os.path.join(output, SETTINGS)
    if not os.path.exists(path):
        atomic_write(path, json.dumps(settings, indent=1) + "\n")
        return
    found = read_json_file(path)
    if not isinstance(found, dict):
        raise ValueError(f"{call}: {path} must hold the settings of a run, got a {type(found).__name__}")
    if names := differing(found, settings):
        raise ValueError(
            f"{call}: output {os.fspath(output)} must be new or hold this run, got one with another {', '.join(names)}{hint}"  # noqa: E501
        )


def require_shipped(model: str, default: str, call: str) -> None:
    """``FileNotFoundError``, one sentence, where the model is the repository's own and the repository is not there."""
    if model == default and not os.path.isdir(model):
        raise FileNotFoundError(
            f"{call}: model {model} is part of the repository, not of the package; run in a checkout, or give another --model"  # noqa: E501
        )


def read_json_file(path):
    """The content of a JSON file; ``ValueError``, one sentence that names it, where it is damaged."""
    with open(path, encoding="utf-8") as file:
        try:
            return json.load(file)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)} must be a JSON file, got {error}") from None
