"""How an output is read, from token ids to the text that is scored: the same for a label and for what a model
writes."""

from __future__ import annotations

from collections.abc import Collection, Sequence

OPEN, CLOSE = "<think>", "</think>"  # around what a model writes for itself before its answer


def read_output(tokenizer, ids: Sequence[int], ends: Collection[int], stop: str | None, opened: bool = False) -> str:
    """The answer in an output: up to the first id of ``ends``, decoded without special tokens, and then
    :func:`final_answer`."""
    cut = next((i for i, token in enumerate(ids) if token in ends), None)
    return final_answer(tokenizer.decode(ids[:cut], skip_special_tokens=True), stop, opened)


def final_answer(text: str, stop: str | None, opened: bool = False) -> str:
    """The answer in a text: what follows the reasoning, without leading white space, up to ``stop`` (None: to the end).

    ``opened``: the prompt ended inside a reasoning block. Reasoning that has not come to its end holds no answer: "".
    """
    _, closed, answer = text.rpartition(CLOSE)
    if not closed and (opened or text.lstrip().startswith(OPEN)):
        return ""
    answer = answer.lstrip()
    return answer if stop is None else answer.partition(stop)[0]


def opens_reasoning(text: str) -> bool:
    """Whether a prompt ends inside a reasoning block."""
    return text.rfind(OPEN) > text.rfind(CLOSE)
