"""The command ``seal``: parse, call the library, print.

A subcommand is one entry of ``COMMANDS``: its options, a function that runs it, a sentence and an example.  Exit codes:
0 done, 1 failed (one sentence on stderr), 2 wrong usage, 130 interrupted.
"""

import argparse
import os
import sys
import traceback
from dataclasses import fields

from . import commands
from .options import (
    Command, Help, backend_option, config_option, configure, configured, load, model_options, plot_file, positive, task,
    task_options,
)  # fmt: skip

# transformers and matplotlib are imported by the subcommands that need them.


def main(argv: list[str] | None = None) -> int:
    """Runs ``seal`` with the arguments ``argv`` (default: the process's); returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        args = _parser(argv).parse_args(argv)
    except SystemExit as stop:  # argparse: 0 after --help, 2 after wrong usage
        return int(stop.code or 0)
    try:
        return COMMANDS[args.command].run(args) or 0
    except KeyboardInterrupt:
        print(f"\nseal {args.command}: interrupted", file=sys.stderr)
        return 130
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


def _parser(argv):
    parser = argparse.ArgumentParser(prog="seal", description="SEAL: learned head and channel scales for long contexts.")
    from .version import __version__

    parser.add_argument("--version", action="version", version=f"seal_ops {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=command.summary.replace("%", "%%"),
            description=command.summary[0].upper() + command.summary[1:] + ".",
            epilog="example:\n  " + command.example.replace("\n", "\n  "),
            formatter_class=Help,
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


# ----------------------------------------------------------------------------------------------------- subcommands


def _env_options(parser):
    pass


def _env(args):
    from .collect_env import report

    print(report())


def _demo_options(parser):
    from .demo import Settings

    default = {field.name: field.default for field in fields(Settings)}
    model_options(parser, required=False)
    parser.set_defaults(model=default["model"])
    parser.add_argument("--output", default="demo-results", metavar="DIR", help="folder for results, plots and scales")
    parser.add_argument("--lengths", type=positive, nargs="+", default=list(default["lengths"]), help="prompt tokens")
    parser.add_argument("--cases", type=positive, default=default["cases"], help="test cases at each length")
    parser.add_argument("--samples", type=positive, default=default["samples"], help="training samples")
    parser.add_argument("--lr-head", type=float, default=default["lr_head"], help="learning rate of SEAL-H")
    parser.add_argument("--lr-channel", type=float, default=default["lr_channel"], help="learning rate of SEAL-C")
    parser.add_argument("--seed", type=int, default=default["seed"], help="draws the samples")
    parser.add_argument(
        "--full", action="store_true", help="200 cases at the two shortest lengths and the longest, instead of --cases at all"
    )
    parser.add_argument("--restart", action="store_true", help="forget an earlier demo in the output folder")


def _demo(args):
    from rich.console import Console

    from . import demo

    lengths, cases = sorted(set(args.lengths)), args.cases
    if args.full:
        lengths, cases = sorted({*lengths[:2], lengths[-1]}), 200
    values = {field.name: getattr(args, field.name) for field in fields(demo.Settings)}
    values |= {"lengths": tuple(lengths), "cases": cases, "model": demo.shipped(args.model)}
    if args.restart:
        demo.forget(args.output)
    results = demo.run(demo.Settings(**values), args.output, say=lambda line: print(line, flush=True))
    print()
    Console().print(demo.table(results))
    seconds = results["seconds"]
    print(f"measuring {seconds['evaluation']:.0f} s, training {seconds['training']:.0f} s")
    for name in (demo.RESULTS, *results["plots"]):
        print(os.path.join(args.output, name))


def _data_options(parser):
    parser.add_argument("--tokenizer", required=True, metavar="NAME", help="tokenizer's folder, or name on the hub")
    task_options(parser)
    parser.add_argument("--length", type=positive, required=True, help="tokens a sample fills")
    parser.add_argument("--samples", type=positive, default=50, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="draws the samples")
    parser.add_argument("--split", choices=["train", "test"], default="train", help="never share random numbers")
    parser.add_argument("--output", required=True, metavar="FILE", help="JSON lines, one sample each")


def _data(args):
    from . import tasks
    from .loading import load_tokenizer

    tokenizer = load_tokenizer(args.tokenizer, "seal data")
    samples = task(args).generate(
        tokenizer, args.length, args.samples, args.seed, split=args.split, chat_template=args.chat_format, progress=None
    )
    tasks.write(args.output, samples)
    print(f"{len(samples)} samples of {min(map(len, samples))} to {max(map(len, samples))} tokens in {args.output}")


def _train_options(parser):
    model_options(parser)
    parser.add_argument("--granularity", choices=["head", "channel"], required=True, help="SEAL-H or SEAL-C")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the scales and the checkpoint")
    task_options(parser)
    parser.add_argument("--length", type=positive, help="tokens a sample fills (with --task)")
    parser.add_argument("--samples", type=positive, default=50, help="how many (with --task)")
    parser.add_argument("--data", metavar="FILE", help="samples written by `seal data`, instead of --task")
    parser.add_argument("--lr", type=float, help="constant learning rate (default: 1e-2 for head, 2e-2 for channel)")
    parser.add_argument("--epochs", type=positive, default=1, help="passes over the samples")
    parser.add_argument("--batch-size", type=positive, default=1, help="samples in a forward pass")
    parser.add_argument("--accumulate", type=positive, default=1, help="forward passes in an optimiser step")
    parser.add_argument("--seed", type=int, default=0, help="samples and their order")
    parser.add_argument(
        "--gradient-checkpointing", nargs="?", const="all", choices=["all", "selective"],
        help="recompute activations in the backward pass; selective keeps the attention outputs",
    )  # fmt: skip
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --output, if there is one")
    backend_option(parser)


def _train(args):
    from . import tasks
    from .scales import attach
    from .train import train

    if args.data is None and args.length is None:
        raise ValueError("--length must be given with --task (or samples with --data), got neither")
    model, tokenizer = load(args)
    if args.data is not None:
        samples = tasks.read(args.data)
    else:
        samples = task(args).generate(
            tokenizer, args.length, args.samples, args.seed, chat_template=args.chat_format, progress=None
        )
    attach(model, args.granularity, backend=args.backend)
    result = train(
        model,
        samples,
        lr=args.lr,
        epochs=args.epochs,
        batch_size=args.batch_size,
        accumulate=args.accumulate,
        seed=args.seed,
        gradient_checkpointing={None: False, "all": True}.get(args.gradient_checkpointing, args.gradient_checkpointing),
        output_dir=args.output,
        resume=args.resume,
    )
    losses = result.losses
    edge = max(1, len(losses) // 5)
    first, last = sum(losses[:edge]) / edge, sum(losses[-edge:]) / edge
    print(
        f"{result.parameters} scales trained in {len(losses)} steps, {result.seconds:.0f} s, "
        f"peak memory {result.peak_memory / 2**30:.2f} GiB; loss {first:.3f} -> {last:.3f}; saved in {args.output}"
    )


def _eval_options(parser):
    model_options(parser)
    parser.add_argument("--scales", metavar="DIR", help="trained scales to put on the model")
    task_options(parser)
    parser.add_argument("--lengths", type=positive, nargs="+", required=True, help="prompt tokens")
    parser.add_argument("--cases", type=positive, default=50, help="at each length")
    parser.add_argument("--batch-size", type=positive, help="prompts in a batch at most (default: by length)")
    parser.add_argument("--seed", type=int, default=0, help="draws the cases")
    parser.add_argument("--name", help="label in tables and plots (default: base, or the folder of the scales)")
    parser.add_argument("--output", metavar="FILE", help="JSON with every case")
    parser.add_argument("--csv", metavar="FILE", help="the cases as CSV")
    parser.add_argument("--plot", metavar="FILE", type=plot_file, help="accuracy by length (.png, .svg or .pdf)")
    parser.add_argument("--compare", metavar="FILE", nargs="+", default=[], help="earlier results to draw beside this one")
    parser.add_argument("--resume", action="store_true", help="continue what --output holds")
    backend_option(parser)


def _eval(args):
    from . import plots, scales
    from .evaluate import Evaluation, evaluate

    if args.resume and args.output is None:
        raise ValueError("--resume needs --output, got none")
    others = [Evaluation.load(path) for path in args.compare]
    model, tokenizer = load(args)
    if args.scales is not None:
        scales.load(model, args.scales, backend=args.backend)
    name = args.name or (os.path.basename(os.path.normpath(args.scales)) if args.scales else "base")
    result = evaluate(
        model,
        tokenizer,
        task(args),
        args.lengths,
        args.cases,
        batch_size=args.batch_size,
        seed=args.seed,
        chat_template=args.chat_format,
        name=name,
        output=args.output,
        resume=args.resume,
    )
    print(result.table())
    if args.csv:
        result.save_csv(args.csv)
    if args.plot:
        plots.accuracy_by_length([*others, result], args.plot)
    for path in filter(None, (args.output, args.csv, args.plot)):
        print(path)


def _merge_options(parser):
    model_options(parser)
    parser.add_argument("--scales", required=True, metavar="DIR", help="trained scales")
    parser.add_argument("--output", required=True, metavar="DIR", help="new folder for the merged checkpoint")


def _merge(args):
    from .files import replacing_folder
    from . import scales

    with replacing_folder(args.output) as folder:  # before the model is loaded: an unusable folder is told at once
        model, tokenizer = load(args)
        scales.load(model, args.scales)
        scales.merge(model).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    print(f"merged checkpoint in {args.output}, {str(model.dtype).removeprefix('torch.')}")


def _bench_options(parser):
    from .bench.run import add_options

    add_options(parser)


def _bench(args):
    from .bench.run import bench

    return bench(args)


_COMMANDS = {
    "env": Command("versions, what was built, which backend each op uses and why", "seal env", _env_options, _env),
    "demo": Command(
        "measure retrieval, train SEAL-H and SEAL-C on the shipped model, measure again, merge",
        "seal demo --output demo-results\n\n200 cases at the two shortest lengths and the longest:\n"
        "seal demo --full --output demo-full",
        _demo_options,
        _demo,
    ),
    "data": Command(
        "write samples of a task to a file",
        "seal data --tokenizer models/seal-tiny --task lines --length 2048 --samples 50 --output lines.jsonl",
        _data_options,
        _data,
    ),
    "train": Command(
        "train scales on a task",
        "seal train --model models/seal-tiny --granularity head --task lines --length 2048 --output my-scales",
        _train_options,
        _train,
    ),
    "eval": Command(
        "accuracy by length, with 95 % intervals",
        "seal eval --model models/seal-tiny --scales my-scales --lengths 512 1024 2048 --cases 50 \\\n"
        "  --output result.json --plot result.png",
        _eval_options,
        _eval,
    ),
    "merge": Command(
        "fold trained scales into a plain checkpoint",
        "seal merge --model models/seal-tiny --scales my-scales --output merged",
        _merge_options,
        _merge,
    ),
    "bench": Command(
        "speed of the ops beside their peers, nothing timed before an fp64 oracle agrees with it",
        "seal bench --suite headline --fa3 ./fa3 --out results --budget-s 240",
        _bench_options,
        _bench,
    ),
}
# In the order of a day's work.
_ORDER = (
    "env", "demo", "data", "train", "eval", "heads", "compare", "transfer", "study", "harness", "merge", "report", "bench",
)  # fmt: skip
COMMANDS = {name: (_COMMANDS | commands.COMMANDS)[name] for name in _ORDER}
