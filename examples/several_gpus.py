"""Train SEAL's scales in several processes, a GPU each: samples divided, or, with --sequence-parallel, each sample's
tokens (DeepSpeed's Ulysses). The scales are those of one process.

torchrun --nproc_per_node=2 examples/several_gpus.py --model models/seal-tiny --accumulate 2 --output my-scales
"""

import argparse
import os

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

import seal_ops

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="models/seal-tiny")
parser.add_argument("--granularity", default="channel", choices=["head", "channel"])
parser.add_argument("--length", type=int, default=2048)
parser.add_argument("--samples", type=int, default=50)
parser.add_argument("--accumulate", type=int, default=1, help="forward passes in a step, divided among the processes")
parser.add_argument("--sequence-parallel", action="store_true", help="divide tokens among the processes instead")
parser.add_argument("--gradient-checkpointing", choices=["auto", "selective", "all"], default="auto")
parser.add_argument("--output", default="my-scales")
args = parser.parse_args()

processes, place = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
device = torch.device("cuda", place) if torch.cuda.is_available() else torch.device("cpu")
if device.type == "cuda":
    torch.cuda.set_device(device)
if processes > 1:
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

tokenizer = AutoTokenizer.from_pretrained(args.model)
model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").to(device)
samples = seal_ops.tasks.lines(tokenizer, length=args.length, samples=args.samples)  # the same in every process
seal_ops.attach(model, args.granularity)  # first the scales, then Ulysses round their attention
if args.sequence_parallel:
    import deepspeed
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    deepspeed.init_distributed(auto_mpi_discovery=False)
    UlyssesSPAttentionHF.register_with_transformers(model, "seal", processes, micro_batch_size=1)
checkpointing = True if args.gradient_checkpointing == "all" else args.gradient_checkpointing
result = seal_ops.train(
    model, samples, accumulate=args.accumulate, gradient_checkpointing=checkpointing, output_dir=args.output
)
if place == 0:
    print(f"loss {result.losses[0]:.3f} -> {result.losses[-1]:.3f} in {result.seconds:.0f} s; saved in {args.output}")
if processes > 1:
    dist.destroy_process_group()
