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
    with mode(model, False), torch.no_grad():  # no dropout, no checkpointing
        model(input_ids=torch.tensor([[0, 1]], device=device), use_cache=False)


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
