"""Finding the attention modules of a model.

Nothing here names a model class.  Which modules take part, how many heads they have, and which linear module reads the
attention output is *observed*, by running the model on two tokens.
"""

from __future__ import annotations

import functools
import inspect
import re
import types
import warnings

from torch import Tensor, nn
from transformers import PreTrainedModel

from .attention import UnknownCaller, UnsupportedAttention
from .layers import AttentionLayer, attached_class
from .masks import NAME
from .model_parallel import tensor, ulysses
from .modes import run_two_tokens
from .patch import Patch
from .projection import RUNS, Readers, attention_output, is_linear
from .rotation import MAX_HEAD_DIM, Rotation, names_used, unreplaced


class _Probe:
    """Stands in for the attention of one layer and notes what passes."""

    def __init__(self, layer: AttentionLayer, watch: _Watch):
        self.layer, self.watch, self.readers = layer, watch, Readers()
        self.active, self.out = None, None
        self.entered = False  # through the attached class's forward, which another library's may have replaced
        self.turned: str | None = None

    def run(self, forward, args: tuple, kwargs: dict):
        """``forward`` of the module, once for each known attention output; the first result goes on."""
        results, self.entered = [], True
        for run in RUNS:
            self.active = run
            results.append(forward(self.layer.module, *args, **kwargs))
            if self.out is None:  # it did not call attention
                break
            self.watch.run = None
        self.active = None
        return results[0]

    def observe(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rotation: Rotation | None,
        shapes: str | None,
        soft_capped: bool,
        windowed: bool,
    ) -> Tensor:
        layer = self.layer
        if _extends_mask(getattr(type(layer.module), "_seal_base", type(layer.module))):
            raise UnsupportedAttention(
                f"seal_ops.attach: model must hand the mask to attention as it is, "
                f"{type(layer.module).__name__} extends it by keys of its own"
            )
        layer.num_heads, layer.num_kv_heads, layer.head_dim = query.shape[1], key.shape[1], value.shape[-1]
        layer.device, layer.dtype = query.device, value.dtype
        layer.unfit_shapes, layer.soft_capped = shapes, soft_capped
        layer.windowed = windowed
        self.turned = _what_turned(layer, rotation, query, key) if self.entered else None
        if self.turned == "deferred":
            layer.turn = tuple(t[0, 1].detach().double().cpu() for t in (rotation.cos, rotation.sin))
        out = attention_output(query, layer.head_dim, self.active)
        if self.active is None:
            self.out = out
        self.watch.probe, self.watch.run = self, self.active
        return out


@functools.cache
def _extends_mask(cls: type) -> bool:
    """Whether an attention class lengthens its mask, which a mask that is a description does not survive.

    Two tokens do not show it: keys of its own may come with longer inputs alone.
    """
    try:
        source = inspect.getsource(inspect.unwrap(cls.forward))
    except (OSError, TypeError):
        return False
    return (
        re.search(r"\battention_mask\s*=\s*(torch\.cat|(F|functional)\.pad|nn\.functional\.pad)\(", source) is not None
    )


def _what_turned(layer: AttentionLayer, rotation: Rotation | None, query: Tensor, key: Tensor) -> str | None:
    if query.shape[-1] > MAX_HEAD_DIM:
        return None
    if rotation is None:  # no stand-in was passed
        return layer.rotation and "in place"
    if rotation.q is None:  # it was passed and left alone: a layer without positions
        return None
    return "deferred" if rotation.q is query and rotation.k is key else "in place"


class _Watch:
    """The layer whose attention output is on its way to a linear module."""

    def __init__(self):
        self.probe: _Probe | None = None
        self.run: str | None = None

    def reads(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        value = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        if self.probe is not None and value is not None:
            self.probe.readers.note(self.run, module, value)


def _probe(model: nn.Module, layers: list[AttentionLayer], rotation: str | None) -> None:
    """Runs two tokens through the model with every layer watched; fills in what each layer shows."""
    watch = _Watch()
    for layer in layers:
        layer.probe, layer.num_heads, layer.rotation = _Probe(layer, watch), 0, None
    patch, hooks = Patch(model, layers), []
    try:
        patch.install("probe")
        for layer in layers:
            layer.rotation = rotation if getattr(type(layer.module), "_seal_fused", False) else None
        linear = [m for m in model.modules() if is_linear(m)]
        hooks += [m.register_forward_pre_hook(watch.reads, with_kwargs=True) for m in linear]
        run_two_tokens(model)
    finally:
        patch.remove("probe")
        for hook in hooks:
            hook.remove()
        probes = [layer.probe for layer in layers]
        for layer in layers:
            layer.probe = None
    for layer, probe in zip(layers, probes):
        if layer.num_heads:
            layer.rotation = probe.turned
            probe.readers.conclude(layer, probe.out)


def find_attention_layers(model: nn.Module) -> list[AttentionLayer]:
    """The self-attention modules of a model, with their sizes, found by running it on two tokens.

    A candidate has a config with an attention implementation and is no model itself; it is kept if its attention call
    came through transformers' registry.  Warns once where a rotary embedding stays as it was though this
    package knows its kind.  Raises ValueError where there is no such module, naming what was missing.
    """

    def fail(reason: str):
        return ValueError(
            f"seal_ops.attach: model must call attention through transformers' attention registry, "
            f"{type(model).__name__} {reason}"
        )

    if ulysses.place() is not None:
        raise ValueError(
            f"seal_ops.attach: model must get its scales before DeepSpeed's sequence parallelism is registered (with "
            f"core_attn_implementation={NAME!r}), got a process in which it is"
        )
    # Some run on two tokens, given to both sides; but samples and their labels are of one stream everywhere here.
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"seal_ops.attach: model must read and write one stream of tokens, got {type(model).__name__}, an encoder "
            f"and a decoder"
        )
    names = {id(m): n for n, m in model.named_modules()}
    candidates = [AttentionLayer(n, m) for n, m in model.named_modules() if _may_attend(m)]
    if not candidates:
        raise fail("has no module that takes part in it")
    if any(layer.module.config._attn_implementation == NAME for layer in candidates):
        raise ValueError(
            f"seal_ops.attach: model must have a config of its own, this {type(model).__name__} shares its "
            f"config object with a model that has scales attached, or was loaded with attn_implementation={NAME!r}, a "
            f"name that attach alone gives"
        )
    if any(hasattr(p, "ds_id") for p in model.parameters()):
        raise ValueError(
            "seal_ops.attach: model must get its scales before DeepSpeed's ZeRO-3 divides its weights (load it before "
            "TrainingArguments are made), got weights that are divided"
        )
    if not _offloaded(model) and any(p.is_meta for p in model.parameters()):
        raise ValueError("seal_ops.attach: model must have its weights loaded, found parameters on the meta device")
    failure = _observe(model, candidates, names)
    if failure is not None and not any(layer.num_heads for layer in candidates):
        reads = getattr(model, "main_input_name", "input_ids")
        if reads != "input_ids":
            raise ValueError(
                f"seal_ops.attach: model must be a language model, which runs on tokens (input_ids) alone, "
                f"{type(model).__name__} reads {reads}"
            ) from failure
        raise fail(f"failed on two tokens, without any other input ({type(failure).__name__}: {failure})") from failure
    layers = [layer for layer in candidates if layer.num_heads]
    if not layers:
        raise fail("did not do so on two tokens")
    bystanders = tuple(layer.module for layer in candidates if not layer.num_heads)
    for layer in layers:
        if layer.output_projection is not None:
            layer.projection_name = names[id(layer.output_projection)]
        layer.bystanders = bystanders
    group = tensor.group_of(model)
    if group is not None:
        for layer in layers:
            tensor.count_all_heads(layer, group)
    _number(layers)
    _warn(layers, failure)
    return layers


