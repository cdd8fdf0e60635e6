"""The task families: lengths, depths, scores, splits that share nothing, documents from a file, options."""

import json
import os
import re
import sys

import pytest
from retrieval_fixtures import model
from transformers import AutoTokenizer

import seal_ops
from seal_ops import tasks
from seal_ops.tasks.document_qa import DocumentQA, word_f1
from seal_ops.tasks.needle_in_haystack import Needle
from seal_ops.utils.progress import bar

HERE = os.path.dirname(os.path.abspath(__file__))
# Byte-level: any text can be written in it.
TOKENIZER = AutoTokenizer.from_pretrained(os.path.join(os.path.dirname(os.path.dirname(HERE)), "models", "seal-tiny"))
MORE = [name for name in tasks.names() if name != "lines"]
HAYSTACKS = ["needle", "passkey", "magic", "multikey", "multivalue"]


@pytest.mark.parametrize("name", MORE)
def test_fills_the_length_and_scores_its_own_answer(name):
    task = tasks.get(name)
    assert task.name == name
    samples = task(TOKENIZER, length=900, samples=6)
    for sample in samples:
        assert 900 - task.reserve - 60 < len(sample) <= 900 - task.reserve
        assert task.score(sample, sample.answer) == 1
        assert len(TOKENIZER(sample.answer)["input_ids"]) < task.max_new_tokens
        assert json.loads(sample.to_json())["meta"] == sample.meta
    assert all(task.score(a, b.answer) < 1 for a, b in zip(samples, samples[1:], strict=False))
    assert all(task.score(s, text) == 0 for s in samples for text in ("", "I do not know.\n", "!!"))


@pytest.mark.parametrize("name", MORE)
def test_seeds(name):
    task = tasks.get(name)

    def prompts(**options):
        return [s.prompt for s in task(TOKENIZER, length=700, **options)]

    assert prompts(samples=4) == prompts(samples=6)[:4] == prompts(samples=4, seed=0)
    assert not {*prompts(samples=4)} & {*prompts(samples=4, seed=1)}
    assert not {*prompts(samples=4)} & {*prompts(samples=4, split="test")}


@pytest.mark.parametrize("name", HAYSTACKS)
def test_depth_is_where_the_fact_lies(name):
    task = tasks.make(name, depths=5)
    samples = task(TOKENIZER, length=1200, samples=10)
    assert [s.meta["depth"] for s in samples] == [0, 0.25, 0.5, 0.75, 1] * 2
    for sample in samples:
        body = sample.prompt.partition("\n")[2].rpartition("\n")[0].rpartition("\n")[0]
        fact = {"needle": sample.answer, "passkey": f"The pass key is {sample.meta.get('number')}."}.get(name)
        if fact is None:
            key, numbers = sample.meta["key"], sample.meta["numbers"]
            assert all(f"numbers for {key} is: {n}." in body for n in numbers)
            fact = f"One of the special magic numbers for {key} is: {numbers[0]}."
        place = body.index(fact) / (len(body) - len(fact))
        assert place == pytest.approx(sample.meta["depth"], abs=0.12)


@pytest.mark.parametrize("filler", ["prose", "noise"])
@pytest.mark.parametrize("name", HAYSTACKS)
def test_test_needles_are_never_trained(name, filler):
    task = tasks.make(name, filler=filler)

    def secrets(split, seed):
        found = set()
        for s in task(TOKENIZER, length=400, samples=60, split=split, seed=seed):
            found |= {"needle": {s.answer}, "passkey": {s.meta.get("number")}}.get(name) or {s.meta["key"]}
        return found

    trained = secrets("train", 0) | secrets("train", 1)
    assert len(trained) > 60 and not trained & (secrets("test", 0) | secrets("test", 1))


def test_needles_ask_for_their_end():
    for sample in Needle()(TOKENIZER, length=500, samples=8):
        start, _, end = sample.answer.rstrip(".").partition(" is ")
        assert end == sample.meta["expected"] and f"what is {start[0].lower()}{start[1:]}?" in sample.prompt
        assert Needle().score(sample, f"It is {end.upper()}, I believe") == 1


def test_prose_does_not_repeat_itself():
    body = tasks.needle(TOKENIZER, length=3000, samples=1)[0].prompt
    sentences = re.findall(r"[A-Z][^.]+\.", body)
    assert len(set(sentences)) > 0.75 * len(sentences) > 50


