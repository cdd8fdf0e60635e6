"""The learned scales of one model: parameters, scales for each row, files, named adapters, and PEFT's verbs."""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..huggingface.modes import recomputed_inside
from ..utils.arguments import path
from ..utils.frames import callers
from . import files, model_card
from .files import DEFAULT_ADAPTER, ScalesConfig
from .gathering import is_main_process, like, whole
from .layer_scale import LayerScale
from .saving import folders_beside, is_checkpoint, save_around


class Scales(nn.Module):
    """The learned scales of one model, made by `attach` or `load`; a submodule of the model named ``seal_scales``.

    Parameters: ``layers.N.scale``, fp32 (kept so when the model is cast), ``[Hq]`` or ``[Hq, D]``, N the model's own
    number of the layer.  They are part of ``model.state_dict()``, so that optimisers, DDP and checkpoints of training
    frameworks see them.  ``model.save_pretrained`` writes them beside the weights, which stay plain.  ``config`` is a
    `ScalesConfig`.  The verbs of PEFT (``from_pretrained``, ``set_adapter``, ``disable_adapter``, ``merge_and_unload``
    and others) mean here what they mean there; see docs/adapters.md.
    """

    def __init__(self, config: ScalesConfig, devices: Mapping | None = None, adapter_name: str = DEFAULT_ADAPTER):
        super().__init__()
        self.attachment = None  # set by `attachment.attach_to`: how to bring the model back
        self.active_adapter = adapter_name
        self.inactive: dict[str, tuple[ScalesConfig, dict[int, Tensor]]] = {}  # name -> config, values on the CPU
        self.spare: dict[int, LayerScale] = {}  # for rows of other adapters, in layers that the active one leaves alone
        self.cards: dict[str, model_card.CardFacts] = {}  # adapter -> what its model card is to say
        self.checkpoints = None  # `trainer_callback.Checkpoints`, while a Trainer saves with `SealCallback`
        self.saved_beside = False  # while `saving.SaveBoth` saves the model that the scales are on
        self.loaded = False  # whether a state dict with scales has been loaded
        self._set_layers(config, devices or {})

    def __deepcopy__(self, memo: dict) -> Scales:
        """Copied with the model they are on, they are on the copy; copied alone, as averages are, they are on none.

        Raises:
            ValueError: PEFT's ``modules_to_save`` names them: its copy would train, and attention never read it.
        """
        if _called_by_a("ModulesToSaveWrapper"):
            raise ValueError(
                "seal_ops: PEFT's modules_to_save must name modules of the base model, got the scales, of which PEFT "
                "would train a copy that attention does not read; leave them out and call "
                "scales.requires_grad_(True) after get_peft_model"
            )
        copied = memo[id(self)] = type(self).__new__(type(self))
        state = dict(self.__dict__)
        if self.attachment is not None and id(self.attachment.owner) not in memo:
            state["attachment"] = None  # which would bring a copy of the whole model along
        copied.__dict__.update(copy.deepcopy(state, memo))
        return copied

    # -- parameters --------------------------------------------------------------------------------------------------
    def _set_layers(self, config: ScalesConfig, devices: Mapping) -> None:
        self.config = config
        self.layers = nn.ModuleDict(
            {str(layer): LayerScale(shape, devices.get(layer)) for layer, shape in config.shapes().items()}
        )

    def items(self) -> Iterator[tuple[int, nn.Parameter]]:
        """(layer, scale) in the order of the layers."""
        return ((layer, self.layers[str(layer)].scale) for layer in self.config.layers)

    def requires_grad_(self, requires_grad: bool = True) -> Scales:
        """As in PyTorch; with False also said to be meant, so that nothing warns of training around frozen scales."""
        for holder in self.layers.values():
            holder.may_be_frozen = not requires_grad
        return super().requires_grad_(requires_grad)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        found = any(name.startswith(f"{prefix}layers.") for name in state_dict)
        for holder in self.layers.values():
            holder.left_alone = not found
        if found:
            self.loaded = True
        elif self.checkpoints is None and not _loads_an_adapter_of_peft():
            warnings.warn(
                "seal_ops: the state dict that is loaded holds no scales, so they keep their present values; "
                "saved ones are read by seal_ops.load, and with transformers' Trainer by "
                "seal_ops.SealCallback",
                stacklevel=2,
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def state_dict(self, *args, **kwargs):
        """As in PyTorch; empty for ``save_pretrained`` of a model around the one that has scales, which gets them
        beside its weights."""
        around = None if self.saved_beside or self.attachment is None else save_around(self.attachment.owner)
        if around is None or (self.checkpoints is not None and is_checkpoint(around[0])):
            return super().state_dict(*args, **kwargs)
        self.save_to(folders_beside(self, around[0]), around[1])
        return kwargs.get("destination", {})

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        # A PEFT model made after `attach` leaves no other trace of its save_pretrained than this call.
        if self.checkpoints is None and not self.saved_beside and _called_by("get_peft_model_state_dict"):
            warnings.warn(
                "seal_ops: PEFT saves only its own adapter; save the scales with scales.save_pretrained, or "
                "with transformers' Trainer by seal_ops.SealCallback",
                stacklevel=2,
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def values(self) -> dict[int, Tensor]:
        """Layer -> a copy of its whole scale on the CPU; where scales are sharded, all processes must call this.

        Raises:
            ValueError: scales that another framework has sharded and not gathered.
        """
        found = whole({layer: holder for layer, holder in zip(self.config.layers, self.layers.values())})
        for layer, shape in self.config.shapes().items():
            if tuple(found[layer].shape) != shape:
                raise ValueError(
                    f"seal_ops.Scales: the scale of layer {layer} must have shape {list(shape)}, got "
                    f"{list(found[layer].shape)}: gather the sharded model first"
                )
        return found

    def check_finite(self, call: str, values: Mapping[int, Tensor] | None = None) -> None:
        """Checks that every scale (of ``values``, or the active adapter's) is a number, for ``call``.

        Raises:
            ValueError: a scale is NaN or infinite.
        """
        for layer, value in self.items() if values is None else values.items():
            if not bool(torch.isfinite(value.detach()).all()):
                raise ValueError(f"seal_ops.{call}: every scale must be finite, got NaN or infinity in layer {layer}")

    @torch.no_grad()
    def set_values(self, config: ScalesConfig, values: Mapping[int, Tensor], attention_layers=None) -> None:
        """Takes over a config and values; parameters stay the same objects where the shapes allow it."""
        if config.shapes() != self.config.shapes():
            attention_layers = (
                self.attachment.patch.layers
                if attention_layers is None and self.attachment is not None
                else attention_layers or []
            )
            trainable = any(p.requires_grad for p in self.parameters())
            self._set_layers(config, _present_devices(attention_layers))
            self.requires_grad_(trainable)
            self.bind(attention_layers)
        self.config = config
        for layer, scale in self.items():
            scale.copy_(like(values[layer], scale))

    def bind(self, attention_layers) -> None:
        """Makes the attention layers read these scales."""
        for attn in attention_layers:
            attn.scaling = self.layers[str(attn.index)] if attn.index in self.config.layers else None

    # -- rows --------------------------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def rows(self, rows: Tensor | Sequence[Tensor] | Mapping[int, Tensor]):
        """Inside the block every row b of a batch runs with its own scales, in the place of the learned ones.

        To ablate heads of trained scales, multiply: ``rows = keep[layer] * scale``.  Gradients flow into ``rows``.

        Args:
            rows: one tensor ``[layers, B, Hq]`` or ``[layers, B, Hq, D]`` (the layers of ``config.layers``, in order),
                a sequence of one tensor a layer, or a mapping from layer to ``[B, Hq]`` or ``[B, Hq, D]`` (layers that
                are not named keep their scale); converted to fp32.  B is the batch size of the calls inside.

        Raises:
            ValueError: an unknown layer or a wrong shape.
        """
        if not isinstance(rows, Mapping):
            if not isinstance(rows, (Tensor, list, tuple)) or (isinstance(rows, Tensor) and not rows.dim()):
                raise ValueError(
                    f"seal_ops.Scales.rows: rows must be tensors, one a layer, or a mapping from layer to tensor, got "
                    f"{files.shown(rows)}"
                )
            if len(rows) != len(self.config.layers):
                raise ValueError(
                    f"seal_ops.Scales.rows: rows must have {len(self.config.layers)} entries, one a "
                    f"layer, got {len(rows)}"
                )
            rows = dict(zip(self.config.layers, rows))
        prepared = {}
        for layer, tensor in rows.items():
            if layer not in self.config.layers:
                raise ValueError(f"seal_ops.Scales.rows: layers must be among {list(self.config.layers)}, got {layer}")
            index = self.config.layers.index(layer)
            heads, head_dim = self.config.num_heads[index], self.config.head_dim[index]
            if not isinstance(tensor, Tensor):
                raise ValueError(
                    f"seal_ops.Scales.rows: rows of layer {layer} must be a tensor, got {files.shown(tensor)}"
                )
            if tensor.dim() == 2:
                tensor = tensor[..., None]
            if tensor.dim() != 3 or tensor.shape[1] != heads or tensor.shape[2] not in (1, head_dim):
                raise ValueError(
                    f"seal_ops.Scales.rows: rows of layer {layer} must have shape [B, {heads}] or "
                    f"[B, {heads}, {head_dim}], got {list(tensor.shape)}"
                )
            holder = self.layers[str(layer)]
            prepared[holder] = tensor.to(holder.scale.device, torch.float32)
        with contextlib.ExitStack() as inside:
            for holder, tensor in prepared.items():
                inside.enter_context(holder.given_rows(tensor))
            inside.enter_context(self._recomputed_inside("Scales.rows"))
            yield self

    # -- files -------------------------------------------------------------------------------------------------------
    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        selected_adapters: Sequence[str] | None = None,
        is_main_process: bool | None = None,
    ) -> None:
        """Writes ``adapter_config.json``, ``adapter_model.safetensors`` and a model card.

        The adapter "default", or the only one, goes into the folder itself, others into subfolders of their names, as
        with PEFT.  A README that somebody wrote is left alone.  At every moment the folder holds an adapter that can be
        read, the old or the new.  Where the scales are sharded, all processes must call this.

        Args:
            save_directory: the folder.
            selected_adapters: names; None for all.
            is_main_process: whether this process writes; None for the first of a distributed run.

        Raises:
            ValueError: an unknown name, no path, or a scale that is not finite; the folder is left as it was.
            OSError: the folder cannot be written; the message names it.
        """
        names = self.adapter_names if selected_adapters is None else selected_adapters
        names = self._names("save_pretrained", "selected_adapters", names)
        root = DEFAULT_ADAPTER if DEFAULT_ADAPTER in names or len(names) != 1 else names[0]
        folder = path("seal_ops.Scales.save_pretrained", "save_directory", save_directory)
        self.save_to({name: folder if name == root else os.path.join(folder, name) for name in names}, is_main_process)

    def save_to(self, folders: Mapping[str, str], main: bool | None = None, values: Mapping | None = None) -> None:
        """`save_pretrained` with a folder for each adapter; ``values``: the active one's, where they are at hand."""
        if values is None and self.active_adapter in folders:
            values = self.values()
        if not (is_main_process() if main is None else main):
            return
        for name, folder in folders.items():
            active = name == self.active_adapter
            config, tensors = (self.config, values) if active else self.inactive[name]
            self.check_finite("Scales.save_pretrained", tensors)  # `load` would refuse the file
            try:
                card = model_card.text(config, self.cards.get(name))
                files.write(folder, config, dict(tensors), card if model_card.replaceable(folder) else None)
            except OSError as error:
                raise type(error)(
                    f"seal_ops.Scales.save_pretrained: save_directory must be a writable folder, got "
                    f"{folder!r} ({error.strerror or error})"
                ) from error

    @classmethod
    def from_pretrained(cls, model: nn.Module, name_or_path: str | os.PathLike, **options) -> Scales:
        """`seal_ops.load` under PEFT's name, with the same arguments."""
        from .attachment import load

        return load(model, name_or_path, **options)

    def push_to_hub(self, repo_id: str, **options):
        """Uploads the adapters; arguments as in `seal_ops.adapters.hub.push`. Returns the hub's commit info."""
        from .hub import push

        return push(self, repo_id, **options)

    @property
    def card(self) -> model_card.CardFacts:
        """What the active adapter's model card says of its training and results; to be changed in place."""
        return self.cards.setdefault(self.active_adapter, model_card.CardFacts())

    # -- named adapters ----------------------------------------------------------------------------------------------
    @property
    def adapter_names(self) -> list[str]:
        """The active adapter, then the others."""
        return [self.active_adapter, *self.inactive]

    def _check_names(self, call: str, argument: str, names: Sequence[str], also: Sequence[str] = ()) -> None:
        for name in names:
            if argument == "adapter_name" and not isinstance(name, str):
                raise ValueError(
                    f"seal_ops.Scales.{call}: {argument} must be one name, since one adapter is active at a time, got "
                    f"{files.shown(name)}"
                )
            if name not in self.adapter_names and name not in also:
                raise ValueError(
                    f"seal_ops.Scales.{call}: {argument} must be among {[*self.adapter_names, *also]}, "
                    f"got {files.shown(name)}"
                )

    def _names(self, call: str, argument: str, names: Sequence[str], also: Sequence[str] = ()) -> list[str]:
        """Several names, at least one, checked."""
        if isinstance(names, str) or not isinstance(names, Iterable) or not (names := list(names)):
            raise ValueError(
                f"seal_ops.Scales.{call}: {argument} must be a list of names, at least one, got {files.shown(names)}"
            )
        self._check_names(call, argument, names, also)
        return names

    def set_adapter(self, adapter_name: str) -> None:
        """Makes another adapter the one that computes and learns.

        An optimiser made before keeps its old state.

        Raises:
            ValueError: an unknown name.
        """
        self._check_names("set_adapter", "adapter_name", [adapter_name])
        if adapter_name == self.active_adapter:
            return
        before = (self.config, self.values())
        config, values = self.inactive[adapter_name]
        self.set_values(config, values)
        del self.inactive[adapter_name]
        self.inactive[self.active_adapter] = before
        self.active_adapter = adapter_name

    def add_adapter(
        self, adapter_name: str, granularity: str | None = None, layers: Sequence[int] | None = None
    ) -> None:
        """Adds an adapter of ones, which `set_adapter` activates; the rest defaults to the active one's."""
        from .attachment import new_config

        check_new_name(adapter_name, "Scales.add_adapter", self)
        layers = self.config.layers if layers is None else layers
        config = new_config(self, granularity or self.config.granularity, layers)
        self.inactive[adapter_name] = config, _ones(config.shapes())

    def load_adapter(self, name_or_path: str | os.PathLike, adapter_name: str, **options) -> None:
        """Adds a saved adapter under a new name, which `set_adapter` activates; ``options`` as in `seal_ops.load`."""
        from .attachment import load, owner_of

        check_new_name(adapter_name, "Scales.load_adapter", self)
        load(owner_of(self, "Scales.load_adapter"), name_or_path, adapter_name=adapter_name, **options)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forgets an adapter.

        Raises:
            ValueError: an unknown name, or the active adapter's.
        """
        self._check_names("delete_adapter", "adapter_name", [adapter_name])
        if adapter_name == self.active_adapter:
            raise ValueError(
                f"seal_ops.Scales.delete_adapter: adapter_name must not be the active adapter, got "
                f"{adapter_name!r}; call set_adapter with another first"
            )
        del self.inactive[adapter_name]
        self.cards.pop(adapter_name, None)

    @contextlib.contextmanager
    def adapters_per_row(self, adapter_names: Sequence[str]):
        """Inside the block row b of a batch runs with the adapter ``adapter_names[b]``; "base" is the model without.

        ``model.generate`` follows the copies that it makes of a row: beams, and several returned sequences.  Gradients
        flow into the active adapter only.

        Raises:
            ValueError: an unknown name, scales that are not attached, another thread inside such a block, or, in a call
                inside, a batch of another size or another thread.
        """
        from .attachment import owner_of

        owner_of(self, "Scales.adapters_per_row")
        adapter_names = self._names("adapters_per_row", "adapter_names", adapter_names, _BASE)
        scale_of = {name: values for name, (_, values) in self.inactive.items()}
        scale_of[self.active_adapter] = dict(self.items())
        with contextlib.ExitStack() as inside:
            for attn in self.attachment.patch.layers:
                scales = [scale_of.get(name, {}).get(attn.index) for name in adapter_names]
                if all(s is None for s in scales) and attn.scaling is None:
                    continue
                holder = attn.scaling or self._spare_holder(attn, scales)
                # As wide as any adapter, asked for or not: compiled code is tied to the shape.
                wide = any(attn.index in values and values[attn.index].dim() == 2 for values in scale_of.values())
                inside.enter_context(holder.given_rows(_one_a_row(scales, attn, wide, holder.scale.device)))
                inside.callback(setattr, attn, "scaling", attn.scaling)
                attn.scaling = holder
            inside.enter_context(self._recomputed_inside("Scales.adapters_per_row"))
            yield self

    def _recomputed_inside(self, block: str):
        if self.attachment is None:
            return contextlib.nullcontext()
        return recomputed_inside(self.attachment.owner, block)

    def _spare_holder(self, attn, scales) -> LayerScale:
        """For a layer that the active adapter leaves alone; kept, since compiled code is tied to the object."""
        if attn.index not in self.spare:
            self.spare[attn.index] = LayerScale((attn.num_heads,), next(s.device for s in scales if s is not None))
        return self.spare[attn.index]

    # -- the model ---------------------------------------------------------------------------------------------------
    def disable_adapter(self):
        """A context in which the model runs without scales; `seal_ops.disabled` under PEFT's name."""
        from .attachment import disabled, owner_of

        return disabled(owner_of(self, "Scales.disable_adapter"))

    def merge_and_unload(self) -> nn.Module:
        """`seal_ops.merge` under PEFT's name; returns the plain model."""
        from .attachment import owner_of
        from .merging import merge

        return merge(owner_of(self, "Scales.merge_and_unload"))

    def unload(self) -> nn.Module:
        """`seal_ops.detach` under PEFT's name; returns the model without scales."""
        from .attachment import detach, owner_of

        return detach(owner_of(self, "Scales.unload"))

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) numbers of the model, as PEFT counts them."""
        from .attachment import owner_of

        parameters = list(owner_of(self, "Scales.get_nb_trainable_parameters").parameters())
        return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)

    def print_trainable_parameters(self) -> None:
        """Prints them in PEFT's words."""
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")

    def extra_repr(self) -> str:
        adapters = f", adapter={self.active_adapter!r} of {self.adapter_names}" if self.inactive else ""
        runs = "" if self.attachment is None else f", {self.attachment.patch.summary()}"
        return f"granularity={self.config.granularity!r}, layers={len(self.config.layers)}{adapters}{runs}"


