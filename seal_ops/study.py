"""``seal study``: comparison, transfer matrix and head influence of one model in one run, with their files and plots.

The ``write_*`` functions are what the single commands (``seal compare``, ``transfer``, ``heads``) write too.
"""

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field

import torch

from . import heads, plots
from .compare import METHODS, Comparison, Transfer, claim, compare, transfer
from .evaluate import Evaluation
from .files import atomic_write
from .heads import Influence
from .loading import load_model
from .report import write_report

BOTH = (".png", ".svg")


@dataclass(frozen=True)
class Settings:
    """What a study does; the defaults are for the shipped model, minutes on two cores.

    Attributes:
        model: folder or hub name.
        task: what is compared and whose heads are looked at.
        lengths: prompt lengths in tokens; the longest is trained at.
        cases: test cases at each length, and in each cell of the transfer matrix.
        samples: training samples.
        methods: of :data:`seal_ops.compare.METHODS`.
        rates: learning rates to choose from, by method; one that is not named has the paper's.
        transfer_tasks: trained on each, measured on each.
        transfer_method, transfer_length: what is trained there, and at which length.
        heads_lengths, heads_cases: where influence is measured, and on how many samples at each length.
        factor: a small step besides removal, at which the gradient's estimate is checked.
        seed: draws all samples.
        device, dtype: see :func:`seal_ops.loading.load_model`.
    """

    model: str = os.path.join("models", "seal-tiny")
    task: str = "lines"
    lengths: tuple[int, ...] = (512, 1536)
    cases: int = 30
    samples: int = 50
    methods: tuple[str, ...] = METHODS
    rates: Mapping = field(default_factory=dict)
    transfer_tasks: tuple[str, ...] = ("lines", "multikey", "passkey")
    transfer_method: str = "SEAL-C"
    transfer_length: int = 1024
    heads_lengths: tuple[int, ...] = (512, 1024)
    heads_cases: int = 5
    factor: float = 0.9
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"


def run(settings: Settings, output: str, *, progress: bool | None = None, say: Callable[[str], None] = print) -> dict:
    """Runs what is missing of the study in ``output``; returns what it writes to ``study.json``.

    Raises:
        ValueError: ``output`` holds a study with other settings.
    """
    claim(output, json.loads(json.dumps(asdict(settings))), "seal study")
    common = {"seed": settings.seed, "progress": progress}

    def fresh():
        return load_model(settings.model, device=settings.device, dtype=settings.dtype, call="seal study")

    seconds, started = {}, time.monotonic()

    def lap(name):
        nonlocal started
        seconds[name] = round(time.monotonic() - started, 1)
        started = time.monotonic()

    say(f"1. {', '.join(settings.methods)} on {settings.task}, {settings.cases} cases a length")
    comparison = compare(
        fresh, settings.task, settings.lengths, settings.cases, output=os.path.join(output, "compare"),
        samples=settings.samples, methods=settings.methods, rates=settings.rates, say=say, **common,
    )  # fmt: skip
    write_comparison(comparison, output)
    lap("comparison")

    names = ", ".join(settings.transfer_tasks)
    say(f"\n2. {settings.transfer_method} trained on each of {names} and measured on each")
    rates = settings.rates.get(settings.transfer_method)
    chosen = comparison.training.get(settings.transfer_method, {}).get("lr") if isinstance(rates, (list, tuple)) else rates
    found = transfer(
        fresh, settings.transfer_tasks, settings.transfer_tasks, settings.transfer_length, settings.cases,
        output=os.path.join(output, "transfer"), method=settings.transfer_method, lr=chosen, samples=settings.samples,
        say=say, **common,
    )  # fmt: skip
    write_transfer(found, output)
    lap("transfer")

    say(f"\n3. Head influence at {', '.join(map(str, settings.heads_lengths))} tokens, {settings.heads_cases} cases each")
    model, tokenizer = fresh()
    for factor, name in ((0.0, "heads"), (settings.factor, "heads-step")):
        influence = heads.influence(
            model, tokenizer, settings.task, settings.heads_lengths, settings.heads_cases, factor=factor,
            output=os.path.join(output, f"{name}.json"), resume=True, **common,
        )  # fmt: skip
        write_influence(influence, output, name)
        say(describe_agreement(influence))
        if factor == 0.0:
            experiment = heads.quadrant_experiment(
                model, tokenizer, influence, settings.task, settings.heads_lengths, settings.cases, measure="logprob",
                output=os.path.join(output, "quadrants"), resume=True, **common,
            )  # fmt: skip
            write_quadrants(experiment, influence, output, "logprob")
            for evaluation in experiment.values():
                cells = ", ".join(f"{n}: {cell.accuracy:.2f}" for n, cell in evaluation.accuracy.items())
                say(f"   {evaluation.name}: {cells}")
    lap("heads")

    from .collect_env import facts

    environment = {**facts(), "threads": torch.get_num_threads(), "device": str(model.device), "dtype": str(model.dtype)}
    results = {
        "kind": "seal_ops.study", "settings": json.loads(json.dumps(asdict(settings))), "environment": environment,
        "seconds": seconds, "agreement": {"removal": _agreement(output, "heads"), "step": _agreement(output, "heads-step")},
    }  # fmt: skip
    path = os.path.join(output, "study.json")
    if os.path.exists(path):  # a run that found everything done must not overwrite how long it took
        with open(path, encoding="utf-8") as file:
            earlier = json.load(file).get("seconds", {})
        results["seconds"] = {**seconds, **earlier}  # this file is written last, so an earlier one timed whole stages
    atomic_write(path, json.dumps(results, indent=1) + "\n")
    write_report(output, title=f"SEAL on {settings.model}")
    return results


