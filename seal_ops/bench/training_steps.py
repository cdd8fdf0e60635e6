"""`seal bench --suite training`: training steps of a random model, ours beside PEFT's (IA)³ on the output projections.

One sample a step, loss on the last tokens, AdamW.  Before anything is timed, the gradients of a contestant's first step
must agree with those of the contestants before it.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import gc
import io
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..adapters.attachment import attach, detach
from ..huggingface.logits import logits_at
from ..huggingface.modes import mode, prepared
from ..training.frozen_linears.conversion import converted_linears, no_fp8
from ..training.memory_plan.planning import Planner
from ..utils.files import atomic_write, replacing
from . import report, timing
from .shapes import length_name
from .training_sizes import LABELS, SIZES, Size


def random_model(size: Size, layers: int, length: int, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A model with normal weights, made on the device tensor by tensor."""
    from transformers import LlamaForCausalLM

    config = size.config(layers, length)
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    generator = torch.Generator(device).manual_seed(0)
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is None:  # a bias that is not there
                continue
            value = torch.empty(p.shape, dtype=dtype, device=device)
            value = value.fill_(1) if p.dim() == 1 else value.normal_(0, 0.02, generator=generator)
            module._parameters[name] = nn.Parameter(value, requires_grad=False)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    return model.eval()


# ----------------------------------------------------------------------------------------------------- contestants


@dataclasses.dataclass
class Step:
    """One contestant at work: its trained vectors, one a layer, its loss, and what it says about itself."""

    trained: list[nn.Parameter]
    loss: Callable[[], Tensor]
    facts: dict = dataclasses.field(default_factory=dict)


