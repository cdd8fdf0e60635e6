"""``seal demo``: measure retrieval by length, train SEAL-H and SEAL-C, measure again, merge, measure the merged model.

With several tasks each has a folder of its own in the output folder.  Every stage leaves a file there and is skipped
where
that is complete, so that the same command continues an interrupted demo.
"""

import contextlib
import functools
import json
import os
import shutil
import time
from dataclasses import asdict, dataclass, replace

import torch

from .. import tasks
from ..adapters.attachment import load
from ..adapters.merging import merge
from ..evaluation.results import Evaluation
from ..evaluation.runner import evaluate
from ..huggingface.context_extension.extending import extend
from ..huggingface.identity import fingerprint
from ..huggingface.loading import load_model
from ..huggingface.model_packages import PACKAGES, resolve
from ..huggingface.modes import accepts
from ..huggingface.origin import provenance
from ..report import plots
from ..report.html import NAME as REPORT
from ..tasks.description import describe, prompt_options
from ..training.recipe import LEARNING_RATES, NAMES
from ..utils.files import atomic_write, replacing_folder
from ..utils.locks import only_writer
from .comparison import trained
from .runs import SETTINGS, require_shipped, reserved

RESULTS = "results.json"
PLOTS = ("accuracy.png", "scales.png")


@dataclass(frozen=True)
class Settings:
    """What a demo does; the defaults are for the shipped model.

    Attributes:
        model: folder, hub name, or a name of :data:`seal_ops.huggingface.model_packages.PACKAGES`.
        tasks: trained and measured one after the other.
        lengths: prompt lengths in tokens at which retrieval is measured; the longest is trained at.
        cases: test cases at each length.
        samples: training samples.
        lr_head, lr_channel: learning rates.
        seed: draws the samples of both kinds.
        chat_template, chat_template_kwargs: see :class:`seal_ops.tasks.Encoder`.
        device, dtype: see :func:`seal_ops.huggingface.loading.load_model`.
        extend: method and options of :func:`seal_ops.extend`, for every model of the demo.
    """

    model: str = os.path.join("models", "seal-tiny")
    tasks: tuple[str, ...] = ("lines",)
    lengths: tuple[int, ...] = (256, 512, 1024, 1536, 2048)
    cases: int = 40
    samples: int = 50
    lr_head: float = LEARNING_RATES["SEAL-H"]
    lr_channel: float = LEARNING_RATES["SEAL-C"]
    seed: int = 0
    chat_template: str | bool | None = None
    chat_template_kwargs: dict | None = None
    device: str = "auto"
    dtype: str = "default"
    extend: tuple[str, dict] | None = None


# Where the defaults of Settings are not for a model: on a GPU, and on a CPU, where a pretrained model is slow.
_PRESETS = {
    "smollm2": (
        {"tasks": ("multikey", "passkey"), "lengths": (512, 1024, 2048, 4096, 8000), "lr_head": 3e-2},
        {"tasks": ("multikey", "passkey"), "lengths": (512, 1024), "cases": 10, "samples": 10, "lr_head": 3e-2},
    )
}


def preset(model: str, device: str = "auto") -> Settings:
    """The settings for ``model`` on ``device`` where nothing else is said."""
    gpu = torch.cuda.is_available() if device == "auto" else device.startswith("cuda")
    on_gpu, on_cpu = _PRESETS.get(model, ({}, {}))
    return replace(Settings(), model=model, device=device, **(on_gpu if gpu else on_cpu))


