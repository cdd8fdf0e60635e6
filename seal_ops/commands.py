"""The subcommands that help to decide: heads, compare, transfer, study, harness, report."""

import os
from dataclasses import fields

from .options import (
    Command, backend_option, chat_option, load, model_options, named_task, positive, setting, task, task_options,
)  # fmt: skip


def _fresh(args):
    """A function that loads the model anew."""
    return lambda: load(args)


def _folder_option(parser, what="tables and plots"):
    parser.add_argument("--output", required=True, metavar="DIR", help=f"folder for {what}; a second run continues it")


def _say(line):
    print(line, flush=True)


def _list(folder, names):
    for name in names:
        print(os.path.join(folder, name))


# ----------------------------------------------------------------------------------------------------------- heads


def _heads_options(parser):
    from .heads import METHODS

    model_options(parser)
    parser.add_argument("--scales", metavar="DIR", help="trained scales to put on the model")
    task_options(parser)
    parser.add_argument("--lengths", type=positive, nargs="+", required=True, help="tokens a sample fills")
    parser.add_argument("--cases", type=positive, default=20, help="samples at each length")
    parser.add_argument("--granularity", choices=["head", "channel"], default="head", help="what is taken away")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="how its effect is measured")
    parser.add_argument("--factor", type=float, default=0.0, help="what ablation multiplies a scale by")
    parser.add_argument("--limit", type=positive, help="ablate only so many, drawn by the seed (channels are many)")
    parser.add_argument("--batch-size", type=positive, help="variants in a forward pass (default: by length)")
    parser.add_argument(
        "--gradient-checkpointing", nargs="?", const="all", choices=["all", "selective"], help="as in seal train"
    )
    parser.add_argument("--quadrants", action="store_true", help="then scale harmful units x0.9, helpful ones x1.1, measure")
    parser.add_argument("--quadrant-cases", type=positive, default=50, help="test cases of that, at each length")
    parser.add_argument("--quadrant-measure", choices=["accuracy", "logprob", "gradient"], default="accuracy",
                        help="what decides harmful and helpful")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="draws the samples")
    _folder_option(parser)
    backend_option(parser)


def _heads(args):
    from . import heads, scales, study

    if args.quadrants and args.quadrant_measure != "gradient" and "ablation" not in args.methods:
        raise ValueError(f"--quadrant-measure {args.quadrant_measure} needs --methods ablation, got {args.methods}")
    model, tokenizer = load(args)
    if args.scales is not None:
        scales.load(model, args.scales, backend=args.backend)
    found = heads.influence(
        model,
        tokenizer,
        task(args),
        args.lengths,
        args.cases,
        granularity=args.granularity,
        methods=args.methods,
        factor=args.factor,
        limit=args.limit,
        batch_size=args.batch_size,
        seed=args.seed,
        chat_template=args.chat_format,
        gradient_checkpointing={None: False, "all": True}.get(args.gradient_checkpointing, args.gradient_checkpointing),
        backend=args.backend,
        output=os.path.join(args.output, "heads.json"),
        resume=True,
    )
    study.write_influence(found, args.output)
    measure = "logprob" if "ablation" in args.methods else "gradient"
    change = found.change(measure)
    order = [i for i in change.argsort().tolist() if change[i] == change[i]]
    print(f"{len(found.units)} {args.granularity}s; largest changes of the answer's log-probability (nats, mean of all cases):")
    for i in [*order[:5], *order[-5:]] if len(order) > 10 else order:
        layer, *place = found.units[i]
        print(f"   layer {layer:>2} {args.granularity} {'.'.join(map(str, place)):>6}: {change[i]:+8.3f}")
    print(study.describe_agreement(found))
    if args.quadrants:
        results = heads.quadrant_experiment(
            model, tokenizer, found, task(args), args.lengths, args.quadrant_cases, measure=args.quadrant_measure,
            output=os.path.join(args.output, "quadrants"), seed=args.seed, chat_template=args.chat_format, resume=True,
            backend=args.backend,
        )  # fmt: skip
        study.write_quadrants(results, found, args.output, args.quadrant_measure)
        for result in results.values():
            print(f"{result.name}\n{result.table()}")
    _list(args.output, ["heads.json", "heads.csv", "heads.png", *(["quadrants.png"] if args.quadrants else [])])


