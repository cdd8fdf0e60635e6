"""Figures of single runs on the pages are those of the files that they name: the demo, several GPUs, serving, the GPU
suite."""

import json
import pathlib
import re

import pytest
from markdown_tables import tables_of

ROOT = pathlib.Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results"


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


def stored(name: str) -> dict:
    return json.loads((RESULTS / name).read_text())


def table(name: str, *head: str) -> list:
    return tables_of(ROOT / "docs" / name)[head]


def test_the_demo_on_a_gpu():
    found = table("real_model.md", "task", "", "512", "1,024", "2,048", "4,096", "8,000", "merged, 8,000")
    assert len(found) == 6
    for place, task in ((0, "multikey"), (3, "passkey")):
        result = json.loads((ROOT / f"results/smollm2-demo/{task}.json").read_text())
        assert found[place][0] == task
        for row in found[place : place + 3]:
            expected = [cell["accuracy"] for cell in result["accuracy"][row[1]]]
            assert [float(cell) for cell in row[2:7]] == pytest.approx(expected, abs=0.00501)
            if row[1] != "base":
                (merged,) = result["accuracy"][f"{row[1]} merged"]
                assert float(row[7]) == pytest.approx(merged["accuracy"], abs=0.00501)
                differ = {"multikey": 1, "passkey": 0}[task]  # as the page says below the table
                assert result["merged_against_unmerged"][row[1]] == {"cases": 40, "differ": differ}


def test_four_cards_on_one_sequence():
    one, four = (stored(f"sequence-parallel-{count}-h200-a22c778.json") for count in (1, 4))
    text = page("several_gpus.md")
    seconds = re.search(r"262,144 tokens, .*: ([\d.]+) s a step on four .*, ([\d.]+) s on one, ([\d.]+) times", text)
    ratio = one["seconds_a_step"] / four["seconds_a_step"]
    expected = (f"{four['seconds_a_step']:.1f}", f"{one['seconds_a_step']:.0f}", f"{ratio:.2f}")
    assert seconds.groups() == expected
    assert (one["processes"], four["processes"], one["length"], four["length"]) == (1, 4, 262_144, 262_144)
    assert (one["gradient_checkpointing"], four["gradient_checkpointing"]) == ("auto", "selective")
    for count, result in ((r'"auto"`, (\d+) GiB', one), (r'"selective", (\d+) GiB', four)):
        assert int(re.search(count, text)[1]) == round(result["peak_bytes"] / 2**30, 0)
    error = float(re.search(r"at 8,192 tokens were at most (\.\d+) from", text)[1])
    assert error == pytest.approx(four["gradient_error"], abs=0.0006) and four["check_length"] == 8192


def test_steps_on_a_static_cache():
    found = table(
        "serving.md",
        "",
        "without scales, SDPA",
        "one adapter",
        "three mixed",
        "tokens a second, one adapter against none",
        "time, mixed against one",
    )
    for row, name in zip(found, ("fused0", "fused1"), strict=True):
        (measured,) = stored(f"serving-static-{name}-h200-a22c778.json")["rows"]
        spent = measured["milliseconds a token"]
        expected = [spent["untouched"], spent["one"], spent["mixed"]]
        assert [float(cell) for cell in row[1:4]] == pytest.approx(expected, abs=0.0501)
        expected = [measured["one / untouched, tokens a second"], measured["mixed / one, time"]]
        assert [float(cell) for cell in row[4:]] == pytest.approx(expected, abs=0.00501)
        assert (measured["tokens"], measured["batch"], measured["cache"]) == (2048, 4, "static")


def test_the_gpu_suite_in_one_go():
    log, text = (RESULTS / "suite-h200-a22c778.txt").read_text(), page("kernel_notes.md")
    names = {
        "build": "build",
        "CUDA suite": "cuda",
        "Triton suite": "triton",
        "alone: times, and memory in use": "alone",
    }
    stages = {row[0]: row[1:] for row in table("kernel_notes.md", "stage", "result", "seconds")}
    for name, stage in names.items():
        seconds, rest = re.search(rf"(?m)^{stage} +passed +(\d+) s (.*)", log).groups()
        assert stages[name][1] == seconds
        counts = re.findall(r"(\d+) (passed|skipped)", rest)
        assert [
            (n.replace(",", ""), word) for n, word in re.findall(r"([\d,]+) (passed|skipped)", stages[name][0])
        ] == counts
    sanitizers = [
        re.search(rf"(?m)^{tool} +passed +(\d+) s", log)[1] for tool in ("memcheck", "racecheck", "synccheck")
    ]
    assert stages["memcheck, racecheck, synccheck"][1].startswith(", ".join(sanitizers))
    assert f"In all {re.search(r'all stages: (.*) s', log)[1]} s" in text and "failed" not in log.lower()


def test_flash_attention_3s_cases():
    log, text = (RESULTS / "fa3-tests-h200-a22c778.txt").read_text(), page("kernel_notes.md")
    assert re.findall(r"(?m)^all +(\d+) +(\d+) ", log) == [("5039", "1"), ("5039", "1")]
    assert "of the 5,040 cases without a soft cap that apply, 5,039 pass on the CUDA kernels" in text
    assert "of the 5,040 with one, 5,039 on Triton" in text
    for found in re.finditer(r"assert ([\d.]+) <= \(\((\d) \* ([\d.]+)\) \+ ([\d.]+)\)", log):
        error, factor, other, margin = map(float, found.groups())
        for value in (error, factor * other + margin):
            assert f"{value:.3g}".lstrip("0") in text
