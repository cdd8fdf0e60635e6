"""(IA)^3 adapter files of PEFT, in and out.

(IA)^3 (arXiv 2205.05638) with ``target_modules=["o_proj"], feedforward_modules=["o_proj"]`` (or whatever a model calls
its output projection) multiplies what every ``o_proj`` reads by a learned vector, which is SEAL-C exactly.  PEFT itself
is not needed here: the files are safetensors and json, with the tensors named ``base_model.model.<module>.ia3_l`` of
shape [1, in_features].
"""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..huggingface.layers import AttentionLayer
from ..huggingface.wrappers import unwrapped
from ..utils.files import write_adapter
from .attachment import attach_to, attached, describe, layers_of, refuse_second
from .files import CONFIG_FILE, WEIGHTS_FILE, read_json, read_tensors, shown
from .hub import resolve
from .merge_record import check_not_merged
from .scales import Scales

_PREFIX, _SUFFIX = "base_model.model.", ".ia3_l"


def _key(attn: AttentionLayer) -> str:
    return f"{_PREFIX}{attn.projection_name}{_SUFFIX}"


def _check_direct(call: str, attention_layers: list[AttentionLayer]) -> None:
    """(IA)^3 scales what the output projection reads; SEAL what attention gives."""
    for attn in attention_layers:
        if attn.output_projection is None or "channel" not in attn.commutes:
            raise ValueError(
                f"seal_ops.ia3.{call}: {attn.projection_name or attn.name} must read the attention output "
                f"directly, got a module with another step in between ({type(attn.module).__name__})"
            )


def import_ia3(model: nn.Module, save_directory: str | os.PathLike, backend: str | None = None) -> Scales:
    """Attaches the (IA)^3 adapter saved by PEFT in ``save_directory`` as channel scales; layers it lacks have none.

    Raises:
        FileNotFoundError: a missing file.
        ValueError: an adapter that scales anything but the input of the ``o_proj`` of ``model``'s self-attention, or
            whose vectors have another length, or one that was merged into this model already.
    """
    refuse_second(model, "ia3.import_ia3")
    folder = resolve(save_directory, call="ia3.import_ia3")
    config = read_json(folder, call="ia3.import_ia3")
    if config.get("peft_type") != "IA3":
        raise ValueError(
            f"seal_ops.ia3.import_ia3: {os.path.join(folder, CONFIG_FILE)} must have peft_type 'IA3', got "
            f"{config.get('peft_type')!r}"
        )
    tensors = read_tensors(folder, call="ia3.import_ia3")
    owner = unwrapped(model, "ia3.import_ia3")
    attention_layers = layers_of(owner)
    by_key = {_key(attn): attn for attn in attention_layers}
    found: dict[int, Tensor] = {}
    for name, tensor in tensors.items():
        if name not in by_key:
            raise ValueError(
                f"seal_ops.ia3.import_ia3: {folder!r} must scale only the output projection "
                f"({_names(attention_layers)}) of self-attention in {type(model).__name__}, got {shown(name)}"
            )
        attn = by_key[name]
        if tuple(tensor.shape) != (1, attn.num_heads * attn.head_dim) or not tensor.is_floating_point():
            raise ValueError(
                f"seal_ops.ia3.import_ia3: {name} must be a floating tensor of shape "
                f"[1, {attn.num_heads * attn.head_dim}] (what the projection reads: feedforward_modules "
                f"must name it), got {tensor.dtype} of shape {list(tensor.shape)}"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"seal_ops.ia3.import_ia3: {name} must be finite, got NaN or infinity")
        found[attn.index] = tensor.reshape(attn.num_heads, attn.head_dim).float()
    if not found:
        raise ValueError(f"seal_ops.ia3.import_ia3: {folder!r} must hold at least one vector, got none")
    _check_direct("import_ia3", [attn for attn in attention_layers if attn.index in found])
    described = describe(owner, attention_layers, "channel", sorted(found), "ia3.import_ia3")
    check_not_merged(owner.config, described, found, repr(folder), "ia3.import_ia3")
    scales = attach_to(model, attention_layers, "channel", sorted(found), backend)
    scales.set_values(scales.config, found)
    return scales


def _names(attention_layers: list[AttentionLayer]) -> str:
    """The last parts of the names of the output projections."""
    return ", ".join(sorted({(attn.projection_name or "none").rpartition(".")[2] for attn in attention_layers}))


def export_ia3(model: nn.Module, save_directory: str | os.PathLike) -> None:
    """Writes the scales attached to ``model`` as an (IA)^3 adapter that ``peft.PeftModel.from_pretrained`` reads.

    Head scales are repeated over the channels of their head; layers without a scale get ones.  Both files are replaced
    in one step each.

    Raises:
        ValueError: no scales on the model, or a step between attention and ``o_proj``.
    """
    scales, attachment = attached(model, "ia3.export_ia3")
    attention_layers = attachment.patch.layers
    _check_direct("export_ia3", attention_layers)
    learned, tensors = scales.values(), {}
    scales.check_finite("ia3.export_ia3", learned)
    for attn in attention_layers:
        scale = learned.get(attn.index, torch.ones(attn.num_heads, device="cpu"))
        scale = scale.reshape(attn.num_heads, -1).expand(-1, attn.head_dim)
        tensors[_key(attn)] = scale.reshape(1, -1).contiguous()
    # PEFT matches names by their ending; where that would also hit other modules, each is named in full.
    modules = [attn.projection_name for attn in attention_layers]
    endings = sorted({name.rpartition(".")[2] for name in modules})
    others = [n for n, _ in attachment.owner.named_modules() if n.rpartition(".")[2] in endings and n not in modules]
    targets = sorted(modules) if others else endings
    config = {
        "peft_type": "IA3",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "fan_in_fan_out": any(isinstance(attn.output_projection, Conv1D) for attn in attention_layers),
        "base_model_name_or_path": scales.config.base_model_name_or_path,
        "revision": None,
        "target_modules": targets,
        "feedforward_modules": targets,
        "modules_to_save": None,
        "init_ia3_weights": True,
    }
    folder = os.fspath(save_directory)
    write_adapter(folder, (WEIGHTS_FILE, tensors), (CONFIG_FILE, config))
