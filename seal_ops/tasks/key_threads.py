"""Key threads, after Needle Threading (Roberts et al., 2024): a value is the next key, and the last value is asked."""

import json
import re

from .base import Task
from .vocabulary import ADJECTIVES, NOUNS

HEADER = (
    "The following JSON object has one key and one value on each line. Some values are keys of the object themselves.\n"
)
QUESTION = (
    '\nStart at the key "{start}". Look up its value; where the value is a key of the object, look that up in turn, '
    "and so on. What is the last value, which is not a key?\n"
)
ANSWER = "The last value is {last}."
DIRECTIONS = ("forward", "backward", "random")


class KeyThreads(Task):
    """A JSON object with a thread of ``hops`` look-ups in it; an item is one pair beside the thread.

    Args:
        hops: look-ups from the first key to the last value; 1 is plain key-value retrieval.
        direction: order of the thread's pairs in the object: "forward", "backward" or "random".

    ``meta``: ``start``, ``last``, ``depth`` (place of the thread's last pair).  An output is right when the last key or
    value in it is the thread's.
    """

    name = "threads"
    item = "pair"

    def __init__(self, hops: int = 2, direction: str = "random"):
        if not isinstance(hops, int) or not 1 <= hops <= 100:
            raise ValueError(f"seal_ops.tasks.threads: hops must be an integer from 1 to 100, got {hops!r}")
        if direction not in DIRECTIONS:
            raise ValueError(
                f"seal_ops.tasks.threads: direction must be one of {', '.join(DIRECTIONS)}, got {direction!r}"
            )
        self.hops, self.direction = hops, direction

    def write(self, rng, num_items, *, index, split):
        most = (len(ADJECTIVES) * len(NOUNS) - self.hops - 1) // 2
        if num_items > most:
            raise ValueError(
                f"seal_ops.tasks.threads: length must ask for at most {most} pairs (distinct words), got {num_items}"
            )
        drawn = rng.sample(range(len(ADJECTIVES) * len(NOUNS)), 2 * num_items + self.hops + 1)
        words = [f"{ADJECTIVES[k // len(NOUNS)]}-{NOUNS[k % len(NOUNS)]}" for k in drawn]
        thread = words[: self.hops + 1]
        pairs = list(zip(words[self.hops + 1 :: 2], words[self.hops + 2 :: 2], strict=True))
        links = list(zip(thread, thread[1:], strict=False))
        order = {"forward": links, "backward": links[::-1], "random": rng.sample(links, len(links))}[self.direction]
        places = sorted((rng.random() for _ in links), reverse=True)
        for place, link in zip(
            places, reversed(order), strict=True
        ):  # from the back: an insertion moves no later place
            pairs.insert(round(place * num_items), link)
        record = "{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in pairs) + "\n}\n"
        meta = {
            "start": thread[0],
            "last": thread[-1],
            "hops": self.hops,
            "depth": pairs.index(links[-1]) / max(len(pairs) - 1, 1),
        }
        return HEADER + record + QUESTION.format(start=thread[0]), ANSWER.format(last=thread[-1]), meta

    def score(self, sample, text):
        named = re.findall(r"[a-z]+-[a-z]+", text.lower())
        return float(bool(named) and named[-1] == sample.meta["last"])
