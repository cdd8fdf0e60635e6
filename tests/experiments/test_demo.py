"""The demo on several tasks and on a model with a preset."""

import json
import os

import torch
from command_line import TINY, folder, seal  # noqa: F401
from retrieval_fixtures import one_thread  # noqa: F401

from seal_ops.experiments import demo
from seal_ops.experiments.demo import Settings


def test_every_task_has_a_folder_and_the_report_has_both(capsys, folder, tmp_path):  # noqa: F811
    output = tmp_path / "demo"
    arguments = [
        "demo", "--model", folder, "--output", output, "--tasks", "lines", "own_tasks:Colours", "--lengths", 190, 230,
        "--cases", 2, "--samples", 2, *TINY,
    ]  # fmt: skip
    code, out, err = seal(capsys, *arguments)
    assert code == 0, err
    for task in ("lines", "colours"):
        results = json.loads((output / task / "results.json").read_text())
        assert results["task"] == task and results["accuracy"]["SEAL-C"][1]["length"] == 230
        assert f"{output / task / 'accuracy.png'}" in out
    assert "about" in out.split("1. lines")[0], "how long it will take is said before it starts"
    report = (output / "report.html").read_text()
    assert "lines/results" in report and "colours/results" in report
    (output / "colours" / "mine.txt").write_text("kept")
    demo.forget(str(output))
    assert sorted(os.listdir(output)) == ["colours"] and os.listdir(output / "colours") == ["mine.txt"]


def test_the_same_task_twice(capsys, folder, tmp_path):  # noqa: F811
    code, _, err = seal(
        capsys, "demo", "--model", folder, *TINY, "--output", tmp_path / "demo", "--tasks", "lines", "lines"
    )
    assert code == 1 and err == "seal demo: tasks must be different ones, at least one, got lines, lines\n"
    assert not (tmp_path / "demo").exists()


def test_presets(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    small = demo.preset("smollm2")
    assert max(small.lengths) <= 1024 and small.tasks == ("multikey", "passkey") and small.model == "smollm2"
    assert max(demo.preset("smollm2", "cuda:1").lengths) == 8000
    assert demo.preset(Settings.model) == Settings()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert max(demo.preset("smollm2").lengths) == 8000 and demo.preset("smollm2", "cpu") == small.__class__(
        **{**vars(small), "device": "cpu"}
    )


def test_what_is_given_wins_over_the_preset(monkeypatch, capsys, tmp_path):
    seen = []
    monkeypatch.setattr(demo, "run", lambda settings, output, **options: seen.append(settings) or {})
    seal(capsys, "demo", "--model", "smollm2", "--device", "cpu", "--cases", 3, "--output", tmp_path, "--lr-head", 0.5)
    assert (seen[0].cases, seen[0].lr_head, seen[0].tasks) == (3, 0.5, ("multikey", "passkey"))
    assert seen[0].samples == demo.preset("smollm2", "cpu").samples
