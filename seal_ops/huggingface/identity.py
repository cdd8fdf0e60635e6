"""The identity of a model: two models that compute different things differ in it, whatever differs.

Every bit of every tensor is read: hashed where it lies on the CPU, and on a GPU mixed with its place and added modulo
2^64, which is exact and independent of the order. A model of 14 GB takes seconds. The two ways give two identities: a
result of the CPU is not continued on a GPU, where the same weights compute other last digits.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from .context_window import extension_of
from .logits import learns_prompt
from .patch import SCALES

BLOCK = 1 << 22  # words of 8 bytes in a block
_ODD = (-4658895280553007687, -7723592293110705685)  # any odd 64-bit numbers with about half of their bits set
MERGED = "seal_ops_merged"  # field of a config: digests of the scales that are part of the weights, the oldest first
# Of a config: where it came from and how it was saved, not what it computes. Weights carry their dtype themselves, and
# merged scales.
_IRRELEVANT = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", MERGED}
# Numbers that modules of transformers and PEFT keep as plain attributes and use in their forward.
_NUMBERS = ("scaling", "attention_scaling", "sliding_window", "disable_adapters", "active_adapters", "merged_adapters")


@torch.no_grad()
def fingerprint(model: nn.Module, trainable: bool = True) -> str:
    """Hash of what a model computes: class, config, every bit of its weights and buffers, adapters on it and their
    state.

    Scales that are attached count with the values they have, and not at all inside ``seal_ops.disabled``. Where the
    model came from, its device and the attention implementation do not count. ``trainable=False`` leaves out the
    parameters that require gradients, and the values of scales.

    Raises:
        ValueError: a weight that cannot be read.
    """
    digest = hashlib.sha256()

    def add(*facts):
        digest.update(json.dumps(facts, sort_keys=True, default=str).encode() + b"\n")

    add(type(model).__name__, _settings(getattr(model, "config", None)))
    add({name: _settings(c) for name, c in (getattr(model, "peft_config", None) or {}).items()})
    add(learns_prompt(model))
    if (extension := extension_of(model)) is not None:
        add("extension", extension.method, extension.options)
    scales = getattr(model, "seal_scales", None)
    inside = set() if scales is None else {id(p) for p in scales.parameters()}
    for name, parameter in sorted(model.named_parameters(), key=lambda item: item[0]):
        if id(parameter) not in inside and (trainable or not parameter.requires_grad):
            add(name, *_tensor(_materialised(model, name, parameter)))
    for name, buffer in sorted(_buffers(model), key=lambda item: item[0]):
        add(name, *_tensor(_materialised(model, name, buffer)))
    for name, module in model.named_modules():
        if numbers := {key: getattr(module, key) for key in _NUMBERS if key in _readable(module)}:
            add(name, numbers)
    # What quantised modules of torch.ao keep is neither a parameter nor a buffer.
    for name, value in sorted(model.state_dict().items()):
        if not isinstance(value, Tensor):
            add(name, *_value(value))
    for name, current in _scales(model):
        add("scales", name, *(_tensor(current) if trainable else [list(current.shape)]))
    return digest.hexdigest()[:32]


def describe_model(model: nn.Module) -> dict:
    """What result files say about a model: ``class``, ``name``, ``dtype``, ``device``, ``parameters``,
    ``fingerprint``.  Of a folder that is named from the root of this machine, ``name`` is the last part."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    name = os.path.basename(os.path.normpath(name)) if name and os.path.isabs(name) else name
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()})
    return {
        "class": type(model).__name__,
        "name": name or None,
        "dtype": ", ".join(dtypes),
        "device": str(getattr(model, "device", "cpu")),
        "parameters": sum(p.numel() for p in model.parameters()),
        "fingerprint": fingerprint(model),
    }


def _settings(config) -> object:
    """A config as JSON values without its origin."""
    if config is None:
        return None
    content = config.to_dict() if hasattr(config, "to_dict") else vars(config)
    if "peft_type" in content:  # the path of the base and the switch to inference say nothing about the values
        content = {
            k: v for k, v in content.items() if k not in ("base_model_name_or_path", "inference_mode", "revision")
        }
    return _plain(content)


def _plain(value):
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items() if k not in _IRRELEVANT}
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _readable(module):
    """Attributes and properties of a module, without its tensors."""
    return {*vars(module), *(key for key in _NUMBERS if isinstance(getattr(type(module), key, None), property))}