# --------------------------------------------------------------------------------------------- compare and transfer


def _method_options(parser):
    parser.add_argument("--samples", type=positive, default=50, help="training samples")
    parser.add_argument("--seed", type=int, default=0, help="draws the samples")


def _compare_options(parser):
    from .compare import METHODS

    model_options(parser)
    task_options(parser)
    parser.add_argument("--lengths", type=positive, nargs="+", required=True, help="prompt tokens")
    parser.add_argument("--cases", type=positive, default=50, help="test cases at each length")
    parser.add_argument("--train-length", type=positive, help="tokens a training sample fills (default: the longest)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="what is trained")
    parser.add_argument(
        "--rates", type=setting, nargs="+", default=[], metavar="METHOD=RATES",
        help="learning rates, like LoRA=2e-4 or LoRA=[2e-4,2e-3]: the best on validation samples (default: the paper's)",
    )  # fmt: skip
    parser.add_argument("--rank", type=positive, default=4, help="of LoRA and DoRA")
    parser.add_argument("--alpha", type=positive, default=8, help="of LoRA and DoRA")
    parser.add_argument("--target-modules", nargs="+", default=["q_proj", "k_proj", "v_proj", "o_proj"], help="of both")
    _method_options(parser)
    _folder_option(parser)
    backend_option(parser)


def _compare(args):
    from rich.console import Console

    from . import study
    from .compare import compare

    found = compare(
        _fresh(args),
        task(args),
        args.lengths,
        args.cases,
        output=args.output,
        train_length=args.train_length,
        samples=args.samples,
        methods=args.methods,
        rates=dict(args.rates),
        rank=args.rank,
        alpha=args.alpha,
        target_modules=args.target_modules,
        seed=args.seed,
        chat_template=args.chat_format,
        backend=args.backend,
        say=_say,
    )
    study.write_comparison(found, args.output)
    Console().print(study.comparison_table(found))
    _list(args.output, ["comparison.json", "comparison.csv", "comparison.png", "cost.png"])


def _transfer_options(parser):
    from .compare import METHODS

    model_options(parser)
    parser.add_argument("--train-tasks", nargs="+", required=True, metavar="TASK", help="one training each")
    parser.add_argument("--eval-tasks", nargs="+", metavar="TASK", help="measured after each (default: the same)")
    parser.add_argument("--length", type=positive, required=True, help="tokens of training samples and prompts")
    parser.add_argument("--cases", type=positive, default=50, help="test cases of each task")
    parser.add_argument("--method", choices=METHODS, default="SEAL-C", help="what is trained")
    parser.add_argument("--lr", type=float, help="learning rate (default: the paper's)")
    chat_option(parser)
    _method_options(parser)
    _folder_option(parser)
    backend_option(parser)


def _transfer(args):
    from . import study
    from .compare import transfer

    found = transfer(
        _fresh(args),
        [named_task(name) for name in args.train_tasks],
        [named_task(name) for name in args.eval_tasks or args.train_tasks],
        args.length,
        args.cases,
        output=args.output,
        method=args.method,
        lr=args.lr,
        samples=args.samples,
        seed=args.seed,
        chat_template=args.chat_format,
        backend=args.backend,
        say=_say,
    )
    study.write_transfer(found, args.output)
    _list(args.output, ["transfer.json", "transfer.csv", "transfer.png"])


# ----------------------------------------------------------------------------------------------------------- study


def _study_options(parser):
    from .compare import METHODS
    from .study import Settings

    default = {f.name: f.default for f in fields(Settings)}
    model_options(parser, required=False)
    parser.set_defaults(model=default["model"])
    parser.add_argument("--task", default=default["task"], help="compared, and whose heads are looked at")
    parser.add_argument("--lengths", type=positive, nargs="+", default=list(default["lengths"]), help="prompt tokens")
    parser.add_argument("--cases", type=positive, default=default["cases"], help="test cases at each length")
    parser.add_argument("--samples", type=positive, default=default["samples"], help="training samples")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="what is compared")
    parser.add_argument("--rates", type=setting, nargs="+", default=[], metavar="METHOD=RATES", help="as in seal compare")
    parser.add_argument(
        "--transfer-tasks", nargs="+", default=list(default["transfer_tasks"]), metavar="TASK", help="of the matrix"
    )
    parser.add_argument("--transfer-method", choices=METHODS, default=default["transfer_method"], help="of the matrix")
    parser.add_argument("--transfer-length", type=positive, default=default["transfer_length"], help="of the matrix")
    parser.add_argument("--heads-lengths", type=positive, nargs="+", default=list(default["heads_lengths"]), help="tokens")
    parser.add_argument("--heads-cases", type=positive, default=default["heads_cases"], help="samples at each of them")
    parser.add_argument("--factor", type=float, default=default["factor"], help="a small step besides removal")
    parser.add_argument("--seed", type=int, default=default["seed"], help="draws all samples")
    _folder_option(parser, "tables, plots and a report")


