"""What a run leaves: rows as CSV and JSON with the facts of the machine in every row, and plots a colour-blind reader
can read."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import platform
import statistics
import subprocess

import torch

from ..utils.files import atomic_write, replacing
from .contestants import FORWARD_ONLY, Contestant
from .shapes import MODELS, length_name

FIELDS = (
    "operation",
    "direction",
    "contestant",
    "model",
    "batch",
    "seqlen",
    "heads",
    "kv_heads",
    "head_dim",
    "window",
    "dtype",
    "ms",
    "ms_p20",
    "ms_p80",
    "calls",
    "tflops",
    "matmul_share",
    "gbps",
    "copy_share",
    "peak_mib",
    "worst_error",
    "status",
)


def environment(device: torch.device) -> dict[str, str]:
    """GPU, driver and the versions that decide speed; "" for what is not there."""
    from ..ops.dispatch import extension
    from ..version import __version__

    module = extension()
    facts = {
        "gpu": "",
        "driver": "",
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "cudnn": str(torch.backends.cudnn.version() or ""),
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "peft": _version("peft"),
        "python": platform.python_version(),
        "seal_ops": __version__,
        "commit": os.environ.get("SEAL_COMMIT") or _git("rev-parse", "--short=12", "HEAD"),
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
        return subprocess.run(
            command, capture_output=True, text=True, timeout=20, cwd=os.path.dirname(__file__)
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _git(*arguments: str) -> str:
    return _output("git", *arguments)


@dataclasses.dataclass
class Measured:
    """What one process measured: its command, the facts of its machine and its rows."""

    command: str
    environment: dict[str, str]
    rows: list[dict]


class Record:
    """Result files of one run, or of several put together; written whole after every addition, so that a run that is
    cut off keeps what it measured."""

    def __init__(self, folder: str, name: str, runs: list[Measured], command: str):
        self.stem = os.path.join(folder, name)
        self.runs, self.command = runs, command

    @property
    def rows(self) -> list[dict]:
        return sorted(
            (row for run in self.runs for row in run.rows),
            key=lambda r: (list(TITLES).index(r["operation"]), list(MODELS).index(r["model"]), r["seqlen"]),
        )

    def add(self, rows: list[dict]) -> None:
        """Rows of the last run."""
        self.runs[-1].rows += rows
        self.save()

    def save(self) -> None:
        """NAME.json and NAME.csv; every row of the CSV carries its own run's command and facts."""
        stored = (
            dataclasses.asdict(self.runs[0])
            if len(self.runs) == 1
            else {"command": self.command, "runs": list(map(dataclasses.asdict, self.runs))}
        )
        atomic_write(self.stem + ".json", json.dumps(stored, indent=1) + "\n")
        table = io.StringIO()
        writer = csv.DictWriter(
            table,
            (*FIELDS, *dict.fromkeys(name for run in self.runs for name in run.environment), "command"),
            lineterminator="\n",
        )
        writer.writeheader()
        for run in self.runs:
            for row in run.rows:
                writer.writerow({**row, **run.environment, "command": run.command})
        atomic_write(self.stem + ".csv", table.getvalue())

    def finish(self, contestants: list[Contestant]) -> None:
        """NAME.png and NAME.md of what was timed, if anything was."""
        facts = self.runs[0].environment
        title = f"{facts['gpu']}, driver {facts['driver']}, torch {facts['torch']}, {facts['commit']}; {self.runs[0].command if len(self.runs) == 1 else self.command}"  # noqa: E501
        ceilings = {
            name: statistics.fmean(float(run.environment[name]) for run in self.runs)
            for name in ("matmul_tflops", "copy_gbps")
            if all(name in run.environment for run in self.runs)
        }
        if plot(self.rows, contestants, self.stem + ".png", title, ceilings):
            commands = "".join(f"- `{run.command}`\n" for run in self.runs) if len(self.runs) > 1 else ""
            atomic_write(self.stem + ".md", f"{title}\n{commands}\n{markdown(self.rows, contestants)}")
            print(f"wrote {self.stem}.csv, .json, .md and .png")


def load(path: str) -> list[Measured]:
    """The runs of a result file. Raises ValueError in one sentence where it is none."""
    try:
        with open(path) as file:
            stored = json.load(file)
        return [Measured(**run) for run in stored.get("runs", [stored])]
    except (OSError, ValueError, TypeError, AttributeError) as reason:
        raise ValueError(f"expected a JSON file that seal bench wrote, got {path} ({reason})") from None


