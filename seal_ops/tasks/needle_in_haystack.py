"""Needle in a haystack as SEAL (arXiv 2501.15225) trains it: an invented sentence in filler, and a question for its
end.

A needle starts with what the question asks and ends with the answer, and nothing of it is knowledge of the world.
Towns, and with them needles, of test samples never occur in training.
"""

from .haystack import Haystack
from .vocabulary import ADJECTIVES, NOUNS

HEADER = "Read the following text. I will ask you a question about it afterwards.\n"
FACT = "The {what} of the {who} of {town} is {answer}."
QUESTION = "\nAnswer with one sentence of the text: what is the {what} of the {who} of {town}?\n"

WHAT = (
    "favourite breakfast", "lucky charm", "secret password", "first invention", "oldest possession", "evening habit",
    "family emblem", "birthday present", "only fear", "best disguise",
)  # fmt: skip
WHO = (
    "lighthouse keeper", "night watchman", "chief astronomer", "bridge builder", "youngest judge", "retired pilot",
    "clock repairer", "royal gardener", "map maker", "piano tuner",
)  # fmt: skip
_START = (
    "Bran",
    "Cal",
    "Dor",
    "Elm",
    "Fen",
    "Gar",
    "Hol",
    "Ist",
    "Kel",
    "Lor",
    "Mar",
    "Nor",
    "Ost",
    "Pel",
    "Quen",
    "Rav",
)
_END = (
    "bury",
    "dale",
    "eth",
    "ford",
    "gate",
    "heim",
    "low",
    "mere",
    "ness",
    "ova",
    "pool",
    "ridge",
    "stow",
    "ton",
    "wick",
)


class Needle(Haystack):
    """One invented sentence in filler; the target is the sentence.

    An output is right when it holds the needle's last part (``meta["expected"]``), capitals and spaces apart.
    """

    name = "needle"

    def hide(self, rng, split):
        towns = [a + b for i, a in enumerate(_START) for j, b in enumerate(_END) if (i + j) % 2 == (split == "test")]
        first, second = rng.sample(ADJECTIVES, 2)
        expected = " and ".join(f"{_article(a)} {a} {rng.choice(NOUNS)}" for a in (first, second))
        blanks = {"what": rng.choice(WHAT), "who": rng.choice(WHO), "town": rng.choice(towns)}
        fact = FACT.format(answer=expected, **blanks)
        return HEADER, [fact], [], QUESTION.format(**blanks), fact, {"expected": expected}

    def score(self, sample, text):
        return float(_plain(sample.meta["expected"]) in _plain(text))


def _article(word):
    return "an" if word[0] in "aeiou" else "a"


def _plain(text):
    return " ".join(text.lower().split())
