"""The plan of the study, and its jobs in the order in which they matter."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ...huggingface.context_extension.methods import METHODS
from ...training.long_context import FULL_ATTENTION, RECIPES
from ..comparison import VALIDATION
from ..extension_comparison import BASE, suggested
from ..study_jobs.drawn_samples import named
from ..study_jobs.queue import Job

SCALES = "SEAL-C"
SECTIONS = ("perplexity", "retrieval", "scaled", "tuned")


@dataclass(frozen=True)
class Plan:
    """What the study does; the defaults are for SmolLM2-135M (trained on 8,192 tokens) on one GPU of the H100's kind.

    Attributes:
        text: a file of English text.  Perplexity by method is of its beginning; of fine-tuned models it is of the last
            three tenths, and the rest is trained on.
        lengths: tokens at which everything is measured, as far as a method reaches.
        methods: of `seal_ops.extend`; each is set up once for every reach, those that read any length once.
        reaches: tokens that the options are chosen for.
        windows: windows of text at each length.
        tasks, cases, seeds: retrieval, so many cases at each length for each seed.
        train_length, samples, rates: of SEAL-C, which is trained for each task under every method, set up for the
            shortest reach that holds ``train_length``; the first seed chooses the rate.
        recipes, tuned_lengths, tuned_steps, tuned_rates, tuned_positions: fine-tuning of `seal_ops.train`, one row of
            text a step; every recipe takes as many steps from the same start, at the rate of the least loss on
            ``tuned_validation`` windows of the training text.
    """

    text: str
    lengths: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768)
    methods: tuple[str, ...] = (
        "linear", "ntk", "dynamic_ntk", "yarn", "self_extend", "dual_chunk", "lm_infinite", "streaming",
    )  # fmt: skip
    reaches: tuple[int, ...] = (16384, 32768)
    windows: int = 4
    tasks: tuple[str, ...] = ("passkey", "multikey")
    cases: int = 20
    seeds: tuple[int, ...] = (0, 1, 2)
    train_length: int = 16384
    samples: int = 50
    rates: tuple[float, ...] = (5e-3, 2e-2, 5e-2)
    recipes: tuple[str, ...] = (FULL_ATTENTION, "longlora", "sinklora")
    tuned_lengths: tuple[int, ...] = (16384, 32768)
    tuned_steps: int = 60
    tuned_rates: tuple[float, ...] = (2e-4, 1e-3)
    tuned_positions: str = "linear"
    tuned_validation: int = 1
    sections: tuple[str, ...] = SECTIONS


def variants(plan: Plan) -> list[tuple[str, int]]:
    """(method, what it is set up for), the plain model first."""
    made = [(BASE, max(plan.lengths))]
    for method in plan.methods:
        # Options are made for a reach where there is a factor or a group; the other methods read any length.
        sized = "factor" in METHODS[method].options or method == "self_extend"
        made += [(method, reach) for reach in (sorted(plan.reaches) if sized else [max(plan.reaches)])]
    return made


def scaled_variants(plan: Plan) -> list[tuple[str, int]]:
    """Those that scales are trained under: each method at the shortest reach that holds ``train_length``."""
    shortest: dict[str, int] = {}
    for method, reach in variants(plan):
        if method != BASE and plan.train_length in lengths_of(plan, method, reach):
            shortest.setdefault(method, reach)
    return list(shortest.items())


def options_of(method: str, reach: int, trained: int) -> dict:
    """Options of a method for a model that was trained on ``trained`` tokens and is to read ``reach``."""
    return dict(suggested(trained, reach))[method]


def lengths_of(plan: Plan, method: str, reach: int) -> list[int]:
    """The lengths of the plan that a method is measured at."""
    return [n for n in plan.lengths if method == BASE or n <= reach]


def jobs(plan: Plan) -> list[Job]:
    """All jobs, the first seed's first: the others take over what it has chosen."""
    made = []
    if "perplexity" in plan.sections:
        made += [_perplexity(plan, *variant) for variant in variants(plan)]
    for seed in plan.seeds:
        if "retrieval" in plan.sections:
            made += [_retrieval(plan, *variant, seed) for variant in variants(plan)]
        if "scaled" in plan.sections:
            made += [_scaled(plan, *variant, seed) for variant in scaled_variants(plan)]
        if seed == plan.seeds[0] and "tuned" in plan.sections:
            made += [_tuned(plan, recipe, length) for length in plan.tuned_lengths for recipe in plan.recipes]
    return made


