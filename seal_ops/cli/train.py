"""``seal train``."""

from .options import (
    Command,
    backend_option,
    extend_option,
    load,
    model_options,
    positive,
    prompts,
    restart_option,
    task,
    task_options,
)


def options(parser):
    model_options(parser)
    extend_option(parser)
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
    restart_option(parser)
    backend_option(parser)


def run(args):
    from .. import tasks
    from ..adapters.attachment import attach
    from ..training.loop import train

    if args.data is None and args.length is None:
        raise ValueError("--length must be given with --task (or samples with --data), got neither")
    if args.data is not None and (args.chat_format is not None or args.chat_template_kwargs is not None):
        raise ValueError(
            "--chat-format and --chat-template-kwargs must be given to `seal data`, got them with --data, whose "
            "samples have their chat format already"
        )
    model, tokenizer = load(args)
    if args.data is not None:
        samples = tasks.read(args.data)
    else:
        samples = task(args).generate(tokenizer, args.length, args.samples, args.seed, **prompts(args))
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
        resume=not args.restart,
    )
    losses = result.losses
    edge = max(1, len(losses) // 5)
    first, last = sum(losses[:edge]) / edge, sum(losses[-edge:]) / edge
    print(
        f"{result.parameters} scales trained in {len(losses)} steps, {result.seconds:.0f} s, "
        f"peak memory {result.peak_memory / 2**30:.2f} GiB; loss {first:.3f} -> {last:.3f}; saved in {args.output}"
    )


COMMAND = Command(
    "train scales on a task",
    "seal train --model models/seal-tiny --granularity head --task lines --length 2048 --output my-scales",
    options,
    run,
)
