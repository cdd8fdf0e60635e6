"""Tasks: lengths, seeds, splits, chat formats, label masks, scores, and what a tokenizer must be able to do."""

import random

import pytest
from own_tasks import Colours
from retrieval_fixtures import tokenizer

from seal_ops import tasks
from seal_ops.adapters.files import read_json
from seal_ops.tasks.vocabulary import ADJECTIVES, NOUNS
from seal_ops.utils.files import read_text


@pytest.mark.parametrize("length", [190, 256, 777])
@pytest.mark.parametrize("chat", [False, True])
def test_samples_fill_the_length(length, chat):
    tok = tokenizer(chat)
    for sample in tasks.lines(tok, length=length, samples=5):
        assert len(sample) + tasks.lines.reserve <= length
        one_more = sample.prompt.count("\nline ") + 1
        longer, answer, _ = tasks.lines.write(
            random.Random(f"lines/train/0/{length}/{sample.meta['index']}"), one_more, index=0, split="train"
        )
        more = sum(map(len, tasks.Encoder(tok)(longer, answer)))
        assert more + tasks.lines.reserve > length, "another line would have fitted"


def test_wording_and_target():
    sample = tasks.lines(tokenizer(), length=300, samples=3, seed=7)[2]
    meta = sample.meta
    body = sample.prompt.split("\n\n")[1].split("\n")
    assert body[meta["line"]] == f"line {meta['key']}: REGISTER_CONTENT is <{meta['number']}>"
    assert len(body) == meta["num_items"] and len({line.split(":")[0] for line in body}) == len(body)
    assert sample.prompt.startswith("Below is a record of lines I want you to remember. Each line begins with ")
    assert sample.prompt.endswith(
        f"\nNow the record is over. Tell me what is the <REGISTER_CONTENT> in line {meta['key']}? I need the number.\n"
    )
    assert sample.answer == f"The <REGISTER_CONTENT> in line {meta['key']} is {meta['number']}."
    assert 1 <= meta["number"] <= 50_000 and 0 <= meta["depth"] <= 1


def test_word_lists():
    assert len(set(ADJECTIVES)) == len(set(NOUNS)) == 100


def test_label_mask_covers_the_answer_and_the_end_token():
    tok = tokenizer()
    sample = tasks.lines(tok, length=200, samples=1)[0]
    labels = [token for token, wanted in zip(sample.input_ids, sample.label_mask, strict=True) if wanted]
    assert tok.decode(labels).strip() == sample.answer + "</s>"
    assert sample.labels == [-100] * len(sample.prompt_ids) + labels
    assert sample.prompt_ids[0] == tok.bos_token_id


def test_seeds_and_splits():
    tok = tokenizer()

    def keys(**options):
        return [s.meta["key"] for s in tasks.lines(tok, length=300, **options)]

    assert keys(samples=6, seed=3) == keys(samples=6, seed=3)
    assert keys(samples=6, seed=3)[:4] == keys(samples=4, seed=3), "a longer list starts with the shorter one"
    assert keys(samples=6, seed=3) != keys(samples=6, seed=4)
    prompts = {s.prompt for s in tasks.lines(tok, length=300, samples=30)}
    fresh = {s.prompt for s in tasks.lines(tok, length=300, samples=30, split="test")}
    assert not prompts & fresh


def test_targets_cover_the_record():
    depths = [s.meta["depth"] for s in tasks.lines(tokenizer(), length=400, samples=60)]
    assert min(depths) < 0.1 and max(depths) > 0.9


def test_chat_formats():
    question = tasks.lines(tokenizer(), length=200, samples=1)[0].prompt
    tok = tokenizer(chat=True)
    prompt_ids, answer_ids = tasks.Encoder(tok)(question, "The 5.")
    assert tok.decode(prompt_ids) == f"<|user|>{question}</s>\n<|assistant|>"
    assert tok.decode(answer_ids) == "The 5.</s>"
    plain, _ = tasks.Encoder(tok, chat_template=False)(question, "The 5.")
    assert tok.decode(plain) == "<s>" + question
    wrapped, answer = tasks.Encoder(tokenizer(), chat_template="A: {prompt} |:")(question, "The 5.")
    assert tok.decode(wrapped) == f"<s>A: {question} |:"
    assert tok.decode(answer) == " The 5.</s>", "the answer is set off by a space where the format ends without one"
    with pytest.raises(ValueError, match="chat_template=True needs a tokenizer with a chat template"):
        tasks.Encoder(tokenizer(), chat_template=True)
    with pytest.raises(ValueError, match="must be Jinja or contain {prompt}"):
        tasks.Encoder(tok, chat_template="vicuna")


