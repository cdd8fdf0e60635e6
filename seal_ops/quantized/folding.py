"""SEAL's scales folded into a 4-bit model: no cost at inference, and the model stays in 4 bits.

Head scales multiply the group scales of ``o_proj``, exactly, where a group lies inside one head.  Channel scales
multiply the rows of ``v_proj``, where every query head has a value head of its own.  Every other case is refused with
its reason.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..adapters.attachment import attached as attached_scales
from ..adapters.attachment import detach
from ..adapters.merge_record import check_not_merged, record
from ..huggingface.layers import AttentionLayer
from ..huggingface.modes import mode
from . import bases, quantizers
from .attachment import put_columns_on
from .columns import has_columns
from .merging import linear_like

_FACTORS = (2.0, 0.5, 4.0, 1.0, 0.25)


@torch.no_grad()
def fold_scales(model: nn.Module, *, dequantize: bool = False) -> nn.Module:
    """Multiplies the attached scales into the quantised layers round attention, and detaches them.

    SEAL-H goes into the group scales of ``o_proj`` (NF4 and HQQ, where the group divides head_dim; scales that are
    themselves in 8 bits are written out in fp32 first, 0.4 bits a weight more in that layer), SEAL-C into the rows of
    ``v_proj`` (without grouped queries).  The products are made in fp32.  Weak columns of the same layers are
    multiplied with them.

    All layers are checked before the first is written.  For models in 16 bits there is `seal_ops.merge`.

    Args:
        model: with scales attached, on quantised layers.
        dequantize: the way out of every other case: ``o_proj`` of those layers becomes a plain linear layer in 16 bits
            with the scale in it.

    Returns:
        The model, without scales.

    Raises:
        ValueError: there are no scales, a scale does not fold, and why, or the scales were folded into this model
            before.

    Source:
        SEAL (arXiv 2501.15225), section 4, for what is multiplied.
    """
    scales, attachment = attached_scales(model, "fold_scales")
    owner, learned = attachment.owner, scales.values()
    check_not_merged(owner.config, scales.config, learned, "the scales", "fold_scales")
    by_number = {layer.index: layer for layer in attachment.patch.layers}
    work = [_planned(owner, by_number[number], value, dequantize) for number, value in learned.items()]
    record(owner.config, scales.config, learned)
    for step in work:
        step()
    detach(model)
    scales.set_values(scales.config, learned)
    return model


def _planned(owner, layer: AttentionLayer, scale: Tensor, dequantize: bool) -> Callable[[], None]:
    """What folds one layer's scale; ValueError where nothing does."""
    granularity = "head" if scale.dim() == 1 else "channel"
    name = layer.projection_name or layer.name
    if layer.projection_name is None or granularity not in layer.commutes:
        raise ValueError(
            f"seal_ops.fold_scales: {name} must read the attention output directly, got a module with another step in "
            f"between ({type(layer.module).__name__}); keep the scales attached instead"
        )
    factor = scale.reshape(layer.num_heads, -1).expand(-1, layer.head_dim).reshape(-1)
    projection = owner.get_submodule(layer.projection_name)
    if granularity == "head":
        reason = _groups_inside_heads(projection, layer)
        if reason is None:
            return lambda: _fold_inputs(projection, factor)
    else:
        values, reason = _value_rows(owner, layer)
        if reason is None:
            return lambda: _fold_rows(values, factor)
    if not dequantize:
        raise ValueError(
            f"seal_ops.fold_scales: {name} must take the scale in 4 bits, got {reason}; dequantize=True writes the "
            f"layer out in 16 bits, or keep the scales attached"
        )
    if not bases.is_base(projection):
        raise ValueError(
            f"seal_ops.fold_scales: {name} must be one linear layer to be written out, got {type(projection).__name__}"
        )
    return lambda: _write_out(owner, layer, projection, factor)


def _groups_inside_heads(projection: nn.Module, layer: AttentionLayer) -> str | None:
    """Why a head's scale is no factor of whole groups of ``o_proj``; None where it is."""
    return _not_rowwise(projection, layer.head_dim, "head_dim")


def _not_rowwise(module: nn.Module, span: int, what: str) -> str | None:
    """Why groups of ``module`` do not lie in pieces of ``span`` inputs of one row; None where they do."""
    if bases.is_nf4(module):
        if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
            return "a weight that bitsandbytes has repacked for a product on the CPU"
        group = module.weight.quant_state.blocksize
    elif bases.is_hqq(module):
        if module.meta.get("axis") != 1 or not isinstance(module.meta.get("scale"), Tensor):
            return "HQQ groups that do not run along the inputs"
        group = module.meta["group_size"]
    else:
        return f"{type(module).__name__}, whose group scales are not known here"
    columns, _ = bases.sizes(module)
    if span % group or columns % group:
        return f"groups of {group} weights, which do not divide {what} {span}"
    return None


