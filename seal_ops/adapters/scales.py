"""The learned scales of one model, as modules: fp32 whatever the model is cast to."""
from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ..utils.files import atomic_write, replacing
from .files import CONFIG_FILE, WEIGHTS_FILE, ScalesConfig


class LayerScale(nn.Module):
    """The scale of one layer, fp32, ``[Hq]`` or ``[Hq, D]``."""

    def __init__(self, shape: tuple[int, ...], device=None):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(shape, dtype=torch.float32, device=device))
        self.rows: Tensor | None = None  # [B, Hq, 1 or D], in the place of `scale`; see `Scales.rows`

    def forward(self) -> Tensor:  # a call, so that hooks of offloading bring the parameter here
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
        self.attachment = None  # set by `attachment.attach_to`: how to bring the model back

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
