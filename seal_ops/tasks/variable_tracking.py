"""Variable tracking, after RULER (Hsieh et al., 2024): which names were given one value, directly or through others."""

import random
import re
import string

from .base import Task
from .haystack import FILLERS, filler

HEADER = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n"
QUESTION = "\nQuestion: Find all variables that are assigned the value {value} in the text above.\n"
ANSWER = "{count} variables are assigned the value {value}, they are: {names}"


class Variables(Task):
    """Chains ``VAR A = 12345``, ``VAR B = VAR A``, ... in filler; all names of one chain are asked.

    Args:
        chains: chains in the text; one of them is asked.
        hops: assignments behind the first of a chain.
        filler: "noise" or "prose".

    The score is ``|named and right| / |named or right|`` over the variables of the text that an output names, so that
    naming all of them does not pay (RULER scores the share of right ones alone).  ``meta``: ``value``, ``variables``,
    ``others``.
    """

    name = "variables"
    item = "sentence of filler"

    def __init__(self, chains: int = 2, hops: int = 4, filler: str = "noise"):
        for option, value in (("chains", chains), ("hops", hops)):
            if not isinstance(value, int) or not 1 <= value <= 100:
                raise ValueError(f"seal_ops.tasks.variables: {option} must be an integer from 1 to 100, got {value!r}")
        if filler not in FILLERS:
            raise ValueError(f"seal_ops.tasks.variables: filler must be one of {', '.join(FILLERS)}, got {filler!r}")
        self.chains, self.hops, self.filler = chains, hops, filler
        self.max_new_tokens = 40 + 8 * (hops + 1)

    def write(self, rng, num_items, *, index, split):
        names, values = [], []
        while len(names) < self.chains * (self.hops + 1):
            name = "".join(rng.choice(string.ascii_uppercase) for _ in range(5))
            # Which half of the names a sample may use depends on the split: no test name was seen in training.
            if sum(map(ord, name)) % 2 == (split == "test") and name not in names:
                names.append(name)
        while len(values) < self.chains:
            value = rng.randint(10_000, 99_999)
            if value not in values:
                values.append(value)
        chains = [names[i :: self.chains] for i in range(self.chains)]
        hidden = []
        for chain, value in zip(chains, values, strict=True):
            places = sorted(rng.random() for _ in chain)  # an assignment stands behind the one it refers to
            sources = [str(value), *(f"VAR {name}" for name in chain)]
            hidden += [(p, f"VAR {n} = {s}.") for p, n, s in zip(places, chain, sources, strict=False)]
        sentences = filler(self.filler, random.Random(rng.random()), num_items)
        for place, sentence in sorted(hidden, reverse=True):
            sentences.insert(round(place * num_items), sentence)
        body = "".join(" " + sentence for sentence in sentences)
        answer = ANSWER.format(count=len(chains[0]), value=values[0], names=" ".join(chains[0]))
        meta = {"value": values[0], "variables": chains[0], "others": [n for c in chains[1:] for n in c]}
        return HEADER + body + QUESTION.format(value=values[0]), answer, meta

    def score(self, sample, text):
        named = set(re.findall(r"\b[A-Z]{5}\b", text)) & {*sample.meta["variables"], *sample.meta["others"]}
        right = set(sample.meta["variables"])
        return len(named & right) / len(named | right)