def job_name(section: str, *parts) -> str:
    return "-".join([section, *map(str, parts)])


def _perplexity(plan, method, reach) -> Job:
    def run(bench):
        lengths = lengths_of(plan, method, reach)
        with bench.extended(method, reach) as (model, facts):
            found = {n: bench.perplexity(model, bench.text, n, plan.windows) for n in lengths if model is not None}
        cells = ", ".join(f"{n} {f['perplexity']:.2f}" for n, f in found.items())
        return {**facts, "perplexity": found, "summary": cells or facts["refused"]}

    return Job(job_name("perplexity", method, reach), run, 20)


def _retrieval(plan, method, reach, seed) -> Job:
    lengths = lengths_of(plan, method, reach)

    def run(bench):
        with bench.extended(method, reach) as (model, facts):
            found = {t: bench.measure(t, lengths, plan.cases, seed) for t in plan.tasks if model is not None}
        return {**facts, "seed": seed, "measured": found, "summary": _brief(found) or facts["refused"]}

    drawn = tuple((task, n, plan.cases, seed, "test") for task in plan.tasks for n in lengths)
    return Job(job_name("retrieval", method, reach, seed), run, 60, drawn)


def _scaled(plan, method, reach, seed) -> Job:
    first = job_name("scaled", method, reach, plan.seeds[0])
    chooses = seed == plan.seeds[0]
    lengths = lengths_of(plan, method, reach)

    def run(bench):
        training, measured, texts = {}, {}, {}
        with bench.extended(method, reach) as (model, facts):
            for task in plan.tasks if model is not None else ():
                rates = plan.rates if chooses else (bench.result(first)["training"][task]["lr"],)
                training[task], (measured[task], texts[task]) = bench.search(
                    SCALES, task, plan.train_length, plan.samples, rates, seed,
                    lambda model, task=task: (
                        bench.measure(task, lengths, plan.cases, seed, model),
                        {n: bench.perplexity(model, bench.text, n, plan.windows) for n in lengths},
                    ),
                )  # fmt: skip
        return {
            **facts, "seed": seed, "measured": measured, "perplexity": texts, "training": training,
            "summary": _brief(measured) or facts["refused"],
        }  # fmt: skip

    drawn = tuple((task, plan.train_length, plan.samples, seed, "train") for task in plan.tasks)
    if chooses:
        drawn += tuple((task, plan.train_length, VALIDATION, seed + 1, "train") for task in plan.tasks)
    drawn += tuple((task, n, plan.cases, seed, "test") for task in plan.tasks for n in lengths)
    needs = () if chooses else (first,)
    return Job(job_name("scaled", method, reach, seed), run, 240 if chooses else 120, drawn, needs)


def _tuned(plan, recipe, length) -> Job:
    def run(bench):
        found = bench.tune(recipe, length)
        after = found["perplexity"][str(length)]["perplexity"]
        return {"recipe": recipe, "length": length, **found, "summary": f"perplexity {after:.3f} at {length}"}

    return Job(job_name("tuned", recipe, length), run, 120 * len(plan.tuned_rates))


def _brief(measured: dict) -> str:
    return "; ".join(
        f"{task} " + ", ".join(f"{n} {sum(s) / len(s):.2f}" for n, s in found["scores"].items())
        for task, found in measured.items()
    )


def check(plan: Plan) -> None:
    """ValueError, FileNotFoundError: a plan that cannot be meant."""
    if not plan.text or not os.path.isfile(plan.text):
        raise FileNotFoundError(f"seal study: text must be a file of English text (--text FILE), got {plan.text}")
    for name, known in (("sections", SECTIONS), ("methods", METHODS), ("recipes", RECIPES)):
        if unknown := [value for value in getattr(plan, name) if value not in known]:
            raise ValueError(f"seal study: {name} must be among {', '.join(known)}, got {', '.join(unknown)}")
    for task in plan.tasks:
        named(task)
    for name in ("lengths", "reaches", "seeds", "tasks"):
        if not getattr(plan, name):
            raise ValueError(f"seal study: {name} must name at least one, got none")
    if plan.train_length not in plan.lengths or plan.train_length > max(plan.reaches):
        raise ValueError(
            f"seal study: train_length must be one of the lengths {list(plan.lengths)} that a reach holds, got "
            f"{plan.train_length}"
        )
