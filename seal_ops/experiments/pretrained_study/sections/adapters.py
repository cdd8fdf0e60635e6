"""LoRA and DoRA on the same samples and cases as the main table."""

from ...comparison import VALIDATION
from ...study_jobs.queue import Job
from .shared import LOW_RANK, drawn_tests, summary_line


def jobs(plan):
    made = [(task, plan.seeds[0]) for task in plan.tasks]
    made += [(task, seed) for seed in plan.seeds[1:] for task in plan.adapter_tasks]
    return [_job(plan, task, seed) for task, seed in made]


def _job(plan, task, seed):
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
            "summary": summary_line(measured),
        }

    drawn = (
        *drawn_tests(plan, task, plan.lengths, plan.cases, seed),
        (task, plan.longest, plan.samples, seed, "train"),
    )
    if first and searched:
        drawn += ((task, plan.longest, VALIDATION, seed + 1, "train"),)
    needs = () if first else (f"adapters-{task}-{plan.seeds[0]}",)
    return Job(f"adapters-{task}-{seed}", run, 140 if first and searched else 80, drawn, needs)
