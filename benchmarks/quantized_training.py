"""Calibration, training step and memory of weak columns, QLoRA and SEAL on a 4-bit model of 8B parameters.

    python benchmarks/quantized_training.py --output FILE.json [--budget-s 540] [--only calibration training pieces]
        [--methods NAME ...] [--sizes 8x2048 1x8192 1x31744 1x8192-kept]

Random weights of Llama-3-8B's sizes, made on the GPU.  One process, one card, so that all rows compare.  Every cell is
written to FILE.json as it is done, and a second run with the same file does what is left; no cell is begun that would
end after the budget.  ``--shape tiny`` runs everything in seconds on a CPU, to see that it runs.

Training: NF4 base (bitsandbytes, groups of 64), gradient checkpointing of whole layers except where all activations are
kept, bf16, fused AdamW, the loss on the last 512 tokens of each row; a step is forward, backward and optimiser; the
median of the timed steps.  ``QLoRA`` is PEFT's LoRA of rank 64 on all linear layers: its default, fp32 adapters, under
bf16 autocast as Trainer runs it, and with bf16 adapters; its loss is PyTorch's on fp32 logits, as in transformers.
The other rows, and ``QLoRA, the library's loss``, have the loss of ``seal_ops.train``, which keeps no fp32 logits.
Rows ``in tiles`` run as ``seal_ops.train`` does: the library's own checkpoints, MLPs and norms in tiles, in the last
layer only the rows that the loss reads.  Rows ``planned`` have the plan that ``gradient_checkpointing="auto"`` makes
for a card on which 0.88 of QLoRA's peak is all there is: at the same size, with trained numbers of the same dtype.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import statistics
import time

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import seal_ops
from seal_ops.experiments.quantized_study.workbench import low_rank
from seal_ops.huggingface.logits import logits_at
from seal_ops.huggingface.modes import mode, prepared
from seal_ops.ops.environment import facts
from seal_ops.quantized import bases, calibration
from seal_ops.quantized.attachment import find_targets
from seal_ops.quantized.quantizers import quantize_layers
from seal_ops.training.losses import summed_cross_entropy
from seal_ops.training.memory_plan import memory
from seal_ops.training.memory_plan.planning import Planner
from seal_ops.training.memory_plan.tiling import TILE
from seal_ops.utils.files import atomic_write

SHAPES = {
    "8b": dict(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128_256, max_position_embeddings=131_072,
    ),
    "tiny": dict(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=512, max_position_embeddings=4096,
    ),
}  # fmt: skip
# Rows, tokens, and whether layers are recomputed in the backward pass.
SIZES = {
    "8b": ((8, 2048, True), (1, 8192, True), (1, 31_744, True), (1, 8192, False)),
    "tiny": ((2, 64, True), (1, 128, False)),
}
SAMPLES = {"8b": (128, 2048), "tiny": (4, 64)}
COLUMNS = {"8b": 128, "tiny": 16}
METHODS = (
    "QLoRA, autocast", "QLoRA, bf16 adapters", "weak columns", "weak columns + SEAL-C", "SEAL-C",
    "weak columns in bf16", "weak columns, 8 a layer", "QLoRA, the library's loss",
    "weak columns, in tiles", "weak columns, planned", "weak columns in bf16, planned",
    "weak columns + SEAL-C, planned",
)  # fmt: skip
LABELS = 512
PLANNED = 0.88  # of QLoRA's peak, so that the aim of 0.9 leaves something for what a plan does not foresee


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, metavar="FILE", help="JSON; a second run continues it")
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="begin no cell that would end later")
    parser.add_argument("--only", nargs="+", choices=["calibration", "training", "pieces"], default=None)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="NAME", help="rows to train")
    every = [size_name(size) for sizes in SIZES.values() for size in sizes]
    parser.add_argument("--sizes", nargs="+", choices=every, default=every, help="columns to train")
    parser.add_argument("--steps", type=int, default=3, help="timed steps, after one that is not")
    args = parser.parse_args()
    run = Run(args)
    for part in args.only or ("calibration", "training", "pieces"):
        getattr(run, part)()
    print(table(run.result), page(run.result), sep="\n\n")


class Run:
    def __init__(self, args):
        self.args, self.started = args, time.monotonic()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.result = {"cells": {}}
        if os.path.exists(args.output):
            with open(args.output, encoding="utf-8") as file:
                self.result = json.load(file)
        if self.result.get("shape", args.shape) != args.shape:
            raise SystemExit(f"--output {args.output} holds the shape {self.result['shape']}, got --shape {args.shape}")
        gpu = torch.cuda.get_device_name() if self.device.type == "cuda" else None
        self.result |= {"shape": args.shape, "gpu": gpu, "environment": facts()}

    def open(self, key: str, seconds: float) -> bool:
        """Whether a cell is to be done, and fits."""
        if key in self.result["cells"]:
            return False
        if self.args.shape != "8b":
            return True
        left = self.args.budget_s - (time.monotonic() - self.started)
        if seconds > left:
            print(f"{key}: left for another run ({seconds:.0f} s wanted, {left:.0f} s left)", flush=True)
        return seconds <= left

    def note(self, key: str, **found) -> None:
        found = {k: round(v, 4) if isinstance(v, float) else v for k, v in found.items()}
        self.result["cells"][key] = {**found, "gpu": self.result["gpu"]}
        atomic_write(self.args.output, json.dumps(self.result, indent=1) + "\n")
        print(f"{key}: {found}", flush=True)

    # --------------------------------------------------------------------------------------------------- models

    def model(self):
        """16 bits, random, made on the device layer by layer."""
        config = LlamaConfig(**SHAPES[self.args.shape], rope_theta=500_000.0, tie_word_embeddings=False)
        config._attn_implementation = "sdpa"
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        generator = torch.Generator(self.device).manual_seed(0)
        for module in model.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    value = torch.empty(p.shape, dtype=torch.bfloat16, device=self.device)
                    value = value.fill_(1) if p.dim() == 1 else value.normal_(0, 0.02, generator=generator)
                    module._parameters[name] = torch.nn.Parameter(value, requires_grad=False)
        model.model.rotary_emb = type(model.model.rotary_emb)(config).to(self.device)
        return model.eval()

    def pieces_of_text(self, count, length):
        generator = torch.Generator().manual_seed(1)
        vocabulary = SHAPES[self.args.shape]["vocab_size"]
        return torch.randint(0, vocabulary, (count, length), generator=generator).tolist()

    def synchronised(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.monotonic()

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0

    def fresh(self) -> None:
        gc.collect()  # modules and parameters of a model know each other: without this an earlier one is still there
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    # --------------------------------------------------------------------------------------------- calibration

    def calibration(self):
        """Seconds and peak memory of choosing the columns, and of a whole attach with quantisation."""
        texts, columns = self.pieces_of_text(*SAMPLES[self.args.shape]), COLUMNS[self.args.shape]
        if self.open("calibration: choose", 40):
            model = self.model()
            size = sum(p.numel() * p.element_size() for p in model.parameters())
            targets = find_targets(model, None, "benchmark")
            calibration.read(model, targets, texts[:2])
            self.fresh()
            begun = self.synchronised()
            calibration.read(model, targets, texts)
            seconds = self.synchronised() - begun
            self.note("calibration: choose", seconds=seconds, peak=self.peak(), model_bytes=size)
            del model, targets
        for start, expected in (("residual", 60), ("least_squares", 120)):
            key = f"calibration: {start}"
            if not self.open(key, expected):
                continue
            self.fresh()
            model = self.model()
            size = sum(p.numel() * p.element_size() for p in model.parameters())
            self.fresh()
            begun = self.synchronised()
            found = seal_ops.attach_weak_columns(model, columns, calibration=texts, quantize="nf4", start=start)
            seconds = self.synchronised() - begun
            left = sum(p.numel() * p.element_size() for p in model.parameters())
            self.note(
                key, seconds=seconds, peak=self.peak(), model_bytes=size, bytes_after=left, trained=found.count()
            )  # fmt: skip
            del model, found
        self.fresh()

    # ------------------------------------------------------------------------------------------------ training

    def training(self):
        sizes = [size for size in SIZES[self.args.shape] if size_name(size) in self.args.sizes]
        methods = [method for method in METHODS if method in self.args.methods]
        wanted = [(method, size) for size in sizes for method in methods if size[2] or not planned(method)]
        costs = {key: self.cost(*key[1]) + 10 * planned(key[0]) for key in wanted}  # short samples are measured first
        wanted = [key for key in wanted if self.open(cell(*key), costs[key] + 30)]
        if not wanted:
            return
        model = self.model()
        quantize_layers(model, find_targets(model, None, "benchmark"), "nf4")
        # The columns are those of a few samples: which they are costs the same time.
        index = {}
        for method, size in wanted:
            if not self.open(cell(method, size), costs[method, size]):
                continue
            with self.method(model, method, index) as (trained, context):
                try:
                    theirs = method.startswith("QLoRA") and not method.endswith("the library's loss")
                    self.time_steps(trained, context, torchs_loss if theirs else summed_cross_entropy, method, size)
                except torch.OutOfMemoryError as error:
                    self.note(cell(method, size), failed=str(error).splitlines()[0][:200])
            self.fresh()

    def cost(self, batch, length, recomputed) -> float:
        """Seconds that a cell takes, roughly."""
        tokens = batch * length
        return (2 + self.args.steps) * (tokens * 1.2e-4 + batch * (length / 1000) ** 2 * 2e-3) + 5

    @contextlib.contextmanager
    def method(self, model, method, index):
        """The model with a method's trained values, and the context in which its steps run."""
        context = contextlib.nullcontext
        if method.startswith("QLoRA"):
            automatic = not method.endswith("bf16 adapters")
            trained = low_rank(model, autocast_adapter_dtype=automatic)
            if automatic:
                context = lambda: torch.autocast(self.device.type, torch.bfloat16)
            else:
                for p in trained.parameters():
                    if p.requires_grad:
                        p.data = p.data.to(torch.bfloat16)
            try:
                yield trained, context
            finally:
                trained.unload()
                model.requires_grad_(False)
            return
        if method.startswith("weak"):
            few, dtype = "8 a layer" in method, torch.bfloat16 if "bf16" in method else torch.float32
            columns = 8 if few else index or COLUMNS[self.args.shape]
            texts = self.pieces_of_text(4, SAMPLES[self.args.shape][1])
            found = seal_ops.attach_weak_columns(model, columns, calibration=texts, dtype=dtype)
            if not few:
                index |= {name: i.tolist() for name, i in found.indices().items()}
        if "SEAL-C" in method:
            seal_ops.attach(model, "channel")
        try:
            yield model, context
        finally:
            if "SEAL-C" in method:
                seal_ops.detach(model)
            if method.startswith("weak"):
                seal_ops.detach_weak_columns(model)
            model.requires_grad_(False)

    def time_steps(self, model, context, loss_of, method, size):
        batch, length, recomputed = size
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=self.device.type == "cuda")
        generator = torch.Generator().manual_seed(2)
        ids = torch.randint(0, SHAPES[self.args.shape]["vocab_size"], (batch, length), generator=generator)
        ids = ids.to(self.device)
        labels = min(LABELS, length // 2)
        places = torch.arange(length - labels - 1, length - 1)
        self.fresh()
        seconds, peaks = [], []
        with self.running(model, method, size, labels) as (logits_of, plan):
            for step in range(1 + self.args.steps):
                if step == 1 and self.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()  # a step with the optimiser's state there from the start
                begun = self.synchronised()
                with context():
                    logits = logits_of(model, places, input_ids=ids, use_cache=False)
                    loss = loss_of(logits.flatten(0, 1), ids[:, -labels:].flatten()) / (batch * labels)
                del logits  # a caller of its own has no more use for them
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                seconds.append(self.synchronised() - begun)
                peaks.append(self.peak())
        self.note(
            cell(method, size),
            seconds=statistics.median(seconds[1:]), all_seconds=[round(s, 4) for s in seconds], peak=max(peaks),
            trained=sum(p.numel() for p in parameters), loss=float(loss.detach()),
            tokens_per_second=batch * length / statistics.median(seconds[1:]), **plan,
        )  # fmt: skip

    @contextlib.contextmanager
    def running(self, model, method, size, labels):
        """What gives the logits while the steps of a method run, and the facts of their plan."""
        batch, length, recomputed = size
        if not planned(method):
            with prepared(model, recomputed):
                yield logits_at, {}
            return
        with mode(model, True):
            planner = Planner(model, length, labels, batch)
            if method.endswith("in tiles"):
                plan = planner.uniform(True, TILE)
            else:
                plan = planner.plan(self.allowed(method, size))
            self.fresh()
            with planner.running(plan) as execution:
                yield execution.logits_at, {"plan": plan.facts()}

    def allowed(self, method, size) -> int:
        """Bytes that a planned step may take beside the model."""
        theirs = METHODS["bf16" in method]
        peak = self.result["cells"].get(cell(theirs, size), {}).get("peak")
        if peak is None:
            raise SystemExit(f"a planned row needs the peak of {theirs}, got none at {size_name(size)}")
        return max(1, round(PLANNED * peak) - memory.used(self.device))

    # -------------------------------------------------------------------------------------------------- pieces

    def pieces(self):
        """Milliseconds of what one layer's product with weak columns is made of, and of a step of the whole model."""
        shape = SHAPES[self.args.shape]
        hidden, inner = shape["hidden_size"], shape["intermediate_size"]
        kv = hidden * shape["num_key_value_heads"] // shape["num_attention_heads"]
        layers = {
            "q, o": (hidden, hidden, 2),
            "k, v": (hidden, kv, 2),
            "gate, up": (hidden, inner, 2),
            "down": (inner, hidden, 1),
        }
        tokens, k = 16_384 if self.args.shape == "8b" else 256, COLUMNS[self.args.shape]
        for name, (columns, rows, count) in layers.items():
            if self.open(f"pieces: {name}", 10):
                found = self.timed_pieces(columns, rows, tokens, k)
                self.note(f"pieces: {name}", **found, tokens=tokens, columns=k, per_layer=count)

    def timed_pieces(self, columns, rows, tokens, k):
        from seal_ops.quantized.quantizers import quantized

        linear = torch.nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16, device=self.device)
        module = quantized(linear, "nf4", "layer", "benchmark")
        weight = bases.weight_of(module)
        x = torch.randn(tokens, columns, dtype=torch.bfloat16, device=self.device)
        g = torch.randn(tokens, rows, dtype=torch.bfloat16, device=self.device)
        index = torch.randperm(columns, device=self.device)[:k].sort().values
        delta = torch.randn(rows, k, device=self.device) * 0.01
        picked, y, narrow = x.index_select(1, index), torch.empty_like(g), delta.to(torch.bfloat16)
        back = g @ narrow
        work = {
            "base written out": lambda: bases.weight_of(module),
            "base's product": lambda: torch.mm(x, weight.t(), out=y),
            "gather of x": lambda: x.index_select(1, index),
            "skinny product, forward": lambda: y.addmm_(picked, delta.to(torch.bfloat16).t()),
            "skinny product, backward": lambda: g @ delta.to(torch.bfloat16),
            "gradient of the columns": lambda: (g.t() @ picked).to(delta.dtype),
            "index_add": lambda: x.index_add_(1, index, back),
        }
        return {name: self.milliseconds(function) for name, function in work.items()}

    def milliseconds(self, function) -> float:
        if self.device.type == "cuda":
            from triton.testing import do_bench

            return do_bench(function, warmup=10, rep=50, return_mode="median")
        begun = time.monotonic()
        function()
        return 1e3 * (time.monotonic() - begun)


