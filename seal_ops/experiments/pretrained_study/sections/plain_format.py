"""The base on prompts without the chat template: what is then read as lost ability."""

from ....evaluation.runner import evaluate
from ...study_jobs.queue import Job
from .shared import summary_line


def jobs(plan):
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
        return {"chat_template": False, "measured": measured, "summary": summary_line(measured)}

    return [Job("format-plain", run, 45)]
