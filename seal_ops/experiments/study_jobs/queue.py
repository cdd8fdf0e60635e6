"""Jobs in one folder that several processes share: each claims the next open job, and a finished one leaves a file.

A process that is killed leaves its claim behind; the next process sees that its owner is gone and takes the job over.
"""

import contextlib
import json
import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ...utils.files import atomic_write

WRITTEN = 60  # seconds after which a claim without an owner is not being written any more


@dataclass(frozen=True)
class Job:
    """One piece of a study.

    Attributes:
        name: of its file.
        run: makes the content of the file; called with the workbench.
        seconds: what it takes on one GPU, roughly; a job that would outlast the budget is not begun.
        samples: what it will draw, so that it can be drawn ahead: arguments of :meth:`.workbench.Samples.get`.
        needs: names of jobs that must be finished before.
    """

    name: str
    run: Callable[[object], dict]
    seconds: float
    samples: tuple = ()
    needs: tuple[str, ...] = ()


class Queue:
    """The jobs of a folder, in order of importance."""

    def __init__(self, folder: str, jobs: Sequence[Job]):
        self.folder, self.jobs = folder, jobs
        os.makedirs(os.path.join(folder, "claims"), exist_ok=True)

    def path(self, name: str) -> str:
        return os.path.join(self.folder, f"{name}.json")

    def finished(self, name: str) -> bool:
        return os.path.exists(self.path(name))

    def claim(self, seconds_left: float) -> Job | None:
        """The first open job whose needs are there and that fits in the time; it is this process's until it ends."""
        for job in self.jobs:
            if self.finished(job.name) or job.seconds > seconds_left or not all(map(self.finished, job.needs)):
                continue
            claim = os.path.join(self.folder, "claims", job.name)
            if self._owner_is_gone(claim):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(claim)
            try:
                handle = os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            except FileExistsError:
                continue
            try:
                with os.fdopen(handle, "w") as file:
                    file.write(str(os.getpid()))
            except OSError as error:  # a full disc: a claim without an owner would stay
                os.unlink(claim)
                text = f"seal study: output must have room for claims, got {self.folder} ({error.strerror})"
                raise OSError(text) from None
            if not self.finished(job.name):
                return job
        return None

    def waiting(self) -> bool:
        """Whether another process still works on something that a job here needs."""
        return any(
            not self.finished(job.name) and any(not self.finished(n) and self._is_claimed(n) for n in job.needs)
            for job in self.jobs
        )

    def _is_claimed(self, name):
        claim = os.path.join(self.folder, "claims", name)
        return os.path.exists(claim) and not self._owner_is_gone(claim)

    @staticmethod
    def _owner_is_gone(claim):
        try:
            with open(claim, encoding="utf-8") as file:
                owner = file.read()
            if not owner:  # being written, or its writer was killed in between
                return time.time() - os.stat(claim).st_mtime > WRITTEN
            os.kill(int(owner), 0)
        except FileNotFoundError:
            return False
        except ProcessLookupError:
            return True
        return False


def work(queue: Queue, workbench, budget: float | None, log: Callable[[str], None]) -> Iterator[str]:
    """Runs jobs until none is left that fits in ``budget`` seconds; yields the names of those that this process ran.

    A job that fails leaves ``NAME.failed.txt`` and does not stop the others.
    """
    started = time.monotonic()

    def left():
        return float("inf") if budget is None else budget - (time.monotonic() - started)

    following = queue.claim(left())
    while True:
        job = following
        if job is None:
            if not queue.waiting() or left() < 5:
                return
            time.sleep(0.5)
            following = queue.claim(left())
            continue
        workbench.samples.ahead(job.samples)
        following = queue.claim(left() - job.seconds)
        if following is not None:
            workbench.samples.ahead(following.samples)
        begun = time.monotonic()
        failure = os.path.join(queue.folder, f"{job.name}.failed.txt")
        try:
            content = job.run(workbench)
        except Exception:  # one failed job must not cost the others their time
            atomic_write(failure, traceback.format_exc())
            log(f"{job.name}: failed, see {failure}")
        else:
            content = {"job": job.name, "job_seconds": round(time.monotonic() - begun, 2), **content}
            atomic_write(queue.path(job.name), json.dumps(content) + "\n")
            with contextlib.suppress(FileNotFoundError):
                os.unlink(failure)
            log(
                f"{job.name}: {content['job_seconds']:.1f} s (expected {job.seconds:.0f}); {content.get('summary', '')}"
            )
            yield job.name
        if following is None:
            following = queue.claim(left())
