"""The jobs of the study, section by section, in the order in which they matter.

``main`` accuracy by length of the base, SEAL-H and SEAL-C on every task, three draws of samples; ``adapters`` LoRA
and DoRA on the
same; ``beyond`` contexts longer than the model's; ``curve`` accuracy by samples and by rate; ``length`` trained short
and measured
long; ``heads`` importance, quadrants and retrieval score; ``transfer`` scales of one task on all tasks and other
wordings;
``elsewhere`` perplexity and merging; ``quantised`` scales on a 4-bit base; ``format``
the base without its chat template.
"""

import os
from dataclasses import dataclass, field, replace

import torch

from ...adapters.merging import merge
from ...evaluation.language_modeling import perplexity
from ...evaluation.runner import evaluate
from ...huggingface.context_extension.extending import extended
from ...tasks import wordings
from ...tasks.base import Task
from ...training.recipe import GRANULARITIES
from ..head_importance import measure_head_importance
from ..quadrants import group_by_sign, quadrant_experiment
from ..retrieval_heads import needle_span, retrieval_scores
from .queue import Job
from .workbench import REWORDED, VALIDATION, Drawn, named

SCALED = tuple(GRANULARITIES)
LOW_RANK = ("LoRA", "DoRA")
RATE = "rate-"  # begins the names of the rate curve's scales


@dataclass(frozen=True)
class Plan:
    """What the study does; the defaults are for SmolLM2-135M on four GPUs of the H100's kind.

    Attributes:
        tasks, lengths, seeds, cases: cases at each length for each seed; a seed draws training samples and cases.
        samples: training samples, all of the longest of ``lengths``.
        rates: learning rates to choose from by the loss on validation samples.
        adapter_tasks: tasks on which LoRA and DoRA are searched and run for every seed; on the others they run once.
        curve_task: the task of the sections that need one.
        text: a file of English text for the perplexity.
    """

    tasks: tuple[str, ...] = ("multikey", "passkey", "lines", "variables", "multivalue", "needle", "magic")
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8000)
    seeds: tuple[int, ...] = (0, 1, 2)
    cases: int = 70
    samples: int = 50
    rates: dict = field(
        default_factory=lambda: {
            "SEAL-H": (1e-2, 3e-2, 1e-1),
            "SEAL-C": (5e-3, 2e-2),
            "LoRA": (1e-3, 3e-3),
            "DoRA": (1e-3, 3e-3),
        }
    )
    adapter_tasks: tuple[str, ...] = ("multikey", "passkey", "lines")
    curve_task: str = "multikey"
    curve_samples: tuple[int, ...] = (5, 10, 25, 100)
    curve_rates: dict = field(
        default_factory=lambda: {"SEAL-H": (3e-3, 1e-2, 3e-2, 1e-1, 3e-1), "SEAL-C": (1e-3, 5e-3, 2e-2, 5e-2, 1e-1)}
    )
    curve_cases: int = 100
    train_lengths: tuple[int, ...] = (1024, 2048, 4096)
    beyond: tuple = (("ntk", 2, 16_000), ("yarn", 2, 16_000), ("ntk", 4, 32_000), ("yarn", 4, 32_000))
    beyond_cases: int = 60
    heads_lengths: tuple[int, ...] = (1024, 4096)
    heads_cases: int = 10
    transfer_lengths: tuple[int, ...] = (512, 4096)
    transfer_cases: int = 60
    format_tasks: tuple[str, ...] = ("multikey", "passkey", "magic")
    format_lengths: tuple[int, ...] = (512, 2048, 8000)
    format_cases: int = 40
    text: str | None = None
    sections: tuple[str, ...] = (
        "main",
        "beyond",
        "adapters",
        "heads",
        "curve",
        "length",
        "transfer",
        "elsewhere",
        "quantised",
        "format",
    )

    @property
    def longest(self) -> int:
        return max(self.lengths)


def jobs(plan: Plan) -> list[Job]:
    """All jobs, the most important first: what every claim needs, then the other seeds and the costlier variants."""
    made = [job for name in plan.sections for job in _MAKERS[name](plan)]
    made.sort(key=lambda job: _rank(plan, job.name))
    default = Plan()  # the jobs' times are those of its sizes
    size = 0.5 * plan.cases / default.cases + 0.5 * plan.samples / default.samples
    return [replace(job, seconds=job.seconds * max(size, 0.1)) for job in made]


