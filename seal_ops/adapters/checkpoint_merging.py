"""Merging in the files of a checkpoint: one weight in memory at a time, every other byte of the weights as it was."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import struct

import safetensors
import torch
from torch import Tensor

from ..huggingface.hollow import AT_ONCE, attention_layers_of, read_hollow
from ..utils.files import atomic_write, replacing_folder
from . import files, hub
from .attachment import check_fits, numbered
from .merge_record import check_not_merged, record
from .merging import check_projection, check_weight, merged, reads_rows, refuse

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
# Weights of other formats would be the unmerged ones still.
_WEIGHTS = (
    ".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".gguf", ".h5",
    ".msgpack", ".onnx", ".onnx_data", ".tflite",
)  # fmt: skip
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_LONGEST_HEADER = 100_000_000  # bytes, as in safetensors


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a tensor lies: ``shard``, a file's name; ``begin`` and ``end``, its bytes in the file."""

    shard: str
    begin: int
    end: int
    dtype: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Factor:
    """What a weight is multiplied by: ``scale`` [Hq, 1 or D]; ``rows``: along its rows (GPT-2's Conv1D)."""

    place: Place
    scale: Tensor
    head_dim: int
    rows: bool


@dataclasses.dataclass(frozen=True)
class MergedCheckpoint:
    """What `merge_checkpoint` did: names of tensors, of shards, and of files of weights that were left behind."""

    output: str
    merged: tuple[str, ...]
    shards: tuple[str, ...]
    left_behind: tuple[str, ...]


def can_merge(folder: str | os.PathLike) -> bool:
    """Whether a folder holds a checkpoint that `merge_checkpoint` reads."""
    return os.path.isfile(os.path.join(folder, CONFIG)) and any(
        os.path.isfile(os.path.join(folder, name)) for name in (SINGLE, INDEX)
    )


