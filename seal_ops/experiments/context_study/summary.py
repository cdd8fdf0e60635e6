"""What the study found, from the files of its jobs: tables as CSV, Markdown and JSON, and plots."""

from __future__ import annotations

import json
import os

from ...report import plots
from ...training.long_context import FULL_ATTENTION
from ...utils.files import atomic_write, write_csv
from ..extension_comparison import BASE
from ..pretrained_study.summary import cell
from ..runs import read_json_file
from ..study_jobs.folder import PLAN
from .plan import SCALES, Plan, jobs

SUMMARY, TABLES = "summary.json", "tables.md"
COLUMNS = {
    "perplexity": ("method", "reach", "length", "perplexity", "tokens", "options"),
    "retrieval": (
        "task", "method", "reach", "scales", "length", "accuracy", "low", "high", "cases", "draws", "lowest_draw",
        "highest_draw", "rate",
    ),
    "tuned": (
        "recipe", "length", "measured_at", "untrained", "extended", "tuned", "gain", "share_of_full_attention", "rate",
        "steps", "parameters", "seconds", "peak_memory",
    ),
}  # fmt: skip


def write_summary(output: str) -> list[str]:
    """Tables and plots of whatever jobs of the folder are finished; returns the names of the files."""
    found = _finished(output)
    if not found:
        return []
    content = {
        "perplexity": _perplexity(found),
        "retrieval": _retrieval(found),
        "tuned": _tuned(found),
        "refused": {job["method"]: job["refused"] for job in found.values() if job.get("refused")},
    }
    atomic_write(os.path.join(output, SUMMARY), json.dumps(content, indent=1) + "\n")
    names = [SUMMARY, TABLES]
    for table, columns in COLUMNS.items():
        if content[table]:
            write_csv(os.path.join(output, f"{table}.csv"), columns, content[table])
            names.append(f"{table}.csv")
    atomic_write(os.path.join(output, TABLES), "\n".join(_markdown(content)) + "\n")
    return names + _draw(content, output)


def _finished(output):
    """Every finished job's content by name, in the plan's order."""
    if not os.path.exists(os.path.join(output, PLAN)):
        return {}
    plan = read_json_file(os.path.join(output, PLAN))
    known = {k: tuple(v) if isinstance(v, list) else v for k, v in plan.items() if k != "model"}
    paths = {job.name: os.path.join(output, f"{job.name}.json") for job in jobs(Plan(**known))}
    return {name: read_json_file(path) for name, path in paths.items() if os.path.exists(path)}


def _section(found, name):
    return [job for key, job in found.items() if key.startswith(f"{name}-")]


def _perplexity(found):
    return [
        {
            "method": job["method"], "reach": job["reach"], "length": int(length), "perplexity": measured["perplexity"],
            "tokens": measured["tokens"], "options": json.dumps(job["options"]),
        }
        for job in _section(found, "perplexity")
        for length, measured in job["perplexity"].items()
    ]  # fmt: skip


def _retrieval(found):
    """Cells pooled over the draws, without scales and with those that were trained under the method."""
    draws: dict[tuple, list] = {}
    for section, scales in (("retrieval", ""), ("scaled", SCALES)):
        for job in _section(found, section):
            for task, measured in job["measured"].items():
                rate = job["training"][task]["lr"] if scales else None
                for length, scores in measured["scores"].items():
                    key = (task, job["method"], job["reach"], scales, int(length))
                    draws.setdefault(key, []).append((scores, rate))
    rows = []
    for (task, method, reach, scales, length), drawn in sorted(draws.items(), key=lambda item: item[0][0]):
        means = [sum(scores) / len(scores) for scores, _ in drawn]
        rows.append(
            {
                "task": task, "method": method, "reach": reach, "scales": scales, "length": length,
                **cell([s for scores, _ in drawn for s in scores]), "draws": len(drawn), "lowest_draw": min(means),
                "highest_draw": max(means), "rate": drawn[0][1],
            }
        )  # fmt: skip
    return rows


def _tuned(found):
    """``gain``: perplexity of the extended model before training less that after it; its share of what full-attention
    LoRA gains at the same length, where that has gained."""
    rows = []
    for job in _section(found, "tuned"):
        for length in job["perplexity"]:
            before, start, after = (job[k][length]["perplexity"] for k in ("untrained", "extended", "perplexity"))
            training = job["training"]
            rows.append(
                {
                    "recipe": job["recipe"], "length": job["length"], "measured_at": int(length), "untrained": before,
                    "extended": start, "tuned": after, "gain": start - after, "rate": training["lr"],
                    **{k: training[k] for k in ("steps", "parameters", "seconds", "peak_memory")},
                }
            )  # fmt: skip
    full = {(r["length"], r["measured_at"]): r["gain"] for r in rows if r["recipe"] == FULL_ATTENTION}
    for row in rows:
        most = full.get((row["length"], row["measured_at"]))
        row["share_of_full_attention"] = row["gain"] / most if most and most > 0 else None
    return rows


