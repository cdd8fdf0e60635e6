"""One self-contained HTML file that joins what a run left in a folder: its tables, plots and settings.

Files are recognised by what is in them: evaluations, training results, comparisons, transfer matrices, head importance,
quadrant experiments, demos and studies (JSON), any other CSV, and plots (SVG, or PNG where there is no SVG of the same
name).
"""

import base64
import csv
import html
import json
import os
from collections.abc import Iterable, Sequence
from importlib import resources
from string import Template

from ..evaluation.results import Evaluation
from ..utils.files import atomic_write
from ..version import __version__

NAME = "report.html"
MOST_ROWS = 60  # of a CSV
MOST_WRONG = 12  # wrong answers shown of an evaluation
MOST_BYTES = 2_000_000  # of a picture
_CAPTIONS = {
    "accuracy": "Accuracy by prompt length, with 95 % Wilson intervals.",
    "comparison": "Accuracy by prompt length, with 95 % Wilson intervals; all methods on the same cases.",
    "cost": "What each method costs. On a CPU, peak memory is the largest size of the whole process so far.",
    "transfer": "Accuracy after training on the task of the row, measured on the task of the column.",
    "heads": "Change of the answer's log-probability when a head is removed, measured and estimated from the gradient.",
    "heads-step": "Change of the answer's log-probability when a head is scaled a little, measured and estimated.",
    "heads-agreement": "Estimate from one backward pass over the measured change; points on the dashed line agree.",
    "heads-step-agreement": "The same for a small step, where a first-order estimate should hold.",
    "quadrants": "Heads whose removal helped scaled down, heads whose removal hurt scaled up, and both.",
    "scales": "The learned scales of every layer.",
}


def write_report(
    folder: str | os.PathLike, output: str | os.PathLike | None = None, *, title: str | None = None
) -> str:
    """Writes the report of ``folder`` and returns its path.

    Args:
        folder: searched with its direct subfolders.
        output: the HTML file; None for ``report.html`` in the folder.
        title: heading; None for the folder's name.

    Raises:
        ValueError: nothing to report in the folder; OSError: no such folder.
    """
    folder = os.fspath(folder)
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"seal_ops.report: folder must exist, got {folder}")
    output = os.path.join(folder, NAME) if output is None else os.fspath(output)
    sections = _sections(folder, _files(folder))
    if not sections:
        raise ValueError(
            f"seal_ops.report: folder must hold results (JSON, CSV) or plots (SVG, PNG), got none in {folder}"
        )
    title = title or os.path.basename(os.path.abspath(folder))
    body, contents = [], []
    for i, (heading, parts) in enumerate(sections):
        contents.append(f'<a href="#s{i}">{html.escape(heading)}</a>')
        body.append(f'<section id="s{i}"><h2>{html.escape(heading)}</h2>\n' + "\n".join(parts) + "\n</section>")
    template = Template(resources.files(__package__).joinpath("templates", "report.html").read_text(encoding="utf-8"))
    text = template.substitute(
        title=html.escape(title), subtitle=html.escape(f"Results in {os.path.basename(os.path.abspath(folder))}"),
        contents="".join(contents), body="\n".join(body), footer=f"seal_ops {html.escape(__version__)}, seal report",
    )  # fmt: skip
    atomic_write(output, text)
    return output


def _files(folder):
    """Relative paths in the folder and its direct subfolders, those of the folder first."""
    found = []
    for entry in sorted(os.listdir(folder)):
        path = os.path.join(folder, entry)
        if os.path.isfile(path):
            found.append((0, entry))
        elif os.path.isdir(path) and not entry.startswith("."):
            found += [(1, os.path.join(entry, name)) for name in sorted(os.listdir(path))]
    return [name for _, name in sorted(found, key=lambda item: (item[0], os.path.splitext(item[1])))]


def _sections(folder, names):
    sections: dict[str, list[str]] = {}
    drawn = set()

    def add(heading, *parts):
        sections.setdefault(heading, []).extend(part for part in parts if part)

    def picture(*stems):
        for stem in stems:
            if (shown := _picture(folder, names, stem)) and stem not in drawn:
                drawn.add(stem)
                yield shown

    described = set()
    loaded = [(name, _json(os.path.join(folder, name))) for name in names if name.endswith(".json")]
    kinds = [(name, _kind(content), content) for name, content in loaded]
    for wanted, heading, show, plots in _ORDER:
        for name, kind, content in kinds:
            if kind != wanted:
                continue
            stem = name[: -len(".json")]
            described |= {name, stem + ".csv"}
            beside = os.path.dirname(name)
            stems = [os.path.join(beside, plot.format(stem=os.path.basename(stem))) for plot in plots]
            title = f"<h3>{html.escape(stem)}</h3>" if _many(kinds, wanted) else ""
            add(heading, title, show(content), _provenance(content.get("provenance")), *picture(*stems))
    evaluations = [(name, content) for name, kind, content in kinds if kind == "evaluation"]
    if evaluations:
        add("Evaluations", *_evaluations(evaluations), *picture("accuracy"))
    for name in names:
        if name.endswith(".csv") and name not in described:
            add("Tables", _csv(os.path.join(folder, name), name))
    rest = [os.path.splitext(name)[0] for name in names if name.endswith((".svg", ".png"))]
    add("Plots", *picture(*dict.fromkeys(rest)))
    return [(heading, parts) for heading, parts in sections.items() if parts]