def _rank(plan, name):
    section, _, rest = name.partition("-")
    if name == "elsewhere-rates":  # behind the trainings that it reads
        section = "curve"
    if section in ("main", "adapters"):
        task, _, seed = rest.rpartition("-")
        first, core = int(seed) == plan.seeds[0], task in plan.adapter_tasks
        return {"main": 0 if first else 4 if core else 11, "adapters": (2 if core else 10) if first else 13}[section]
    if section == "beyond":
        return 1 if rest.endswith("-x2") else 12
    return {"heads": 3, "elsewhere": 5, "curve": 6, "transfer": 7, "length": 8, "quantised": 9, "format": 9}[section]


def _tests(plan, task, lengths, cases, seed=0):
    return tuple((task, length, cases, seed, "test") for length in lengths)


def _summary(method, measured):
    cells = ", ".join(f"{n} {sum(s) / len(s):.2f}" for n, s in measured["scores"].items())
    return f"{method}: {cells}"


# --------------------------------------------------------------------------------------------------------- main table


def _main(plan):
    return [_main_job(plan, task, seed) for seed in plan.seeds for task in plan.tasks]


def _main_job(plan, task, seed):
    first = seed == plan.seeds[0]

    def run(bench):
        measured = {"base": bench.measure(task, plan.lengths, plan.cases, seed)}
        training = {}
        for method in SCALED:
            rates = (
                plan.rates[method]
                if first
                else (bench.result(f"main-{task}-{plan.seeds[0]}")["training"][method]["lr"],)
            )

            def then(model, method=method):
                model.seal_scales.save_pretrained(bench.scales_folder(f"{task}-{method}-{seed}"))
                return bench.measure(task, plan.lengths, plan.cases, seed, model)

            training[method], measured[method] = bench.search(
                method, task, plan.longest, plan.samples, rates, seed, then
            )
        return {
            "task": task,
            "seed": seed,
            "measured": measured,
            "training": training,
            "summary": "; ".join(_summary(m, x) for m, x in measured.items()),
        }

    drawn = (*_tests(plan, task, plan.lengths, plan.cases, seed), (task, plan.longest, plan.samples, seed, "train"))
    if first:
        drawn += ((task, plan.longest, VALIDATION, seed + 1, "train"),)
    needs = () if first else (f"main-{task}-{plan.seeds[0]}",)
    return Job(f"main-{task}-{seed}", run, 75 if first else 45, drawn, needs)


def _adapters(plan):
    made = [(task, plan.seeds[0]) for task in plan.tasks]
    made += [(task, seed) for seed in plan.seeds[1:] for task in plan.adapter_tasks]
    return [_adapters_job(plan, task, seed) for task, seed in made]


def _adapters_job(plan, task, seed):
    first, searched = seed == plan.seeds[0], task in plan.adapter_tasks

    def run(bench):
        measured, training = {}, {}
        for method in LOW_RANK:
            if first:
                rates = plan.rates[method] if searched else plan.rates[method][:1]
            else:
                rates = (bench.result(f"adapters-{task}-{plan.seeds[0]}")["training"][method]["lr"],)

            def then(model):
                return bench.measure(task, plan.lengths, plan.cases, seed, model)

            training[method], measured[method] = bench.search(
                method, task, plan.longest, plan.samples, rates, seed, then
            )
        return {
            "task": task,
            "seed": seed,
            "measured": measured,
            "training": training,
            "summary": "; ".join(_summary(m, x) for m, x in measured.items()),
        }

    drawn = (*_tests(plan, task, plan.lengths, plan.cases, seed), (task, plan.longest, plan.samples, seed, "train"))
    if first and searched:
        drawn += ((task, plan.longest, VALIDATION, seed + 1, "train"),)
    needs = () if first else (f"adapters-{task}-{plan.seeds[0]}",)
    return Job(f"adapters-{task}-{seed}", run, 140 if first and searched else 80, drawn, needs)


# ------------------------------------------------------------------------------------------------- beyond the context


def _beyond(plan):
    return [_beyond_job(plan, *setting) for setting in plan.beyond]


