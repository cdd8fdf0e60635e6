"""Sequence parallelism: two processes that share the tokens of a sequence equal one."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

PROGRAM = pathlib.Path(__file__).resolve().parents[1] / "fixtures" / "sequence_processes.py"


@pytest.mark.parametrize("exchange", ["stand-in", "deepspeed"])
def test_two_processes_share_the_tokens(exchange):
    if exchange == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed; the stand-in does what its wrapper does")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", PROGRAM, exchange],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu",
             "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert {"process 0 is done", "process 1 is done"} <= set(done.stdout.splitlines())
