"""What the scales do elsewhere: perplexity of a text; and merged into the weights."""

import os

from ....adapters.attachment import load
from ....adapters.merging import merge
from ....evaluation.language_modeling import perplexity
from ...study_jobs.queue import Job
from .shared import SCALED, drawn_tests, rate_name, summary_line


def jobs(plan):
    seed, task = plan.seeds[0], plan.curve_task

    def run(bench, names):
        found = {}
        with open(plan.text, encoding="utf-8-sig", errors="replace") as file:
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
            load(model, bench.scales_folder(f"{task}-{method}-{seed}"))
            merge(model)
            measured[f"{method} merged"] = bench.measure(task, (plan.longest,), plan.cases, seed, model)
            del model
        return {"task": task, "measured": measured, "summary": summary_line(measured)}

    made = [
        Job(
            "elsewhere-merged",
            merged,
            20,
            drawn_tests(plan, task, (plan.longest,), plan.cases, seed),
            (f"main-{task}-{seed}",),
        )
    ]
    if plan.text is not None:
        trained = [f"{t}-{m}-{seed}" for t in plan.tasks for m in SCALED]
        needs = tuple(f"main-{t}-{seed}" for t in plan.tasks)
        made.append(Job("elsewhere-perplexity", lambda bench: run(bench, trained), 25, (), needs))
        rates = [(m, lr) for m in SCALED for lr in plan.curve_rates[m]]  # what the rate gains beside what it costs
        names = [rate_name(task, m, lr) for m, lr in rates]
        needs = tuple(f"curve-rate-{m}-{lr:g}" for m, lr in rates)
        made.append(Job("elsewhere-rates", lambda bench: run(bench, names), 20, (), needs))
    return made
