"""Merging: the scales become part of plain output projections."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..huggingface.layers import AttentionLayer
from ..huggingface.projection import holds_numbers, in_words
from .attachment import attached, detach
from .merge_record import check_not_merged, record


@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """Multiplies the scales into the weights that read the attention output and detaches: no cost at inference.

    Computed in fp32 and rounded once, so the weights keep their dtype; biases stay.  All layers are checked before the
    first is written.  With several adapters, the active one is merged.  The model's config says which scales have
    been merged (``seal_ops_merged``), so that `load` refuses the same ones afterwards.

    Args:
        model: the model, or a PEFT or compiled model round it.

    Returns:
        The model.

    Raises:
        ValueError: a step between attention and its projection that scales do not pass (BitNet's norm), quantised or
            adapted projections and weights that are computed anew in each call (serve those unmerged), a merged weight
            that would overflow, or scales that were merged into this model before.
    """
    scales, attachment = attached(model, "merge")
    if any(type(m).__module__.startswith("peft.tuners.adaption_prompt") for m in attachment.owner.modules()):
        refuse(
            "model",
            "have projections that attention alone reads",
            "PEFT's AdaptionPrompt, whose own attention goes through them too; keep the scales attached instead",
        )
    attention_layers = {attn.index: attn for attn in attachment.patch.layers}
    learned = scales.values()
    scales.check_finite("merge", learned)
    base = attachment.owner.config
    check_not_merged(base, scales.config, learned, "the scales", "merge")
    work = [
        (
            attention_layers[layer],
            _present_projection(attachment.owner, attention_layers[layer]),
            value if value.dim() == 2 else value[:, None],
        )
        for layer, value in learned.items()
    ]
    seen: set[int] = set()
    for attn, projection, scale in work:
        check_projection(attn, projection, scales.config.granularity, seen)
        check_weight(attn.projection_name, projection.weight, scale, attn.head_dim, reads_rows(projection))
    for number, (attn, projection, scale) in enumerate(work):
        projection.weight.copy_(merged(projection.weight, scale, attn.head_dim, reads_rows(projection)))
        # A merge that is interrupted leaves a model that computes the same, and that can be merged again.
        scales.layers[str(attn.index)].scale.fill_(1)
        if number == 0:  # for what is loaded afterwards, an interrupted merge is one, too
            record(base, scales.config, learned)
    detach(model)
    scales.set_values(scales.config, learned)
    return model


def _present_projection(owner: nn.Module, attn: AttentionLayer) -> nn.Module | None:
    """The module under the projection's name now: since `attach`, an adapter may have been put round it."""
    if attn.output_projection is None:
        return None
    try:
        return owner.get_submodule(attn.projection_name)
    except AttributeError:
        return None


def reads_rows(projection: nn.Module) -> bool:
    """Whether the weight's rows are the channels that are read: GPT-2's Conv1D is the transpose of a Linear."""
    return type(projection) is Conv1D


def merged(weight: Tensor, scale: Tensor, head_dim: int, rows: bool) -> Tensor:
    """fp32 (fp64) weight [hidden, Hq * D] (with ``rows`` [Hq * D, hidden]) times the scale [Hq, 1 or D] of what it
    reads."""
    compute = torch.promote_types(weight.dtype, torch.float32)
    factor = scale.to(weight.device, compute).expand(-1, head_dim).reshape(-1)
    return weight.to(compute) * (factor[:, None] if rows else factor)


def refuse(name: str, expected: str, got: str):
    raise ValueError(f"seal_ops.merge: {name} must {expected}, got {got}")


def check_projection(attn: AttentionLayer, projection: nn.Module | None, granularity: str, seen: set[int]) -> None:
    """ValueError where scales of this granularity cannot become part of ``projection``; ``seen``: weights that have."""
    name, unmerged = attn.projection_name or attn.name, "keep the scales attached instead"
    if projection is None or granularity not in attn.commutes:
        refuse(
            name,
            "read the attention output directly",
            f"a module with another step in between ({type(attn.module).__name__}); {unmerged}",
        )
    if hasattr(projection, "base_layer"):
        refuse(
            name,
            "be a plain torch.nn.Linear in 16 or more bits",
            f"{type(projection).__name__} of an adapter; merge that first (PEFT's merge_and_unload), or {unmerged}",
        )
    weight = getattr(projection, "weight", None)
    # An exact type: quantised layers are subclasses or wrappers with weights of another meaning.
    if type(projection) not in (nn.Linear, Conv1D) or not holds_numbers(weight):
        refuse(name, "be a plain torch.nn.Linear in 16 or more bits", f"{in_words(projection)}; {unmerged}")
    if "weight" not in projection._parameters:
        refuse(
            name,
            "have its weight as a parameter",
            "one that is computed anew in each call (pruned, or with "
            "weight_norm); make that permanent first (torch.nn.utils.prune.remove, remove_weight_norm)",
        )
    width = attn.num_heads * attn.head_dim
    if hasattr(weight, "full_tensor") or weight.shape[0 if reads_rows(projection) else 1] != width:
        refuse(name, f"hold its whole weight with {width} columns", f"{list(weight.shape)} on {weight.device}")
    if id(weight) in seen:
        refuse(name, "have a weight of its own", "a weight that two layers share")
    seen.add(id(weight))


def check_weight(name: str, weight: Tensor, scale: Tensor, head_dim: int, rows: bool) -> None:
    """ValueError where the values of a weight are not there, or would overflow."""
    if weight.is_meta:
        refuse(name, f"hold its whole weight with {scale.shape[0] * head_dim} columns", f"{list(weight.shape)} on meta")
    # Largest magnitude a channel would get, without a second copy of the weight.
    largest = weight.detach().abs().amax(1 if rows else 0, keepdim=True)
    if not bool((merged(largest, scale, head_dim, rows).abs() <= torch.finfo(weight.dtype).max).all()):
        refuse(name, f"stay finite in {weight.dtype}", "scales that overflow it")
