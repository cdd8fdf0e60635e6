"""Scales in two processes: transformers' Trainer under DDP, and the checkpoints of `SealCallback` under FSDP2."""

import os
import pathlib
import subprocess
import sys

import torch
from two_processes import train

PROGRAM = pathlib.Path(__file__).resolve().parents[1] / "fixtures" / "two_processes.py"


def test_two_processes(tmp_path):
    torch.save(train(str(tmp_path / "one"), batch_size=2), tmp_path / "one_process.pt")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", PROGRAM, tmp_path],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert {"done-0", "done-1"} <= set(os.listdir(tmp_path)), "a process ended early"
