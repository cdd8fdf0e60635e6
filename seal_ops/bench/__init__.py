"""The benchmark harness behind `seal bench`: shapes of real models, peers in the same run, nothing timed before it is
right.

`shapes` registers the shapes, `contestants` says who computes what, `peers` holds the others' ways, `gate` checks every
contestant against an fp64 oracle, `timing` reads device events, `report` writes CSV, JSON and plots, `run` is the
command.
"""

from __future__ import annotations


def main(argv: list[str] | None = None) -> int:
    """`seal bench`; see `seal bench --help` or docs/benchmarks.md. Returns the exit code."""
    from .run import (
        main as run,  # imported late: the package imports without torch.cuda, triton or matplotlib being touched
    )

    return run(argv)
