"""Merging: the scales become part of plain ``o_proj`` weights."""
from __future__ import annotations

import torch
from torch import Tensor, nn

from ..huggingface.patch import AttentionLayer
from .attachment import attached, detach


def merge(model: nn.Module) -> nn.Module:
    """Multiplies the scales into the columns of ``o_proj.weight`` and detaches: plain weights, no cost at inference.

    Computed in fp32 and rounded once; biases stay.  All layers are checked before the first is written.  Returns the
    model.  Raises ValueError for a step between attention and ``o_proj`` (BitNet's norm, a gate), for quantised or
    adapted projections (serve those unmerged), and where a merged weight would overflow.
    """
    scales, attachment = attached(model, "merge")
    sites = attachment.seam.sites
    work = [(sites[layer], scale.detach().expand(sites[layer].num_heads, -1) if scale.dim() == 2 else
             scale.detach()[:, None]) for layer, scale in scales.items()]
    seen: set[int] = set()
    for site, scale in work:
        _check_mergeable(site, scale, seen)
    with torch.no_grad():
        for site, scale in work:
            weight = site.o_proj.weight
            weight.copy_(_merged(weight, scale, site))
    return detach(model)


def _merged(weight: Tensor, scale: Tensor, site: AttentionLayer) -> Tensor:
    """fp32 (fp64) weight [hidden, Hq * D] times the scale [Hq, 1 or D]."""
    compute = torch.promote_types(weight.dtype, torch.float32)
    return weight.to(compute) * scale.to(weight.device, compute).expand(-1, site.head_dim).reshape(1, -1)


def _check_mergeable(site: AttentionLayer, scale: Tensor, seen: set[int]) -> None:
    def refuse(expected: str, got: str):
        raise ValueError(f"seal_ops.merge: {site.name}.o_proj must {expected}, got {got}")

    o_proj = site.o_proj
    if not site.direct:
        refuse("read the attention output directly", f"a module with another step in between "
               f"({type(site.module).__name__}); keep the scales attached instead")
    # An exact type: quantised and adapted layers are subclasses or wrappers with weights of another meaning.
    if type(o_proj) is not nn.Linear or not o_proj.weight.is_floating_point() or o_proj.weight.element_size() < 2:
        refuse("be a plain torch.nn.Linear in 16 or more bits", f"{type(o_proj).__name__} with "
               f"{getattr(getattr(o_proj, 'weight', None), 'dtype', 'no')} weight; keep the scales attached instead")
    if o_proj.weight.is_meta or o_proj.weight.shape[1] != site.num_heads * site.head_dim:
        refuse(f"hold its whole weight with {site.num_heads * site.head_dim} columns",
               f"{list(o_proj.weight.shape)} on {o_proj.weight.device}")
    if id(o_proj.weight) in seen:
        refuse("have a weight of its own", "a weight that two layers share")
    seen.add(id(o_proj.weight))
    # Largest magnitude a column would get, without a second copy of the weight.
    columns = o_proj.weight.detach().abs().amax(0, keepdim=True)
    if not bool((_merged(columns, scale, site).abs() <= torch.finfo(o_proj.weight.dtype).max).all()):
        refuse(f"stay finite in {o_proj.weight.dtype}", "scales that overflow it")
