"""Which samples an optimiser step takes: each epoch has an order of its own, drawn from the seed.

A step's samples follow from its number alone, so that a run which is continued meets those that it would have met.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


class SampleOrder:
    """The order of the samples in a run.

    Args:
        samples: all of them.
        epochs: passes over the samples.
        batch_size: samples in one forward pass.
        accumulate: forward passes in one optimiser step.
        seed: of the orders.
    """

    def __init__(self, samples: Sequence, epochs: int, batch_size: int, accumulate: int, seed: int):
        self.samples, self.batch_size, self.seed = samples, batch_size, seed
        self.step_size = batch_size * accumulate
        self.steps_per_epoch = -(-len(samples) // self.step_size)
        self.steps = epochs * self.steps_per_epoch

    def micro_batches(self, step: int) -> list[list]:
        """The samples of each forward pass of a step, counted from 0."""
        epoch, place = divmod(step, self.steps_per_epoch)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.samples), generator=generator, device="cpu").tolist()
        chosen = [self.samples[i] for i in order[place * self.step_size : (place + 1) * self.step_size]]
        return [chosen[start : start + self.batch_size] for start in range(0, len(chosen), self.batch_size)]
