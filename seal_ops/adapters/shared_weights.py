"""A second model on the same weights: what objectives with a reference (DPO, KTO, GRPO) compare with."""

from __future__ import annotations

import copy
import itertools

from torch import nn

from ..huggingface.wrappers import unwrapped
from .attachment import SUBMODULE, attached, take_off
from .freezing import attached_beside, forget_frozen, has_peft_layers

REFERENCES = ("off", "frozen")


def reference_model(model: nn.Module, scales: str = "off") -> nn.Module:
    """A second model on the weights of ``model``, as the reference of DPO, KTO or GRPO: TRL's ``ref_model``.

    What is frozen in ``model`` is the same parameters in both, so the reference costs no memory and follows the model
    to another device.  It is in evaluation mode and wants no gradient of its own.

    Args:
        model: a model with scales attached, also inside a PEFT model.
        scales: "off" for the base model, with PEFT's adapters off as well; "frozen" for the model as it is now, with
            copies of what trains (scales, PEFT's adapters) that stay as they are.

    Returns:
        The reference, of the class of the transformers model inside ``model``.

    Raises:
        ValueError: no scales on the model, weak columns on it, weights that are sharded or offloaded, or an unknown
            kind of reference.

    Source:
        DPO (arXiv 2305.18290), section 4.
    """
    if scales not in REFERENCES:
        raise ValueError(f"seal_ops.reference_model: scales must be 'off' or 'frozen', got {scales!r}")
    attached(model, "reference_model")
    owner = unwrapped(model, "reference_model")
    if any(p.is_meta or hasattr(p, "full_tensor") for p in owner.parameters()):
        raise ValueError(
            f"seal_ops.reference_model: model must have its weights in place, got a {type(model).__name__} that is "
            f"sharded or offloaded"
        )
    if attached_beside(owner, SUBMODULE):
        raise ValueError("seal_ops.reference_model: model must have no weak columns on it, got one that has")
    tensors = itertools.chain(owner.parameters(), owner.buffers())
    reference = copy.deepcopy(owner, {id(t): t for t in tensors if scales == "off" or not t.requires_grad})
    if scales == "off":
        take_off(*attached(reference, "reference_model"))
        _switch_off_peft(reference)
    else:
        reference.seal_scales.requires_grad_(False)
        shared = {id(p) for p in owner.parameters()}
        for parameter in reference.parameters():
            if id(parameter) not in shared:
                parameter.requires_grad_(False)
    forget_frozen(reference)
    return reference.eval()


def _switch_off_peft(model: nn.Module) -> None:
    """PEFT's adapters off, as in its own ``disable_adapter``, without its change of what trains: that is shared."""
    if has_peft_layers(model):
        from peft.tuners.tuners_utils import BaseTunerLayer

        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                module._disable_adapters = True
