"""Linear layers in 16 bits quantised one by one, by the libraries that do it: bitsandbytes (NF4) and HQQ."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from . import bases

METHODS = ("nf4", "nf4-double", "hqq")
GROUP = 64  # weights that share a scale, in both libraries


def check_method(method: str | None, call: str) -> None:
    """ValueError for an unknown method, ImportError, one sentence, where its library is missing."""
    if method is None:
        return
    if method not in METHODS:
        raise ValueError(f"seal_ops.{call}: quantize must be one of {', '.join(METHODS)} or None, got {method!r}")
    package = "hqq" if method == "hqq" else "bitsandbytes"
    try:
        __import__(package)
    except ImportError as error:
        raise ImportError(
            f"seal_ops.{call}: quantize={method!r} needs the package {package}, which is not installed "
            f"(pip install {package}); a model that another library has quantised needs it not"
        ) from error


def quantized(linear: nn.Module, method: str, name: str, call: str) -> nn.Module:
    """A quantised copy of a 16-bit torch Linear, on its device; the copy computes in the dtype of the weight."""
    if not bases.is_plain(linear):
        raise ValueError(
            f"seal_ops.{call}: {name} must be a torch.nn.Linear in 16 or more bits to be quantised, got "
            f"{type(linear).__name__}"
        )
    if linear.weight.is_meta:
        raise ValueError(f"seal_ops.{call}: model must have loaded weights, got {name} on the meta device")
    made = _hqq(linear) if method == "hqq" else _nf4(linear, method == "nf4-double")
    made.train(linear.training)
    return made


def _nf4(linear: nn.Linear, double: bool) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    weight, bias = linear.weight.detach(), linear.bias
    options = {"quant_type": "nf4", "compress_statistics": double, "blocksize": GROUP}
    made = Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        compute_dtype=weight.dtype,
        compress_statistics=double,
        quant_type="nf4",
        device="meta",
    )
    made.weight = Params4bit(weight.contiguous(), requires_grad=False, module=made, **options).to(weight.device)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return made


def _hqq(linear: nn.Linear) -> nn.Module:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    return HQQLinear(
        linear,
        BaseQuantizeConfig(nbits=4, group_size=GROUP, axis=1),
        del_orig=False,
        compute_dtype=linear.weight.dtype,
        device=str(linear.weight.device),
    )


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts ``module`` in the place of the one of that name."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


@torch.no_grad()
def quantize_layers(model: nn.Module, targets: Mapping[str, nn.Module], method: str, call: str = "quantize") -> None:
    """Quantises the named layers of ``model`` one after the other: one layer more than the model is held at a time."""
    check_method(method, call)
    for name in targets:
        replace(model, name, quantized(model.get_submodule(name), method, name, call))