def _study(args):
    from . import demo, study

    values = {f.name: getattr(args, f.name) for f in fields(study.Settings)}
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    values |= {"rates": dict(args.rates), "model": demo.shipped(args.model)}
    results = study.run(study.Settings(**values), args.output, say=_say)
    print("\n" + ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in results["seconds"].items()))
    _list(args.output, ["report.html", "study.json", "comparison.csv", "transfer.csv", "heads.csv"])


# --------------------------------------------------------------------------------------------------------- harness


def _harness_options(parser):
    model_options(parser)
    parser.add_argument("--scales", metavar="DIR", help="trained scales to put on the model")
    parser.add_argument("--tasks", nargs="+", required=True, metavar="TASK", help="longeval_lines, ruler, longbench, ...")
    parser.add_argument(
        "--lengths", type=positive, nargs="+", default=[4096], help="prompt tokens, for tasks that generate prompts; a run each"
    )
    parser.add_argument("--limit", type=positive, help="cases of each task")
    parser.add_argument("--batch-size", type=positive, default=1, help="prompts in a batch")
    parser.add_argument("--chat", action="store_true", help="prompts in the tokenizer's chat format")
    parser.add_argument("--output", metavar="FILE", help="JSON with all results")
    backend_option(parser)


def _harness(args):
    from . import harness, scales

    harness.require()
    model, tokenizer = load(args)
    if args.scales is not None:
        scales.load(model, args.scales, backend=args.backend)
    results = {}
    for length in args.lengths:
        results[length] = harness.evaluate(
            model, tokenizer, args.tasks, length=length, limit=args.limit, batch_size=args.batch_size, chat=args.chat
        )
        print(f"{length} tokens\n{harness.table(results[length])}")
    if args.output:
        harness.save(results, args.output)
        print(args.output)


# ---------------------------------------------------------------------------------------------------------- report


def _report_options(parser):
    parser.add_argument("folder", metavar="DIR", help="what a command left there, and in its direct subfolders")
    parser.add_argument("--output", metavar="FILE", help="the HTML file (default: DIR/report.html)")
    parser.add_argument("--title", help="heading (default: the folder's name)")


def _report(args):
    from .report import write_report

    print(write_report(args.folder, args.output, title=args.title))


COMMANDS = {
    "heads": Command(
        "what every head, or channel, does for retrieval: by ablation and by gradient",
        "seal heads --model models/seal-tiny --lengths 512 1024 --cases 10 --quadrants --output heads",
        _heads_options,
        _heads,
    ),
    "compare": Command(
        "SEAL-H, SEAL-C, LoRA and DoRA on the same samples and cases, with paired tests",
        "seal compare --model models/seal-tiny --lengths 512 1024 --rates 'LoRA=[2e-4,2e-3]' --output compare",
        _compare_options,
        _compare,
    ),
    "transfer": Command(
        "train on each task, measure on each task",
        "seal transfer --model models/seal-tiny --train-tasks lines multikey passkey --length 512 --output transfer",
        _transfer_options,
        _transfer,
    ),
    "study": Command(
        "comparison, transfer matrix and head influence in one run, with a report",
        "seal study --model models/seal-tiny --output study",
        _study_options,
        _study,
    ),
    "harness": Command(
        "tasks of lm-evaluation-harness (RULER, LongBench, LongEval lines) on the model with its scales",
        "seal harness --model models/seal-tiny --tasks longeval_lines --lengths 512 1024 --limit 20",
        _harness_options,
        _harness,
    ),
    "report": Command(
        "one self-contained HTML file of what a run left in a folder",
        "seal report demo-results",
        _report_options,
        _report,
    ),
}
