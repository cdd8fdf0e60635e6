"""The comparison of builds: each in a process of its own, the table, the file, and what is not a build."""

import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]


def compare(*arguments):
    command = [sys.executable, str(ROOT / "benchmarks/compare_builds.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_two_builds_in_turn(tmp_path):
    done = compare(f"old={ROOT}", f"new={ROOT}", "--rounds", 1, "--only", "tiny", "--output", tmp_path / "times.json")
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "times.json").read_text())
    assert set(content["builds"]) == {"old", "new"} and all("torch" in facts for facts in content["builds"].values())
    directions = ("forward", "window", "backward", "deterministic", "rope_backward")
    assert list(content["cases"]) == [f"tiny {what}" for what in directions]
    for title, case in content["cases"].items():
        assert not case["errors"] and min(case["ms"].values()) > 0
        (line,) = [line for line in done.stdout.splitlines() if line.startswith(title + " ")]
        assert float(line.split()[-1]) == round(case["ms"]["old"] / case["ms"]["new"], 3)


def test_a_folder_without_a_build(tmp_path):
    done = compare(f"old={tmp_path}", "--only", "tiny")
    assert done.returncode == 1 and f"{tmp_path} must hold an installed seal_ops, got " in done.stderr
    assert done.stderr.splitlines()[-1].startswith("compare_builds: the process of old must answer")
