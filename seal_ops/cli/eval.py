"""``seal eval``."""

import os

from .command import Command, kept
from .option_types import Numbers, plot_file, positive
from .options import (
    backend_option,
    check_backend,
    extend_option,
    load,
    model_options,
    prompts,
    restart_option,
    task,
    task_options,
)


def options(parser):
    model_options(parser)
    extend_option(parser)
    parser.add_argument("--scales", metavar="DIR", help="trained scales to put on the model")
    parser.add_argument("--weak-columns", metavar="DIR", help="trained weak columns to put on the model")
    task_options(parser)
    parser.add_argument("--lengths", action=Numbers, required=True, help="prompt tokens")
    parser.add_argument("--cases", type=positive, default=50, help="at each length")
    parser.add_argument("--batch-size", type=positive, help="prompts in a batch at most (default: by length)")
    parser.add_argument("--seed", type=int, default=0, help="draws the cases")
    parser.add_argument("--name", help="label in tables and plots (default: base, or the folder of what is put on)")
    parser.add_argument("--output", metavar="FILE", help="JSON with every case")
    parser.add_argument("--csv", metavar="FILE", help="the cases as CSV")
    parser.add_argument("--plot", metavar="FILE", type=plot_file, help="accuracy by length (.png, .svg or .pdf)")
    parser.add_argument(
        "--compare", metavar="FILE", nargs="+", default=[], help="earlier results to draw beside this one"
    )
    restart_option(parser)
    backend_option(parser)


def run(args):
    from ..adapters import attachment
    from ..evaluation.results import Evaluation
    from ..evaluation.runner import evaluate
    from ..quantized.saving import load_weak_columns
    from ..report import plots
    from ..utils.files import check_file

    for written in filter(None, (args.csv, args.plot)):
        check_file(written)
    others = [Evaluation.load(path) for path in args.compare]
    check_backend(args, "--scales", args.scales is not None)
    model, tokenizer = load(args)
    if args.weak_columns is not None:
        load_weak_columns(model, args.weak_columns)
    if args.scales is not None:
        attachment.load(model, args.scales, backend=args.backend)
    adapter = args.scales or args.weak_columns
    name = args.name or (os.path.basename(os.path.normpath(adapter)) if adapter else "base")
    result = evaluate(
        model,
        tokenizer,
        task(args),
        args.lengths,
        args.cases,
        batch_size=args.batch_size,
        seed=args.seed,
        **prompts(args),
        name=name,
        output=args.output,
        resume=not args.restart,
    )
    print(result.table())
    if args.csv:
        result.save_csv(args.csv)
    if args.plot:
        plots.accuracy_by_length([*others, result], args.plot)
    for path in filter(None, (args.output, args.csv, args.plot)):
        print(path)


def _kept(args):
    """What an interrupted evaluation leaves."""
    if args.output is None:
        return "no case was kept; with --output FILE the same command goes on from what is finished"
    return kept(args) if os.path.exists(args.output) else "no case was kept yet"


COMMAND = Command(
    "accuracy by length, with 95 % intervals",
    "seal eval --model models/seal-tiny --scales my-scales --lengths 512 1024 2048 --cases 50 \\\n"
    "  --output result.json --plot result.png",
    options,
    run,
    _kept,
)
