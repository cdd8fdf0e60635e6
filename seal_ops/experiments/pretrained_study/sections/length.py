"""Trained short and measured long."""

from ...study_jobs.queue import Job
from .shared import SCALED, drawn, summary_line


def jobs(plan):
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
                "summary": summary_line(measured),
            }

        samples = drawn(plan, task, plan.lengths, plan.cases, seed, train_length)
        return Job(f"length-{train_length}", run, 30, samples, (f"main-{task}-{seed}",))

    return [made(train_length) for train_length in plan.train_lengths]
