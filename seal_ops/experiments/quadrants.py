"""The quadrant experiment of SEAL (arXiv 2501.15225, section 3).

Heads differ in sign, consistently over lengths; scaling the harmful ones by 0.9 and the helpful ones by 1.1 lifted
accuracy in the paper.
"""

import os

import torch

from ..evaluation.results import Evaluation
from ..evaluation.runner import evaluate
from .head_importance import HeadImportance, ones_to_keep, with_scales


def group_by_sign(found: HeadImportance, measure: str = "accuracy", noise: float = 2.0) -> dict[str, list[int]]:
    """Units by the sign of what their removal does at every measured length.

    Args:
        found: changes case by case.
        measure: see :meth:`HeadImportance.change`.
        noise: a change counts only where it is more than so many standard errors (over the cases of its length) away
            from 0; 0 counts every change. With one case a length there is no standard error, and every change counts.

    Returns:
        ``{"harmful": ..., "helpful": ..., "mixed": ...}``, indices into ``found.units``: removal helps at every length,
        hurts at every length, or neither.

    Raises:
        ValueError: a negative ``noise``, or an unknown measure.
    """
    check_noise(noise, "seal_ops.group_by_sign")
    changes = torch.stack([found.change(measure, length) for length in found.lengths])
    errors = torch.stack([found.standard_error(measure, length) for length in found.lengths]).nan_to_num(0.0)
    harmful, helpful = (changes > noise * errors).all(0), (changes < -noise * errors).all(0)
    return {
        "harmful": harmful.nonzero().flatten().tolist(),
        "helpful": helpful.nonzero().flatten().tolist(),
        "mixed": (~harmful & ~helpful).nonzero().flatten().tolist(),
    }


def check_noise(noise: float, call: str) -> None:
    """``ValueError`` in the name of ``call`` where ``noise`` is no number of standard errors."""
    if not noise >= 0:
        raise ValueError(f"{call}: noise must be at least 0, got {noise!r}")


def quadrant_experiment(
    model,
    tokenizer,
    found: HeadImportance,
    task,
    lengths,
    cases: int = 50,
    *,
    measure: str = "accuracy",
    noise: float = 2.0,
    down: float = 0.9,
    up: float = 1.1,
    output: str | os.PathLike | None = None,
    backend: str | None = None,
    **options,
) -> dict[str, Evaluation]:
    """The paper's check of the importance: harmful units times ``down``, helpful ones times ``up``, and both.

    Measured by :func:`seal_ops.evaluate` (whose ``options`` it takes) on test samples, which the importance never saw.

    Args:
        measure, noise: what decides harmful and helpful: see :func:`group_by_sign`.
        output: a folder for one JSON an evaluation.

    Returns:
        ``{"base", "harmful x0.9", "helpful x1.1", "both": Evaluation}``.

    Raises:
        ValueError: an importance of channels for a model with head scales, a bad ``noise``, or a folder of another run.

    Source:
        SEAL (arXiv 2501.15225), section 3.
    """
    groups = group_by_sign(found, measure, noise)
    shown = {"harmful": f"harmful x{down:g}", "helpful": f"helpful x{up:g}"}
    variants = {"base": {}, shown["harmful"]: {"harmful": down}, shown["helpful"]: {"helpful": up}}
    variants["both"] = {"harmful": down, "helpful": up}
    results = {}
    with with_scales(model, found.settings["granularity"], backend) as scales:
        before = {layer: scale.detach().clone() for layer, scale in scales.items()}
        per_channel = len(found.units[0]) == 3
        try:
            for name, factors in variants.items():
                keep = ones_to_keep(scales, 1, per_channel)
                for group, factor in factors.items():
                    for layer, head, *channel in (found.units[i] for i in groups[group]):
                        keep[layer][0, head, channel[0] if channel else 0] = factor
                with torch.no_grad():
                    for layer, scale in scales.items():
                        factor = keep[layer][0]
                        if per_channel and scale.dim() == 1:
                            raise ValueError(
                                "seal_ops.quadrant_experiment: model must have channel scales, or none, for an importance of "  # noqa: E501
                                "channels, got head scales"
                            )
                        scale.copy_(before[layer] * (factor if scale.dim() == 2 else factor[:, 0]))
                path = None if output is None else os.path.join(output, f"quadrant-{len(results)}.json")
                results[name] = evaluate(model, tokenizer, task, lengths, cases, name=name, output=path, **options)
        finally:
            with torch.no_grad():
                for layer, scale in scales.items():
                    scale.copy_(before[layer])
    return results
