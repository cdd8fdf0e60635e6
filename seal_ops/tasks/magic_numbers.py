"""Magic numbers for keys among filler, after the needle tasks of RULER (Hsieh et al., 2024).

Three tasks in one class: ``magic`` (one key in the text), ``multikey`` (several keys, one asked), ``multivalue`` (one
key with several values, all asked).  Keys of test samples never occur in training.
"""

import re

from .haystack import Haystack
from .passkey_retrieval import draw_number
from .vocabulary import ADJECTIVES, NOUNS

HEADER = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize them. "
    "I will quiz you about the numbers afterwards.\n"
)
FACT = "One of the special magic numbers for {key} is: {number}."
QUESTION = "\nWhat is the special magic number for {key} mentioned in the provided text?\n"
QUESTIONS = "\nWhat are all the special magic numbers for {key} mentioned in the provided text?\n"
ANSWER = "The special magic number for {key} mentioned in the provided text is {number}."
ANSWERS = "The special magic numbers for {key} mentioned in the provided text are {numbers}."


def draw_keys(rng, split: str, count: int) -> list[str]:
    """``count`` distinct keys ``{adjective}-{noun}``; training and test share none."""
    pairs = [(a, n) for a in range(len(ADJECTIVES)) for n in range(len(NOUNS)) if (a + n) % 2 == (split == "test")]
    return [f"{ADJECTIVES[a]}-{NOUNS[n]}" for a, n in rng.sample(pairs, count)]


class MagicNumbers(Haystack):
    """Facts ``One of the special magic numbers for {key} is: {number}.`` in filler.

    Args:
        keys: how many keys the text holds, the asked one included.
        values: how many numbers the asked key has.
        filler, depths: see :class:`seal_ops.tasks.haystack.Haystack`.

    The score is the share of the asked numbers that occur in the output.  ``meta``: ``key``, ``numbers``, ``depth``.
    """

    name = "magic"

    def __init__(self, keys: int = 1, values: int = 1, filler: str = "noise", depths: int = 10, name: str = "magic"):
        self.name = name
        for option, value, most in (("keys", keys, 5000), ("values", values, 1000)):
            if not isinstance(value, int) or not 1 <= value <= most:
                raise ValueError(f"seal_ops.tasks.{name}: {option} must be an integer from 1 to {most}, got {value!r}")
        super().__init__(filler, depths)
        self.keys, self.values = keys, values
        self.max_new_tokens = 40 + 16 * values

    def hide(self, rng, split):
        key, *others = draw_keys(rng, split, self.keys)
        numbers = []
        while len(numbers) < self.values:
            number = draw_number(rng, split)
            if number not in numbers:
                numbers.append(number)
        asked = [FACT.format(key=key, number=number) for number in numbers]
        others = [FACT.format(key=other, number=draw_number(rng, split)) for other in others]
        if self.values == 1:
            question, answer = QUESTION.format(key=key), ANSWER.format(key=key, number=numbers[0])
        else:
            listed = ", ".join(map(str, numbers[:-1])) + f" and {numbers[-1]}"
            question, answer = QUESTIONS.format(key=key), ANSWERS.format(key=key, numbers=listed)
        return HEADER, asked, others, question, answer, {"key": key, "numbers": numbers}

    def score(self, sample, text):
        found = set(map(int, re.findall(r"\d+", text)))
        numbers = sample.meta["numbers"]
        return sum(number in found for number in numbers) / len(numbers)