def _observe(model: nn.Module, candidates: list[AttentionLayer], names: dict[int, str]) -> Exception | None:
    """Probes with the rotation deferred, else in place, else left alone; returns the first failure, if any.

    A forward that looks into cos and sin refuses the stand-in that carries a deferred rotation.  After the last failure
    no candidate has heads.
    """
    failure = None
    for rotation in ("deferred", "in place", None):
        while True:
            try:
                _probe(model, candidates, rotation)
                return failure
            except UnsupportedAttention:
                raise
            except UnknownCaller as error:  # a module that does not look like one that attends
                if id(error.module) not in names or any(layer.module is error.module for layer in candidates):
                    raise
                candidates.append(AttentionLayer(names[id(error.module)], error.module))
            except Exception as error:
                failure = failure or error
                for layer in candidates:
                    layer.num_heads = 0
                break
    return failure


def _may_attend(module: nn.Module) -> bool:
    """Whether a module could call attention: it has a config that names an implementation, and code that reads it."""
    if getattr(module.__dict__.get("config"), "_attn_implementation", None) is None or isinstance(
        module, PreTrainedModel
    ):
        return False
    if not isinstance(type(module).forward, types.FunctionType):
        return True  # a decorator that hides the code
    functions = [f for c in type(module).__mro__ if c not in nn.Module.__mro__ for f in vars(c).values()]
    return any({"_attn_implementation", "ALL_ATTENTION_FUNCTIONS"} & names_used(f) for f in functions)


def _offloaded(model: nn.Module) -> bool:
    """Whether accelerate's hooks bring the weights when they are needed."""
    return hasattr(model, "hf_device_map") or any(hasattr(m, "_hf_hook") for m in model.modules())


def _number(layers: list[AttentionLayer]) -> None:
    """Sorts by the model's order of layers, and numbers them as the model does where it numbers all of them."""
    indices = [getattr(layer.module, "layer_idx", None) for layer in layers]
    if all(type(i) is int and i >= 0 for i in indices) and len(set(indices)) == len(indices):
        layers.sort(key=lambda layer: layer.module.layer_idx)
        for layer in layers:
            layer.index = layer.module.layer_idx
    else:
        for running, layer in enumerate(layers):
            layer.index = running


def _warn(layers: list[AttentionLayer], failure: Exception | None) -> None:
    """One warning where a layer runs without the fused kernels that it could have had."""
    reasons = {}
    for layer in layers:
        if layer.rotation is None:
            layer.unfused = _why_unfused(layer.module, failure)
        for reason in (
            layer.unfused and f"keeps its own rotary embedding: {layer.unfused}",
            layer.composed
            and layer.composed.startswith("head_dim")
            and f"runs attention composed from PyTorch's parts: {layer.composed}",
        ):
            if reason:
                reasons.setdefault((type(layer.module).__name__, reason), []).append(layer)
    if reasons:
        text = "; ".join(
            f"{name} ({len(found)} of {len(layers)} layers) {reason}" for (name, reason), found in reasons.items()
        )
        warnings.warn(f"seal_ops.attach: {text}", stacklevel=4)


def _why_unfused(module: nn.Module, failure: Exception | None) -> str | None:
    cls = type(module)
    if attached_class(cls, None)._seal_fused:
        if module.__dict__.get("forward") is not None and "_old_forward" not in module.__dict__:
            owner = getattr(module.__dict__["forward"], "__module__", None)
            return f"its forward was replaced on the instance (by {owner})"
        return None if failure is None else f"it fails with a replaced one ({type(failure).__name__}: {failure})"
    return unreplaced(cls)
