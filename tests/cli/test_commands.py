"""The deciding subcommands of `seal`, configuration files, and the study as a whole, on a tiny model."""

import json
import os
import re

import pytest
from command_line import TINY, folder, seal  # noqa: F401
from retrieval_fixtures import model, one_thread, tokenizer  # noqa: F401

from seal_ops.cli.main import _parser
from seal_ops.cli.options import checkpointing
from seal_ops.evaluation import lm_eval as harness
from seal_ops.evaluation.results import Evaluation
from seal_ops.experiments.head_importance import HeadImportance


def test_heads(capsys, folder, tmp_path):  # noqa: F811
    output = tmp_path / "heads"
    arguments = ["heads", "--model", folder, *TINY, "--lengths", 190, 210, "--cases", 2, "--output", output]
    code, out, err = seal(capsys, *arguments, "--quadrants", "--quadrant-cases", 1)
    assert code == 0, err
    assert "8 heads" in out and "Spearman" in out and "harmful x0.9" in out
    names = {
        "heads.json",
        "heads.csv",
        "heads.png",
        "heads.svg",
        "heads-agreement.png",
        "quadrants.json",
        "quadrants.png",
    }
    assert names <= set(os.listdir(output))
    assert HeadImportance.load(output / "heads.json").lengths == [190, 210]
    code, _, err = seal(capsys, *arguments, "--methods", "gradient", "--quadrants")
    assert code == 1 and err == "seal heads: --quadrant-measure accuracy needs --methods ablation, got ['gradient']\n"
    code, _, err = seal(capsys, *arguments, "--seed", 1)
    assert code == 1 and "must come from the same model and settings" in err and err.count("\n") == 1


def test_channels_by_gradient_alone(capsys, folder, tmp_path):  # noqa: F811
    code, out, err = seal(
        capsys, "heads", "--model", folder, *TINY, "--lengths", 190, "--cases", 1, "--granularity", "channel",
        "--methods", "gradient", "--output", tmp_path,
    )  # fmt: skip
    assert code == 0, err
    assert "64 channels" in out and not (tmp_path / "heads-agreement.png").exists()


def test_transfer_and_report(capsys, folder, tmp_path):  # noqa: F811
    code, out, err = seal(
        capsys, "transfer", "--model", folder, *TINY, "--train-tasks", "lines", "--eval-tasks", "lines", "own_tasks:Colours",  # noqa: E501
        "--length", 190, "--cases", 1, "--samples", 1, "--method", "SEAL-H", "--output", tmp_path,
    )  # fmt: skip
    assert code == 0, err
    assert "untrained: lines" in out and "trained on lines" in out
    assert (tmp_path / "transfer.csv").read_text().startswith("trained,lines,colours\n")
    code, out, err = seal(capsys, "report", tmp_path, "--title", "Transfer <1>")
    assert code == 0 and out.strip() == str(tmp_path / "report.html")
    assert "<h1>Transfer &lt;1&gt;</h1>" in (tmp_path / "report.html").read_text()
    code, _, err = seal(capsys, "report", tmp_path / "nowhere")
    assert code == 1 and "folder must exist" in err


def test_study(capsys, folder, tmp_path):  # noqa: F811
    config, output = tmp_path / "study.yaml", tmp_path / "out"
    config.write_text(
        f"model: {folder}\ndevice: cpu\ntask: own_tasks:Colours\nlengths: [60, 80]\ncases: 2\nsamples: 2\n"
        "methods: [SEAL-H, LoRA]\nrates: {LoRA: [1e-3, 2e-2], SEAL-H: 0.02}\ntransfer-tasks: [own_tasks:Colours]\n"
        "transfer-method: SEAL-H\ntransfer-length: 60\nheads-lengths: [60, 80]\nheads-cases: 2\n"
    )
    code, out, err = seal(capsys, "study", "--config", config, "--output", output)
    assert code == 0, err
    content = json.loads((output / "study.json").read_text())
    assert content["settings"]["rates"] == {"LoRA": [1e-3, 2e-2], "SEAL-H": 0.02}
    assert set(content["seconds"]) == {"comparison", "transfer", "heads"}
    assert content["agreement"]["step"]["gradient_ablation"]["80"] > 0.7, "a small step follows the gradient"
    comparison = json.loads((output / "comparison.json").read_text())
    assert set(comparison["training"]["LoRA"]["tried"]) == {"0.001", "0.02"}
    report = (output / "report.html").read_text()
    for word in ("Comparison of methods", "Transfer", "Head importance", "Quadrant experiment", "model and versions"):
        assert word in report
    before = (output / "comparison.json").read_text()
    code, _, err = seal(capsys, "study", "--config", config, "--output", output)
    assert code == 0 and (output / "comparison.json").read_text() == before
    assert json.loads((output / "study.json").read_text())["seconds"] == content["seconds"]
    code, _, err = seal(capsys, "study", "--config", config, "--output", output, "--cases", 3)
    assert code == 1 and "got one with another cases" in err


