"""A model without its weights, that can be run on two tokens all the same: what a model is, without what it knows.

Its parameters lie on the meta device.  A part of the model gets stand-ins for its own while it runs, and gives them
back: a GiB, or what the largest module takes, is all the memory that is used.
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .discovery import find_attention_layers
from .hub import reason
from .layers import AttentionLayer

AT_ONCE = 1 << 29  # a GiB in bfloat16
_BLOCK = 1 << 16  # random numbers that fill every stand-in


def read_hollow(folder: str | os.PathLike, call: str, *, trust_remote_code: bool = False) -> nn.Module:
    """The causal language model that a folder's ``config.json`` describes, without weights, in evaluation mode.

    Raises OSError, one sentence in the name of ``call``, where the folder describes none.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        with _parameters_on_meta():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=trust_remote_code)
    except Exception as error:  # of transformers, and of code that came with the model
        raise OSError(f"{call}: {folder} could not be read: {reason(error)}") from error
    return model.eval()


def attention_layers_of(model: nn.Module, at_once: int = AT_ONCE) -> list[AttentionLayer]:
    """`find_attention_layers` for a model whose parameters are on the meta device, without its warnings of speed.

    ``at_once``: how many parameters have stand-ins at a time, unless one module has more.
    """
    with _stand_ins(model, at_once), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="seal_ops.attach: ")
        return find_attention_layers(model)


@contextlib.contextmanager
def _parameters_on_meta():
    """Inside, parameters go to the meta device when a module takes them; buffers, which may be tables, are made."""
    register = nn.Module.register_parameter

    def on_meta(self, name, parameter):
        register(self, name, parameter)
        if parameter is not None and not parameter.is_meta:
            made = nn.Parameter(parameter.data.to("meta"), requires_grad=False)
            made.__dict__.update(parameter.__dict__)
            self._parameters[name] = made

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


@contextlib.contextmanager
def _stand_ins(model: nn.Module, at_once: int):
    """Inside, what is called has stand-ins in the place of its parameters on the meta device."""
    block = torch.randn(_BLOCK, generator=torch.Generator().manual_seed(0), device="cpu") * 0.05
    hooks = []

    def fill(modules, module, args):
        for inner in modules:
            inner._seal_hollow = {n: p for n, p in inner._parameters.items() if p is not None and p.is_meta}
            for name, parameter in inner._seal_hollow.items():
                inner._parameters[name] = nn.Parameter(_filled(parameter, block), requires_grad=False)

    def empty(modules, module, args, output):
        for inner in modules:
            inner._parameters.update(inner.__dict__.pop("_seal_hollow", {}))

    for module, inside in _parts(model, at_once):
        module._hf_hook = None  # as with accelerate's offloading: the weights come when they are needed
        hooks.append(module.register_forward_pre_hook(functools.partial(fill, inside)))
        hooks.append(module.register_forward_hook(functools.partial(empty, inside), always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module in model.modules():
            module.__dict__.pop("_hf_hook", None)


def _parts(module: nn.Module, at_once: int) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """(module that is called, the modules that are filled then): whole parts of the model where they are small.

    A module may read the parameters of the modules in it without calling them.
    """
    called = type(module).forward is not nn.Module.forward  # a ModuleList is not
    if called and sum(p.numel() for p in module.parameters()) <= at_once:
        yield module, list(module.modules())
        return
    yield module, [module]
    for child in module.children():
        yield from _parts(child, at_once)


def _filled(parameter: Tensor, block: Tensor) -> Tensor:
    """A tensor like ``parameter``, filled with the random numbers of ``block`` again and again."""
    made = torch.empty(parameter.numel(), dtype=parameter.dtype, device="cpu")
    whole = parameter.numel() // _BLOCK * _BLOCK
    made[:whole].view(-1, _BLOCK).copy_(block.expand(whole // _BLOCK, _BLOCK))
    made[whole:].copy_(block[: parameter.numel() - whole])
    return made.view(parameter.shape)