def _beyond_job(plan, kind, factor, length):
    task, seed = plan.curve_task, plan.seeds[0]

    def run(bench):
        lr = bench.result(f"main-{task}-{seed}")["training"]["SEAL-C"]["lr"]
        lengths = [n for n in plan.lengths[-1:]] + [length]
        with extended(bench.model, kind, factor=factor):
            measured = {"base": bench.measure(task, lengths, plan.beyond_cases, seed)}
            with bench.with_scales(f"{task}-SEAL-C-{seed}"):
                measured[f"SEAL-C of {plan.longest}"] = bench.measure(task, lengths, plan.beyond_cases, seed)

            def then(model):
                return bench.measure(task, lengths, plan.beyond_cases, seed, model)

            training, measured[f"SEAL-C of {length}"] = bench.search(
                "SEAL-C", task, length, plan.samples, (lr,), seed, then
            )
        return {
            "task": task,
            "kind": kind,
            "factor": factor,
            "length": length,
            "measured": measured,
            "training": training,
            "summary": "; ".join(_summary(m, x) for m, x in measured.items()),
        }

    drawn = (
        *_tests(plan, task, (plan.longest, length), plan.beyond_cases, seed),
        (task, length, plan.samples, seed, "train"),
    )
    return Job(f"beyond-{kind}-x{factor}", run, 60 if factor <= 2 else 150, drawn, (f"main-{task}-{seed}",))


# ----------------------------------------------------------------------------------------------- samples, rate, length


def _curve(plan):
    task, seed, longest = plan.curve_task, plan.seeds[0], plan.longest

    def by_samples(count):
        def run(bench):
            measured, training = {}, {}
            for method in SCALED:
                lr = bench.result(f"main-{task}-{seed}")["training"][method]["lr"]
                training[method], measured[method] = bench.search(
                    method, task, longest, count, (lr,), seed, measure_with(bench)
                )
            return {
                "task": task,
                "samples": count,
                "training": training,
                "measured": measured,
                "summary": _line(measured),
            }

        drawn = (*_tests(plan, task, (longest,), plan.curve_cases), (task, longest, count, seed, "train"))
        return Job(f"curve-samples-{count}", run, 14 + count * 0.4, drawn, (f"main-{task}-{seed}",))

    def by_rate(method, lr):
        def then(bench, model):
            model.seal_scales.save_pretrained(bench.scales_folder(_rate_name(task, method, lr)))
            return bench.measure(task, (plan.lengths[0], longest), plan.curve_cases, seed, model)

        def run(bench):
            training, measured = bench.search(
                method, task, longest, plan.samples, (lr,), seed, lambda model: then(bench, model), validate=True
            )
            measured = {method: measured}
            return {
                "task": task,
                "method": method,
                "lr": lr,
                "training": {method: training},
                "measured": measured,
                "summary": _line(measured),
            }

        drawn = (
            *_tests(plan, task, (plan.lengths[0], longest), plan.curve_cases),
            (task, longest, plan.samples, seed, "train"),
            (task, longest, VALIDATION, seed + 1, "train"),
        )
        return Job(f"curve-rate-{method}-{lr:g}", run, 22, drawn)

    def measure_with(bench):
        return lambda model: bench.measure(task, (longest,), plan.curve_cases, seed, model)

    rates = [(method, lr) for method in SCALED for lr in plan.curve_rates[method]]
    return [by_samples(count) for count in plan.curve_samples] + [by_rate(*pair) for pair in rates]


def _rate_name(task, method, lr):
    return f"{RATE}{task}-{method}-{lr:g}"


def _line(measured):
    return "; ".join(_summary(name, found) for name, found in measured.items())


def _length(plan):
    task, seed = plan.curve_task, plan.seeds[0]

    def made(train_length):
        def run(bench):
            measured, training = {}, {}
            for method in SCALED:
                lr = bench.result(f"main-{task}-{seed}")["training"][method]["lr"]

                def then(model):
                    return bench.measure(task, plan.lengths, plan.cases, seed, model)

                training[method], measured[method] = bench.search(
                    method, task, train_length, plan.samples, (lr,), seed, then
                )
            return {
                "task": task,
                "train_length": train_length,
                "training": training,
                "measured": measured,
                "summary": _line(measured),
            }

        drawn = (*_tests(plan, task, plan.lengths, plan.cases, seed), (task, train_length, plan.samples, seed, "train"))
        return Job(f"length-{train_length}", run, 30, drawn, (f"main-{task}-{seed}",))

    return [made(train_length) for train_length in plan.train_lengths]


# -------------------------------------------------------------------------------------------------------------- heads


