"""Line retrieval in the wording of LongEval (Li et al., 2023): the value of one line among as many as fit.

The wording is LongEval's, keys are drawn from :mod:`seal_ops.tasks.vocabulary`.  An output is right when its last run
of digits is the number, as LongEval scores it.
"""

import re

from .base import Task
from .vocabulary import ADJECTIVES, NOUNS

HEADER = (
    "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' and contains a "
    "'<REGISTER_CONTENT>' at the end of the line as a numerical value. For each line index, memorize its corresponding "
    "<REGISTER_CONTENT>. At the end of the record, I will ask you to retrieve the corresponding <REGISTER_CONTENT> of a "  # noqa: E501
    "certain line index. Now the record start:\n\n"
)
QUESTION = "\nNow the record is over. Tell me what is the <REGISTER_CONTENT> in line {key}? I need the number.\n"
ANSWER = "The <REGISTER_CONTENT> in line {key} is {number}."
MAX_NUMBER = 50_000


class LineRetrieval(Task):
    """``line {adjective}-{noun}: REGISTER_CONTENT is <{1..50000}>``, and the question for one of the lines.

    ``meta``: ``key``, ``number``, ``line`` (which line was asked, from 0), ``depth`` (its place in [0, 1]: 0 is the
    first line, farthest from the question).
    """

    name = "lines"
    item = "line"

    def write(self, rng, num_items, *, index, split):
        if num_items > len(ADJECTIVES) * len(NOUNS):
            raise ValueError(
                f"seal_ops.tasks.lines: length must ask for at most {len(ADJECTIVES) * len(NOUNS)} lines (distinct keys), "  # noqa: E501
                f"got {num_items} lines"
            )
        line = int(rng.random() * num_items)
        keys = [
            f"{ADJECTIVES[k // len(NOUNS)]}-{NOUNS[k % len(NOUNS)]}"
            for k in rng.sample(range(len(ADJECTIVES) * len(NOUNS)), num_items)
        ]
        numbers = [rng.randint(1, MAX_NUMBER) for _ in keys]
        record = "".join(f"line {k}: REGISTER_CONTENT is <{n}>\n" for k, n in zip(keys, numbers, strict=True))
        key, number = keys[line], numbers[line]
        meta = {"key": key, "number": number, "line": line, "depth": line / max(num_items - 1, 1)}
        return HEADER + record + QUESTION.format(key=key), ANSWER.format(key=key, number=number), meta

    def score(self, sample, text):
        digits = re.findall(r"\d+", text)
        return float(bool(digits) and int(digits[-1]) == sample.meta["number"])
