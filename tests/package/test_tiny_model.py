"""The shipped retrieval model: it loads offline, its tokenizer fits the tasks, and its training writes their
wording."""

import importlib
import os
import sys
from pathlib import Path

import pytest
import torch

from seal_ops.tasks.vocabulary import ADJECTIVES, NOUNS

REPOSITORY = Path(__file__).resolve().parents[2]
MODEL = REPOSITORY / "models" / "seal-tiny"


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL, local_files_only=True)


@pytest.fixture(scope="module")
def training():
    """The modules of ``models/train_seal_tiny``, which are scripts rather than a package."""
    folder = str(REPOSITORY / "models" / "train_seal_tiny")
    sys.path.insert(0, folder)
    try:
        import data
        import model
        import wording

        yield {"data": data, "model": model, "wording": wording}
    finally:
        sys.path.remove(folder)
        for name in ("data", "model", "wording"):
            sys.modules.pop(name, None)


def test_word_lists_give_ten_thousand_keys():
    assert len(set(ADJECTIVES)) == len(ADJECTIVES) == 100
    assert len(set(NOUNS)) == len(NOUNS) == 100
    assert not set(ADJECTIVES) & set(NOUNS)
    assert all(w.isascii() and w.isalpha() and w.islower() for w in ADJECTIVES + NOUNS)


def test_every_word_and_digit_is_one_token(tokenizer):
    words = [form for w in ADJECTIVES + NOUNS for form in (w, " " + w)]
    for text in words + list("0123456789\n"):
        assert len(tokenizer(text, add_special_tokens=False).input_ids) == 1, text
    assert len(tokenizer("90210", add_special_tokens=False).input_ids) == 5


@pytest.mark.parametrize(
    "text",
    ["", "The <REGISTER_CONTENT> in line amber-anchor is 12345.\n\n", "Grüße, 世界 \t\r\n 🙂  x", "  two  spaces\n"],
)
def test_tokenizer_round_trip(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_shipped_tokenizer_is_the_one_the_words_give(tokenizer, training):
    built = training["wording"].build_tokenizer()
    assert built.get_vocab() == tokenizer.get_vocab()


def test_training_text_is_the_task_text(tokenizer, training):
    """A generated training case decodes to a prompt and an answer that the library's task would have written."""
    task = importlib.import_module("seal_ops.tasks.line_retrieval")

    data = training["data"]
    torch.manual_seed(3)
    count = 5
    tokens, sentence, digits = data.retrieval_cases(data.Texts(tokenizer, "cpu"), 4, count, 400)
    for row, mask, number_mask in zip(tokens, sentence, digits, strict=True):
        row_ids = row[row != tokenizer.pad_token_id].tolist()
        text = tokenizer.decode(row_ids)
        record = text.split("\n\n", 1)[1].split("\n")[:count]
        facts = dict(line.removeprefix("line ").split(": REGISTER_CONTENT is ") for line in record)
        key = next(k for k in facts if f"in line {k}?" in text)
        number = facts[key].strip("<>")
        assert 1 <= int(number) <= task.MAX_NUMBER and len(facts) == count
        prompt = task.HEADER + "\n".join(record) + "\n" + task.QUESTION.format(key=key)
        answer = task.ANSWER.format(key=key, number=number)
        assert text == f"<s>{prompt}{answer}</s>"
        # and the ids are those that the tokenizer gives for it
        assert row_ids == tokenizer(prompt).input_ids + tokenizer(answer + "</s>", add_special_tokens=False).input_ids
        assert tokenizer.decode(row[mask]) == answer + "</s>"
        assert tokenizer.decode(row[number_mask]) == number + ".</s>"


def test_bias_sees_context_and_distance_in_tokens(tokenizer, training):
    """With a bias of 1 every answer is the last line's number; the bias is asked with plausible lengths."""
    data = training["data"]
    torch.manual_seed(4)
    seen = []

    def always(context, distance):
        seen.append((context, distance))
        return torch.ones_like(context)

    tokens, answer = data.questions(data.Texts(tokenizer, "cpu"), 6, 3, 3, 300, bias=always)
    for row, mask in zip(tokens, answer, strict=True):
        last = tokenizer.decode(row).split("\n\n", 1)[1].split("\n")[2]
        assert tokenizer.decode(row[mask]).removesuffix(".</s>") == last.split("<")[1].strip(">")
    ((context, distance),) = seen
    assert (distance > 0).all() and (distance <= context).all() and (context <= 3 * 17).all()


def test_model_loads_offline_and_retrieves_short_records(tokenizer):
    from transformers import AutoModelForCausalLM

    from seal_ops.tasks import lines

    assert sum(f.stat().st_size for f in MODEL.iterdir()) <= 12 * 2**20
    assert os.path.getsize(MODEL / "model.safetensors") > 2**20
    model = AutoModelForCausalLM.from_pretrained(MODEL, local_files_only=True, dtype=torch.float32)
    assert model.config.vocab_size >= len(tokenizer)
    samples = lines(tokenizer, length=256, samples=8, seed=5, split="test")
    right = 0
    for sample in samples:
        ids = torch.tensor([sample.prompt_ids])
        out = model.generate(ids, max_new_tokens=30, do_sample=False)
        right += lines.score(sample, tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    assert right >= 6


def test_training_model_equals_the_library_model(training):
    """The network that is trained and the ``LlamaForCausalLM`` that is shipped compute the same."""
    from transformers import AutoModelForCausalLM

    shipped = AutoModelForCausalLM.from_pretrained(MODEL, local_files_only=True, dtype=torch.float32)
    size = training["model"].Size(rope_theta=shipped.config.rope_parameters["rope_theta"], max_positions=64)
    ours = training["model"].Llama(size, compute=torch.float32)
    state = {k: v for k, v in shipped.state_dict().items() if k != "lm_head.weight"}
    ours.load_state_dict(state)
    tokens = torch.randint(3, 1270, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = shipped(tokens).logits
        got = ours.logits(ours.hidden_states(tokens))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
