"""Rotary frequencies of a loaded model: found, checked against its config, and replaced."""

from __future__ import annotations

import typing

import torch
from torch import Tensor, nn

from ...ops.rotary_tables import rope_frequencies


class Rotary(typing.NamedTuple):
    """One set of frequencies: the module that holds it, the buffer's name, and the base that its config names."""

    module: nn.Module
    buffer: str
    rope_type: str
    base: float | None

    @property
    def frequencies(self) -> Tensor:
        return self.module._buffers[self.buffer]

    @property
    def factor_name(self) -> str:
        """The attribute that multiplies cos and sin."""
        own = self.buffer.removesuffix("inv_freq") + "attention_scaling"
        return own if hasattr(self.module, own) else "attention_scaling"

    def is_default(self) -> bool:
        """Whether these are the frequencies base^(-2i/R)."""
        if self.rope_type != "default" or not self.base:
            return False
        expected, _ = rope_frequencies(2 * self.frequencies.numel(), base=self.base)
        return torch.allclose(self.frequencies.detach().float().cpu(), expected, rtol=_tolerance(self.frequencies))


def _tolerance(t: Tensor) -> float:
    return max(1e-4, 4 * torch.finfo(t.dtype).eps)


def rotaries(model: nn.Module) -> list[Rotary]:
    """All sets of rotary frequencies in a model, known by their buffers' names."""
    found = []
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name.endswith("inv_freq") and "original" not in name and buffer.dim() == 1 and buffer.numel():
                found.append(
                    Rotary(module, name, *_parameters(module, model, name.removesuffix("inv_freq").rstrip("_")))
                )
    return found


def _parameters(module: nn.Module, model: nn.Module, kind: str) -> tuple[str, float | None]:
    """Type and base of a rotary embedding (of the layer type ``kind``, where a module holds several)."""
    config = getattr(module, "config", None) or model.config.get_text_config()
    parameters = getattr(config, "rope_parameters", None) or {}
    parameters = parameters.get(kind, parameters) if kind else parameters
    base = parameters.get("rope_theta", getattr(config, "rope_theta", None))
    return str(parameters.get("rope_type", "default")), base


def matching(model: nn.Module, turn: tuple[Tensor, Tensor], dtype: torch.dtype) -> tuple[Rotary, float] | None:
    """The frequencies that gave cos and sin of position 1, and the factor on both; None where no buffer did."""
    cos, sin = turn
    factor, angle = torch.hypot(cos, sin).mean().item(), torch.atan2(sin, cos)
    rounding = 8 * max(torch.finfo(torch.float32).eps, torch.finfo(dtype).eps)  # models form angles in fp32
    for rotary in rotaries(model):
        own = rotary.frequencies.detach().double().cpu()
        if own.shape == angle.shape and torch.allclose(own, angle, rtol=0, atol=rounding):
            return rotary, getattr(rotary.module, rotary.factor_name, factor)
    return None


def replace(rotary: Rotary, rope_type: str, trained: int, parameters: dict) -> typing.Callable[[], None]:
    """Gives a rotary embedding the frequencies of ``rope_type``; returns what brings its own back, bit for bit."""
    before, name = rotary.frequencies, rotary.factor_name
    factor_before = getattr(rotary.module, name, None)
    new, factor = rope_frequencies(
        2 * before.numel(), rope_type, base=rotary.base, max_position_embeddings=trained, **parameters
    )
    rotary.module._buffers[rotary.buffer] = new.to(before.device, before.dtype)
    if factor_before is not None:
        setattr(rotary.module, name, factor)
    return Undo(rotary.module, rotary.buffer, before, name, factor_before)


class Undo(typing.NamedTuple):
    """Frequencies and factor as they were; copied with the model."""

    module: nn.Module
    buffer: str
    frequencies: Tensor
    factor_name: str
    factor: float | None

    def __call__(self) -> None:
        present = self.module._buffers[self.buffer]
        self.module._buffers[self.buffer] = self.frequencies.to(present.device)
        if self.factor is not None:
            setattr(self.module, self.factor_name, self.factor)
