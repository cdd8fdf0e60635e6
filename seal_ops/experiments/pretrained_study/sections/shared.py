"""What the sections have alike: the methods, the cases of a test, and the line that sums up a job."""

from ....training.recipe import GRANULARITIES
from ...comparison import VALIDATION

SCALED = tuple(GRANULARITIES)
LOW_RANK = ("LoRA", "DoRA")
RATE = "rate-"  # begins the names of the rate curve's scales


def drawn_tests(plan, task, lengths, cases, seed=0):
    """What a job draws to test on, as `Job.samples` tells it."""
    return tuple((task, length, cases, seed, "test") for length in lengths)


def drawn(plan, task, lengths, cases, seed, train_length, *, searched=False):
    """What a job draws that trains at ``train_length`` too; ``searched``: and chooses a rate by further samples."""
    trained = (task, train_length, plan.samples, seed, "train")
    further = ((task, train_length, VALIDATION, seed + 1, "train"),) if searched else ()
    return (*drawn_tests(plan, task, lengths, cases, seed), trained, *further)


def trained_result(bench, plan, task, seed, rates, measured=None, keep=None):
    """The result of a job that trains methods on the plan's samples, each at the best of its rates, and measures them.

    ``rates``: method -> rates.  ``measured``: what the job has measured before.  ``keep(method, model)`` is called with
    each trained model.
    """
    measured, training = dict(measured or {}), {}
    for method, choices in rates.items():

        def then(model, method=method):
            if keep is not None:
                keep(method, model)
            return bench.measure(task, plan.lengths, plan.cases, seed, model)

        training[method], measured[method] = bench.search(method, task, plan.longest, plan.samples, choices, seed, then)
    return {
        "task": task,
        "seed": seed,
        "measured": measured,
        "training": training,
        "summary": summary_line(measured),
    }


def found_rate(bench, job, method):
    """The rate that an earlier job has chosen for a method, as the only choice."""
    return (bench.result(job)["training"][method]["lr"],)


def method_line(method, measured):
    """The accuracies of one method, by length."""
    cells = ", ".join(f"{n} {sum(s) / len(s):.2f}" for n, s in measured["scores"].items())
    return f"{method}: {cells}"


def summary_line(measured):
    """The accuracies of all methods of a job."""
    return "; ".join(method_line(name, found) for name, found in measured.items())


def rate_name(task, method, lr):
    """Of the scales that the rate curve trains at ``lr``."""
    return f"{RATE}{task}-{method}-{lr:g}"
