"""Training steps of one long sample whose tokens are divided among GPUs by DeepSpeed's Ulysses.

    torchrun --nproc_per_node=4 benchmarks/sequence_parallel.py --length 262144 --output FILE
    torchrun --nproc_per_node=1 benchmarks/sequence_parallel.py --length 262144 --output FILE \\
        --gradient-checkpointing auto

A random Llama of the training suite's sizes in each process, a scale a channel, loss on the last 512 tokens, AdamW.
The steps are those of ``seal_ops.train``, as a user runs them, timed between its calls of ``on_step``: they hold the
batch's transfer, the sum of the gradients among the processes and the optimiser.  One process runs without Ulysses;
``--against FILE`` sets its steps beside those of several.

Before anything is timed, the gradients of a step at ``--check-length``, summed over the processes, must be those of one
process without Ulysses.  A stage that takes longer than ``--stage-seconds`` ends the run with the place it is at.
"""

import argparse
import datetime
import faulthandler
import importlib.metadata
import json
import os
import sys
import time
import traceback

import torch
import torch.distributed as dist
import torch.nn.functional as F

import seal_ops
from seal_ops.bench import report, timing
from seal_ops.bench.training_sizes import LABELS, SIZES
from seal_ops.bench.training_steps import Gate, Wrong, random_model
from seal_ops.huggingface.logits import logits_at
from seal_ops.huggingface.modes import prepared
from seal_ops.ops.environment import facts
from seal_ops.training.processes import Processes
from seal_ops.utils.files import atomic_write

CHECKPOINTING = {"selective": "selective", "all": True, "auto": "auto"}
RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
everywhere = Processes(RANK, PROCESSES).all  # what each process has


class Stages:
    """Says what the run is at, and ends it where one stage takes too long."""

    def __init__(self, seconds: float):
        self.seconds, self.begun = seconds, time.monotonic()

    def __call__(self, name: str) -> None:
        faulthandler.dump_traceback_later(self.seconds, exit=True, file=sys.__stderr__)
        if RANK == 0:
            print(f"[{time.monotonic() - self.begun:7.1f} s] {name}", flush=True)

    def end(self) -> None:
        faulthandler.cancel_dump_traceback_later()


def options(words=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, required=True, help="tokens of the sample, over all processes")
    parser.add_argument("--output", required=True, metavar="FILE", help="JSON with the figures and the environment")
    parser.add_argument("--model-sizes", choices=SIZES, help="8b on a GPU, tiny on a CPU")
    parser.add_argument("--layers", type=int, help="run so many of the layers only")
    parser.add_argument("--steps", type=int, default=1, help="timed steps after one that is not; 0 times that one")
    parser.add_argument("--gradient-checkpointing", choices=CHECKPOINTING, default="selective")
    parser.add_argument("--check-length", type=int, help="tokens at which gradients are compared: 8192, on tiny 64")
    parser.add_argument("--against", metavar="FILE", help="a result at the same length, to be set beside this one")
    parser.add_argument("--stage-seconds", type=float, default=300.0, help="most that one stage or step may take")
    args = parser.parse_args(words)
    args.model_sizes = args.model_sizes or ("8b" if torch.cuda.is_available() else "tiny")
    args.check_length = args.check_length or (64 if args.model_sizes == "tiny" else 8192)
    most = SIZES[args.model_sizes].layers
    args.layers = most if args.layers is None else args.layers
    for name, low, high in (("length", 4, None), ("check_length", 4, None), ("steps", 0, None), ("layers", 1, most)):
        value = getattr(args, name)
        if value < low or (high is not None and value > high):
            parser.error(f"--{name.replace('_', '-')} must be at least {low} and at most {high}, got {value}")
    return args


def register(model) -> None:
    """Lays DeepSpeed's exchange round the attention of all processes."""
    import deepspeed
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__.clear()  # it would compile collectives of its own, for minutes
    deepspeed.init_distributed(dist.get_backend(), auto_mpi_discovery=False)
    UlyssesSPAttentionHF.register_with_transformers(model, "seal", PROCESSES, micro_batch_size=1)


