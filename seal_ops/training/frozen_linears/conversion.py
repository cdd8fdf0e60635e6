"""The frozen linear layers of a model's decoder layers, in fp8 while a training run lasts.

The 16-bit weights are never written.  On a GPU they wait in the host's memory, and two layouts in fp8 take their place,
as large but for the scales; elsewhere they stay where they are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Iterator

import torch
from torch import nn

from ...huggingface.projection import holds_numbers
from ...huggingface.wrappers import unwrapped
from ..memory_plan import memory
from ..memory_plan.decoder import UnknownStructure, find_decoder, offloaded
from .fp8_product import STEP, Fp8Weight, fp8_linear

FORMATS = ("fp8",)
_CAPABILITY = (8, 9)  # of the first GPUs whose tensor cores multiply e4m3


@dataclasses.dataclass
class FrozenLinears:
    """What was converted.

    Attributes:
        format: "fp8", or None where nothing was.
        layers: linear layers.
        weights: numbers in their weights.
        device_bytes: that the weights take on the device while they are in fp8.
        host_bytes: that their 16-bit originals take in the host's memory.
    """

    format: str | None = None
    layers: int = 0
    weights: int = 0
    device_bytes: int = 0
    host_bytes: int = 0

    def facts(self) -> dict:
        """As `training.json` holds them; empty where nothing was converted."""
        return dataclasses.asdict(self) if self.format else {}


@contextlib.contextmanager
def converted_linears(model: nn.Module, format: str | None, call: str) -> Iterator[FrozenLinears]:
    """Inside, the frozen ``nn.Linear`` layers of the decoder layers multiply in ``format``; after it as before.

    The weights come back bit for bit, as the same parameters, whatever ends the block.  Inside it the layers have
    weights on the meta device, so that nothing reads a weight that is not there.

    Args:
        model: a transformers model, also inside PEFT's wrappers.
        format: "fp8", or None for no change.
        call: the public function, for errors.

    Yields:
        What was converted.

    Raises:
        ValueError: an unknown format, or a model or device for which this cannot be done; nothing is changed then.
        RuntimeError: weights that do not fit onto the device again at the end; they are whole, in the host's memory.
    """
    if format is None:
        yield FrozenLinears()
        return
    if format not in FORMATS:
        raise ValueError(f"{call}: frozen_linears must be None or 'fp8', got {format!r}")
    linears = convertible(model, call)
    found = FrozenLinears(format, layers=len(linears))
    converted: dict[int, _Converted] = {}  # by parameter: two layers may share one
    try:
        for linear in linears:
            one = converted.get(id(linear.weight)) or _Converted(linear.weight)
            converted[id(linear.weight)] = one
            one.enter(linear)
        for one in converted.values():
            found.weights += one.parameter.numel()
            found.device_bytes += one.fp8.nbytes
            found.host_bytes += one.parameter.nbytes if one.device.type == "cuda" else 0
        yield found
    finally:
        _restore(list(converted.values()), call)


class _Converted:
    """One weight, while its layers multiply in fp8."""

    def __init__(self, parameter: nn.Parameter):
        self.parameter, self.device = parameter, parameter.device
        self.fp8: Fp8Weight | None = None
        self._linears: list[nn.Linear] = []

    def enter(self, linear: nn.Linear) -> None:
        """Puts the fp8 product in the place of ``linear``'s own."""
        if self.fp8 is None:
            self.fp8 = Fp8Weight.of(self.parameter.detach())
        self._linears.append(linear)
        linear.__dict__["forward"] = _forward(linear, self.fp8)
        linear._parameters["weight"] = nn.Parameter(
            torch.empty_like(self.parameter, device="meta"), requires_grad=False
        )
        if self.device.type == "cuda" and self.parameter.is_cuda:
            self.parameter.data = self.parameter.data.cpu()

    def leave(self) -> None:
        """Drops what is in fp8 and gives the layers their own weight and product again; it may lie on the host."""
        for linear in self._linears:
            linear.__dict__.pop("forward", None)
            linear._parameters["weight"] = self.parameter
        self.fp8 = None

    def bring_back(self) -> None:
        """Puts the weight onto its device again."""
        if self.parameter.device != self.device:
            self.parameter.data = self.parameter.data.to(self.device)


def _forward(linear: nn.Linear, weight: Fp8Weight):
    return lambda x: fp8_linear(x, weight, linear.bias)


def _restore(converted: list[_Converted], call: str) -> None:
    # All that is in fp8 goes first: it takes as much room as the weights.
    for one in converted:
        one.leave()
    try:
        for one in converted:
            one.bring_back()
    except torch.OutOfMemoryError as error:
        gc.collect()
        memory.give_back(converted[0].device)
        try:
            for one in converted:
                one.bring_back()
        except torch.OutOfMemoryError:
            count = sum(one.parameter.device != one.device for one in converted)
            raise RuntimeError(
                f"{call}: frozen_linears must find room on {converted[0].device} for the 16-bit weights at its end, "
                f"got too little for {count} of {len(converted)}; they are whole in the host's memory: free memory and "
                f"move the model to the device"
            ) from error


