"""Common-word extraction, after RULER (Hsieh et al., 2024): which words of a long numbered list occur most often."""

import re

from .base import Task
from .vocabulary import ADJECTIVES, NOUNS

HEADER = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n"
)
QUESTION = "\nWhat are the {common} words that appear most often in the above list?\n"
ANSWER = "The {common} words that appear most often in the list are: {words}"
RARE = 3  # occurrences of a word that is not common


class CommonWords(Task):
    """A numbered list in which ``common`` words occur more often than all others; an item is one other entry.

    Args:
        common: how many words are asked for.
        repeats: occurrences of each of them at most; shorter lists have fewer, always more than of any other word.

    The score is the share of the common words among the first ``common`` distinct words of the output (RULER counts
    them anywhere in it).  ``meta``: ``words``, ``repeats``.
    """

    name = "words"
    item = "entry"

    def __init__(self, common: int = 10, repeats: int = 30):
        if not isinstance(common, int) or not 1 <= common <= 100:
            raise ValueError(f"seal_ops.tasks.common_words: common must be an integer from 1 to 100, got {common!r}")
        if not isinstance(repeats, int) or repeats <= RARE:
            raise ValueError(f"seal_ops.tasks.common_words: repeats must be an integer above {RARE}, got {repeats!r}")
        self.common, self.repeats = common, repeats
        self.max_new_tokens = 40 + 10 * common

    def write(self, rng, num_items, *, index, split):
        # In a short list a third of the entries is common; `num_items` counts the others, so that any number fits.
        repeats = max(RARE + 1, min(self.repeats, num_items // (2 * self.common)))
        distinct = len(ADJECTIVES) * len(NOUNS)
        pool = [f"{ADJECTIVES[k // len(NOUNS)]}-{NOUNS[k % len(NOUNS)]}" for k in rng.sample(range(distinct), distinct)]
        words, rest = pool[: self.common], pool[self.common :]
        if num_items > RARE * len(rest):
            raise ValueError(
                f"seal_ops.tasks.common_words: length must ask for at most {RARE * len(rest)} entries, got {num_items}"
            )
        rare = [rest[i // RARE] for i in range(num_items)]
        entries = words * repeats + rare
        rng.shuffle(entries)
        listed = " ".join(f"{i}. {word}" for i, word in enumerate(entries, 1))
        answer = ANSWER.format(common=self.common, words=" ".join(f"{i}. {w}" for i, w in enumerate(words, 1)))
        return HEADER + listed + QUESTION.format(common=self.common), answer, {"words": words, "repeats": repeats}

    def score(self, sample, text):
        named = list(dict.fromkeys(re.findall(r"[a-z]+-[a-z]+", text.lower())))[: len(sample.meta["words"])]
        return sum(word in named for word in sample.meta["words"]) / len(sample.meta["words"])
