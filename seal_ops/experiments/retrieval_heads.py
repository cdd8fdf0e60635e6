"""Retrieval score of every head (Wu et al., 2024, arXiv 2404.15574): how often it attends to what is being copied.

While the model writes the tokens of a needle, a head retrieves where the position that it attends to most lies inside
the needle
and holds the very token that is written next.  Its score is the share of the needle's distinct tokens that it
retrieves so.
"""

import contextlib

import torch


@torch.no_grad()
def retrieval_scores(model, samples, spans) -> torch.Tensor:
    """Mean retrieval score ``[layers, heads]`` over samples, with the answer given (teacher forcing).

    Args:
        model: a causal language model without attached scales; its attention runs as "eager" meanwhile.
        samples: :class:`seal_ops.tasks.Sample`.
        spans: for each sample the ``(first, end)`` token positions of its needle in the prompt.

    Raises:
        ValueError: a needle shares no token with its answer.
    """
    total = None
    with _eager(model):
        for sample, (first, end) in zip(samples, spans, strict=True):
            ids = torch.tensor([sample.input_ids], device=model.device)
            needle = set(sample.input_ids[first:end]) & set(sample.answer_ids)
            if not needle:
                raise ValueError(
                    "retrieval_scores: every needle must share tokens with its answer, got one that shares none"
                )
            start = len(sample.prompt_ids) - 1
            attentions = model(input_ids=ids, use_cache=False, output_attentions=True, logits_to_keep=1).attentions
            layers = []
            for attention in attentions:  # [1, H, S, S]
                place = attention[0, :, start : len(sample) - 1].argmax(-1)  # [H, answer tokens]
                copied = ids[0][place] == ids[0, start + 1 :]
                hits = copied & (place >= first) & (place < end)
                written = ids[0, start + 1 :].expand_as(hits)
                layers.append(
                    [len(set(row[hit].tolist()) & needle) / len(needle) for row, hit in zip(written, hits, strict=True)]
                )
            score = torch.tensor(layers)
            total = score if total is None else total + score
    return total / len(samples)


def needle_span(tokenizer, sample, fact: str) -> tuple[int, int]:
    """The token positions of ``fact`` in a sample's prompt: where the decoded prompt first holds it.

    Raises:
        ValueError: it is not there.
    """
    pieces = [tokenizer.decode([token]) for token in sample.prompt_ids]
    text, starts = "", []
    for piece in pieces:
        starts.append(len(text))
        text += piece
    at = text.find(fact)
    if at < 0:
        raise ValueError(f"needle_span: the prompt must hold the fact, got a prompt without {fact!r}")
    inside = [i for i, start in enumerate(starts) if start + len(pieces[i]) > at and start < at + len(fact)]
    return inside[0], inside[-1] + 1


@contextlib.contextmanager
def _eager(model):
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
