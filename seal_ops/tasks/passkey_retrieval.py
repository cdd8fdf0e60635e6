"""Passkey retrieval in the wording of Mohtashami and Jaggi (2023): one number in a text that says nothing else."""

import re

from .haystack import Haystack

HEADER = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there.\n"
)
FACT = "The pass key is {number}. Remember it. {number} is the pass key."
QUESTION = "\nWhat is the pass key?\n"
ANSWER = "The pass key is {number}."
MAX_NUMBER = 50_000


def draw_number(rng, split: str) -> int:
    """A number of 1..50000; training and test share none (digit sums even and odd, which biases no single digit)."""
    while True:
        number = rng.randint(1, MAX_NUMBER)
        if sum(map(int, str(number))) % 2 == (split == "test"):
            return number


class Passkey(Haystack):
    """One pass key in filler.  ``meta``: ``number``, ``depth``.

    An output is right when its last run of digits is the number.
    """

    name = "passkey"

    def __init__(self, filler: str = "noise", depths: int = 10):
        super().__init__(filler, depths)

    def hide(self, rng, split):
        number = draw_number(rng, split)
        fact, answer = FACT.format(number=number), ANSWER.format(number=number)
        return HEADER, [fact], [], QUESTION, answer, {"number": number}

    def score(self, sample, text):
        digits = re.findall(r"\d+", text)
        return float(bool(digits) and int(digits[-1]) == sample.meta["number"])