# ----------------------------------------------------------------------------------------------------------- markdown


def _name(row):
    if row["method"] == BASE:
        return "plain"
    return f"{row['method']} for {row['reach']:,}" + (f" + {row['scales']}" if row.get("scales") else "")


def _by_length(rows, shown):
    """Lines of a table with a row a method and a column a length."""
    lengths = sorted({row["length"] for row in rows})
    cells: dict[str, dict[int, str]] = {}
    for row in rows:
        cells.setdefault(_name(row), {})[row["length"]] = shown(row)
    yield "| | " + " | ".join(f"{n:,}" for n in lengths) + " |"
    yield "|---" * (1 + len(lengths)) + "|"
    for name, mine in cells.items():
        yield f"| {name} | " + " | ".join(mine.get(n, "–") for n in lengths) + " |"
    yield ""


def _markdown(content):
    if content["perplexity"]:
        yield from ("## Perplexity", "", *_by_length(content["perplexity"], lambda row: f"{row['perplexity']:.2f}"))
    shown = lambda r: f"{r['accuracy']:.2f} ({r['lowest_draw']:.2f} to {r['highest_draw']:.2f})"
    for task in dict.fromkeys(row["task"] for row in content["retrieval"]):
        mine = [row for row in content["retrieval"] if row["task"] == task]
        yield from (f"## {task}: accuracy, lowest and highest draw", "", *_by_length(mine, shown))
    if content["tuned"]:
        yield from ("## Fine-tuned", "")
        yield "| recipe | for | at | as it is | extended | fine-tuned | gain | of full attention's | rate | s | GiB |"
        yield "|---" * 11 + "|"
        for r in content["tuned"]:
            share = "–" if r["share_of_full_attention"] is None else f"{100 * r['share_of_full_attention']:.0f} %"
            yield (
                f"| {r['recipe']} | {r['length']:,} | {r['measured_at']:,} | {r['untrained']:.2f} | "
                f"{r['extended']:.2f} | {r['tuned']:.2f} | {r['gain']:.2f} | {share} | {r['rate']:g} | "
                f"{r['seconds']:.0f} | {r['peak_memory'] / 2**30:.2f} |"
            )
        yield ""
    for method, sentence in content["refused"].items():
        yield f"{method}: {sentence}"


# -------------------------------------------------------------------------------------------------------------- plots


def _draw(content, folder):
    drawn = []
    if content["perplexity"]:
        _lines({"": content["perplexity"]}, "perplexity", os.path.join(folder, "perplexity.png"), log=True)
        drawn.append("perplexity.png")
    if content["retrieval"]:
        panels: dict[str, list] = {}
        for row in content["retrieval"]:
            panels.setdefault(row["task"], []).append(row)
        _lines(panels, "accuracy", os.path.join(folder, "retrieval.png"))
        drawn.append("retrieval.png")
    return drawn


def _lines(panels, key, path, log=False):
    """A panel an entry, a line a method: dashed with scales trained under it, dotted where its colour comes again."""
    fig, axes = plots.figure(len(panels), width=5.2 * len(panels), height=4.6, squeeze=False)
    names = list(dict.fromkeys(_name(row) for rows in panels.values() for row in rows))
    for ax, (title, rows) in zip(axes.flat, panels.items(), strict=True):
        lengths = sorted({row["length"] for row in rows})
        for i, name in enumerate(names):
            mine = sorted((r for r in rows if _name(r) == name), key=lambda r: r["length"])
            ax.plot(
                [lengths.index(r["length"]) for r in mine], [r[key] for r in mine], label=name, linewidth=1.3,
                color=plots.COLOURS[i % len(plots.COLOURS)], marker=plots.MARKERS[i // len(plots.COLOURS)],
                markersize=4, linestyle="--" if name.endswith(SCALES) else "-" if i < len(plots.COLOURS) else ":",
            )  # fmt: skip
        ax.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths], fontsize=8)
        ax.set_title(title, loc="left", fontsize=10)
        ax.set_xlabel("tokens")
        if log:
            ax.set_yscale("log")
    axes.flat[0].set_ylabel(key)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=7)
    plots.save(fig, path)
