"""The command ``seal``: parse, call the library, print.

A subcommand is one entry of ``COMMANDS``: its options, a function that runs it, a sentence and an example.  Exit codes:
0 done, 1 failed (one sentence on stderr), 2 wrong usage, 130 interrupted, 143 terminated (both say how to go on).
"""

import argparse
import contextlib
import os
import shlex
import signal
import sys
import threading
import traceback

from ..utils.usage import Help
from . import (
    bench,
    card,
    compare,
    data,
    demo,
    env,
    eval,
    extend,
    harness,
    heads,
    merge,
    plan,
    quantize,
    report,
    study,
    train,
    transfer,
)
from .config_file import config_option, configure, configured

# transformers and matplotlib are imported by the subcommands that need them.


def main(argv: list[str] | None = None) -> int:
    """Runs ``seal`` with the arguments ``argv`` (default: the process's); returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        args = _parser(argv).parse_args(argv)
    except SystemExit as stop:  # argparse: 0 after --help, 2 after wrong usage
        return int(stop.code or 0)
    args.command_line = shlex.join(["seal", *argv])
    try:
        with _terminated_as_interrupted():
            return COMMANDS[args.command].run(args) or 0
    except KeyboardInterrupt as stop:
        said, code = ("terminated", 143) if isinstance(stop, _Terminated) else ("interrupted", 130)
        kept = COMMANDS[args.command].kept
        print(f"\nseal {args.command}: {said}{f'; {kept(args)}' if kept else ''}", file=sys.stderr)
        return code
    except BrokenPipeError:  # `seal env | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        if args.traceback:
            traceback.print_exc()
        else:
            sentence = (str(error).strip() or type(error).__name__).splitlines()[0]
            print(f"seal {args.command}: {sentence.removeprefix(f'seal {args.command}: ')}", file=sys.stderr)
        return 1


class _Terminated(KeyboardInterrupt):
    """SIGTERM, as a batch system sends it before it kills."""


@contextlib.contextmanager
def _terminated_as_interrupted():
    """Inside the block SIGTERM unwinds the stack, so that locks and temporary files go; a second one ends at once."""

    def stop(number, frame):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise _Terminated

    # Only the main thread may set handlers, and one that a host program has set is its own.
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _parser(argv):
    parser = argparse.ArgumentParser(
        prog="seal", allow_abbrev=False, description="SEAL: learned head and channel scales for long contexts."
    )
    from ..version import __version__

    parser.add_argument("--version", action="version", version=f"seal_ops {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=command.summary.replace("%", "%%"),
            description=command.summary[0].upper() + command.summary[1:] + ".",
            epilog="example:\n  " + command.example.replace("\n", "\n  "),
            formatter_class=Help,
            allow_abbrev=False,  # `--conf FILE` would be read by argparse and not by `configured`
        )
        command.options(sub)
        config_option(sub)
        sub.add_argument("--traceback", action="store_true", help="show where an error came from")
        if argv[:1] == [name] and (path := configured(argv)):
            try:
                configure(sub, path)
            except (ValueError, OSError) as error:
                sub.error(str(error))
    return parser


# In the order of a day's work.
_MODULES = (
    env,
    demo,
    data,
    plan,
    train,
    eval,
    extend,
    heads,
    compare,
    transfer,
    study,
    harness,
    card,
    merge,
    quantize,
    report,
    bench,
)
COMMANDS = {module.__name__.rpartition(".")[2]: module.COMMAND for module in _MODULES}
