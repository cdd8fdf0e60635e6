"""What can be trained on: tokens, texts, conversations, datasets; and what is refused."""

import json

import pytest
import torch
import transformers
from chat_templates import TEMPLATES, chat_tokenizer
from retrieval_fixtures import model, one_thread, tokenizer  # noqa: F401

import seal_ops
from seal_ops import tasks
from seal_ops.training.collator import Collator
from seal_ops.training.samples import Row, to_rows
from seal_ops.training.texts import packed_texts, rows_of_file

SAMPLES = tasks.lines(tokenizer(), length=190, samples=3)


def losses(samples, **options):
    lm = model().eval()
    seal_ops.attach(lm, "head")
    return seal_ops.train(lm, samples, **options).losses


def test_tokens_in_dicts_and_datasets_train_alike():
    datasets = pytest.importorskip("datasets")
    rows = [{"input_ids": s.input_ids, "labels": s.labels, "other": 1} for s in SAMPLES]
    expected = losses(SAMPLES)
    assert losses(rows) == expected
    dataset = datasets.Dataset.from_list(rows)
    assert losses(dataset) == losses(dataset.with_format("torch")) == expected
    padded = [{**row, "input_ids": [7, 7, *row["input_ids"], 7], "labels": [-100, 5, *row["labels"], -100],
               "attention_mask": [0, 0, *[1] * len(row["input_ids"]), 0]} for row in rows]  # fmt: skip
    assert losses(padded) == expected
    assert losses(iter(rows)) == expected


def test_prompt_and_answer_as_a_task_writes_them():
    rows = [{"prompt": s.prompt, "answer": s.answer} for s in SAMPLES]
    assert losses(rows, tokenizer=tokenizer()) == losses(SAMPLES)
    assert losses([{"prompt": s.prompt, "completion": s.answer} for s in SAMPLES], tokenizer=tokenizer()) == losses(
        SAMPLES
    )


def test_text_trains_every_token():
    tok = tokenizer()
    (row,) = to_rows([{"text": "The record is over."}], tok)
    assert row.labels == row.input_ids == [*tok("The record is over.")["input_ids"], tok.eos_token_id]
    lm = model().eval()
    expected = lm(torch.tensor([row.input_ids]), labels=torch.tensor([row.labels])).loss.item()
    assert losses([row])[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("template", TEMPLATES)
def test_conversations_train_what_the_assistant_says(template):
    tok = chat_tokenizer(template)
    messages = [{"role": "user", "content": "What is 2?"}, {"role": "assistant", "content": "It is 2."},
                {"role": "user", "content": "It is 3."}, {"role": "assistant", "content": " It is 3.\nIndeed. "}]  # fmt: skip  # noqa: E501
    (row,) = to_rows([{"messages": messages}], tok)
    trained = [tok.decode([i]) if k != -100 else "\0" for i, k in zip(row.input_ids, row.labels, strict=True)]
    parts = [part for part in "".join(trained).split("\0") if part]
    assert [p.removesuffix("<|im_end|>").strip() for p in parts] == ["It is 2.", "It is 3.\nIndeed."]
    assert all(p.endswith("<|im_end|>") for p in parts) == (template != "system text")


MARKED = (  # what the assistant says is written otherwise, so that only the marks tell where it is
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{%- generation -%}"
    "{{ m['content'] | upper }}<|im_end|>{%- endgeneration -%}{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n"
    "{% endfor %}"
)


def test_a_template_that_marks_what_is_generated_decides():
    tok = chat_tokenizer(MARKED)
    messages = [{"role": "user", "content": "What is 2?"}, {"role": "assistant", "content": "It is 2."},
                {"role": "user", "content": "It is 3."}, {"role": "assistant", "content": "It is 3."}]  # fmt: skip
    (row,) = to_rows([{"messages": messages}], tok)
    trained = "".join(tok.decode([i]) if k != -100 else "\0" for i, k in zip(row.input_ids, row.labels, strict=True))
    assert [part for part in trained.split("\0") if part] == ["IT IS 2.<|im_end|>", "IT IS 3.<|im_end|>"]
    assert tok.decode(row.input_ids).count("It is 3.") == 1
    with pytest.raises(ValueError, match="must have a label behind its first token"):
        to_rows([{"messages": messages[:1]}], tok)


def chats(path, texts):
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in texts]
    path.write_text("".join(json.dumps({"messages": m}) + "\n" for m in turns) + "\n")
    return [to_rows([{"messages": m}], chat_tokenizer("turns"))[0] for m in turns]


