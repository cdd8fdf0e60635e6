"""A call of the whole model: what it must not hold, and what accelerate would move to the wrong device."""

from __future__ import annotations

from torch import Tensor, nn


def is_split(model: nn.Module) -> bool:
    """Whether accelerate has divided ``model`` among several devices."""
    return len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1


def _before_call(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """The forward pre-hook of a model with scales, or with an extension."""
    if kwargs.get("adapter_names") is not None:  # most models swallow what they do not know
        raise ValueError(
            "seal_ops: a forward pass must take the adapters of its rows from the block `with "
            "scales.adapters_per_row(names):` round it, got adapter_names, which only generate takes"
        )
    positions = kwargs.get("logits_to_keep")
    if isinstance(positions, Tensor) and positions.dim() and is_split(module):
        # As numbers: accelerate would move a tensor to the first device, where it indexes nothing on the last one.
        return args, {**kwargs, "logits_to_keep": positions.tolist()}
    return None


def watch(model: nn.Module) -> None:
    """Puts the hook on a model."""
    model.register_forward_pre_hook(_before_call, with_kwargs=True)


def unwatch(model: nn.Module) -> None:
    """Takes the hook of `watch` off, also from a copy of the model."""
    hooks, flags = model._forward_pre_hooks, model._forward_pre_hooks_with_kwargs
    for key in [key for key, hook in hooks.items() if hook is _before_call]:
        del hooks[key]
        flags.pop(key, None)
