"""Attach, detach and disable the weak columns of one model.

QEFT (arXiv 2410.08661): of a model in 4 bits, the few input columns of each linear layer that matter most are held in
16 bits or more, and they alone are trained.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..adapters.attachment import SUBMODULE as SCALES
from ..adapters.files import COLUMNS as ATTRIBUTE
from ..adapters.files import DELTA
from ..adapters.freezing import freeze, thaw
from ..huggingface.projection import in_words
from ..huggingface.wrappers import unwrapped
from . import bases, calibration, columns, quantizers, selection, start
from .originals import Originals


@dataclasses.dataclass(frozen=True)
class ColumnsConfig:
    """What weak columns are, as saved.

    ``number``: layer -> how many columns.  ``share``, ``start`` and ``quantize``: the arguments of
    `attach_weak_columns`.  ``model_type`` is checked when loading, ``base_model_name_or_path`` is for people.
    """

    number: dict[str, int]
    share: str
    start: str
    quantize: str | None
    model_type: str | None = None
    base_model_name_or_path: str | None = None


class WeakColumns:
    """The weak columns of one model, made by `attach_weak_columns` or `load_weak_columns`.

    Found as ``model.seal_weak_columns``.  The parameters are the layers' own (``column_delta``, [out, k]); this object
    knows them by the layers' names.

    Attributes:
        owner: the transformers model that they are on, or were.
        config: a `ColumnsConfig`.
        layers: name -> the linear layer.
    """

    def __init__(self, owner: nn.Module, config: ColumnsConfig):
        self.owner, self.config = owner, config
        self.layers: dict[str, nn.Module] = {}

    def items(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(layer's name, trained difference [out, k])."""
        return ((name, module.column_delta) for name, module in self.layers.items())

    def parameters(self) -> Iterator[nn.Parameter]:
        """The trained differences."""
        return (delta for _, delta in self.items())

    def indices(self) -> dict[str, Tensor]:
        """Layer's name -> the columns, sorted int64 [k]."""
        return {name: module.column_index for name, module in self.layers.items()}

    def values(self) -> dict[str, Tensor]:
        """Layer's name -> a copy of its difference on the CPU."""
        return {name: delta.detach().to("cpu", copy=True) for name, delta in self.items()}

    def requires_grad_(self, requires_grad: bool = True) -> WeakColumns:
        """As in PyTorch; with False also said to be meant, so that nothing warns of training around frozen columns."""
        for module in self.layers.values():
            module.columns_may_be_frozen = not requires_grad
            module.column_delta.requires_grad_(requires_grad)
        return self

    @property
    def columns(self) -> int:
        """The most columns that a layer has."""
        return max(self.config.number.values())

    def count(self) -> int:
        """How many numbers are trained."""
        return sum(delta.numel() for delta in self.parameters())

    def save_pretrained(self, save_directory) -> None:
        """Writes ``weak_columns.json`` and ``weak_columns.safetensors``, which `load_weak_columns` reads."""
        from .saving import save

        save(self, save_directory)

    def restore(self, save_directory) -> None:
        """Takes the values that ``save_pretrained`` has written; they must be of the same columns of the same base."""
        from .saving import load_weak_columns

        load_weak_columns(self.owner, save_directory)

    def __repr__(self) -> str:
        return f"WeakColumns(layers={len(self.layers)}, columns={self.columns}, trained={self.count():,d})"


def attached(model: nn.Module, call: str) -> WeakColumns:
    """The weak columns on ``model``; ValueError in the name of ``call`` where there are none."""
    found = unwrapped(model, call).__dict__.get(ATTRIBUTE)
    if found is None:
        raise ValueError(
            f"seal_ops.{call}: model must have weak columns attached (seal_ops.attach_weak_columns), this "
            f"{type(model).__name__} has none"
        )
    return found