def group_key(row: dict) -> tuple:
    """An operation at a shape: figures are compared within it, so all of them come from one process."""
    return row["operation"], row["model"], row["batch"], row["seqlen"]


def joined(paths: list[str]) -> list[Measured]:
    """The runs of several files, for one report. Raises ValueError where an operation at a shape was measured twice or
    the runs are not of one kind of card, driver, torch and commit."""
    runs, seen = [], {}
    for path in paths:
        found = load(path)
        for key in {group_key(row) for run in found for row in run.rows}:
            if key in seen:
                raise ValueError(
                    f"--merge must get every operation at a shape from one file, got {' '.join(map(str, key))} from {seen[key]} and {path}"  # noqa: E501
                )
            seen[key] = path
        runs += found
    for name in ("gpu", "driver", "torch", "commit", "extension"):
        values = sorted({run.environment.get(name, "") for run in runs})
        if len(values) > 1:
            raise ValueError(f"--merge must get files of one {name}, got {' and '.join(values)}")
    return runs


TITLES = {
    "attention": "Causal attention (seal_ops with channel scale, peers without)",
    "rope_attention": "Rotary embedding + causal attention + channel scale",
    "rope": "Rotary embedding of Q and K",
    "attention_o_proj": "Causal attention + channel scale + output projection",
    "decode": "One query over a cache of keys (seal_ops with channel scale, peers without)",
}
FORWARD_FLOPS_SHARE = 1 / 3.5  # of forward and backward together


