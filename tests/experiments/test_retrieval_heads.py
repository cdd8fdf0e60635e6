"""Retrieval score of heads on attention that is made by hand, and where a needle lies."""

import types

import pytest
import torch
from retrieval_fixtures import model, tokenizer

from seal_ops import tasks
from seal_ops.experiments.retrieval_heads import needle_span, retrieval_scores

PROMPT, ANSWER = [5, 20, 21, 22, 6, 20], [20, 21, 22, 9]
SAMPLE = tasks.Sample(PROMPT, ANSWER, "", "")


class Scripted(torch.nn.Module):
    """Four heads: at the token to be copied, always at one token of the needle, at the start, at a copy outside."""

    device = torch.device("cpu")
    config = types.SimpleNamespace(_attn_implementation="sdpa")

    def set_attn_implementation(self, name):
        self.config._attn_implementation = name

    def forward(self, input_ids, **options):
        assert self.config._attn_implementation == "eager" and options["output_attentions"]
        size = input_ids.shape[1]
        attention = torch.zeros(1, 4, size, size)
        for step, token in enumerate(ANSWER):
            row = len(PROMPT) - 1 + step
            attention[0, 0, row, PROMPT.index(token) if token in PROMPT else 0] = 1
            attention[0, 1, row, 2] = 1  # right for the second token only
            attention[0, 2, row, 0] = 1
            attention[0, 3, row, 5] = 1  # holds the needle's first token, too
        return types.SimpleNamespace(attentions=(attention,))


def test_scores():
    lm = Scripted()
    assert retrieval_scores(lm, [SAMPLE, SAMPLE], [(1, 4), (1, 4)])[0].tolist() == pytest.approx([1, 1 / 3, 0, 0])
    assert lm.config._attn_implementation == "sdpa"
    outside = retrieval_scores(lm, [SAMPLE], [(1, 3)])[0].tolist()
    assert outside == pytest.approx([1, 1 / 2, 0, 0]), "what is copied from outside of the needle does not count"
    with pytest.raises(ValueError, match="must share tokens with its answer"):
        retrieval_scores(lm, [SAMPLE], [(4, 5)])


def test_on_a_model():
    lm, tok = model().eval(), tokenizer()
    sample = tasks.lines.generate(tok, 200, 1, 0)[0]
    fact = f"line {sample.meta['key']}: REGISTER_CONTENT is <{sample.meta['number']}>"
    first, end = needle_span(tok, sample, fact)
    assert fact in tok.decode(sample.prompt_ids[first:end]) and end - first < 30
    found = retrieval_scores(lm, [sample], [(first, end)])
    assert found.shape == (2, 4) and bool(((found >= 0) & (found <= 1)).all())
    with pytest.raises(ValueError, match="the prompt must hold the fact"):
        needle_span(tok, sample, "line no-where")
