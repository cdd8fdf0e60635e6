"""The scales of one model: attach, detach, disable, merge, save, load.

SEAL (arXiv 2501.15225) multiplies the attention output, before ``o_proj``, by one learned factor per query head
("head", SEAL-H) or per channel ("channel", SEAL-C) in every layer; the model itself is frozen.
"""
from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from .backends import choose
from .files import atomic_write, replacing
from .patch import Seam, Site, find_sites

GRANULARITIES = ("head", "channel")
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_SUBMODULE = "seal_scales"
_FORMAT = 1


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
        from . import __version__
        return {"peft_type": "SEAL", "format_version": _FORMAT, "seal_ops_version": __version__,
                **dataclasses.asdict(self)}


class LayerScale(nn.Module):
    """The scale of one layer, fp32, ``[Hq]`` or ``[Hq, D]``."""

    def __init__(self, shape: tuple[int, ...], device=None):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(shape, dtype=torch.float32, device=device))
        self.rows: Tensor | None = None  # [B, Hq, 1 or D], in the place of `scale`; see `Scales.rows`

    def current(self) -> Tensor:
        return self.scale if self.rows is None else self.rows

    def _apply(self, fn, recurse=True):
        # `model.to(torch.bfloat16)` reaches here too. Near 1 bf16 moves in steps of 2^-7, larger than an optimiser's.
        before = self.scale.detach()
        super()._apply(fn, recurse)
        if self.scale.dtype != before.dtype and self.scale.device.type != "meta":
            self.scale.data = before.to(self.scale.device)
        return self

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.scale.shape))


class Scales(nn.Module):
    """The learned scales of one model, made by `attach` or `load`; a submodule of the model named ``seal_scales``.

    Parameters: ``layers.N.scale``, fp32 (kept so when the model is cast), ``[Hq]`` or ``[Hq, D]``.  They are part of
    ``model.state_dict()``, so that optimisers, DDP and checkpoints of training frameworks see them, and are left out of
    ``model.save_pretrained``, whose checkpoints stay plain.  ``config`` is a `ScalesConfig`.
    """

    def __init__(self, config: ScalesConfig, devices: Sequence | None = None):
        super().__init__()
        self.config = config
        devices = devices or [None] * len(config.layers)
        self.layers = nn.ModuleDict({str(layer): LayerScale(config.shape(i), device)
                                     for i, (layer, device) in enumerate(zip(config.layers, devices))})
        self.attachment: _Attachment | None = None

    def items(self) -> Iterator[tuple[int, nn.Parameter]]:
        """(layer index, scale) in the order of the layers."""
        return ((layer, self.layers[str(layer)].scale) for layer in self.config.layers)

    @contextlib.contextmanager
    def rows(self, rows: Tensor | Sequence[Tensor] | Mapping[int, Tensor]):
        """Inside the block every row b of a batch runs with its own scales, in the place of the learned ones.

        ``rows``: one tensor ``[layers, B, Hq]`` or ``[layers, B, Hq, D]`` (the layers of ``config.layers``, in order),
        a sequence of one tensor a layer, or a mapping from layer index to ``[B, Hq]`` or ``[B, Hq, D]`` (layers that
        are not named keep their scale).  B is the batch size of the calls inside.  To ablate heads of trained scales,
        multiply: ``rows = keep[layer] * scale``.  Converted to fp32; gradients flow into ``rows``.
        Raises ValueError for an unknown layer or a wrong shape.
        """
        if not isinstance(rows, Mapping):
            if len(rows) != len(self.config.layers):
                raise ValueError(f"Scales.rows: rows must have {len(self.config.layers)} entries, one a layer, "
                                 f"got {len(rows)}")
            rows = dict(zip(self.config.layers, rows))
        prepared = {}
        for layer, tensor in rows.items():
            if layer not in self.config.layers:
                raise ValueError(f"Scales.rows: layers must be among {list(self.config.layers)}, got {layer}")
            index = self.config.layers.index(layer)
            heads, head_dim = self.config.num_heads[index], self.config.head_dim[index]
            if tensor.dim() == 2:
                tensor = tensor[..., None]
            if tensor.dim() != 3 or tensor.shape[1] != heads or tensor.shape[2] not in (1, head_dim):
                raise ValueError(f"Scales.rows: rows of layer {layer} must have shape [B, {heads}] or [B, {heads}, "
                                 f"{head_dim}], got {list(tensor.shape)}")
            holder = self.layers[str(layer)]
            prepared[holder] = tensor.to(holder.scale.device, torch.float32)
        previous = {holder: holder.rows for holder in prepared}
        try:
            for holder, tensor in prepared.items():
                holder.rows = tensor
            yield self
        finally:
            for holder, tensor in previous.items():
                holder.rows = tensor

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Writes ``adapter_config.json`` and ``adapter_model.safetensors``, each replaced in one step.

        Raises OSError, naming the folder, where it cannot be written.
        """
        folder = os.fspath(save_directory)
        tensors = {f"layers.{layer}.scale": scale.detach().to("cpu", copy=True) for layer, scale in self.items()}
        try:
            # The config last: an interrupted first save has no config and is refused as a whole.
            with replacing(os.path.join(folder, WEIGHTS_FILE)) as temporary:
                safetensors.torch.save_file(tensors, temporary, metadata={"format": "pt"})
            atomic_write(os.path.join(folder, CONFIG_FILE), json.dumps(self.config.to_dict(), indent=2) + "\n")
        except OSError as error:
            raise type(error)(f"Scales.save_pretrained: save_directory must be a writable folder, got {folder!r} "
                              f"({error.strerror or error})") from error

    def extra_repr(self) -> str:
        return f"granularity={self.config.granularity!r}, layers={len(self.config.layers)}"


@dataclasses.dataclass(eq=False)
class _Attachment:
    """How to bring the model back; lives in the scales' ``__dict__`` and is copied with the model."""
    seam: Seam
    trainable: set[str]
    keys_to_ignore_on_save: object


