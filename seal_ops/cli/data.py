"""``seal data``."""

from .command import Command
from .option_types import positive
from .options import prompts, task, task_options


def options(parser):
    parser.add_argument("--tokenizer", required=True, metavar="NAME", help="tokenizer's folder, or name on the hub")
    task_options(parser)
    parser.add_argument("--length", type=positive, required=True, help="tokens a sample fills")
    parser.add_argument("--samples", type=positive, default=50, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="draws the samples")
    parser.add_argument("--split", choices=["train", "test"], default="train", help="never share random numbers")
    parser.add_argument("--output", required=True, metavar="FILE", help="JSON lines, one sample each")


def run(args):
    from .. import tasks
    from ..huggingface.loading import load_tokenizer

    tokenizer = load_tokenizer(args.tokenizer, "seal data")
    samples = task(args).generate(tokenizer, args.length, args.samples, args.seed, split=args.split, **prompts(args))
    tasks.write(args.output, samples)
    print(f"{len(samples)} samples of {min(map(len, samples))} to {max(map(len, samples))} tokens in {args.output}")


COMMAND = Command(
    "write samples of a task to a file",
    "seal data --tokenizer models/seal-tiny --task lines --length 2048 --samples 50 --output lines.jsonl",
    options,
    run,
)
