"""Device-event timing of several contestants in turn.

As triton's do_bench: events around each call, the L2 cache overwritten before it, the median of many. Two things
differ:
contestants take turns in rounds, because the card heats up and slows down within seconds and whoever runs last would
pay for it; and the number of calls follows a time budget from the first call on, since a backward at 128k takes most of
a second.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable

import torch


@dataclasses.dataclass(frozen=True)
class Times:
    """Milliseconds a call: median and 20 % / 80 % quantiles over `calls` calls."""

    median: float
    p20: float
    p80: float
    calls: int

    @classmethod
    def of(cls, samples: list[float]) -> Times:
        ordered = sorted(samples)
        at = lambda share: ordered[min(len(ordered) - 1, int(share * len(ordered)))]
        return cls(statistics.median(ordered), at(0.2), at(0.8), len(ordered))


class Clock:
    """Times single calls on a device: CUDA events behind an L2 flush, or the wall clock on a CPU."""

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            size = torch.cuda.get_device_properties(device).L2_cache_size
            self._flush = torch.empty(4 * size, dtype=torch.int8, device=device)

    def __call__(self, call: Callable[[], object], repeat: int, warm: int = 0) -> list[float]:
        """Milliseconds of each of `repeat` calls, after `warm` calls that are not timed."""
        if self.device.type != "cuda":
            samples = []
            for _ in range(warm):
                call()
            for _ in range(repeat):
                start = time.perf_counter()
                call()
                samples.append(1e3 * (time.perf_counter() - start))
            return samples
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeat)]
        # The host queues all of it behind a short sleep of the device and so stays ahead: what a call costs on the host
        # (a tenth of a millisecond under autograd) would otherwise be counted wherever the device waits for it.
        torch.cuda._sleep(min(30_000_000, 300_000 * (warm + repeat)))  # cycles: 0.15 ms a call, at most 15 ms
        for _ in range(warm):
            self._flush.zero_()
            call()
        for start, end in events:
            self._flush.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) for start, end in events]


def in_turn(
    calls: dict[str, Callable[[], object]],
    clock: Clock,
    budget_ms: float,
    rounds: int = 3,
    most: int = 100,
    warm_ms: float = 25,
    pause_s: float = 0.03,
) -> dict[str, Times]:
    """Times every call for about `budget_ms`, in `rounds` rounds over all of them; at least twice, however long it
    takes.

    The calls have run once before (the gate sees to that): what they compile or load is not timed. Each turn begins
    with `warm_ms` of untimed calls, as do_bench does: within such a time the card's clock settles where this call's
    power puts it, and not the call before it or a pause. Every second round runs in the reverse order, and a pause lies
    between two turns, so that nobody always follows the contestant that heats the card most.
    """
    estimates = {name: clock(call, 1)[0] for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name, call in list(calls.items())[:: -1 if turn % 2 else 1]:
            time.sleep(pause_s)
            if turn < 2 or turn * estimates[name] < budget_ms:
                one = max(estimates[name], 1e-3)
                timed, warm = (
                    min(most, round(ms / one)) for ms in (budget_ms / rounds, min(warm_ms, budget_ms / rounds))
                )
                samples[name] += clock(call, max(1, timed), warm)
    return {name: Times.of(values) for name, values in samples.items()}


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What this card does at best, in the run that quotes it: TFLOP/s of a matrix product, GB/s of a copy (read +
    write)."""

    matmul_tflops: float
    copy_gbps: float


def ceilings(clock: Clock, dtype: torch.dtype, size: int = 8192, copy_bytes: int = 1 << 30) -> Ceilings:
    """A size³ product of normal data in `dtype`, and a device-to-device copy of `copy_bytes`; medians."""
    a, b = (torch.randn(size, size, device=clock.device, dtype=dtype) for _ in range(2))
    source = torch.randint(-100, 100, (copy_bytes,), device=clock.device, dtype=torch.int8)
    target = torch.empty_like(source)
    calls = {"matmul": lambda: a @ b, "copy": lambda: target.copy_(source)}
    for call in calls.values():
        call()
    times = in_turn(calls, clock, 150)
    return Ceilings(2 * size**3 / times["matmul"].median / 1e9, 2 * copy_bytes / times["copy"].median / 1e6)
