"""How far the gradients of a model in fp8 are from those in 16 bits."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from ..samples import Row
from .conversion import converted_linears

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


def convert_and_compare(
    held: contextlib.ExitStack,
    model: nn.Module,
    format: str | None,
    sample: Row,
    gradients: Callable[[Row], Sequence[Tensor]],
    known: dict,
) -> dict:
    """Puts the frozen linear layers into ``format`` until ``held`` is closed, and says how much that moves gradients.

    Args:
        held: what closes at the end of the run.
        model: whose layers are converted.
        format: "fp8", or None for nothing.
        sample: on which the gradients are compared.
        gradients: of all that is trained, on such a row.
        known: what a run that is continued has found; nothing is compared then.

    Returns:
        As `training.json` holds it: what was converted, ``gradient_error`` and ``tokens``.
    """
    if format is None:
        return known
    probe = probe_of(sample.input_ids, sample.labels)
    expected = None if known else gradients(probe)
    converted = held.enter_context(converted_linears(model, format, "seal_ops.train"))
    if expected is not None:
        error = relative_error(gradients(probe), expected)
        known = {"gradient_error": error, "tokens": len(probe)}
        if error is not None and not error <= LARGE_ERROR:
            warnings.warn(
                f"seal_ops.train: in {format} the first gradients are {100 * error:.0f} % from those in 16 bits; "
                f"such scales are worth a comparison with a run in 16 bits",
                stacklevel=3,
            )
    return known | converted.facts()
