"""Progress bars on stderr, in one look for every long step."""

import sys
from contextlib import contextmanager
from contextvars import ContextVar

_inside = ContextVar("inside a bar", default=False)


@contextmanager
def bar(total, label, enabled=True):
    """Yields ``update(steps=1, note="")``; draws nothing where ``enabled`` is false.

    ``enabled=None`` draws where stderr is a terminal.  A step inside another step draws nothing: the outer one's bar
    tells of both, or was switched off for both.
    """
    if enabled is None:
        enabled = sys.stderr.isatty()
    inside = _inside.get()
    _inside.set(True)
    try:
        if enabled and not inside:
            with _drawn(total, label) as update:
                yield update
        else:
            yield lambda steps=1, note="": None
    finally:
        _inside.set(inside)


@contextmanager
def _drawn(total, label):
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(label, total=total, note="")

        def update(steps=1, note=""):
            progress.update(task, advance=steps, **({"note": note} if note else {}))

        yield update


def track(iterable, total, label, enabled=True):
    """Yields the items of ``iterable`` and draws a bar meanwhile."""
    with bar(total, label, enabled) as update:
        for item in iterable:
            yield item
            update()
