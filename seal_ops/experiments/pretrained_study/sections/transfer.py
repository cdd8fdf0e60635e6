"""Scales of one task on all tasks and on other wordings."""

from ....tasks import wordings
from ...study_jobs.drawn_samples import REWORDED
from ...study_jobs.queue import Job
from .shared import drawn_tests, summary_line


def jobs(plan):
    seed = plan.seeds[0]
    reworded = [REWORDED + task for task in plan.tasks if task in wordings.names()]

    def made(source):
        def run(bench):
            measured = {}
            with bench.with_scales(source and f"{source}-SEAL-C-{seed}"):
                for task in (*plan.tasks, *reworded):
                    lengths = plan.transfer_lengths if task in plan.tasks else plan.transfer_lengths[-1:]
                    measured[task] = bench.measure(task, lengths, plan.transfer_cases, seed)
            return {"trained": source, "measured": measured, "summary": summary_line(measured)}

        drawn = tuple(
            t for task in plan.tasks for t in drawn_tests(plan, task, plan.transfer_lengths, plan.transfer_cases, seed)
        )
        drawn += tuple(
            t
            for task in reworded
            for t in drawn_tests(plan, task, plan.transfer_lengths[-1:], plan.transfer_cases, seed)
        )
        return Job(f"transfer-{source or 'base'}", run, 35, drawn, () if source is None else (f"main-{source}-{seed}",))

    return [made(source) for source in (None, *plan.tasks)]
