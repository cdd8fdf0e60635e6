"""``seal study``: comparison, transfer matrix and head importance of one model in one run, with their files and
plots."""

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field

from ..huggingface.loading import load_model
from ..huggingface.origin import provenance
from ..report.html import write_report
from ..report.writers import (
    describe_agreement,
    write_comparison,
    write_head_importance,
    write_quadrants,
    write_transfer,
)
from ..tasks.description import describe_prompts, prompt_options
from ..utils.files import atomic_write
from .comparison import METHODS, compare
from .head_importance import HeadImportance, measure_head_importance
from .quadrants import check_noise, group_by_sign, quadrant_experiment
from .runs import read_json_file, require_shipped, reserved
from .transfer_matrix import transfer


@dataclass(frozen=True)
class Settings:
    """What a study does; the defaults are for the shipped model, minutes on two cores.

    Attributes:
        model: folder or hub name.
        task: what is compared and whose heads are looked at.
        lengths: prompt lengths in tokens; the longest is trained at.
        cases: test cases at each length, and in each cell of the transfer matrix.
        samples: training samples.
        methods: of :data:`seal_ops.experiments.comparison.METHODS`.
        rates: learning rates to choose from, by method; one that is not named has the paper's.
        transfer_tasks: trained on each, measured on each.
        transfer_method, transfer_length: what is trained there, and at which length.
        heads_lengths, heads_cases: where importance is measured, and on how many samples at each length.
        factor: a small step besides removal, at which the gradient's estimate is checked.
        quadrant_noise: ``noise`` of :func:`seal_ops.group_by_sign`.
        seed: draws all samples.
        chat_template, chat_template_kwargs: see :class:`seal_ops.tasks.Encoder`.
        device, dtype: see :func:`seal_ops.huggingface.loading.load_model`.
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
    quadrant_noise: float = 2.0
    seed: int = 0
    chat_template: str | bool | None = None
    chat_template_kwargs: dict | None = None
    device: str = "auto"
    dtype: str = "default"


def run(settings: Settings, output: str, *, progress: bool | None = None, log: Callable[[str], None] = print) -> dict:
    """Runs what is missing of the study in ``output``; returns what it writes to ``study.json``.

    Raises:
        ValueError: ``output`` holds a study with other settings.
    """
    check_noise(settings.quadrant_noise, "seal study")
    require_shipped(settings.model, Settings.model, "seal study")
    model, tokenizer = load_model(settings.model, device=settings.device, dtype=settings.dtype, call="seal study")
    origin, prompts = provenance(model), prompt_options(settings.chat_template, settings.chat_template_kwargs)
    claimed = {
        **asdict(settings),
        **describe_prompts(tokenizer, **prompts),
        "fingerprint": origin["model"]["fingerprint"],
    }
    del model  # every stage loads its own
    with reserved(output, claimed, "seal study"):
        common = {"seed": settings.seed, "progress": progress, **prompts}

        def load_model_fn():
            return load_model(settings.model, device=settings.device, dtype=settings.dtype, call="seal study")

        seconds, started = {}, time.monotonic()

        def lap(name):
            nonlocal started
            seconds[name] = round(time.monotonic() - started, 1)
            started = time.monotonic()

        log(f"1. {', '.join(settings.methods)} on {settings.task}, {settings.cases} cases a length")
        comparison = compare(
            load_model_fn, settings.task, settings.lengths, settings.cases, output=os.path.join(output, "compare"),
            samples=settings.samples, methods=settings.methods, rates=settings.rates, log=log, **common,
        )  # fmt: skip
        write_comparison(comparison, output)
        lap("comparison")

        names = ", ".join(settings.transfer_tasks)
        log(f"\n2. {settings.transfer_method} trained on each of {names} and measured on each")
        rates = settings.rates.get(settings.transfer_method)
        chosen = (
            comparison.training.get(settings.transfer_method, {}).get("lr")
            if isinstance(rates, (list, tuple))
            else rates
        )
        found = transfer(
            load_model_fn, settings.transfer_tasks, settings.transfer_tasks, settings.transfer_length, settings.cases,
            output=os.path.join(output, "transfer"), method=settings.transfer_method, lr=chosen,
            samples=settings.samples, log=log, **common,
        )  # fmt: skip
        write_transfer(found, output)
        lap("transfer")

        log(
            f"\n3. Head importance at {', '.join(map(str, settings.heads_lengths))} tokens, {settings.heads_cases} cases each"  # noqa: E501
        )
        model, tokenizer = load_model_fn()
        for factor, name in ((0.0, "heads"), (settings.factor, "heads-step")):
            measured = measure_head_importance(
                model, tokenizer, settings.task, settings.heads_lengths, settings.heads_cases, factor=factor,
                output=os.path.join(output, f"{name}.json"), resume=True, **common,
            )  # fmt: skip
            write_head_importance(measured, output, name)
            log(describe_agreement(measured))
            if factor == 0.0:
                experiment = quadrant_experiment(
                    model, tokenizer, measured, settings.task, settings.heads_lengths, settings.cases,
                    measure="logprob", noise=settings.quadrant_noise, output=os.path.join(output, "quadrants"),
                    resume=True, **common,
                )  # fmt: skip
                groups = group_by_sign(measured, "logprob", settings.quadrant_noise)
                write_quadrants(experiment, groups, measured.units, output, "logprob", settings.quadrant_noise)
                for evaluation in experiment.values():
                    log(f"   {evaluation.line()}")
        lap("heads")

        results = {
            "kind": "seal_ops.study", "settings": json.loads(json.dumps(asdict(settings))), "provenance": origin,
            "seconds": seconds, "agreement": {"removal": _agreement(output, "heads"), "step": _agreement(output, "heads-step")},  # noqa: E501
        }  # fmt: skip
        path = os.path.join(output, "study.json")
        if os.path.exists(path):  # a run that found everything done must not overwrite how long it took
            earlier = read_json_file(path).get("seconds", {})
            results["seconds"] = {
                **seconds,
                **earlier,
            }  # this file is written last, so an earlier one timed whole stages
        atomic_write(path, json.dumps(results, indent=1) + "\n")
        write_report(output, title=f"SEAL on {settings.model}")
        return results


def _agreement(output, name):
    return HeadImportance.load(os.path.join(output, f"{name}.json")).agreement()