def sample(size, length: int) -> dict:
    """Random tokens, the last ones of them trained."""
    ids = torch.randint(0, size.vocabulary, (length,), generator=torch.Generator().manual_seed(1)).tolist()
    labels = min(LABELS, length // 2)
    return {"input_ids": ids, "labels": [-100] * (length - labels) + ids[-labels:]}


def plain_gradients(model, leaves, row: dict, device) -> list[torch.Tensor]:
    """Of one process that knows of no other, without `seal_ops.train`."""
    ids = torch.tensor([row["input_ids"]], device=device)
    labels = sum(label != -100 for label in row["labels"])
    positions = torch.arange(ids.shape[1] - labels - 1, ids.shape[1] - 1)
    with prepared(model, "selective"):
        logits = logits_at(model, positions, input_ids=ids, use_cache=False)[0]
        found = torch.autograd.grad(F.cross_entropy(logits.float(), ids[0, -labels:]), leaves)
    return [gradient.double().flatten().cpu() for gradient in found]


def steps(model, row: dict, count: int, checkpointing, device, stage: Stages):
    """``(seconds of each step, what `seal_ops.train` gives)``."""
    ends = []

    def ended(number, loss):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        ends.append(time.monotonic())
        stage(f"  step {number} of {count} has ended, loss {loss:.4f}")

    result = seal_ops.train(
        model, [row] * count, lr=1e-4, gradient_checkpointing=checkpointing, on_step=ended, progress=False
    )
    later = [end - begin for begin, end in zip(ends, ends[1:])]
    return [max(0.0, result.seconds - sum(later)), *later], result


def beside(found: dict, path: str) -> dict:
    """The ratio to a result of another number of processes.  Raises ValueError where it is none of the same step."""
    with open(path, encoding="utf-8") as file:
        other = json.load(file)
    for name in ("model", "layers", "length", "labels", "status"):
        if other[name] != found[name]:
            raise ValueError(f"--against must be of the same {name}, got {other[name]} for {found[name]}")
    chosen = ("processes", "gradient_checkpointing", "seconds_a_step", "peak_bytes")
    same_card = other["environment"]["gpu"] == found["environment"]["gpu"]
    return {name: other[name] for name in chosen} | {
        "same_gpu": same_card, "times_as_fast": other["seconds_a_step"] / found["seconds_a_step"],
    }  # fmt: skip


def main(words=None) -> int:
    """Returns 1 where the gradients are wrong."""
    args = options(words)
    stage = Stages(args.stage_seconds)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else torch.device("cpu")
    stage(f"{PROCESSES} processes meet")
    if on_gpu:
        torch.cuda.set_device(device)
    if PROCESSES > 1 and not dist.is_initialized():
        limit = datetime.timedelta(seconds=args.stage_seconds)
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=limit)
        dist.barrier()
    size, dtype = SIZES[args.model_sizes], torch.bfloat16 if on_gpu else torch.float32
    found = {
        "model": args.model_sizes, "layers": args.layers, "processes": PROCESSES, "length": args.length,
        "labels": min(LABELS, args.length // 2), "gradient_checkpointing": args.gradient_checkpointing,
        "check_length": args.check_length, "status": "not finished",
        "environment": report.environment(device) | {"deepspeed": _deepspeed()}, "facts": facts(),
    }  # fmt: skip

    def write(**more):
        found.update(more)
        if RANK == 0:
            atomic_write(args.output, json.dumps(found, indent=1) + "\n")

    write()
    stage(f"a model of {args.layers} layers is made on {found['environment']['gpu']}")
    model = random_model(size, args.layers, max(args.length, args.check_length), dtype, device)
    scales = seal_ops.attach(model, "channel")
    leaves, generator = [scale for _, scale in scales.items()], torch.Generator().manual_seed(2)
    with torch.no_grad():  # no two alike, so that one at another's place shows
        for scale in leaves:
            scale.copy_(1 + 0.2 * (torch.rand(scale.shape, generator=generator) - 0.5))
    begun = [scale.detach().clone() for scale in leaves]
    stage("the rate of a matrix product")
    side, copied = (8192, 1 << 30) if on_gpu else (128, 1 << 16)
    rates = everywhere(timing.ceilings(timing.Clock(device), dtype, side, copied).matmul_tflops)

    stage(f"gradients at {args.check_length} tokens, one process")
    gate, row, checkpointing = Gate(dtype), sample(size, args.check_length), CHECKPOINTING[args.gradient_checkpointing]
    gate(plain_gradients(model, leaves, row, device))
    if PROCESSES > 1:
        stage("DeepSpeed's exchange is laid round attention")
        register(model)
    stage(f"gradients at {args.check_length} tokens, {PROCESSES} processes")
    steps(model, row, 1, checkpointing, device, stage)
    status = "ok"
    try:
        gate([scale.grad.double().flatten().cpu() for scale in leaves])
    except Wrong as reason:
        status = str(reason)
    status = next((one for one in everywhere(status) if one != "ok"), "ok")
    write(gradient_error=gate.worst, status="not finished" if status == "ok" else status)
    stage(f"  their relative error is at most {gate.worst:.1e}: {status}")
    if status != "ok":
        stage.end()
        return 1
    with torch.no_grad():
        for scale, before in zip(leaves, begun):
            scale.copy_(before)
            scale.grad = None
    if on_gpu:
        torch.cuda.empty_cache()

    stage(f"steps of {args.length} tokens")
    seconds, result = steps(model, sample(size, args.length), 1 + args.steps, checkpointing, device, stage)
    timed = [max(each) for each in zip(*everywhere(seconds))]  # they wait for each other, but for AdamW
    first, timed = timed[0], timed[1:] or timed
    median = sorted(timed)[len(timed) // 2]
    operations, peaks = size.step_operations(args.length, args.layers), everywhere(result.peak_memory)
    write(
        seconds=timed, seconds_of_first_step=first, seconds_a_step=median, tokens_per_s=args.length / median,
        peak_bytes=max(peaks), peak_bytes_each=peaks, matmul_tflops_each=rates,
        utilisation=operations / median / (sum(rates) * 1e12), losses=result.losses, plan=result.plan, status="ok",
    )  # fmt: skip
    if args.against:
        write(against=beside(found, args.against))
    if RANK == 0:
        print(_sentence(found), flush=True)
    stage.end()
    return 0


def _deepspeed() -> str:
    try:
        return importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        return ""


def _sentence(found: dict) -> str:
    text = (
        f"{found['length']} tokens, {found['processes']} processes: {found['seconds_a_step']:.3g} s a step, "
        f"{found['tokens_per_s']:.0f} tokens/s, utilisation {found['utilisation']:.2f}, peak "
        f"{found['peak_bytes'] / 2**30:.1f} GiB a process"
    )
    if "against" in found:
        text += f"; {found['against']['times_as_fast']:.2f} times as fast as {found['against']['processes']}"
    return text


if __name__ == "__main__":
    try:
        code = main()
    except BaseException:  # the other processes may wait for this one: it goes without a farewell, torchrun ends them
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
    if PROCESSES > 1 and code == 0:
        dist.destroy_process_group()
    sys.exit(code)