def find_targets(owner: nn.Module, target_modules: str | Sequence[str] | None, call: str) -> dict[str, nn.Module]:
    """Name -> linear layer; by default all but the head and what is in a module of PEFT's."""
    head = owner.get_output_embeddings() if callable(getattr(owner, "get_output_embeddings", None)) else None
    every = {n: m for n, m in owner.named_modules() if bases.is_base(m) and not n.startswith(f"{SCALES}.")}
    if target_modules is None:
        found = {n: m for n, m in every.items() if m is not head and ".lora_" not in n}
        if not found:
            raise ValueError(
                f"seal_ops.{call}: model must have linear layers (torch's or quantised ones; GPT-2's Conv1D is none), "
                f"got {type(owner).__name__} without"
            )
        return found
    wanted = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    found = {}
    for name in wanted:
        matching = {n: m for n, m in every.items() if n == name or n.endswith(f".{name}")}
        if not matching:
            raise ValueError(f"seal_ops.{call}: target_modules must name linear layers of the model, got {name!r}")
        found |= matching
    return {n: m for n, m in every.items() if n in found}


def attach_weak_columns(
    model: nn.Module,
    columns: int | Mapping[str, Sequence[int]] = 128,
    *,
    calibration: Iterable | None = None,
    tokenizer=None,
    share: str = "layer",
    start: str | None = None,
    quantize: str | None = None,
    original=None,
    target_modules: str | Sequence[str] | None = None,
    error_weighted: bool = False,
    dtype: torch.dtype = torch.float32,
    damping: float = 0.01,
    window: int = 2048,
    batch_tokens: int = 16_384,
) -> WeakColumns:
    """Freezes ``model`` and gives its linear layers weak columns, which are trained: ``y = base(x) + x[..., i] @ Δᵀ``.

    Args:
        model: a transformers model with loaded weights, in 4 bits (bitsandbytes, HQQ, GPTQ, any linear layer that
            passes a gradient to its input), or in 16 bits.  With scales attached (`seal_ops.attach`, before or after)
            both are trained.
        columns: how many a layer, at least 1 and fewer than its inputs; or the columns themselves, layer's name ->
            numbers.
        calibration: samples whose inputs show which columns matter: texts, token ids, samples of a task, or dicts
            with ``input_ids``, ``text``, ``messages``, or ``prompt`` and ``answer``; 128 of 2,048 tokens are usual.
            Not needed where the columns are given and ``start`` is not "least_squares".
        tokenizer: for samples that are text.
        share: "layer", every layer its own columns, or "global": all layers that read the residual stream have one
            set, the others their own.
        start: "residual", the columns begin as they were in 16 bits; "least_squares", they make up for as much of the
            quantisation error as they can on the calibration samples; "zero", they begin as quantised.  None:
            "residual" where the 16-bit weights are known, else "zero".
        quantize: "nf4" or "nf4-double" (bitsandbytes, groups of 64, scales in fp32 or in 8 bits), or "hqq" (groups of
            64): quantises the layers of a 16-bit model, one by one.  Their 16-bit weights are gone afterwards.
        original: where the model came in 4 bits, what it was made from: a 16-bit model, a folder with safetensors, or
            a mapping from tensor names to tensors.
        target_modules: names, or last parts of names, of linear layers; None for all but the head.
        error_weighted: multiply a column's sensitivity by its squared quantisation error (OWQ's criterion).
        dtype: of the trained values, float32 or bfloat16; the product is computed in the layer's.
        damping: of "least_squares", a share of the mean diagonal.
        window, batch_tokens: tokens of a calibration piece, and of a forward pass.

    Returns:
        The :class:`WeakColumns`, also ``model.seal_weak_columns``.

    Raises:
        ValueError: one sentence; a number of columns that no layer has, columns given twice or out of range, a base
            that passes no gradient to its input, weights on the meta device, columns already attached, a start that
            needs 16-bit weights that are not there.
        ImportError: the library that ``quantize`` needs is missing.

    Source:
        QEFT (arXiv 2410.08661), section 4; the criterion is OWQ's (arXiv 2306.02272).
    """
    call = "attach_weak_columns"
    owner = unwrapped(model, call)
    if ATTRIBUTE in owner.__dict__:
        raise ValueError(
            f"seal_ops.{call}: model already has weak columns attached; call seal_ops.detach_weak_columns(model) first"
        )
    _check_choices(share, start, dtype, call)
    quantizers.check_method(quantize, call)
    given = columns if isinstance(columns, Mapping) else None
    if given is not None and not given:
        raise ValueError(f"seal_ops.{call}: columns must name at least one layer, got {dict(given)!r}")
    targets = find_targets(owner, list(given) if given is not None else target_modules, call)
    for name, module in targets.items():
        bases.check(module, name, call)
        if quantize is not None and not bases.is_plain(module):
            raise ValueError(
                f"seal_ops.{call}: quantize needs layers in 16 or more bits, got {in_words(module)} for {name}"
            )
    bases.warn_of_gptq(targets.values(), call)
    sizes = {name: bases.sizes(module)[0] for name, module in targets.items()}
    if given is None:
        selection.check_number(columns, sizes, call)
    else:
        exact = {n: v for name, v in given.items() for n in targets if n == name or n.endswith(f".{name}")}
        given = {n: selection.checked_index(exact[n], n, sizes[n], call) for n in targets}
    originals = Originals(targets if quantize is not None else original, call)
    for name, module in targets.items() if originals.known else ():
        originals.check(name, module)
    start = start or ("residual" if originals.known else "zero")
    if start != "zero" and not originals.known:
        raise ValueError(
            f"seal_ops.{call}: start must be 'zero' where the 16-bit weights are unknown (give them as original, or "
            f"let quantize make the 4 bits), got {start!r}"
        )
    if error_weighted and not originals.known:
        raise ValueError(f"seal_ops.{call}: error_weighted needs the 16-bit weights (original or quantize), got none")
    pieces = _pieces(calibration, tokenizer, window, call, needed=given is None or start == "least_squares")
    index = _index(owner, targets, given, columns, pieces, share, quantize, originals, error_weighted, batch_tokens)
    cross = {}
    if start == "least_squares":
        cross = _read(owner, targets, pieces, index, batch_tokens).cross
    config = ColumnsConfig(
        {name: len(i) for name, i in index.items()}, share, start, quantize, *origin_of(owner)
    )  # fmt: skip
    found = WeakColumns(owner, config)
    freeze(owner, ATTRIBUTE)
    for name in list(targets):
        del targets[name]  # with quantize, nothing may keep a 16-bit layer alive that has been replaced
        delta = _started(owner, name, index[name], quantize, originals, start, cross.pop(name, None), damping)
        put_columns_on(found, name, index[name], delta.to(dtype))
    bring_up_to_date(owner)
    owner.__dict__[ATTRIBUTE] = found
    return found


