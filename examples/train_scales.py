"""Train SEAL's scales on generated samples, measure before and after, save, merge.

python examples/train_scales.py --model models/seal-tiny --length 2048 --output my-scales
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

import seal_ops

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="models/seal-tiny")
parser.add_argument("--granularity", default="head", choices=["head", "channel"])
parser.add_argument("--length", type=int, default=2048)
parser.add_argument("--samples", type=int, default=50)
parser.add_argument("--cases", type=int, default=20)
parser.add_argument("--output", default="my-scales")
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
model = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32")


def retrieval(name):
    lengths = [args.length // 2, args.length]
    result = seal_ops.evaluate(model, tokenizer, seal_ops.tasks.lines, lengths, args.cases, name=name)
    print(f"{name:8s}", {length: str(cell) for length, cell in result.accuracy.items()})


retrieval("base")
scales = seal_ops.attach(model, args.granularity)  # the only trainable parameters from here on
samples = seal_ops.tasks.lines(tokenizer, length=args.length, samples=args.samples)
seal_ops.train(model, samples)
scales.save_pretrained(args.output)  # safetensors and json, kilobytes
retrieval("trained")

with seal_ops.disabled(model):  # the untouched model, without unloading anything
    retrieval("disabled")
seal_ops.merge(model)  # plain Hugging Face weights again
retrieval("merged")