def attached(model: nn.Module, call: str) -> tuple[Scales, _Attachment]:
    """The scales on ``model``; ValueError in the name of ``call`` where there are none."""
    scales = getattr(model, _SUBMODULE, None)
    attachment = getattr(scales, "attachment", None)
    if not isinstance(scales, Scales) or attachment is None:
        raise ValueError(f"seal_ops.{call}: model must have scales attached, this {type(model).__name__} has none")
    return scales, attachment


def _base_config(model: nn.Module):
    return getattr(model, "config", None)


def _select(sites: list[Site], layers: Sequence[int] | None) -> list[int]:
    if layers is None:
        return list(range(len(sites)))
    chosen = sorted(set(layers))
    if not chosen or chosen[0] < 0 or chosen[-1] >= len(sites):
        raise ValueError(f"seal_ops.attach: layers must be indices from 0 to {len(sites) - 1}, got {list(layers)}")
    return chosen


def refuse_second(model: nn.Module, call: str) -> None:
    """ValueError in the name of ``call`` where the model already has scales."""
    if any(isinstance(m, Scales) for m in model.modules()):
        raise ValueError(f"seal_ops.{call}: model already has scales attached; call seal_ops.detach(model) first")


def attach(model: nn.Module, granularity: str = "head", layers: Sequence[int] | None = None,
           backend: str | None = None) -> Scales:
    """Freezes ``model`` and gives its self-attention layers scales, all 1, that are its only trainable parameters.

    ``model``: a transformers model with loaded weights that calls attention through the attention registry.
    ``granularity``: "head" ([Hq] a layer) or "channel" ([Hq, D]).  ``layers``: indices of the layers that get scales
    (default: all); every layer runs the fused attention.  ``backend``: see `seal_ops.attention`.

    The model is run once on two tokens to observe sizes and structure.  Returns the `Scales`, also found as
    ``model.seal_scales``.  Raises ValueError, one sentence, for a model without a known seam or with terms that the
    scaled attention does not have, for scales already attached, and for a backend that cannot run.
    """
    if granularity not in GRANULARITIES:
        raise ValueError(f"seal_ops.attach: granularity must be 'head' or 'channel', got {granularity!r}")
    refuse_second(model, "attach")
    return attach_to(model, find_sites(model), granularity, layers, backend)