def _check_choices(share, start_, dtype, call):
    if share not in selection.SHARES:
        raise ValueError(f"seal_ops.{call}: share must be one of {', '.join(selection.SHARES)}, got {share!r}")
    if start_ is not None and start_ not in start.STARTS:
        raise ValueError(f"seal_ops.{call}: start must be one of {', '.join(start.STARTS)} or None, got {start_!r}")
    if dtype not in (torch.float32, torch.bfloat16, torch.float64):
        raise ValueError(f"seal_ops.{call}: dtype must be torch.float32 or torch.bfloat16, got {dtype}")


def origin_of(owner) -> tuple[str | None, str | None]:
    config = getattr(owner, "config", None)
    return getattr(config, "model_type", None), getattr(config, "_name_or_path", None) or None


def _pieces(samples, tokenizer, window, call, needed):
    if samples is None:
        if needed:
            raise ValueError(f"seal_ops.{call}: calibration must hold samples (texts, token ids or a task's), got none")
        return []
    return calibration.to_token_ids(samples, tokenizer, call, window)


def _read(owner, targets, pieces, index, batch_tokens):
    return calibration.read(owner, targets, pieces, index=index, batch_tokens=batch_tokens)


@torch.no_grad()
def _index(owner, targets, given, number, pieces, share, quantize, originals, error_weighted, batch_tokens):
    if given is not None:
        return {name: i.to(bases.device_of(targets[name])) for name, i in given.items()}
    found = _read(owner, targets, pieces, None, batch_tokens)
    sensitivity = found.squares
    if error_weighted:
        for name, module in targets.items():
            base = module if quantize is None else quantizers.quantized(module, quantize, name, "attach_weak_columns")
            error = originals.weight(name).float() - bases.weight_of(base).float()
            sensitivity[name] = sensitivity[name] * error.square().sum(0)
    return selection.choose(sensitivity, number, share, found.stream)


