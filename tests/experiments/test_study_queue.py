"""The jobs of a study in a folder that several processes share: claims, reservations, failures, and when they end."""

import json
import os
import subprocess
import sys
import types

import pytest
import torch
from full_disc import resource, room_for

from seal_ops.experiments.study_jobs import queue as queue_module
from seal_ops.experiments.study_jobs.folder import run_jobs
from seal_ops.experiments.study_jobs.queue import Job, Queue, work


class Bench:
    """Stands in for the workbench where no model is needed."""

    class samples:
        @staticmethod
        def ahead(wanted):
            pass


def numbered(*names, needs=(), seconds=1):
    return [Job(name, lambda bench, name=name: {"found": name}, seconds, needs=tuple(needs)) for name in names]


def test_two_processes_never_claim_the_same_job(tmp_path):
    one, other = (Queue(str(tmp_path), numbered("a", "b")) for _ in range(2))
    assert [one.claim(9).name, other.claim(9).name] == ["a", "b"]
    assert one.claim(9) is None and other.claim(9) is None


def test_jobs_of_a_process_that_is_gone_are_taken_over(tmp_path):
    queue = Queue(str(tmp_path), numbered("a"))
    queue.claim(9)
    assert queue.claim(9) is None, "its owner is alive"
    (tmp_path / "claims" / "a").write_text("999999999")
    assert queue.claim(9).name == "a"
    assert (tmp_path / "claims" / "a").read_text() == str(os.getpid())


@pytest.mark.skipif(resource is None, reason="this system has no limit on the size of files")
def test_a_claim_that_could_not_be_written_does_not_stay(tmp_path):
    queue = Queue(str(tmp_path), numbered("a"))
    with room_for(0), pytest.raises(OSError, match=r"seal study: output must have room for claims, got .*\(File too"):
        queue.claim(9)
    assert os.listdir(tmp_path / "claims") == []
    (tmp_path / "claims" / "a").touch()
    assert queue.claim(9) is None, "its owner may be writing it"
    os.utime(tmp_path / "claims" / "a", (0, 0))
    assert queue.claim(9).name == "a", "its owner was killed before it wrote"


def test_jobs_wait_for_their_needs_and_fit_in_the_budget(tmp_path):
    lines = []
    queue = Queue(str(tmp_path), numbered("late", needs=["early"]) + numbered("long", seconds=100) + numbered("early"))
    assert list(work(queue, Bench, 50, lines.append)) == ["early", "late"]
    assert not queue.finished("long")
    assert json.loads((tmp_path / "late.json").read_text())["found"] == "late"
    assert list(work(queue, Bench, None, lines.append)) == ["long"], "and nothing runs twice"


def test_a_failed_job_stops_no_other_and_is_tried_again(tmp_path):
    lines, fails = [], [True]

    def run(bench):
        if fails.pop():
            raise RuntimeError("no luck")
        return {}

    queue = Queue(str(tmp_path), [Job("bad", run, 1), *numbered("good")])
    assert list(work(queue, Bench, None, lines.append)) == ["good"]
    assert "no luck" in (tmp_path / "bad.failed.txt").read_text() and "bad: failed" in lines[0]
    assert os.listdir(tmp_path / "claims") == [], "it is open for others, or for the next run"
    fails.append(False)
    assert list(work(queue, Bench, None, lines.append)) == ["bad"]
    assert not (tmp_path / "bad.failed.txt").exists()