def attach_to(model: nn.Module, sites: list[Site], granularity: str, layers: Sequence[int] | None,
              backend: str | None) -> Scales:
    """`attach`, for sites that are already found."""
    config = describe(model, sites, granularity, layers)
    parameters = [next(s.o_proj.parameters()) for s in sites]
    if backend not in (None, "auto"):
        dtype = next((p.dtype for p in parameters if p.is_floating_point()), torch.bfloat16)
        choose(backend, "attention", parameters[0].device, dtype, sites[0].head_dim)
    scales = Scales(config, [None if parameters[i].is_meta else parameters[i].device for i in config.layers])
    for index, site in enumerate(sites):
        site.backend = backend
        site.scaling = scales.layers[str(index)] if index in config.layers else None
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    for p in model.parameters():
        p.requires_grad_(False)
    setattr(model, _SUBMODULE, scales)
    ignored = getattr(model, "_keys_to_ignore_on_save", None)
    scales.attachment = _Attachment(Seam(sites), trainable, ignored)
    # transformers matches these names exactly
    model._keys_to_ignore_on_save = {*(ignored or ()), *(f"{_SUBMODULE}.{n}" for n in scales.state_dict())}
    scales.attachment.seam.install()
    return scales


def describe(model: nn.Module, sites: list[Site], granularity: str, layers: Sequence[int] | None = None) -> ScalesConfig:
    """The config that scales of this granularity would have on ``model``."""
    chosen = _select(sites, layers)
    base = _base_config(model)
    return ScalesConfig(granularity, tuple(chosen), tuple(sites[i].num_heads for i in chosen),
                        tuple(sites[i].head_dim for i in chosen), getattr(base, "model_type", None),
                        getattr(base, "_name_or_path", None) or None)


def detach(model: nn.Module) -> nn.Module:
    """Takes the scales off; the model is bit for bit what it was before `attach`, ``requires_grad`` flags included.

    The `Scales` object keeps its values and can still be saved.  Returns the model.
    """
    scales, attachment = attached(model, "detach")
    attachment.seam.remove()
    delattr(model, _SUBMODULE)
    scales.attachment = None
    for name, p in model.named_parameters():
        p.requires_grad_(name in attachment.trainable)
    if attachment.keys_to_ignore_on_save is None:
        model.__dict__.pop("_keys_to_ignore_on_save", None)
    else:
        model._keys_to_ignore_on_save = attachment.keys_to_ignore_on_save
    return model


@contextlib.contextmanager
def disabled(model: nn.Module):
    """Inside the block ``model`` computes exactly what it did before `attach`, with its own attention implementation."""
    _, attachment = attached(model, "disabled")
    seam, was_installed = attachment.seam, attachment.seam.installed
    seam.remove()
    try:
        yield model
    finally:
        # Not where the block detached or merged the model.
        if was_installed and getattr(getattr(model, _SUBMODULE, None), "attachment", None) is attachment:
            seam.install()


def merge(model: nn.Module) -> nn.Module:
    """Multiplies the scales into the columns of ``o_proj.weight`` and detaches: plain weights, no cost at inference.

    Computed in fp32 and rounded once; biases stay.  All layers are checked before the first is written.  Returns the
    model.  Raises ValueError for a step between attention and ``o_proj`` (BitNet's norm, a gate), for quantised or
    adapted projections (serve those unmerged), and where a merged weight would overflow.
    """
    scales, attachment = attached(model, "merge")
    sites = attachment.seam.sites
    work = [(sites[layer], scale.detach().expand(sites[layer].num_heads, -1) if scale.dim() == 2 else
             scale.detach()[:, None]) for layer, scale in scales.items()]
    seen: set[int] = set()
    for site, scale in work:
        _check_mergeable(site, scale, seen)
    with torch.no_grad():
        for site, scale in work:
            weight = site.o_proj.weight
            weight.copy_(_merged(weight, scale, site))
    return detach(model)


