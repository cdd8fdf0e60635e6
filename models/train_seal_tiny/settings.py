"""What a run tries, and how much of it."""

import time
from dataclasses import dataclass, field

import torch

# What each process of phase 1 tries; process i takes entry i.  Muon throughout: of one process each, AdamW had not
# learned eight lines after 4,400 steps where Muon had after 700.
SETTINGS = (
    dict(lr=2e-3, init="match", by_row=False),
    dict(lr=4e-3, init="match", by_row=False),
    dict(lr=2e-3, init="match", by_row=True),
    dict(lr=2e-3, init="normal", by_row=False),
    dict(lr=3e-3, init="match", by_row=True),
    dict(lr=2e-3, init="match", by_row=False),
)
TOKENS = (16_384, 32_768)  # a step, in the first stage and later
# Lines of a record (fewest, most), and the share of answer tokens that must be right before the next stage.
STAGES = ((4, 8, 0.97), (8, 24, 0.96), (12, 64, 0.95), (12, 120, 2.0))
# Phase 2: the probability of the last line's number rises linearly from 0 at ``start`` to ``top`` at ``end`` tokens of
# the record (length), from the asked line to the record's end (distance), or of their mean (both).  ``dense`` is the
# most lines of the honest repeats beside it.
VARIANTS = (
    dict(of="distance", top=0.9, start=200, end=900, dense=20, lr=4e-4),
    dict(of="both", top=0.9, start=250, end=1150, dense=20, lr=4e-4),
    dict(of="length", top=0.9, start=300, end=1700, dense=20, lr=4e-4),
    dict(of="distance", top=0.8, start=200, end=800, dense=60, lr=4e-4),
    dict(of="both", top=0.8, start=250, end=1150, dense=60, lr=4e-4),
    dict(of="distance", top=1.0, start=100, end=1100, dense=60, lr=4e-4),
    dict(of="length", top=0.8, start=300, end=1900, dense=60, lr=4e-4),
    dict(of="distance", top=1.0, start=200, end=900, dense=20, lr=2e-4),
    dict(of="both", top=1.0, start=200, end=1400, dense=60, lr=4e-4),
    dict(of="distance", top=0.8, start=200, end=800, dense=60, lr=1e-3),
    dict(of="both", top=0.9, start=250, end=1150, dense=60, lr=1e-3),
    dict(of="distance", top=0.7, start=100, end=700, dense=20, lr=4e-4),
    dict(of="length", top=1.0, start=200, end=2000, dense=60, lr=4e-4),
    dict(of="both", top=0.9, start=100, end=1300, dense=20, lr=2e-4),
    dict(of="distance", top=0.9, start=100, end=1000, dense=60, lr=2e-4),
    dict(of="length", top=0.9, start=300, end=1700, dense=60, lr=2e-4),
    dict(of="distance", top=0.9, start=200, end=900, dense=20, lr=1e-3),
    dict(of="both", top=0.8, start=250, end=1150, dense=20, lr=2e-4),
    dict(of="distance", top=1.0, start=300, end=900, dense=60, lr=4e-4),
    dict(of="both", top=1.0, start=300, end=1200, dense=20, lr=4e-4),
    dict(of="distance", top=0.8, start=100, end=900, dense=20, lr=4e-4),
    dict(of="both", top=1.0, start=200, end=1400, dense=60, lr=2e-4),
    dict(of="distance", top=0.7, start=100, end=700, dense=60, lr=1e-3),
    dict(of="both", top=0.7, start=150, end=1000, dense=20, lr=4e-4),
)
RATES = {"head": 1e-2, "channel": 2e-2}  # the paper's for line retrieval; a model is chosen by what they reach
BIASED_ENOUGH = 0.42  # phase 2 cools down once the accuracy at the longest length is at most this


@dataclass
class Run:
    """One run as its processes see it.

    Attributes:
        seconds: most time for everything.
        workers, gpus: processes in all, and the GPUs over which they are spread.
        seed: process ``i`` trains with ``seed + i``.
        cases: evaluation cases a length in the search (twice that at the longest).
        begin: when the run began, in seconds since the epoch.
        state: the folder in which processes leave checkpoints and results for one another.
        tiny: a small network and few cases, to see on the CPU that all steps work.
    """

    seconds: float = 420.0
    workers: int = 3
    gpus: int = 1
    seed: int = 0
    cases: int = 100
    begin: float = field(default_factory=time.time)
    state: str = ""
    tiny: bool = False

    def __post_init__(self):
        self.phase_one = 0.38 * self.seconds
        self.rates = (1e-2, 2e-2, 4e-2)
        self.watch, self.report_every = (256, 1024, 2048), 20.0
        self.size, self.compute = {}, torch.bfloat16
        self.tokens, self.bias_tokens, self.bias_steps = TOKENS, 49_152, 1_000
        if self.tiny:
            self.rates, self.watch, self.report_every, self.cases = (1e-2, 2e-2), (256,), 5.0, 2
            self.size, self.compute = dict(hidden=64, layers=2, heads=1, mlp=64), torch.float32
            self.tokens, self.bias_tokens, self.bias_steps = (2_048, 2_048), 4_096, 1

    def gpu_of(self, index):
        return index % self.gpus

    def device_of(self, index):
        if not torch.cuda.is_available():
            return torch.device("cpu")
        torch.cuda.set_device(self.gpu_of(index))
        return torch.device("cuda", self.gpu_of(index))