@torch.no_grad()
def _started(owner, name, index, quantize, originals, how, cross, damping) -> Tensor:
    """The first difference of a layer, [out, k]; quantises the layer first where that is asked."""
    module = owner.get_submodule(name)
    weight = originals.weight(name, like=module) if originals.known else None
    if quantize is not None:
        new = quantizers.quantized(module, quantize, name, "attach_weak_columns")
        quantizers.replace(owner, name, new)
        originals.forget(name)
        module = new
    if how == "least_squares":
        return start.least_squares(weight, bases.weight_of(module), cross, index, damping)
    base = bases.columns_of(module, index)
    return torch.zeros_like(base) if how == "zero" else start.residual(weight, base, index)


def put_columns_on(found: WeakColumns, name: str, index: Tensor, delta: Tensor) -> None:
    module = found.owner.get_submodule(name)
    columns.put_on(module, index, delta)
    found.layers[name] = module


def bring_up_to_date(owner: nn.Module) -> None:
    """Scales that were attached before keep no layer alive that has been quantised since."""
    scales = getattr(owner, SCALES, None)
    if scales is not None and scales.attachment is not None:
        for layer in scales.attachment.patch.layers:
            if layer.projection_name is not None:
                layer.output_projection = owner.get_submodule(layer.projection_name)


def detach_weak_columns(model: nn.Module) -> nn.Module:
    """Takes the weak columns off; the model computes bit for bit what its base does, ``requires_grad`` flags included.

    A model in 4 bits is what it was before.  A 16-bit model that `attach_weak_columns` has quantised stays quantised:
    its 16-bit weights are gone.  The :class:`WeakColumns` keep their values and can still be saved.  Where scales are
    still attached, the base stays frozen until they are taken off too.

    Returns:
        The model.

    Raises:
        ValueError: no weak columns on the model.
    """
    found = attached(model, "detach_weak_columns")
    owner = found.owner
    del owner.__dict__[ATTRIBUTE]
    kept = {}
    for name, module in found.layers.items():
        kept[name] = _Kept(module)
        columns.take_off(module)
    found.layers = kept
    thaw(owner, ATTRIBUTE)
    return model


class _Kept:
    """The columns of a layer that they have been taken off."""

    def __init__(self, module: nn.Module):
        self.column_delta, self.column_index = module.column_delta, module.column_index
        self.columns_may_be_frozen, self.base = module.columns_may_be_frozen, module


@contextlib.contextmanager
def weak_columns_disabled(model: nn.Module):
    """Inside the block ``model`` computes what its base does.

    Yields:
        The model.

    Raises:
        ValueError: no weak columns on the model.
    """
    found = attached(model, "weak_columns_disabled")
    before = {name: module.columns_on for name, module in found.layers.items()}
    try:
        for module in found.layers.values():
            module.columns_on = False
        yield model
    finally:
        for name, module in found.layers.items():
            if DELTA in getattr(module, "_parameters", ()):  # not where the block has detached them
                module.columns_on = before[name]
