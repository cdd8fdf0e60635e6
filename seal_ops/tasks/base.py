"""What a task is: generated prompts that fill a token length, their answers, and how an output is scored.

A task is one class in one file.  It writes the text for ``num_items`` items (lines, sentences, paragraphs,
whatever it repeats) and scores an output; finding the number of items that fills a token length, the chat format, the
label mask and the seeds are done for it, for any tokenizer::

    class Colours(Task):
        name = "colours"

        def write(self, rng, num_items, *, index, split):
            colour = rng.choice(["red", "green", "blue"])
            filler = "The sky is far away. " * num_items
            return f"{filler}The ball is {colour}. {filler}What colour is the ball?\\n", f"It is {colour}.", {}

        def score(self, sample, text):
            return float(sample.answer in text)
"""

import random
from collections.abc import Iterator
from dataclasses import replace

from ..utils.arguments import integer
from ..utils.progress import track
from .encoding import Encoder
from .sample import Sample

SPLITS = ("train", "test")


class Task:
    """Base of every task: see the module's docstring for a whole one.

    Attributes:
        name: how commands and result files call the task.
        item: what one item is called in messages.
        max_new_tokens: the most that an output may be long.
        reserve: tokens kept free behind the answer within the length.
        stop: an answer ends at this text (leading white space and reasoning apart) besides the end token; None for
            never.
    """

    name = ""
    item = "item"
    max_new_tokens = 100
    reserve = 16
    stop: str | None = "\n"

    def write(self, rng: random.Random, num_items: int, *, index: int, split: str) -> tuple[str, str, dict]:
        """The text of one sample with ``num_items`` items.

        Called several times with equal random numbers and different ``num_items`` until the length fits.

        Args:
            rng: the only source of randomness, seeded by task, split, seed, length and index.
            num_items: how many items to write, at least 1.
            index: number of the sample, for what should vary evenly (depths).
            split: "train" or "test", for what must not be shared between them (needles).

        Returns:
            ``(prompt, answer, meta)``; ``meta`` is a dict of JSON values.
        """
        raise NotImplementedError(f"{type(self).__name__} must define write() or generate()")

    def score(self, sample: Sample, text: str) -> float:
        """Score of an output in [0, 1]; 1 is a correct answer."""
        raise NotImplementedError(f"{type(self).__name__} must define score()")

    def generate(
        self,
        tokenizer,
        length: int,
        samples: int = 50,
        seed: int = 0,
        *,
        split: str = "train",
        chat_template=None,
        chat_template_kwargs: dict | None = None,
        progress: bool | None = None,
    ) -> list[Sample]:
        """Samples whose prompt, answer and ``reserve`` tokens fill ``length`` tokens as far as whole items allow.

        Args:
            tokenizer: a Hugging Face tokenizer.
            length: tokens a sample may take.
            samples: how many.
            seed: equal seeds give equal samples; a longer list starts with the shorter one.
            split: "train" or "test"; their random numbers never meet, whatever the seeds.
            chat_template, chat_template_kwargs: see :class:`Encoder`.
            progress: draw a bar; None draws where stderr is a terminal, unless an outer step has a bar.

        Raises:
            ValueError: the length is too short for one item, or the tokenizer cannot write an answer
                (:meth:`Encoder.check`).
        """
        if split not in SPLITS:
            raise ValueError(f"seal_ops.tasks.{self.name}: split must be one of {', '.join(SPLITS)}, got {split!r}")
        call = f"seal_ops.tasks.{self.name}"
        length, samples = integer(call, "length", length, 1), integer(call, "samples", samples, 1)
        seed = integer(call, "seed", seed)
        encoder = Encoder(tokenizer, chat_template, call, chat_template_kwargs)
        drawn = self._stream(encoder, length, samples, seed, split)
        drawn = (replace(sample, meta={"task": self.name, "length": length, **sample.meta}) for sample in drawn)
        return list(track(drawn, samples, f"{self.name}: writing samples of {length} tokens", progress))

    def __call__(self, tokenizer, length: int = 31_000, samples: int = 50, seed: int = 0, **options) -> list[Sample]:
        """:meth:`generate` with the paper's training length as default."""
        return self.generate(tokenizer, length, samples, seed, **options)

    def _stream(self, encoder, length, samples, seed, split) -> Iterator[Sample]:
        num_items = None
        for index in range(samples):
            key = f"{self.name}/{split}/{seed}/{length}/{index}"

            def draw(count, key=key, index=index):
                prompt, answer, meta = self.write(random.Random(key), count, index=index, split=split)
                prompt_ids, answer_ids = encoder(prompt, answer)
                return Sample(prompt_ids, answer_ids, prompt, answer, {"index": index, "num_items": count, **meta})

            sample = self._fill(draw, length, num_items)
            encoder.check(sample, self)
            num_items = sample.meta["num_items"]
            yield sample

    def _fill(self, draw, length, guess):
        """The sample with the most items that fits: a search from ``guess`` over a count that is nearly linear."""
        low, best = 0, None  # the most items known to fit, with its sample
        high = None  # the fewest items known not to fit
        count = guess or 1
        while high is None or high - low > 1:
            sample = draw(count)
            free = length - self.reserve - len(sample)
            if free >= 0:
                low, best = count, sample
            else:
                high = count
            if guess is None and low == 0:
                break  # not even one item
            # Aim by the mean size of an item, which counts the fixed text too and so falls short rather than beyond.
            step = int(free / (len(sample) / count))
            aim = count + step if step else count + (1 if free >= 0 else -1)
            count = max(low + 1, aim if high is None else min(aim, high - 1))
            guess = guess or count
        if best is None:
            needed = len(draw(1)) + self.reserve
            raise ValueError(
                f"seal_ops.tasks.{self.name}: length must be at least {needed} tokens to hold one {self.item}, got {length}"  # noqa: E501
            )
        return best
