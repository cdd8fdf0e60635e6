"""``seal plan``."""

from .command import Command
from .option_types import positive, positive_number
from .options import backend_option, extend_option, frozen_linears_option, load, model_options


def options(parser):
    model_options(parser)
    extend_option(parser)
    parser.add_argument("--granularity", choices=["head", "channel"], default="head", help="scales: SEAL-H or SEAL-C")
    parser.add_argument("--length", type=positive, required=True, help="tokens of a sample")
    parser.add_argument("--batch-size", type=positive, default=1, help="samples in a forward pass")
    parser.add_argument(
        "--labels", type=positive, default=512, help="positions of a sample whose logits the loss reads"
    )
    parser.add_argument(
        "--memory", type=positive_number, metavar="GIB", help="GiB that a step may take (default: what is free)"
    )
    frozen_linears_option(parser)
    backend_option(parser)


def run(args):
    from ..adapters.attachment import attach
    from ..training.memory_plan.planning import plan

    model, _ = load(args)
    attach(model, args.granularity, backend=args.backend)
    memory = None if args.memory is None else round(args.memory * 2**30)
    print(plan(model, args.length, args.batch_size, memory, labels=args.labels, frozen_linears=args.frozen_linears))


COMMAND = Command(
    "what each layer would keep in memory in a training step, and what the step is expected to take",
    "seal plan --model models/seal-tiny --length 2048",
    options,
    run,
)
