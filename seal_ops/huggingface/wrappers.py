"""What other libraries put round a transformers model."""

from __future__ import annotations

from torch import nn

PARALLEL = {"DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"}


def check_module(model, call: str) -> None:
    """ValueError in the name of ``call`` for what is no model: a name, a config, a pipeline, a class."""
    if not isinstance(model, nn.Module):
        got = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise ValueError(f"seal_ops.{call}: model must be a torch.nn.Module, got {got}")


def unwrapped(model: nn.Module, call: str) -> nn.Module:
    """The transformers model inside PEFT's and torch.compile's wrappers, which is what its own verbs give back."""
    check_module(model, call)
    if any(base.__name__ in PARALLEL for base in type(model).__mro__):
        # Their scales would be one a process, each learning by itself.
        raise ValueError(
            f"seal_ops.{call}: model must be given before it is wrapped or sharded for several devices, "
            f"got {type(model).__name__}"
        )
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if callable(getattr(model, "get_base_model", None)) else model
