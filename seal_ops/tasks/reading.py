"""How an output is read, from token ids to the text that is scored; one reading for labels and for generated text."""
from __future__ import annotations

from collections.abc import Collection, Sequence

OPEN, CLOSE = "<think>", "</think>"  # around the reasoning of models that reason


def read_output(tokenizer, ids: Sequence[int], ends: Collection[int], stop: str | None, prompt: Sequence[int] = ()) -> tuple[str, bool]:
    """The text of an output, and whether it has ended.

    Args:
        ids: token ids of the output.
        ends: ids that end it; what follows the first of them does not count.
        stop: text at which the answer ends; it is cut off. None for none.
        prompt: token ids before the output: they tell whether it begins inside a reasoning block.

    Returns:
        The answer without special tokens, without leading white space and without the reasoning before it. Where the
        reasoning has not come to its end the answer is what there is, but ``stop`` does not end it.
    """
    cut = next((i for i, token in enumerate(ids) if token in ends), None)
    text = tokenizer.decode(ids[:cut], skip_special_tokens=True)
    before, closed, answer = text.rpartition(CLOSE)
    if not closed and (OPEN in text or reasons(tokenizer, prompt)):
        return text.lstrip(), cut is not None
    answer = answer.lstrip()
    ended = cut is not None or (stop is not None and stop in answer)
    return (answer.partition(stop)[0] if stop is not None else answer), ended


def reasons(tokenizer, prompt: Sequence[int]) -> bool:
    """Whether a prompt ends inside a reasoning block."""
    tail = tokenizer.decode(list(prompt)[-16:], skip_special_tokens=False) if len(prompt) else ""
    return tail.rfind(OPEN) > tail.rfind(CLOSE)