def _positions(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Positions whose next token is trained, and those tokens."""
    labels = min(LABELS, ids.shape[1] // 2)
    return torch.arange(ids.shape[1] - labels - 1, ids.shape[1] - 1), ids[0, -labels:]


@contextlib.contextmanager
def _ours(model: nn.Module, ids: Tensor, setting: bool | str, linears: str | None = None) -> Iterator[Step]:
    scales = attach(model, "channel")
    positions, targets = _positions(ids)
    try:
        with mode(model, True), converted_linears(model, linears, "seal bench"):
            planner = Planner(model, ids.shape[1], len(positions), frozen_linears=linears)
            plan = planner.plan() if setting == "auto" else planner.uniform(setting)
            facts = {"keeps": plan.summary(), "notes": "; ".join(plan.notes)}
            if setting == "auto":
                facts["expected_peak"] = plan.peak
            with planner.running(plan) as run:

                def loss():
                    logits = run.logits_at(model, positions, input_ids=ids, use_cache=False)
                    return F.cross_entropy(logits.float()[0], targets)

                yield Step([scale for _, scale in scales.items()], loss, facts)
    finally:
        detach(model)


@contextlib.contextmanager
def _ia3(model: nn.Module, ids: Tensor, tuned: bool) -> Iterator[Step]:
    import peft

    config = peft.IA3Config(target_modules=["o_proj"], feedforward_modules=["o_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    positions, targets = _positions(ids)
    labels = torch.full_like(ids, -100)
    labels[0, positions + 1] = targets
    fast = sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if tuned and ids.is_cuda else contextlib.nullcontext()
    try:
        with prepared(adapted, True), fast:

            def loss():
                if not tuned:
                    return adapted(input_ids=ids, labels=labels, use_cache=False).loss
                logits = logits_at(adapted, positions, input_ids=ids, use_cache=False)
                return F.cross_entropy(logits.float()[0], targets)

            yield Step([p for p in adapted.parameters() if p.requires_grad], loss, {"keeps": "input"})
    finally:
        adapted.unload()
        model.requires_grad_(False)


CONTESTANTS = {
    "auto": ("seal_ops, auto", lambda model, ids: _ours(model, ids, "auto")),
    "auto-fp8": ("seal_ops, auto, frozen linear layers in fp8", lambda model, ids: _ours(model, ids, "auto", "fp8")),
    "selective": ("seal_ops, selective", lambda model, ids: _ours(model, ids, "selective")),
    "inputs": ("seal_ops, every layer recomputed", lambda model, ids: _ours(model, ids, True)),
    "ia3": ("PEFT (IA)³ as written: labels, SDPA", lambda model, ids: _ia3(model, ids, False)),
    "ia3-tuned": ("PEFT (IA)³ by hand: cuDNN, logits at labels", lambda model, ids: _ia3(model, ids, True)),
}

# Contestants in fp8. Over many layers of a random model at great length, rounding to 4 bits of mantissa in each product
# leaves little of the gradients: that is its price, which stands in the row. What is wrong shows where it is small, in
# few layers and tokens: a scale left out, or another weight, differs by more than the gradients themselves.
IN_FP8 = ("auto-fp8",)
SHALLOW, SHORT, SHALLOW_TOLERANCE = 2, 256, 0.4


def _runs(contestant: str, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a contestant is among those that run where none is named."""
    return contestant not in IN_FP8 or (dtype == torch.bfloat16 and no_fp8(device) is None)


def check_shallow(contestant: str, model: nn.Module, ids: Tensor) -> None:
    """Compares the gradients of ``contestant`` with ours in 16 bits, in the first layers on the first tokens.

    Raises:
        Wrong: they differ.
    """
    gate, layers, ids = Gate(ids.dtype), model.model.layers, ids[:, :SHORT]
    gate.tolerance = SHALLOW_TOLERANCE
    model.model.layers = layers[:SHALLOW]
    try:
        for prepare in (lambda *given: _ours(*given, True), CONTESTANTS[contestant][1]):
            with prepare(model, ids) as step:
                found = torch.autograd.grad(step.loss(), step.trained)
            gate([g.double().flatten().cpu() for g in found])
    finally:
        model.model.layers = layers


# ------------------------------------------------------------------------------------------------------------ rows


def measure(step: Step, device: torch.device, steps: int, gate: Callable[[list[Tensor]], None]) -> tuple[list, int]:
    """Seconds of each timed step, after one whose gradients ``gate`` sees, and peak bytes (0 on a CPU).

    With ``steps`` 0 they are those of that first step, which also compiles and fills the allocator's pools.
    """
    optimizer = torch.optim.AdamW(step.trained, lr=1e-4, weight_decay=0.0)
    seconds, cuda = [], device.type == "cuda"
    for number in range(1 + steps):
        if number < 2 and cuda:
            torch.cuda.reset_peak_memory_stats(device)
        begun = _now(device)
        step.loss().backward()
        if number == 0:
            gate([p.grad.detach().double().flatten().cpu() for p in step.trained])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(_now(device) - begun)
    return seconds[1:] or seconds, torch.cuda.max_memory_allocated(device) if cuda else 0


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()


class Wrong(Exception):
    """A contestant's gradients are not those of the others."""


class Gate:
    """Compares gradients with those of the first contestant at a size; ``worst`` is the last one's error, or None."""

    def __init__(self, dtype: torch.dtype):
        self.tolerance = 0.1 if dtype == torch.bfloat16 else 1e-3  # of 32 layers in 16 bits
        self.expected: list[Tensor] | None = None
        self.worst: float | None = None

    def state(self, gradients: list[Tensor]) -> None:
        """Notes the error, whatever it is; what others are compared with stays theirs."""
        self.worst = None
        if self.expected is not None:
            with contextlib.suppress(Wrong):
                self(gradients)

    def __call__(self, gradients: list[Tensor]) -> None:
        self.worst = None
        if self.expected is None:
            self.expected = gradients
            return
        self.worst = max(float((g - e).norm() / e.norm()) for g, e in zip(gradients, self.expected, strict=True))
        if not self.worst <= self.tolerance:
            raise Wrong(f"wrong: relative error of the gradients {self.worst:.1e}")


FIELDS = (
    "contestant", "label", "model", "length", "layers_run", "layers", "extrapolated", "seconds", "seconds_all_layers",
    "tokens_per_s", "utilisation", "peak_bytes", "expected_peak", "keeps", "notes", "gradient_error", "steps", "status",
)  # fmt: skip


def bench_training(options: argparse.Namespace) -> int:
    """Runs the suite; returns 1 where a contestant was wrong.  Raises ValueError in one sentence."""
    started = time.monotonic()
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_gpu = device.type == "cuda"
    name = options.training_model or ("8b" if on_gpu else "tiny")
    size, dtype = SIZES[name], getattr(torch, options.dtype or ("bfloat16" if on_gpu else "float32"))
    only = [n for n in CONTESTANTS if _runs(n, dtype, device)] if options.only is None else options.only.split(",")
    for wanted, known, option in ((only, CONTESTANTS, "--only"), (options.lengths or (), dict(size.runs), "--lengths")):
        for one in wanted:
            if one not in known:
                raise ValueError(f"{option} must name some of {', '.join(map(str, known))}, got {one}")
    if options.steps < 0:
        raise ValueError(f"--steps must be at least 0, got {options.steps}")
    if options.layers is not None and not 1 <= options.layers <= size.layers:
        raise ValueError(f"--layers must be 1 to {size.layers}, the layers of {name}, got {options.layers}")
    facts = report.environment(device)
    card = facts["gpu"].removeprefix("NVIDIA ").replace(" ", "-").lower() if on_gpu else "cpu"
    stem = os.path.join(options.output, options.name or f"training-{name}-{card}")
    stored = {"environment": facts, "labels": LABELS, "rows": []}
    if options.resume and os.path.exists(stem + ".json"):
        stored = _resumed(stem + ".json", facts)
    clock = timing.Clock(device)
    if "matmul_tflops" not in stored["environment"]:
        side, copied = (8192, 1 << 30) if on_gpu else (128, 1 << 16)
        stored["environment"]["matmul_tflops"] = timing.ceilings(clock, dtype, side, copied).matmul_tflops
    rate = stored["environment"]["matmul_tflops"] * 1e12
    done, left_out = {(r["contestant"], r["length"], r["layers_run"]) for r in stored["rows"]}, 0
    for length, usual in size.runs:
        layers = options.layers or usual
        wanted = [n for n in only if (n, length, layers) not in done]
        if options.lengths and length not in options.lengths or not wanted:
            continue
        if time.monotonic() - started > options.budget_s:
            left_out += len(wanted)
            continue
        model, gate = random_model(size, layers, length, dtype, device), Gate(dtype)
        ids = torch.randint(0, size.vocabulary, (1, length), generator=torch.Generator().manual_seed(1)).to(device)
        for contestant in wanted:
            if time.monotonic() - started > options.budget_s:
                left_out += 1
                continue
            row = _row(contestant, name, length, layers, model, ids, gate, options.steps, rate)
            stored["rows"].append(row)
            _write(stem, stored)
            print(_sentence(row), flush=True)
        del model
        _tidy(device)
    if left_out:
        print(f"{left_out} rows were left out: the budget of {options.budget_s:.0f} s was used up")
    if plot(stored, stem + ".png"):
        print(f"wrote {stem}.json, .csv, .md and .png")
    return 1 if any(r["status"].startswith("wrong") for r in stored["rows"]) else 0


def _row(contestant: str, name: str, length: int, layers: int, model, ids: Tensor, gate: Gate, steps: int, rate: float):
    size, (label, prepare) = SIZES[name], CONTESTANTS[contestant]
    row = dict.fromkeys(FIELDS, "") | dict(
        contestant=contestant, label=label, model=name, length=length, layers_run=layers, layers=size.layers,
        extrapolated=layers < size.layers, steps=steps, status="ok",
    )  # fmt: skip
    try:
        if contestant in IN_FP8:
            check_shallow(contestant, model, ids)
        with prepare(model, ids) as step:
            row |= step.facts
            given = gate.state if contestant in IN_FP8 else gate
            seconds, row["peak_bytes"] = measure(step, ids.device, steps, given)
        median = statistics.median(seconds)
        row |= dict(
            seconds=median,
            seconds_all_layers=median * size.layers / layers,
            tokens_per_s=length / (median * size.layers / layers),
            utilisation=size.step_operations(length, layers) / median / rate,
            gradient_error="" if gate.worst is None else gate.worst,
        )
    except Wrong as reason:
        row["status"] = str(reason)
    except Exception as reason:  # a peer may lack a package or memory: the row says so, the run goes on
        row["status"] = f"failed: {type(reason).__name__}: {(str(reason).strip() or '?').splitlines()[0][:160]}"
    _tidy(ids.device)
    return row


def _tidy(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _resumed(path: str, facts: dict) -> dict:
    with open(path, encoding="utf-8") as file:
        stored = json.load(file)
    for name, value in facts.items():
        if stored["environment"].get(name) != value:
            raise ValueError(
                f"--resume must find an unfinished run of the same {name} {value}, got {path} with "
                f"{stored['environment'].get(name)}"
            )
    return stored


def _sentence(row: dict) -> str:
    head = f"{length_name(row['length'])} tokens, {row['label']}: "
    if row["status"] != "ok":
        return head + row["status"] + (f" ({row['notes']})" if row["notes"] else "")
    text = f"{row['seconds']:.3g} s a step, {row['tokens_per_s']:.0f} tokens/s, utilisation {row['utilisation']:.2f}"
    if row["extrapolated"]:
        text = f"{row['layers_run']} of {row['layers']} layers {text} (all: {row['seconds_all_layers']:.3g} s, extrapolated)"  # noqa: E501
    text += f", peak {row['peak_bytes'] / 2**30:.1f} GiB" if row["peak_bytes"] else ""
    return head + text + (f" ({row['notes']})" if row["notes"] else "")


def _write(stem: str, stored: dict) -> None:
    atomic_write(stem + ".json", json.dumps(stored, indent=1) + "\n")
    table = io.StringIO()
    writer = csv.DictWriter(table, (*FIELDS, *stored["environment"]), lineterminator="\n")
    writer.writeheader()
    for row in stored["rows"]:
        writer.writerow({**row, **stored["environment"]})
    atomic_write(stem + ".csv", table.getvalue())
    atomic_write(stem + ".md", markdown(stored))


def markdown(stored: dict) -> str:
    """Seconds a step of all layers and peak, contestants by length; extrapolated figures are marked."""
    rows = stored["rows"]
    lengths = sorted({r["length"] for r in rows})
    text = ["Seconds a step, peak GiB, utilisation; * extrapolated from fewer layers", ""]
    text.append("| | " + " | ".join(length_name(n) for n in lengths) + " |")
    text.append("|---" * (len(lengths) + 1) + "|")
    for name, (label, _) in CONTESTANTS.items():
        mine = {r["length"]: r for r in _by_layers(rows) if r["contestant"] == name}
        if mine:
            text.append(f"| {label} | " + " | ".join(_cell(mine.get(n)) for n in lengths) + " |")
    return "\n".join(text) + "\n"


def _by_layers(rows: list[dict]) -> list[dict]:
    """Those with the most layers last: they stand for a length that was run with several numbers of them."""
    return sorted(rows, key=lambda row: (row["status"] == "ok", row["layers_run"]))


def _cell(row: dict | None) -> str:
    if row is None:
        return "–"
    if row["status"] != "ok":
        return row["status"].split(":")[0]
    star = "*" if row["extrapolated"] else ""
    peak = f", {row['peak_bytes'] / 2**30:.1f}" if row["peak_bytes"] else ""
    return f"{row['seconds_all_layers']:.3g}{star}{peak}, {row['utilisation']:.2f}"


def _lines(axis, rows: list[dict]) -> None:
    for (name, (label, _)), marker in zip(CONTESTANTS.items(), "oDs^xv"):
        mine = {r["length"]: r["seconds_all_layers"] for r in _by_layers(rows) if r["contestant"] == name}
        if mine:
            axis.plot(*zip(*sorted(mine.items())), marker=marker, label=label)
    for length in sorted({r["length"] for r in rows if r["extrapolated"]}):
        axis.axvline(length, linestyle=":", color="grey")
        axis.annotate(
            "extrapolated", (length, 1), xycoords=("data", "axes fraction"), rotation=90, va="top", fontsize=7
        )
    axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="seconds a step")
    axis.legend(fontsize=7, frameon=False)


def plot(stored: dict, path: str) -> bool:
    """Seconds a step by length, a line a contestant (bars for one length), as PNG; False where nothing was timed."""
    rows = [r for r in stored["rows"] if r["status"] == "ok"]
    if not rows:
        return False
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lengths = sorted({r["length"] for r in rows})
    figure, axis = plt.subplots(figsize=(8, 5 if len(lengths) > 1 else 3), layout="constrained")
    if len(lengths) > 1:
        _lines(axis, rows)
    else:
        mine = {r["label"]: r["seconds_all_layers"] for r in _by_layers(rows)}
        labels = [label for label, _ in CONTESTANTS.values() if label in mine][::-1]
        bars = axis.barh(labels, [mine[label] for label in labels], color="tab:blue", height=0.6)
        axis.bar_label(bars, fmt="%.3g", padding=3)
        axis.set(xlabel=f"seconds a step, {length_name(lengths[0])} tokens")
        axis.margins(x=0.1)
    axis.set_title(f"{stored['environment']['gpu']}, torch {stored['environment']['torch']}", fontsize=9, loc="left")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    plt.close(figure)
    return True
