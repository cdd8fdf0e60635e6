"""Accuracy by length of the base, SEAL-H and SEAL-C on every task, for every draw of samples."""

from ...study_jobs.queue import Job
from .shared import SCALED, drawn, found_rate, trained_result


def jobs(plan):
    return [_job(plan, task, seed) for seed in plan.seeds for task in plan.tasks]


def _job(plan, task, seed):
    first, earlier = seed == plan.seeds[0], f"main-{task}-{plan.seeds[0]}"

    def run(bench):
        def keep(method, model):
            model.seal_scales.save_pretrained(bench.scales_folder(f"{task}-{method}-{seed}"))

        base = {"base": bench.measure(task, plan.lengths, plan.cases, seed)}
        rates = {m: plan.rates[m] if first else found_rate(bench, earlier, m) for m in SCALED}
        return trained_result(bench, plan, task, seed, rates, base, keep)

    samples = drawn(plan, task, plan.lengths, plan.cases, seed, plan.longest, searched=first)
    needs = () if first else (earlier,)
    return Job(f"main-{task}-{seed}", run, 75 if first else 45, samples, needs)
