"""The folder of a study: which study it holds, who works on its jobs, and where they ran."""

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ...utils.files import atomic_write
from ..runs import read_json_file
from .queue import Job, Queue, work

PLAN = "plan.json"


@dataclass(frozen=True)
class Study:
    """A kind of study: what its plan asks for, and who does it.

    Attributes:
        check: raises ValueError for a bad plan.
        known: the settings of a plan that a folder holds on to, and what a plan of an older version had in their place.
        jobs: of a plan.
        workbench: what does a job, from model, output, plan and its options.
    """

    check: Callable
    known: Callable[..., tuple[dict, dict | None]]
    jobs: Callable[..., Iterable[Job]]
    workbench: Callable

    def run(
        self,
        model: str,
        output: str,
        plan,
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
        self.check(plan)
        open_folder(output, model, *self.known(plan))
        bench = self.workbench(model, output, plan, device=device, dtype=dtype, workers=workers)
        return run_jobs(output, self.jobs(plan), bench, budget, log)


def open_folder(output: str, model: str, wanted: dict, defaults: dict | None = None) -> None:
    """Writes the plan ``wanted`` of ``model`` to a new folder; a folder that has one must have the same.

    Args:
        defaults: settings that a plan of an older version did not know.

    Raises:
        ValueError: a folder of a study with another plan.
    """
    wanted = json.loads(json.dumps({**wanted, "model": os.path.basename(os.path.normpath(model))}))
    path = os.path.join(output, PLAN)
    if not os.path.exists(path):
        atomic_write(path, json.dumps(wanted, indent=1) + "\n")
        return
    earlier = {**json.loads(json.dumps(defaults or {})), **read_json_file(path)}
    if differing := [key for key in wanted if earlier.get(key) != wanted[key]]:
        raise ValueError(
            f"seal study: output {output} must be new or hold this study, got one with another {', '.join(differing)}"
        )


def run_jobs(
    output: str, jobs: Iterable[Job], bench, budget: float | None, log: Callable[[str], None] = print
) -> list[str]:
    """Works on the open jobs of the folder for ``budget`` seconds; returns the names of those done here, and notes the
    versions and the device beside them."""
    queue = Queue(output, list(jobs))
    try:
        done = list(work(queue, bench, budget, log))
    finally:
        bench.samples.close()
    if done:
        _note_environment(output, bench.model, done)
    left = [job.name for job in queue.jobs if not queue.finished(job.name)]
    log(f"{len(done)} jobs done here; {len(left)} left: {_listed(left)}")
    failed, behind = queue.failed()
    if failed:
        waiting = f"; waiting for them: {_listed(behind)}" if behind else ""
        log(f"failed, see NAME.failed.txt in {output}: {_listed(failed)}{waiting}")
    return done


def _listed(names):
    return f"{', '.join(names[:12])}{' …' if len(names) > 12 else ''}"


def _note_environment(output, model, done):
    import torch

    from ...ops.environment import facts

    gpu = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else None
    content = {"jobs": done, **facts(), "device": str(model.device), "dtype": str(model.dtype), "gpu": gpu}
    # Not by process: another machine, or another container, has the same numbers.
    atomic_write(os.path.join(output, f"environment-{done[0]}.json"), json.dumps(content, indent=1) + "\n")
