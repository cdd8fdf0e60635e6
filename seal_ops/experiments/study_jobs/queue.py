"""Jobs in one folder that several processes share: each claims the next open job, and a finished one leaves a file.

A claim lasts as long as its job runs.  A process that is killed leaves its claim behind; the next process sees that its
owner is gone and takes the job over.  A job that fails is open again for the other processes, behind all others: what
did not fit beside them on a shared GPU may fit later.

While a process works on a job it reserves its next one, whose samples it draws ahead.  Others leave a reserved job for
last, but take it before they would have nothing to do.
"""

import contextlib
import gc
import json
import os
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch

from ...utils.files import atomic_write

CLAIMS, RESERVED = "claims", "reserved"
DONE, FAILED, NO_MEMORY = "done", "failed", "no memory"
OUT_OF_MEMORY = ("out of memory", "STATUS_ALLOC_FAILED")  # in errors of other types: the driver's, cuBLAS's
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
        self._named = {job.name: job for job in jobs}
        for kind in (CLAIMS, RESERVED):
            os.makedirs(os.path.join(folder, kind), exist_ok=True)

    def path(self, name: str) -> str:
        return os.path.join(self.folder, f"{name}.json")

    def failure(self, name: str) -> str:
        return os.path.join(self.folder, f"{name}.failed.txt")

    def finished(self, name: str) -> bool:
        return os.path.exists(self.path(name))

    def claim(self, seconds_left: float, tried: Collection[str] = ()) -> Job | None:
        """The first open job whose needs are there and that fits in the time; it is this process's until `release`.

        Args:
            tried: names of jobs that this process leaves to others.
        """
        for job in self._open(seconds_left, tried):
            if self._take(CLAIMS, job.name):
                self._drop(RESERVED, job.name)
                if not self.finished(job.name):
                    return job
                self.release(job)
        return None

    def release(self, job: Job) -> None:
        """Ends a claim of this process."""
        self._drop(CLAIMS, job.name)

    def reserve(self, seconds_left: float, tried: Collection[str] = ()) -> Job | None:
        """The job that `claim` would give and that nobody has reserved; others leave it for last until `cancel`."""
        for job in self._open(seconds_left, tried):
            if not self.claimed(job.name) and self._take(RESERVED, job.name):
                return job
        return None

    def cancel(self, job: Job) -> None:
        """Ends a reservation of this process, if nobody has claimed the job meanwhile."""
        if self._owner(RESERVED, job.name) == str(os.getpid()):
            self._drop(RESERVED, job.name)

    def waiting(self, seconds_left: float = float("inf"), tried: Collection[str] = ()) -> bool:
        """Whether a job is left for this process as soon as others have ended what they work on now."""

        def can_run(job):
            return job.name not in tried and job.seconds <= seconds_left and all(map(coming, job.needs))

        def coming(name):
            return self.finished(name) or self.claimed(name) or (name in self._named and can_run(self._named[name]))

        return any(not self.finished(job.name) and not self.claimed(job.name) and can_run(job) for job in self.jobs)

    def claimed(self, name: str) -> bool:
        """Whether a process that is there has claimed the job."""
        return self._held(CLAIMS, name)

    def shared(self, but: str = "") -> bool:
        """Whether a process is at work on a job other than ``but``."""
        return any(self.claimed(job.name) for job in self.jobs if job.name != but)

    def failed(self) -> tuple[list[str], list[str]]:
        """Names of the unfinished jobs that have failed and that nobody tries again now, and of those behind them."""

        def has_failed(name):
            return not self.finished(name) and not self.claimed(name) and os.path.exists(self.failure(name))

        def is_behind(job):
            needed = [name for name in job.needs if not self.finished(name)]
            return any(has_failed(n) or (n in self._named and is_behind(self._named[n])) for n in needed)

        left = [job for job in self.jobs if not self.finished(job.name) and not self.claimed(job.name)]
        failed = [job.name for job in left if has_failed(job.name)]
        return failed, [job.name for job in left if job.name not in failed and is_behind(job)]

    def _open(self, seconds_left, tried):
        """In the order of claims: what has failed last, before it what another process has reserved."""
        found = [
            job
            for job in self.jobs
            if job.name not in tried
            and job.seconds <= seconds_left
            and not self.finished(job.name)
            and all(map(self.finished, job.needs))
        ]
        own = str(os.getpid())

        def place(job):
            name = job.name
            reserved = self._held(RESERVED, name) and self._owner(RESERVED, name) != own
            return os.path.exists(self.failure(name)), reserved

        return sorted(found, key=place)

    def _take(self, kind, name):
        """Whether the file of that kind is this process's now; a file whose owner is gone is taken over."""
        path = os.path.join(self.folder, kind, name)
        if self._owner_is_gone(path):
            self._drop(kind, name)
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return False
        try:
            with os.fdopen(handle, "w") as file:
                file.write(str(os.getpid()))
        except OSError as error:  # a full disc: a claim without an owner would stay
            os.unlink(path)
            text = f"seal study: output must have room for claims, got {self.folder} ({error.strerror})"
            raise OSError(text) from None
        return True

    def _drop(self, kind, name):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(self.folder, kind, name))

    def _owner(self, kind, name):
        try:
            with open(os.path.join(self.folder, kind, name), encoding="utf-8") as file:
                return file.read()
        except FileNotFoundError:
            return None

    def _held(self, kind, name):
        path = os.path.join(self.folder, kind, name)
        return os.path.exists(path) and not self._owner_is_gone(path)

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

    A job that fails leaves ``NAME.failed.txt`` and does not stop the others.  Each process tries a job once; one
    that has failed in another process comes after all others.  What ran out of memory beside other processes is tried
    once more when none of them is at work.
    """
    started, tried, crowded, idle = time.monotonic(), set(), set(), False

    def left():
        return float("inf") if budget is None else budget - (time.monotonic() - started)

    while True:
        job = queue.claim(left(), tried)
        if job is None:
            if not queue.waiting(left(), tried):
                if not crowded or queue.shared():
                    return
                tried -= crowded
                crowded = set()
                _free()
                continue
            if not idle:  # the others have the GPU for themselves meanwhile
                _free()
            idle = True
            time.sleep(0.5)
            continue
        idle = False
        tried.add(job.name)
        try:
            workbench.samples.ahead(job.samples)
            following = queue.reserve(left() - job.seconds, tried)
            try:
                if following is not None:
                    workbench.samples.ahead(following.samples)
                end = _run(queue, job, workbench, log)
            finally:
                if following is not None:
                    queue.cancel(following)
            if end == NO_MEMORY and queue.shared(but=job.name):
                crowded.add(job.name)
        finally:
            queue.release(job)
        if end == DONE:
            yield job.name
        else:
            _free()


def _run(queue, job, workbench, log):
    """`DONE`, `FAILED` or `NO_MEMORY`; the job's file, or that of its failure, is then there."""
    begun, failure = time.monotonic(), queue.failure(job.name)
    try:
        content = job.run(workbench)
    except Exception as error:  # one failed job must not cost the others their time
        atomic_write(failure, traceback.format_exc())
        log(f"{job.name}: failed, see {failure}")
        short = isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in OUT_OF_MEMORY)
        return NO_MEMORY if short else FAILED
    content = {"job": job.name, "job_seconds": round(time.monotonic() - begun, 2), **content}
    atomic_write(queue.path(job.name), json.dumps(content) + "\n")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(failure)
    log(f"{job.name}: {content['job_seconds']:.1f} s (expected {job.seconds:.0f}); {content.get('summary', '')}")
    return DONE


def _free():
    """Gives the other processes on the GPU what this one holds and does not need."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
