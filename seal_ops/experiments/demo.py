"""``seal demo``: measure retrieval by length, train SEAL-H and SEAL-C, measure again, merge, measure the merged model.

Every stage leaves a file in the output folder and is skipped where that is complete, so that the same command continues
an interrupted demo.
"""

import json
import os
import shutil
import time
from dataclasses import asdict, dataclass

import torch

from .. import tasks
from ..adapters.attachment import attach, load
from ..adapters.merging import merge
from ..evaluation.results import Evaluation
from ..evaluation.runner import evaluate
from ..huggingface.loading import load_model
from ..report import plots
from ..training.loop import RESULT, train
from ..utils.files import atomic_write, replacing_folder

NAMES = {"head": "SEAL-H", "channel": "SEAL-C"}
SETTINGS = "settings.json"
RESULTS = "results.json"
PLOTS = ("accuracy.png", "scales.png")


@dataclass(frozen=True)
class Settings:
    """What a demo does; the defaults are for the shipped model.

    Attributes:
        model: folder or hub name.
        lengths: prompt lengths in tokens at which retrieval is measured; the longest is trained at.
        cases: test cases at each length.
        samples: training samples.
        lr_head, lr_channel: learning rates.
        seed: draws the samples of both kinds.
        device, dtype: see :func:`seal_ops.huggingface.loading.load_model`.
    """

    model: str = os.path.join("models", "seal-tiny")
    lengths: tuple[int, ...] = (256, 512, 1024, 1536, 2048)
    cases: int = 40
    samples: int = 50
    lr_head: float = 1e-2
    lr_channel: float = 2e-2
    seed: int = 0
    device: str = "auto"
    dtype: str = "default"


def run(settings: Settings, output: str, *, progress: bool | None = None, log=print) -> dict:
    """Runs what is missing of the demo in ``output``; returns what it writes to ``results.json``.

    Args:
        progress: draw bars; None draws where stderr is a terminal.
        log: receives each line of text.

    Raises:
        ValueError: ``output`` holds a demo with other settings.
    """
    started = time.monotonic()
    _claim(output, settings)
    task, longest = tasks.lines, max(settings.lengths)
    torch.manual_seed(settings.seed)

    def load_model_fn():
        return load_model(settings.model, device=settings.device, dtype=settings.dtype, call="seal demo")

    def measure(model, tokenizer, name, file, lengths):
        return evaluate(
            model, tokenizer, task, lengths, settings.cases, seed=settings.seed, name=name,
            output=os.path.join(output, file), resume=True, progress=progress,
        )  # fmt: skip

    model, tokenizer = load_model_fn()
    count = sum(p.numel() for p in model.parameters())
    log(f"{settings.model}: {count / 1e6:.1f}M parameters, {model.dtype}".replace("torch.", "") + f", on {model.device}")
    log(f"\n1. Retrieval of the untouched model, {settings.cases} cases at each of {len(settings.lengths)} lengths")
    found = {"base": measure(model, tokenizer, "base", "base.json", settings.lengths)}
    log(_line(found["base"]))

    training, learned = {}, {}
    for step, (granularity, name) in enumerate(NAMES.items(), 2):
        log(f"\n{step}. {name}: train on {settings.samples} samples of {longest} tokens, then measure again")
        folder = os.path.join(output, granularity)
        model, tokenizer = load_model_fn()
        if os.path.exists(os.path.join(folder, RESULT)):
            load(model, folder)
        else:
            samples = task.generate(tokenizer, longest, settings.samples, settings.seed)
            attach(model, granularity)
            lr = settings.lr_head if granularity == "head" else settings.lr_channel
            train(model, samples, lr=lr, seed=settings.seed, output_dir=folder, resume=True, progress=progress)
        with open(os.path.join(folder, RESULT), encoding="utf-8") as file:
            training[name] = json.load(file)
        learned[name] = dict(model.seal_scales.items())
        found[name] = measure(model, tokenizer, name, f"{granularity}.json", settings.lengths)
        log(_line(found[name]) + f"; {training[name]['parameters']} numbers trained in {training[name]['seconds']:.0f} s")

    log(f"\n4. Merge into plain weights, load them as any checkpoint, measure at {longest} tokens")
    agreement = {}
    for granularity, name in NAMES.items():
        folder = os.path.join(output, f"merged-{granularity}")
        if not os.path.isdir(folder):
            model, tokenizer = load_model_fn()
            load(model, os.path.join(output, granularity))
            merge(model)
            with replacing_folder(folder) as temporary:
                model.save_pretrained(temporary)
                tokenizer.save_pretrained(temporary)
        model, tokenizer = load_model(folder, device=settings.device, dtype=settings.dtype, call="seal demo")
        merged = measure(model, tokenizer, f"{name} merged", f"merged-{granularity}.json", [longest])
        found[merged.name] = merged
        agreement[name] = _agreement(found[name], merged)
        cases = agreement[name]["cases"]
        log(f"{_line(merged)}; agrees with the unmerged model in {cases - agreement[name]['differ']} of {cases} cases")

    _draw(output, found, learned, longest)
    results = {
        "settings": asdict(settings),
        "environment": _environment(),
        "accuracy": {
            name: [{"length": length, **asdict(cell)} for length, cell in evaluation.accuracy.items()]
            for name, evaluation in found.items()
        },
        "training": {name: {k: v for k, v in t.items() if k != "settings"} for name, t in training.items()},
        "merged_against_unmerged": agreement,
        "seconds": {
            "evaluation": round(sum(e.seconds for e in found.values()), 1),
            "training": round(sum(t["seconds"] for t in training.values()), 1),
            "this_call": round(time.monotonic() - started, 1),
        },
        "plots": list(PLOTS),
    }
    atomic_write(os.path.join(output, RESULTS), json.dumps(results, indent=1) + "\n")
    return results


