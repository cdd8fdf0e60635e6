"""Two processes equal one, on a CPU over gloo: `seal_ops.train`, DDP, FSDP2, tensor and sequence parallelism."""

import importlib.util

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
