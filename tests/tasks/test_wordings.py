"""Tasks in other words: the same facts and scores, no sentence shared."""

import random

import pytest

from seal_ops import tasks
from seal_ops.tasks import wordings
from seal_ops.tasks.wordings import Reworded

MAGIC = ("special magic number", "memorize", "mentioned in the provided text")
OWN = {  # what no other wording may hold
    "lines": ("REGISTER_CONTENT", "record", "Tell me"), "passkey": ("pass key", "important info", "Remember"),
    "needle": ("Read the following text", "Answer with one sentence"), "variables": ("VAR ", "assign", "track"),
    "magic": MAGIC, "multikey": MAGIC, "multivalue": MAGIC,
}  # fmt: skip


@pytest.mark.parametrize("name", wordings.names())
def test_facts_stay_and_words_do_not(name):
    task = tasks.get(name)
    own, answer, meta = task.write(random.Random(3), 6, index=2, split="test")
    other, other_answer, other_meta = Reworded(task).write(random.Random(3), 6, index=2, split="test")
    assert meta == other_meta
    facts = [
        *meta.get("numbers", ()),
        *meta.get("variables", ()),
        *(meta[key] for key in ("key", "number", "value") if key in meta),
    ]
    assert facts and all(str(fact) in other for fact in facts) or name == "needle" and meta["expected"] in other
    for words in OWN[name]:
        assert words in own and words not in other, words
    sample = tasks.Sample([1], [1], other, other_answer, other_meta)
    assert Reworded(task).score(sample, other_answer) == 1 and Reworded(task).score(sample, "") == 0


def test_only_tasks_with_another_wording():
    with pytest.raises(ValueError, match="task must be one of lines, .*, got 'threads'"):
        Reworded(tasks.threads)
