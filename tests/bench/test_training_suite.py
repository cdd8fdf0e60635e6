"""`seal bench --suite training` on a tiny model: contestants, files, what is extrapolated, and a wrong one."""

import contextlib
import csv
import dataclasses
import json

import pytest
import torch

from seal_ops import bench
from seal_ops.bench import training_sizes, training_steps
from seal_ops.training.frozen_linears import conversion, fp8_product


def run(tmp_path, *words):
    return bench.main(["--suite", "training", "--device", "cpu", "--output", str(tmp_path), "--name", "t", *words])


def test_suite_runs_tiny_and_writes_its_files(tmp_path, capsys):
    pytest.importorskip("peft")
    assert run(tmp_path, "--steps", "1") == 0
    stored = json.loads((tmp_path / "t.json").read_text())
    rows = stored["rows"]
    assert [(r["contestant"], r["length"]) for r in rows] == [
        (name, length) for length in (64, 128) for name in training_steps.CONTESTANTS if name != "auto-fp8"
    ]
    assert {r["status"] for r in rows} == {"ok"}
    for row in rows:
        share = row["layers"] / row["layers_run"]
        assert row["seconds_all_layers"] == pytest.approx(row["seconds"] * share) and row["seconds"] > 0
        assert row["extrapolated"] == (row["length"] == 128) == (share == 2)
        assert row["tokens_per_s"] == pytest.approx(row["length"] / row["seconds_all_layers"])
        assert row["gradient_error"] == "" or 0 <= row["gradient_error"] < 1e-3
    assert rows[0]["expected_peak"] > 0 and rows[0]["keeps"] == "4 x everything"
    assert "extrapolated" in capsys.readouterr().out
    assert "*" in (tmp_path / "t.md").read_text() and (tmp_path / "t.png").read_bytes()[:4] == b"\x89PNG"
    with open(tmp_path / "t.csv") as file:
        assert [r["torch"] for r in csv.DictReader(file)] == [torch.__version__] * len(rows)
    assert run(tmp_path, "--steps", "1", "--resume") == 0
    assert json.loads((tmp_path / "t.json").read_text())["rows"] == rows, "nothing is measured twice"


def test_fewer_layers_and_the_first_step(tmp_path):
    """Long lengths are measured so: one step, of some layers; a run of all layers stands for the length afterwards."""
    options = ["--only", "auto", "--lengths", "64", "--steps", "0"]
    assert run(tmp_path, *options, "--layers", "2") == 0
    assert run(tmp_path, *options, "--resume", "--layers", "2") == 0, "nothing is measured twice"
    assert run(tmp_path, *options, "--resume") == 0
    few, all_layers = json.loads((tmp_path / "t.json").read_text())["rows"]
    assert (few["layers_run"], all_layers["layers_run"]) == (2, 4) and few["extrapolated"] != all_layers["extrapolated"]
    assert few["seconds_all_layers"] == pytest.approx(2 * few["seconds"]) and few["seconds"] > 0
    assert "*" not in (tmp_path / "t.md").read_text().partition("|")[2]


def test_the_contestant_in_fp8_states_its_error_and_may_not_take_another_weight(tmp_path, monkeypatch):
    words = ["--steps", "1", "--lengths", "64", "--only", "auto,auto-fp8,selective", "--dtype", "bfloat16"]
    assert run(tmp_path, *words) == 0
    rows = {r["contestant"]: r for r in json.loads((tmp_path / "t.json").read_text())["rows"]}
    assert {r["status"] for r in rows.values()} == {"ok"} and rows["auto-fp8"]["expected_peak"] > 0
    assert 0.02 < rows["auto-fp8"]["gradient_error"] < 0.4 and rows["selective"]["gradient_error"] < 0.1
    monkeypatch.setattr(training_steps.Gate, "state", lambda self, gradients: setattr(self, "worst", 0.9))
    assert run(tmp_path, *words) == 0, "an error over all layers is stated"
    monkeypatch.undo()
    of = fp8_product.Fp8Weight.of

    def mixed_up(weight):  # its backward pass multiplies with the columns of the others
        found = of(weight)
        return dataclasses.replace(
            found, transposed=found.transposed.view(torch.uint8).flip(0).view(found.values.dtype)
        )

    monkeypatch.setattr(conversion.Fp8Weight, "of", mixed_up)
    assert run(tmp_path, *words) == 1
    rows = {r["contestant"]: r for r in json.loads((tmp_path / "t.json").read_text())["rows"]}
    assert rows["auto-fp8"]["status"].startswith("wrong") and rows["selective"]["status"] == "ok"
    assert run(tmp_path, "--only", "auto-fp8", "--lengths", "64") == 0
    assert "a model in torch.bfloat16" in json.loads((tmp_path / "t.json").read_text())["rows"][0]["status"]


def test_a_wrong_contestant_is_not_timed(tmp_path, monkeypatch):
    @contextlib.contextmanager
    def cheat(model, ids):
        with training_steps._ours(model, ids, False) as step:
            yield training_steps.Step(step.trained, lambda: 1.5 * step.loss())

    def broken(model, ids):
        raise RuntimeError("no\nmemory")

    honest = training_steps.CONTESTANTS["selective"]
    others = {"selective": honest, "cheat": ("cheat", cheat), "broken": ("broken", broken)}
    monkeypatch.setattr(training_steps, "CONTESTANTS", others)
    assert run(tmp_path, "--steps", "1", "--lengths", "64") == 1
    rows = {r["contestant"]: r for r in json.loads((tmp_path / "t.json").read_text())["rows"]}
    assert (
        rows["cheat"]["status"].startswith("wrong: relative error of the gradients 5") and not rows["cheat"]["seconds"]
    )
    assert rows["broken"]["status"] == "failed: RuntimeError: no" and rows["selective"]["status"] == "ok"


def test_operations_are_those_of_the_model():
    size = training_sizes.SIZES["tiny"]
    model = training_steps.random_model(size, 4, 64, torch.float32, torch.device("cpu"))
    weights = sum(p.numel() for n, p in model.model.layers.named_parameters() if p.dim() == 2)
    head = 2 * model.lm_head.weight.numel() * 32
    attention = 3.5 * 4 * 64 * 64**2 / 2 * 4
    assert size.step_operations(64, 4) == 2 * 2 * weights * 64 + attention + 2 * head
    big = training_sizes.SIZES["8b"]
    assert {layers for _, layers in big.runs} == {32, 4} and big.runs[-1] == (1_048_576, 4)


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--only", "fa9"], "--only must name some of auto, auto-fp8, selective, inputs, ia3, ia3-tuned, got fa9"),
        (["--lengths", "63"], "--lengths must name some of 64, 128, got 63"),
        (["--steps", "-1"], "--steps must be at least 0, got -1"),
        (["--layers", "5"], "--layers must be 1 to 4, the layers of tiny, got 5"),
    ],
)
def test_bad_arguments_of_the_suite(words, sentence, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, *words)
    assert stopped.value.code == 2 and sentence in capsys.readouterr().err
