"""``seal transfer``."""

from .command import Command, kept, list_files, log
from .option_types import positive
from .options import (
    backend_option,
    chat_option,
    extend_option,
    folder_option,
    load_model_fn,
    method_options,
    model_options,
    named_task,
    prompts,
)


def options(parser):
    from ..experiments.comparison import METHODS

    model_options(parser)
    extend_option(parser)
    parser.add_argument("--train-tasks", nargs="+", required=True, metavar="TASK", help="one training each")
    parser.add_argument("--eval-tasks", nargs="+", metavar="TASK", help="measured after each (default: the same)")
    parser.add_argument("--length", type=positive, required=True, help="tokens of training samples and prompts")
    parser.add_argument("--cases", type=positive, default=50, help="test cases of each task")
    parser.add_argument("--method", choices=METHODS, default="SEAL-C", help="what is trained")
    parser.add_argument("--lr", type=float, help="learning rate (default: the paper's)")
    chat_option(parser)
    method_options(parser)
    folder_option(parser)
    backend_option(parser)


def run(args):
    from ..experiments.transfer_matrix import transfer
    from ..report.writers import write_transfer

    found = transfer(
        load_model_fn(args),
        [named_task(name) for name in args.train_tasks],
        [named_task(name) for name in args.eval_tasks or args.train_tasks],
        args.length,
        args.cases,
        output=args.output,
        method=args.method,
        lr=args.lr,
        samples=args.samples,
        seed=args.seed,
        **prompts(args),
        backend=args.backend,
        log=log,
    )
    write_transfer(found, args.output)
    list_files(args.output, ["transfer.json", "transfer.csv", "transfer.png"])


COMMAND = Command(
    "train on each task, measure on each task",
    "seal transfer --model models/seal-tiny --train-tasks lines multikey passkey --length 512 --output transfer",
    options,
    run,
    kept,
)
