"""Each task in other words: what was learned from a task's own wording is measured on these, and the other way round.

The facts, their depths and the scores stay; header, facts and question are said differently, so that a text shares no
sentence with the task's own.
"""

import re

from .base import Task

# Of each task: pairs (a pattern in its own wording, what stands there instead); the answer is scored by content alone.
_OTHER = {
    "lines": [
        (r"Below is a record of lines.*?Now the record start:",
         "Here is a register. Each entry has a name and a stored value."),
        (r"line ([a-z-]+): REGISTER_CONTENT is <(\d+)>", r"Entry \1 stores the value \2."),
        (r"Now the record is over\. Tell me what is the <REGISTER_CONTENT> in line ([a-z-]+)\? I need the number\.",
         r"That was the register. Which value does the entry \1 store?"),
    ],
    "passkey": [
        (r"There is an important info.*?information there\.",
         "Somewhere in the pages below a code for the safe is written down."),
        (r"The pass key is (\d+)\. Remember it\. \d+ is the pass key\.", r"To open the safe, dial \1."),
        (r"What is the pass key\?", "Which number opens the safe?"),
    ],
    "magic": [
        (r"Some special magic numbers.*?afterwards\.", "The notes below give the account numbers of some customers."),
        (r"One of the special magic numbers for ([a-z-]+) is: (\d+)\.", r"Customer \1 holds account \2."),
        (r"What is the special magic number for ([a-z-]+) mentioned in the provided text\?",
         r"Which account does customer \1 hold according to the notes?"),
        (r"What are all the special magic numbers for ([a-z-]+) mentioned in the provided text\?",
         r"Which accounts does customer \1 hold according to the notes? Name all of them."),
    ],
    "needle": [
        (r"Read the following text\. I will ask you a question about it afterwards\.", "Study this report with care."),
        (r"Answer with one sentence of the text: what is the (.+?) of the (.+?) of (\w+)\?",
         r"According to the report, which is the \1 that the \2 of \3 has?"),
    ],
    "variables": [
        (r"Memorize and track the chain\(s\) of variable assignment hidden in the following text\.",
         "The following text sets some variables, directly or from one another."),
        (r"VAR ([A-Z]{5}) = VAR ([A-Z]{5})\.", r"Let \1 equal \2."),
        (r"VAR ([A-Z]{5}) = (\d+)\.", r"Let \1 equal \2."),
        (r"Question: Find all variables that are assigned the value (\d+) in the text above\.",
         r"List every variable that equals \1 in the end."),
    ],
}  # fmt: skip
for _name in ("multikey", "multivalue"):
    _OTHER[_name] = _OTHER["magic"]


def names() -> list[str]:
    """Names of the tasks that have another wording."""
    return list(_OTHER)


class Reworded(Task):
    """A task with its other wording; named ``NAME, reworded``, with random numbers of its own.

    Raises:
        ValueError: the task has no other wording.
    """

    def __init__(self, task: Task):
        if task.name not in _OTHER:
            raise ValueError(f"tasks.Reworded: task must be one of {', '.join(_OTHER)}, got {task.name!r}")
        self.task, self.name = task, f"{task.name}, reworded"
        self.item, self.max_new_tokens, self.reserve, self.stop = (
            task.item,
            task.max_new_tokens,
            task.reserve,
            task.stop,
        )

    def write(self, rng, num_items, *, index, split):
        prompt, answer, meta = self.task.write(rng, num_items, index=index, split=split)
        for pattern, replacement in _OTHER[self.task.name]:
            prompt, answer = (re.sub(pattern, replacement, text, flags=re.DOTALL) for text in (prompt, answer))
        return prompt, answer, meta

    def score(self, sample, text):
        return self.task.score(sample, text)
