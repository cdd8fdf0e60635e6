"""``seal harness``."""

from .options import Command, Numbers, backend_option, load, model_options, positive


def options(parser):
    model_options(parser)
    parser.add_argument("--scales", metavar="DIR", help="trained scales to put on the model")
    parser.add_argument(
        "--tasks", nargs="+", required=True, metavar="TASK", help="longeval_lines, ruler, longbench, ..."
    )
    parser.add_argument(
        "--lengths", action=Numbers, default=[4096], help="prompt tokens, for tasks that generate prompts; a run each"
    )
    parser.add_argument("--limit", type=positive, help="cases of each task")
    parser.add_argument("--batch-size", type=positive, default=1, help="prompts in a batch")
    parser.add_argument("--chat", action="store_true", help="prompts in the tokenizer's chat format")
    parser.add_argument("--output", metavar="FILE", help="JSON with all results")
    backend_option(parser)


def run(args):
    from ..adapters import attachment
    from ..evaluation import lm_eval as harness

    harness.require()
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
            cases=args.limit,
            batch_size=args.batch_size,
            chat_template=args.chat,
        )
        print(f"{length} tokens\n{harness.table(results[length])}")
    if args.output:
        harness.save(results, args.output)
        print(args.output)


COMMAND = Command(
    "tasks of lm-evaluation-harness (RULER, LongBench, LongEval lines) on the model with its scales",
    "seal harness --model models/seal-tiny --tasks longeval_lines --lengths 512 1024 --limit 20",
    options,
    run,
)
