"""Runs a study of a pretrained model; as many processes as there are GPUs may share its folder."""

from collections.abc import Callable
from dataclasses import asdict

from .folder import open_folder, run_jobs
from .sections import Plan, check, jobs
from .workbench import Workbench

FREE = ("sections", "text")  # may change when a study is continued


def run(
    model: str,
    output: str,
    plan: Plan,
    *,
    device: str = "auto",
    dtype: str = "default",
    workers: int = 0,
    budget: float | None = None,
    log: Callable[[str], None] = print,
) -> list[str]:
    """Works on the study in ``output`` until nothing is left or ``budget`` seconds are over; returns the jobs done
    here.

    Args:
        workers: processes that draw samples ahead.

    Raises:
        ValueError: a bad plan, or a folder of a study with another one.
    """
    check(plan)
    wanted, defaults = ({k: v for k, v in asdict(p).items() if k not in FREE} for p in (plan, Plan()))
    open_folder(output, model, wanted, defaults)
    bench = Workbench(model, output, device=device, dtype=dtype, workers=workers)
    return run_jobs(output, jobs(plan), bench, budget, log)
