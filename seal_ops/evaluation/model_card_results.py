"""What two evaluations say of an adapter, for its model card."""

from __future__ import annotations

from dataclasses import asdict

from ..utils.runs import differing
from .results import Evaluation


def card_results(before: Evaluation, after: Evaluation) -> list[dict]:
    """The accuracy without and with scales, by length, for `seal_ops.update_card`.

    Args:
        before: of the model without the scales.
        after: of the same cases with them.

    Returns:
        One dict a length: ``task``, ``length``, and under ``before`` and ``after`` each ``accuracy``, ``low`` and
        ``high`` (the 95 % Wilson interval) and ``cases``.

    Raises:
        ValueError: evaluations of other cases, unfinished ones, or two of one and the same model.
    """
    settings = [{k: v for k, v in found.settings.items() if k != "model"} for found in (before, after)]
    if names := differing(*settings):
        raise ValueError(
            f"seal_ops.card_results: before and after must be of the same cases, got another {', '.join(names)}"
        )
    if before.settings.get("model") == after.settings.get("model"):
        raise ValueError(
            "seal_ops.card_results: after must be of the model with the scales, got the same model as before"
        )
    for name, found in (("before", before), ("after", after)):
        wanted = len(found.settings["lengths"]) * found.settings["cases"]
        if len(found.records) != wanted:
            raise ValueError(
                f"seal_ops.card_results: {name} must be a finished evaluation of {wanted} cases, got "
                f"{len(found.records)}"
            )
    return [
        {"task": after.task, "length": length, "before": _facts(before.accuracy[length]), "after": _facts(cell)}
        for length, cell in after.accuracy.items()
    ]


def _facts(cell) -> dict:
    return {name: value for name, value in asdict(cell).items() if name != "correct"}
