"""``seal demo``."""

import os
from dataclasses import fields

from ..huggingface.loading import shipped
from .options import Command, Numbers, model_options, positive


def options(parser):
    from ..experiments.demo import Settings

    default = {field.name: field.default for field in fields(Settings)}
    model_options(parser, required=False)
    parser.set_defaults(model=default["model"])
    parser.add_argument("--output", default="demo-results", metavar="DIR", help="folder for results, plots and scales")
    parser.add_argument("--lengths", action=Numbers, default=list(default["lengths"]), help="prompt tokens")
    parser.add_argument("--cases", type=positive, default=default["cases"], help="test cases at each length")
    parser.add_argument("--samples", type=positive, default=default["samples"], help="training samples")
    parser.add_argument("--lr-head", type=float, default=default["lr_head"], help="learning rate of SEAL-H")
    parser.add_argument("--lr-channel", type=float, default=default["lr_channel"], help="learning rate of SEAL-C")
    parser.add_argument("--seed", type=int, default=default["seed"], help="draws the samples")
    parser.add_argument(
        "--full", action="store_true", help="200 cases at the two shortest lengths and the longest, instead of --cases at all"
    )
    parser.add_argument("--restart", action="store_true", help="forget an earlier demo in the output folder")


def run(args):
    from rich.console import Console

    from ..experiments import demo

    lengths, cases = sorted(set(args.lengths)), args.cases
    if args.full:
        lengths, cases = sorted({*lengths[:2], lengths[-1]}), 200
    values = {field.name: getattr(args, field.name) for field in fields(demo.Settings)}
    values |= {"lengths": tuple(lengths), "cases": cases, "model": shipped(args.model)}
    if args.restart:
        demo.forget(args.output)
    results = demo.run(demo.Settings(**values), args.output, log=lambda line: print(line, flush=True))
    print()
    Console().print(demo.table(results))
    seconds = results["seconds"]
    print(f"measuring {seconds['evaluation']:.0f} s, training {seconds['training']:.0f} s")
    for name in (demo.RESULTS, *results["plots"]):
        print(os.path.join(args.output, name))


COMMAND = Command(
    "measure retrieval, train SEAL-H and SEAL-C on the shipped model, measure again, merge",
    "seal demo --output demo-results\n\n200 cases at the two shortest lengths and the longest:\n"
        "seal demo --full --output demo-full",
    options,
    run,
)
