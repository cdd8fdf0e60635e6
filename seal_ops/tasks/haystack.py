"""Filler text, and the base of tasks that hide sentences in it.

Two fillers, both free of rights and made here: "noise" repeats five short sentences, as passkey tests do (Mohtashami
and Jaggi, 2023); "prose" writes sentences from a small grammar, so that no two paragraphs are equal and none says
anything about the world that a model could know.
"""

import random

from .base import Task

NOISE = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)

_PEOPLE = (
    "the ferryman",
    "an old teacher",
    "the baker's niece",
    "a travelling clockmaker",
    "the new librarian",
    "her neighbour",
    "a group of students",
    "the captain",
    "his younger brother",
    "the gardener",
    "a tired postman",
    "the two painters",
    "the mayor",
    "a quiet visitor",
    "the night nurse",
    "the carpenter",
)
_DEEDS = (
    "walked along the harbour",
    "repaired the wooden gate",
    "waited for the morning train",
    "counted the empty chairs",
    "wrote a long letter",
    "carried the boxes upstairs",
    "listened to the rain",
    "talked about the harvest",
    "looked for a missing glove",
    "closed the shutters",
    "painted the fence again",
    "sat under the chestnut tree",
    "bought bread and salt",
    "told the same story twice",
    "crossed the narrow bridge",
    "forgot to lock the shed",
)
_TIMES = (
    "before sunrise", "late in the evening", "on the first day of spring", "after the meeting", "during the long winter",  # noqa: E501
    "while the kettle boiled", "as soon as the fog lifted", "for the third time that week", "a little after noon",
    "when nobody was looking", "between two showers", "at the end of the market",
)  # fmt: skip
_CLOSINGS = (
    "Nobody thought much of it.", "It took longer than expected.", "The weather did not help.",
    "That was enough for one day.", "Some said it had always been so.", "The dog slept through all of it.",
    "In the end it made little difference.", "There was still a smell of smoke in the air.",
)  # fmt: skip
FILLERS = ("prose", "noise")


def filler(kind: str, rng: random.Random, sentences: int) -> list[str]:
    """``sentences`` sentences of filler; a longer text starts with the shorter one of an equal ``rng``."""
    if kind == "noise":
        start = int(rng.random() * len(NOISE))
        return [NOISE[(start + i) % len(NOISE)] for i in range(sentences)]
    found = []
    for _ in range(sentences):
        if rng.random() < 0.2:
            found.append(rng.choice(_CLOSINGS))
            continue
        who, did, when = rng.choice(_PEOPLE), rng.choice(_DEEDS), rng.choice(_TIMES)
        text = f"{when}, {who} {did}." if rng.random() < 0.4 else f"{who} {did} {when}."
        found.append(text[0].upper() + text[1:])
    return found


class Haystack(Task):
    """A task that hides facts among filler sentences; an item is one sentence of filler.

    Args:
        filler: "prose" or "noise".
        depths: sample ``i`` is asked for a fact at depth ``(i mod depths) / (depths - 1)``: 0 is the text's start, 1
            its end. One depth means the middle.

    A subclass defines :meth:`hide`.
    """

    item = "sentence of filler"

    def __init__(self, filler: str = "prose", depths: int = 10):
        if filler not in FILLERS:
            raise ValueError(f"seal_ops.tasks.{self.name}: filler must be one of {', '.join(FILLERS)}, got {filler!r}")
        if not isinstance(depths, int) or depths < 1:
            raise ValueError(f"seal_ops.tasks.{self.name}: depths must be an integer of at least 1, got {depths!r}")
        self.filler, self.depths = filler, depths

    def hide(self, rng: random.Random, split: str) -> tuple[str, list[str], list[str], str, str, dict]:
        """What is hidden: ``(header, asked, others, question, answer, meta)``.

        ``asked`` are the sentences that hold the answer (the first of them lies at the sample's depth, more are
        scattered), ``others`` distractors.
        """
        raise NotImplementedError(f"{type(self).__name__} must define hide()")

    def write(self, rng, num_items, *, index, split):
        header, asked, others, question, answer, meta = self.hide(rng, split)
        depth = 0.5 if self.depths == 1 else (index % self.depths) / (self.depths - 1)
        places = [depth] + [rng.random() for _ in range(len(asked) + len(others) - 1)]
        sentences = filler(self.filler, random.Random(rng.random()), num_items)
        # From the back, so that an insertion moves no later place; equal places keep their order.
        hidden = sorted(zip(places, asked + others, strict=True), key=lambda pair: pair[0], reverse=True)
        for place, sentence in hidden:
            sentences.insert(round(place * num_items), sentence)
        body = "".join(" " + sentence for sentence in sentences)
        return header + body + question, answer, {**meta, "depth": depth}
