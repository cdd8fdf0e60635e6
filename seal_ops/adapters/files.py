"""The files of an adapter: safetensors and json, checked against each other before anything is touched."""
from __future__ import annotations

import dataclasses
import json
import os

import safetensors
import safetensors.torch
import torch
from torch import Tensor

GRANULARITIES = ("head", "channel")
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class ScalesConfig:
    """What an adapter's ``adapter_config.json`` says.

    ``layers``, ``num_heads`` and ``head_dim`` have one entry for every layer that has a scale; ``num_heads`` counts
    query heads.  ``base_model_name_or_path`` is information for people, ``model_type`` is checked when loading.
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

    def to_dict(self) -> dict:
        from ..version import __version__
        return {"peft_type": "SEAL", "format_version": FORMAT_VERSION, "seal_ops_version": __version__,
                **dataclasses.asdict(self)}


def _existing(folder: str | os.PathLike, name: str, call: str = "load") -> str:
    path = os.path.join(os.fspath(folder), name)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"seal_ops.{call}: save_directory must hold {name}, got {os.fspath(folder)!r} without it")
    return path


def read_json(folder: str | os.PathLike, name: str = CONFIG_FILE, call: str = "load") -> dict:
    """The object in a JSON file of an adapter; FileNotFoundError or ValueError in the name of ``call``."""
    path = _existing(folder, name, call)
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"seal_ops.{call}: {path} must be JSON, got {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"seal_ops.{call}: {path} must be a JSON object, got {type(content).__name__}")
    return content


def read_tensors(folder: str | os.PathLike, name: str = WEIGHTS_FILE, call: str = "load") -> dict[str, Tensor]:
    """The tensors of a safetensors file of an adapter, on the CPU; errors as in `read_json`."""
    path = _existing(folder, name, call)
    try:
        return safetensors.torch.load_file(path, device="cpu")
    except safetensors.SafetensorError as error:
        raise ValueError(f"seal_ops.{call}: {path} must be a safetensors file, got {error}") from error


def read(save_directory: str | os.PathLike) -> tuple[ScalesConfig, dict[str, Tensor]]:
    """The config and the tensors ``layers.N.scale`` of a saved adapter, checked against each other."""
    content = read_json(save_directory)
    where = f"seal_ops.load: {os.path.join(os.fspath(save_directory), CONFIG_FILE)}"
    if content.get("peft_type") != "SEAL":
        raise ValueError(f"{where} must have peft_type 'SEAL', got {content.get('peft_type')!r}"
                         + (" (seal_ops.ia3.import_ia3 reads those)" if content.get("peft_type") == "IA3" else ""))
    if content.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{where} must have format_version {FORMAT_VERSION}, got {content.get('format_version')!r}")
    if content.get("granularity") not in GRANULARITIES:
        raise ValueError(f"{where} must have granularity 'head' or 'channel', got {content.get('granularity')!r}")
    lists = [content.get(n) for n in ("layers", "num_heads", "head_dim")]
    if not all(isinstance(x, list) and x and all(type(i) is int and i >= 0 for i in x) for x in lists) or len(
            {len(x) for x in lists}) != 1 or len(set(lists[0])) != len(lists[0]):
        raise ValueError(f"{where} must have layers, num_heads and head_dim as lists of integers of one length, "
                         f"got {lists}")
    config = ScalesConfig(content["granularity"], *(tuple(x) for x in lists), content.get("model_type"),
                          content.get("base_model_name_or_path"))
    tensors = read_tensors(save_directory)
    where = f"seal_ops.load: {os.path.join(os.fspath(save_directory), WEIGHTS_FILE)}"
    expected = {f"layers.{layer}.scale": config.shape(i) for i, layer in enumerate(config.layers)}
    if set(expected) != set(tensors):
        missing, surplus = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
        raise ValueError(f"{where} must hold one scale for every layer of the config, got missing {missing} and "
                         f"unexpected {surplus}")
    for name, shape in expected.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
            raise ValueError(f"{where}: {name} must be float32 of shape {list(shape)}, got {tensor.dtype} of shape "
                             f"{list(tensor.shape)}")
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{where}: {name} must be finite, got NaN or infinity")
    return config, tensors
