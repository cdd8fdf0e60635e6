"""``seal env``."""

from .command import Command
from .options import model_options


def options(parser):
    model_options(parser, required=False)
    parser.description += " With --model also what runs fused in that model."


def run(args):
    from ..huggingface.decoding import describe
    from ..ops.environment import report

    print(report())
    print(f"\nfused steps over part of a cache: {describe()}")
    if args.model is None:
        return
    from ..adapters.attachment import attach
    from ..huggingface.loading import load_model, shipped

    model, _ = load_model(shipped(args.model), device=args.device, dtype=args.dtype, call="seal env")
    print(f"\n{args.model}: {attach(model).attachment.patch.summary()}")


COMMAND = Command(
    "versions, what was built, which backend each op uses and why",
    "seal env\nseal env --model models/seal-tiny",
    options,
    run,
)