def test_multikey_and_multivalue_counts_and_partial_scores():
    sample = tasks.make("multikey", keys=20)(TOKENIZER, length=1500, samples=1)[0]
    keys = re.findall(r"magic numbers for (\S+) is: (\d+)", sample.prompt)
    assert len(keys) == len({key for key, _ in keys}) == 20
    assert dict(keys)[sample.meta["key"]] == str(sample.meta["numbers"][0])
    sample = tasks.multivalue(TOKENIZER, length=800, samples=1)[0]
    assert tasks.multivalue.score(sample, " ".join(map(str, sample.meta["numbers"][:3]))) == 0.75
    assert tasks.multivalue.score(sample, "1" + str(sample.meta["numbers"][0])) == 0


@pytest.mark.parametrize("length, repeats", [(700, 4), (6000, 25), (9000, 30)])
def test_common_words_are_the_most_common(length, repeats):
    sample = tasks.common_words(TOKENIZER, length=length, samples=1)[0]
    entries = re.findall(r"\d+\. (\S+)", sample.prompt)
    counts = {word: entries.count(word) for word in set(entries)}
    assert sample.meta["repeats"] == pytest.approx(repeats, abs=2)
    assert {counts[w] for w in sample.meta["words"]} == {sample.meta["repeats"]}
    assert max(n for w, n in counts.items() if w not in sample.meta["words"]) <= 3
    wrong = "".join(f"{word} " for word in counts if word not in sample.meta["words"])
    assert tasks.common_words.score(sample, wrong + sample.answer) == 0, "naming everything does not pay"
    assert tasks.common_words.score(sample, " ".join(sample.meta["words"][:4])) == 0.4