def _many(kinds, wanted):
    return sum(kind == wanted for _, kind, _ in kinds) > 1


def _json(path):
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except ValueError:
        return None


def _kind(content):
    if not isinstance(content, dict):
        return None
    if "kind" in content:
        return content["kind"]
    if {"task", "name", "settings", "records"} <= set(content):
        return "evaluation"
    if {"losses", "lr", "parameters", "seconds"} <= set(content):
        return "training"
    return "demo" if "merged_against_unmerged" in content else None


# -------------------------------------------------------------------------------------------------------- contents


def _table(columns: Sequence[str], rows: Iterable[Sequence], text: Sequence[int] = ()) -> str:
    """An HTML table; columns in ``text`` are left-aligned and wrap."""
    head = "".join(f"<th>{html.escape(str(column))}</th>" for column in columns)
    lines = []
    for row in rows:
        cells = [f"<td{' class=text' if i in text else ''}>{html.escape(_shown(v))}</td>" for i, v in enumerate(row)]
        lines.append("<tr>" + "".join(cells) + "</tr>")
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return f'<div class="table">{table}</div>'


def _shown(value):
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    return str(value)


def _cell(cell):
    return f"{cell['accuracy']:.2f} [{cell['low']:.2f}, {cell['high']:.2f}]"  # as a Cell prints itself


def _settings(settings):
    def flat(value):
        return value if isinstance(value, (str, int, float, type(None))) else json.dumps(value, ensure_ascii=False)

    table = _table(("setting", "value"), [(k, flat(v)) for k, v in settings.items()], text=(1,))
    return f"<details><summary>settings</summary>{table}</details>"


def _provenance(content):
    """Model and versions of a result; "" where it says none."""
    if not content:
        return ""
    rows = [(f"model, {key}", value) for key, value in content["model"].items()]
    rows += [*content["versions"].items(), ("threads", content["threads"])]
    return f"<details><summary>model and versions</summary>{_table(('', 'value'), rows, text=(1,))}</details>"


def _p(value):
    return f"{value:.2g}" if value >= 1e-4 else f"{value:.0e}"


def _comparison(content):
    lengths = content["settings"]["lengths"]
    rows = []
    for row in content["rows"]:
        cells = [_cell({key: row[f"{key}_{n}"] for key in ("accuracy", "low", "high")}) for n in lengths]
        memory = row["peak_memory"] and round(row["peak_memory"] / 2**20)
        rows.append([row["name"], *cells, row["parameters"], row["lr"], row["training_seconds"], memory])
    columns = ["", *(f"{n} tokens" for n in lengths), "trained", "lr", "training s", "peak MiB"]
    parts = [_table(columns, rows)]
    for name, tests in content["tests"].items():
        shown = [
            (
                f"{t['first']} → {t['second']}", f"{t['difference']:+.2f} [{t['low']:+.2f}, {t['high']:+.2f}]",
                t["better"], t["worse"], _p(t["p"]), _p(t["p_adjusted"]),
            )
            for t in tests
        ]  # fmt: skip
        where = name if not name.isdigit() else f"{name} tokens"
        cases = tests[0]["cases"] if tests else 0
        parts.append(f"<h3>Paired tests, {html.escape(where)}, {cases} cases</h3>")
        parts.append(_table(("", "difference, 95 %", "better", "worse", "p (exact McNemar)", "p (Holm)"), shown))
    return "\n".join(parts) + _settings(content["settings"])


def _transfer(content):
    measured = content["settings"]["measured"]
    trained = list(dict.fromkeys(cell["trained"] for cell in content["cells"]))
    cells = {(cell["trained"], cell["measured"]): cell for cell in content["cells"]}
    rows = [["untrained" if t == "base" else t, *(_cell(cells[t, m]) for m in measured)] for t in trained]
    return _table(["trained on", *(f"on {m}" for m in measured)], rows) + _settings(content["settings"])


def _heads(content):
    both = content["agreement"]
    rows = [(f"gradient and ablation, {n} tokens", rho) for n, rho in both["gradient_ablation"].items()]
    rows += [(f"ablation at {pair.replace(',', ' and ')} tokens", rho) for pair, rho in both["lengths"].items()]
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in content["seconds"].items())
    note = f"<p>{len(content['units'])} units, {len(content['records'])} cases; {html.escape(seconds)}.</p>"
    return note + _table(("Spearman's rank correlation", "ρ"), rows) + _settings(content["settings"])