@pytest.mark.parametrize(
    "text, right",
    [
        ("The <REGISTER_CONTENT> in line red-fox is {n}.", 1),
        ("{n}", 1),
        ("line 12 holds {n}", 1),
        ("{n} is in line 12", 0),
        ("1{n}", 0),
        ("no number", 0),
        ("", 0),
    ],
)
def test_line_score(text, right):
    sample = tasks.lines(tokenizer(), length=200, samples=1)[0]
    assert tasks.lines.score(sample, text.format(n=sample.meta["number"])) == right


def test_a_task_in_one_class():
    samples = Colours()(tokenizer(), length=120, samples=4)
    assert all(100 <= len(s) + Colours.reserve <= 120 for s in samples)
    assert Colours().score(samples[0], samples[0].answer) == 1
    assert isinstance(tasks.get("test_tasks:Colours"), Colours)
    assert tasks.get("lines") is tasks.lines is tasks.get(tasks.lines)


def test_a_mark_at_the_beginning_of_a_file_is_none_of_its_text(tmp_path):
    """Editors on Windows begin UTF-8 with U+FEFF: a sample, a config, or text that would be trained on."""
    path = tmp_path / "a"
    path.write_text("\ufefftext\ufeff", encoding="utf-8")
    assert read_text(path) == "text\ufeff"
    path.write_text('{"a": 1}', encoding="utf-8-sig")
    assert read_json(tmp_path, "a") == {"a": 1}
    samples = tasks.lines(tokenizer(), 200, 2)
    tasks.write(path, samples)
    path.write_text(path.read_text(encoding="utf-8"), encoding="utf-8-sig", newline="\r\n")
    assert [s.to_json() for s in tasks.read(path)] == [s.to_json() for s in samples]


def test_round_trip_through_a_file(tmp_path):
    samples = tasks.lines(tokenizer(), length=200, samples=3)
    path = tmp_path / "deep" / "samples.jsonl"
    tasks.write(path, samples)
    assert tasks.read(path) == samples
    path.write_text(path.read_text() + '{"prompt": 3}\n')
    with pytest.raises(ValueError, match="line 4: not a sample"):
        tasks.read(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="samples.jsonl must be text in UTF-8, got "):
        tasks.read(path)
    path.write_text('{"prompt_ids": [1], "answer_ids": [2], "prompt": "\u2028", "answer": "\x85"}\n', encoding="utf-8")
    assert tasks.read(path)[0].prompt == "\u2028", "only a line feed ends a line"
    assert [p.name for p in path.parent.iterdir()] == ["samples.jsonl"], "no temporary file stays behind"


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: tasks.lines(tokenizer(), length=40), r"length must be at least 1\d\d tokens to hold one line, got 40"),
        (lambda: tasks.lines(tokenizer(), length=200, samples=0), "samples must be at least 1, got 0"),
        (lambda: tasks.lines(tokenizer(), length=200, split="dev"), "split must be one of train, test, got 'dev'"),
        (lambda: tasks.lines(tokenizer(without=("remember",)), length=200), "got the unknown token for 'remember.'"),
        (lambda: tasks.lines(tokenizer(), length="200"), "length must be an integer, got '200'"),
        (lambda: tasks.lines(tokenizer(), length=200, samples=1.5), "samples must be an integer, got 1.5"),
        (lambda: tasks.lines(tokenizer(), length=200, seed=None), "seed must be an integer, got None"),
        (lambda: tasks.lines(None, length=200), "tokenizer must be a Hugging Face tokenizer, got None"),
        (lambda: tasks.get(["lines"]), "task must be one of .*lines.*, got \\['lines'\\]"),
        (lambda: tasks.make(None), "name must be one of .*lines.*, got None"),
        (lambda: tasks.get("liens"), "task must be one of .*lines.*, got 'liens'"),
        (lambda: tasks.get("no_such_module:Task"), "must name an importable module:Class"),
    ],
)
def test_errors_are_one_sentence(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_tokenizer_that_drops_digits_is_refused():
    from tokenizers import Regex, normalizers

    tok = tokenizer.__wrapped__()
    tok.backend_tokenizer.normalizer = normalizers.Replace(Regex(r"\d"), "")
    with pytest.raises(ValueError, match="in the tokens of .* must score 1, got 0 for"):
        tasks.lines(tok, length=200)