def _merged(weight: Tensor, scale: Tensor, site: Site) -> Tensor:
    """fp32 (fp64) weight [hidden, Hq * D] times the scale [Hq, 1 or D]."""
    compute = torch.promote_types(weight.dtype, torch.float32)
    return weight.to(compute) * scale.to(weight.device, compute).expand(-1, site.head_dim).reshape(1, -1)


def _check_mergeable(site: Site, scale: Tensor, seen: set[int]) -> None:
    def refuse(expected: str, got: str):
        raise ValueError(f"seal_ops.merge: {site.name}.o_proj must {expected}, got {got}")

    o_proj = site.o_proj
    if not site.direct:
        refuse("read the attention output directly", f"a module with another step in between "
               f"({type(site.module).__name__}); keep the scales attached instead")
    # An exact type: quantised and adapted layers are subclasses or wrappers with weights of another meaning.
    if type(o_proj) is not nn.Linear or not o_proj.weight.is_floating_point() or o_proj.weight.element_size() < 2:
        refuse("be a plain torch.nn.Linear in 16 or more bits", f"{type(o_proj).__name__} with "
               f"{getattr(getattr(o_proj, 'weight', None), 'dtype', 'no')} weight; keep the scales attached instead")
    if o_proj.weight.is_meta or o_proj.weight.shape[1] != site.num_heads * site.head_dim:
        refuse(f"hold its whole weight with {site.num_heads * site.head_dim} columns",
               f"{list(o_proj.weight.shape)} on {o_proj.weight.device}")
    if id(o_proj.weight) in seen:
        refuse("have a weight of its own", "a weight that two layers share")
    seen.add(id(o_proj.weight))
    # Largest magnitude a column would get, without a second copy of the weight.
    columns = o_proj.weight.detach().abs().amax(0, keepdim=True)
    if not bool((_merged(columns, scale, site).abs() <= torch.finfo(o_proj.weight.dtype).max).all()):
        refuse(f"stay finite in {o_proj.weight.dtype}", "scales that overflow it")


def load(model: nn.Module, save_directory: str | os.PathLike, backend: str | None = None) -> Scales:
    """Attaches the scales saved in ``save_directory`` to ``model``; the reverse of `Scales.save_pretrained`.

    Everything is checked before the model is touched.  Returns the `Scales`.  Raises FileNotFoundError for a missing
    file and ValueError, one sentence, for a damaged file, an adapter made for another model, or tensors of another
    shape or dtype than the config says.
    """
    refuse_second(model, "load")
    config, tensors = read(save_directory)
    sites = find_sites(model)
    check_fits(config, model, sites, os.fspath(save_directory))
    scales = attach_to(model, sites, config.granularity, config.layers, backend)
    with torch.no_grad():
        for layer, scale in scales.items():
            scale.copy_(tensors[f"layers.{layer}.scale"])
    return scales


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
                         + (" (seal_ops.peft.import_ia3 reads those)" if content.get("peft_type") == "IA3" else ""))
    if content.get("format_version") != _FORMAT:
        raise ValueError(f"{where} must have format_version {_FORMAT}, got {content.get('format_version')!r}")
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


def check_fits(config: ScalesConfig, model: nn.Module, sites: list[Site], source: str) -> None:
    """ValueError where an adapter with this config was made for another model."""
    model_type = getattr(_base_config(model), "model_type", None)
    if config.model_type and model_type and config.model_type != model_type:
        raise ValueError(f"seal_ops.load: {source!r} must be an adapter for model type {model_type!r}, got one for "
                         f"{config.model_type!r}")
    if max(config.layers) >= len(sites):
        raise ValueError(f"seal_ops.load: {source!r} must be an adapter for {len(sites)} layers, got one with layer "
                         f"{max(config.layers)}")
    for layer, heads, head_dim in zip(config.layers, config.num_heads, config.head_dim):
        site = sites[layer]
        if (heads, head_dim) != (site.num_heads, site.head_dim):
            raise ValueError(f"seal_ops.load: {source!r} must be an adapter for {site.num_heads} heads of "
                             f"{site.head_dim} channels in layer {layer}, got one for {heads} heads of {head_dim}")