def _agreement(output, name):
    return Influence.load(os.path.join(output, f"{name}.json")).agreement()


# ----------------------------------------------------------------------------------------------------------- files


def files(output: str, stem: str) -> list[str]:
    """The PNG and the SVG of a plot in a folder."""
    return [os.path.join(output, stem + suffix) for suffix in BOTH]


def write_comparison(found: Comparison, output: str) -> None:
    """``comparison.json``, ``.csv``, and plots of accuracy and cost."""
    found.save(os.path.join(output, "comparison.json"))
    found.save_csv(os.path.join(output, "comparison.csv"))
    title = f"{found.settings['task']}: scales and low-rank adapters"
    trained_at = found.settings["train_length"]
    plots.accuracy_by_length(
        list(found.evaluations.values()), files(output, "comparison"), title=title, trained_at=trained_at
    )
    plots.cost(found.rows(), files(output, "cost"), title="What each method costs")


def comparison_table(found: Comparison):
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


def write_transfer(found: Transfer, output: str) -> None:
    """``transfer.json``, ``.csv`` and the matrix as a plot."""
    found.save(os.path.join(output, "transfer.json"))
    found.save_csv(os.path.join(output, "transfer.csv"))
    rows, columns, values = found.matrix()
    rows = ["untrained" if row == "base" else row for row in rows]
    title = f"{found.settings['method']} at {found.settings['length']} tokens"
    plots.matrix(
        rows, columns, values, files(output, "transfer"), xlabel="measured on", ylabel="trained on", title=title
    )


def write_influence(found: Influence, output: str, stem: str = "heads") -> None:
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
    plots.head_influence(panels, files(output, stem), label=label, title=title)
    if len(methods) == 2:
        length = found.lengths[-1]
        known = found.ablated
        names = ["{}.{}".format(*found.units[i]) for i in known] if len(found.units[0]) == 2 else []
        plots.agreement(
            found.change("gradient", length)[known], found.change("logprob", length)[known],
            files(output, f"{stem}-agreement"), name=f"{what[0].upper() + what[1:]}, {length} tokens",
            rho=found.agreement()["gradient_ablation"].get(length), labels=names,
        )  # fmt: skip


def describe_agreement(found: Influence) -> str:
    """Spearman's correlations in one line."""
    both = found.agreement()
    parts = [f"{rho:.2f} at {length}" for length, rho in both["gradient_ablation"].items()]
    text = f"   gradient and ablation (scale x{found.settings['factor']:g}), Spearman: {', '.join(parts) or 'not measured'}"
    across = [f"{rho:.2f} between {pair.replace(',', ' and ')}" for pair, rho in both["lengths"].items()]
    return text + (f"; ablation {', '.join(across)} tokens" if across else "")


def write_quadrants(results: Mapping[str, Evaluation], found: Influence, output: str, measure: str) -> None:
    """``quadrants.json`` and the plot of the four curves."""
    groups = heads.quadrants(found, measure)
    cells = {
        name: [{"length": length, **asdict(cell)} for length, cell in evaluation.accuracy.items()]
        for name, evaluation in results.items()
    }
    units = {name: [found.units[i] for i in group] for name, group in groups.items()}
    content = {"kind": "seal_ops.quadrants", "measure": measure, "units": units, "accuracy": cells}
    atomic_write(os.path.join(output, "quadrants.json"), json.dumps(content, indent=1) + "\n")
    title = f"Harmful heads down, helpful heads up ({len(groups['harmful'])} and {len(groups['helpful'])})"
    plots.accuracy_by_length(list(results.values()), files(output, "quadrants"), title=title)
