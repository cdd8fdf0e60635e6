"""`seal extend`, and `--extend` of the commands that load a model."""

import json

import pytest
from command_line import TINY, folder, seal  # noqa: F401
from retrieval_fixtures import model, one_thread, tokenizer  # noqa: F401

from seal_ops.cli.main import _parser
from seal_ops.evaluation.results import Evaluation

TEXT = "Tell me the number in line 1 2 3. I need the number.\n" * 200


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(TEXT)
    return path


def test_methods_side_by_side(capsys, folder, book, tmp_path):  # noqa: F811
    output = tmp_path / "extension.json"
    code, out, err = seal(
        capsys, "extend", "--model", folder, *TINY, "--methods", "ntk:factor=2", "self_extend:group=4,window=256", "ntk:group=2",  # noqa: E501
        "--text", book, "--lengths", "64,1100", "--windows", 1, "--output", output,
    )  # fmt: skip
    assert code == 0, err
    assert "ntk, 64 tokens: perplexity" in out and "factor=2" in out and "group=4, window=256" in out
    plain, ntk, grouped, refused = json.loads(output.read_text())["rows"]
    assert [plain["method"], plain["positions"], plain["layers"]] == ["none", 1024, 0]
    assert [ntk["positions"], ntk["layers"], grouped["positions"]] == [2048, 0, 256 + 4 * 768] and grouped["layers"] > 0
    assert refused["refused"] == "ntk takes the options factor, got group" and "perplexity" not in refused
    assert grouped["perplexity"]["64"] == pytest.approx(plain["perplexity"]["64"], rel=1e-4)  # inside the window
    assert grouped["perplexity"]["1100"] != plain["perplexity"]["1100"] != ntk["perplexity"]["1100"]


def test_methods_are_suggested_for_a_length(capsys, folder):  # noqa: F811
    code, out, err = seal(capsys, "extend", "--model", folder, *TINY, "--lengths", 4096)
    assert code == 0, err
    for word in (
        "linear",
        "ntk",
        "yarn",
        "self_extend",
        "dual_chunk",
        "lm_infinite",
        "streaming",
        "group=5, window=256",
        "4096",
    ):  # noqa: E501
        assert word in out, word
    assert "giraffe" not in out


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ([], "--methods or --lengths must say how far the model is to read, got neither"),
        (["--methods", "ntk:factor=2", "--text", "x"], "--lengths must be given with --text, got none"),
        (["--lengths", "100"], "lengths must go beyond the trained length 1024, got 100"),
        (["--lengths", "2000", "--text", "nowhere.txt"], "No such file"),
    ],
)
def test_bad_arguments(capsys, folder, arguments, sentence):  # noqa: F811
    code, _, err = seal(capsys, "extend", "--model", folder, *TINY, *arguments)
    assert code == 1 and sentence in err and err.count("\n") == 1


@pytest.mark.parametrize("command", ["train", "eval", "demo", "compare", "heads", "transfer", "harness"])
def test_every_command_that_reads_long_texts_takes_it(command):
    argv = [command, "--extend", "yarn:factor=4,beta_fast=16", "--model", "m", "--output", "o"]
    argv += {"train": ["--granularity", "head"], "compare": ["--lengths", "9"], "eval": ["--lengths", "9"],
             "heads": ["--lengths", "9"], "transfer": ["--train-tasks", "lines", "--length", "9"],
             "harness": ["--tasks", "x"]}.get(command, [])  # fmt: skip
    assert _parser(argv).parse_args(argv).extend == ("yarn", {"factor": 4, "beta_fast": 16})


def test_a_model_is_extended_where_it_is_loaded(capsys, folder, tmp_path):  # noqa: F811
    """Results are those of another model; the config file may say it too; a bad option is one sentence."""
    found = {}
    for name, more in [("plain", []), ("self_extend", ["--extend", "self_extend:group=2,window=16"])]:
        path = tmp_path / f"{name}.json"
        code, _, err = seal(
            capsys, "eval", "--model", folder, *TINY, "--lengths", 190, "--cases", 2, "--output", path, *more
        )
        assert code == 0, err
        found[name] = Evaluation.load(path)
    assert found["plain"].provenance["model"]["fingerprint"] != found["self_extend"].provenance["model"]["fingerprint"]
    config = tmp_path / "train.yaml"
    config.write_text("extend: streaming:sinks=2,window=32\ngranularity: head\nlength: 190\nsamples: 2\n")
    code, out, err = seal(
        capsys, "train", "--config", config, "--model", folder, *TINY, "--output", tmp_path / "scales"
    )
    assert code == 0 and "scales trained in 2 steps" in out, err
    code, _, err = seal(capsys, "eval", "--model", folder, *TINY, "--lengths", 190, "--extend", "ntk")
    assert code == 1 and err == "seal eval: seal_ops.extend: ntk takes the options factor, got none\n"
    code, _, err = seal(capsys, "eval", "--model", folder, *TINY, "--lengths", 190, "--extend", "nkt:factor=2")
    assert code == 2 and "must begin with one of linear, ntk" in err


def test_recipes(capsys, folder, book, tmp_path):  # noqa: F811
    pytest.importorskip("peft")
    longer = tmp_path / "longer"
    arguments = ["train", "--model", folder, *TINY, "--recipe", "longlora", "--length", 500]
    code, out, err = seal(
        capsys, *arguments, "--text", book, "--recipe-option", "group=100", "rank=2", "--output", longer, "--lr", 1e-3
    )
    assert code == 0 and "weights trained in" in out, err
    said = json.loads((longer / "training.json").read_text())["settings"]["recipe"]
    assert said["group"] == 100 and said["rank"] == 2 and (longer / "adapter_model.safetensors").exists()
    for more, sentence in [
        ([], "--text and --length must be given with --recipe, got one of them or neither"),
        (["--granularity", "head"], "--granularity (or --weak-columns) or --recipe must say what is trained, got both"),
    ]:
        code, _, err = seal(capsys, *arguments, *more, "--output", tmp_path / "other")
        assert code == 1 and err == f"seal train: {sentence}\n"
    code, _, err = seal(capsys, "train", "--model", folder, "--length", 500, "--output", tmp_path / "other")
    assert code == 1 and "must say what is trained, got neither" in err
    code, _, err = seal(
        capsys, "train", "--model", folder, "--granularity", "head", "--text", book, "--output", tmp_path / "other"
    )
    assert code == 1 and "length must be given for texts" in err
