"""Contexts longer than the model's."""

from ....huggingface.context_extension.extending import extended
from ...study_jobs.queue import Job
from .shared import drawn, summary_line


def jobs(plan):
    return [_job(plan, *setting) for setting in plan.beyond]


def _job(plan, kind, factor, length):
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
            "summary": summary_line(measured),
        }

    samples = drawn(plan, task, (plan.longest, length), plan.beyond_cases, seed, length)
    return Job(f"beyond-{kind}-x{factor}", run, 60 if factor <= 2 else 150, samples, (f"main-{task}-{seed}",))
