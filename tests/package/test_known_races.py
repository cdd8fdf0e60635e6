"""The list of racecheck's known false positives takes what it names, and nothing else."""

import pathlib
import re
import runpy
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parents[1] / "gpu" / "known_races.py"
SOURCE = """float2 delta = *(delta_row + 8 * j);
const uint4 x = shared_.p[step_ & 1][i][thread_];
float s = shared.scale[0][c];
if (lane < 4) *reinterpret_cast<float2*>(scratch + thread / 32 * kD + 8 * j + column) = make_float2(x, y);
for (int w = 0; w < kWarps; ++w) sum += scratch[w * kD + c];
"""
COPY = (
    "Write access at seal::sm90::bulk_load(void *, const void *, unsigned int, unsigned long *)+0xd350 in ptx.cuh:102"
)


def access(line, kind="Read", kernel="attention_backward_wide"):
    return (
        f"{kind} access at void seal::sm90::{kernel}<__nv_bfloat16>(Params)+0x49a0 in kernel.cuh:{line} [256 hazards]"
    )


def sums(line, kind, warps=8):
    """An access of sum_columns by that many warps."""
    return (
        f"{kind} access at void seal::sm90::sum_columns<__nv_bfloat16, (int)64, (int)128, (int){warps}>("
        f"const seal::sm90::BackwardKernelParams &, const char *)+0x{line}{len(kind)} in kernel.cuh:{line} [32 hazards]"
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
        (sums(5, "Read"), sums(4, "Write"), True),
        (sums(4, "Write"), sums(5, "Read"), True),
        (sums(5, "Read"), sums(3, "Write"), False),
        (sums(1, "Read"), sums(4, "Write"), False),
        (sums(5, "Write"), sums(4, "Read"), False),
        (sums(4, "Write"), sums(4, "Write"), False),
        (sums(5, "Read", 4), sums(4, "Write", 4), False),
        (sums(5, "Read"), access(4, "Write", "give_ds"), False),
        (access(5, kernel="give_ds"), sums(4, "Write"), False),
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
        "sums added",
        "sums added, write first",
        "sums, written elsewhere",
        "sums, read elsewhere",
        "sums, the lines exchanged",
        "sums written twice",
        "sums of the wide kernel",
        "sums, written by another",
        "sums, read by another",
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


def test_the_sums_that_are_known_stand_between_barriers():
    """They are known as false positives because of these two barriers: the list would hide the loss of one."""
    script = runpy.run_path(str(SCRIPT))
    source = (SCRIPT.parents[2] / "csrc/cuda/sm90/backward_keys.cuh").read_text()
    body = re.search(r"SEAL_DEVICE void sum_columns\(.*?\) {\n(.*?)^}\n", source, flags=re.S | re.M)[1]
    kept = [line.split("//")[0].rstrip() for line in body.splitlines() if re.search("scratch|named_sync", line)]
    barrier = "  named_sync(barrier, 32 * kWarps);"  # in no branch or loop, so of all threads
    assert len(kept) == 4 and kept[1] == kept[3] == barrier, kept
    assert script["SUM_WRITTEN"] in kept[0] and script["SUM_READ"] in kept[2], kept
