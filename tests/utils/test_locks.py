"""One writer at a time, in threads and processes, and none left behind by a killed one."""

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from full_disc import resource, room_for
from installed import environment

from seal_ops.utils import locks
from seal_ops.utils.locks import only_writer

pytestmark = pytest.mark.skipif(locks.fcntl is None, reason="this system has no flock")


@pytest.mark.parametrize("folder", [True, False])
def test_a_second_writer_is_refused_and_the_next_is_not(tmp_path, folder):
    output = tmp_path if folder else tmp_path / "result.json"
    with only_writer(output, "seal_ops.x"):
        with pytest.raises(RuntimeError) as caught, only_writer(output, "seal_ops.x"):
            pass
        text = f"seal_ops.x: output {output} must have one writer at a time, got process {os.getpid()} on "
        assert str(caught.value).startswith(text) and str(caught.value).endswith(" at work there")
        with only_writer(tmp_path / "other", "seal_ops.x"):
            pass
    assert os.listdir(tmp_path) == []
    with only_writer(output, "seal_ops.x"):
        pass


def test_a_short_write_waits_for_the_other(tmp_path):
    order = []

    def second():
        with only_writer(tmp_path, "seal_ops.x", wait=True):
            order.append("second")

    with only_writer(tmp_path, "seal_ops.x"):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.1)
        order.append("first")
    thread.join(20)
    assert order == ["first", "second"] and os.listdir(tmp_path) == []


def test_a_killed_writer_leaves_no_lock(tmp_path):
    script = (
        "import os, signal\nfrom seal_ops.utils.locks import only_writer\n"
        f"with only_writer({str(tmp_path)!r}, 'x'): os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", script], env=environment())
    assert done.returncode == -signal.SIGKILL and os.listdir(tmp_path) == [".seal.lock"]
    with only_writer(tmp_path, "seal_ops.x"):
        pass
    assert os.listdir(tmp_path) == []


def _count(folder, rounds):
    for _ in range(rounds):
        with only_writer(folder, "x", wait=True):
            path = os.path.join(folder, "count")
            with open(path) as file:
                number = int(file.read())
            with open(path, "w") as file:
                file.write(str(number + 1))


def test_many_writers_that_remove_the_lock_file_never_overlap(tmp_path):
    (tmp_path / "count").write_text("0")
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_count, args=(str(tmp_path), 100)) for _ in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
    assert (tmp_path / "count").read_text() == "400"


def test_a_lock_file_that_goes_while_it_is_looked_at_is_asked_for_again(tmp_path, monkeypatch):
    real, gone = os.path.samestat, []

    def samestat(one, other):
        if not gone:
            gone.append(1)
            raise FileNotFoundError
        return real(one, other)

    monkeypatch.setattr(os.path, "samestat", samestat)
    with only_writer(tmp_path, "seal_ops.x"):
        assert gone and os.listdir(tmp_path) == [".seal.lock"]


@pytest.mark.skipif(resource is None, reason="this system has no limit on the size of files")
def test_a_full_disc_locks_all_the_same(tmp_path):
    with room_for(0), only_writer(tmp_path, "seal_ops.x"):
        with (
            pytest.raises(RuntimeError, match="got another process at work there"),
            only_writer(tmp_path, "seal_ops.x"),
        ):
            pass
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("answer", ["ENOLCK", "ENOTSUP", "ENOSYS", "EINVAL", "EIO"])
def test_a_file_system_without_locks_lets_all_write_and_keeps_no_file(tmp_path, monkeypatch, answer):
    code = getattr(errno, answer)

    def flock(handle, how):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    if answer == "EIO":  # a fault of the disc is one
        with pytest.raises(OSError, match=os.strerror(code)), only_writer(tmp_path, "seal_ops.x"):
            pass
        return
    with only_writer(tmp_path, "seal_ops.x"), only_writer(tmp_path, "seal_ops.x"):
        assert os.listdir(tmp_path) == []


def test_a_system_without_locks_lets_all_write(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "fcntl", None)
    with only_writer(tmp_path, "seal_ops.x"), only_writer(tmp_path, "seal_ops.x"):
        assert os.listdir(tmp_path) == []
