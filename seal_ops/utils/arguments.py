"""Arguments of public functions that must be numbers or paths: one sentence where they are not.

A comparison alone does not tell: ``"3" < 1`` is Python's TypeError, and ``nan < 1`` is False.
"""

import math
import operator
import os


def integer(call: str, name: str, value, least: int | None = None, most: int | None = None) -> int:
    """``value`` as an integer; ``ValueError`` in the name of ``call`` where it is none, or not from ``least`` to
    ``most``."""
    try:
        found = operator.index(value)
    except TypeError:
        raise ValueError(f"{call}: {name} must be an integer, got {shown(value)}") from None
    if least is not None and found < least:
        raise ValueError(f"{call}: {name} must be at least {least}, got {found}")
    if most is not None and found > most:
        raise ValueError(f"{call}: {name} must be at most {most}, got {found}")
    return found


def number(
    call: str, name: str, value, least: float | None = None, above: float | None = None, infinite: bool = False
) -> float:
    """``value`` as a float; ``ValueError`` for what is no number, not a number, or too small.

    Args:
        call: whose argument it is.
        name: of the argument.
        value: what was given.
        least: the smallest number that is allowed.
        above: a number below all that are allowed.
        infinite: whether infinity is a number.
    """
    try:
        found = math.nan if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # RuntimeError: a tensor of several values
        found = math.nan
    if math.isnan(found) or not (infinite or math.isfinite(found)):
        kind = "number" if infinite else "finite number"
        raise ValueError(f"{call}: {name} must be a {kind}, got {shown(value)}")
    if least is not None and found < least:
        raise ValueError(f"{call}: {name} must be at least {least:g}, got {found:g}")
    if above is not None and found <= above:
        raise ValueError(f"{call}: {name} must be above {above:g}, got {found:g}")
    return found


def shown(value) -> str:
    """A value for a sentence: short, in one line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def path(call: str, name: str, value) -> str:
    """``value`` as the path of a file or folder; ``ValueError`` where it is none, or empty.

    An empty one would mean the working directory, which nobody has asked for.
    """
    found = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if not isinstance(found, str) or not found:
        raise ValueError(f"{call}: {name} must be a path, got {shown(value)}")
    return found
