"""``seal extend``."""

import json

from .command import Command, log
from .option_types import Numbers, extension, positive
from .options import load, model_options


def options(parser):
    model_options(parser)
    parser.add_argument(
        "--methods", nargs="+", type=extension, default=[], metavar="METHOD[:KEY=VALUE,...]",
        help="what is tried, like ntk:factor=4 (default: all that need no fine-tuning, for the longest length)",
    )  # fmt: skip
    parser.add_argument("--lengths", action=Numbers, default=[], help="tokens of the windows that the text is read in")
    parser.add_argument("--text", metavar="FILE", help="a text whose perplexity is measured")
    parser.add_argument("--windows", type=positive, help="read at most so many windows at each length")
    parser.add_argument("--output", metavar="FILE", help="JSON with every figure")


def run(args):
    from rich.console import Console
    from rich.table import Table

    from ..experiments.extension_comparison import BASE, compare_extensions, suggested
    from ..huggingface.context_window import trained_length
    from ..utils.files import atomic_write, check_file, read_text

    if args.text is not None and not args.lengths:
        raise ValueError("--lengths must be given with --text, got none")
    if not args.methods and not args.lengths:
        raise ValueError("--methods or --lengths must say how far the model is to read, got neither")
    text = None if args.text is None else read_text(args.text)
    if args.output:
        check_file(args.output)
    model, tokenizer = load(args)
    methods = args.methods or suggested(trained_length(model), max(args.lengths))
    rows = compare_extensions(model, tokenizer, methods, text, args.lengths, windows=args.windows, log=log)
    table = Table("method", "options", "reads", *(f"{n}" for n in (args.lengths if text is not None else ())))
    for row in rows:
        given = {k: f"{v:g}" if isinstance(v, float) else v for k, v in row["options"].items() if v is not None}
        said = ", ".join(f"{name}={value}" for name, value in given.items())
        reach = row["refused"] or ("any length" if row["positions"] is None else str(row["positions"]))
        figures = [f"{value:.3f}" for value in row.get("perplexity", {}).values()]
        table.add_row("(plain)" if row["method"] == BASE else row["method"], said, reach, *figures)
    Console().print(table)
    if args.output:
        atomic_write(args.output, json.dumps({"model": args.model, "rows": rows}, indent=1) + "\n")
        print(args.output)


COMMAND = Command(
    "how far each method of context extension lets a model read, and the perplexity of a text by length",
    "seal extend --model models/seal-tiny --methods ntk:factor=4 self_extend:group=8,window=256 \\\n"
    "  --text book.txt --lengths 2048 4096 --output extension.json",
    options,
    run,
)
