"""The model card of an adapter: what it says, that the hub reads it, that it is not lost, that it is uploaded."""

import json
import re
import types
from unittest import mock

import huggingface_hub
import pytest
from command_line import TINY, folder, seal  # noqa: F401
from families import FAMILIES, randomise
from huggingface_hub import HfApi, ModelCard

import seal_ops
from seal_ops.adapters.files import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE
from seal_ops.evaluation.results import Evaluation

LLAMA = FAMILIES["llama"]


def evaluation(model, scores, **settings):
    """Cases of 200 and 400 tokens; ``scores``: how many of ten are right, by length."""
    records = [
        {"length": length, "index": index, "score": float(index < right), "output": ""}
        for length, right in zip((200, 400), scores)
        for index in range(10)
    ]
    settings = {"task": "lines", "lengths": [200, 400], "cases": 10, "seed": 0, "model": model, **settings}
    return Evaluation("lines", model, settings, records)


RESULTS = seal_ops.card_results(evaluation("base", (4, 1)), evaluation("head", (10, 7)))


def adapter(path, name=None):
    model = LLAMA.build()
    model.config._name_or_path = name
    scales = seal_ops.attach(model, "head")
    randomise(scales)
    scales.card.command = "seal train --task lines"
    scales.card.trained({"lr": 0.01, "tasks": ["lines"], "tokens": 400})
    scales.save_pretrained(path)
    return scales


def test_results_are_those_of_both_evaluations():
    assert [r["length"] for r in RESULTS] == [200, 400] and {r["task"] for r in RESULTS} == {"lines"}
    assert [(r["before"]["accuracy"], r["after"]["accuracy"]) for r in RESULTS] == [(0.4, 1.0), (0.1, 0.7)]
    cell = evaluation("head", (10, 7)).accuracy[400]
    assert RESULTS[1]["after"] == {"accuracy": 0.7, "low": cell.low, "high": cell.high, "cases": 10}


@pytest.mark.parametrize(
    "after, message",
    [
        (evaluation("head", (1, 1), seed=1), "of the same cases, got another seed"),
        (evaluation("base", (1, 1)), "after must be of the model with the scales, got the same model as before"),
        (
            Evaluation("lines", "head", evaluation("head", (1, 1)).settings, []),
            "finished evaluation of 20 cases, got 0",
        ),
    ],
)
def test_results_that_cannot_be_compared(after, message):
    with pytest.raises(ValueError, match="seal_ops.card_results: .*" + message):
        seal_ops.card_results(evaluation("base", (1, 1)), after)


def test_the_card_says_all_and_the_hub_reads_it(tmp_path):
    adapter(tmp_path, "org/model-7b")
    assert seal_ops.update_card(tmp_path, RESULTS) == str(tmp_path / CARD_FILE)
    card = ModelCard.load(tmp_path / CARD_FILE)
    data = card.data
    assert (data.base_model, data.base_model_relation, data.library_name) == ("org/model-7b", "adapter", "seal_ops")
    assert data.pipeline_tag == "text-generation" and "seal" in data.tags
    assert [(r.dataset_type, r.dataset_config, r.metric_type, r.metric_value) for r in data.eval_results] == [
        ("lines", "200 tokens", "accuracy", 1.0),
        ("lines", "400 tokens", "accuracy", 0.7),
    ]
    for text in (
        "| lines | 400 | 10 | 0.100 (0.018 to 0.404) | 0.700 (0.397 to 0.892) |",
        "| lr | 0.01 |",
        "seal train --task lines",
        f"seal_ops {seal_ops.__version__}, torch ",
        "SEAL-H scales for org/model-7b",
    ):
        assert text in card.content, text


def test_what_a_card_says_survives_loading_and_saving(tmp_path):
    adapter(tmp_path / "one")
    seal_ops.update_card(tmp_path / "one", RESULTS)
    model = LLAMA.build()
    scales = seal_ops.load(model, tmp_path / "one")
    scales.save_pretrained(tmp_path / "two")
    assert (tmp_path / "two" / CARD_FILE).read_text() == (tmp_path / "one" / CARD_FILE).read_text()
    scales.add_adapter("fresh")
    scales.save_pretrained(tmp_path / "three")
    assert "Accuracy" not in (tmp_path / "three" / "fresh" / CARD_FILE).read_text()
    model.save_pretrained(tmp_path / "whole")
    scales.card.trained({"lr": 0.02})  # what was found of the old values counts no longer
    scales.save_pretrained(tmp_path / "two")
    card = (tmp_path / "two" / CARD_FILE).read_text()
    assert "Accuracy" not in card and "seal train" not in card and "| lr | 0.02 |" in card
    assert seal_ops.update_card(tmp_path / "whole", []).endswith(f"default/{CARD_FILE}")