def test_a_file_of_conversations(tmp_path):
    tok, path = chat_tokenizer("turns"), tmp_path / "chats.jsonl"
    rows = chats(path, [("What is 2?", "It is 2."), ("What is 3?", "It is 3."), ("And 4?", "Four.")])
    assert rows_of_file(path, tok, None, "x") == rows
    length = len(rows[0]) + len(rows[1]) + 1
    one, other = rows_of_file(path, tok, length, "x")
    assert one.input_ids == rows[0].input_ids + rows[1].input_ids and other == rows[2]
    assert one.labels == rows[0].labels + rows[1].labels, "no first token is trained"
    with pytest.raises(ValueError, match=r"^x: line 1 of .*chats.jsonl must have at most 5 tokens \(the length\), got"):
        rows_of_file(path, tok, 5, "x")
    tok_without = tokenizer()
    with pytest.raises(ValueError, match=r"^x: line 1 of .*chats.jsonl: messages need a chat template"):
        rows_of_file(path, tok_without, None, "x")
    answers = tmp_path / "answers.jsonl"
    answers.write_text(json.dumps({"prompt": "What is 2?", "answer": "It is 2."}) + "\n")
    assert rows_of_file(answers, tok, None, "x") == [Row(rows[0].input_ids[:-1], rows[0].labels[:-1])]
    answers.write_text("[1]\n")
    with pytest.raises(ValueError, match="must be an object with a text, got line 1"):
        rows_of_file(answers, tok, None, "x")


def test_a_file_of_texts_is_packed(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "It is 2."}\n{"text": "It is 3."}\n')
    tok = chat_tokenizer("turns")
    assert rows_of_file(path, tok, 6, "x") == packed_texts(path, tok, 6, "x")
    with pytest.raises(ValueError, match="x: length must be given for texts"):
        rows_of_file(path, tok, None, "x")
    with pytest.raises(ValueError, match="x: a chat format must be given for conversations, got it for texts in"):
        rows_of_file(path, tok, 6, "x", chat_template=True)


def test_the_last_turn_of_a_conversation_is_the_label_of_a_prompt():
    tok = chat_tokenizer("switched reasoning")
    prompt, answer = "Tell me.\n", "The 5."
    (one,) = to_rows([{"prompt": prompt, "answer": answer}], tok)
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    (other,) = to_rows([{"messages": turns}], tok)
    assert other.input_ids[: len(one)] == one.input_ids and other.labels[: len(one)] == one.labels


def test_rows_with_labels_inside_give_the_models_own_loss():
    lm = model().eval()
    rows = [Row([1, 2, 3, 4, 5, 6], [-100, 2, -100, 4, 5, -100]), Row([7, 8, 9], [7, -100, 9])]
    batch = Collator(label_positions_only=False)(rows)
    expected = lm(**{k: v for k, v in batch.items()}).loss.item()
    assert losses(rows, batch_size=2)[0] == pytest.approx(expected, rel=1e-5)
    assert losses(rows, accumulate=2)[0] == pytest.approx(expected, rel=1e-5)


def test_collator_leaves_label_positions_where_batches_are_spread(monkeypatch):
    """nn.DataParallel would cut `logits_to_keep` as if it had a row a sample."""
    assert "logits_to_keep" in Collator()(SAMPLES)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert set(Collator()(SAMPLES)) == {"input_ids", "attention_mask", "labels"}
    assert "logits_to_keep" in Collator(label_positions_only=True)(SAMPLES)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert "logits_to_keep" in Collator()(SAMPLES), "a process a GPU"


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(SAMPLES)


