"""Runs the study; as many processes as there are GPUs may share its folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict

from ..pretrained_study.folder import open_folder, run_jobs
from .plan import Plan, check, jobs
from .workbench import Workbench


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
    """Works on the study in ``output`` until nothing is left or ``budget`` seconds are over; returns the jobs done.

    Raises ValueError for a bad plan, and for a folder of a study with another one (but for its sections).
    """
    check(plan)
    known = {key: value for key, value in asdict(plan).items() if key != "sections"}
    open_folder(output, model, {**known, "text": os.path.basename(plan.text)})
    bench = Workbench(model, output, plan, device=device, dtype=dtype, workers=workers)
    return run_jobs(output, jobs(plan), bench, budget, log)