def table(results: dict):
    """The results as a table for rich: a row a model, a column a length, the interval at the longest."""
    from rich.table import Table

    lengths = results["settings"]["lengths"]
    shown = Table(title=f"Line retrieval, {results['settings']['cases']} cases a cell", title_justify="left")
    shown.add_column("")
    shown.add_column("trained", justify="right")
    for length in lengths:
        shown.add_column(f"{length}", justify="right")
    shown.add_column(f"95 % at {max(lengths)}", justify="right")
    for name, cells in results["accuracy"].items():
        by_length = {cell["length"]: cell for cell in cells}
        last = by_length[max(lengths)]
        shown.add_row(
            name,
            str(results["training"].get(name, {}).get("parameters", "")),
            *(f"{by_length[n]['accuracy']:.2f}" if n in by_length else "" for n in lengths),
            f"{last['low']:.2f} to {last['high']:.2f}",
        )
    return shown


def forget(output: str) -> None:
    """Removes what an earlier demo left in ``output``, and nothing else."""
    names = [SETTINGS, RESULTS, *PLOTS, "base.json"]
    for granularity in NAMES:
        names += [f"{granularity}.json", f"merged-{granularity}.json", granularity, f"merged-{granularity}"]
    for path in (os.path.join(output, name) for name in names):
        if os.path.isdir(path):
            shutil.rmtree(path)
        elif os.path.exists(path):
            os.unlink(path)


def _claim(output, settings):
    """Makes the folder this demo's, or checks that it is."""
    path = os.path.join(output, SETTINGS)
    wanted = json.loads(json.dumps(asdict(settings)))
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            earlier = json.load(file)
        differing = [key for key in wanted if earlier.get(key) != wanted[key]]
        if differing:
            raise ValueError(
                f"seal demo: output {output} must be new or hold this demo, got one with another "
                f"{', '.join(differing)} (give another --output, or --restart)"
            )
    else:
        atomic_write(path, json.dumps(wanted, indent=1) + "\n")


def _line(evaluation: Evaluation) -> str:
    cells = ", ".join(f"{length}: {cell.accuracy:.2f}" for length, cell in evaluation.accuracy.items())
    return f"   {evaluation.name}: {cells}"


def _agreement(one: Evaluation, other: Evaluation) -> dict:
    """In how many of the cases that both hold the scores differ."""
    scores = {(r["length"], r["index"]): r["score"] for r in one.records}
    pairs = [(scores[r["length"], r["index"]], r["score"]) for r in other.records]
    return {"cases": len(pairs), "differ": sum(a != b for a, b in pairs)}


def _draw(output, found, learned, longest):
    curves = [found[name] for name in ("base", *NAMES.values())]
    accuracy, scales = (os.path.join(output, name) for name in PLOTS)
    plots.accuracy_by_length(curves, accuracy, title="Line retrieval before and after SEAL", trained_at=longest)
    plots.scales_by_layer(learned, scales)


def _environment():
    from ..ops.environment import facts

    return {**facts(), "threads": torch.get_num_threads()}