def _heads(plan):
    task, seed = plan.curve_task, plan.seeds[0]

    def importance(bench):
        found = measure_head_importance(
            bench.model,
            bench.tokenizer,
            _drawn(bench, task),
            plan.heads_lengths,
            plan.heads_cases,
            seed=seed,
            progress=False,
        )
        groups = group_by_sign(found, "logprob")
        tests = (plan.heads_lengths[0], plan.longest)
        experiment = quadrant_experiment(
            bench.model,
            bench.tokenizer,
            found,
            _drawn(bench, task),
            tests,
            plan.curve_cases,
            measure="logprob",
            seed=seed,
            progress=False,
        )
        scores = {}
        for name, evaluation in experiment.items():
            scores[name] = {}
            for record in evaluation.records:
                scores[name].setdefault(str(record["length"]), []).append(round(record["score"], 4))
        changes = {
            f"{measure} {length}": [round(x, 5) for x in found.change(measure, length).tolist()]
            for measure in ("logprob", "accuracy", "gradient")
            for length in found.lengths
        }
        return {
            "task": task,
            "units": found.units,
            "changes": changes,
            "agreement": found.agreement(),
            "seconds": found.seconds,
            "base_accuracy": {str(n): found.accuracy(n) for n in found.lengths},
            "groups": {name: len(units) for name, units in groups.items()},
            "quadrants": scores,
            "summary": "; ".join(_summary(name, {"scores": s}) for name, s in scores.items()),
        }

    def retrieval(bench):
        length = 1024 if plan.longest > 1024 else plan.longest
        samples = bench.samples.get("needle", length, 20, seed, "train")
        spans = [needle_span(bench.tokenizer, sample, sample.answer) for sample in samples]
        found = retrieval_scores(bench.model, samples, spans)
        best = found.flatten().topk(5)
        heads = [divmod(int(i), found.shape[1]) for i in best.indices]
        return {
            "task": "needle",
            "length": length,
            "cases": len(samples),
            "scores": [[round(x, 4) for x in row] for row in found.tolist()],
            "summary": ", ".join(
                f"layer {a} head {b} {v:.2f}" for (a, b), v in zip(heads, best.values.tolist(), strict=True)
            ),
        }

    drawn = tuple((task, n, plan.heads_cases, seed, "train") for n in plan.heads_lengths)
    drawn += _tests(plan, task, (plan.heads_lengths[0], plan.longest), plan.curve_cases, seed)
    return [
        Job("heads-importance", importance, 120, drawn),
        Job("heads-retrieval", retrieval, 20, (("needle", min(1024, plan.longest), 20, seed, "train"),)),
    ]


def _drawn(bench, task) -> Task:
    return Drawn(task, bench.samples)


# ----------------------------------------------------------------------------------------------------------- transfer


def _transfer(plan):
    seed = plan.seeds[0]
    reworded = [REWORDED + task for task in plan.tasks if task in wordings.names()]

    def made(source):
        def run(bench):
            measured = {}
            with bench.with_scales(source and f"{source}-SEAL-C-{seed}"):
                for task in (*plan.tasks, *reworded):
                    lengths = plan.transfer_lengths if task in plan.tasks else plan.transfer_lengths[-1:]
                    measured[task] = bench.measure(task, lengths, plan.transfer_cases, seed)
            return {"trained": source, "measured": measured, "summary": _line(measured)}

        drawn = tuple(
            t for task in plan.tasks for t in _tests(plan, task, plan.transfer_lengths, plan.transfer_cases, seed)
        )
        drawn += tuple(
            t for task in reworded for t in _tests(plan, task, plan.transfer_lengths[-1:], plan.transfer_cases, seed)
        )
        return Job(f"transfer-{source or 'base'}", run, 35, drawn, () if source is None else (f"main-{source}-{seed}",))

    return [made(source) for source in (None, *plan.tasks)]


# ---------------------------------------------------------------------------------------------------------- elsewhere


