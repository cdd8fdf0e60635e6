"""What the study found, from the files of its jobs: tables as CSV, Markdown and JSON, and plots."""

from __future__ import annotations

import json
import math
import os
from dataclasses import fields

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
    "perplexity": ("method", "reach", "scales", "trained_on", "length", "perplexity", "tokens", "options"),
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
    settings = {field.name for field in fields(Plan)}  # an older version's plan may have others
    known = {k: tuple(v) if isinstance(v, list) else v for k, v in plan.items() if k in settings}
    paths = {job.name: os.path.join(output, f"{job.name}.json") for job in jobs(Plan(**known))}
    return {name: read_json_file(path) for name, path in paths.items() if os.path.exists(path)}


def _section(found, name):
    return [job for key, job in found.items() if key.startswith(f"{name}-")]


def _perplexity(found):
    """Without scales, and with those that were trained on each task under the method."""
    read = [(job, "", "", job["perplexity"]) for job in _section(found, "perplexity")]
    scaled: dict[tuple, list] = {}
    for job in _section(found, "scaled"):
        for task, lengths in job["perplexity"].items():
            scaled.setdefault((task, job["method"], job["reach"]), []).append((job, lengths))
    for (task, _, _), draws in scaled.items():
        read.append((draws[0][0], SCALES, task, _mean([lengths for _, lengths in draws])))
    return [
        {
            "method": job["method"], "reach": job["reach"], "scales": scales, "trained_on": task, "length": int(length),
            "perplexity": measured["perplexity"], "tokens": measured["tokens"], "options": json.dumps(job["options"]),
        }
        for job, scales, task, lengths in read
        for length, measured in lengths.items()
    ]  # fmt: skip


def _mean(draws):
    """Perplexity of the same text by the mean loss of a token over several trainings."""
    return {
        length: {
            "perplexity": math.exp(sum(d[length]["nats"] for d in draws) / len(draws)),
            "tokens": first["tokens"],
        }
        for length, first in draws[0].items()
    }


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
    name = "plain" if row["method"] == BASE else f"{row['method']} for {row['reach']:,}"
    name += f" + {row['scales']}" if row["scales"] else ""
    return name + (f" of {row['trained_on']}" if row.get("trained_on") else "")


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
    for table, key in (("perplexity", "perplexity"), ("retrieval", "accuracy")):
        rows, panels = content[table], {}
        for row in sorted(rows, key=lambda row: row["scales"]):
            about = " of ".join(filter(None, (row["scales"] or "without scales", row.get("trained_on"))))
            panels.setdefault(", ".join(filter(None, (row.get("task"), about))), []).append(row)
        if rows:
            columns = len({row["task"] for row in rows}) if table == "retrieval" else len(panels)
            _lines(panels, columns, key, os.path.join(folder, f"{table}.png"))
            drawn.append(f"{table}.png")
    return drawn


def _lines(panels, columns, key, path):
    """A panel an entry; a colour and a marker a method (hollow where its colour comes again), dotted where it is set up
    for more than its shortest reach."""
    rows = -(-len(panels) // columns)
    fig, axes = plots.figure(
        columns, rows, width=4.6 * columns, height=3.4 * rows + 1, squeeze=False, sharex=True, sharey=True
    )
    every = [row for mine in panels.values() for row in mine]
    methods = list(dict.fromkeys(row["method"] for row in every))
    variants = sorted({(methods.index(row["method"]), row["reach"]) for row in every})
    lengths = sorted({row["length"] for row in every})
    shortest = {method: min(reach for m, reach in variants if m == method) for method, _ in variants}
    for ax, (title, mine) in zip(axes.flat, panels.items()):
        for method, reach in variants:
            cells = sorted(
                (r for r in mine if (r["method"], r["reach"]) == (methods[method], reach)), key=lambda r: r["length"]
            )
            ax.plot(
                [lengths.index(r["length"]) for r in cells], [r[key] for r in cells],
                label=_name(dict(method=methods[method], reach=reach, scales="")), linewidth=1.3, markersize=4.5,
                color=plots.COLOURS[method % len(plots.COLOURS)],
                marker=plots.MARKERS[(method + method // len(plots.COLOURS)) % len(plots.MARKERS)],
                linestyle="-" if reach == shortest[method] else ":",
                markerfacecolor="white" if method >= len(plots.COLOURS) else None,
            )  # fmt: skip
        ax.set_title(title, loc="left", fontsize=10)
    for ax in axes[-1]:
        ax.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths], fontsize=8)
        ax.set_xlabel("tokens")
    for ax in axes[:, 0]:
        ax.set_ylabel(key)
    if key == "perplexity":
        axes.flat[0].set_yscale("log")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=7.5)
    plots.save(fig, path)
