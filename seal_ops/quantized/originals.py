"""The 16-bit weights that a 4-bit model was made from, read one layer at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from . import bases

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


class Originals:
    """``source``: None, a 16-bit model, a folder with safetensors, or a mapping from names to tensors or layers."""

    def __init__(self, source, call: str):
        self.call, self.source, self.files = call, source, None
        if isinstance(source, nn.Module):
            self.source = dict(source.named_modules())
        elif isinstance(source, (str, os.PathLike)):
            self.files = _files(os.fspath(source), call)
        elif source is not None and not isinstance(source, Mapping):
            raise ValueError(
                f"seal_ops.{call}: original must be a model, a folder or a mapping, got {type(source).__name__}"
            )
        else:
            self.source = None if source is None else dict(source)

    @property
    def known(self) -> bool:
        return self.source is not None

    def forget(self, name: str) -> None:
        """Lets a layer's weight go that is not needed any more."""
        if self.files is None:
            self.source.pop(name, None)

    def check(self, name: str, like: nn.Module) -> None:
        """ValueError where :meth:`weight` would raise one; of a file only the heading is read."""
        if self.files is None or f"{name}.weight" not in self.files:
            self.weight(name, like)
            return
        from safetensors import safe_open

        with safe_open(self.files[f"{name}.weight"], "pt") as file:
            self._check_shape(name, tuple(file.get_slice(f"{name}.weight").get_shape()), like)

    def _check_shape(self, name: str, shape: tuple, like: nn.Module) -> None:
        columns, rows = bases.sizes(like)
        if shape != (rows, columns):
            raise ValueError(
                f"seal_ops.{self.call}: original must have {name}.weight of shape {[rows, columns]}, got {list(shape)}"
            )

    def weight(self, name: str, like: nn.Module | None = None) -> Tensor:
        """The weight [out, in] of a layer, on the device of ``like``; ValueError where it is missing or of another
        shape."""
        found = self._found(name)
        if isinstance(found, nn.Module):
            if not bases.is_plain(found):
                raise ValueError(
                    f"seal_ops.{self.call}: original must have {name} in 16 or more bits, got {type(found).__name__}"
                )
            found = found.weight.detach()
        if found is None or not found.is_floating_point():
            raise ValueError(
                f"seal_ops.{self.call}: original must hold {name}.weight in 16 or more bits, got "
                f"{'none' if found is None else found.dtype}"
            )
        if like is not None:
            self._check_shape(name, tuple(found.shape), like)
            found = found.to(bases.device_of(like))
        return found

    def _found(self, name: str):
        key = f"{name}.weight"
        if self.files is not None:
            if key not in self.files:
                return None
            from safetensors import safe_open

            with safe_open(self.files[key], "pt") as file:
                return file.get_tensor(key)
        found = self.source.get(name, self.source.get(key))
        return found if isinstance(found, (nn.Module, torch.Tensor)) else None


def _files(folder: str, call: str) -> dict[str, str]:
    """Tensor's name -> its file."""
    index, single = os.path.join(folder, _INDEX), os.path.join(folder, _SINGLE)
    if os.path.isfile(index):
        with open(index, encoding="utf-8") as file:
            return {k: os.path.join(folder, v) for k, v in json.load(file)["weight_map"].items()}
    if not os.path.isfile(single):
        raise FileNotFoundError(f"seal_ops.{call}: original must hold {_SINGLE}, got {folder!r} without it")
    from safetensors import safe_open

    with safe_open(single, "pt") as file:
        return {key: single for key in file.keys()}  # noqa: SIM118 (not a dict)
