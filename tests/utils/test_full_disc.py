"""What was whole stays whole where a disc is full, and one sentence says so, whichever library wrote."""

import errno
import os

import pytest
import torch
from full_disc import resource, room_for
from safetensors.torch import save_file

from seal_ops.utils.files import atomic_write, replacing, replacing_files, replacing_folder, write_adapter

pytestmark = pytest.mark.skipif(resource is None, reason="this system has no limit on the size of files")
TENSORS = {"a": torch.zeros(4096)}


def by_python(path):
    atomic_write(path, b"x" * 9000)


def by_safetensors(path):
    with replacing(path) as temporary:
        save_file(TENSORS, temporary)


def by_several(path):
    with replacing_files(path.parent) as folder:
        save_file(TENSORS, os.path.join(folder, path.name))


def by_folder(path):
    with replacing_folder(path.parent / "new") as folder:
        atomic_write(os.path.join(folder, "inner"), b"x" * 9000)


def by_adapter(path):
    write_adapter(path.parent, ("weights", TENSORS), (path.name, {}))


@pytest.mark.parametrize("write", [by_python, by_safetensors, by_several, by_folder, by_adapter])
def test_nothing_half_written_takes_the_place_of_what_was_whole(tmp_path, write):
    atomic_write(tmp_path / "a", "old")
    with room_for(5000), pytest.raises(OSError) as caught:
        write(tmp_path / "a")
    named = {by_folder: "new", by_several: "", by_adapter: ""}.get(write, "a")
    place = str(tmp_path / named).rstrip("/")
    assert str(caught.value) == (
        f"could not write {place!r} ({os.strerror(errno.EFBIG)}); what was there before is unchanged"
    )
    assert caught.value.errno == errno.EFBIG
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old"


def test_other_errors_keep_their_own_words(tmp_path):
    with pytest.raises(FileNotFoundError, match="No such file"), replacing(tmp_path / "a"):
        open(tmp_path / "b").close()


def test_files_in_folders_go_up_into_folders_that_are_there(tmp_path):
    for content in ("old", "new"):
        with replacing_files(tmp_path) as folder:
            os.makedirs(os.path.join(folder, "x", "y"))
            atomic_write(os.path.join(folder, "x", "y", "z"), content)
    assert (tmp_path / "x" / "y" / "z").read_text() == "new" and os.listdir(tmp_path) == ["x"]


def test_a_folder_that_another_process_has_filled_meanwhile_is_left_alone(tmp_path):
    with pytest.raises(FileExistsError, match=r"must be new or empty, got .*which another process has filled"):
        with replacing_folder(tmp_path / "out") as folder:
            atomic_write(os.path.join(folder, "late"), "")
            atomic_write(tmp_path / "out" / "first", "")
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["first"]


def test_a_folder_under_a_file_is_told_in_one_sentence(tmp_path):
    atomic_write(tmp_path / "a", "")
    for write in (replacing_files, replacing_folder):
        with pytest.raises(OSError, match=r"output must be in a writable folder, got .*/a.*\(Not a directory\)$"):
            with write(tmp_path / "a" / "b" / "c"):
                pass