def test_a_card_of_ones_own_or_a_damaged_one(tmp_path):
    adapter(tmp_path)
    path = tmp_path / CARD_FILE
    text = path.read_text()
    for damaged in ("", text.replace('"results": []', '"results": [{"task": 3}]'), text.replace('{"training"', "{")):
        path.write_text(damaged)
        assert seal_ops.load(LLAMA.build(), tmp_path).card.training is None
    path.write_text("mine")
    with pytest.raises(ValueError, match="must be a card of seal_ops, got one that somebody has written"):
        seal_ops.update_card(tmp_path, RESULTS)
    assert path.read_text() == "mine"


def test_text_in_a_fact_cannot_end_the_comment(tmp_path):
    scales = adapter(tmp_path)
    scales.card.command = "seal train --text '--> <b>x</b>.txt'"
    scales.save_pretrained(tmp_path)
    comment = re.search("<!-- seal_ops: (.*?)-->", (tmp_path / CARD_FILE).read_text(), re.S)[1]  # as HTML ends it
    assert json.loads(comment)["command"] == scales.card.command
    assert seal_ops.load(LLAMA.build(), tmp_path).card.command == scales.card.command


def test_training_and_evaluating_write_the_card(capsys, folder, tmp_path):  # noqa: F811
    scales = tmp_path / "scales"
    train = ["train", "--model", folder, "--granularity", "head", "--length", 190, "--samples", 2, "--output", scales]
    code, _, err = seal(capsys, *train, "--lr", "0.5", *TINY)
    assert code == 0, err
    evaluated = ["eval", "--model", folder, "--lengths", 190, "--cases", 2, *TINY, "--output"]
    assert seal(capsys, *evaluated, tmp_path / "base.json")[0] == 0
    assert seal(capsys, *evaluated, tmp_path / "head.json", "--scales", scales)[0] == 0
    card = ["card", "--scales", scales, "--before", tmp_path / "base.json", "--after"]
    code, out, err = seal(capsys, *card, tmp_path / "head.json")
    assert code == 0 and out.strip() == str(scales / CARD_FILE), err
    text = (scales / CARD_FILE).read_text()
    assert "seal train --model" in text and "| lines | 190 | 2 |" in text and "Trained with seal_ops" in text
    assert len(ModelCard(text).data.eval_results) == 1
    code, _, err = seal(capsys, *card, tmp_path / "base.json")
    assert code == 1 and "after must be of the model with the scales" in err
    code, _, err = seal(capsys, *card, tmp_path / "base.json", tmp_path / "head.json")
    assert code == 1 and "must name as many files, got 1 and 2" in err


@pytest.fixture
def api(monkeypatch):
    """The hub's client, whose methods take what the real ones take, and keep what they got."""
    made = mock.create_autospec(HfApi, instance=True)
    made.create_repo.side_effect = lambda repo_id, **_: types.SimpleNamespace(repo_id=f"me/{repo_id}")
    made.files = {}

    def upload(*, folder_path, **_):
        import pathlib

        made.files = {p.name: p.read_text() if p.suffix == ".md" else "" for p in pathlib.Path(folder_path).iterdir()}
        return "done"

    made.upload_folder.side_effect = upload
    made.kind = mock.create_autospec(HfApi, return_value=made)
    monkeypatch.setattr(huggingface_hub, "HfApi", made.kind)
    return made


def test_pushing(api, tmp_path):
    scales = adapter(tmp_path)
    scales.card.results = RESULTS
    options = dict(private=True, token="secret", revision="trial", commit_message="Second try")
    assert scales.push_to_hub("it", **options) == "done"
    api.kind.assert_called_once_with(token="secret")
    api.create_repo.assert_called_once_with("it", private=True, exist_ok=True)
    api.create_branch.assert_called_once_with("me/it", branch="trial", exist_ok=True)
    sent = api.upload_folder.call_args.kwargs
    assert (sent["repo_id"], sent["revision"], sent["commit_message"]) == ("me/it", "trial", "Second try")
    assert set(api.files) == {CARD_FILE, CONFIG_FILE, WEIGHTS_FILE}
    assert len(ModelCard(api.files[CARD_FILE]).data.eval_results) == 2
    assert json.dumps("secret") not in api.files[CARD_FILE]
    scales.push_to_hub("it", create_pr=True, revision="main")
    assert api.create_branch.call_count == 1 and api.upload_folder.call_args.kwargs["create_pr"]
    assert api.upload_folder.call_args.kwargs["commit_message"] == "Upload SEAL scales"


def test_a_hub_that_refuses(api, tmp_path):
    api.create_repo.side_effect = huggingface_hub.errors.OfflineModeIsEnabled("offline")
    with pytest.raises(OSError, match="^seal_ops.Scales.push_to_hub: repo_id must be a .* could not be reached$"):
        adapter(tmp_path).push_to_hub("not/mine")
    assert not api.upload_folder.called
