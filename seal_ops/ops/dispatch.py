"""Which backend runs an op, and why not another.

`cuda` (sm_90a kernels of the extension), `triton` (any GPU that Triton supports; its interpreter on the CPU), `cpu`
(ATen's CPU attention), `reference` (the oracle). One predicate, `why_not`, serves the automatic choice, a forced
choice's refusal and what `backends()` and `seal env` print."""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Sequence

import torch

from ..utils.arguments import integer
from ..utils.compiling import constant

NAMES = ("cuda", "triton", "cpu", "reference")
MERGE_OPS = ("merge_attention", "merge_attention_backward")  # on lists of tensors; merging.py has all of them
OPS = ("attention", "attention_backward", "rope", "rope_attention", *MERGE_OPS)
TERMS = ("sink", "gate", "softcap")  # of attention: what some backends' kernels do not have
TAKE_TERMS = ("triton", "reference")


@functools.cache
def extension():
    """The compiled module `_C`, or the one sentence that says why it is not there."""
    spec = importlib.util.find_spec("seal_ops._C")
    # An editable installation of another copy offers its own: the sources here may not be what it was built from.
    package = os.path.realpath(os.path.join(os.path.dirname(__file__), os.pardir))
    if spec is None or os.path.realpath(os.path.dirname(spec.origin)) != package:
        return (
            "the C++ extension was not built (no C++ compiler at installation, SEAL_BUILD_EXT=0, or a source folder "
            "imported in place of the installed package)"
        )
    try:
        from .. import _C
    except ImportError as error:
        return (
            f"the C++ extension does not load with torch {torch.__version__} ({str(error).splitlines()[0]}); "
            "install seal_ops again with the torch that is to run it"
        )
    return _C


def has_cuda_kernels() -> bool:
    return not isinstance(extension(), str) and extension().build_facts()["cuda"] is not None


def why_not(
    backend: str, op: str, device: torch.device, dtype: torch.dtype, head_dim: int, terms: Sequence[str] = ()
) -> str | None:
    """One sentence why `backend` cannot run `op` on such tensors, with these TERMS in the call; None where it can."""
    if backend not in NAMES:
        return f"backend must be one of auto, {', '.join(NAMES)}, got {backend!r}"
    reason = _why_not(backend, op, device, dtype, head_dim)
    if reason is None and terms and backend not in TAKE_TERMS:
        return f"backend {backend} takes no {terms[0]}" + (
            "" if terms[0] == "softcap" else " (seal_ops.attention composes it)"
        )
    return reason


def _why_not(backend: str, op: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if backend == "reference":
        return None
    if backend == "cpu":
        return None if device.type == "cpu" else f"backend cpu runs on CPU tensors, got {device}"
    if backend == "cuda":
        module = extension()
        if isinstance(module, str):
            return f"backend cuda: {module}"
        if module.build_facts()["cuda"] is None:
            reason = "no nvcc or a CPU build of torch, or SEAL_BUILD_CUDA=0"
            return f"backend cuda: the extension was built without CUDA ({reason})"
        if device.type != "cuda":
            return f"backend cuda runs on CUDA tensors, got {device}"
        if op in MERGE_OPS:
            return f"backend cuda has no kernel for {op}"
        major, minor = torch.cuda.get_device_capability(device)
        return module.why_not_cuda(op, dtype, head_dim, 10 * major + minor) or None
    from .backends import triton as kernels

    return kernels.why_not(op, dtype, head_dim, device)


def candidates(device: torch.device) -> tuple[str, ...]:
    """The backends an automatic choice tries on a device, best first."""
    return ("cpu", "reference") if device.type == "cpu" else ("cuda", "triton", "reference")


def _best(op: str, device: torch.device, dtype: torch.dtype, head_dim: int, names, terms=()) -> str:
    return next(name for name in names if why_not(name, op, device, dtype, head_dim, terms) is None)


@functools.cache
def _warn_of_the_oracle(op: str, device: torch.device, dtype: torch.dtype, head_dim: int, terms: tuple) -> None:
    """Once for each kind of call: the oracle is right, but slow, and holds whole score matrices in fp64."""
    declined = "backend cuda does not take this mask or softmax_scale"  # the one reason that `why_not` cannot know
    asked = (op, device, dtype, head_dim, terms)
    reasons = "; ".join(why_not(name, *asked) or declined for name in candidates(device)[:-1])
    warnings.warn(
        f"seal::{op}: the slow reference runs this call, in fp64 and with whole score matrices ({reasons}); "
        "backend='reference' says that this is meant",
        stacklevel=2,
    )


def choose(
    backend: str, op: str, device: torch.device, dtype: torch.dtype, head_dim: int, terms: tuple[str, ...] = ()
) -> str:
    """The backend that runs what csrc/ops/dispatch.cpp left to Python: the CUDA kernels decline some calls (a mask, a
    softmax scale of 0, TERMS) on tensors that they otherwise take. Raises `why_not`'s sentence where a forced one
    cannot; warns where only the oracle can."""
    if backend != "auto":
        reason = why_not(backend, op, device, dtype, head_dim, terms)
        if reason is not None:
            raise ValueError(f"seal::{op}: {reason}")
        return backend
    best = _best(op, device, dtype, head_dim, [name for name in candidates(device) if name != "cuda"], terms)
    if best == "reference":
        _warn_of_the_oracle(op, device, dtype, head_dim, terms)
    return best


@constant
def chosen(
    backend: str, op: str, device: torch.device, dtype: torch.dtype, head_dim: int, terms: tuple[str, ...] = ()
) -> str:
    """The backend that a call of this kind runs on: the forced one, or the first that can. (The CUDA kernels may leave
    it to the next one for its mask or softmax scale; csrc/ops/dispatch.cpp.)"""
    return _best(op, device, dtype, head_dim, candidates(device), terms) if backend == "auto" else backend


def _device(device) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = device if isinstance(device, torch.device) else torch.device(str(device))
    except RuntimeError:
        raise ValueError(f"seal_ops.backends: device must be cpu, cuda or cuda:N, got {device!r}") from None
    count = torch.cuda.device_count()
    if found.type == "cuda" and (found.index or 0) >= count:
        raise ValueError(f"seal_ops.backends: device must be available, got {found} where torch sees {count} GPUs")
    return found


def backends(
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    head_dim: int = 128,
    terms: Sequence[str] = (),
) -> dict[str, dict[str, str]]:
    """For every op: which backend runs it on `device` (default: the GPU if there is one), and why each other does not.

    `terms`: those of "sink", "gate" and "softcap" that are in the calls of attention. A sink or gate says which kernels
    take it; `seal_ops.attention` composes it around the others.

    Returns:
        `{op: {"chosen": name, other name: one sentence, ...}}`.

    Raises:
        ValueError: no device, dtype or head_dim, or a GPU where torch sees none.
    """
    device = _device(device)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"seal_ops.backends: dtype must be a torch.dtype, got {dtype!r}")
    head_dim = integer("seal_ops.backends", "head_dim", head_dim, 1)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    found = {}
    for op in OPS:
        asked = (op, device, dtype, head_dim, tuple(terms) if "attention" in op and op not in MERGE_OPS else ())
        first = chosen("auto", *asked)
        found[op] = {"chosen": first}
        for name in NAMES:
            if name != first:
                found[op][name] = why_not(name, *asked) or f"can run; {first} comes first here"
    return found
