"""A result belongs to one run: whatever decides it has to be the same to continue, in every experiment alike."""

import json

import pytest
from chat_templates import chat_tokenizer
from own_tasks import Colours
from retrieval_fixtures import model, one_thread, tokenizer  # noqa: F401

import seal_ops
from seal_ops import tasks
from seal_ops.experiments import demo, study
from seal_ops.experiments.comparison import compare
from seal_ops.experiments.head_importance import measure_head_importance
from seal_ops.experiments.transfer_matrix import transfer
from seal_ops.tasks.description import describe
from seal_ops.tasks.wordings import Reworded
from seal_ops.utils.runs import differing

LENGTH = 60


class Reds(Colours):
    """Its options decide the prompts."""

    def __init__(self, tone="red"):
        self.tone = tone


def evaluated(lm, tok, task, path, **options):
    return seal_ops.evaluate(lm, tok, task, LENGTH, 1, output=path / "e.json", resume=True, max_new_tokens=2, **options)


def importance(lm, tok, task, path, **options):
    return measure_head_importance(
        lm, tok, task, LENGTH, 1, methods=["gradient"], output=path / "h.json", resume=True, **options
    )


def compared(lm, tok, task, path, **options):
    return compare(lambda: (lm, tok), task, [LENGTH], 1, output=path, methods=[], **options)


def transferred(lm, tok, task, path, **options):
    return transfer(lambda: (lm, tok), [], [task], LENGTH, 1, output=path, **options)


def phrase(run):
    """A folder is claimed before anything in it is looked at."""
    return "one with " if run in (compared, transferred) else ""


RUNS = [evaluated, importance, compared, transferred]


@pytest.mark.parametrize("run", RUNS)
def test_another_model_task_or_tokenizer_is_refused(run, tmp_path):
    lm, tok = model().eval(), tokenizer()
    found = run(lm, tok, Reds(), tmp_path)
    assert found.provenance["model"]["dtype"] == "float32" and found.provenance["versions"]["torch"]
    run(model().eval(), tok, Reds(), tmp_path)
    with pytest.raises(ValueError, match=f"got {phrase(run)}another task_options"):
        run(lm, tok, Reds("dark"), tmp_path)
    longer = Reds()
    longer.max_new_tokens = 7
    with pytest.raises(ValueError, match=f"got {phrase(run)}another task_options"):
        run(lm, tok, longer, tmp_path)
    with pytest.raises(ValueError, match=f"got {phrase(run)}another tokenizer"):
        run(lm, tokenizer(chat=True), Reds(), tmp_path)
    with pytest.raises(ValueError, match=f"got {phrase(run)}another chat_template_kwargs"):
        run(lm, tok, Reds(), tmp_path, chat_template_kwargs={"enable_thinking": True})
    lm.model.layers[1].self_attn.o_proj.weight.data[:, -1] *= 2
    with pytest.raises(ValueError, match=f"got {phrase(run)}another model"):
        run(lm, tok, Reds(), tmp_path)


def test_a_seed_or_option_less_in_the_file_is_seen():
    assert differing({"a": 1, "b": 2}, {"a": 1}) == ["b"] == differing({"a": 1}, {"a": 1, "b": 2})
    assert differing({"a": [1, 2]}, {"a": (1, 2)}) == []


def test_description_is_the_same_in_every_process():
    class Odd(Colours):
        def __init__(self):
            self.kinds, self.pattern = {"b", "a"}, object()

    one, other = describe(Odd(), tokenizer()), describe(Odd(), tokenizer())
    assert one == other and json.loads(json.dumps(one)) == one


def test_a_task_made_from_another_counts_with_its_options():
    one, other = (Reworded(tasks.make("multikey", keys=n)) for n in (2, 4))
    assert describe(one, tokenizer()) != describe(other, tokenizer())


