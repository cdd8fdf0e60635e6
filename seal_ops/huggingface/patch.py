"""The changes to one model, put on and taken off together.

Only this model is changed: its config's entry for attention, the class of its attention modules, a hook on the model
itself, and two on the module that makes their masks.
"""

from __future__ import annotations

import types

from torch import nn

from . import attention as _attention  # noqa: F401  a model that is unpickled finds the registries filled
from . import model_call
from .call_arguments import maker_of_masks, unwatch, watch
from .layers import AttentionLayer, attached_class
from .masks import NAME

PATCH = "_seal_patch"  # where a model keeps the patch that is on it
_BATCHING = "init_continuous_batching"  # which `generate_batch` calls
SCALES, PROGRAM, TRAINING = "scales", "program", "training"  # what a patch may be on a model for


class Patch:
    """All changes to one model, put on and taken off together; ``layers`` in the order of the layers.

    Scales, position programs and masks of training share one patch: it is on while one of its ``users`` is.
    """

    def __init__(self, model: nn.Module, layers: list[AttentionLayer]):
        self.model, self.layers = model, layers
        self.users: set[str] = set()
        configs = {id(layer.module.config): layer.module.config for layer in layers}
        self.configs = [(config, config._attn_implementation) for config in configs.values()]
        self.bystanders = {id(m): m for layer in layers for m in layer.bystanders}
        self.maker = maker_of_masks(model, [layer.name for layer in layers])
        self._claim_layers()

    def __setstate__(self, state: dict) -> None:
        """Of a copy of the whole model, or one out of a pickle."""
        self.__dict__.update(state)
        self._claim_layers()

    def _claim_layers(self) -> None:
        for layer in self.layers:
            layer.in_a_model = True

    def serves(self, user: str) -> bool:
        """Whether the patch is on the model for ``user``."""
        return user in self.users

    @property
    def num_fused_rotations(self) -> int:
        """Layers whose rotary embedding runs in the fused kernels."""
        return sum(layer.rotation is not None for layer in self.layers)

    def summary(self) -> str:
        """What runs fused, in words."""
        text = f"rotation fused in {self.num_fused_rotations} of {len(self.layers)} layers"
        composed = sorted({layer.composed for layer in self.layers if layer.composed})
        if composed:
            number = sum(layer.composed is not None for layer in self.layers)
            text += f", attention composed in {number} ({', '.join(composed)})"
        return text

    def install(self, user: str) -> None:
        """Puts the changes on for ``user``; anew where they are on, for layers that have got another backend."""
        if self.users:
            self._take_off()
        self.users.add(user)
        self._put_on()

    def remove(self, user: str) -> None:
        """Takes the changes off, unless another user needs them."""
        self.users.discard(user)
        self._take_off()
        if self.users:
            self._put_on()

    def _put_on(self) -> None:
        self.model.__dict__[PATCH] = self
        if hasattr(type(self.model), _BATCHING):
            self.model.__dict__[_BATCHING] = refuse_continuous_batching
        for config, _ in self.configs:
            config._attn_implementation_internal = (
                NAME  # the property would also reach sub-models such as a vision tower
            )
        for layer in self.layers:
            module = layer.module
            layer.scaled = SCALES in self.users
            module.__dict__["_seal_layer"] = layer
            base = type(module)
            if not hasattr(base, "_seal_base"):  # left by an earlier attachment under another library's subclass
                module.__class__ = attached_class(base, layer.backend)
            rebind(module, base.forward)
        for module in self.bystanders.values():
            module.__dict__["_seal_bystander"] = True
        if self.maker is not None:
            watch(self.maker)
        model_call.watch(self.model)

    def _take_off(self) -> None:
        self.model.__dict__.pop(PATCH, None)
        if self.model.__dict__.get(_BATCHING) is refuse_continuous_batching:
            del self.model.__dict__[_BATCHING]
        for config, previous in self.configs:
            if config._attn_implementation_internal == NAME:  # else the user has chosen another one since
                config._attn_implementation_internal = previous
        if self.maker is not None:
            unwatch(self.maker)
        model_call.unwatch(self.model)
        for module in self.bystanders.values():
            module.__dict__.pop("_seal_bystander", None)
        for layer in self.layers:
            module = layer.module
            module.__dict__.pop("_seal_layer", None)
            attached = type(module)
            if (
                "_seal_base" in attached.__dict__
            ):  # else another library's subclass is on top; ours calls the original now
                module.__class__ = attached._seal_base
                rebind(module, attached.forward)


def refuse_continuous_batching(*args, **kwargs):
    """In the place of a model's ``init_continuous_batching``: transformers would take its own attention for ours."""
    raise ValueError(
        "seal_ops: continuous batching (generate_batch) must be given a model without attached scales or programs, "
        "since transformers' paged cache runs only its own attention functions; call "
        "seal_ops.merge(model) first, or generate"
    )


def patch_on(model: nn.Module) -> Patch | None:
    """The patch that is on ``model``, a transformers model without wrappers."""
    return model.__dict__.get(PATCH)


def rebind(module: nn.Module, previous: types.FunctionType) -> None:
    """Bound methods of ``module`` to the previous class's forward, kept or left by accelerate's hooks, become the
    present one's."""
    for name in ("_old_forward", "forward"):
        method = module.__dict__.get(name)
        if isinstance(method, types.MethodType) and method.__func__ is previous and method.__self__ is module:
            module.__dict__[name] = types.MethodType(type(module).forward, module)
