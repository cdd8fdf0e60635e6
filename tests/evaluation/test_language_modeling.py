"""Perplexity of a text, against the loss written out."""

import math

import pytest
import torch
import torch.nn.functional as F
from retrieval_fixtures import model, tokenizer

from seal_ops.evaluation.language_modeling import perplexity

TEXT = "Tell me the number in line 1 2 3. I need the number.\n" * 8


def test_against_the_loss_written_out():
    lm, tok = model().eval(), tokenizer()
    ids = tok(TEXT, add_special_tokens=False)["input_ids"]
    count = len(ids) // 20
    losses = []
    for i in range(count):
        row = torch.tensor([ids[20 * i : 20 * i + 20]])
        with torch.no_grad():
            losses.append(F.cross_entropy(lm(row).logits[0, :-1], row[0, 1:]).item())
    found = perplexity(lm, tok, TEXT, window=20)
    assert found["nats"] == pytest.approx(sum(losses) / count, abs=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["nats"])) and found["tokens"] == 19 * count
    assert found["window_nats"] == pytest.approx(losses, abs=1e-4)


def test_text_too_short():
    with pytest.raises(ValueError, match="at least one window of 2048 tokens, got"):
        perplexity(model(), tokenizer(), TEXT)