def torchs_loss(logits, targets):
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def planned(method: str) -> bool:
    """Whether the library's own execution runs a row's steps."""
    return method.endswith(("in tiles", "planned"))


def size_name(size: tuple[int, int, bool]) -> str:
    """A size as ``--sizes`` names it."""
    batch, length, recomputed = size
    return f"{batch}x{length}" + ("" if recomputed else "-kept")


def cell(method: str, size: tuple[int, int, bool]) -> str:
    """The name of a training cell."""
    batch, length, recomputed = size
    return f"training: {method}, {batch} x {length}" + ("" if recomputed else ", all activations kept")


def table(result: dict) -> str:
    """The cells as a page shows them."""
    lines, cells = [f"{result['gpu']}"], result["cells"]
    for key, cell in cells.items():
        if key.startswith("calibration"):
            share = f"{cell['peak'] / cell['model_bytes']:.2f} x the model" if cell["peak"] else ""
            lines.append(f"{key}: {cell['seconds']:.1f} s, peak {cell['peak'] / 2**30:.1f} GiB {share}")
    for key, cell in cells.items():
        if key.startswith("training") and "seconds" in cell:
            plan = cell.get("plan")
            kept = f"; {plan['layers']}, groups of {plan['group']}, tiles of {plan['tile']}" if plan else ""
            peak = cell["peak"] / 2**30
            lines.append(f"{key}: {cell['seconds']:.3f} s, peak {peak:.2f} GiB, trained {cell['trained']:,}{kept}")
        elif key.startswith("training"):
            lines.append(f"{key}: {cell['failed']}")
    whole: dict[str, float] = {}
    layers = SHAPES[result["shape"]]["num_hidden_layers"]
    for key, cell in cells.items():
        if key.startswith("pieces"):
            for name, value in cell.items():
                if name not in ("tokens", "columns", "per_layer", "gpu"):
                    whole[name] = whole.get(name, 0.0) + value * cell["per_layer"] * layers
    if whole:
        lines.append("pieces, ms once through the whole model: " + ", ".join(f"{n} {v:.1f}" for n, v in whole.items()))
    return "\n".join(lines)


def page(result: dict) -> str:
    """The tables of docs/qeft.md."""
    cells, gib = result["cells"], 2**30
    lines = ["| | seconds | peak, as a multiple of the 16-bit model |", "|---|---|---|"]
    for key, found in cells.items():
        if key.startswith("calibration") and found["peak"]:
            share = found["peak"] / found["model_bytes"]
            lines.append(f"| {key.partition(': ')[2]} | {found['seconds']:.1f} | {share:.2f} |")
    sizes = [s for s in SIZES[result["shape"]] if cell(METHODS[0], s) in cells]
    heads = [f"{b} × {n:,}" + ("" if recomputed else ", activations kept") for b, n, recomputed in sizes]
    lines += [
        "",
        f"| seconds a step, peak in GiB | trained numbers | {' | '.join(heads)} |",
        "|---" * (2 + len(sizes)) + "|",
    ]
    for method in METHODS:
        found = [cells.get(cell(method, size), {}) for size in sizes]
        trained = next((f["trained"] for f in found if "trained" in f), None)
        if trained is not None:
            shown = [f"{f['seconds']:.3f}, {f['peak'] / gib:.2f}" if "seconds" in f else "–" for f in found]
            lines.append(f"| {method} | {trained:,} | {' | '.join(shown)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
