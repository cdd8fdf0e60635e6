"""How far the gradients of a model in fp8 are from those in 16 bits."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..samples import Row

PROBE = 4096  # tokens of the sample whose gradients are compared, at most
LARGE_ERROR = 0.5  # above it noise is more than half of a gradient, and a run says so: a choice, not a measurement


def probe_of(input_ids: Sequence[int], labels: Sequence[int]) -> Row:
    """The end of a sample, where the labels are, short enough that comparing it takes little of a run."""
    last = max(n for n, label in enumerate(labels) if label >= 0) + 1
    first = max(0, last - PROBE)
    return Row(list(input_ids[first:last]), list(labels[first:last]))


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float | None:
    """``|found - expected| / |expected|`` over all numbers of both; None where all that is expected is zero."""
    norm = sum(float(e.double().square().sum()) for e in expected) ** 0.5
    error = sum(float((f.double() - e.double()).square().sum()) for f, e in zip(found, expected, strict=True)) ** 0.5
    return error / norm if norm else None
