"""torch.ops.seal.*: schemas, bodies and fake kernels. docs/ops.md is the contract.

With the C++ extension schemas, checks and autograd come from there, and what its kernels cannot run arrives here
through `seal_portable` (the same schemas). Without it the same schema file is parsed here, and checks.py and
autograd.py serve."""

from __future__ import annotations

import importlib
import pathlib

import torch
from torch import Tensor

from . import autograd, checks
from .dispatch import MERGE_OPS, OPS, TAKE_TERMS, TERMS, choose, extension
from .flops import register_flops


def schemas() -> list[str]:
    """The schemas of csrc/schemas.inc (in an installed package: a copy beside this file), one an op."""
    here = pathlib.Path(__file__).parent
    file = next(p for p in (here / "schemas.inc", here.parents[1] / "csrc" / "schemas.inc") if p.exists())
    return [line for line in file.read_text().splitlines() if "->" in line]


def check_extension() -> None:
    """Raises ImportError where the extension was built from other sources than these, whose calls it would misread."""
    for schema in schemas():
        ours = torch._C.parse_schema(f"seal::{schema}")
        op = getattr(torch.ops.seal, ours.name.removeprefix("seal::"), None)
        if op is None or str(op.default._schema) != str(ours):
            raise ImportError(
                f"seal_ops: the C++ extension must be built from the sources beside it, got one with another "
                f"{ours.name} ({extension().__file__}); install seal_ops again (in a checkout: python setup.py "
                f"build_ext --inplace)"
            )


_extended = not isinstance(extension(), str)
if _extended:
    check_extension()
library = torch.library.Library("seal", "FRAGMENT")
_bodies = torch.library.Library("seal_portable", "FRAGMENT") if _extended else library
if not _extended:
    for _schema in schemas():
        library.define(_schema)
_seal = torch.ops.seal
# Dispatch keys of tensors that no backend reads. Under torch.inference_mode autograd does not check the layout, and
# quantized tensors look strided to it.
_OTHER_LAYOUTS = (
    *("SparseCPU", "SparseCUDA", "SparseCsrCPU", "SparseCsrCUDA", "QuantizedCPU", "QuantizedCUDA"),
    *("NestedTensorCPU", "NestedTensorCUDA", "MkldnnCPU"),
)


def refuse_other_layouts(op: str) -> None:
    """Gives an op a kernel for tensors of other layouts that says so in one sentence."""

    def refuse(*args, **kwargs):
        checks.all_dense(op, autograd.bind(op, args, kwargs))

    for key in _OTHER_LAYOUTS:
        library.impl(op, refuse, key)


def _run(op: str, args, kwargs):
    """Body of an op without kernels of the extension's own. With the extension its checks ran before (dispatch.cpp)."""
    a = autograd.bind(op, args, kwargs)
    if not _extended:
        checks.check(op, a)
    q = a["q"]
    for name in ("q", "k", "v", "grad_out", "cos", "sin"):
        if a.get(name) is not None and a[name].stride(-1) != 1:
            a[name] = a[name].contiguous()
    if "deterministic" in a:
        a["deterministic"] = a["deterministic"] or torch.are_deterministic_algorithms_enabled()
    if "needs" in a:  # a factor that is not there needs no gradient
        a["needs"] = [
            want and a.get(name, q) is not None for want, name in zip(_seven(a["needs"]), autograd.DIFFERENTIABLE)
        ]
    terms = tuple(name for name in TERMS if a.get(name) is not None)
    backend = choose(a.pop("backend"), op, q.device, q.dtype, q.shape[-1], terms)
    if backend not in TAKE_TERMS:
        a = {name: value for name, value in a.items() if name not in (*TERMS, "gate_function")}
    return getattr(importlib.import_module(f".backends.{backend}", __package__), op)(**a)


def _seven(needs) -> list[bool]:
    """`needs` for every input that has a gradient; five flags leave sink and gate out."""
    return [*needs, *[False] * (len(autograd.DIFFERENTIABLE) - len(needs))]


def _like(t: Tensor) -> Tensor:
    return torch.empty(t.shape, dtype=t.dtype, device=t.device)


def _fake_lse(q: Tensor) -> Tensor:
    return q.new_empty((*q.shape[:-3], q.shape[-2], q.shape[-3]), dtype=checks.statistics(q))


def _fake(op: str, args, kwargs):
    a = autograd.bind(op, args, kwargs)
    checks.check(op, a)
    q = a["q"]
    if op == "attention":
        return _like(q), _fake_lse(q)
    if op == "rope":
        return _like(q), _like(a["k"])
    if op == "rope_attention":
        return _like(q), _fake_lse(q), _like(q), _like(a["k"])
    return tuple(
        _like(a[name])
        if want and a[name] is not None
        else q.new_empty(0, dtype=q.dtype if name in ("q", "k", "v", "gate") else checks.statistics(q))
        for want, name in zip(_seven(a["needs"]), autograd.DIFFERENTIABLE)
    )


def _register(op: str) -> None:
    def run(*args, **kwargs):
        return _run(op, args, kwargs)

    def fake(*args, **kwargs):
        return _fake(op, args, kwargs)

    for key in ("CPU", "CUDA"):
        _bodies.impl(op, run, key)
    refuse_other_layouts(op)
    torch.library.register_fake(f"seal::{op}", fake, lib=library)
    if not _extended:
        library.impl(op, autograd.kernel(op), "Autograd", with_keyset=True)


for _op in OPS:
    if _op not in MERGE_OPS:
        _register(_op)

register_flops()
