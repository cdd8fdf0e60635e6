"""The files of an adapter: safetensors and json, checked against each other before anything is touched."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import reprlib

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..huggingface.layers import GRANULARITIES
from ..utils.files import atomic_write, replacing
from ..utils.locks import only_writer

CONFIG_FILE, WEIGHTS_FILE, CARD_FILE = "adapter_config.json", "adapter_model.safetensors", "README.md"
# The config of a save under way. It is complete before the weights are replaced and takes its place after them, so that
# whatever a killed save leaves behind can be read: the old adapter, or the new one.
PENDING_FILE = ".adapter_config.json.pending"
# 2: `layers` are the model's own layer numbers. 1: they counted attention layers, which differs in hybrid models.
FORMAT_VERSION = 2
# Inside the folder of a whole model, one folder an adapter. Two levels deep, because transformers' Trainer takes every
# folder of a checkpoint that holds adapter weights for one of PEFT's.
SUBFOLDER = "seal_scales"
DEFAULT_ADAPTER = "default"
# What a linear layer with weak columns (`seal_ops.quantized`) has beside its base, in state dicts.
DELTA, INDEX = "column_delta", "column_index"
# Where a model has its `seal_ops.WeakColumns`, whose files lie in the folder of a checkpoint itself.
COLUMNS = "seal_weak_columns"

_shown = reprlib.Repr()
_shown.maxstring = _shown.maxother = _shown.maxlong = 120
_shown.maxlist = _shown.maxdict = 8


def shown(value) -> str:
    """``repr``, cut where it is long: a value of a file in an error message."""
    return _shown.repr(value)


@dataclasses.dataclass(frozen=True)
class ScalesConfig:
    """What an adapter's ``adapter_config.json`` says.

    ``layers``, ``num_heads`` and ``head_dim`` have one entry for every layer that has a scale; ``layers`` are the
    model's own layer numbers (`AttentionLayer.index`), ``num_heads`` counts query heads.  ``base_model_name_or_path``
    is information for people, ``model_type`` is checked when loading.
    """

    granularity: str
    layers: tuple[int, ...]
    num_heads: tuple[int, ...]
    head_dim: tuple[int, ...]
    model_type: str | None = None
    base_model_name_or_path: str | None = None

    def shape(self, index: int) -> tuple[int, ...]:
        """The shape of the scale of entry ``index``: [Hq] or [Hq, D]."""
        heads = (self.num_heads[index],)
        return heads if self.granularity == "head" else (*heads, self.head_dim[index])

    def shapes(self) -> dict[int, tuple[int, ...]]:
        """Layer -> the shape of its scale."""
        return {layer: self.shape(i) for i, layer in enumerate(self.layers)}

    def to_dict(self) -> dict:
        from ..version import __version__

        return {
            "peft_type": "SEAL",
            "format_version": FORMAT_VERSION,
            "seal_ops_version": __version__,
            **dataclasses.asdict(self),
        }


def tensor_name(layer: int) -> str:
    """The name of a layer's scale, in files and in the state dict of `Scales`."""
    return f"layers.{layer}.scale"


# --------------------------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------------------------
def write(folder: str, config: ScalesConfig, values: dict[int, Tensor], card: str | None = None) -> None:
    """Writes an adapter in steps after each of which the folder holds one that can be read, the old or the new.

    ``values``: layer -> scale, on the CPU.  ``card``: the text of a README that this library may replace.
    """
    os.makedirs(folder, exist_ok=True)
    place = os.path.join(folder, CONFIG_FILE)
    with only_writer(place, "seal_ops.Scales.save_pretrained", wait=True):  # two would mix their files
        _write(folder, config, values, card)


def _write(folder, config, values, card):
    tensors = {tensor_name(layer): value.contiguous() for layer, value in values.items()}
    pending = os.path.join(folder, PENDING_FILE)
    atomic_write(pending, json.dumps(config.to_dict(), indent=2) + "\n")
    try:
        with replacing(os.path.join(folder, WEIGHTS_FILE)) as temporary:
            safetensors.torch.save_file(tensors, temporary, metadata={"format": "pt"})
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(pending)
        raise
    os.replace(pending, os.path.join(folder, CONFIG_FILE))
    if card is not None:
        atomic_write(os.path.join(folder, CARD_FILE), card)


# --------------------------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------------------------
def _existing(folder: str | os.PathLike, name: str, call: str = "load") -> str:
    path = os.path.join(os.fspath(folder), name)
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"seal_ops.{call}: save_directory must hold {name}, got {os.fspath(folder)!r} without it"
        )
    return path


def _without_duplicates(pairs: list) -> dict:
    content = dict(pairs)
    if len(content) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {shown(next(n for n in names if names.count(n) > 1))} twice")
    return content


def read_json(folder: str | os.PathLike, name: str = CONFIG_FILE, call: str = "load") -> dict:
    """The object in a JSON file of an adapter; FileNotFoundError or ValueError in the name of ``call``."""
    path = _existing(folder, name, call)
    try:
        with open(path, encoding="utf-8-sig") as file:
            content = json.load(file, object_pairs_hook=_without_duplicates)
    except RecursionError:
        raise ValueError(f"seal_ops.{call}: {path} must be JSON, got lists or objects nested too deeply") from None
    except ValueError as error:  # not JSON, not UTF-8, a name twice, an integer of thousands of digits
        raise ValueError(f"seal_ops.{call}: {path} must be JSON, got {' '.join(str(error).split())[:200]}") from error
    if not isinstance(content, dict):
        raise ValueError(f"seal_ops.{call}: {path} must be a JSON object, got {type(content).__name__}")
    return content