@pytest.mark.parametrize("workers", [0, 1])
def test_collator_leaves_label_positions_where_batches_are_sliced(workers):
    """accelerate cuts what it hands out of an `IterableDataset`."""

    def batch(data, **options):
        return next(iter(torch.utils.data.DataLoader(data, 2, num_workers=workers, collate_fn=Collator(**options))))

    assert set(batch(Stream())) == {"input_ids", "attention_mask", "labels"}
    assert "logits_to_keep" in batch(SAMPLES)
    assert "logits_to_keep" in batch(Stream(), label_positions_only=True)


def test_trainer_learns_the_same_from_a_stream(tmp_path):
    def loss(data):
        attached = model()
        seal_ops.attach(attached, "head")
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=1, per_device_train_batch_size=2, logging_steps=1, report_to=[], use_cpu=True,
            disable_tqdm=True, save_strategy="no", remove_unused_columns=False, train_sampling_strategy="sequential",
        )  # fmt: skip
        run = transformers.Trainer(attached, arguments, train_dataset=data, data_collator=Collator())
        run.train()
        return run.state.log_history[0]["loss"]

    assert loss(Stream()) == pytest.approx(loss(SAMPLES), rel=1e-4)


def test_collator_takes_texts():
    tok = tokenizer()
    rows = [{"prompt": s.prompt, "answer": s.answer} for s in SAMPLES]
    one, other = Collator(tokenizer=tok)(rows), Collator()(SAMPLES)
    assert all(torch.equal(one[key], other[key]) for key in other)


@pytest.mark.parametrize(
    "item, message",
    [
        ("text", "must be a Sample, or a dict with .* got str"),
        ({"question": "a"}, "must be a Sample, or a dict with .* got a dict with question"),
        ({"prompt": "a"}, "got a dict with prompt"),
        ({"input_ids": [1, 2], "labels": [1]}, "labels must be as many as input_ids, got 1 and 2"),
        ({"input_ids": [[1, 2]]}, "input_ids must be a flat list of integers"),
        ({"input_ids": None}, "input_ids must be a flat list of integers, got None"),
        ({"input_ids": [1, 2], "labels": 3}, "labels must be a flat list of integers, got 3"),
        ({"input_ids": [1, 2], "labels": [1, -100]}, "must have a label behind its first token, got none in 2 tokens"),
        ({"input_ids": [1, 2], "attention_mask": [1]}, "attention_mask must be as long as input_ids, got 1 and 2"),
        ({"messages": [{"role": "user", "content": "a"}]}, "messages need a chat template"),
        (tasks.Sample([1], []), "must have a label"),
    ],
)
def test_what_is_no_sample_is_named(item, message):
    with pytest.raises(ValueError, match=rf"^seal_ops.train: samples\[1\]:? .*{message}") as caught:
        losses([SAMPLES[0], item], tokenizer=tokenizer())
    assert "\n" not in str(caught.value)


def test_text_needs_a_tokenizer():
    with pytest.raises(ValueError, match=r"samples\[0\] is text and needs the argument tokenizer, got None"):
        losses([{"text": "a"}])


def test_longer_than_the_model_was_made_for_is_said():
    lm = model().eval()
    lm.config.max_position_embeddings = 150
    seal_ops.attach(lm, "head")
    with pytest.warns(UserWarning, match=r"seal_ops.train: 1\d\d tokens are more than the 150 positions"):
        seal_ops.train(lm, SAMPLES[:1])
    with pytest.warns(UserWarning, match="seal_ops.evaluate: 200 tokens are more than the 150 positions"):
        seal_ops.evaluate(lm, tokenizer(), "lines", 200, 1, max_new_tokens=1)
    lm.config.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*positions")
        seal_ops.train(lm, SAMPLES[:1])