def test_a_task_of_ones_own_needs_no_new_arguments():
    class Own(Colours):
        def generate(self, tokenizer, length, samples=50, seed=0, *, split="train", chat_template=None, progress=False):
            return Colours().generate(tokenizer, length, samples, seed, split=split)

    assert len(seal_ops.evaluate(model().eval(), tokenizer(), Own(), LENGTH, 1, max_new_tokens=2).records) == 1


def test_tokenizers_are_told_apart_and_calls_do_not_count():
    tok = tokenizer.__wrapped__()
    before = describe(Colours(), tok)
    tok(["The", "The 5."], padding=False, truncation=True, max_length=1)
    assert describe(Colours(), tok) == before
    tok.add_tokens(["<more>"])
    assert describe(Colours(), tok) != before
    assert describe(Colours(), chat_tokenizer("turns")) != describe(Colours(), chat_tokenizer("instructions"))


@pytest.mark.parametrize("run, call", [(demo, "seal demo"), (study, "seal study")])
def test_the_shipped_model_is_missed_before_a_folder_is_claimed(run, call, tmp_path, monkeypatch):
    """As from an installed wheel, outside a checkout."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=f"{call}: model models/seal-tiny is part of the repository, .* run in a checkout"
    ):
        run.run(run.Settings(), str(tmp_path / "out"), log=lambda line: None)
    assert not (tmp_path / "out").exists()
    missing = run.Settings(model=str(tmp_path / "none"))
    with pytest.raises(OSError, match=call):
        run.run(missing, str(tmp_path / "out"), log=lambda line: None)
    assert not (tmp_path / "out").exists()


def test_demo_refuses_another_model_of_the_same_name_and_a_strange_merged_folder(tmp_path, monkeypatch):
    tok, lm, output = tokenizer(), model().eval(), tmp_path / "out"
    lm.save_pretrained(tmp_path / "model"), tok.save_pretrained(tmp_path / "model")
    settings = demo.Settings(model=str(tmp_path / "model"), lengths=(190,), cases=1, samples=1, device="cpu")

    def again():
        return demo.run(settings, str(output), progress=False, log=lambda line: None)

    results = again()["lines"]
    assert results["provenance"]["model"]["name"] == "model", "the last part of the folder's name"
    training = json.loads((output / "head" / "training.json").read_text())
    assert training["settings"]["tasks"] == ["lines"] and training["settings"]["tokens"] <= 190
    assert training["provenance"]["model"]["class"] == "LlamaForCausalLM"
    lm.save_pretrained(output / "merged-head")
    with pytest.raises(ValueError, match="merged-head must hold the merged model of this demo, got another"):
        again()
    lm.model.layers[0].mlp.up_proj.weight.data[-1, -1] += 1
    lm.save_pretrained(tmp_path / "model")
    with pytest.raises(
        ValueError, match="seal demo: output .* got one with another fingerprint .give another --output, or --restart"
    ):
        again()


def test_transfer_needs_tasks_of_different_names(tmp_path):
    pair = [tasks.make("multikey", keys=2), tasks.make("multikey", keys=4)]
    with pytest.raises(ValueError, match="seal_ops.transfer: measured must hold tasks of different names, got"):
        transfer(lambda: (model(), tokenizer()), [], pair, LENGTH, 1, output=tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("run", RUNS)
def test_every_module_keeps_its_mode(run, tmp_path):
    lm = model().train()
    lm.model.layers[0].mlp.eval()
    before = {name: module.training for name, module in lm.named_modules()}
    assert set(before.values()) == {True, False}
    run(lm, tokenizer(), Reds(), tmp_path)
    assert {name: module.training for name, module in lm.named_modules()} == before


def test_training_keeps_every_modules_mode():
    lm = model().train()
    seal_ops.attach(lm, "head")
    lm.model.layers[0].mlp.eval()
    before = {name: module.training for name, module in lm.named_modules()}
    seal_ops.train(lm, Colours()(tokenizer(), LENGTH, 1), gradient_checkpointing=True)
    assert {name: module.training for name, module in lm.named_modules()} == before
