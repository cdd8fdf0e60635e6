"""The samples of a study's jobs, which processes of their own draw ahead."""

import multiprocessing
import os
import signal
from collections.abc import Iterable
from concurrent.futures import Future, ProcessPoolExecutor

import torch

from ... import tasks
from ...huggingface.loading import load_tokenizer
from ...tasks.base import Task
from ...tasks.sample import Sample
from ...tasks.wordings import Reworded

REWORDED = "reworded "


def named(task: str) -> Task:
    """A task by name; ``"reworded NAME"`` is its other wording."""
    return Reworded(tasks.get(task.removeprefix(REWORDED))) if task.startswith(REWORDED) else tasks.get(task)


class Samples:
    """Samples by ``(task, length, count, seed, split)``, drawn by ``workers`` processes (0: when they are asked for).

    Drawing one of 8,000 tokens takes a tenth of a second, more than a small model takes to read it.
    """

    def __init__(self, model: str, workers: int):
        self.tokenizer = load_tokenizer(model, "seal study")
        self.drawn: dict[tuple, list[Sample] | Future] = {}
        self.pool = None
        if workers:  # not forked: the parent holds a GPU
            context = multiprocessing.get_context("spawn")
            self.pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(model,))

    def ahead(self, wanted: Iterable[tuple]) -> None:
        """Begins to draw what will be asked for; the longest first."""
        for key in sorted(wanted, key=lambda key: -key[1] * key[2]):
            if self.pool is not None and key not in self.drawn:
                self.drawn[key] = self.pool.submit(_draw, *key)

    def get(self, task: str, length: int, count: int, seed: int, split: str) -> list[Sample]:
        key = (task, length, count, seed, split)
        found = self.drawn.get(key)
        if found is None:
            found = named(task).generate(self.tokenizer, length, count, seed, split=split, progress=False)
        self.drawn[key] = found.result() if isinstance(found, Future) else found
        return self.drawn[key]

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=False, cancel_futures=True)


def _start_worker(model):
    global _tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the parent says so and ends the workers
    torch.set_num_threads(1)
    _tokenizer = load_tokenizer(model, "seal study")


def _draw(task, length, count, seed, split):
    return named(task).generate(_tokenizer, length, count, seed, split=split, progress=False)


class Drawn(Task):
    """A task whose samples come from :class:`Samples`."""

    def __init__(self, name, samples):
        task = named(name)
        self.name, self.item, self.max_new_tokens = task.name, task.item, task.max_new_tokens
        self.reserve, self.stop = task.reserve, task.stop
        self._name, self._task, self._samples = name, task, samples

    def generate(self, tokenizer, length, samples=50, seed=0, *, split="train", **options):
        return self._samples.get(self._name, length, samples, seed, split)

    def score(self, sample, text):
        return self._task.score(sample, text)
