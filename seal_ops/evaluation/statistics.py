"""The few statistics that comparisons need, exact where cases are few."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Paired:
    """Comparison of two models on the same cases.

    Attributes:
        cases: how many.
        better, worse: cases in which the second model scored higher, lower.
        difference: mean score of the second minus that of the first.
        low, high: 95 % interval of the difference.
        p: two-sided exact p-value of "neither is better".
    """

    cases: int
    better: int
    worse: int
    difference: float
    low: float
    high: float
    p: float


def mcnemar(better: int, worse: int) -> float:
    """Two-sided exact p-value of McNemar's test: under no difference the discordant cases fall like fair coins.

    Raises:
        ValueError: a negative count.
    """
    if better < 0 or worse < 0:
        raise ValueError(f"seal_ops.statistics.mcnemar: counts must not be negative, got {better} and {worse}")
    n = better + worse
    tail = sum(math.comb(n, k) for k in range(min(better, worse) + 1))
    return min(1.0, 2 * tail / 2**n)


def paired(first: Sequence[float], second: Sequence[float]) -> Paired:
    """Compares scores of the same cases, in the same order.

    The p-value is the sign test's, which for right and wrong is McNemar's.  The interval is Agresti and Min's (2005)
    for paired proportions: half a case is added to each of the four outcomes, which keeps it honest where all cases
    agree.

    Raises:
        ValueError: lists of different lengths, or empty ones.
    """
    if len(first) != len(second) or not first:
        sizes = f"{len(first)} and {len(second)}"
        raise ValueError(f"seal_ops.statistics.paired: both must hold the same cases, at least one, got {sizes}")
    changes = [b - a for a, b in zip(first, second, strict=True)]
    better, worse = sum(c > 0 for c in changes), sum(c < 0 for c in changes)
    n = len(changes) + 2
    mean = sum(changes) / n
    half = 1.959963984540054 * math.sqrt(max(0.0, (sum(c * c for c in changes) + 1) / n - mean**2) / n)
    low, high = max(-1.0, mean - half), min(1.0, mean + half)
    return Paired(len(changes), better, worse, sum(changes) / len(changes), low, high, mcnemar(better, worse))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjustment of p-values of one family of tests, in the given order."""
    adjusted, least = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = least
    return adjusted


def spearman(one: torch.Tensor, other: torch.Tensor) -> float:
    """Spearman's rank correlation of two vectors ``[N]``.

    Ties get the mean of their ranks.  NaN where one of the vectors is constant.

    Raises:
        ValueError: vectors of different lengths, or of less than two values.
    """
    if one.shape != other.shape or one.dim() != 1 or len(one) < 2:
        shapes = f"{list(one.shape)} and {list(other.shape)}"
        raise ValueError(f"seal_ops.statistics.spearman: both must be vectors of one length, got {shapes}")
    a, b = _ranks(one), _ranks(other)
    a, b = a - a.mean(), b - b.mean()
    norm = a.norm() * b.norm()
    return float("nan") if norm == 0 else float(a @ b / norm)


def _ranks(values):
    _, inverse, counts = values.double().unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0).double() - (counts - 1) / 2)[inverse]


def wilson(correct: float, cases: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson, 1927); honest at 0 and 1, where the normal one has no width.

    Partial scores in [0, 1] may be summed into ``correct``: their variance is never above that of right and wrong, so
    the interval is then wide rather than narrow.

    Raises:
        ValueError: no cases.
    """
    if cases < 1:
        raise ValueError(f"seal_ops.statistics.wilson: cases must be at least 1, got {cases}")
    p, n = correct / cases, cases
    middle = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)
