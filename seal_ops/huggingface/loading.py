"""Loads a model: device and precision chosen by what is there, errors in one sentence."""

from __future__ import annotations

import contextlib
import os

import torch

from . import gguf_files
from .hub import reason
from .model_packages import resolve

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPE_CHOICES = ("default", "auto", *DTYPES)
QUANTIZATIONS = ("4bit", "8bit")


def load_tokenizer(
    name: str,
    call: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    token: str | bool | None = None,
):
    """The tokenizer of a folder, hub name or GGUF file; ``OSError``, one sentence, where there is none."""
    from transformers import AutoTokenizer

    name = resolve(name, call=call)
    return _load(AutoTokenizer, name, call, False, revision=revision, trust_remote_code=trust_remote_code, token=token)


def load_model(
    name: str,
    *,
    device: str = "auto",
    dtype: str = "default",
    device_map=None,
    quantization: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    token: str | bool | None = None,
    call: str = "seal_ops.load_model",
):
    """Model (in evaluation mode) and tokenizer.

    Args:
        name: a folder, a name on the hub, a GGUF file (of a split one, any part), which is read into full precision, or
            one of :data:`seal_ops.huggingface.model_packages.PACKAGES`.
        device: "auto" is the GPU where one is visible; else what ``torch.device`` takes.
        dtype: "default" is bfloat16 on a GPU and float32 on a CPU; "auto" the checkpoint's own, as in transformers
            (of a GGUF file: "default"); else one of ``DTYPES``.
        device_map: spreads a model over devices, as in transformers ("auto", "balanced", a mapping); in the place of
            ``device``.
        quantization: "4bit" (NF4, computing in ``dtype``) or "8bit", with bitsandbytes; scales stay attached to such a
            model, they cannot be merged.
        revision, trust_remote_code, attn_implementation, token: as in transformers.
        call: how errors name the caller.

    Raises:
        ValueError: a bad argument.
        OSError: the model is not there or cannot be read, or the hub cannot be reached.
        ImportError: a package that the model or an argument needs is missing.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    if dtype not in DTYPE_CHOICES:
        raise ValueError(f"{call}: dtype must be one of {', '.join(DTYPE_CHOICES)}, got {dtype!r}")
    name = resolve(name, call=call)
    if device_map is not None and device != "auto":
        raise ValueError(
            f"{call}: device must be left out where device_map is given, got {device!r} and {device_map!r}"
        )
    where = _device(device, call)
    default = DTYPES["bfloat16" if where.type == "cuda" else "float32"]
    chosen = default if dtype == "default" else DTYPES.get(dtype, "auto")
    options = {"dtype": chosen, "revision": revision, "trust_remote_code": trust_remote_code, "token": token}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if quantization is not None:
        options["quantization_config"] = _quantization(quantization, chosen, call)
        device_map = {"": where} if device_map is None else device_map
    if gguf_files.is_gguf(name) and dtype == "auto":
        options["dtype"] = default
    if device_map is not None:
        _require("accelerate", "device_map" if quantization is None else "quantization", call)
        options["device_map"] = device_map
    model = _load(AutoModelForCausalLM, name, call, **options)
    if device_map is None:
        model = model.to(where)
    tokenizer = load_tokenizer(name, call, revision=revision, trust_remote_code=trust_remote_code, token=token)
    return model.eval(), tokenizer


def _device(device: str, call: str) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(f"{call}: device must be auto, cpu, cuda or cuda:N, got {device!r}") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{call}: device must be available, got {found} where torch sees no GPU")
    return found


def _quantization(quantization: str, dtype, call: str):
    from transformers import BitsAndBytesConfig

    if quantization not in QUANTIZATIONS:
        raise ValueError(f"{call}: quantization must be one of {', '.join(QUANTIZATIONS)}, got {quantization!r}")
    _require("bitsandbytes", "quantization", call)
    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = torch.bfloat16 if dtype == "auto" else dtype
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)


def _require(package: str, argument: str, call: str) -> None:
    import importlib.util

    if importlib.util.find_spec(package) is None:
        raise ImportError(
            f"{call}: {argument} needs the package {package}, which is not installed (pip install {package})"
        )


def shipped(name: str) -> str:
    """The folder of the repository's model, wherever the command is run from; any other name as it is."""
    if os.path.isdir(name) or os.path.isabs(name):
        return name
    beside = os.path.join(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))), name)
    return beside if os.path.isdir(beside) else name


def _load(kind, name, call, weights=True, **options):
    gguf = gguf_files.is_gguf(name)
    if gguf:
        for package in ("gguf", "accelerate") if weights else ("gguf",):  # transformers wants both
            _require(package, "a .gguf model", call)
    there = os.path.isfile(name) if gguf else os.path.isdir(name)
    if os.sep in name and not there and (name.startswith((".", os.sep)) or name.count(os.sep) > (2 if gguf else 1)):
        raise FileNotFoundError(
            f"{call}: model must be a folder, a name on the hub or a .gguf file, got {name}, which does not exist"
        )
    try:
        with gguf_files.source(name, call, weights) if gguf else contextlib.nullcontext((name, {})) as (folder, more):
            return kind.from_pretrained(folder, **options, **more)
    except Exception as error:  # of transformers, safetensors, tokenizers, the hub's client, a quantisation library
        if str(error).startswith(f"{call}: "):
            raise
        kind_of_error = ImportError if isinstance(error, ImportError) else OSError
        raise kind_of_error(f"{call}: {name} could not be loaded: {reason(error)}") from error
