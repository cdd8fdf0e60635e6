"""The files of every kind of result: JSON, CSV, plots, and tables for the terminal."""

import json
import os
from collections.abc import Mapping

from ..evaluation.results import Evaluation
from ..utils.files import atomic_write
from . import plots

BOTH = (".png", ".svg")


# ----------------------------------------------------------------------------------------------------------- files


def files(output: str, stem: str) -> list[str]:
    """The PNG and the SVG of a plot in a folder."""
    return [os.path.join(output, stem + suffix) for suffix in BOTH]


def write_comparison(found, output: str) -> None:
    """``comparison.json``, ``.csv``, and plots of accuracy and cost."""
    found.save(os.path.join(output, "comparison.json"))
    found.save_csv(os.path.join(output, "comparison.csv"))
    title = f"{found.settings['task']}: scales and low-rank adapters"
    trained_at = found.settings["train_length"]
    plots.accuracy_by_length(
        list(found.evaluations.values()), files(output, "comparison"), title=title, trained_at=trained_at
    )
    plots.cost(found.rows(), files(output, "cost"), title="What each method costs")


def comparison_table(found):
    """The comparison as a table for rich."""
    from rich.table import Table

    lengths = found.settings["lengths"]
    shown = Table(title=f"{found.settings['task']}, {found.settings['cases']} cases a length", title_justify="left")
    for column in ("", *map(str, lengths), "trained", "lr", "train s", f"p against base, {lengths[-1]}"):
        shown.add_column(column, justify="right" if column else "left")
    against = {test["second"]: test for test in found.tests(lengths[-1]) if test["first"] == "base"}
    for row in found.rows():
        test = against.get(row["name"])
        shown.add_row(
            row["name"], *(f"{row[f'accuracy_{n}']:.2f}" for n in lengths),
            f"{row['parameters']:,}" if row["parameters"] else "", f"{row['lr']:g}" if row["lr"] else "",
            f"{row['training_seconds']:.0f}" if row["training_seconds"] else "",
            f"{test['p']:.2g} (Holm {test['p_adjusted']:.2g})" if test else "",
        )  # fmt: skip
    return shown


def write_transfer(found, output: str) -> None:
    """``transfer.json``, ``.csv`` and the matrix as a plot."""
    found.save(os.path.join(output, "transfer.json"))
    found.save_csv(os.path.join(output, "transfer.csv"))
    rows, columns, values = found.matrix()
    rows = ["untrained" if row == "base" else row for row in rows]
    title = f"{found.settings['method']} at {found.settings['length']} tokens"
    plots.matrix(
        rows, columns, values, files(output, "transfer"), xlabel="measured on", ylabel="trained on", title=title
    )


def write_head_importance(found, output: str, stem: str = "heads") -> None:
    """``STEM.json``, ``.csv``, the heat map, and the estimate over the measured change."""
    found.save(os.path.join(output, f"{stem}.json"))
    found.save_csv(os.path.join(output, f"{stem}.csv"))
    factor, methods = found.settings["factor"], found.settings["methods"]
    panels = {}
    for length in found.lengths:
        if "ablation" in methods:
            panels[f"measured, {length} tokens"] = found.grid("logprob", length)
        if "gradient" in methods:
            panels[f"gradient, {length} tokens"] = found.grid("gradient", length)
    what = "removing a head" if factor == 0 else f"scaling a head by {factor:g}"
    label = "change of the answer's log-probability (nats)\npurple: helps, orange: hurts"
    title = f"{found.settings['task']}: what {what} changes"
    plots.head_importance(panels, files(output, stem), label=label, title=title)
    if len(methods) == 2:
        length = found.lengths[-1]
        known = found.ablated
        names = ["{}.{}".format(*found.units[i]) for i in known] if len(found.units[0]) == 2 else []
        plots.agreement(
            found.change("gradient", length)[known], found.change("logprob", length)[known],
            files(output, f"{stem}-agreement"), name=f"{what[0].upper() + what[1:]}, {length} tokens",
            rho=found.agreement()["gradient_ablation"].get(length), labels=names,
        )  # fmt: skip


def describe_agreement(found) -> str:
    """Spearman's correlations in one line."""
    both = found.agreement()
    parts = [f"{rho:.2f} at {length}" for length, rho in both["gradient_ablation"].items()]
    text = f"   gradient and ablation (scale x{found.settings['factor']:g}), Spearman: {', '.join(parts) or 'not measured'}"  # noqa: E501
    across = [f"{rho:.2f} between {pair.replace(',', ' and ')}" for pair, rho in both["lengths"].items()]
    return text + (f"; ablation {', '.join(across)} tokens" if across else "")


def write_quadrants(
    results: Mapping[str, Evaluation],
    groups: Mapping[str, list[int]],
    units: list,
    output: str,
    measure: str,
    noise: float,
) -> None:
    """``quadrants.json`` and the plot of the four curves; ``groups`` are indices into ``units``, by ``measure`` and
    ``noise``."""
    cells = {name: evaluation.cells() for name, evaluation in results.items()}
    of_groups = {name: [units[i] for i in group] for name, group in groups.items()}
    origin = next((evaluation.provenance for evaluation in results.values()), {})
    content = {
        "kind": "seal_ops.quadrants",
        "measure": measure,
        "noise": noise,
        "units": of_groups,
        "accuracy": cells,
        "provenance": origin,
    }
    atomic_write(os.path.join(output, "quadrants.json"), json.dumps(content, indent=1) + "\n")
    title = f"Harmful heads down, helpful heads up ({len(groups['harmful'])} and {len(groups['helpful'])})"
    plots.accuracy_by_length(list(results.values()), files(output, "quadrants"), title=title)