def read_tensors(folder: str | os.PathLike, name: str = WEIGHTS_FILE, call: str = "load") -> dict[str, Tensor]:
    """The tensors of a safetensors file of an adapter, on the CPU; errors as in `read_json`."""
    path = _existing(folder, name, call)
    try:
        return safetensors.torch.load_file(path, device="cpu")
    except (safetensors.SafetensorError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise ValueError(
            f"seal_ops.{call}: {path} must be a safetensors file, got {' '.join(str(error).split())[:200]}"
        ) from error


def _parse(content: dict, where: str) -> tuple[ScalesConfig, int]:
    """The config that a file's content says, and its format version; ValueError, beginning with ``where``."""

    def must(expected: str, name: str, hint: str = ""):
        got = shown(content[name]) if name in content else "none"
        return ValueError(f"{where} must have {expected}, got {got}{hint}")

    peft_type, version = content.get("peft_type"), content.get("format_version")
    if peft_type != "SEAL":
        hint = " (seal_ops.ia3.import_ia3 reads those)" if peft_type == "IA3" else ""
        raise must("peft_type 'SEAL'", "peft_type", hint)
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise must(f"format_version 1 to {FORMAT_VERSION}", "format_version")
    if content.get("granularity") not in GRANULARITIES:
        raise must("granularity 'head' or 'channel'", "granularity")
    fields = ("layers", "num_heads", "head_dim")
    lists = [content.get(n) for n in fields]
    for name, found in zip(fields, lists):
        least = 0 if name == "layers" else 1
        if not isinstance(found, list) or not found or not all(type(i) is int and i >= least for i in found):
            raise must(f"{name} as a list of integers of at least {least}", name)
    if len({len(x) for x in lists}) != 1:
        raise ValueError(
            f"{where} must have layers, num_heads and head_dim of one length, got "
            f"{', '.join(str(len(x)) for x in lists)}"
        )
    if len(set(lists[0])) != len(lists[0]):
        raise must("every layer once in layers", "layers")
    for name in ("model_type", "base_model_name_or_path"):
        if name not in content or not isinstance(content[name], (str, type(None))):
            raise must(f"{name} as a text or null", name)
    if not isinstance(content.get("seal_ops_version"), str):
        raise must("seal_ops_version as a text", "seal_ops_version")
    return ScalesConfig(
        content["granularity"], *(tuple(x) for x in lists), content["model_type"], content["base_model_name_or_path"]
    ), version


def _check_tensors(config: ScalesConfig, tensors: dict[str, Tensor], where: str) -> None:
    """ValueError, beginning with ``where``, where ``tensors`` are not those that ``config`` speaks of."""
    expected = {tensor_name(layer): shape for layer, shape in config.shapes().items()}
    if set(expected) != set(tensors):
        missing, surplus = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
        raise ValueError(
            f"{where} must hold one scale for every layer of the config, got missing {shown(missing)} and "
            f"unexpected {shown(surplus)}"
        )
    for name, shape in expected.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
            raise ValueError(
                f"{where}: {name} must be float32 of shape {shown(list(shape))}, got {tensor.dtype} of "
                f"shape {list(tensor.shape)}"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{where}: {name} must be finite, got NaN or infinity")


def read(save_directory: str | os.PathLike, call: str = "load") -> tuple[ScalesConfig, dict[str, Tensor], int]:
    """The config, the tensors ``layers.N.scale`` and the format version of a saved adapter, checked against each other.

    Where a killed save left new weights beside an old config, the config that it had prepared is taken.
    """
    folder = os.fspath(save_directory)
    config, version = _parse(read_json(folder, call=call), f"seal_ops.{call}: {os.path.join(folder, CONFIG_FILE)}")
    tensors = read_tensors(folder, call=call)
    where = f"seal_ops.{call}: {os.path.join(folder, WEIGHTS_FILE)}"
    try:
        _check_tensors(config, tensors, where)
    except ValueError:
        if not os.path.isfile(os.path.join(folder, PENDING_FILE)):
            raise
        pending, version = _parse(
            read_json(folder, PENDING_FILE, call), f"seal_ops.{call}: {os.path.join(folder, PENDING_FILE)}"
        )
        _check_tensors(pending, tensors, where)
        return pending, tensors, version
    return config, tensors, version


def find(folder: str, call: str = "load") -> str:
    """The adapter's folder in ``folder``: itself, or the one that lies beside the weights of a whole model."""
    inside = os.path.join(folder, SUBFOLDER)
    path = os.path.join(folder, CONFIG_FILE)
    # The folder's own adapter may be another library's, say LoRA's, with the scales beside it.
    if not os.path.isdir(inside) or os.path.isfile(path) and read_json(folder, call=call).get("peft_type") == "SEAL":
        return folder
    names = sorted(n for n in os.listdir(inside) if os.path.isdir(os.path.join(inside, n)))
    if DEFAULT_ADAPTER in names or len(names) == 1:
        return os.path.join(inside, DEFAULT_ADAPTER if DEFAULT_ADAPTER in names else names[0])
    raise FileNotFoundError(
        f"seal_ops.{call}: subfolder must name one of the adapters {shown(names)} in {inside!r}, got none"
    )
