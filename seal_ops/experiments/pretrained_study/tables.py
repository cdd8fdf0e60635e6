"""The tables of a study, in Markdown."""

from collections.abc import Iterable, Sequence
from statistics import fmean

from .drawings import MARKED


def markdown(content: dict) -> str:
    """All tables of what :func:`.summary.write_summary` has gathered."""
    parts = ["## Main table", _by_length(content["main"]["cells"], ("task", "method"))]
    tests = [
        (
            t["task"],
            f"{t['first']} → {t['second']}",
            t["length"],
            f"{t['difference']:+.2f} [{t['low']:+.2f}, {t['high']:+.2f}]",
            f"{t['better']} / {t['worse']}",
            _p(t["p"]),
            _p(t["p_adjusted"]),
        )
        for t in content["main"]["tests"]
    ]
    parts += ["### Paired tests", _table(("task", "", "tokens", "difference", "better / worse", "p", "Holm"), tests)]
    rows = [
        (
            r["task"],
            r["seed"],
            r["method"],
            f"{r['lr']:g}",
            r["parameters"],
            f"{r['seconds']:.1f}",
            f"{r['peak_memory'] / 2**30:.1f}",
            ", ".join(f"{k}: {_loss(v)}" for k, v in (r["tried"] or {}).items()),
            f"{r['evaluation_seconds']:.1f}",
        )
        for r in content["training"]
    ]
    head = ("task", "seed", "method", "lr", "numbers", "seconds", "peak GiB", "validation loss by rate", "evaluation s")
    parts += ["## Training", _table(head, rows)]
    if content["curve"]:
        rows = [
            (
                r["method"],
                r["samples"] or "",
                f"{r['lr']:g}",
                _shown(r),
                _test(r["against_base"]),
                "" if r["shortest"] is None else f"{r['shortest']:.2f}",
                _test(r.get("shortest_against_base")),
                "" if r["validation_loss"] is None else f"{r['validation_loss']:.4f}",
                f"{100 * r['perplexity_change']:+.1f} %" if "perplexity_change" in r else "",
                f"{r['seconds']:.1f}",
            )
            for r in sorted(
                content["curve"], key=lambda r: (r["samples"] is None, r["method"], r["samples"] or r["lr"])
            )
        ]
        against = "against the base"
        head = ("method", "samples", "lr", "accuracy", against, "at the shortest", against, "validation loss")
        head += ("perplexity", "seconds")
        parts += ["## Samples and rate", _table(head, rows)]
    for key, names in (
        ("length", ("method", "train_length")),
        ("beyond", ("kind", "factor", "method")),
        ("quantised", ("method",)),
        ("format", ("task",)),
    ):
        if content[key]:
            parts += [f"## {key}", _by_length(content[key], names)]
    if content["transfer"]:
        lost = [
            (
                r["trained"],
                r["measured"],
                r["length"],
                f"{r['against_base']['difference']:+.2f}",
                _test(r["against_base"]),
                _p(r["against_base"]["p_adjusted"]),
            )
            for r in content["transfer"]
            if r.get("against_base", {}).get("difference", 0) <= MARKED
        ]
        for length in sorted({r["length"] for r in content["transfer"]}):
            parts += [
                f"## Transfer at {length} tokens",
                _matrix([r for r in content["transfer"] if r["length"] == length]),
            ]
        head = ("trained on", "measured", "tokens", "difference", "better / worse", "Holm")
        if lost:
            parts += ["### Where transfer costs: .03 and more below the base", _table(head, lost)]
    if content["heads"]:
        parts += ["## Heads", *_head_tables(content["heads"])]
    if content["similarity"]:
        grouped: dict[tuple, list] = {}
        for row in content["similarity"]:
            grouped.setdefault((row["method"], row["kind"]), []).append(row["r"])
        rows = [(*key, f"{min(r):.2f} to {max(r):.2f}", f"{fmean(r):.2f}", len(r)) for key, r in grouped.items()]
        parts += ["### Learned scales beside each other", _table(("method", "", "correlation", "mean", "pairs"), rows)]
    if content["elsewhere"]:
        rows = [
            (r["scales"], f"{r['perplexity']:.3f}", f"{100 * r['change']:+.2f} %")
            for r in content["elsewhere"].get("perplexity", [])
        ]
        parts.append("## Elsewhere")
        if rows:
            parts.append(_table(("scales", "perplexity", "change"), rows))
        rows = [
            (r["method"], r["length"], _shown(r), f"{r['unmerged']:.2f}", f"{r['differ']} of {r['cases']}")
            for r in content["elsewhere"].get("merged", [])
        ]
        parts += [_table(("", "tokens", "merged", "unmerged", "differ"), rows)]
    total = sum(content["seconds"].values())
    parts += [f"{len(content['seconds'])} jobs, {total:.0f} s of one GPU in all."]
    return "\n\n".join(parts) + "\n"


