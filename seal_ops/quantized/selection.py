"""Which columns are weak: those whose error the inputs carry furthest (OWQ, arXiv 2306.02272)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

SHARES = ("layer", "global")


def check_number(columns, sizes: Mapping[str, int], call: str) -> None:
    """ValueError, one sentence, where ``columns`` is no number of columns that every layer has to spare."""
    if type(columns) is not int or columns < 1:
        raise ValueError(f"seal_ops.{call}: columns must be an integer of at least 1, got {columns!r}")
    name = min(sizes, key=sizes.get)
    if columns >= sizes[name]:
        raise ValueError(
            f"seal_ops.{call}: columns must be fewer than the {sizes[name]} inputs of {name} (with all of them the "
            f"layer would be trained whole), got {columns}"
        )


def checked_index(values, name: str, size: int, call: str) -> Tensor:
    """Given columns of one layer as sorted int64 [k]; ValueError for none, all, a double, or one that is not there."""
    if isinstance(values, Tensor) and (values.is_floating_point() or values.dtype == torch.bool or values.dim() != 1):
        raise ValueError(
            f"seal_ops.{call}: columns of {name} must be integers [k], got {values.dtype} {list(values.shape)}"
        )
    found = [int(i) for i in values]
    if not 1 <= len(found) < size:
        raise ValueError(f"seal_ops.{call}: columns of {name} must be 1 to {size - 1} numbers, got {len(found)}")
    if min(found) < 0 or max(found) >= size:
        wrong = min(found) if min(found) < 0 else max(found)
        raise ValueError(f"seal_ops.{call}: columns of {name} must lie in 0 to {size - 1}, got {wrong}")
    if len(set(found)) != len(found):
        twice = next(i for i in found if found.count(i) > 1)
        raise ValueError(f"seal_ops.{call}: columns of {name} must be different, got {twice} twice")
    return torch.tensor(sorted(found), dtype=torch.int64, device="cpu")


def choose(sensitivity: Mapping[str, Tensor], columns: int, share: str, stream: set[str]) -> dict[str, Tensor]:
    """Layer -> the ``columns`` most sensitive inputs, sorted int64 [k].

    ``sensitivity``: layer -> [in].  ``share="global"``: the layers in ``stream`` (they read the residual stream, whose
    channels mean the same everywhere) that have equally many inputs get one set, by the sum of their sensitivities,
    each divided by its own total; all others choose for themselves.
    """
    groups: dict[object, list[str]] = {}
    for name, value in sensitivity.items():
        key = ("stream", len(value)) if share == "global" and name in stream else name
        groups.setdefault(key, []).append(name)
    found = {}
    for names in groups.values():
        total = sum((sensitivity[n] / sensitivity[n].sum().clamp_min(1e-30)).cpu() for n in names)
        index = total.topk(columns).indices.sort().values
        found |= {name: index for name in names}
    return {name: found[name].to(sensitivity[name].device) for name in sensitivity}
