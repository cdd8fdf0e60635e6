"""Two processes equal one, on a CPU over gloo: `seal_ops.train`, DDP, FSDP2, tensor and sequence parallelism."""

import importlib.util
import sys

import pytest
from launching import two_processes

ON_A_CPU = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
SECTIONS = ("loop", "command", "data_parallel", "half_precision", "tensor_parallel", "sequence_parallel")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("processes")
    two_processes("parallel_processes.py", path, *SECTIONS, **ON_A_CPU)
    return path


@pytest.mark.parametrize("section", SECTIONS)
def test_two_processes_equal_one(folder, section):
    assert (folder / f"{section}-0").exists() and (folder / f"{section}-1").exists(), "a process ended early"


def test_one_process_goes_on_where_two_stopped(folder, monkeypatch):
    """The checkpoint of two processes; the sums in another order are all that differs, and that is said."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(sys, "argv", ["", str(folder)])
    processes = importlib.import_module("parallel_processes")
    with pytest.warns(UserWarning, match=r"was written by 2 processes and goes on with 1: gradients are summed in"):
        result, values = processes.train(resume=True, output_dir=folder / "of_two", checkpoint_every=2)
    expected, learned = processes.train()
    assert len(result.losses) == len(expected.losses) == 6
    processes.close(learned, values, "two processes, then one")


@pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="DeepSpeed is not installed; the stand-in does what its wrapper does",
)
@pytest.mark.parametrize(
    "program",
    [["sequence_processes.py"], ["ulysses_trainer.py", 0], ["ulysses_trainer.py", 2], ["ulysses_trainer.py", 3]],
)
def test_deepspeed(tmp_path, program):
    two_processes(program[0], tmp_path, *program[1:], **ON_A_CPU)
    assert (tmp_path / "done-0").exists() and (tmp_path / "done-1").exists(), "a process ended early"
