"""What a run leaves: rows as CSV and JSON with the facts of the machine in every row, and plots a colour-blind reader can read."""
from __future__ import annotations

import csv
import io
import json
import os
import platform
import subprocess

import torch

from ..files import atomic_write, replacing
from .contestants import Contestant

FIELDS = ("operation", "direction", "contestant", "model", "batch", "seqlen", "heads", "kv_heads", "head_dim", "window", "dtype",
          "ms", "ms_p20", "ms_p80", "calls", "tflops", "matmul_share", "gbps", "copy_share", "peak_mib", "worst_error", "status")


def environment(device: torch.device) -> dict[str, str]:
    """GPU, driver and the versions that decide speed; "" for what is not there."""
    import seal_ops
    from ..backends import extension

    module = extension()
    facts = {
        "gpu": "", "driver": "", "torch": torch.__version__, "cuda": torch.version.cuda or "",
        "cudnn": str(torch.backends.cudnn.version() or ""), "triton": _version("triton"),
        "transformers": _version("transformers"), "peft": _version("peft"), "python": platform.python_version(),
        "seal_ops": seal_ops.__version__, "commit": os.environ.get("SEAL_COMMIT") or _git("rev-parse", "--short=12", "HEAD"),
        "extension": module if isinstance(module, str) else json.dumps(module.build_facts()),
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]
    else:
        facts["gpu"] = f"none (CPU: {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads)"
    return facts


def _version(package: str) -> str:
    import importlib.metadata
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=os.path.dirname(__file__)).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _git(*arguments: str) -> str:
    return _output("git", *arguments)


class Record:
    """The rows of one run, written whole after every addition, so that a run that is cut off keeps what it measured."""

    def __init__(self, folder: str, name: str, facts: dict[str, str], command: str):
        self.stem = os.path.join(folder, name)
        self.facts, self.command = facts, command
        self.rows: list[dict] = []

    def add(self, rows: list[dict]) -> None:
        self.rows += rows
        atomic_write(self.stem + ".json", json.dumps({"command": self.command, "environment": self.facts, "rows": self.rows}, indent=1) + "\n")
        table = io.StringIO()
        writer = csv.DictWriter(table, (*FIELDS, *self.facts, "command"), lineterminator="\n")
        writer.writeheader()
        for row in self.rows:
            writer.writerow({**row, **self.facts, "command": self.command})
        atomic_write(self.stem + ".csv", table.getvalue())


# Okabe and Ito's colours: told apart with any colour vision; hatches and direct labels for print in grey.
_STYLES = {
    "seal-cuda": ("#D55E00", ""), "seal-triton": ("#E69F00", "//"), "seal-cpu": ("#D55E00", ""),
    "fa3": ("#0072B2", ""), "sdpa-cudnn": ("#56B4E9", "\\\\"), "sdpa-fa2": ("#009E73", ".."), "flex": ("#CC79A7", "xx"),
    "hf-fa3": ("#0072B2", ""), "hf-cudnn": ("#56B4E9", "\\\\"), "hf-fa2": ("#009E73", ".."),
    "hf-compiled-cudnn": ("#CC79A7", "xx"), "hf-compiled-fa2": ("#F0E442", "oo"),
    "hf-rotary": ("#0072B2", ""), "hf-rotary-compiled": ("#CC79A7", "xx"), "peft-ia3-cudnn": ("#CC79A7", "xx"),
}
_TITLES = {
    "attention": "Causal attention (seal_ops: with channel scale; peers: without)",
    "rope_attention": "Rotary embedding + causal attention + channel scale",
    "rope": "Rotary embedding of Q and K",
    "attention_o_proj": "Causal attention + channel scale + output projection",
}


def plot(rows: list[dict], contestants: list[Contestant], path: str, title: str, ceiling: dict[str, float]) -> bool:
    """Bars by shape, one panel for each operation and direction, to a PNG at `path`; False where nothing was timed."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    timed = [r for r in rows if r["status"] == "ok"]
    panels = list(dict.fromkeys((r["operation"], r["direction"]) for r in timed))
    if not panels:
        return False
    labels = {c.name: c.label for c in contestants}
    figure, axes = plt.subplots(len(panels), 1, figsize=(11, 3.4 * len(panels)), squeeze=False, layout="constrained")
    for axis, (operation, direction) in zip(axes[:, 0], panels):
        here = [r for r in timed if (r["operation"], r["direction"]) == (operation, direction)]
        unit, top = ("gbps", "copy_gbps") if operation == "rope" else ("tflops", "matmul_tflops")
        shapes = list(dict.fromkeys((r["model"], r["seqlen"], r["batch"]) for r in here))
        names = [c.name for c in contestants if any(r["contestant"] == c.name for r in here)]
        width = 0.86 / len(names)
        for n, name in enumerate(names):
            colour, hatch = _STYLES.get(name, ("#999999", ""))
            values = {(r["model"], r["seqlen"], r["batch"]): r[unit] for r in here if r["contestant"] == name}
            at = [s for s in shapes if s in values]
            bars = axis.bar([shapes.index(s) + (n - (len(names) - 1) / 2) * width for s in at], [values[s] for s in at], width,
                            color=colour, hatch=hatch, edgecolor="white", linewidth=0.4, label=labels.get(name, name))
            axis.bar_label(bars, fmt="%.0f", fontsize=6, padding=1)
        if ceiling.get(top):
            axis.axhline(ceiling[top], color="black", linewidth=0.8, linestyle="--")
            axis.annotate("matrix product" if top == "matmul_tflops" else "copy", (1, ceiling[top]), xycoords=("axes fraction", "data"),
                          ha="right", va="bottom", fontsize=7)
        axis.set_xticks(range(len(shapes)), [f"{m}\n{s // 1024 if s >= 1024 else s}{'k' if s >= 1024 else ''} × {b}" for m, s, b in shapes], fontsize=8)
        axis.set_ylabel("GB/s" if unit == "gbps" else "TFLOP/s")
        axis.set_title(f"{_TITLES[operation]}: {direction}", fontsize=10, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=7, frameon=False, ncols=len(names), loc="lower left", bbox_to_anchor=(0, -0.34))
    figure.suptitle(title, fontsize=9, x=0.01, ha="left")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    plt.close(figure)
    return True
