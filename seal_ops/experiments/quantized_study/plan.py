"""The plan of the study, and its jobs in the order in which they matter."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ...training.recipe import columns_rate
from ..comparison import VALIDATION
from ..study_jobs.drawn_samples import named
from ..study_jobs.queue import Job
from .workbench import RETRIEVAL, TEXT

UNTRAINED = ("16 bits", "NF4", "columns")


@dataclass(frozen=True)
class Plan:
    """What the study does; the defaults are for SmolLM2-135M on one GPU of the H200's kind.

    Attributes:
        text: a file of English text: seven tenths to train on and to choose weak columns by, the rest held out.
        task, lengths, cases: retrieval, at each length for each seed.
        seeds: each draws training samples, their order, and cases.
        samples, train_length: training samples of the task, and their tokens.
        columns: numbers of weak columns a layer; the last is combined with scales.
        column_factors: the rates of weak columns that are tried, as multiples of the paper's.
        low_rank_rates, scale_rates: those of QLoRA and of SEAL-C.
        window, text_windows, text_batch: tokens of a piece of text, pieces trained on, and in a step.
    """

    text: str
    task: str = "multikey"
    lengths: tuple[int, ...] = (2048, 8000)
    cases: int = 40
    seeds: tuple[int, ...] = (0, 1, 2)
    samples: int = 30
    train_length: int = 8000
    columns: tuple[int, ...] = (8, 32, 128)
    column_factors: tuple[float, ...] = (4.0, 20.0, 100.0)
    low_rank_rates: tuple[float, ...] = (2e-4, 1e-3)
    scale_rates: tuple[float, ...] = (5e-3, 2e-2)
    window: int = 1024
    text_windows: int = 96
    text_batch: int = 2
    validation_windows: int = 8
    held_out_windows: int = 32
    calibration_windows: int = 96
    trained: tuple[str, ...] = ("columns", "QLoRA", "SEAL-C", "columns + SEAL-C")


def jobs(plan: Plan) -> list[Job]:
    """All jobs, the first seed's first: the others take over the rates that it has chosen."""
    made = []
    for seed in plan.seeds:
        made += [_untrained(plan, method, k, seed) for method, k in _variants(plan, UNTRAINED)]
        for data in (RETRIEVAL, TEXT):
            for method, k in _variants(plan, plan.trained):
                if "SEAL" not in method or data == RETRIEVAL:  # scales learn where to look, not how to write
                    made.append(_trained(plan, method, k, data, seed))
    return made


def _variants(plan, methods):
    for method in methods:
        if method == "columns":
            yield from ((method, k) for k in plan.columns)
        else:
            yield method, plan.columns[-1] if method.startswith("columns") else 0


def job_name(kind: str, method: str, columns: int, data: str, seed: int) -> str:
    parts = [kind, method.replace(" + ", "-and-").replace(" ", ""), *([str(columns)] if columns else []), data]
    return "-".join([*(part for part in parts if part), str(seed)])


def _drawn(plan, seed, data=""):
    drawn = tuple((plan.task, length, plan.cases, seed, "test") for length in plan.lengths)
    if data == RETRIEVAL:
        drawn += ((plan.task, plan.train_length, plan.samples, seed, "train"),)
        if seed == plan.seeds[0]:
            drawn += ((plan.task, plan.train_length, VALIDATION, seed + 1, "train"),)
    return drawn


def _untrained(plan, method, k, seed) -> Job:
    def run(bench):
        with bench.prepared(method, k) as model:
            measured = bench.measure(model, seed)
        return {
            "method": method, "columns": k, "data": None, "seed": seed, "measured": measured,
            "summary": brief(measured),
        }  # fmt: skip

    return Job(job_name("untrained", method, k, "", seed), run, 6, _drawn(plan, seed))


def _trained(plan, method, k, data, seed) -> Job:
    first = plan.seeds[0]

    def run(bench):
        if seed != first:
            rates = [_rates(bench.result(job_name("trained", method, k, data, first)))]
        elif method == "columns + SEAL-C":
            alone = (("columns", k), ("SEAL-C", 0))
            rates = [_both(*(bench.result(job_name("trained", m, n, data, first)) for m, n in alone))]
        else:
            rates = rates_of(plan, method, k)
        found = bench.search(method, k, data, rates, seed)
        return {
            "method": method, "columns": k, "data": data, "seed": seed, **found, "summary": brief(found["measured"]),
        }  # fmt: skip

    needs = ()
    if seed != first:
        needs = (job_name("trained", method, k, data, first),)
    elif method == "columns + SEAL-C":
        needs = tuple(job_name("trained", m, n, data, first) for m, n in (("columns", k), ("SEAL-C", 0)))
    name = job_name("trained", method, k, data, seed)
    return Job(name, run, 30 if seed == first else 15, _drawn(plan, seed, data), needs)


def rates_of(plan: Plan, method: str, k: int) -> list[dict]:
    """What is tried on the first seed."""
    if method == "columns":
        return [{"column_lr": columns_rate(k) * factor} for factor in plan.column_factors]
    return [{"lr": lr} for lr in (plan.low_rank_rates if method == "QLoRA" else plan.scale_rates)]


def _rates(result: dict) -> dict:
    return {key: result["training"][key] for key in ("lr", "column_lr") if key in result["training"]}


def _both(columns: dict, scales: dict) -> dict:
    return {**_rates(scales), **_rates(columns)}


def brief(measured: dict) -> str:
    cells = ", ".join(f"{n} {sum(s) / len(s):.2f}" for n, s in measured["scores"].items())
    return f"perplexity {measured['perplexity']['perplexity']:.3f}; {cells}"


def check(plan: Plan) -> None:
    """ValueError, FileNotFoundError: a plan that cannot be meant."""
    if not plan.text or not os.path.isfile(plan.text):
        raise FileNotFoundError(f"seal study: text must be a file of English text (--text FILE), got {plan.text}")
    named(plan.task)
    if not plan.seeds:
        raise ValueError(f"seal study: seeds must name at least one, got {plan.seeds}")