def _figure(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def _shape_key(row: dict) -> tuple:
    return row["model"], row["seqlen"], row["batch"]


def _shape_label(key: tuple) -> str:
    model, seqlen, batch = key
    return f"{model} {length_name(seqlen)} × {batch}"


def _cell(found: dict[str, dict], base: dict[str, dict] | None = None) -> str:
    """forward / backward / both of one contestant at one shape: TFLOP/s (GB/s for rope), or how many times faster than
    `base`."""
    if "gbps" in found["forward"] and found["forward"]["gbps"] != "":
        if base:
            return f"{base['forward']['ms'] / found['forward']['ms']:.2f}"
        share = found["forward"]["copy_share"]
        return _figure(found["forward"]["gbps"]) + (f" ({share:.0%})" if share != "" else "")
    times = lambda rows: (rows["forward"]["ms"], rows["backward"]["ms"], rows["forward"]["ms"] + rows["backward"]["ms"])
    if base:
        return " / ".join(f"{theirs / ours:.2f}" for ours, theirs in zip(times(found), times(base)))
    both = found["forward"]["tflops"] * found["forward"]["ms"] / FORWARD_FLOPS_SHARE / times(found)[2]
    return " / ".join(map(_figure, (found["forward"]["tflops"], found["backward"]["tflops"], both)))


def markdown(rows: list[dict], contestants: list[Contestant]) -> str:
    """Tables to read: for every operation shapes by contestants, and how many times faster ours is than each peer."""
    text = []
    for operation, title in TITLES.items():
        here = [r for r in rows if r["operation"] == operation and r["status"] == "ok"]
        shown = [c for c in contestants if any(r["contestant"] == c.name for r in here)]
        found = {
            (c.name, key): {r["direction"]: r for r in here if r["contestant"] == c.name and _shape_key(r) == key}
            for c in shown
            for key in map(_shape_key, here)
        }
        parts = "" if operation in FORWARD_ONLY else ", forward / backward / both"
        unit = {"rope": "GB/s read + written (share of the copy)", "decode": "GB/s read (share of the copy)"}.get(
            operation, f"TFLOP/s{parts}"
        )
        tables = [(f"{title}**: {unit}", shown, None)]
        if shown and shown[0].name.startswith("seal-"):
            tables.append((f"Times faster {shown[0].label} is**{parts}", shown[1:], shown[0].name))
        for heading, columns, ours in tables if shown else ():
            text += [
                f"**{heading}",
                "",
                "| | " + " | ".join(c.label for c in columns) + " |",
                "|---" * (len(columns) + 1) + "|",
            ]
            for key in dict.fromkeys(map(_shape_key, here)):
                cells = []
                for c in columns:
                    theirs, mine = found[c.name, key], found[ours, key] if ours else None
                    cells.append(
                        "–" if not theirs or (ours and not mine) else _cell(mine, theirs) if ours else _cell(theirs)
                    )
                text.append(f"| {_shape_label(key)} | " + " | ".join(cells) + " |")
            text.append("")
    return "\n".join(text)


# Okabe and Ito's colours, told apart with any colour vision; hatches and figures on the bars serve print in grey.
_STYLES = {
    "seal-cuda": ("#D55E00", ""),
    "seal-triton": ("#E69F00", "//"),
    "seal-cpu": ("#D55E00", ""),
    "fa3": ("#0072B2", ""),
    "fa4": ("#F0E442", "--"),
    "sdpa-cudnn": ("#56B4E9", "\\\\"),
    "sdpa-fa2": ("#009E73", ".."),
    "flex": ("#CC79A7", "xx"),
    "flex-mask": ("#56B4E9", "++"),
    "flex-fa4": ("#F0E442", "oo"),
    "hf-fa3": ("#0072B2", ""),
    "hf-cudnn": ("#56B4E9", "\\\\"),
    "hf-fa2": ("#009E73", ".."),
    "hf-compiled-cudnn": ("#CC79A7", "xx"),
    "scaled-fa3": ("#0072B2", ""),
    "scaled-cudnn": ("#56B4E9", "\\\\"),
    "peft-ia3-cudnn": ("#CC79A7", "xx"),
    "hf-rotary": ("#0072B2", ""),
    "hf-rotary-compiled": ("#CC79A7", "xx"),
    "decode-fa3": ("#0072B2", ""),
    "decode-cudnn": ("#56B4E9", "\\\\"),
    "decode-fa2": ("#009E73", ".."),
    "decode-efficient": ("#CC79A7", "xx"),
}


def plot(rows: list[dict], contestants: list[Contestant], path: str, title: str, ceiling: dict[str, float]) -> bool:
    """Bars by shape, a row of panels for each operation (forward, backward; one below the other where shapes are many),
    as PNG at `path`; False where nothing was timed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    timed = [r for r in rows if r["status"] == "ok"]
    operations = [o for o in TITLES if any(r["operation"] == o for r in timed)]
    if not operations:
        return False
    directions = [d for d in ("forward", "backward") if any(r["direction"] == d for r in timed)]
    columns = len(directions) if len(set(map(_shape_key, timed))) <= 9 else 1
    lines = len(operations) * len(directions) // columns
    figure, axes = plt.subplots(lines, columns, figsize=(17, 3.7 * lines), squeeze=False, layout="constrained")
    for line, operation in zip(axes.reshape(-1, len(directions)), operations):
        for axis, direction in zip(line, directions):
            here = [r for r in timed if (r["operation"], r["direction"]) == (operation, direction)]
            if here:
                _bars(axis, here, contestants, operation, ceiling)
                axis.set_title(f"{TITLES[operation]}: {direction}", fontsize=10, loc="left")
            else:
                axis.set_axis_off()
    figure.suptitle(title, fontsize=9, x=0.01, ha="left")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    plt.close(figure)
    return True


def _bars(axis, rows: list[dict], contestants: list[Contestant], operation: str, ceiling: dict[str, float]) -> None:
    value, limit, unit = (
        ("gbps", "copy_gbps", "GB/s") if operation in FORWARD_ONLY else ("tflops", "matmul_tflops", "TFLOP/s")
    )
    shapes = list(dict.fromkeys(map(_shape_key, rows)))
    shown = [c for c in contestants if any(r["contestant"] == c.name for r in rows)]
    width = 0.88 / len(shown)
    for n, contestant in enumerate(shown):
        colour, hatch = _STYLES.get(contestant.name, ("#999999", ""))
        values = {_shape_key(r): r[value] for r in rows if r["contestant"] == contestant.name}
        at = [s for s in shapes if s in values]
        bars = axis.bar(
            [shapes.index(s) + (n - (len(shown) - 1) / 2) * width for s in at],
            [values[s] for s in at],
            width,
            color=colour,
            hatch=hatch,
            edgecolor="white",
            linewidth=0.4,
            label=contestant.label,
        )
        axis.bar_label(bars, [_figure(values[s]) for s in at], fontsize=6, padding=1)
    if ceiling.get(limit):
        axis.axhline(ceiling[limit], color="black", linewidth=0.8, linestyle="--")
        axis.annotate(
            "copy" if operation in FORWARD_ONLY else "matrix product",
            (1, ceiling[limit]),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            fontsize=7,
        )
    axis.set_xticks(
        range(len(shapes)),
        [_shape_label(s).replace(" ", "\n", 1) for s in shapes],
        fontsize=8 if len(shapes) <= 9 else 6.5,
    )
    axis.set_ylabel(unit)
    axis.margins(x=0.02, y=0.1)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=7, frameon=False, ncols=3, loc="upper left", bbox_to_anchor=(0, -0.13))
