"""``seal compare``."""

from .command import Command, kept, list_files, log
from .option_types import Numbers, positive, setting
from .options import (
    backend_option,
    extend_option,
    folder_option,
    load_model_fn,
    method_options,
    model_options,
    prompts,
    task,
    task_options,
)


def options(parser):
    from ..experiments.comparison import METHODS

    model_options(parser)
    extend_option(parser)
    task_options(parser)
    parser.add_argument("--lengths", action=Numbers, required=True, help="prompt tokens")
    parser.add_argument("--cases", type=positive, default=50, help="test cases at each length")
    parser.add_argument("--train-length", type=positive, help="tokens a training sample fills (default: the longest)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="what is trained")
    parser.add_argument(
        "--rates", type=setting, nargs="+", default=[], metavar="METHOD=RATES",
        help="learning rates, like LoRA=2e-4 or LoRA=[2e-4,2e-3]: the best on validation samples (default: the paper's)",  # noqa: E501
    )  # fmt: skip
    parser.add_argument("--rank", type=positive, default=4, help="of LoRA and DoRA")
    parser.add_argument("--alpha", type=positive, default=8, help="of LoRA and DoRA")
    parser.add_argument("--target-modules", nargs="+", default=["q_proj", "k_proj", "v_proj", "o_proj"], help="of both")
    method_options(parser)
    folder_option(parser)
    backend_option(parser)


def run(args):
    from rich.console import Console

    from ..experiments.comparison import compare
    from ..report.writers import comparison_table, write_comparison

    found = compare(
        load_model_fn(args),
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
        **prompts(args),
        backend=args.backend,
        log=log,
    )
    write_comparison(found, args.output)
    Console().print(comparison_table(found))
    list_files(args.output, ["comparison.json", "comparison.csv", "comparison.png", "cost.png"])


COMMAND = Command(
    "SEAL-H, SEAL-C, LoRA and DoRA on the same samples and cases, with paired tests",
    "seal compare --model models/seal-tiny --lengths 512 1024 --rates 'LoRA=[2e-4,2e-3]' --output compare",
    options,
    run,
    kept,
)
