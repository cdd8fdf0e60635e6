"""Weak columns in files: safetensors with the columns and their differences, and json; and back."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn

from ..adapters.files import read_json, read_tensors, shown
from ..adapters.freezing import freeze
from ..huggingface.wrappers import unwrapped
from ..utils.files import write_adapter
from . import bases, quantizers, selection
from .attachment import ATTRIBUTE, ColumnsConfig, WeakColumns, bring_up_to_date, origin_of, put_columns_on

CONFIG_FILE, WEIGHTS_FILE = "weak_columns.json", "weak_columns.safetensors"
FORMAT_VERSION = 1
_SAME_BASE = 2e-3  # of two ways to compute one base's sums; other quantisations differ by hundredths and more


def save(columns: WeakColumns, save_directory: str | os.PathLike) -> None:
    """Writes weak columns, each file in one step; what they belong to is stored as one sum a column of the base."""
    from ..version import __version__

    folder, tensors = os.fspath(save_directory), {}
    for name, module in columns.layers.items():
        index = module.column_index
        tensors[f"{name}.index"] = index.detach().cpu()
        tensors[f"{name}.delta"] = module.column_delta.detach().cpu().contiguous()
        tensors[f"{name}.base"] = base_sums(getattr(module, "base", module), index).cpu()
    config = columns.config
    content = {
        "kind": "weak_columns", "format_version": FORMAT_VERSION, "seal_ops_version": __version__,
        "number": config.number, "share": config.share, "start": config.start, "quantize": config.quantize,
        "model_type": config.model_type, "base_model_name_or_path": config.base_model_name_or_path,
    }  # fmt: skip
    write_adapter(folder, (WEIGHTS_FILE, tensors), (CONFIG_FILE, content))


@torch.no_grad()
def base_sums(module: nn.Module, index: Tensor) -> Tensor:
    """fp32 [k]: each column of the base times fixed numbers, which tells quantisations apart."""
    weight = bases.columns_of(module, index).float()
    signs = torch.cos(torch.arange(len(weight), dtype=torch.float32)).to(weight.device)
    return signs @ weight


def load_weak_columns(model: nn.Module, save_directory: str | os.PathLike) -> WeakColumns:
    """Puts saved weak columns on ``model``; the reverse of `WeakColumns.save_pretrained`.

    Weak columns that are already on the model are replaced, where they are the same columns.  Everything is checked
    before the model is changed, except that a 16-bit model is quantised layer by layer.

    Args:
        model: the base that they were trained on: the same model in the same 4 bits, or, where `attach_weak_columns`
            had quantised it, the 16-bit model, whose layers are quantised likewise.
        save_directory: the folder.

    Returns:
        The :class:`WeakColumns`.

    Raises:
        FileNotFoundError: there are none in the folder.
        ValueError: one sentence; a damaged file, another model, or a base that is quantised otherwise.
        ImportError: the library that quantises the model is missing.
    """
    call, folder = "load_weak_columns", os.fspath(save_directory)
    config, tensors = _read(folder, call)
    owner = unwrapped(model, call)
    model_type, origin = origin_of(owner)
    if config.model_type not in (None, model_type):
        raise ValueError(
            f"seal_ops.{call}: {folder!r} must be for model type {model_type!r}, got {shown(config.model_type)}"
        )
    present = owner.__dict__.get(ATTRIBUTE)
    modules = dict(owner.named_modules())
    for name in config.number:
        if name not in modules or not bases.is_base(modules[name]):
            raise ValueError(f"seal_ops.{call}: model must have the linear layer {name}, got none of that name")
        columns, rows = bases.sizes(modules[name])
        index, delta = tensors[name][:2]
        if delta.shape != (rows, len(index)) or int(index[-1]) >= columns:
            raise ValueError(
                f"seal_ops.{call}: {name} must have {rows} outputs and {columns} inputs, got columns up to "
                f"{int(index[-1])} of {list(delta.shape)[0]} outputs"
            )
    if present is not None and set(present.layers) != set(config.number):
        raise ValueError(
            f"seal_ops.{call}: model must be without weak columns or have them in the same layers, got other layers; "
            f"call seal_ops.detach_weak_columns(model) first"
        )
    making = config.quantize is not None and all(bases.is_plain(modules[n]) for n in config.number)
    if making:
        quantizers.check_method(config.quantize, call)
    else:
        for name in config.number:
            _check_base(modules[name], name, tensors[name], call)
    if present is not None:
        return _replaced(present, config, tensors)
    if not making:
        for name in config.number:
            bases.check(modules[name], name, call)
    return _put_all(owner, config, tensors, making, call)


def _put_all(owner, config, tensors, making, call) -> WeakColumns:
    found = WeakColumns(owner, config)
    freeze(owner, ATTRIBUTE)
    for name in config.number:
        if making:
            module = owner.get_submodule(name)
            quantizers.replace(owner, name, quantizers.quantized(module, config.quantize, name, call))
            _check_base(owner.get_submodule(name), name, tensors[name], call)
        device = bases.device_of(owner.get_submodule(name))
        index, delta, _ = tensors[name]
        put_columns_on(found, name, index.to(device), delta.to(device))
    bring_up_to_date(owner)
    owner.__dict__[ATTRIBUTE] = found
    return found


@torch.no_grad()
def _replaced(present: WeakColumns, config: ColumnsConfig, tensors) -> WeakColumns:
    """The values of columns that are already on; parameters stay the same objects."""
    for name, module in present.layers.items():
        index, delta, _ = tensors[name]
        if not torch.equal(module.column_index.cpu(), index):
            raise ValueError(
                f"seal_ops.load_weak_columns: model must be without weak columns or have the same ones, got others in "
                f"{name}; call seal_ops.detach_weak_columns(model) first"
            )
    for name, module in present.layers.items():
        module.column_delta.copy_(tensors[name][1])
    present.config = config
    return present


def _check_base(module: nn.Module, name: str, saved, call: str) -> None:
    index, _, expected = saved
    sums = base_sums(module, index.to(bases.device_of(module))).cpu()
    difference = float((sums - expected).norm() / expected.norm().clamp_min(1e-12))
    if not difference <= _SAME_BASE:
        raise ValueError(
            f"seal_ops.{call}: model must be the base, in the same bits, that the weak columns were trained on, got "
            f"another weight in {name} (its columns' sums differ by {difference:.1e})"
        )


def _read(folder: str, call: str):
    content = read_json(folder, CONFIG_FILE, call)
    where = f"seal_ops.{call}: {os.path.join(folder, CONFIG_FILE)}"
    number, version = content.get("number"), content.get("format_version")
    if content.get("kind") != "weak_columns" or type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise ValueError(f"{where} must be weak columns of format 1, got {shown(content.get('kind'))} {shown(version)}")
    if not isinstance(number, dict) or not number or not all(type(k) is int and k > 0 for k in number.values()):
        raise ValueError(f"{where} must have number as layers with a number of columns, got {shown(number)}")
    if content.get("quantize") not in (None, *quantizers.METHODS):
        raise ValueError(
            f"{where} must have quantize among {quantizers.METHODS} or null, got {shown(content['quantize'])}"
        )
    tensors, where = read_tensors(folder, WEIGHTS_FILE, call), f"seal_ops.{call}: {os.path.join(folder, WEIGHTS_FILE)}"
    wanted = {f"{name}.{part}" for name in number for part in ("index", "delta", "base")}
    if set(tensors) != wanted:
        raise ValueError(
            f"{where} must hold index, delta and base of every layer, got missing "
            f"{shown(sorted(wanted - set(tensors)))} and unexpected {shown(sorted(set(tensors) - wanted))}"
        )
    found = {}
    for name, k in number.items():
        index, delta, base = (tensors[f"{name}.{part}"] for part in ("index", "delta", "base"))
        if index.dtype != torch.int64 or index.shape != (k,) or delta.dim() != 2 or base.shape != (k,):
            raise ValueError(f"{where}: {name} must have {k} columns, got {list(index.shape)} and {list(delta.shape)}")
        selection.checked_index(index, name, int(index.max()) + 2, call)
        if not bool((index[1:] > index[:-1]).all()):
            raise ValueError(f"{where}: the columns of {name} must be sorted, got {shown(index.tolist())}")
        if not bool(torch.isfinite(delta).all()):
            raise ValueError(f"{where}: the difference of {name} must be finite, got NaN or infinity")
        found[name] = (index, delta, base)
    parts = {key: content.get(key) for key in ("model_type", "base_model_name_or_path")}
    return ColumnsConfig(number, content.get("share"), content.get("start"), content.get("quantize"), **parts), found
