"""``seal env``."""

from .options import Command


def options(parser):
    pass


def run(args):
    from ..ops.environment import report

    print(report())


COMMAND = Command(
    "versions, what was built, which backend each op uses and why",
    "seal env",
    options,
    run,
)
