"""The decoder layers of a model, observed in a call: one list, one tensor of states handed from each to the next."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ...huggingface.discovery import find_attention_layers
from ...huggingface.layers import AttentionLayer
from ...huggingface.patch import patch_on

# The names under which releases of transformers hand a cache to a layer.
CACHES = ("cache", "past_key_values", "past_key_value", "layer_past")


class UnknownStructure(Exception):
    """Why the layers of a model cannot be planned one by one; a sentence's end, after "because"."""


@dataclasses.dataclass(frozen=True, eq=False)
class Decoder:
    """The layers in the order of their calls, and the attention layers that lie in them (None where there is none)."""

    model: nn.Module
    layers: tuple[nn.Module, ...]
    attention: tuple[AttentionLayer | None, ...]

    @property
    def trains(self) -> tuple[bool, ...]:
        """Whether something in each layer asks for a gradient; scales lie beside the model's own modules."""
        return tuple(
            any(p.requires_grad for p in layer.parameters()) or _scaled(attention)
            for layer, attention in zip(self.layers, self.attention)
        )


def _scaled(attention: AttentionLayer | None) -> bool:
    scaling = None if attention is None or not attention.scaled else attention.scaling
    return scaling is not None and any(p.requires_grad for p in scaling.parameters())


def find_decoder(model: nn.Module) -> Decoder:
    """The decoder of a transformers model inside PEFT's wrappers.  Raises UnknownStructure."""
    if hasattr(model, "_orig_mod"):
        raise UnknownStructure("it is compiled")
    owner = model.get_base_model() if callable(getattr(model, "get_base_model", None)) else model
    lists = [
        module
        for module in owner.modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and all(isinstance(layer, GradientCheckpointingLayer) for layer in module)
    ]
    if len(lists) != 1:
        raise UnknownStructure(f"it has {len(lists)} lists of layers that transformers can checkpoint")
    layers = tuple(lists[0])
    if len({id(layer) for layer in layers}) < len(layers):
        raise UnknownStructure("it runs a layer twice")
    return Decoder(owner, layers, _attention_in(owner, layers))


def _attention_in(owner: nn.Module, layers: tuple[nn.Module, ...]) -> tuple[AttentionLayer | None, ...]:
    patch = patch_on(owner)
    try:
        found = patch.layers if patch is not None else find_attention_layers(owner)
    except ValueError:  # attention that this package does not reach: the layers are run as they are
        found = []
    by_module = {id(layer.module): layer for layer in found}
    return tuple(next((by_module[id(m)] for m in layer.modules() if id(m) in by_module), None) for layer in layers)


@contextlib.contextmanager
def replaced_forwards(replacements: list[tuple[nn.Module, Callable]]) -> Iterator[None]:
    """Inside, each module's ``forward`` is ``replacement(forward, *args, **kwargs)``.

    It lies on the instance, over what another library may have laid there, which is put back.
    """
    before = []
    try:
        for module, replacement in replacements:
            own = module.__dict__.get("forward")
            before.append((module, own))
            module.__dict__["forward"] = _bound(replacement, module.forward)
        yield
    finally:
        for module, own in reversed(before):
            if own is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = own


def _bound(replacement: Callable, forward: Callable) -> Callable:
    return lambda *args, **kwargs: replacement(forward, *args, **kwargs)


def states_of(args: tuple, kwargs: dict) -> Tensor:
    """The hidden states [B, S, H] that a layer was called with.  Raises UnknownStructure."""
    if not args or not isinstance(args[0], Tensor) or args[0].dim() != 3:
        raise UnknownStructure("its layers are not called with the hidden states first")
    if any(kwargs.get(name) is not None for name in CACHES):
        raise UnknownStructure("its layers are called with a cache")
    return args[0]


class Watch:
    """Follows one call of a decoder: whether each layer is called once, in order, on the result of the one before."""

    def __init__(self, decoder: Decoder):
        self.decoder, self.last, self.calls = decoder, None, 0

    def enter(self, number: int, args: tuple, kwargs: dict) -> Tensor:
        """The states that layer ``number`` is called with.  Raises UnknownStructure."""
        states = states_of(args, kwargs)
        if number != self.calls:
            raise UnknownStructure("its layers are not called once each and in their order")
        if number and states is not self.last:
            raise UnknownStructure("it works on the states between two layers")
        self.calls += 1
        return states

    def leave(self, states: Tensor, result) -> None:
        """Notes the result.  Raises UnknownStructure where it is no tensor like ``states``."""
        if not isinstance(result, Tensor) or result.shape != states.shape:
            raise UnknownStructure("its layers return something else than the hidden states")
        self.last = result

    def finish(self) -> None:
        """Raises UnknownStructure where a layer was not called."""
        if self.calls != len(self.decoder.layers):
            raise UnknownStructure("not all of its layers were called")


def no_dropout(module: nn.Module) -> bool:
    """Whether no module in it drops anything while training."""
    return not any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in module.modules())


def offloaded(module: nn.Module) -> bool:
    """Whether accelerate's hooks bring and take away weights in it."""
    return any(getattr(getattr(m, "_hf_hook", None), "offload", False) for m in module.modules())


def device_of(model: nn.Module) -> torch.device:
    """Of the first parameter that is not on the meta device, else the meta device."""
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("meta"))
