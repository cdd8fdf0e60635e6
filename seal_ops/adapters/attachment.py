"""Attach, detach, disable and load the scales of one model.

SEAL (arXiv 2501.15225) multiplies the attention output, before its projection, by one learned factor per query head
("head", SEAL-H) or per channel ("channel", SEAL-C) in every layer; the model itself is frozen.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import operator
import os
import warnings
from collections.abc import Iterable, Sequence

from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..huggingface.discovery import find_attention_layers
from ..huggingface.layers import GRANULARITIES, AttentionLayer
from ..huggingface.model_parallel import ulysses
from ..huggingface.modes import recomputed_inside
from ..huggingface.patch import SCALES, Patch, patch_on
from ..huggingface.wrappers import check_module, unwrapped
from ..ops.dispatch import choose
from . import peft_registry
from .files import DEFAULT_ADAPTER, ScalesConfig, read, shown, tensor_name
from .freezing import freeze, thaw
from .generating import GenerateRows
from .hub import resolve
from .merge_record import check_not_merged
from .model_card import read_facts
from .saving import SaveBoth
from .scales import Scales, check_new_name

SUBMODULE = "seal_scales"


@dataclasses.dataclass(eq=False)
class Attachment:
    """How to bring the model back; lives in the scales' ``__dict__`` and is copied with the model.

    ``owner`` is the module that holds the scales: the transformers model itself, inside whatever wraps it.
    ``stand_ins``: what stands in for the model's ``save_pretrained`` and ``generate``.
    """

    owner: nn.Module
    patch: Patch
    stand_ins: list[SaveBoth | GenerateRows]


def attached(model: nn.Module, call: str) -> tuple[Scales, Attachment]:
    """The scales on ``model``, wherever in it they are; ValueError in the name of ``call`` where there are none."""
    check_module(model, call)
    found = [m for m in model.modules() if isinstance(m, Scales) and m.attachment is not None]
    if len(found) != 1:
        raise ValueError(
            f"seal_ops.{call}: model must have scales attached, this {type(model).__name__} has "
            f"{'none' if not found else f'{len(found)} models with scales in it; pass one of them'}"
        )
    return found[0], found[0].attachment


def owner_of(scales: Scales, call: str) -> nn.Module:
    """The model that ``scales`` are on; ValueError in the name of ``call`` where they were taken off."""
    if scales.attachment is None:
        raise ValueError(f"seal_ops.{call}: the scales must be attached to a model, got scales that were taken off")
    return scales.attachment.owner


def _base_config(model: nn.Module):
    return getattr(model, "config", None)


def _select(attention_layers: list[AttentionLayer], layers: Sequence[int] | None, call: str) -> list[AttentionLayer]:
    if layers is None:
        return list(attention_layers)
    known = {attn.index: attn for attn in attention_layers}
    chosen = list(layers) if isinstance(layers, Iterable) else [layers]
    whole = [_whole_number(i) for i in chosen]
    if not chosen or not isinstance(layers, Iterable) or not all(i in known for i in whole):
        numbers = list(known)
        expected = f"from {numbers[0]} to {numbers[-1]}" if numbers == list(range(len(numbers))) else f"among {numbers}"
        got = chosen if isinstance(layers, Iterable) else layers
        raise ValueError(f"seal_ops.{call}: layers must be indices {expected}, got {shown(got)}")
    return [known[i] for i in sorted(set(whole))]


def _whole_number(value) -> int | None:
    """The integer that a number is, NumPy's too; None for True and for all else."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def refuse_second(model: nn.Module, call: str) -> None:
    """ValueError in the name of ``call`` where the model already has scales."""
    check_module(model, call)
    if any(isinstance(m, Scales) for m in model.modules()):
        raise ValueError(f"seal_ops.{call}: model already has scales attached; call seal_ops.detach(model) first")


def attach(
    model: nn.Module, granularity: str = "head", layers: Sequence[int] | None = None, backend: str | None = None
) -> Scales:
    """Freezes ``model`` and gives its self-attention layers scales, all 1, that are its only trainable parameters.

    The model is run once on two tokens to observe sizes and structure.  Where PEFT's layers are in it, PEFT has frozen
    the base already, and what it lets train goes on training beside the scales, as weak columns do
    (`seal_ops.attach_weak_columns`).  Every layer runs the fused attention, also one that gets no scales.

    Args:
        model: a transformers model with loaded weights that calls attention through the attention registry, also
            inside a PEFT model.
        granularity: "head" (``[Hq]`` a layer) or "channel" (``[Hq, D]``).
        layers: the layers that get scales, by the model's own numbers; None for all with attention.
        backend: see `seal_ops.attention`.

    Returns:
        The `Scales`, also found as ``model.seal_scales``.

    Raises:
        ValueError: a model that calls attention in no known way or has terms that the scaled attention does not have,
            scales already attached, or a backend that cannot run.

    Source:
        SEAL (arXiv 2501.15225), section 4.
    """
    _check_granularity(granularity, "attach")
    refuse_second(model, "attach")
    return attach_to(model, layers_of(unwrapped(model, "attach")), granularity, layers, backend)


