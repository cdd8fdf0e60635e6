"""``seal train``."""

import os

from .command import Command, kept
from .launched import join
from .option_types import positive, positive_number, setting
from .options import (
    backend_option,
    check_backend,
    checkpointing,
    checkpointing_option,
    extend_option,
    frozen_linears_option,
    load,
    model_options,
    prompts,
    restart_option,
    task,
    task_options,
)
from .quantize import attach_columns, columns_options

CALIBRATION = 128  # training rows that show which columns are weak, where no file does


def options(parser):
    model_options(parser)
    extend_option(parser)
    parser.add_argument("--granularity", choices=["head", "channel"], help="scales: SEAL-H or SEAL-C")
    columns_options(parser)
    parser.add_argument(
        "--recipe",
        choices=["longlora", "sinklora", "full_attention"],
        help="instead: adapters for a longer context, on --text",
    )
    parser.add_argument(
        "--recipe-option",
        type=setting,
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="of the recipe, like group=4096",
    )
    parser.add_argument(
        "--text",
        metavar="FILE",
        help="instead of --task: a text, or .jsonl with texts, packed into rows of --length tokens; or .jsonl with "
        "messages (or prompt and answer), of which the assistant's words are trained",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for what is trained and the checkpoint")
    task_options(parser)
    parser.add_argument("--length", type=positive, help="tokens a sample fills (with --task), or a row (with --text)")
    parser.add_argument("--samples", type=positive, default=50, help="how many (with --task)")
    parser.add_argument("--data", metavar="FILE", help="samples written by `seal data`, instead of --task")
    parser.add_argument("--lr", type=float, help="constant learning rate (default: 1e-2 for head, 2e-2 for channel)")
    parser.add_argument(
        "--column-lr", type=float, help="of weak columns (default: 5e-6 for 128, 1.4e-5 for 8, a power law between)"
    )
    parser.add_argument("--epochs", type=positive, default=1, help="passes over the samples")
    parser.add_argument("--batch-size", type=positive, default=1, help="samples in a forward pass")
    parser.add_argument(
        "--accumulate", type=positive, default=1,
        help="forward passes in an optimiser step; torchrun's processes divide them among themselves",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="samples and their order")
    checkpointing_option(parser)
    parser.add_argument(
        "--memory", type=positive_number, metavar="GIB",
        help="GiB that a step may take beside the model (default: what is free)",
    )  # fmt: skip
    frozen_linears_option(parser)
    restart_option(parser)
    backend_option(parser)


def run(args):
    from .. import tasks
    from ..adapters.attachment import attach
    from ..training.loop import train
    from ..training.texts import rows_of_file

    if (args.granularity is None and args.weak_columns is None) == (args.recipe is None):
        given = "neither" if args.recipe is None else "both"
        raise ValueError(f"--granularity (or --weak-columns) or --recipe must say what is trained, got {given}")
    check_backend(args, "--granularity", args.granularity is not None)
    args.prints = join(args)
    if args.recipe is not None:
        return _run_recipe(args)
    if args.recipe_option:
        raise ValueError("--recipe must be given with --recipe-option, got none")
    if args.data is not None and args.text is not None:
        raise ValueError("--data or --text must say what is trained on, got both")
    if args.data is None and args.text is None and args.length is None:
        raise ValueError("--length must be given with --task (or samples with --data or --text), got neither")
    if args.weak_columns is None and (args.quantize or args.start or args.calibration):
        raise ValueError("--quantize, --start and --calibration need --weak-columns, got none")
    if args.data is not None and (args.chat_format is not None or args.chat_template_kwargs is not None):
        raise ValueError(
            "--chat-format and --chat-template-kwargs must be given to `seal data`, got them with --data, whose "
            "samples have their chat format already"
        )
    model, tokenizer = load(args)
    if args.data is not None:
        samples = tasks.read(args.data)
    elif args.text is not None:
        samples = rows_of_file(args.text, tokenizer, args.length, "seal_ops.train", **prompts(args))
    else:
        samples = task(args).generate(tokenizer, args.length, args.samples, args.seed, **prompts(args))
    if args.weak_columns is not None:
        attach_columns(args, model, tokenizer, samples[:CALIBRATION])
    if args.granularity is not None:
        attach(model, args.granularity, backend=args.backend).card.command = args.command_line
    _report(train(model, samples, column_lr=args.column_lr, **_settings(args)), _what(args), args)


def _run_recipe(args):
    from ..training.loop import train

    if args.text is None or args.length is None:
        raise ValueError("--text and --length must be given with --recipe, got one of them or neither")
    if args.data is not None or args.column_lr is not None:
        raise ValueError(
            f"--recipe must say what is trained on what, got {'--data' if args.data is not None else '--column-lr'} too"
        )
    model, tokenizer = load(args)
    options = {**dict(args.recipe_option), "length": args.length}
    found = train(model, args.text, recipe=args.recipe, recipe_options=options, tokenizer=tokenizer, **_settings(args))
    _report(found, "weights", args)


def _settings(args) -> dict:
    """What `train` takes in either case."""
    return dict(
        lr=args.lr, epochs=args.epochs, batch_size=args.batch_size, accumulate=args.accumulate, seed=args.seed,
        gradient_checkpointing=checkpointing(args), memory=None if args.memory is None else round(args.memory * 2**30),
        frozen_linears=args.frozen_linears, output_dir=args.output,
        resume=not args.restart,
    )  # fmt: skip


def _report(result, what, args):
    if not args.prints:
        return
    losses = result.losses
    edge = max(1, len(losses) // 5)
    first, last = sum(losses[:edge]) / edge, sum(losses[-edge:]) / edge
    print(
        f"{result.parameters} {what} trained in {len(losses)} steps, {result.seconds:.0f} s, "
        f"peak memory {result.peak_memory / 2**30:.2f} GiB{_planned(result)}{_converted(result)}; "
        f"loss {first:.3f} -> {last:.3f}; saved in {args.output}"
    )


def _planned(result):
    expected = result.plan.get("expected_peak")
    if not expected:
        return ""
    kept = ", ".join(f"{count} x {what}" for what, count in result.plan["layers"].items())
    return f" ({expected / 2**30:.2f} planned; layers keep {kept})"


def _converted(result):
    if not result.frozen_linears:
        return ""
    facts = result.frozen_linears
    error = facts["gradient_error"]
    text = "not comparable" if error is None else f"{100 * error:.2g} % from those in 16 bits"
    return f"; {facts['layers']} linear layers in {facts['format']}, first gradients {text}"


def _what(args):
    if args.weak_columns is None:
        return "scales"
    return "numbers of weak columns" + (" and scales" if args.granularity else "")


def _kept(args):
    """What an interrupted training leaves."""
    from ..training.checkpoint import NAME, steps_of

    steps = steps_of(os.path.join(args.output, NAME))
    if steps is None:
        return f"no checkpoint was written to {args.output} yet; the same command begins anew"
    return f"step {steps} was kept; {kept(args)}"


COMMAND = Command(
    "train scales or weak columns on a task, or adapters for a longer context",
    "seal train --model models/seal-tiny --granularity head --task lines --length 2048 --output my-scales\n\n"
    "LongLoRA on a text of one's own:\n"
    "seal train --model models/seal-tiny --recipe longlora --text book.txt --length 2048 --output longer",
    options,
    run,
    _kept,
)
