"""What a model is asked before a run: training mode, gradient checkpointing, and which arguments it takes; all of it
undone."""

from __future__ import annotations

import contextlib
import functools
import inspect

import torch
from torch import nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts


@contextlib.contextmanager
def mode(model: nn.Module, training: bool):
    """Every module in training or in evaluation mode inside; each in its own again outside."""
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, found in before:
            module.training = found


def run_two_tokens(model: nn.Module) -> None:
    device = next((p.device for p in model.parameters() if not p.is_meta), "cpu")
    # No dropout, no checkpointing, and nothing compiled for a look at two tokens.
    with mode(model, False), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        model(input_ids=torch.tensor([[0, 1]], device=device), use_cache=False)


_CHECKPOINTS = "_gradient_checkpointing_func"  # of transformers' modules, where checkpointing is on


@contextlib.contextmanager
def recomputed_inside(model: nn.Module, block: str):
    """Inside, checkpointed layers run with what a block lays on the model, and after it they are not recomputed.

    The backward pass would take what is on the model then: reentrant checkpointing in silence, the other kind with a
    comparison of shapes.  Raises RuntimeError in the name of ``block`` in a backward pass that comes too late.
    """
    over = []

    def checkpoint(original, function, *args, **kwargs):
        def run(*args, **kwargs):
            if over:
                raise RuntimeError(
                    f"seal_ops.{block}: a layer under gradient checkpointing must be recomputed inside the block that "
                    f"it ran in, got a backward pass after the block's end; call backward inside it"
                )
            return function(*args, **kwargs)

        return original(run, *args, **kwargs)

    found = [(m, m.__dict__[_CHECKPOINTS]) for m in model.modules() if _CHECKPOINTS in m.__dict__]
    ours = [functools.partial(checkpoint, original) for _, original in found]
    for (module, _), function in zip(found, ours):
        setattr(module, _CHECKPOINTS, function)
    try:
        yield
    finally:
        over.append(True)
        for (module, original), function in zip(found, ours):
            if module.__dict__.get(_CHECKPOINTS) is function:
                setattr(module, _CHECKPOINTS, original)


def attention_ops() -> list:
    """The ops whose results selective checkpointing keeps: output, log-sum-exp and rotated q and k."""
    return [torch.ops.seal.attention.default, torch.ops.seal.rope_attention.default]


@contextlib.contextmanager
def prepared(model, checkpointing):
    """Training mode and gradient checkpointing inside, both restored on exit."""
    # Newer releases of transformers renamed gradient checkpointing to activation checkpointing
    word = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if getattr(model, f"is_{word}_checkpointing", False):
        checkpointing = False  # the caller's own is left alone
    with mode(model, True):  # transformers checkpoints in training mode only
        try:
            if checkpointing:
                options = {"use_reentrant": False}
                if checkpointing == "selective":
                    options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, attention_ops())
                enable = getattr(model, f"{word}_checkpointing_enable")
                enable(**{f"{word}_checkpointing_kwargs": options})
            yield
        finally:
            if checkpointing:
                getattr(model, f"{word}_checkpointing_disable")()


@functools.lru_cache(maxsize=8)
def _forward_parameters(kind):
    return frozenset(inspect.signature(kind.forward).parameters)


def accepts(model, argument):
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return argument in _forward_parameters(type(base))