def layers_of(model: nn.Module) -> list[AttentionLayer]:
    """The attention layers of a model without wrappers, as found now or when it was extended."""
    patch = patch_on(model)
    return find_attention_layers(model) if patch is None else patch.layers


def _check_granularity(granularity, call: str) -> None:
    if granularity not in GRANULARITIES:
        raise ValueError(f"seal_ops.{call}: granularity must be 'head' or 'channel', got {granularity!r}")


def attach_to(
    model: nn.Module,
    attention_layers: list[AttentionLayer],
    granularity: str,
    layers: Sequence[int] | None,
    backend: str | None,
    adapter_name: str = DEFAULT_ADAPTER,
) -> Scales:
    """`attach`, for attention layers that are already found."""
    owner = unwrapped(model, "attach")
    config = describe(owner, attention_layers, granularity, layers)
    if backend not in (None, "auto"):
        first = attention_layers[0]
        choose(backend, "attention", first.device, first.dtype, first.head_dim)
    scales = Scales(config, {attn.index: attn.device for attn in attention_layers}, adapter_name)
    scales.bind(attention_layers)
    for attn in attention_layers:
        attn.backend = backend
    freeze(owner, SUBMODULE)
    setattr(owner, SUBMODULE, scales)
    stand_ins = [
        SaveBoth(m, scales)
        for m in dict.fromkeys((getattr(model, "_orig_mod", model), owner))
        if callable(getattr(type(m), "save_pretrained", None))
    ]
    if callable(getattr(type(owner), "generate", None)):
        stand_ins.append(GenerateRows(owner, scales))
    patch = patch_on(owner) or Patch(owner, attention_layers)
    _tell_of_other_attention(patch)
    scales.attachment = Attachment(owner, patch, stand_ins)
    scales.attachment.patch.install(SCALES)
    for stand_in in stand_ins:
        stand_in.install()
    peft_registry.register()
    return scales


def _tell_of_other_attention(patch: Patch) -> None:
    """Warns where the model's attention is a function that is neither transformers' nor a kernel of the hub."""
    for name in dict.fromkeys(previous for _, previous in patch.configs if previous):
        function = ALL_ATTENTION_FUNCTIONS.get(name)
        while isinstance(function, functools.partial):
            function = function.func
        origin = getattr(function, "__module__", None) or ""
        if function is not None and "/" not in name and origin.partition(".")[0] not in ("transformers", "seal_ops"):
            warnings.warn(
                f"seal_ops.attach: the model's attention {name!r} is a function of {origin or 'unknown origin'}, in "
                f"whose place scaled attention computes; what it does beside attention is lost while scales are on",
                stacklevel=4,
            )


def describe(
    model: nn.Module,
    attention_layers: list[AttentionLayer],
    granularity: str,
    layers: Sequence[int] | None = None,
    call: str = "attach",
) -> ScalesConfig:
    """The config that scales of this granularity would have on ``model``."""
    chosen = _select(attention_layers, layers, call)
    base = _base_config(model)
    return ScalesConfig(
        granularity,
        tuple(s.index for s in chosen),
        tuple(s.num_heads for s in chosen),
        tuple(s.head_dim for s in chosen),
        getattr(base, "model_type", None),
        getattr(base, "_name_or_path", None) or None,
    )


def new_config(scales: Scales, granularity: str, layers: Sequence[int] | None) -> ScalesConfig:
    """The config of another adapter for the model that ``scales`` are on."""
    owner = owner_of(scales, "Scales.add_adapter")
    _check_granularity(granularity, "Scales.add_adapter")
    return describe(owner, scales.attachment.patch.layers, granularity, layers, "Scales.add_adapter")


def detach(model: nn.Module) -> nn.Module:
    """Takes the scales off; the model is bit for bit what it was before `attach`, ``requires_grad`` flags included.

    Parameters that the model has got since keep their flags, and where PEFT's layers are in it, PEFT's flags stay.
    Where weak columns are still attached, the base stays frozen until they are taken off too.
    The `Scales` object keeps its values and can still be saved.

    Returns:
        The model.

    Raises:
        ValueError: no scales on the model.
    """
    scales, attachment = attached(model, "detach")
    if ulysses.place() is not None:
        warnings.warn(
            "seal_ops.detach: without scales the model attends to the tokens of this process alone, because "
            "DeepSpeed's sequence parallelism was registered for the attention of models with scales",
            stacklevel=2,
        )
    take_off(scales, attachment)
    thaw(attachment.owner, SUBMODULE)
    return model


def take_off(scales: Scales, attachment: Attachment) -> None:
    """`detach` without a change to what trains."""
    attachment.patch.remove(SCALES)
    for layer in attachment.patch.layers:
        layer.scaling = None
    delattr(attachment.owner, SUBMODULE)
    for stand_in in attachment.stand_ins:
        stand_in.remove()
    scales.attachment = None


