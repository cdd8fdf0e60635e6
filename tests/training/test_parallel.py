"""Several processes equal one: `seal_ops.train`, DDP, FSDP2 and tensor parallelism, in two gloo processes on a CPU."""

import os
import pathlib
import subprocess
import sys

import pytest

FIXTURES = pathlib.Path(__file__).resolve().parents[1] / "fixtures"


def run(program, *arguments):
    """Standard output of a program in two processes."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", FIXTURES / program,
         *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
             "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    return run("parallel_processes.py", tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("section", ["loop", "data_parallel", "tensor_parallel"])
def test_two_processes_equal_one(printed, section):
    assert {f"process {rank}: {section} is done" for rank in (0, 1)} <= set(printed)
