"""Which parameters are trained, and at which rate: scales, weak columns, and what another library has put on."""

from __future__ import annotations

import torch
from torch import nn

from ..adapters.files import DELTA
from ..huggingface.wrappers import check_module
from ..utils.arguments import number
from .recipe import LEARNING_RATES, NAMES, columns_rate


def is_column(name: str) -> bool:
    """Whether a parameter of this name is the trained difference of weak columns."""
    return name.rpartition(".")[2] == DELTA


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that `train` trains, by name: those that require gradients.

    Raises:
        ValueError: nothing or everything requires gradients, a scale is frozen or not in fp32, or an adapter needs more
            than such a loop.
    """
    scales = getattr(model, "seal_scales", None)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if scales is None and (not trained or len(trained) == sum(1 for _ in model.parameters())):
        state = "every parameter trainable" if trained else "no trainable parameter"
        raise ValueError(
            f"seal_ops.train: model must have scales attached (seal_ops.attach(model, 'head') or 'channel') or weak "
            f"columns (seal_ops.attach_weak_columns), got a {type(model).__name__} without scales and with {state}"
        )
    if scales is not None:
        for layer, scale in scales.items():
            if not scale.requires_grad:
                raise ValueError(f"seal_ops.train: every scale must require gradients, got layer {layer}'s frozen")
            if scale.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"seal_ops.train: scales must be torch.float32 (near 1 a 16-bit step is larger than the optimiser's), "  # noqa: E501
                    f"got {scale.dtype} in layer {layer}"
                )
    kind = getattr(getattr(model, "active_peft_config", None), "peft_type", None)
    if getattr(kind, "value", kind) == "ADALORA" and any("lora_" in name for name in trained):
        raise ValueError(
            "seal_ops.train: model must have an adapter of fixed rank to train, got PEFT's AdaLoRA, which has to "
            "choose its ranks after each step and adds a term to the loss; freeze it, or train it in a loop of your own"
        )
    return trained


def rates(model: nn.Module, lr: float | None, column_lr: float | None, call: str) -> tuple[float | None, float | None]:
    """The rates of scales and other adapters, and of weak columns; None where there are none of them.

    A rate that is not given is the paper's.  Where weak columns are all that is trained, ``lr`` is theirs.
    """
    lr, column_lr = (
        rate if rate is None else number(f"seal_ops.{call}", name, rate, 0)
        for name, rate in (("lr", lr), ("column_lr", column_lr))
    )
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    columns, scales = getattr(model, "seal_weak_columns", None), getattr(model, "seal_scales", None)
    has_columns, has_others = any(map(is_column, trained)), not all(map(is_column, trained))
    if not has_columns:
        if column_lr is not None:
            raise ValueError(
                f"seal_ops.{call}: column_lr needs a model whose weak columns are trained, got {column_lr}"
            )
        columns = None
    elif not has_others:
        if lr is not None and column_lr is not None:
            raise ValueError(
                f"seal_ops.{call}: lr or column_lr must be given where only weak columns are trained, got both"
            )
        lr, column_lr = None, lr if column_lr is None else column_lr
    if has_columns and column_lr is None:
        column_lr = columns_rate(columns.columns)
    if lr is None and (has_others or not trained):
        if scales is None:
            raise ValueError(f"seal_ops.{call}: lr must be given for a model without attached scales, got None")
        lr = LEARNING_RATES[NAMES[scales.config.granularity]]
    return lr, column_lr


def parameter_groups(model: nn.Module, lr: float | None = None, column_lr: float | None = None) -> list[dict]:
    """Groups for one optimiser: scales (and other adapters) at ``lr``, weak columns at ``column_lr``.

    For transformers' ``Trainer``: ``optimizers=(torch.optim.AdamW(seal_ops.parameter_groups(model)), None)``.

    Args:
        model: with scales, weak columns, or both attached.
        lr: of scales and other adapters; None for the paper's for scales.
        column_lr: of weak columns; None for the paper's for as many columns.

    Returns:
        Dicts ``params`` and ``lr``.

    Raises:
        ValueError: nothing is trained, or a rate is given for what is not there.
    """
    check_module(model, "parameter_groups")
    found = groups_at(model, *rates(model, lr, column_lr, "parameter_groups"))
    if not found:
        raise ValueError(
            "seal_ops.parameter_groups: model must have scales or weak columns attached, got no trained parameter"
        )
    return found


def groups_at(model: nn.Module, lr: float | None, column_lr: float | None) -> list[dict]:
    """The same, at rates that :func:`rates` has given."""
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    made = [{"params": [p for n, p in trained if not is_column(n)], "lr": lr}]
    made.append({"params": [p for n, p in trained if is_column(n)], "lr": column_lr})
    return [group for group in made if group["params"]]