# ---------------------------------------------------------------------------------------------------------- refusals


def convertible(model: nn.Module, call: str, frozen: bool = True) -> list[nn.Linear]:
    """The linear layers that would be converted, in the order of the layers.

    ``frozen``: whether their weights must be frozen already.  Raises ValueError, one sentence, where they cannot be.
    """

    def refuse(expected: str, got: str):
        raise ValueError(f"{call}: frozen_linears='fp8' needs {expected}, got {got}")

    try:
        decoder = find_decoder(model)
    except UnknownStructure as reason:
        refuse("a model whose decoder layers are known", f"one of which they are not, because {reason}")
    owner = unwrapped(model, call.rpartition(".")[2])
    if getattr(owner.config, "quantization_config", None) is not None:
        refuse("16-bit weights", "a quantised model")
    if getattr(owner, "seal_weak_columns", None) is not None:
        refuse("16-bit weights", "a model with weak columns")
    parameters = list(model.parameters())
    if any(hasattr(p, "full_tensor") for p in parameters):
        refuse("whole weights", "a model whose weights are sharded over processes")
    if any(p.is_meta for p in parameters) or any(offloaded(layer) for layer in decoder.layers):
        refuse("weights in place", "a model that is offloaded")
    devices = {p.device for p in parameters}
    if len(devices) > 1:
        refuse("a model on one device", f"one on {len(devices)}")
    device = devices.pop()
    reason = no_fp8(device)
    if reason is not None:
        refuse("a GPU of compute capability 8.9 or later, or a CPU", reason)
    found = []
    for number, layer in enumerate(decoder.layers):
        adapters = set()
        for name, module in layer.named_modules():
            where = f"{type(module).__name__} {name} in decoder layer {number}"
            if hasattr(module, "base_layer"):
                if not _calls_its_base(module):
                    refuse(
                        "adapters that leave the weight below to its own layer (PEFT's LoRA without DoRA, (IA)³)", where
                    )
                adapters |= {id(m) for child, m in _submodules(module) if not child.startswith("base_layer")}
            if not isinstance(module, nn.Linear) or id(module) in adapters:
                continue
            if type(module) is not nn.Linear:
                refuse("plain nn.Linear layers", where)
            if frozen and module.weight.requires_grad:
                refuse("frozen weights", f"a trained one of {where}")
            if not holds_numbers(module.weight):
                refuse("16-bit weights", f"{type(module.weight.data).__name__} in {where}")
            if module.weight.dtype != torch.bfloat16:
                refuse("a model in torch.bfloat16", f"{module.weight.dtype} in {where}")
            if module.in_features % STEP or module.out_features % STEP:
                refuse(
                    f"sizes that are multiples of {STEP}", f"{module.out_features} x {module.in_features} of {where}"
                )
            if "forward" in module.__dict__:
                refuse("layers that run their own forward", f"another library's on {where}")
            found.append(module)
    if not found:
        refuse("decoder layers with nn.Linear layers", f"a {type(owner).__name__} with none")
    reason = _no_room(sum({id(m.weight): m.weight.nbytes for m in found}.values())) if device.type == "cuda" else None
    if reason is not None:
        refuse(*reason)
    return found


def _no_room(size: int) -> tuple[str, str] | None:
    """What the host's memory must hold, and what it can, where it cannot: ``size`` bytes of each process on it."""
    processes, share = memory.processes_here(), memory.host_share()
    if size <= share.bytes:
        return None
    needed = f"{processes * size / 2**30:.2f} GiB of the host's memory for the 16-bit weights"
    needed += f" of {processes} processes" if processes > 1 else ""
    return needed, f"{share.bytes / 2**30:.2f} GiB ({share.source}; {memory.HOST_MEMORY}=GIB says otherwise)"


def no_fp8(device: torch.device) -> str | None:
    """Why torch's scaled product does not run on a device; None where it does."""
    if device.type == "cpu":
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return f"a device of another kind ({device})"
    capability = torch.cuda.get_device_capability(device)
    if capability >= _CAPABILITY:
        return None
    return f"{torch.cuda.get_device_name(device)} of {capability[0]}.{capability[1]}"


def _calls_its_base(module: nn.Module) -> bool:
    """Whether an adapter round a layer runs that layer as it is: what others compute from its weight they could not."""
    kinds = {f"{base.__module__}.{base.__name__}" for base in type(module).__mro__}
    if "peft.tuners.ia3.layer.Linear" in kinds:
        return True
    variants = getattr(module, "lora_variant", None) or getattr(module, "lora_magnitude_vector", None)
    return "peft.tuners.lora.layer.Linear" in kinds and not variants


def _submodules(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, m) for name, m in module.named_modules() if name)
