"""Linear layers as bases of weak columns: which there are, what their weight is, whether a gradient passes through."""

from __future__ import annotations

import contextlib
import warnings

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..huggingface.projection import is_linear

_PIECE = 256  # columns asked for at once of a layer whose weight only its product shows


def sizes(module: nn.Module) -> tuple[int, int]:
    """(in, out) features of a linear layer; HQQ keeps them beside its packed weight."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return int(module.in_features), int(module.out_features)
    rows, columns = module.meta["shape"]
    return int(columns), int(rows)


def is_base(module: nn.Module) -> bool:
    """Whether a module is one linear layer [in] -> [out], quantised or not."""
    if isinstance(module, Conv1D) or hasattr(module, "base_layer") or any(True for _ in module.children()):
        return False
    known = hasattr(module, "in_features") and hasattr(module, "out_features")
    return (known and is_linear(module)) or is_hqq(module)


def is_hqq(module: nn.Module) -> bool:
    return any(cls.__name__ == "HQQLinear" for cls in type(module).__mro__)


def is_nf4(module: nn.Module) -> bool:
    """A quantised 4-bit layer of bitsandbytes, NF4 or FP4."""
    return any(cls.__name__ == "Linear4bit" for cls in type(module).__mro__) and (
        getattr(module.weight, "quant_state", None) is not None
    )


def is_plain(module: nn.Module) -> bool:
    """A torch Linear that holds its weight in 16 or more bits."""
    weight = module._parameters.get("weight")
    base = getattr(type(module), "_columns_base", type(module))
    return base is nn.Linear and weight is not None and weight.is_floating_point() and weight.element_size() > 1


def is_gptq(module: nn.Module) -> bool:
    return any("gptq" in f"{cls.__module__}.{cls.__name__}".lower() for cls in type(module).__mro__)


def writes_anew(module: nn.Module) -> bool:
    """Whether the layer's output, and its input's gradient, are known to be new tensors of a matrix product."""
    return is_plain(module) or is_nf4(module) or is_hqq(module)


def base_of(module: nn.Module) -> type:
    """The layer's own class, also while weak columns are on it."""
    return getattr(type(module), "_columns_base", type(module))


@torch.no_grad()
def columns_of(module: nn.Module, index: Tensor) -> Tensor:
    """Columns ``index`` of the weight that the base computes with, fp32 (fp64) [out, k]; bits as the layer uses them.

    Where the weight cannot be read, the product with unit vectors shows it.
    """
    weight = _readable(module)
    if weight is not None:
        return weight.index_select(1, index.to(weight.device)).to(torch.promote_types(weight.dtype, torch.float32))
    columns, _ = sizes(module)
    device, dtype, found = index.device, _dtype(module), []
    with _without_bias(module):
        for piece in index.split(_PIECE):
            unit = torch.zeros(len(piece), columns, device=device, dtype=dtype)
            unit.scatter_(1, piece[:, None], 1)
            found.append(base_of(module).forward(module, unit).t())
    result = torch.cat(found, 1)
    return result.to(torch.promote_types(result.dtype, torch.float32))


@contextlib.contextmanager
def _without_bias(module: nn.Module):
    bias = module._parameters.get("bias")
    if bias is not None:
        module._parameters["bias"] = None
    try:
        yield
    finally:
        if bias is not None:
            module._parameters["bias"] = bias


def weight_of(module: nn.Module) -> Tensor:
    """The whole weight [out, in] that the base computes with, in the dtype in which it does."""
    weight = _readable(module)
    if weight is None:
        columns, _ = sizes(module)
        weight = columns_of(module, torch.arange(columns, device=device_of(module))).to(_dtype(module))
    return weight


def is_readable(module: nn.Module) -> bool:
    """Whether a base's weight can be written out, and its product is with that weight."""
    if is_nf4(module):
        return not getattr(module.weight.quant_state, "packing_format_for_cpu", False)
    return is_plain(module) or is_hqq(module)


def _readable(module: nn.Module) -> Tensor | None:
    if is_plain(module):
        return module.weight.detach()
    if is_nf4(module):
        state = module.weight.quant_state
        if getattr(state, "packing_format_for_cpu", False):
            return None  # bitsandbytes has repacked it for a product on the CPU
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(module.weight.data, state)
    if is_hqq(module) or (callable(getattr(module, "dequantize", None)) and not is_gptq(module)):
        found = module.dequantize()
        columns, rows = sizes(module)
        if isinstance(found, Tensor) and found.shape == (rows, columns):
            return found
    return None


def _dtype(module: nn.Module) -> torch.dtype:
    for value in (getattr(module, "compute_dtype", None), getattr(module, "bias", None)):
        dtype = getattr(value, "dtype", value)
        if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
            return dtype
    tensors = [t for t in (*module.parameters(recurse=False), *module.buffers(recurse=False)) if t.is_floating_point()]
    return tensors[0].dtype if tensors else torch.get_default_dtype()


def device_of(module: nn.Module) -> torch.device:
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    if is_hqq(module):
        tensors.append(module.W_q)
    return next((t.device for t in tensors if isinstance(t, Tensor)), torch.device("cpu"))


def check(module: nn.Module, name: str, call: str) -> None:
    """ValueError, one sentence, where a layer cannot be a base; a GPTQ layer is warned of once a call."""
    if not is_base(module):
        raise ValueError(f"seal_ops.{call}: {name} must be one linear layer, got {type(module).__name__}")
    if any(t.is_meta for t in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
        raise ValueError(f"seal_ops.{call}: model must have loaded weights, got {name} on the meta device")
    columns, _ = sizes(module)
    x = torch.randn(2, columns, device=device_of(module), dtype=_dtype(module), requires_grad=True)
    with torch.enable_grad():
        try:
            y = base_of(module).forward(module, x)
            passes = (
                y.requires_grad and torch.autograd.grad(y.float().square().sum(), x, allow_unused=True)[0] is not None
            )
        except (RuntimeError, NotImplementedError) as error:
            raise ValueError(
                f"seal_ops.{call}: {name} must pass a gradient to its input, got {type(module).__name__}, which "
                f"says: {' '.join(str(error).split())[:200]}"
            ) from error
    if not passes:
        raise ValueError(
            f"seal_ops.{call}: {name} must pass a gradient to its input, got {type(module).__name__}, which passes none"
        )


def warn_of_gptq(modules, call: str) -> None:
    """Says once what GPTQ has done to the columns that are to be chosen."""
    if any(is_gptq(m) for m in modules):
        warnings.warn(
            f"seal_ops.{call}: GPTQ has already moved the error of these columns into the others, so that weak columns "
            f"help less than on a base that is quantised without it; 'nf4' or 'hqq' of the 16-bit model is better",
            stacklevel=3,
        )
