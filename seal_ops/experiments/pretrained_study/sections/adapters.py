"""LoRA and DoRA on the same samples and cases as the main table."""

from ...study_jobs.queue import Job
from .shared import LOW_RANK, drawn, summary_line


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

    samples = drawn(plan, task, plan.lengths, plan.cases, seed, plan.longest, searched=first and searched)
    needs = () if first else (f"adapters-{task}-{plan.seeds[0]}",)
    return Job(f"adapters-{task}-{seed}", run, 140 if first and searched else 80, samples, needs)
