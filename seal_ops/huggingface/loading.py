"""Loads a model for a command: device and precision chosen by what is there, errors in one sentence."""

import os

import torch

from .model_packages import resolve

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_tokenizer(name: str, call: str):
    """The tokenizer of a folder or hub name; ``OSError``, one sentence, where there is none."""
    from transformers import AutoTokenizer

    return _load(AutoTokenizer, resolve(name, call=call), call)


def load_model(name: str, *, device: str = "auto", dtype: str = "auto", call: str = "load_model"):
    """Model (in evaluation mode) and tokenizer.

    Args:
        name: a folder, a name on the hub, or one of :data:`seal_ops.huggingface.model_packages.PACKAGES`.
        device: "auto" is the GPU where one is visible; else what ``torch.device`` takes.
        dtype: "auto" is bfloat16 on a GPU and float32 on a CPU; else one of ``DTYPES``.
        call: how errors name the caller.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
    except RuntimeError:
        raise ValueError(f"{call}: device must be auto, cpu, cuda or cuda:N, got {device!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{call}: device must be available, got {device} where torch sees no GPU")
    chosen = DTYPES["bfloat16" if device.type == "cuda" else "float32"] if dtype == "auto" else DTYPES[dtype]
    name = resolve(name, call=call)
    model = _load(AutoModelForCausalLM, name, call, dtype=chosen).to(device).eval()
    return model, load_tokenizer(name, call)


def shipped(name: str) -> str:
    """The folder of the repository's model, wherever the command is run from; any other name as it is."""
    if os.path.isdir(name) or os.path.isabs(name):
        return name
    beside = os.path.join(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))), name)
    return beside if os.path.isdir(beside) else name


def _load(kind, name, call, **options):
    if os.sep in name and not os.path.isdir(name) and (name.startswith((".", os.sep)) or name.count(os.sep) > 1):
        raise FileNotFoundError(f"{call}: model must be a folder or a name on the hub, got {name}, which does not exist")
    from safetensors import SafetensorError

    try:
        return kind.from_pretrained(name, **options)
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise OSError(f"{call}: {name} could not be loaded: {reason}") from error
