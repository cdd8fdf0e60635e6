"""Option types of the command `seal` on the command line and in YAML, and that they reach what they are for."""

import json
import re

import pytest
from chat_templates import chat_tokenizer
from command_line import TINY, folder, seal  # noqa: F401

from seal_ops.cli.main import COMMANDS, _parser
from seal_ops.experiments import demo, study

EVAL = ["eval", "--model", "m", "--lengths", "9"]


def parsed(words):
    words = [str(word) for word in words]
    return _parser(words).parse_args(words)


def test_a_chat_format_comes_with_its_variables():
    with_format = {name for name in COMMANDS if "--chat-format" in help_of(name)}
    assert with_format - {"harness"} == {name for name in COMMANDS if "--chat-template-kwargs" in help_of(name)}
    assert {"data", "train", "eval", "heads", "compare", "transfer", "demo", "study"} <= with_format


def help_of(name):
    parser = _parser([name])._subparsers._group_actions[0].choices[name]
    return parser.format_help()


@pytest.mark.parametrize(
    "text", ["{enable_thinking: true}", "'{\"enable_thinking\": true}'"], ids=["a mapping", "JSON"]
)
def test_variables_of_the_chat_template(text, tmp_path):
    asked = {"enable_thinking": True}
    assert parsed([*EVAL, "--chat-template-kwargs", json.dumps(asked)]).chat_template_kwargs == asked
    path = tmp_path / "c.yaml"
    path.write_text(f"chat-template-kwargs: {text}\n")
    assert parsed([*EVAL, "--config", path]).chat_template_kwargs == asked
    assert parsed(EVAL).chat_template_kwargs is None


@pytest.mark.parametrize(
    "words, message",
    [
        (["eval", "--lengths", "9", "--backend", "cuda"], "--backend must be given with --scales, .*, got cuda alone"),
        (
            ["train", "--weak-columns", "4", "--length", "9", "--backend", "cpu"],
            "--granularity, .*, got cpu alone",
        ),
        (["train", "--recipe", "longlora", "--text", "t", "--length", "9", "--backend", "cpu"], "with --granularity"),
        (["train", "--recipe", "longlora", "--text", "t", "--length", "9", "--data", "d"], "on what, got --data too"),
        (["train", "--recipe", "longlora", "--text", "t", "--length", "9", "--column-lr", "1"], "got --column-lr too"),
    ],
)
def test_options_that_would_do_nothing_are_refused(capsys, tmp_path, words, message):
    code, out, err = seal(capsys, *words, "--model", tmp_path / "none", "--output", tmp_path / "o")
    assert code == 1 and re.search(message, err) and err.count("\n") == 1


@pytest.mark.parametrize(
    "option, text, message",
    [
        (
            "chat-template-kwargs",
            "{enable_thinking: no",
            r'must be a JSON object like \{"enable_thinking": false\}, got \{en',
        ),
        ("chat-template-kwargs", "[1]", r'must be a JSON object like \{"enable_thinking": false\}, got \[1\]'),
        ("chat-template-kwargs", "7", "must be a JSON object like .*, got 7"),
        ("quadrant-noise", "-1", "must be a number of at least 0, got -1"),
        ("quadrant-noise", "nan", "must be a number of at least 0, got nan"),
    ],
)
def test_bad_values_are_one_sentence(capsys, tmp_path, option, text, message):
    line = ["heads", "--model", "m", "--lengths", 9, "--output", tmp_path / "o"]
    code, out, err = seal(capsys, *line, f"--{option}={text}")
    last = err.splitlines()[-1]
    assert code == 2 and not out and re.search(f"error: argument --{option}: {message}", last), err
    path = tmp_path / "c.yaml"
    path.write_text(f"{option}: '{text}'\n")
    code, out, err = seal(capsys, *line, "--config", path)
    assert code == 2 and not out and re.search(f"value of {option} {message}", " ".join(err.split())), err


def test_variables_reach_the_samples(capsys, tmp_path):
    chat_tokenizer("switched reasoning").save_pretrained(tmp_path / "chat")
    line = ["data", "--tokenizer", tmp_path / "chat", "--length", 300, "--samples", 1, "--output", tmp_path / "out"]
    prompts = []
    for variables in ({}, {"enable_thinking": False}, {"enable_thinking": True}):
        code, _, err = seal(capsys, *line, "--chat-template-kwargs", json.dumps(variables))
        assert code == 0, err
        prompts.append(json.loads((tmp_path / "out").read_text())["prompt_ids"])
    assert prompts[0] == prompts[1] != prompts[2]
    for variables, message in (
        (
            {"enable_thinkin": True},
            "chat_template_kwargs must name variables of the chat template, got 'enable_thinkin'",
        ),
        ({"add_generation_prompt": False}, "chat_template_kwargs must leave add_generation_prompt alone"),
    ):
        code, _, err = seal(capsys, *line, "--chat-template-kwargs", json.dumps(variables))
        assert code == 1 and message in err and err.count("\n") == 1, err
    code, _, err = seal(capsys, *line, "--chat-format", "off", "--chat-template-kwargs", '{"custom": 1}')
    assert code == 1 and "got 'custom' for no template" in err


def test_variables_and_ready_samples_exclude_each_other(capsys, folder, tmp_path):  # noqa: F811
    code, _, err = seal(
        capsys, "train", "--model", folder, *TINY, "--granularity", "head", "--output", tmp_path, "--data", "x.jsonl",
        "--chat-template-kwargs", '{"enable_thinking": true}',
    )  # fmt: skip
    assert code == 1 and "must be given to `seal data`, got them with --data" in err and err.count("\n") == 1


@pytest.mark.parametrize("module, name", [(demo, "demo"), (study, "study")])
def test_variables_reach_demo_and_study(module, name, monkeypatch, capsys, tmp_path):
    seen = []

    def run(settings, output, **options):
        seen.append(settings)
        raise ValueError("enough")

    monkeypatch.setattr(module, "run", run)
    options = [
        "--chat-format",
        "off",
        "--chat-template-kwargs",
        '{"enable_thinking": true}',
        "--output",
        tmp_path / "o",
    ]
    assert seal(capsys, name, *options, *(["--quadrant-noise", 0.5] if name == "study" else []))[0] == 1
    assert seen[0].chat_template is False and seen[0].chat_template_kwargs == {"enable_thinking": True}
    assert getattr(seen[0], "quadrant_noise", 0.5) == 0.5


def test_noise_decides_the_quadrants(capsys, folder, tmp_path):  # noqa: F811
    groups = {}
    for noise in (0, 1e9):
        code, _, err = seal(
            capsys, "heads", "--model", folder, *TINY, "--lengths", 190, "--cases", 2, "--quadrants",
            "--quadrant-cases", 1, "--quadrant-measure", "logprob", "--quadrant-noise", noise,
            "--output", tmp_path / str(noise),
        )  # fmt: skip
        assert code == 0, err
        groups[noise] = json.loads((tmp_path / str(noise) / "quadrants.json").read_text())
    assert not groups[0]["units"]["mixed"] and len(groups[1e9]["units"]["mixed"]) == 8
    assert groups[0]["noise"] == 0 and groups[1e9]["noise"] == 1e9
