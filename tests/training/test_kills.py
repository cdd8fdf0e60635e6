"""Runs that are killed come to the same end as runs that are not, and leave nothing half-written."""

import json
import os
import subprocess
import sys

import pytest
from installed import FIXTURES, environment

KILLS = int(os.environ.get("SEAL_TEST_KILLS", 15))


def kill(*arguments):
    command = [sys.executable, os.path.join(FIXTURES, "killing.py"), *map(str, arguments)]
    paths = environment(FIXTURES, os.path.dirname(FIXTURES), OMP_NUM_THREADS="1")
    done = subprocess.run(command, capture_output=True, text=True, env=paths)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("job", ["train", "evaluate"])
def test_killed_at_random_times(tmp_path, job):
    """SEAL_TEST_KILLS sets how many; 50 and more on a machine with time for it."""
    found = kill(job, tmp_path / "run", "random", KILLS, 0)
    assert found["wrong"] == [] and found["kills"] >= KILLS and found["finished"] > 0


@pytest.mark.parametrize("job", ["train", "evaluate"])
def test_killed_at_every_step_of_every_write(tmp_path, job):
    found = kill(job, tmp_path / "run", "steps")
    assert found["wrong"] == []
    assert found["kills"] == 4 * (7 if job == "train" else 2), "as many writes as a run has: 3 checkpoints, 4 results"


@pytest.mark.parametrize("step, fault", [("replaced", "no random state"), ("half written", "in place")])
def test_kills_show_a_fault(tmp_path, step, fault):
    """A model with dropout that goes on with other random numbers, and a checkpoint that is not replaced in one
    step."""
    found = kill("train", tmp_path / "run", "once", step, 2, fault)
    assert found["kills"] == 1 and found["wrong"]
