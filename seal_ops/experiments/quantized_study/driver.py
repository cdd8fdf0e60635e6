"""The study of weak columns on a 4-bit base, and its table; several processes may share its folder and its GPU."""

from __future__ import annotations

import os
from dataclasses import asdict

from ...utils.files import atomic_write, write_csv
from ..runs import read_json_file
from ..study_jobs.folder import PLAN, Study
from .plan import Plan, check, jobs
from .workbench import Workbench

COLUMNS = (
    "method", "columns", "data", "seeds", "perplexity", "perplexity_lowest", "perplexity_highest", "accuracy", "lowest",
    "highest", "parameters", "train_seconds", "peak_memory", "rates",
)  # fmt: skip


def _known(plan: Plan) -> tuple[dict, None]:
    return {**asdict(plan), "text": os.path.basename(plan.text)}, None


STUDY = Study(check, _known, jobs, Workbench)


def write_summary(output: str) -> list[str]:
    """``quantized.csv`` and ``quantized.md`` of the finished jobs; the names of the files."""
    rows = summarise(output)
    if not rows:
        return []
    lengths = list(rows[0]["accuracy"])
    heads = [*COLUMNS[:7], *(f"{c} {n}" for n in lengths for c in COLUMNS[7:10]), *COLUMNS[10:]]
    flat = [
        {**{c: r[c] for c in COLUMNS}, **{f"{c} {n}": round(r[c][n], 4) for c in COLUMNS[7:10] for n in lengths}}
        for r in rows
    ]
    write_csv(os.path.join(output, "quantized.csv"), heads, flat)
    lines = [
        f"| | trained on | trained numbers | perplexity | {' | '.join(f'at {n}' for n in lengths)} | rates | s | GiB |",
        "|---" * (7 + len(lengths)) + "|",
    ]
    for r in rows:
        name = r["method"].replace("columns", f"{r['columns']} columns") if r["columns"] else r["method"]
        cells = [
            name, r["data"] or "–", f"{r['parameters']:,}" if r["parameters"] else "–",
            f"{r['perplexity']} ({r['perplexity_lowest']} to {r['perplexity_highest']})",
            *(f"{r['accuracy'][n]:.2f} ({r['lowest'][n]:.2f} to {r['highest'][n]:.2f})" for n in lengths),
            r["rates"] or "–", r["train_seconds"] or "–",
            f"{r['peak_memory'] / 2**30:.2f}" if r["peak_memory"] else "–",
        ]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    atomic_write(os.path.join(output, "quantized.md"), "\n".join(lines) + "\n")
    return ["quantized.csv", "quantized.md"]


def summarise(output: str) -> list[dict]:
    """One row a method, with means over the seeds and the lowest and highest seed."""
    if not os.path.exists(os.path.join(output, PLAN)):
        return []
    plan = read_json_file(os.path.join(output, PLAN))
    known = {"text": os.path.join(output, PLAN)} | {
        k: tuple(v) if isinstance(v, list) else v for k, v in plan.items() if k not in ("model", "text")
    }
    groups: dict[tuple, list[dict]] = {}
    for job in jobs(Plan(**known)):
        path = os.path.join(output, f"{job.name}.json")
        if os.path.exists(path):
            found = read_json_file(path)
            groups.setdefault((found["method"], found["columns"], found["data"]), []).append(found)
    return [_row(*key, found) for key, found in groups.items()]


def _row(method, columns, data, found) -> dict:
    perplexities = [f["measured"]["perplexity"]["perplexity"] for f in found]
    lengths = list(found[0]["measured"]["scores"])
    cells = {n: [_mean(f["measured"]["scores"][n]) for f in found] for n in lengths}
    trainings = [f["training"] for f in found if "training" in f]
    rates = {k: trainings[0][k] for k in ("lr", "column_lr") if trainings and k in trainings[0]}
    return {
        "method": method, "columns": columns, "data": data, "seeds": len(found),
        "perplexity": round(_mean(perplexities), 3), "perplexity_lowest": round(min(perplexities), 3),
        "perplexity_highest": round(max(perplexities), 3),
        "accuracy": {n: _mean(v) for n, v in cells.items()}, "lowest": {n: min(v) for n, v in cells.items()},
        "highest": {n: max(v) for n, v in cells.items()},
        "parameters": trainings[0]["parameters"] if trainings else None,
        "train_seconds": round(_mean([t["seconds"] for t in trainings]), 1) if trainings else None,
        "peak_memory": max(t["peak_memory"] for t in trainings) if trainings else None,
        "rates": ", ".join(f"{v:.1e}" for v in rates.values()),
    }  # fmt: skip


def _mean(values):
    return sum(values) / len(values)