def _buffers(model) -> Iterator[tuple[str, Tensor]]:
    for prefix, module in model.named_modules():
        kinds = getattr(module, "rope_type", "")
        kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
        # Such an embedding replaces its frequencies by the length of the last prompt; those it starts from stay.
        moving = any("dynamic" in str(kind) or kind == "longrope" for kind in kinds)
        for name, buffer in module.named_buffers(recurse=False):
            if not (moving and name.endswith("inv_freq") and "original" not in name):
                yield f"{prefix}.{name}" if prefix else name, buffer


def _scales(model) -> Iterator[tuple[str, Tensor]]:
    """What scales multiply each layer by, where they are on."""
    attachment = getattr(getattr(model, "seal_scales", None), "attachment", None)
    if attachment is None or not attachment.patch.serves(SCALES):
        return
    for layer in attachment.patch.layers:
        if (current := layer.current()) is not None:
            yield layer.name, current


def _materialised(model, name, tensor):
    """The tensor itself, or what accelerate keeps of it elsewhere."""
    if not tensor.is_meta:
        return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # a DTensor is sharded
    path, _, key = name.rpartition(".")
    hook = getattr(model.get_submodule(path), "_hf_hook", None)
    for one in getattr(hook, "hooks", [hook]):
        found = getattr(one, "weights_map", None)
        if found is not None:
            return found[key]
    raise ValueError(f"seal_ops: model must have all its weights loaded to be identified, got {name} without values")


def _value(value) -> Iterable:
    if isinstance(value, Tensor):
        return _tensor(value)
    if isinstance(value, (tuple, list)):
        return [fact for item in value for fact in _value(item)]
    if isinstance(value, Mapping):
        return [fact for key, item in value.items() for fact in (str(key), *_value(item))]
    plain = isinstance(value, (str, int, float, bool, type(None), torch.dtype, torch.Size))
    return [str(value) if plain else type(value).__name__]


def _tensor(tensor: Tensor) -> list:
    """Shape, dtype and contents of a tensor, of a subclass's inner tensors, and of those it carries as attributes."""
    facts: list = [list(tensor.shape), str(tensor.dtype)]
    if tensor.is_quantized:
        return [
            *facts,
            str(tensor.qscheme()),
            tensor.q_scale()
            if tensor.qscheme() == torch.per_tensor_affine
            else _contents(tensor.q_per_channel_scales()),
            _contents(tensor.int_repr()),
        ]
    if hasattr(tensor, "__tensor_flatten__"):
        names, context = tensor.__tensor_flatten__()
        return [*facts, str(context), *(fact for name in names for fact in (name, *_tensor(getattr(tensor, name))))]
    facts.append(_contents(tensor))
    # bitsandbytes keeps the scales of its blocks beside the packed numbers.
    for name, value in sorted(vars(tensor).items()):
        for key, inner in {name: value, **(vars(value) if hasattr(value, "__dict__") else {})}.items():
            if isinstance(inner, Tensor):
                facts += [name, key, *_tensor(inner)]
    return facts


def _contents(tensor: Tensor) -> list:
    """One hash or sum a block of the tensor's bytes."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if flat.device.type != "cpu":
        return _sums(flat)
    blocks = flat.split(8 * BLOCK)
    if len(blocks) == 1:
        return [_hash(flat)]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # hashing lets go of the interpreter's lock
        return list(pool.map(_hash, blocks))


def _hash(block: Tensor) -> str:
    return hashlib.sha256(memoryview(block.numpy())).hexdigest()


def _sums(flat: Tensor) -> list[int]:
    if rest := -flat.numel() % 8:
        flat = torch.cat([flat, flat.new_zeros(rest)])
    if flat.storage_offset() % 8:  # a parameter that is a slice of a larger buffer
        flat = flat.clone()
    blocks = flat.view(torch.int64).split(BLOCK)
    return torch.stack([_mixed(block) for block in blocks]).tolist()


def _mixed(words: Tensor) -> Tensor:
    # Not linear in the words: in a plain dot product two flipped signs would cancel.
    mixed = (words ^ _places(words.device)[: words.numel()]) * _ODD[0]
    mixed ^= mixed >> 29
    mixed *= _ODD[1]
    mixed ^= mixed >> 32
    return mixed.sum()


@functools.lru_cache(maxsize=8)
def _places(device) -> Tensor:
    """One random number a place of a block, the same everywhere."""
    generator = torch.Generator().manual_seed(2501_15225)
    high, low = (torch.randint(0, 2**32, (BLOCK,), generator=generator, device="cpu") for _ in range(2))
    return (high << 32 | low).to(device)
