"""The list of racecheck's known false positives takes what it names, and nothing else."""

import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parents[1] / "gpu" / "known_races.py"
SOURCE = """float2 delta = *(delta_row + 8 * j);
const uint4 x = shared_.p[step_ & 1][i][thread_];
float s = shared.scale[0][c];
"""
COPY = (
    "Write access at seal::sm90::bulk_load(void *, const void *, unsigned int, unsigned long *)+0xd350 in ptx.cuh:102"
)


def access(line, kind="Read", kernel="attention_backward_wide"):
    return (
        f"{kind} access at void seal::sm90::{kernel}<__nv_bfloat16>(Params)+0x49a0 in kernel.cuh:{line} [256 hazards]"
    )


@pytest.mark.parametrize(
    "first, second, known",
    [
        (COPY, access(1), True),
        (access(1), COPY, True),
        (COPY, access(3), False),
        (COPY, access(99), False),
        (COPY, access(3, kernel="read_columns"), True),
        (access(1, "Write", "produce_tiles"), access(3, kernel="Consumer"), True),
        (access(3, "Write", "Consumer"), access(1, kernel="produce_tiles"), False),
        (access(1, "Write", "produce_tiles"), access(3, kernel="produce_tiles"), False),
        (access(2), access(2, "Write"), True),
        (access(2), access(3, "Write"), False),
        (access(2, kernel="rope"), access(2, "Write", "rope"), False),
    ],
    ids=[
        "copied delta",
        "copied delta, read first",
        "copied scale",
        "no such line",
        "a vector's reader",
        "a tile handed over",
        "written by a reader",
        "read by the picker",
        "P handed over",
        "P and another",
        "another kernel",
    ],
)
def test_reports(tmp_path, first, second, known):
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc/kernel.cuh").write_text(SOURCE)
    (tmp_path / "log").write_text(
        f"========= Error: Race reported between {first}\n=========     and {second}\n========= \n"
    )
    done = subprocess.run([sys.executable, SCRIPT, tmp_path / "log", tmp_path / "csrc"], capture_output=True, text=True)
    assert (done.returncode == 0) == known and ("1 reports, 0 of them" in done.stdout) != known, (
        done.stdout + done.stderr
    )


def test_a_log_without_a_report_is_a_failure(tmp_path):
    """run_all.sh asks only after racecheck has found something."""
    (tmp_path / "log").write_text("========= COMPUTE-SANITIZER\n")
    assert subprocess.run([sys.executable, SCRIPT, tmp_path / "log"], capture_output=True).returncode == 1
