"""Importance of the heads, their quadrants and retrieval scores."""

from ....tasks.base import Task
from ...head_importance import measure_head_importance
from ...quadrants import group_by_sign, quadrant_experiment
from ...retrieval_heads import needle_span, retrieval_scores
from ...study_jobs.drawn_samples import Drawn
from ...study_jobs.queue import Job
from .shared import drawn_tests, method_line


def jobs(plan):
    task, seed = plan.curve_task, plan.seeds[0]

    def importance(bench):
        found = measure_head_importance(
            bench.model,
            bench.tokenizer,
            _drawn(bench, task),
            plan.heads_lengths,
            plan.heads_cases,
            seed=seed,
            progress=False,
        )
        groups = group_by_sign(found, "logprob")
        tests = (plan.heads_lengths[0], plan.longest)
        experiment = quadrant_experiment(
            bench.model,
            bench.tokenizer,
            found,
            _drawn(bench, task),
            tests,
            plan.curve_cases,
            measure="logprob",
            seed=seed,
            progress=False,
        )
        scores = {}
        for name, evaluation in experiment.items():
            scores[name] = {}
            for record in evaluation.records:
                scores[name].setdefault(str(record["length"]), []).append(round(record["score"], 4))
        changes = {
            f"{measure} {length}": [round(x, 5) for x in found.change(measure, length).tolist()]
            for measure in ("logprob", "accuracy", "gradient")
            for length in found.lengths
        }
        return {
            "task": task,
            "units": found.units,
            "changes": changes,
            "agreement": found.agreement(),
            "seconds": found.seconds,
            "base_accuracy": {str(n): found.accuracy(n) for n in found.lengths},
            "groups": {name: len(units) for name, units in groups.items()},
            "quadrants": scores,
            "summary": "; ".join(method_line(name, {"scores": s}) for name, s in scores.items()),
        }

    def retrieval(bench):
        length = 1024 if plan.longest > 1024 else plan.longest
        samples = bench.samples.get("needle", length, 20, seed, "train")
        spans = [needle_span(bench.tokenizer, sample, sample.answer) for sample in samples]
        found = retrieval_scores(bench.model, samples, spans)
        best = found.flatten().topk(5)
        heads = [divmod(int(i), found.shape[1]) for i in best.indices]
        return {
            "task": "needle",
            "length": length,
            "cases": len(samples),
            "scores": [[round(x, 4) for x in row] for row in found.tolist()],
            "summary": ", ".join(
                f"layer {a} head {b} {v:.2f}" for (a, b), v in zip(heads, best.values.tolist(), strict=True)
            ),
        }

    drawn = tuple((task, n, plan.heads_cases, seed, "train") for n in plan.heads_lengths)
    drawn += drawn_tests(plan, task, (plan.heads_lengths[0], plan.longest), plan.curve_cases, seed)
    return [
        Job("heads-importance", importance, 120, drawn),
        Job("heads-retrieval", retrieval, 20, (("needle", min(1024, plan.longest), 20, seed, "train"),)),
    ]


def _drawn(bench, task) -> Task:
    return Drawn(task, bench.samples)
