"""What one attention call costs on the host: microseconds until Python goes on, ours and SDPA's.

Device events cannot see it, for they are queued ahead; at short lengths it is what a layer waits for. The shape is
small enough that the device stays behind the host: 128 tokens, 16 heads of 128 channels."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from ..ops.functional import attention

CALLS, ROUNDS = 200, 7


def host_times(device: torch.device, dtype: torch.dtype, calls: int = CALLS, rounds: int = ROUNDS) -> dict[str, float]:
    """Microseconds a call on the host, by "contestant, with or without gradients": the median of `rounds` rounds.

    With gradients: the call records what a backward needs (q, k, v and, for ours, the channel scale ask for one).
    """
    contestants: dict[str, Callable[[], object]] = {}
    for gradients in (False, True):
        q, k, v = (torch.randn(1, 128, 16, 128, device=device, dtype=dtype, requires_grad=gradients) for _ in range(3))
        scale = torch.ones(16, 128, device=device, requires_grad=gradients)
        t = [x.detach().transpose(1, 2).requires_grad_(gradients) for x in (q, k, v)]
        name = "with gradients" if gradients else "without"
        contestants[f"seal_ops, {name}"] = lambda q=q, k=k, v=v, scale=scale: attention(q, k, v, scale)
        contestants[f"SDPA, {name}"] = lambda t=t: torch.nn.functional.scaled_dot_product_attention(*t, is_causal=True)
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for turn in range(rounds + 1):  # the first round warms up
        for name, call in contestants.items():
            wait()
            start = time.perf_counter()
            for _ in range(calls):
                call()
            seconds = time.perf_counter() - start
            if turn:
                samples[name].append(1e6 * seconds / calls)
    wait()
    return {name: statistics.median(values) for name, values in samples.items()}


def sentence(times: dict[str, float]) -> str:
    """One line: the four figures."""
    return "host time of an attention call: " + "; ".join(f"{name} {value:.0f} µs" for name, value in times.items())
