"""``seal bench``."""

from .command import Command


def options(parser):
    from ..bench.run import add_options

    add_options(parser)


def run(args):
    from ..bench.run import bench

    return bench(args)


COMMAND = Command(
    "speed of the ops beside their peers, nothing timed before an fp64 oracle agrees with it",
    "seal bench --suite headline --fa3 ./fa3 --output results --budget-s 240",
    options,
    run,
)
