"""The command `seal`: its stages on a tiny model, the demo, messages, exit codes."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys

import pytest
import torch
from command_line import TINY, folder, seal  # noqa: F401
from retrieval_fixtures import model, one_thread, tokenizer  # noqa: F401

from seal_ops import tasks
from seal_ops.cli import main as cli
from seal_ops.cli.command import Command
from seal_ops.evaluation.results import Evaluation
from seal_ops.experiments import comparison, demo


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_has_an_example(capsys, name):
    code, out, _ = seal(capsys, name, "--help")
    assert code == 0 and f"example:\n  seal {name}" in out


def test_help_lists_every_command(capsys):
    code, out, _ = seal(capsys, "--help")
    assert code == 0
    for name, command in cli.COMMANDS.items():
        assert name in out and command.summary.split()[0] in out


@pytest.mark.parametrize("arguments", [[], ["no-such"], ["eval"], ["eval", "--model", "m", "--lengths", "0"],
                                       ["eval", "--model", "m", "--lengths", "9", "--plot", "a.jpg"],
                                       ["train", "--model", "m", "--granularity", "row", "--output", "o"]])  # fmt: skip
def test_wrong_usage_exits_with_2(capsys, arguments):
    code, _, err = seal(capsys, *arguments)
    assert code == 2 and "usage: seal" in err and "Traceback" not in err


def test_data_train_eval_merge(capsys, folder, tmp_path):
    data, scales, merged = tmp_path / "lines.jsonl", tmp_path / "scales", tmp_path / "merged"
    code, out, err = seal(capsys, "data", "--tokenizer", folder, "--length", 190, "--samples", 3, "--output", data)
    assert code == 0, err
    assert tasks.read(data) == tasks.lines(tokenizer(), length=190, samples=3)

    train = [
        "train",
        "--model",
        folder,
        "--granularity",
        "channel",
        "--data",
        data,
        "--output",
        scales,
        "--lr",
        0.2,
        *TINY,
    ]
    code, out, err = seal(capsys, *train)
    assert code == 0, err
    assert "64 scales trained in 3 steps" in out and (scales / "adapter_model.safetensors").exists()
    assert seal(capsys, *train)[0] == 0

    def evaluate(name, *options):
        path = tmp_path / f"{name}.json"
        code, out, err = seal(
            capsys, "eval", "--lengths", 190, 230, "--cases", 3, "--output", path, "--csv", tmp_path / f"{name}.csv",
            "--plot", tmp_path / f"{name}.png", *TINY, *options,
        )  # fmt: skip
        assert code == 0, err
        assert "95 % interval" in out and (tmp_path / f"{name}.png").read_bytes()[1:4] == b"PNG"
        return [record["output"] for record in Evaluation.load(path).records]

    base = evaluate("base", "--model", folder)
    trained = evaluate("trained", "--model", folder, "--scales", scales, "--compare", tmp_path / "base.json")
    code, out, err = seal(capsys, "merge", "--model", folder, "--scales", scales, "--output", merged, *TINY)
    assert code == 0, err
    assert evaluate("merged", "--model", merged) == trained != base
    code, _, err = seal(capsys, "merge", "--model", folder, "--scales", scales, "--output", merged, *TINY)
    assert code == 1 and "output folder must be new or empty" in err


def test_demo(capsys, folder, tmp_path, monkeypatch):
    output = tmp_path / "demo"
    arguments = [
        "demo",
        "--model",
        folder,
        "--output",
        output,
        "--lengths",
        230,
        190,
        "--cases",
        3,
        "--samples",
        2,
        *TINY,
    ]
    code, out, err = seal(capsys, *arguments)
    assert code == 0, err
    results = json.loads((output / "results.json").read_text())
    assert list(results["accuracy"]) == ["base", "SEAL-H", "SEAL-C", "SEAL-H merged", "SEAL-C merged"]
    assert [cell["length"] for cell in results["accuracy"]["SEAL-C"]] == [190, 230]
    assert [cell["length"] for cell in results["accuracy"]["SEAL-C merged"]] == [230]
    assert results["merged_against_unmerged"]["SEAL-C"] == {"cases": 3, "differ": 0}
    assert results["training"]["SEAL-H"]["parameters"] == 8 and results["provenance"]["versions"]["torch"]
    for name in ("accuracy.png", "scales.png"):
        assert (output / name).read_bytes()[1:4] == b"PNG" and name in out
    assert "SEAL-H merged" in out and "230" in out

    # Continued after an interruption: what is complete is not done again.
    (output / "results.json").unlink()
    (output / "channel.json").unlink()
    measured = []
    real = demo.evaluate
    monkeypatch.setattr(demo, "evaluate", lambda *a, **k: measured.append(k["name"]) or real(*a, **k))
    monkeypatch.setattr(comparison, "train", lambda *a, **k: pytest.fail("trained again"))
    assert seal(capsys, *arguments)[0] == 0
    again = json.loads((output / "results.json").read_text())
    assert again["accuracy"] == results["accuracy"] and "SEAL-C" in measured

    code, _, err = seal(capsys, *arguments, "--seed", 1)
    assert code == 1 and "got one with another seed" in err and "--restart" in err
    (output / "mine.txt").write_text("kept")
    demo.forget(str(output))
    assert os.listdir(output) == ["mine.txt"]


def test_full_demo_measures_200_cases(monkeypatch, capsys):
    seen = []

    def run(settings, output, log):
        seen.append(settings)
        raise ValueError("far enough")

    monkeypatch.setattr(demo, "run", run)
    assert seal(capsys, "demo", "--full")[0] == 1
    assert seen[0].cases == 200 and seen[0].lengths == (256, 512, 2048)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["eval", "--model", "{tmp}/none", "--lengths", "200"], "seal eval: model must be a folder.* which does not exist"),  # noqa: E501
        (["eval", "--model", "{tmp}", "--lengths", "200"], "seal eval: .* could not be loaded"),
        (["eval", "--model", "{model}", "--lengths", "50"], "tasks.lines: length must be at least 1.. tokens"),
        (["eval", "--model", "{model}", "--lengths", "200", "--task", "liens"], "task must be one of"),
        (["eval", "--model", "{model}", "--lengths", "200", "--scales", "{tmp}"], "seal_ops.load: .*adapter_config.json"),  # noqa: E501
        (["eval", "--model", "{model}", "--lengths", "200", "--device", "quantum"], "device must be auto, cpu"),
        (["train", "--model", "{model}", "--granularity", "head", "--output", "{tmp}/s"], "--length must be given"),
        (["train", "--model", "{model}", "--granularity", "head", "--length", "200", "--output", "{tmp}/file/s"],
         "output_dir must be a writable folder"),
        (["data", "--tokenizer", "{model}", "--length", "200", "--output", "{tmp}/file/x"], "file"),
    ],
)  # fmt: skip
def test_failures_are_one_sentence_and_exit_with_1(capsys, folder, tmp_path, arguments, message):
    (tmp_path / "file").write_text("")
    code, _, err = seal(capsys, *(a.format(tmp=tmp_path, model=folder) for a in arguments))
    assert code == 1 and len(err.strip().splitlines()) == 1 and err.startswith(f"seal {arguments[0]}: ")
    assert re.search(message, err), err


def test_damaged_weights_are_one_sentence(capsys, folder, tmp_path):
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"junk")
    code, _, err = seal(capsys, "eval", "--model", damaged, "--lengths", 200)
    assert code == 1 and "could not be loaded" in err and len(err.strip().splitlines()) == 1


def test_traceback_on_request(capsys, folder):
    code, _, err = seal(capsys, "eval", "--model", folder, "--lengths", "50", "--traceback")
    assert code == 1 and "Traceback" in err


def test_interrupt(capsys, monkeypatch):
    def run(args):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "env", Command("x", "seal env", lambda parser: None, run))
    code, _, err = seal(capsys, "env")
    assert code == 130 and "interrupted" in err


def test_module_runs_and_pipe_may_close():
    run = subprocess.run(
        f"{sys.executable} -m seal_ops env | head -n 1", shell=True, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0 and "seal_ops" in run.stdout and "Traceback" not in run.stderr


def test_scales_plot_takes_both_granularities(tmp_path):
    from seal_ops.report import plots

    scales = {"SEAL-H": {0: torch.rand(4), 1: torch.rand(4)}, "SEAL-C": {0: torch.rand(4, 8), 3: torch.rand(4, 8)}}
    plots.scales_by_layer(scales, tmp_path / "scales.svg")
    assert "<svg" in (tmp_path / "scales.svg").read_text()
    with pytest.raises(ValueError, match=r"path must end with one of \.png, \.svg, \.pdf, got .*scales\.bmp"):
        plots.scales_by_layer(scales, tmp_path / "scales.bmp")
    assert sorted(os.listdir(tmp_path)) == ["scales.svg"]


EXAMPLES = os.path.join(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))), "examples")


@pytest.mark.parametrize("script", ["train_scales.py", "trainer.py", "several_gpus.py", "preferences.py"])
def test_examples_run(script, folder, tmp_path, monkeypatch, capsys):
    if script == "preferences.py":
        pytest.importorskip("trl", reason="examples/preferences.py runs where the package trl is installed")
    arguments = ["--model", folder, "--length", 380, "--samples", 3, "--output", tmp_path / "scales"]
    arguments += ["--cases", 2] if script == "train_scales.py" else []
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    runpy.run_path(os.path.join(EXAMPLES, script), run_name="__main__")
    assert (tmp_path / "scales" / "adapter_model.safetensors").exists()
    if script == "train_scales.py":
        lines = {
            line.split()[0]: line.split(None, 1)[1] for line in capsys.readouterr().out.splitlines() if "{" in line
        }
        assert list(lines) == ["base", "trained", "disabled", "merged"]
        assert lines["base"] == lines["disabled"] and lines["trained"] == lines["merged"]


def test_a_task_of_ones_own_from_the_working_directory(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(EXAMPLES)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    shipped = os.path.join(os.path.dirname(EXAMPLES), "models", "seal-tiny")
    code, out, err = seal(
        capsys, "data", "--tokenizer", shipped, "--task", "own_task:Boxes", "--length", 256, "--samples", 2,
        "--output", tmp_path / "boxes.jsonl",
    )  # fmt: skip
    assert code == 0, err
    samples = tasks.read(tmp_path / "boxes.jsonl")
    task = tasks.get("own_task:Boxes")
    assert all(task.score(s, s.answer) == 1 and s.answer.split()[-1].strip(".") in s.prompt for s in samples)
    assert all(task.score(a, b.answer) == 0 for a, b in (samples, samples[::-1]))


def test_env_says_what_runs_fused_in_a_model(capsys, folder):
    code, out, err = seal(capsys, "env", "--model", folder, *TINY)
    assert code == 0, err
    assert "rotation fused in 2 of 2 layers" in out and "torch" in out
