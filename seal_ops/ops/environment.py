"""What `seal env` prints: versions, what was built, which backend each op uses and why not another."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import shutil
import subprocess
import sys

import torch

from ..utils import elf
from ..version import __version__
from .dispatch import NAMES, OPS, backends, extension

_PACKAGES = (
    "torch", "triton", "transformers", "tokenizers", "safetensors", "peft", "accelerate", "numpy", "lm_eval",
    "bitsandbytes", "hqq",
)  # fmt: skip


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _nvcc() -> str:
    if shutil.which("nvcc") is None:
        return "not on PATH"
    printed = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release ([\d.]+)", printed)
    return release[1] if release else "of unknown version"


def facts() -> dict:
    """Everything `seal env` prints, as strings by name (also kept beside results: so no path of the machine)."""
    found = {
        "seal_ops": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
    }
    found.update({name: _version(name) for name in _PACKAGES})
    found["torch cuda"] = torch.version.cuda or "none (a CPU build of torch)"
    found["nvcc"] = _nvcc()
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        found["gpu"] = (
            f"{torch.cuda.get_device_name()} (compute capability {major}.{minor}), {torch.cuda.device_count()} visible"
        )
    else:
        found["gpu"] = "none visible"
    built = extension()
    found["extension"] = built if isinstance(built, str) else json.dumps(built.build_facts())
    if not isinstance(built, str) and sys.platform == "linux":
        library = elf.read(built.__file__)
        found["C++ runtime"] = library.fault or str(library)
    return found


def report() -> str:
    """The text of `seal env`."""
    rows = facts()
    lines = [f"{name:14s} {value}" for name, value in rows.items()]
    chosen = backends()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lines.append(f"\nbackends on {device}, bfloat16, head_dim 128:")
    for op in OPS:
        lines.append(f"  {op:20s} {chosen[op]['chosen']}")
    same = all(chosen[op] == chosen[OPS[0]] for op in OPS)
    for op in OPS[:1] if same else OPS:
        lines += [
            f"  not {name} ({'any op' if same else op}): {chosen[op][name]}" for name in NAMES if name in chosen[op]
        ]
    return "\n".join(lines)