def run(settings: Settings, output: str, *, progress: bool | None = None, log=print) -> dict[str, dict]:
    """Runs what is missing of the demo in ``output``; returns what it writes to each task's ``results.json``.

    Args:
        progress: draw bars; None draws where stderr is a terminal.
        log: receives each line of text.

    Raises:
        ValueError: ``output`` holds a demo with other settings, or a task is unknown.
        OSError: the model cannot be loaded; ``output`` is left alone then.
    """
    require_shipped(settings.model, Settings.model, "seal demo")
    folders = _folders(settings, output)
    path = resolve(settings.model, call="seal demo", log=log)

    def load_model_fn(folder=path):
        model, tokenizer = load_model(folder, device=settings.device, dtype=settings.dtype, call="seal demo")
        if settings.extend is not None:
            method, options = settings.extend
            extend(model, method, **options)
        return model, tokenizer

    model, tokenizer = load_model_fn()
    origin = provenance(model)
    prompts = settings.chat_template, settings.chat_template_kwargs
    described = {task: describe(tasks.get(task), tokenizer, *prompts) for task in settings.tasks}
    claimed = {**asdict(settings), "task": described, "fingerprint": origin["model"]["fingerprint"]}
    with reserved(output, json.loads(json.dumps(claimed)), "seal demo", " (give another --output, or --restart)"):
        count = sum(p.numel() for p in model.parameters())
        log(
            f"{settings.model}: {count / 1e6:.1f}M parameters, {model.dtype}".replace("torch.", "")
            + f", on {model.device}"
        )
        if settings.model in PACKAGES:
            known = PACKAGES[settings.model]
            log(f"   {known.title}; {known.license}")
        if not all(os.path.exists(os.path.join(folder, RESULTS)) for folder in folders.values()):
            log(f"   about {_duration(_estimate(model, settings))} for all of it here, as busy as the machine is")
        del model
        return {
            task: _run_task(settings, task, folder, load_model_fn, origin, progress=progress, log=log)
            for task, folder in folders.items()
        }


def _folders(settings, output):
    """The folder of each task."""
    names = {task: tasks.get(task).name for task in settings.tasks}
    if not names or len(set(names.values())) < len(settings.tasks):
        raise ValueError(
            f"seal demo: tasks must be different ones, at least one, got {', '.join(settings.tasks) or 'none'}"
        )
    return {task: output if len(names) == 1 else os.path.join(output, name) for task, name in names.items()}