def _value_rows(owner, layer: AttentionLayer) -> tuple[nn.Module | None, str | None]:
    """The layer whose rows are the value channels, or why there is none."""
    if layer.num_kv_heads != layer.num_heads:
        return None, (
            f"channel scales of {layer.num_heads} query heads for {layer.num_kv_heads} value heads, which share rows"
        )
    values = getattr(layer.module, "v_proj", None)
    if values is None or not bases.is_base(values) or bases.sizes(values)[1] != layer.num_heads * layer.head_dim:
        return None, f"{type(layer.module).__name__} without a v_proj of its own"
    columns, _ = bases.sizes(values)
    reason = _not_rowwise(values, columns, "the inputs of v_proj,")
    if reason is None and not _reaches(owner, values, layer):
        reason = f"{type(layer.module).__name__}, where v_proj's channels are not those of the attention output"
    return (values, None) if reason is None else (None, reason)


def _reaches(owner, values: nn.Module, layer: AttentionLayer) -> bool:
    """Whether a factor on v_proj's output is one on what o_proj reads: tried, on a few tokens."""
    seen: list[Tensor] = []
    projection = owner.get_submodule(layer.projection_name)
    width = layer.num_heads * layer.head_dim
    device = owner.get_input_embeddings().weight.device
    factor = torch.tensor(_FACTORS, device=device)[torch.arange(width, device=device) % len(_FACTORS)]
    ids = torch.arange(5, device=device)[None] % owner.config.vocab_size
    handle = projection.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    try:
        with mode(owner, False):
            owner(input_ids=ids, use_cache=False)
            multiplied = values.register_forward_hook(lambda module, args, out: out * factor.to(out))
            try:
                owner(input_ids=ids, use_cache=False)
            finally:
                multiplied.remove()
    finally:
        handle.remove()
    plain, scaled = seen
    size = plain.abs().max()
    return bool(size > 0) and torch.allclose(scaled, plain * factor.to(plain), rtol=2e-2, atol=1e-3 * float(size))


def _fold_inputs(module: nn.Module, factor: Tensor) -> None:
    """Multiplies input column i of a layer by factor[i], which is one number in each group."""
    columns, rows = bases.sizes(module)
    scale = _group_scales(module)
    group = columns * rows // scale.numel()
    per_group = factor.reshape(-1, group)[:, 0].to(scale)
    scale.view(rows, columns // group).mul_(per_group)
    if has_columns(module):
        delta = module.column_delta
        delta.mul_(factor.to(delta).index_select(0, module.column_index))


def _fold_rows(module: nn.Module, factor: Tensor) -> None:
    """Multiplies row i of a layer, and its bias, by factor[i]."""
    _, rows = bases.sizes(module)
    scale = _group_scales(module)
    scale.view(rows, -1).mul_(factor.to(scale)[:, None])
    if getattr(module, "bias", None) is not None:
        module.bias.mul_(factor.to(module.bias))
    if has_columns(module):
        module.column_delta.mul_(factor.to(module.column_delta)[:, None])


def _group_scales(module: nn.Module) -> Tensor:
    """The scales of a layer's groups, row by row, as they can be written: fp32 for NF4, HQQ's own."""
    if bases.is_hqq(module):
        return module.meta["scale"]
    state = module.weight.quant_state
    if state.nested:
        from bitsandbytes.functional import dequantize_blockwise

        state.absmax = (dequantize_blockwise(state.absmax, state.state2) + state.offset).float()
        state.nested, state.state2, state.offset = False, None, None
        module.weight.compress_statistics = False
    return state.absmax


def _write_out(owner, layer: AttentionLayer, projection: nn.Module, factor: Tensor) -> None:
    """``o_proj`` in 16 bits with the factor, and with its weak columns, if it has any, still on it."""
    weight = bases.weight_of(projection, bases.computes_in(owner))
    kind = torch.promote_types(weight.dtype, torch.float32)
    made = linear_like((weight.to(kind) * factor.to(weight.device, kind)).to(weight.dtype), projection)
    quantizers.replace(owner, layer.projection_name, made)
    if has_columns(projection):
        index, delta = projection.column_index, projection.column_delta.detach()
        delta = delta * factor.to(delta).index_select(0, index)
        put_columns_on(owner.seal_weak_columns, layer.projection_name, index, delta)
    layer.output_projection = owner.get_submodule(layer.projection_name)
