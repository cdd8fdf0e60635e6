"""Two processes equal one, on a CPU over gloo: `seal_ops.train`, DDP, FSDP2, tensor and sequence parallelism."""

import importlib.util

import pytest
from launching import two_processes

ON_A_CPU = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
SECTIONS = ("loop", "command", "data_parallel", "half_precision", "tensor_parallel", "sequence_parallel")


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    return two_processes("parallel_processes.py", tmp_path_factory.mktemp("processes"), *SECTIONS, **ON_A_CPU)


@pytest.mark.parametrize("section", SECTIONS)
def test_two_processes_equal_one(printed, section):
    assert {f"process {rank}: {section} is done" for rank in (0, 1)} <= set(printed)


def test_deepspeeds_own_exchange():
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed; the stand-in does what its wrapper does")
    printed = two_processes("sequence_processes.py", **ON_A_CPU)
    assert {"process 0 is done", "process 1 is done"} <= set(printed)
