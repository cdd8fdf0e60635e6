"""``seal merge``."""

from .options import Command, load, model_options


def options(parser):
    model_options(parser)
    parser.set_defaults(dtype="auto")  # the merged checkpoint keeps the precision of the one it came from
    parser.add_argument("--scales", required=True, metavar="DIR", help="trained scales")
    parser.add_argument("--output", required=True, metavar="DIR", help="new folder for the merged checkpoint")


def run(args):
    from ..adapters import attachment, merging
    from ..utils.files import replacing_folder

    with replacing_folder(args.output) as folder:  # before the model is loaded: an unusable folder is told at once
        model, tokenizer = load(args)
        attachment.load(model, args.scales)
        merging.merge(model).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    print(f"merged checkpoint in {args.output}, {str(model.dtype).removeprefix('torch.')}")


COMMAND = Command(
    "fold trained scales into a plain checkpoint",
    "seal merge --model models/seal-tiny --scales my-scales --output merged",
    options,
    run,
)