def _one_a_row(scales: Sequence[Tensor | None], attn, wide: bool, device) -> Tensor:
    """fp32 [B, Hq, 1] or, where it is to be wide, [B, Hq, D] of the scales of B rows; ones where there is none."""
    shape = (attn.num_heads, attn.head_dim if wide else 1)
    ones = torch.ones(shape, dtype=torch.float32, device=device)
    return torch.stack([ones if s is None else s.to(device).reshape(attn.num_heads, -1).expand(shape) for s in scales])


def _ones(shapes: Mapping[int, tuple[int, ...]]) -> dict[int, Tensor]:
    return {layer: torch.ones(shape, dtype=torch.float32, device="cpu") for layer, shape in shapes.items()}


_BASE = ("base", "__base__")  # the second is PEFT's word


def check_new_name(name, call: str, scales: Scales | None = None) -> None:
    """ValueError in the name of ``call`` where an adapter cannot be called ``name``."""
    taken = (*_BASE, *(scales.adapter_names if scales is not None else ()))
    if not isinstance(name, str) or not name or name in taken or set(name) & set("/\\."):
        raise ValueError(
            f"seal_ops.{call}: adapter_name must be a new name without '/', '\\' and '.', got {files.shown(name)}"
        )


def _called_by(function: str) -> bool:
    return any(frame.f_code.co_name == function for frame in callers())


def _loads_an_adapter_of_peft() -> bool:
    """Whether PEFT reads its own adapter, which never holds scales; a Trainer that resumes reads all that there is."""
    names = {frame.f_code.co_name for frame in callers()}
    return "set_peft_model_state_dict" in names and not names & {"_load_from_checkpoint", "_load_best_model"}


def _called_by_a(cls: str) -> bool:
    """Whether a method of an object of a class of this name is running."""
    return any(type(frame.f_locals.get("self")).__name__ == cls for frame in callers())


def _present_devices(attention_layers) -> dict:
    """Layer -> where its module is now; a quantised one may have buffers only."""
    found = {}
    for attn in attention_layers:
        tensors = itertools.chain(attn.module.parameters(), attn.module.buffers())
        found[attn.index] = next((t.device for t in tensors if not t.is_meta), attn.device)
    return found
