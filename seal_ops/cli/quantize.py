"""``seal quantize``."""

from .command import Command
from .option_types import positive
from .options import load, model_options, prompts, task, task_options


def options(parser):
    model_options(parser)
    parser.set_defaults(quantization=None)
    columns_options(parser, required=True)
    parser.add_argument("--output", required=True, metavar="DIR", help="new folder for the 4-bit checkpoint")


def columns_options(parser, required=False):
    """What :func:`seal_ops.attach_weak_columns` takes: columns, start, share, calibration."""
    from ..quantized.selection import SHARES
    from ..quantized.start import STARTS

    parser.add_argument(
        "--weak-columns", type=positive, default=128 if required else None, metavar="N",
        help="columns a layer that are held, and trained, in more than 4 bits",
    )  # fmt: skip
    parser.add_argument(
        "--quantize", choices=["nf4", "nf4-double"], default="nf4" if required else None,
        help="quantise the 16-bit model by bitsandbytes (with scales in fp32, or in 8 bits)",
    )  # fmt: skip
    parser.add_argument("--start", choices=STARTS, help="of the columns (default: residual, in 16 bits as before)")
    parser.add_argument("--share", choices=SHARES, default="layer", help="one set of columns a layer, or for all")
    parser.add_argument(
        "--calibration", metavar="FILE", help="text that shows which columns matter (default: the task)"
    )
    if required:
        task_options(parser)
        parser.add_argument("--length", type=positive, default=2048, help="tokens of a calibration sample")
        parser.add_argument("--samples", type=positive, default=128, help="calibration samples")
        parser.add_argument("--seed", type=int, default=0, help="of the task's samples")


def attach_columns(args, model, tokenizer, samples):
    """Weak columns as ``args`` say; ``samples`` calibrate where no file does."""
    from ..quantized.attachment import attach_weak_columns

    if args.calibration is not None:
        with open(args.calibration, encoding="utf-8-sig", errors="replace") as file:
            samples = [{"text": file.read()}]
    return attach_weak_columns(
        model, args.weak_columns, calibration=samples, tokenizer=tokenizer, quantize=args.quantize, start=args.start,
        share=args.share,
    )  # fmt: skip


def run(args):
    from ..quantized.checkpoint import save_quantized
    from ..quantized.quantizers import check_method
    from ..utils.files import replacing_folder

    check_method(args.quantize, "quantize")
    with replacing_folder(args.output) as folder:  # before the model is loaded: an unusable folder is told at once
        model, tokenizer = load(args)
        samples = None
        if args.calibration is None:
            samples = task(args).generate(tokenizer, args.length, args.samples, args.seed, **prompts(args))
        columns = attach_columns(args, model, tokenizer, samples)
        count, number = columns.count(), len(columns.layers)
        save_quantized(model, folder, tokenizer)
    print(
        f"{number} layers in {args.quantize} with {args.weak_columns} weak columns each ({count:,} numbers); "
        f"saved in {args.output}"
    )


COMMAND = Command(
    "quantise a model to 4 bits, with weak columns beside it",
    "seal quantize --model smollm2 --weak-columns 128 --calibration english.txt --output smollm2-nf4",
    options,
    run,
    lambda args: f"nothing was written to {args.output}",
)
