"""Runs a study of a pretrained model; as many processes as there are GPUs may share its folder."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict

from ...utils.files import atomic_write
from ..runs import read_json_file
from .queue import Queue, work
from .sections import Plan, check, jobs
from .workbench import Workbench

PLAN = "plan.json"
FREE = ("sections", "text")  # may change when a study is continued


def _plain(plan):
    return json.loads(json.dumps(asdict(plan)))


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
    wanted, default = ({key: value for key, value in _plain(p).items() if key not in FREE} for p in (plan, Plan()))
    wanted["model"] = os.path.basename(os.path.normpath(model))
    path = os.path.join(output, PLAN)
    if os.path.exists(path):
        earlier = {**default, **read_json_file(path)}  # what an older version did not know was as it is by default
        differing = [key for key in wanted if earlier.get(key) != wanted[key]]
        if differing:
            raise ValueError(
                f"seal study: output {output} must be new or hold this study, got one with another "
                f"{', '.join(differing)}"
            )
    else:
        atomic_write(path, json.dumps(wanted, indent=1) + "\n")
    queue = Queue(output, jobs(plan))
    bench = Workbench(model, output, device=device, dtype=dtype, workers=workers)
    try:
        done = list(work(queue, bench, budget, log))
    finally:
        bench.samples.close()
    import torch

    from ...ops.environment import facts

    gpu = torch.cuda.get_device_name(bench.model.device) if bench.cuda else None
    environment = {**facts(), "device": str(bench.model.device), "dtype": str(bench.model.dtype), "gpu": gpu}
    if done:
        atomic_write(
            # Not by process: another machine, or another container, has the same numbers.
            os.path.join(output, f"environment-{done[0]}.json"),
            json.dumps({"jobs": done, **environment}, indent=1) + "\n",
        )
    left = [job.name for job in queue.jobs if not queue.finished(job.name)]
    log(f"{len(done)} jobs done here; {len(left)} left: {', '.join(left[:12])}{' …' if len(left) > 12 else ''}")
    return done
