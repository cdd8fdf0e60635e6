"""Files replaced in one step, and what killed writers leave."""

import os
import subprocess
import sys

import pytest
from installed import environment

from seal_ops.utils import files
from seal_ops.utils.files import atomic_write, replacing, replacing_files, replacing_folder


def test_writers_may_use_temporary_files_of_their_own(tmp_path):
    with replacing(tmp_path / "a.bin") as temporary:
        with open(os.path.join(os.path.dirname(temporary), ".tmpabc"), "w") as other:
            other.write("left by a library")
        os.unlink(other.name)
        with open(temporary, "w") as file:
            file.write("new")
    assert os.listdir(tmp_path) == ["a.bin"] and (tmp_path / "a.bin").read_text() == "new"


def test_nothing_is_left_and_nothing_changes_where_a_writer_fails(tmp_path):
    atomic_write(tmp_path / "a", "old")
    for writer in (
        lambda: replacing(tmp_path / "a"),
        lambda: replacing_files(tmp_path),
        lambda: replacing_folder(tmp_path / "b"),
    ):
        with pytest.raises(RuntimeError), writer() as temporary:
            if os.path.isdir(temporary):
                atomic_write(os.path.join(temporary, "a"), "new")
            raise RuntimeError
        assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old"


def test_files_go_up_with_the_modes_of_new_files(tmp_path):
    with replacing_files(tmp_path) as folder:
        for name in ("x", "y"):
            os.close(os.open(os.path.join(folder, name), os.O_CREAT | os.O_WRONLY, 0o600))
    (tmp_path / "z").write_text("")
    assert {p.stat().st_mode for p in tmp_path.iterdir()} == {(tmp_path / "z").stat().st_mode}
    assert sorted(os.listdir(tmp_path)) == ["x", "y", "z"]


KILLED = (
    "import os, signal\nfrom seal_ops.utils.files import {0}\nwith {0}({1!r}): os.kill(os.getpid(), signal.SIGKILL)"
)


@pytest.mark.parametrize("kind", ["replacing", "replacing_files", "replacing_folder"])
def test_the_next_write_removes_what_a_killed_one_left(tmp_path, kind):
    path = tmp_path if kind == "replacing_files" else tmp_path / "a"
    subprocess.run([sys.executable, "-c", KILLED.format(kind, str(path))], cwd=tmp_path, env=environment())
    assert len(os.listdir(tmp_path)) == 1
    with replacing(tmp_path / "b"):  # a write that is going on, of a process that lives
        atomic_write(tmp_path / "c", "")
        assert len(os.listdir(tmp_path)) == 2
    assert sorted(os.listdir(tmp_path)) == ["b", "c"]


def test_old_leftovers_of_another_machine_go_and_fresh_ones_stay(tmp_path):
    name = f".a.seal-{'0' * 8}-1-abc.tmp"
    (tmp_path / name).mkdir()
    (tmp_path / ".a.tmp").write_text("not ours")
    atomic_write(tmp_path / "c", "")
    assert sorted(os.listdir(tmp_path)) == [name, ".a.tmp", "c"]
    os.utime(tmp_path / name, (0, 0))
    atomic_write(tmp_path / "c", "")
    assert sorted(os.listdir(tmp_path)) == [".a.tmp", "c"]
    assert files._lives(os.getpid())
