"""``seal merge``."""

from .command import Command
from .options import load, model_options


def options(parser):
    model_options(parser)
    parser.set_defaults(dtype="auto")  # the merged checkpoint keeps the precision of the one it came from
    parser.add_argument("--scales", metavar="DIR", help="trained scales")
    parser.add_argument("--weak-columns", metavar="DIR", help="trained weak columns")
    parser.add_argument(
        "--in-memory", action="store_true",
        help="load the whole model and save it anew (default: multiply in copies of a folder's safetensors, one weight "
        "in memory at a time, where only --scales are merged and --dtype stays auto)",
    )  # fmt: skip
    parser.add_argument("--output", required=True, metavar="DIR", help="new folder for the merged checkpoint")


def run(args):
    from ..adapters import checkpoint_merging

    if args.scales is None and args.weak_columns is None:
        raise ValueError("--scales or --weak-columns must be given, got neither")
    folder = None if args.in_memory else _folder(args)
    if folder is None:
        _in_memory(args)
        return
    found = checkpoint_merging.merge_checkpoint(
        folder, args.scales, args.output, trust_remote_code=args.trust_remote_code
    )
    left = f"; left behind, not merged: {', '.join(found.left_behind)}" if found.left_behind else ""
    print(f"merged checkpoint in {args.output}: {len(found.merged)} weights, shards: {len(found.shards)}{left}")


def _folder(args):
    """The folder whose files can be merged one by one; None where the model has to be loaded."""
    from ..adapters.checkpoint_merging import can_merge
    from ..huggingface.model_packages import resolve

    if args.weak_columns is not None or args.dtype != "auto" or args.device_map or args.quantization:
        return None
    folder = resolve(args.model, call="seal merge")
    return folder if can_merge(folder) else None


def _in_memory(args):
    from ..adapters import attachment, merging
    from ..quantized.merging import merge_weak_columns
    from ..quantized.saving import load_weak_columns
    from ..utils.files import replacing_folder

    with replacing_folder(args.output) as folder:  # before the model is loaded: an unusable folder is told at once
        model, tokenizer = load(args)
        if args.weak_columns is not None:
            load_weak_columns(model, args.weak_columns)
            merge_weak_columns(model)
        if args.scales is not None:
            attachment.load(model, args.scales)
            merging.merge(model)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    print(f"merged checkpoint in {args.output}, {str(model.dtype).removeprefix('torch.')}")


COMMAND = Command(
    "fold trained scales or weak columns into a plain checkpoint",
    "seal merge --model models/seal-tiny --scales my-scales --output merged",
    options,
    run,
    lambda args: f"nothing was written to {args.output}",
)
