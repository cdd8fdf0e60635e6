"""LoRA and DoRA on the same samples and cases as the main table."""

from ...study_jobs.queue import Job
from .shared import LOW_RANK, drawn, found_rate, trained_result


def jobs(plan):
    made = [(task, plan.seeds[0]) for task in plan.tasks]
    made += [(task, seed) for seed in plan.seeds[1:] for task in plan.adapter_tasks]
    return [_job(plan, task, seed) for task, seed in made]


def _job(plan, task, seed):
    first, searched = seed == plan.seeds[0], task in plan.adapter_tasks
    earlier = f"adapters-{task}-{plan.seeds[0]}"

    def run(bench):
        def rates(method):
            choices = plan.rates[method]
            return (choices if searched else choices[:1]) if first else found_rate(bench, earlier, method)

        return trained_result(bench, plan, task, seed, {method: rates(method) for method in LOW_RANK})

    samples = drawn(plan, task, plan.lengths, plan.cases, seed, plan.longest, searched=first and searched)
    needs = () if first else (earlier,)
    return Job(f"adapters-{task}-{seed}", run, 140 if first and searched else 80, samples, needs)