def _elsewhere(plan):
    seed, task = plan.seeds[0], plan.curve_task

    def run(bench, names):
        found = {}
        with open(plan.text, encoding="utf-8", errors="replace") as file:
            text = file.read()
        for name in (None, *names):
            if name is None or os.path.isdir(bench.scales_folder(name)):
                with bench.with_scales(name):
                    found[name or "base"] = perplexity(bench.model, bench.tokenizer, text)
        return {
            "text": os.path.basename(plan.text),
            "bytes": len(text.encode()),
            "perplexity": found,
            "summary": ", ".join(f"{name} {x['perplexity']:.3f}" for name, x in found.items()),
        }

    def merged(bench):
        measured = {}
        for method in SCALED:
            model = bench.load()
            from ...adapters.attachment import load

            load(model, bench.scales_folder(f"{task}-{method}-{seed}"))
            merge(model)
            measured[f"{method} merged"] = bench.measure(task, (plan.longest,), plan.cases, seed, model)
            del model
        return {"task": task, "measured": measured, "summary": _line(measured)}

    made = [
        Job(
            "elsewhere-merged",
            merged,
            20,
            _tests(plan, task, (plan.longest,), plan.cases, seed),
            (f"main-{task}-{seed}",),
        )
    ]
    if plan.text is not None:
        trained = [f"{t}-{m}-{seed}" for t in plan.tasks for m in SCALED]
        needs = tuple(f"main-{t}-{seed}" for t in plan.tasks)
        made.append(Job("elsewhere-perplexity", lambda bench: run(bench, trained), 25, (), needs))
        rates = [(m, lr) for m in SCALED for lr in plan.curve_rates[m]]  # what the rate gains beside what it costs
        names = [_rate_name(task, m, lr) for m, lr in rates]
        needs = tuple(f"curve-rate-{m}-{lr:g}" for m, lr in rates)
        made.append(Job("elsewhere-rates", lambda bench: run(bench, names), 20, (), needs))
    return made


# ---------------------------------------------------------------------------------------------------------- quantised


def _quantised(plan):
    seed, task = plan.seeds[0], plan.curve_task

    def run(bench):
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        lr = bench.result(f"main-{task}-{seed}")["training"]["SEAL-C"]["lr"]
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_use_double_quant=True,
        )
        model = AutoModelForCausalLM.from_pretrained(
            bench.name, quantization_config=config, dtype=torch.bfloat16, device_map={"": bench.model.device}
        ).eval()
        if hasattr(model, "hf_device_map"):
            del model.hf_device_map  # one device: decoding may treat it like any other model
        kinds = {type(m).__name__ for m in model.modules()}
        measured = {"NF4": bench.measure(task, plan.lengths, plan.cases, seed, model)}
        with bench.adapted("SEAL-C", model):
            training = bench.train(model, task, plan.longest, plan.samples, lr, seed)
            measured["NF4, SEAL-C"] = bench.measure(task, plan.lengths, plan.cases, seed, model)
        return {
            "task": task,
            "modules": sorted(kinds),
            "weights_bytes": model.get_memory_footprint(),
            "training": {"SEAL-C": training},
            "measured": measured,
            "summary": _line(measured),
        }

    drawn = (*_tests(plan, task, plan.lengths, plan.cases, seed), (task, plan.longest, plan.samples, seed, "train"))
    return [Job("quantised-nf4", run, 60, drawn, (f"main-{task}-{seed}",))]


# ------------------------------------------------------------------------------------------------------------- format


def _format(plan):
    """The base on prompts without the chat template: what is then read as lost ability."""

    def run(bench):
        measured = {}
        for task in plan.format_tasks:
            found = evaluate(
                bench.model, bench.tokenizer, task, plan.format_lengths, plan.format_cases, seed=plan.seeds[0],
                chat_template=False, progress=False,
            )  # fmt: skip
            scores = {str(n): [r["score"] for r in found.records if r["length"] == n] for n in plan.format_lengths}
            outputs = [{key: r[key] for key in ("length", "answer", "output", "score")} for r in found.records[::13]]
            measured[task] = {"scores": scores, "seconds": round(found.seconds, 2), "outputs": outputs}
        return {"chat_template": False, "measured": measured, "summary": _line(measured)}

    return [Job("format-plain", run, 45)]


_MAKERS = {
    "main": _main,
    "adapters": _adapters,
    "beyond": _beyond,
    "curve": _curve,
    "length": _length,
    "heads": _heads,
    "transfer": _transfer,
    "elsewhere": _elsewhere,
    "quantised": _quantised,
    "format": _format,
}


def check(plan: Plan) -> None:
    """Raises ``ValueError`` for a section, a task or a length that cannot be meant."""
    for section in plan.sections:
        if section not in _MAKERS:
            raise ValueError(f"seal study: sections must be among {', '.join(_MAKERS)}, got {section!r}")
    for task in plan.tasks:
        named(task)
    if plan.text is not None and not os.path.isfile(plan.text):
        raise FileNotFoundError(f"seal study: text must be a file, got {plan.text}")
