"""Seconds of SEAL's recipe from end to end: samples made, scales attached, trained on 50 samples of 31k tokens, saved.

    python benchmarks/paper_recipe.py [--sizes 7b] [--samples 50] [--length 31744] [--output FILE]

A random model of Llama-2-7B's sizes in bf16, made on the GPU; what is made before the clock starts is the model alone.
The settings are ``seal_ops.train``'s own, but for ``--learning-rate``: random weights learn nothing, and a small rate
keeps the loss finite.  ``--sizes tiny`` runs everything on a CPU in seconds, to see that it runs.
Source of the recipe: the SEAL paper (arXiv:2501.15225), 40 minutes on an A100 for a 7B model.
"""

import argparse
import json
import tempfile
import time

import torch

import seal_ops
from seal_ops.bench.training_sizes import Size
from seal_ops.bench.training_steps import random_model
from seal_ops.huggingface.loading import load_tokenizer, shipped
from seal_ops.ops.environment import facts
from seal_ops.utils.files import atomic_write

SIZES = {
    "7b": Size(4096, 11008, 32, 32, 32_000, 32, ()),
    "tiny": Size(64, 128, 4, 2, 8_192, 2, ()),
}


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", choices=SIZES, default="7b")
    parser.add_argument("--samples", type=int, default=50)
    parser.add_argument("--length", type=int, default=31_744, help="tokens of a sample")
    parser.add_argument("--granularity", choices=["head", "channel"], default="channel")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--output", metavar="FILE", help="JSON with the figures and the environment")
    args = parser.parse_args(words)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = random_model(SIZES[args.sizes], SIZES[args.sizes].layers, args.length, dtype, device)
    tokenizer = load_tokenizer(shipped("models/seal-tiny"), "paper_recipe")
    begun = time.monotonic()
    samples = seal_ops.tasks.lines(tokenizer, length=args.length, samples=args.samples)
    made = time.monotonic() - begun
    scales = seal_ops.attach(model, args.granularity)
    with tempfile.TemporaryDirectory() as folder:
        result = seal_ops.train(model, samples, lr=args.learning_rate, output_dir=folder)
        scales.save_pretrained(folder)
    found = {
        "settings": vars(args) | {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"},
        "seconds": round(time.monotonic() - begun, 2),
        "seconds of the samples": round(made, 2),
        "seconds of training": round(result.seconds, 2),
        "seconds a step": round(result.seconds / len(result.losses), 3),
        "steps": len(result.losses),
        "peak_memory": result.peak_memory,
        "plan": result.plan,
    }
    print(json.dumps(found, indent=1))
    if args.output:
        atomic_write(args.output, json.dumps(found | {"environment": facts()}, indent=1) + "\n")
    return found


if __name__ == "__main__":
    main()