@contextlib.contextmanager
def disabled(model: nn.Module):
    """Inside the block ``model`` computes what it did before `attach`, with its own attention implementation.

    Raises:
        ValueError: no scales on the model, or sequence parallelism, which the model's own attention would not have.
    """
    scales, attachment = attached(model, "disabled")
    if ulysses.place() is not None:
        raise ValueError(
            "seal_ops.disabled: model must not run under DeepSpeed's sequence parallelism, which was registered for "
            "the attention of models with scales, got a process in which it is on"
        )
    patch, was_on = attachment.patch, attachment.patch.serves(SCALES)
    patch.remove(SCALES)
    try:
        with recomputed_inside(attachment.owner, "disabled"):
            yield model
    finally:
        # Not where the block detached or merged the model.
        if was_on and scales.attachment is attachment:
            patch.install(SCALES)


def load(
    model: nn.Module,
    save_directory: str | os.PathLike,
    backend: str | None = None,
    *,
    adapter_name: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    subfolder: str | None = None,
) -> Scales:
    """Puts saved scales on ``model``; the reverse of `Scales.save_pretrained`.

    A model without scales gets them attached.  On a model with scales, those of the active adapter are replaced, or,
    under an ``adapter_name`` that is new, a second adapter is added beside them (`Scales.set_adapter` activates it).
    Everything is checked before the model is touched.

    Args:
        save_directory: a folder, or a repository on the Hugging Face hub; either may also be a whole model's that was
            saved with its scales.
        backend: as in `attach`.
        adapter_name: the adapter that gets the values; None for the active one.
        revision, token, subfolder: as on the hub.

    Returns:
        The `Scales`.

    Raises:
        FileNotFoundError: nothing under the name.
        ValueError: a damaged file, an adapter made for another model, tensors of another shape or dtype than the
            config says, or scales that were merged into this model already.
    """
    check_module(model, "load")
    source = resolve(save_directory, revision=revision, token=token, subfolder=subfolder)
    saved, tensors, version = read(source)
    on_it = any(isinstance(m, Scales) for m in model.modules())
    scales = attached(model, "load")[0] if on_it else None
    if adapter_name is not None and (scales is None or adapter_name not in scales.adapter_names):
        check_new_name(adapter_name, "load", scales)
    if scales is not None and backend is not None:
        raise ValueError(
            f"seal_ops.load: backend must be given when scales are attached first, got {backend!r} for a "
            f"model with scales; call seal_ops.detach(model) first"
        )
    owner = unwrapped(model, "load") if scales is None else scales.attachment.owner
    attention_layers = layers_of(owner) if scales is None else scales.attachment.patch.layers
    config = numbered(saved, version, attention_layers, source)
    check_fits(config, owner, attention_layers, source)
    values = {layer: tensors[tensor_name(number)] for layer, number in zip(config.layers, saved.layers)}
    check_not_merged(_base_config(owner), config, values, repr(source), "load")
    if scales is None:
        scales = attach_to(
            model, attention_layers, config.granularity, config.layers, backend, adapter_name or DEFAULT_ADAPTER
        )
    if adapter_name in (None, scales.active_adapter):
        scales.set_values(config, values)
    else:
        scales.inactive[adapter_name] = config, values
    scales.cards[adapter_name or scales.active_adapter] = read_facts(source)
    return scales


def numbered(
    config: ScalesConfig, version: int, attention_layers: list[AttentionLayer], source: str, call: str = "load"
) -> ScalesConfig:
    """``config`` with the model's own layer numbers; files of version 1 counted attention layers."""
    if version > 1:
        return config
    if max(config.layers) >= len(attention_layers):
        raise ValueError(
            f"seal_ops.{call}: {source!r} must be an adapter for {len(attention_layers)} layers, got one with layer "
            f"{shown(max(config.layers))}"
        )
    return dataclasses.replace(config, layers=tuple(attention_layers[number].index for number in config.layers))


def check_fits(
    config: ScalesConfig, model: nn.Module, attention_layers: list[AttentionLayer], source: str, call: str = "load"
) -> None:
    """ValueError in the name of ``call`` where an adapter with this config was made for another model."""
    model_type = getattr(_base_config(model), "model_type", None)
    if config.model_type and model_type and config.model_type != model_type:
        raise ValueError(
            f"seal_ops.{call}: {source!r} must be an adapter for model type {model_type!r}, got one for "
            f"{shown(config.model_type)}"
        )
    known = {attn.index: attn for attn in attention_layers}
    for layer, heads, head_dim in zip(config.layers, config.num_heads, config.head_dim):
        if layer not in known:
            raise ValueError(
                f"seal_ops.{call}: {source!r} must be an adapter for the {len(attention_layers)} attention layers "
                f"{shown(list(known))}, got one with layer {shown(layer)}"
            )
        attn = known[layer]
        if (heads, head_dim) != (attn.num_heads, attn.head_dim):
            raise ValueError(
                f"seal_ops.{call}: {source!r} must be an adapter for {attn.num_heads} heads of "
                f"{attn.head_dim} channels in layer {layer}, got one for {shown(heads)} heads of "
                f"{shown(head_dim)}"
            )
