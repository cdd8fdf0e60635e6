"""Progress bars on stderr, in one look for every long step."""

import sys
from contextlib import contextmanager


@contextmanager
def bar(total, label, enabled=True):
    """Yields ``update(steps=1, note="")``; draws nothing where ``enabled`` is false.

    ``enabled=None`` draws where stderr is a terminal.
    """
    if enabled is None:
        enabled = sys.stderr.isatty()
    if not enabled:
        yield lambda steps=1, note="": None
        return
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
