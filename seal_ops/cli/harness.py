"""``seal harness``."""

from .command import Command
from .option_types import Numbers, positive
from .options import backend_option, check_backend, extend_option, load, model_options


def options(parser):
    model_options(parser)
    extend_option(parser)
    parser.add_argument("--scales", metavar="DIR", help="trained scales to put on the model")
    parser.add_argument(
        "--tasks", nargs="+", required=True, metavar="TASK", help="longeval_lines, ruler, longbench, ..."
    )
    parser.add_argument(
        "--lengths", action=Numbers, default=[4096], help="prompt tokens, for tasks that generate prompts; a run each"
    )
    parser.add_argument("--cases", type=positive, help="of each task (default: all)")
    parser.add_argument("--batch-size", type=positive, default=1, help="prompts in a batch")
    parser.add_argument(
        "--chat-format", choices=["auto", "on", "off"], default="off", help="auto: the tokenizer's, if it has one"
    )
    parser.add_argument(
        "--max-length", type=positive, help="cut longer prompts to so many tokens (default: refuse them)"
    )
    parser.add_argument("--output", metavar="FILE", help="JSON with all results")
    backend_option(parser)


def run(args):
    from ..adapters import attachment
    from ..evaluation import lm_eval as harness
    from ..utils.files import check_file

    harness.require()
    if args.output:
        check_file(args.output)
    check_backend(args, "--scales", args.scales is not None)
    model, tokenizer = load(args)
    if args.scales is not None:
        attachment.load(model, args.scales, backend=args.backend)
    results = {}
    for length in args.lengths:
        results[length] = harness.evaluate(
            model,
            tokenizer,
            args.tasks,
            length=length,
            cases=args.cases,
            batch_size=args.batch_size,
            chat_template={"auto": None, "on": True, "off": False}[args.chat_format],
            max_length=args.max_length,
        )
        print(f"{length} tokens\n{harness.table(results[length])}")
    if args.output:
        harness.save(results, args.output)
        print(args.output)


COMMAND = Command(
    "tasks of lm-evaluation-harness (RULER, LongBench, LongEval lines) on the model with its scales",
    "seal harness --model models/seal-tiny --tasks longeval_lines --lengths 512 1024 --cases 20",
    options,
    run,
)
