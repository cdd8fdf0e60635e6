"""The identity of generated samples: what decides them apart from length, seed and split."""

import hashlib
import json
import re

from .base import Task


def describe(task, tokenizer, chat_template=None, chat_template_kwargs: dict | None = None) -> dict:
    """What tells runs on one task apart, for settings that are compared before a run is continued.

    ``task`` and ``task_options`` (:func:`describe_options`), and what :func:`describe_prompts` gives.
    """
    prompts = describe_prompts(tokenizer, chat_template, chat_template_kwargs)
    return {"task": task.name, "task_options": describe_options(task), **prompts}


def describe_options(task) -> dict:
    """A task's class, options and limits as JSON values."""
    limits = {name: getattr(task, name) for name in ("item", "reserve", "stop", "max_new_tokens")}
    options = {**limits, **vars(task), "class": f"{type(task).__module__}.{type(task).__qualname__}"}
    return {name: _stable(value) for name, value in sorted(options.items())}


def prompt_options(chat_template=None, chat_template_kwargs: dict | None = None) -> dict:
    """What :meth:`Task.generate` is passed: a task of one's own need not know of what is not used."""
    options = {"chat_template": chat_template, "chat_template_kwargs": chat_template_kwargs}
    return {name: value for name, value in options.items() if name == "chat_template" or value}


def describe_prompts(tokenizer, chat_template=None, chat_template_kwargs: dict | None = None) -> dict:
    """``tokenizer``, a hash of everything in it, and ``chat_template`` and ``chat_template_kwargs`` as given."""
    return {
        "tokenizer": identify_tokenizer(tokenizer),
        "chat_template": chat_template,
        "chat_template_kwargs": chat_template_kwargs or {},
    }


def identify_tokenizer(tokenizer) -> str:
    """Hash of a tokenizer: its vocabulary and rules, special tokens and chat template; not of where it came from."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is not None:
        rules = json.loads(core.to_str())
        rules.update(padding=None, truncation=None)  # the state of its last call
    else:
        rules = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else type(tokenizer).__name__
    special = {name: str(token) for name, token in sorted(getattr(tokenizer, "special_tokens_map", {}).items())}
    content = [rules, special, getattr(tokenizer, "chat_template", None)]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _stable(value):
    """A JSON value that is the same in every process."""
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if isinstance(value, Task):  # one that another is made from
        return describe_options(value)
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
