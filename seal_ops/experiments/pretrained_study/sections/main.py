"""Accuracy by length of the base, SEAL-H and SEAL-C on every task, for every draw of samples."""

from ...study_jobs.queue import Job
from .shared import SCALED, drawn, summary_line


def jobs(plan):
    return [_job(plan, task, seed) for seed in plan.seeds for task in plan.tasks]


def _job(plan, task, seed):
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
            "summary": summary_line(measured),
        }

    samples = drawn(plan, task, plan.lengths, plan.cases, seed, plan.longest, searched=first)
    needs = () if first else (f"main-{task}-{plan.seeds[0]}",)
    return Job(f"main-{task}-{seed}", run, 75 if first else 45, samples, needs)
