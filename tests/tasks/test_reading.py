"""One invariant: a model that writes exactly what it was trained to write scores 1, for every task, template and
tokenizer."""

import json

import pytest
import torch
from chat_templates import REASONING, TEMPLATES, chat_tokenizer
from own_tasks import Colours
from retrieval_fixtures import model, one_thread, tokenizer  # noqa: F401

import seal_ops
from seal_ops import tasks
from seal_ops.evaluation.decoding import generate
from seal_ops.tasks.reading import final_answer, read_output

FORMATS = [None, False, "USER: {prompt} ASSISTANT:", *TEMPLATES]
NAMES = [*tasks.names(), "documents"]


def made(name, tmp_path):
    if name != "documents":
        return tasks.get(name)
    answers = [[f"The text:\nnumber {i}\n\nand the end."] for i in range(4)]
    rows = [{"context": f"Text {i}. " * 20, "input": "Which?", "answers": answers[i]} for i in range(4)]
    path = tmp_path / "qa.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tasks.make("documents", path=path, held_out=0)


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("template", FORMATS)
@pytest.mark.parametrize("name", NAMES)
def test_the_label_scores_one(name, template, special, tmp_path):
    tok, task = chat_tokenizer(template if template in TEMPLATES else None, special), made(name, tmp_path)
    options = {} if template in TEMPLATES else {"chat_template": template}
    for sample in task(tok, 900, 2, **options):
        text = read_output(tok, sample.answer_ids, {tok.eos_token_id}, task.stop)
        assert task.score(sample, text) == 1
        assert len(sample.answer_ids) <= task.max_new_tokens
        label = tok.decode(sample.answer_ids)
        assert label.strip().startswith(sample.answer[:20]), "what the template writes before the answer is not trained"
        prompt = tok.decode(sample.prompt_ids)
        assert prompt.count("<think>") == prompt.count("</think>") == (template in REASONING)


@pytest.mark.parametrize("template", FORMATS)
def test_labels_are_read_as_outputs_are(template, monkeypatch):
    """`generate` gives for a model that writes the label what `read_output` gives for its ids."""
    tok = chat_tokenizer(template if template in TEMPLATES else None)
    lm = model().eval()
    lm.resize_token_embeddings(len(tok))
    options = {} if template in TEMPLATES else {"chat_template": template}
    (sample,) = tasks.lines(tok, 300, 1, **options)
    written = [*sample.answer_ids, *[tok.eos_token_id] * 100]
    calls = []

    def scripted(hidden):
        logits = torch.full((*hidden.shape[:-1], len(tok)), -1.0)
        logits[..., written[len(calls)]] = 1.0
        calls.append(1)
        return logits

    monkeypatch.setattr(lm.lm_head, "forward", scripted)
    (text,) = generate(lm, tok, [sample.prompt_ids], max_new_tokens=100, stop=tasks.lines.stop)
    assert text == read_output(tok, sample.answer_ids, {tok.eos_token_id}, tasks.lines.stop)
    assert tasks.lines.score(sample, text) == 1


@pytest.mark.parametrize("template", REASONING)
def test_reasoning_may_be_asked_for(template):
    tok = chat_tokenizer(template)
    options = {"chat_template_kwargs": {"enable_thinking": True}}
    (sample,) = tasks.lines(tok, 300, 1, **options)
    prompt = tok.decode(sample.prompt_ids)
    assert prompt.rstrip().endswith("<think>") == template.startswith("opened") and "</think>" not in prompt


@pytest.mark.parametrize(
    "text, stop, opened, answer",
    [
        ("\n It is 7.\nline 8", "\n", False, "It is 7."),
        ("<think>\n7?\n8?\n</think>\n\nIt is 8.\nline", "\n", False, "It is 8."),
        ("7?\n8?\n</think>\n\nIt is 8.\nline", "\n", True, "It is 8."),
        ("<think>7? No, 8", "\n", False, ""),
        ("7? No, 8", None, True, ""),
        ("a\nb", None, False, "a\nb"),
    ],
)
def test_final_answer(text, stop, opened, answer):
    assert final_answer(text, stop, opened) == answer


class Cut(Colours):
    """Its answers are cut by its own stop."""

    name, stop = "cut", "The "


class Deaf(Colours):
    name = "deaf"

    def score(self, sample, text):
        return 0.0


@pytest.mark.parametrize("task", [Cut(), Deaf()])
def test_a_task_whose_own_answer_is_wrong_is_refused(task):
    with pytest.raises(
        ValueError, match=rf"seal_ops.tasks.{task.name}: the answer 'The \w+\.', .* must score 1, got 0 for "
    ) as caught:
        task(tokenizer(), 60, 1)
    assert "\n" not in str(caught.value)


def test_a_thinking_models_output_is_scored_behind_its_reasoning(monkeypatch):
    """Newlines inside the reasoning do not end the output."""
    from seal_ops.evaluation import runner

    tok, stops = chat_tokenizer("switched reasoning"), []

    def answer(lm, tok, prompts, *, stop, **options):
        stops.append(stop)
        return [f"<think>\nline 1 holds 3\n</think>\n\nIt is {tok.decode(p).count('x')}.\n5" for p in prompts]

    class Count(tasks.Task):
        name = "count"

        def write(self, rng, num_items, *, index, split):
            return "x" * num_items, f"It is {num_items}.", {"number": num_items}

        def score(self, sample, text):
            return float(text == sample.answer)

    monkeypatch.setattr(runner, "generate", answer)
    lm = model()
    options = {"chat_template_kwargs": {"enable_thinking": True}, "max_new_tokens": 100}
    result = seal_ops.evaluate(lm, tok, Count(), 200, 2, **options)
    assert result.accuracy[200].accuracy == 1 and set(stops) == {None}
    assert result.records[0]["output"].startswith("<think>"), "the whole output is kept"
    stops.clear()
    seal_ops.evaluate(lm, tok, Count(), 200, 1)
    assert stops == ["\n"]