def test_config_files(capsys, folder, tmp_path):  # noqa: F811
    config, result = tmp_path / "eval.yaml", tmp_path / "result.json"
    config.write_text(
        f"model: {folder}\ndevice: cpu\nlengths: 190\ncases: 3\ntask: passkey\ntask_option: {{depths: 2, filler: noise}}\n"  # noqa: E501
        f"chat-format: off\noutput: {result}\n"
    )
    code, _, err = seal(capsys, "eval", "--config", config, "--cases", 2, "--task", "lines", "--task-option", "a=1")
    assert code == 1 and "options of lines must be among none, got 'a'" in err
    config.write_text(
        f"model: {folder}\ndevice: cpu\nlengths: 190\ncases: 3\ntask: lines\nchat-format: off\noutput: {result}\n"
    )
    code, out, err = seal(capsys, "eval", "--config", config, "--cases", 2)
    assert code == 0, err
    found = Evaluation.load(result)
    assert len(found.records) == 2, "the command line wins over the file"
    assert found.settings["chat_template"] is False, "YAML's off"


@pytest.mark.parametrize(
    "text, expected", [("off", False), ("on", True), ("auto", None), ("'a {prompt} b'", "a {prompt} b")]
)
def test_yaml_chat_formats(tmp_path, text, expected):
    path = tmp_path / "c.yaml"
    path.write_text(f"chat-format: {text}\n")
    args = _parser(["eval", "--config", str(path)]).parse_args(
        ["eval", "--config", str(path), "--model", "m", "--lengths", "9"]
    )
    assert args.chat_format is expected or args.chat_format == expected


@pytest.mark.parametrize(
    "text, expected",
    [("off", False), ("false", False), ("true", True), ("on", True), ("selective", "selective"), ("auto", "auto")],
)
def test_yaml_switches_that_name_a_kind(tmp_path, text, expected):
    path = tmp_path / "c.yaml"
    path.write_text(f"gradient-checkpointing: {text}\n", encoding="utf-8-sig")  # as editors on Windows write it
    words = ["train", "--config", str(path), "--model", "m", "--granularity", "head", "--output", "o"]
    assert checkpointing(_parser(words).parse_args(words)) == expected


def test_plan_prints_what_layers_keep(capsys, folder):  # noqa: F811
    line = ["plan", "--model", folder, *TINY, "--length", 190, "--labels", 8]
    code, out, err = seal(capsys, *line)
    assert code == 0 and "layers     0-1  keep everything" in out, err
    code, out, err = seal(capsys, *line, "--memory", 1e-6)
    assert code == 0 and "expected to run out of memory" in out, err
    code, _, err = seal(capsys, *line, "--memory", -1)
    assert code == 2 and "must be a number above 0, got -1" in err


def test_frozen_linears_in_fp8(capsys, folder, tmp_path):  # noqa: F811
    line = ["--model", folder, *TINY, "--granularity", "head", "--length", 190, "--frozen-linears", "fp8", "--dtype"]
    train = ["train", *line, "bfloat16", "--samples", 2, "--output", tmp_path]
    code, out, err = seal(capsys, *train)
    assert code == 0 and re.search(
        r"; 14 linear layers in fp8, first gradients [\d.]+ % from those in 16 bits;", out
    ), err
    code, out, err = seal(capsys, "plan", *line, "bfloat16")
    assert code == 0 and "none was measured of products in fp8" in out, err
    code, _, err = seal(capsys, "plan", *line, "float32")
    assert code == 1 and err.startswith(
        "seal plan: seal_ops.plan: frozen_linears='fp8' needs a model in torch.bfloat16"
    )
    assert err.count("\n") == 1


@pytest.mark.parametrize("words", [["300", "600"], ["300,600"], ["300", "600,"], ["300,", "600"]])
def test_lengths_in_either_spelling(capsys, words):
    line = ["eval", "--model", "m", "--lengths", *words]
    if any(word.endswith(",") for word in words):
        with pytest.raises(SystemExit):
            _parser(line).parse_args(line)
        assert "must be integers like 300,600" in capsys.readouterr().err
    else:
        assert _parser(line).parse_args(line).lengths == [300, 600]


@pytest.mark.parametrize("line", [["eval", "--conf", "x.yaml"], ["eval", "--len", "3"], ["--vers"]])
def test_abbreviations_are_refused(capsys, line):
    code, out, err = seal(capsys, *line)
    assert code == 2 and out == ""


@pytest.mark.parametrize(
    "text, message",
    [
        ("lenghts: [190]", "key must be one of .*lengths.*, got 'lenghts'"),
        ("lengths: [190, none]", "value of lengths must be integers like 300,600, got"),
        ("lengths: [0]", "value of lengths must be at least 1, got 0"),
        ("dtype: float8", "value of dtype must be one of default, auto, float32.*, got 'float8'"),
        ("restart: yes please", "value of restart must be true or false, got 'yes please'"),
        ("seed: [1, 2]", r"value of seed must be a single value, got \[1, 2\]"),
        ("- a\n- b", "must map options to values, got list"),
        ("a: [", "must be YAML, got"),
    ],
)
def test_config_errors_name_the_key(capsys, tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    code, out, err = seal(capsys, "eval", "--config", path, "--model", "m")
    assert code == 2 and out == ""
    assert re.search(f"config .*bad.yaml:? .*{message}|config .*bad.yaml {message}", " ".join(err.split()))


def test_config_file_that_is_not_there(capsys):
    code, _, err = seal(capsys, "eval", "--config", "/no/such.yaml")
    assert code == 2 and "No such file" in err and "Traceback" not in err


def test_harness_is_optional(monkeypatch, capsys, folder):  # noqa: F811
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"needs the package lm_eval \(pip install 'seal_ops\[harness\]'\)"):
        harness.require()
    code, _, err = seal(capsys, "harness", "--model", folder, "--tasks", "longeval_lines")
    assert code == 1 and err.startswith("seal harness: ") and err.count("\n") == 1