def _run_task(settings, task_name, output, load_model_fn, origin, *, progress, log):
    started = time.monotonic()
    task, longest = tasks.get(task_name), max(settings.lengths)
    torch.manual_seed(settings.seed)
    prompts = prompt_options(settings.chat_template, settings.chat_template_kwargs)
    draw = functools.partial(task.generate, progress=progress, **prompts)

    def measure(model, tokenizer, name, file, lengths):
        return evaluate(
            model, tokenizer, task, lengths, settings.cases, seed=settings.seed, name=name,
            output=os.path.join(output, file), resume=True, progress=progress, **prompts,
        )  # fmt: skip

    model, tokenizer = load_model_fn()
    log(f"\n1. {task.name}: the untouched model, {settings.cases} cases at each of {len(settings.lengths)} lengths")
    found = {"base": measure(model, tokenizer, "base", "base.json", settings.lengths)}
    log(f"   {found['base'].line()}")

    training, learned = {}, {}
    for step, (granularity, name) in enumerate(NAMES.items(), 2):
        log(f"\n{step}. {name}: train on {settings.samples} samples of {longest} tokens, then measure again")
        model, tokenizer, training[name] = trained(
            load_model_fn,
            name,
            os.path.join(output, granularity),
            functools.partial(draw, tokenizer, longest, settings.samples, settings.seed),
            lr=settings.lr_head if granularity == "head" else settings.lr_channel,
            seed=settings.seed,
            progress=progress,
        )
        learned[name] = dict(model.seal_scales.items())
        found[name] = measure(model, tokenizer, name, f"{granularity}.json", settings.lengths)
        told = f"{training[name]['parameters']} numbers trained in {training[name]['seconds']:.0f} s"
        log(f"   {found[name].line()}; {told}")

    log(f"\n4. Merge into plain weights, load them as any checkpoint, measure at {longest} tokens")
    agreement = {}
    for granularity, name in NAMES.items():
        folder = os.path.join(output, f"merged-{granularity}")
        model, tokenizer = load_model_fn()
        load(model, os.path.join(output, granularity))
        wanted = fingerprint(merge(model))
        if not os.path.isdir(folder):
            with replacing_folder(folder) as temporary:
                model.save_pretrained(temporary)
                tokenizer.save_pretrained(temporary)
        model, tokenizer = load_model_fn(folder)
        if fingerprint(model) != wanted:
            raise ValueError(
                f"seal demo: {folder} must hold the merged model of this demo, got another; remove it, or --restart"
            )
        merged = measure(model, tokenizer, f"{name} merged", f"merged-{granularity}.json", [longest])
        found[merged.name] = merged
        agreement[name] = _agreement(found[name], merged)
        cases = agreement[name]["cases"]
        agreeing = cases - agreement[name]["differ"]
        log(f"   {merged.line()}; agrees with the unmerged model in {agreeing} of {cases} cases")

    _draw(output, task, found, learned, longest)
    results = {
        "task": task.name,
        "settings": asdict(settings),
        "provenance": origin,
        "accuracy": {name: evaluation.cells() for name, evaluation in found.items()},
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
    shown = Table(title=f"{results['task']}, {results['settings']['cases']} cases a cell", title_justify="left")
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
    """Removes what an earlier demo left in ``output``, and nothing else; RuntimeError where one is at work there."""
    with only_writer(output, "seal demo"):
        _forget(output)


def _forget(output):
    names = [SETTINGS, RESULTS, *PLOTS, REPORT, "base.json"]
    for granularity in NAMES:
        names += [f"{granularity}.json", f"merged-{granularity}.json", granularity, f"merged-{granularity}"]
    folders = [output]
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError):
        with open(os.path.join(output, SETTINGS), encoding="utf-8") as file:
            folders += [os.path.join(output, described["task"]) for described in json.load(file)["task"].values()]
    for path in (os.path.join(folder, name) for folder in folders for name in names):
        if os.path.isdir(path):
            shutil.rmtree(path)
        elif os.path.exists(path):
            os.unlink(path)
    for folder in folders[1:]:
        with contextlib.suppress(OSError):  # something else is in it, or it was never made
            os.rmdir(folder)


def _estimate(model, settings) -> float:
    """Seconds, from one forward pass of the longest length: what is read, and three times that where it is trained."""
    longest = max(settings.lengths)
    ids = torch.zeros(1, longest, dtype=torch.long, device=model.device)
    options = {"use_cache": False, **({"logits_to_keep": 1} if accepts(model, "logits_to_keep") else {})}
    with torch.inference_mode():
        model(input_ids=ids[:, :64], **options)
        started = time.monotonic()
        model(input_ids=ids, **options).logits[0, -1].sum().item()
        a_token = (time.monotonic() - started) / longest
    read = settings.cases * (3 * sum(settings.lengths) + 2 * longest)
    written = 0.3 * read  # answers, one token after the other
    trained = 2 * 3 * settings.samples * longest
    return len(settings.tasks) * (read + written + trained) * a_token + 20


def _duration(seconds):
    return f"{seconds / 60:.0f} minutes" if seconds > 90 else f"{seconds:.0f} seconds"


def _agreement(one: Evaluation, other: Evaluation) -> dict:
    """In how many of the cases that both hold the scores differ."""
    scores = {(r["length"], r["index"]): r["score"] for r in one.records}
    pairs = [(scores[r["length"], r["index"]], r["score"]) for r in other.records]
    return {"cases": len(pairs), "differ": sum(a != b for a, b in pairs)}


def _draw(output, task, found, learned, longest):
    curves = [found[name] for name in ("base", *NAMES.values())]
    accuracy, scales = (os.path.join(output, name) for name in PLOTS)
    plots.accuracy_by_length(curves, accuracy, title=f"{task.name} before and after SEAL", trained_at=longest)
    plots.scales_by_layer(learned, scales)