@torch.no_grad()
def merge_checkpoint(
    model: str | os.PathLike,
    scales: str | os.PathLike,
    output: str | os.PathLike,
    *,
    trust_remote_code: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    subfolder: str | None = None,
) -> MergedCheckpoint:
    """Merges saved scales into the files of a checkpoint without loading the model.

    The shards are copied, and in the copies the weights that read the attention output are multiplied, one at a time:
    names, order, dtypes, shard boundaries and every other byte stay.  All other files are copied, but for weights in
    other formats, which would be unmerged ones, for ``seal_scales``, and for hidden files.  ``config.json`` gets the
    field ``seal_ops_merged``, by which `seal_ops.load` knows these scales again.  ``output`` appears when all
    is done: a killed merge leaves nothing under its name.  The weights are the same, bit for bit, as by
    `seal_ops.merge` in the checkpoint's dtype.

    Args:
        model: a folder with ``config.json`` and safetensors.
        scales: a folder, or a repository on the hub, as in `seal_ops.load`.
        output: a folder, new or empty, not inside ``model``.
        trust_remote_code: as in transformers.
        revision, token, subfolder: of the scales on the hub.

    Returns:
        A `MergedCheckpoint`.

    Raises:
        FileNotFoundError: no such checkpoint, or no scales.
        FileExistsError: ``output`` is not empty.
        ValueError: scales for another model, a quantised checkpoint, a projection that cannot take them (as in
            `seal_ops.merge`), tensor names that are not the model's, or scales that were merged into it before.
    """
    folder, output = os.fspath(model), os.path.normpath(os.fspath(output))
    _check_folder(folder, output)
    with replacing_folder(output) as temporary:  # first: an unusable folder is told at once
        source = hub.resolve(scales, revision=revision, token=token, subfolder=subfolder, call="merge")
        saved, tensors, version = files.read(source, "merge")
        places = _places(folder)
        hollow = read_hollow(folder, "seal_ops.merge", trust_remote_code=trust_remote_code)
        shards = sorted({place.shard for place in places.values()})
        largest = max(os.path.getsize(os.path.join(folder, shard)) for shard in shards)
        layers = attention_layers_of(hollow, min(AT_ONCE, largest // 4))
        config = numbered(saved, version, layers, source, "merge")
        check_fits(config, hollow, layers, source, "merge")
        values = {layer: tensors[files.tensor_name(number)] for layer, number in zip(config.layers, saved.layers)}
        content = files.read_json(folder, CONFIG, "merge")
        check_not_merged(content, config, values, repr(source), "merge")
        factors = _factors(hollow, layers, config.granularity, values, places)
        left = _copy_rest(folder, temporary)
        if record(content, config, values):
            text = json.dumps(content, indent=2, ensure_ascii=False)
            atomic_write(os.path.join(temporary, CONFIG), text + "\n")
        for shard in shards:
            shutil.copyfile(os.path.join(folder, shard), os.path.join(temporary, shard))
            with open(os.path.join(temporary, shard), "r+b") as file:
                for name, factor in factors.items():
                    if factor.place.shard == shard:
                        _multiply(file, name, factor)
    return MergedCheckpoint(output, tuple(factors), tuple(shards), tuple(left))


def _check_folder(folder: str, output: str) -> None:
    if not can_merge(folder):
        raise FileNotFoundError(
            f"seal_ops.merge: model must be a folder with {CONFIG} and {SINGLE} or {INDEX}, got {folder!r}"
        )
    inside = os.path.commonpath([os.path.abspath(folder), os.path.abspath(output)]) == os.path.abspath(folder)
    if inside:
        raise ValueError(f"seal_ops.merge: output must lie outside the model's folder {folder!r}, got {output!r}")
    content = files.read_json(folder, CONFIG, "merge")
    for name in ("quantization_config", "compression_config"):
        if content.get(name):
            method = content[name].get("quant_method") if isinstance(content[name], dict) else None
            raise ValueError(
                f"seal_ops.merge: model must be in 16 or more bits, got the quantised {folder!r} "
                f"({files.shown(method or name)}); keep the scales attached instead"
            )


def _places(folder: str) -> dict[str, Place]:
    """Name -> place of every tensor of a checkpoint; ValueError where index and shards differ."""
    if os.path.isfile(os.path.join(folder, INDEX)):
        index = files.read_json(folder, INDEX, "merge").get("weight_map")
        if not isinstance(index, dict) or not all(_is_name(shard) for shard in index.values()):
            raise ValueError(f"seal_ops.merge: {os.path.join(folder, INDEX)} must have a weight_map of file names")
        found = {}
        for shard in sorted(set(index.values())):
            found |= _header(folder, shard)
        wrong = sorted(n for n in {*index, *found} if n not in found or found[n].shard != index.get(n))
        if wrong:
            raise ValueError(
                f"seal_ops.merge: {os.path.join(folder, INDEX)} must name the shard of every tensor, got it wrong for "
                f"{files.shown(wrong)}"
            )
        return found
    return _header(folder, SINGLE)


def _is_name(value) -> bool:
    return isinstance(value, str) and value.endswith(".safetensors") and os.path.basename(value) == value


def _header(folder: str, shard: str) -> dict[str, Place]:
    """Name -> place of every tensor of a safetensors file."""
    path = os.path.join(folder, shard)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"seal_ops.merge: model must hold {shard}, which its index names, got {folder!r}")
    try:
        with safetensors.safe_open(path, "pt"):  # checks every offset
            pass
        with open(path, "rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            header = json.loads(file.read(min(length, _LONGEST_HEADER)))
    except (safetensors.SafetensorError, ValueError, struct.error) as error:
        raise ValueError(
            f"seal_ops.merge: {path} must be a safetensors file, got {' '.join(str(error).split())[:200]}"
        ) from error
    header.pop("__metadata__", None)
    return {
        name: Place(shard, *(8 + length + at for at in entry["data_offsets"]), entry["dtype"], tuple(entry["shape"]))
        for name, entry in header.items()
    }


def _factors(model, layers, granularity: str, values: dict[int, Tensor], places: dict[str, Place]) -> dict[str, Factor]:
    """Name of a tensor -> what it is multiplied by, for every layer that has scales."""
    found, seen = {}, set()
    known = {attn.index: attn for attn in layers}
    for layer, value in values.items():
        attn = known[layer]
        projection = attn.output_projection
        check_projection(attn, projection, granularity, seen)
        name = _stored_name(model, f"{attn.projection_name}.weight", places)
        place, shape = places[name], tuple(projection.weight.shape)
        if place.dtype not in _DTYPES or place.shape != shape:
            refuse(name, f"be in 16 or more bits of shape {list(shape)}", f"{place.dtype} {list(place.shape)}")
        scale = value if value.dim() == 2 else value[:, None]
        found[name] = Factor(place, scale, attn.head_dim, reads_rows(projection))
    return found


def _stored_name(model, name: str, places: dict[str, Place]) -> str:
    """The name of a parameter in the files: the model's own, or with or without the prefix of the model's body."""
    prefix = f"{model.base_model_prefix}."
    for stored in (name, name.removeprefix(prefix), prefix + name):
        if stored in places:
            return stored
    raise ValueError(
        f"seal_ops.merge: model must have files with the names of its parameters, got none called {name}, which "
        f"transformers makes of others; merge it in memory (seal merge --in-memory)"
    )


def _copy_rest(folder: str, output: str) -> list[str]:
    """Copies all that is no weight, folders too; the files of weights that were left behind."""
    left = []
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(n for n in folders if not n.startswith(".") and n != files.SUBFOLDER)
        inside = os.path.relpath(where, folder)
        os.makedirs(os.path.join(output, inside), exist_ok=True)
        for name in sorted(names):
            relative = os.path.normpath(os.path.join(inside, name))
            if name.endswith(_WEIGHTS) and relative != INDEX:
                left.append(relative)
            elif not name.startswith("."):
                shutil.copyfile(os.path.join(where, name), os.path.join(output, relative))
    return [name for name in left if not _is_shard(folder, name)]


def _is_shard(folder: str, name: str) -> bool:
    if not os.path.isfile(os.path.join(folder, INDEX)):
        return name == SINGLE
    return name in files.read_json(folder, INDEX, "merge")["weight_map"].values()


def _multiply(file, name: str, factor: Factor) -> None:
    """Multiplies one weight where it lies in an open file."""
    place = factor.place
    file.seek(place.begin)
    data = bytearray(file.read(place.end - place.begin))
    weight = torch.frombuffer(data, dtype=_DTYPES[place.dtype]).view(place.shape)
    check_weight(name, weight, factor.scale, factor.head_dim, factor.rows)
    weight.copy_(merged(weight, factor.scale, factor.head_dim, factor.rows))
    file.seek(place.begin)
    file.write(data)