@pytest.fixture
def other():
    """The number of another process that lives."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield str(process.pid)
    process.kill()
    process.wait()


@pytest.fixture
def meanwhile(monkeypatch):
    """What others do while this process sleeps; it must not sleep again when they have done it all."""
    events = []

    def sleep(seconds):
        assert events, "it waits for a job that nobody is working on"
        events.pop(0)()

    monkeypatch.setattr(queue_module.time, "sleep", sleep)
    return events


def failing(name, needs=(), seconds=1):
    def run(bench):
        raise RuntimeError("no luck")

    return Job(name, run, seconds, needs=tuple(needs))


def ran(queue, budget=None):
    return list(work(queue, Bench, budget, lambda line: None))


def test_nobody_waits_for_a_failed_job_and_the_end_names_it(tmp_path, meanwhile):
    jobs = [failing("bad"), *numbered("next", needs=["bad"]), *numbered("last", needs=["next"]), *numbered("good")]
    bench = types.SimpleNamespace(
        samples=types.SimpleNamespace(ahead=lambda wanted: None, close=lambda: None),
        model=types.SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32),
    )
    for done in (["good"], []):  # the second process tries it, too
        lines = []
        assert run_jobs(str(tmp_path), jobs, bench, None, lines.append) == done
        assert sum(line.startswith("bad: failed") for line in lines) == 1, "once by each process"
        assert lines[-2].endswith("jobs done here; 3 left: bad, next, last")
        assert lines[-1] == f"failed, see NAME.failed.txt in {tmp_path}: bad; waiting for them: next, last"
    jobs[0] = numbered("bad")[0]
    lines = []
    assert run_jobs(str(tmp_path), jobs, bench, None, lines.append) == ["bad", "next", "last"]
    assert lines[-1] == "3 jobs done here; 0 left: " and not list(tmp_path.glob("*.failed.txt"))


def test_a_job_that_failed_elsewhere_comes_last(tmp_path):
    (tmp_path / "a.failed.txt").write_text("no luck")
    assert ran(Queue(str(tmp_path), numbered("a", "b", "c"))) == ["b", "c", "a"]


@pytest.mark.parametrize("end", ["finished", "failed", "killed"])
def test_a_job_that_another_process_works_on_is_waited_for(tmp_path, meanwhile, other, end):
    jobs = numbered("early") + numbered("middle", needs=["early"]) + numbered("late", needs=["middle"])
    queue = Queue(str(tmp_path), jobs)
    claim = tmp_path / "claims" / "early"
    claim.write_text(other)

    def ends():
        if end == "finished":
            (tmp_path / "early.json").write_text("{}")
        if end == "failed":
            (tmp_path / "early.failed.txt").write_text("no luck")
        if end == "killed":
            claim.write_text("999999999")
        else:
            claim.unlink()

    meanwhile += [lambda: None, ends]
    wanted = ["middle", "late"] if end == "finished" else ["early", "middle", "late"]
    assert ran(queue) == wanted and not meanwhile


def test_what_this_process_cannot_do_is_not_waited_for(tmp_path, meanwhile, other):
    """Jobs that would not fit in its time, that it has tried, or that need something which has failed besides."""
    (tmp_path / "claims").mkdir()
    (tmp_path / "claims" / "early").write_text(other)
    early, long = numbered("early"), numbered("long", needs=["early"], seconds=100)
    assert ran(Queue(str(tmp_path), early + long), 50) == []
    assert ran(Queue(str(tmp_path), [*early, failing("bad"), *numbered("both", needs=["early", "bad"])])) == []
    assert ran(Queue(str(tmp_path), early)) == [], "its failure could be long in coming"


def test_samples_are_drawn_ahead_but_no_job_is_kept_from_others(tmp_path, meanwhile):
    """A process that has nothing else to do takes what another one has reserved."""
    drawn, taken = [], []

    class Drawing:
        class samples:
            ahead = staticmethod(drawn.extend)

    def run(bench):
        assert drawn == ["of one", "of two"] and os.listdir(tmp_path / "reserved") == ["two"]
        taken.append(Queue(str(tmp_path), jobs[:2]).claim(9))
        return {}

    jobs = [Job("one", run, 1, ("of one",)), *(Job(n, lambda bench: {}, 1, (f"of {n}",)) for n in ("two", "three"))]
    assert list(work(Queue(str(tmp_path), jobs), Drawing, None, print)) == ["one", "three"]
    assert [job.name for job in taken] == ["two"] and drawn == ["of one", "of two", "of three"]
    assert os.listdir(tmp_path / "claims") == ["two"] and os.listdir(tmp_path / "reserved") == []


def test_what_another_process_has_reserved_comes_before_what_failed_only(tmp_path, other):
    queue = Queue(str(tmp_path), numbered("a", "b", "c", "d"))
    (tmp_path / "reserved" / "a").write_text(other)
    (tmp_path / "b.failed.txt").write_text("no luck")
    (tmp_path / "reserved" / "c").write_text("999999999")  # of a process that was killed
    assert ran(queue) == ["c", "d", "a", "b"]


FREED = """
import gc, sys, weakref
import torch
from seal_ops.experiments.study_jobs.queue import Job, Queue, work

held, freed = [], []

class Large:
    pass

class Bench:
    class samples:
        ahead = staticmethod(lambda wanted: None)

def run(bench):
    large = Large()
    large.itself = large  # only a collection finds it
    held.append(weakref.ref(large))
    raise torch.OutOfMemoryError("CUDA out of memory")

torch.cuda.is_initialized = lambda: True
torch.cuda.empty_cache = lambda: freed.append(held[0]() is None)
gc.disable()
jobs = [Job("bad", run, 1), Job("good", lambda bench: {}, 1)]
assert list(work(Queue(sys.argv[1], jobs), Bench, None, lambda line: None)) == ["good"]
assert freed == [True], freed
"""


def test_a_failed_job_leaves_no_memory_to_itself(tmp_path):
    """Neither what its frames held, nor what torch keeps of it on a GPU; in a process without others' garbage."""
    done = subprocess.run([sys.executable, "-c", FREED, tmp_path], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_a_claim_ends_with_an_interrupted_job(tmp_path):
    def run(bench):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ran(Queue(str(tmp_path), [Job("one", run, 1), *numbered("two")]))
    assert os.listdir(tmp_path / "claims") == os.listdir(tmp_path / "reserved") == []


@pytest.mark.parametrize(
    "error, beside, until_the_end, tries",
    [
        (torch.OutOfMemoryError("CUDA"), True, False, 2),
        (RuntimeError("cuBLAS: CUBLAS_STATUS_ALLOC_FAILED"), True, False, 2),
        (torch.OutOfMemoryError("CUDA"), True, True, 1),
        (torch.OutOfMemoryError("CUDA"), False, False, 1),
        (RuntimeError("no luck"), True, False, 1),
    ],
)
def test_what_ran_out_of_memory_beside_others_is_tried_again_alone(
    tmp_path, meanwhile, other, error, beside, until_the_end, tries
):
    tried, claim = [], tmp_path / "claims" / "x"

    def large(bench):
        tried.append(claim.exists())
        raise error

    def last(bench):
        if not until_the_end:
            claim.unlink(missing_ok=True)
        return {}

    queue = Queue(str(tmp_path), [Job("large", large, 1), Job("last", last, 1), *numbered("x")])
    if beside:
        claim.write_text(other)
    else:
        (tmp_path / "x.json").write_text("{}")
    assert ran(queue)[0] == "last"
    assert tried == [beside, False][:tries], "once more, and not for ever"
