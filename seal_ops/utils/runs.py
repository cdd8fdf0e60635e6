"""Results that belong to one run: what its settings say decides whether another run may continue them."""

import json
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
            f"{call}: output {output} must come from the same model and settings to resume, got another {', '.join(names)}"
        )
    return found
