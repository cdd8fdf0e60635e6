"""Linear layers as bases of weak columns: which there are, what their weight is, whether a gradient passes through."""

from __future__ import annotations

import contextlib
import warnings

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..adapters.files import DELTA
from ..huggingface.projection import holds_numbers, is_linear

UNPACKS = "columns_unpack"  # attribute of a GPTQ layer: what `unpacks` has found
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
    return base is nn.Linear and holds_numbers(weight)


def is_gptq(module: nn.Module) -> bool:
    return any("gptq" in f"{cls.__module__}.{cls.__name__}".lower() for cls in type(module).__mro__)


def is_gguf(module: nn.Module) -> bool:
    """A linear layer of transformers that keeps the blocks of a GGUF file."""
    return any(cls.__name__ == "GgufLinear" for cls in type(module).__mro__)


def is_packed(module: nn.Module) -> bool:
    """Whether a linear layer holds its weight in a few bits, in a format that is known here."""
    return is_nf4(module) or is_hqq(module) or is_gguf(module) or (is_gptq(module) and is_base(module))


def writes_anew(module: nn.Module) -> bool:
    """Whether the layer's output, and its input's gradient, are known to be new tensors of a matrix product."""
    return (
        is_plain(module) or is_nf4(module) or is_hqq(module) or is_gguf(module) or module.__dict__.get(UNPACKS, False)
    )


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
    kept = next((t for t in (module._parameters, module._buffers) if t.get("bias") is not None), {})  # GPTQ: a buffer
    bias = kept.get("bias")
    if bias is not None:
        kept["bias"] = None
    try:
        yield
    finally:
        if bias is not None:
            kept["bias"] = bias


def weight_of(module: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
    """The whole weight [out, in] that the base computes with, in the dtype in which it does.

    ``dtype``: that of the input, for a layer that computes in any (packed GGUF); None for the layer's own tensors'.
    """
    weight = _readable(module, dtype)
    if weight is None:
        columns, _ = sizes(module)
        weight = columns_of(module, torch.arange(columns, device=device_of(module))).to(_dtype(module))
    return weight


def computes_in(owner: nn.Module) -> torch.dtype:
    """What a model computes in whose linear layers say nothing of it: for ``weight_of`` of packed GGUF."""
    others = (p.dtype for name, p in owner.named_parameters() if p.is_floating_point() and not name.endswith(DELTA))
    return next(others, torch.get_default_dtype())


def is_readable(module: nn.Module) -> bool:
    """Whether a base's weight can be written out, and its product is with that weight."""
    if is_nf4(module):
        return not getattr(module.weight.quant_state, "packing_format_for_cpu", False)
    if is_gptq(module):
        return module.__dict__.get(UNPACKS, False)
    return is_plain(module) or is_hqq(module) or is_gguf(module)


def unpacks(module: nn.Module) -> bool:
    """Whether what a GPTQ layer gives for its weight is what it computes with: tried on two rows.

    The kernels of the format's libraries rotate inputs or repack weights, each in its own way.
    """
    if not callable(getattr(module, "dequantize_weight", None)):
        return False
    columns, rows = sizes(module)
    x = torch.randn(2, columns, device=device_of(module), dtype=_dtype(module), requires_grad=True)
    try:
        with torch.enable_grad(), _without_bias(module):
            y = base_of(module).forward(module, x).detach()
        weight = module.dequantize_weight().detach()
    except (RuntimeError, NotImplementedError, AttributeError):
        return False
    if weight.shape != (columns, rows):
        return False
    difference = (y.float() - x.detach().float() @ weight.float()).norm()
    return bool(difference <= 1e-2 * y.float().norm())


def _readable(module: nn.Module, dtype: torch.dtype | None = None) -> Tensor | None:
    if is_plain(module):
        return module.weight.detach()
    if is_nf4(module):
        state = module.weight.quant_state
        if getattr(state, "packing_format_for_cpu", False):
            return None  # bitsandbytes has repacked it for a product on the CPU
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(module.weight.data, state)
    if is_gguf(module):
        return _from_blocks(module, dtype or _dtype(module))
    if is_gptq(module):
        return module.dequantize_weight().t() if is_readable(module) else None
    if is_hqq(module) or callable(getattr(module, "dequantize", None)):
        found = module.dequantize()
        columns, rows = sizes(module)
        if isinstance(found, Tensor) and found.shape == (rows, columns):
            return found
    return None


def _from_blocks(module: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weight of a packed GGUF layer, or the table of a packed embedding, in the order of its inputs."""
    from transformers.integrations.gguf.kernels import dequantize_blocks

    columns = getattr(module, "in_features", None) or module.embedding_dim
    weight = dequantize_blocks(module.weight, module.ggml_type, len(module.weight), columns, dtype)
    order = getattr(module, "input_permutation", None)  # which input each column of the blocks reads
    return weight if order is None else torch.empty_like(weight).index_copy_(1, order, weight)


def table_of(embedding: nn.Module) -> Tensor | None:
    """The table of an embedding that transformers keeps in GGUF blocks; None for every other module."""
    if any(cls.__name__ == "GgufEmbedding" for cls in type(embedding).__mro__):
        return _from_blocks(embedding, embedding.compute_dtype)
    return None


def _dtype(module: nn.Module) -> torch.dtype:
    for value in (getattr(module, "compute_dtype", None), getattr(module, "bias", None)):
        dtype = getattr(value, "dtype", value)
        if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
            return dtype
    own = [t for name, t in (*module._parameters.items(), *module._buffers.items()) if t is not None and name != DELTA]
    tensors = [t for t in own if t.is_floating_point()]
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
    if is_gguf(module):
        return  # its kernel for a few rows passes no gradient, but its weight is written out for every product
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
