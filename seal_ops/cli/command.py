"""What a subcommand of ``seal`` is, and what all of them say alike."""

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """One subcommand; ``run`` returns the exit code, None being 0, and ``kept`` what an interrupted one has left."""

    summary: str
    example: str
    options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int | None]
    kept: Callable[[argparse.Namespace], str] | None = None


def kept(args) -> str:
    """What an interrupted run leaves that is continued by the same command."""
    again = "the same command without --restart" if getattr(args, "restart", False) else "the same command"
    return f"what is finished lies in {args.output}; {again} goes on from there"


def log(line):
    print(line, flush=True)


def list_files(folder, names):
    for name in names:
        print(os.path.join(folder, name))