def _quadrants(content):
    lengths = [cell["length"] for cell in next(iter(content["accuracy"].values()))]
    rows = [(name, *(_cell(cell) for cell in cells)) for name, cells in content["accuracy"].items()]
    sizes = ", ".join(f"{len(units)} {name}" for name, units in content["units"].items())
    note = f"<p>Heads by the sign of their removal's effect on {content['measure']} at every length: {html.escape(sizes)}.</p>"  # noqa: E501
    return note + _table(("", *(f"{n} tokens" for n in lengths)), rows)


def _demo(content):
    lengths = content["settings"]["lengths"]
    rows = []
    for name, cells in content["accuracy"].items():
        by = {cell["length"]: cell for cell in cells}
        trained = content["training"].get(name, {}).get("parameters")
        rows.append((name, trained, *(_cell(by[n]) if n in by else "" for n in lengths)))
    return _table(("", "trained", *(f"{n} tokens" for n in lengths)), rows) + _settings(content["settings"])


def _training(content):
    settings = content.get("settings", {})
    memory = round(content["peak_memory"] / 2**20)
    losses = content["losses"]
    edge = max(1, len(losses) // 5)
    change = f"{sum(losses[:edge]) / edge:.3f} → {sum(losses[-edge:]) / edge:.3f}"
    row = (settings.get("granularity") or "adapter", content["parameters"], content["lr"], len(losses), change,
           content["seconds"], memory)  # fmt: skip
    return _table(("", "trained", "lr", "steps", "loss, first and last fifth", "seconds", "peak MiB"), [row])


def _study(content):
    return _table(("stage", "seconds"), content["seconds"].items()) + _settings(content["settings"])


def _evaluations(evaluations):
    """A table of all, then of each the wrong answers."""
    fields = ("task", "name", "settings", "records", "seconds")
    loaded = [(name, Evaluation(**{field: content[field] for field in fields})) for name, content in evaluations]
    lengths = sorted({length for _, e in loaded for length in e.accuracy})
    rows = []
    for name, evaluation in loaded:
        cells = evaluation.accuracy
        shown = [str(cells[n]) if n in cells else "" for n in lengths]
        rows.append((evaluation.name or name, evaluation.task, *shown, len(evaluation.records)))
    yield _table(("", "task", *(f"{n} tokens" for n in lengths), "cases"), rows)
    for name, evaluation in loaded:
        wrong = [record for record in evaluation.records if record["score"] < 1]
        if wrong:
            shown = [(r["length"], r["index"], r["score"], r["answer"], r["output"]) for r in wrong[:MOST_WRONG]]
            table = _table(("tokens", "case", "score", "expected", "written"), shown, text=(3, 4))
            summary = f"{evaluation.name or name}, {evaluation.task}: {len(wrong)} of {len(evaluation.records)} cases not right"  # noqa: E501
            yield f"<details><summary>{html.escape(summary)}, the first {len(shown)}</summary>{table}</details>"


def _csv(path, name):
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    if len(rows) < 2:
        return ""
    more = len(rows) - 1 - MOST_ROWS
    note = f"<p>{more} more rows in the file.</p>" if more > 0 else ""
    return f"<h3>{html.escape(name)}</h3>{_table(rows[0], rows[1 : MOST_ROWS + 1])}{note}"


def _picture(folder, names, stem):
    for suffix, kind in ((".svg", "svg+xml"), (".png", "png")):
        path = os.path.join(folder, stem + suffix)
        if stem + suffix in names and os.path.getsize(path) <= MOST_BYTES:
            with open(path, "rb") as file:
                data = base64.b64encode(file.read()).decode()
            caption = _CAPTIONS.get(os.path.basename(stem), stem)
            alt = html.escape(f"plot: {stem}")
            source = f"data:image/{kind};base64,{data}"
            return f'<figure><img alt="{alt}" src="{source}"><figcaption>{html.escape(caption)}</figcaption></figure>'
    return ""


# (kind, heading, how it is shown, its plots)
_ORDER = (
    ("demo", "Demo", _demo, ("accuracy", "scales")),
    ("seal_ops.compare", "Comparison of methods", _comparison, ("{stem}", "cost")),
    ("seal_ops.transfer", "Transfer", _transfer, ("{stem}",)),
    ("seal_ops.heads", "Head importance", _heads, ("{stem}", "{stem}-agreement")),
    ("seal_ops.quadrants", "Quadrant experiment", _quadrants, ("{stem}",)),
    ("training", "Training", _training, ()),
    ("seal_ops.study", "Run", _study, ()),
)
