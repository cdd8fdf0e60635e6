"""Accuracy by the number of training samples and by the learning rate."""

from ...comparison import VALIDATION
from ...study_jobs.queue import Job
from .shared import SCALED, drawn_tests, rate_name, summary_line


def jobs(plan):
    task, seed, longest = plan.curve_task, plan.seeds[0], plan.longest

    def by_samples(count):
        def run(bench):
            measured, training = {}, {}
            for method in SCALED:
                lr = bench.result(f"main-{task}-{seed}")["training"][method]["lr"]
                training[method], measured[method] = bench.search(
                    method, task, longest, count, (lr,), seed, measure_with(bench)
                )
            return {
                "task": task,
                "samples": count,
                "training": training,
                "measured": measured,
                "summary": summary_line(measured),
            }

        drawn = (*drawn_tests(plan, task, (longest,), plan.curve_cases), (task, longest, count, seed, "train"))
        return Job(f"curve-samples-{count}", run, 14 + count * 0.4, drawn, (f"main-{task}-{seed}",))

    def by_rate(method, lr):
        def then(bench, model):
            model.seal_scales.save_pretrained(bench.scales_folder(rate_name(task, method, lr)))
            return bench.measure(task, (plan.lengths[0], longest), plan.curve_cases, seed, model)

        def run(bench):
            training, measured = bench.search(
                method, task, longest, plan.samples, (lr,), seed, lambda model: then(bench, model), validate=True
            )
            measured = {method: measured}
            return {
                "task": task,
                "method": method,
                "lr": lr,
                "training": {method: training},
                "measured": measured,
                "summary": summary_line(measured),
            }

        drawn = (
            *drawn_tests(plan, task, (plan.lengths[0], longest), plan.curve_cases),
            (task, longest, plan.samples, seed, "train"),
            (task, longest, VALIDATION, seed + 1, "train"),
        )
        return Job(f"curve-rate-{method}-{lr:g}", run, 22, drawn)

    def measure_with(bench):
        return lambda model: bench.measure(task, (longest,), plan.curve_cases, seed, model)

    rates = [(method, lr) for method in SCALED for lr in plan.curve_rates[method]]
    return [by_samples(count) for count in plan.curve_samples] + [by_rate(*pair) for pair in rates]