def test_variable_chains():
    sample = tasks.make("variables", chains=3, hops=2)(TOKENIZER, length=900, samples=1)[0]
    lines = dict(re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", sample.prompt))
    order = [name for name, _ in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", sample.prompt)]

    def value(name):
        return value(lines[name]) if name in lines else name

    assert len(lines) == 9 and [n for n in lines if value(n) == str(sample.meta["value"])] == sample.meta["variables"]
    assert all(order.index(lines[n]) < order.index(n) for n in order if lines[n] in lines)
    everything = " ".join(lines)
    assert tasks.variables.score(sample, everything) == pytest.approx(3 / 9), "naming all of them does not pay"
    assert tasks.variables.score(sample, " ".join(sample.meta["variables"][:2])) == pytest.approx(2 / 3)


@pytest.mark.parametrize("direction", ["forward", "backward", "random"])
def test_threads_lead_to_their_last_value(direction):
    task = tasks.make("threads", hops=4, direction=direction)
    for sample in task(TOKENIZER, length=900, samples=5):
        pairs = json.loads(sample.prompt[sample.prompt.index("{") : sample.prompt.index("}") + 1])
        places, key = [], sample.meta["start"]
        while key in pairs:
            places.append(list(pairs).index(key))
            key = pairs[key]
        assert key == sample.meta["last"] and len(places) == 4
        if direction != "random":
            assert places == sorted(places, reverse=direction == "backward")


def write_documents(path, rows=40, words=50):
    with open(path, "w") as file:
        for i in range(rows):
            text = " ".join(f"Sentence {i} {j} follows." for j in range(words // 4))
            row = {"context": text, "input": f"Which number has document {i}?", "answers": [f"The number {i}.", str(i)]}
            file.write(json.dumps({**row, "_id": str(i), "dataset": "mine"}) + "\n")
    return path


def test_documents(tmp_path):
    path = write_documents(tmp_path / "qa.jsonl")
    task = tasks.get(f"documents:{path}")
    train, test = task.rows("train"), task.rows("test")
    assert len(train) + len(test) == 40 and min(len(train), len(test)) > 8
    samples = task(TOKENIZER, length=4000, samples=len(train))
    assert {s.meta["row"] for s in samples} == {n for n, _ in train}
    assert all(s.meta["kept"] == 1 and s.answer.startswith("The number") for s in samples)
    assert task.score(samples[0], samples[0].answer.upper()) == 1 and task.score(samples[0], "nothing") == 0
    again = write_documents(path, rows=60)
    grown = tasks.get(f"documents:{again}")
    assert {n for n, _ in train} <= {n for n, _ in grown.rows("train")}, "a file that grows keeps its split"
    assert grown.content != task.content
    assert len(tasks.make("documents", path=path, held_out=1).rows("test")) == 60


def test_all_questions_about_a_document_are_in_one_split(tmp_path):
    path = tmp_path / "qa.jsonl"
    with open(path, "w") as file:
        for i in range(30):
            for question in range(3):
                context = f"Text {i}" + " and so on." * 5 + " " * question  # white space makes no other document
                file.write(
                    json.dumps({"context": context, "input": f"Question {question}?", "answers": ["It is so."]}) + "\n"
                )
    task = tasks.get(f"documents:{path}")
    train, test = ({row["context"].strip() for _, row in task.rows(split)} for split in ("train", "test"))
    assert len(train) + len(test) == 30 and min(len(train), len(test)) > 5 and not train & test


def test_answers_of_several_lines_count_whole(tmp_path):
    path = tmp_path / "qa.jsonl"
    path.write_text(
        json.dumps({"context": "Text.", "input": "Which?", "answers": ["First line.\n\nSecond line."]}) + "\n"
    )
    task = tasks.make("documents", path=path, held_out=1, max_new_tokens=7)
    assert task.stop is None and task(TOKENIZER, 200, 1, split="test")
    with pytest.raises(
        ValueError, match=r"max_new_tokens must be at least \d+ for the answers of documents .* got the task's 7"
    ):
        seal_ops.evaluate(model(), TOKENIZER, task, 200, 1)
    with pytest.raises(ValueError, match="max_new_tokens must be an integer of at least 1, got 0"):
        tasks.make("documents", path=path, max_new_tokens=0)


@pytest.mark.parametrize(
    "progress, terminal, drawn",
    [(None, True, True), (None, False, False), (True, False, True), (False, True, False)],
)
def test_none_draws_a_bar_on_a_terminal(progress, terminal, drawn, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    tasks.passkey.generate(TOKENIZER, 200, 2, progress=progress)
    assert ("writing samples" in capsys.readouterr().err) == drawn


def test_a_bar_inside_a_bar_is_not_drawn(monkeypatch, capsys):
    """Nor one inside a step that was asked to be silent."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    for enabled in (True, False):
        with bar(2, "outer", enabled):
            tasks.passkey.generate(TOKENIZER, 200, 2)
        shown = capsys.readouterr().err
        assert "writing samples" not in shown and ("outer" in shown) == enabled
    tasks.passkey(TOKENIZER, 200, 2)
    assert "writing samples" in capsys.readouterr().err, "drawn where nothing is said and no step is around it"


def test_long_documents_lose_their_middle(tmp_path):
    path = write_documents(tmp_path / "qa.jsonl", rows=3, words=2000)
    task = DocumentQA(path, held_out=0)
    for sample in task(TOKENIZER, length=900, samples=3):
        assert 870 < len(sample) + task.reserve <= 900 and 0 < sample.meta["kept"] < 1
        i = sample.meta["row"] - 1
        assert f"Sentence {i} 0 follows" in sample.prompt and f"Sentence {i} 499 follows." in sample.prompt
        assert f"Sentence {i} 250 " not in sample.prompt and "\n...\n" in sample.prompt
    with pytest.raises(ValueError, match="length must be at least .* tokens for the question in line"):
        task(TOKENIZER, length=60, samples=1)


def test_word_f1():
    assert word_f1("The  answer, is: Blue!", "answer is blue") == 1
    assert word_f1("blue sky", "blue") == pytest.approx(2 / 3)
    assert word_f1("", "blue") == 0 and word_f1("the", "a") == 1


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "must hold at least one row, got an empty file"),
        ("{", "line 1 must be a JSON object"),
        ('{"context": "x", "input": "y"}', "line 1 must have the texts context and input and a list of answers"),
        ('{"context": "x", "input": "y", "answers": []}', "a list of answers, got"),
        ('{"context": "x", "input": "y", "answers": "z"}', "a list of answers, got"),
        ("[1]", "got list"),
    ],
)
def test_bad_documents(tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        tasks.get(f"documents:{path}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: tasks.make("needles"), "name must be one of lines, needle, .*documents, got 'needles'"),
        (lambda: tasks.make("needle", depth=3), "options of needle must be among filler, depths, got 'depth'"),
        (lambda: tasks.make("lines", depths=3), "options of lines must be among none, got 'depths'"),
        (lambda: tasks.make("needle", filler="essays"), "filler must be one of prose, noise, got 'essays'"),
        (lambda: tasks.make("passkey", depths=0), "depths must be an integer of at least 1, got 0"),
        (lambda: tasks.make("multikey", keys=0), "tasks.multikey: keys must be an integer from 1"),
        (lambda: tasks.make("words", repeats=3), "repeats must be an integer above 3, got 3"),
        (lambda: tasks.make("variables", hops=0), "hops must be an integer from 1 to 100"),
        (lambda: tasks.make("threads", direction="up"), "direction must be one of forward, backward, random"),
        (lambda: tasks.make("documents"), "documents needs the option path"),
        (lambda: tasks.get("documents:/no/such/file"), "No such file"),
        (
            lambda: tasks.needle(TOKENIZER, length=30),
            "length must be at least .* to hold one sentence of filler, got 30",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises((ValueError, OSError), match=message):
        call()