def _head_tables(heads):
    parts = []
    if "agreement" in heads:
        agreement = heads["agreement"]
        rows = [(f"gradient and removal, {n} tokens", f"{r:.2f}") for n, r in agreement["gradient_ablation"].items()]
        rows += [(f"removal at {n.replace(',', ' and ')} tokens", f"{r:.2f}") for n, r in agreement["lengths"].items()]
        parts += ["### Agreement over the heads, Spearman", _table(("", "correlation"), rows)]
        counted = ", ".join(f"{n} {name}" for name, n in heads["groups"].items())
        rows = [(r["variant"], r["length"], _shown(r), _test(r["against_base"])) for r in heads["quadrants"]]
        head = ("heads", "tokens", "accuracy", "better / worse")
        parts += [f"### Steps of a tenth by group: {counted}", _table(head, rows)]
        rows = [
            (n, ", ".join(f"{h['layer']}.{h['head']} {h['change']:.1f}" for h in found))
            for n, found in heads["largest"].items()
        ]
        parts += ["### Largest loss of log-probability when removed (layer.head)", _table(("tokens", "nats"), rows)]
    if "retrieval" in heads:
        found = heads["retrieval"]
        best = ", ".join(f"{h['layer']}.{h['head']} {h['score']:.2f}" for h in found["best"])
        rows = [(found["heads"], found["over_0.5"], found["over_0.1"], best)]
        parts += ["### Retrieval score", _table(("heads", "over .5", "over .1", "highest (layer.head)"), rows)]
        rows = [(name, f"{r:.2f}") for name, r in heads["correlations"].items()]
        parts += ["### The retrieval score's rank correlation", _table(("with", "correlation"), rows)]
    return parts


def _by_length(rows, names):
    """Rows by ``names``, a column a length; intervals at the longest."""
    lengths = sorted({row["length"] for row in rows})
    grouped: dict[tuple, dict[int, dict]] = {}
    for row in rows:
        grouped.setdefault(tuple(row[name] for name in names), {})[row["length"]] = row
    lines = []
    for key, cells in grouped.items():
        last = cells[max(cells)]
        accuracies = (f"{cells[n]['accuracy']:.2f}".lstrip("0") if n in cells else "" for n in lengths)
        lines.append((*key, *accuracies, f"{last['low']:.2f} to {last['high']:.2f}", last["cases"]))
    return _table((*names, *lengths, "95 % at the longest", "cases"), lines)


def _matrix(rows):
    columns = list(dict.fromkeys(row["measured"] for row in rows))
    cells = {(row["trained"], row["measured"]): row["accuracy"] for row in rows}
    trained = sorted(
        dict.fromkeys(row["trained"] for row in rows),
        key=lambda name: (name != "base", columns.index(name) if name in columns else 99),
    )
    return _table(
        ("trained on", *columns),
        [(name, *(f"{cells[name, c]:.2f}" if (name, c) in cells else "" for c in columns)) for name in trained],
    )


def _shown(row):
    return f"{row['accuracy']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"


def _test(test):
    """A paired test in one cell."""
    return "" if test is None else f"{test['better']} / {test['worse']} of {test['cases']}, p = {_p(test['p'])}"


def _p(value):
    return f"{value:.1e}" if value < 0.001 else f"{value:.3f}"


def _loss(value):
    return "not finite" if value is None else f"{value:.3f}"


def _table(columns: Sequence, rows: Iterable[Sequence]) -> str:
    lines = ["| " + " | ".join(map(str, columns)) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])
