"""`extend` and `unextend`: a loaded model reads farther than it was trained to, and is itself again afterwards."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable

from torch import nn

from ..context_window import EXTENSION, trained_length
from ..discovery import find_attention_layers
from ..layers import AttentionLayer
from ..modes import recomputed_inside
from ..patch import PROGRAM, Patch, patch_on
from ..wrappers import unwrapped
from .block_prefill import BlockPrefill, head_patterns
from .frequencies import matching, replace, rotaries
from .methods import FAIL, METHODS, resolved
from .programs import LengthFrequencies, PositionProgram, Table


@dataclasses.dataclass(eq=False)
class Extension:
    """What `extend` did to a model; kept in the model's ``__dict__`` and copied with it.

    Attributes:
        method: its name.
        options: all of the method's, defaults filled in.
        positions: how many positions the model may now read; None: any number.
        owner: the transformers model inside its wrappers.
        layers: how many attention layers run a position program; 0 where frequencies were replaced.
        patch: what is on those layers.
        undo: what brings frequencies back.
    """

    method: str
    options: dict
    positions: int | None
    owner: nn.Module
    layers: int = 0
    patch: Patch | None = None
    undo: list[Callable[[], None]] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        said = ", ".join(f"{name}={value}" for name, value in self.options.items() if value is not None)
        reach = "any length" if self.positions is None else f"{self.positions} positions"
        return f"{self.method}({said}): {reach}" + (f", in {self.layers} layers" if self.layers else "")


def extend(model: nn.Module, method: str, *, trained: int | None = None, **options) -> Extension:
    """Lets ``model`` read farther than it was trained to, without training; `unextend` gives it back bit for bit.

    linear, ntk, yarn and giraffe replace rotary frequencies.  The others run in the attention layers, on unrotated keys
    in the cache, by `seal_ops.position_programs`; layers with a sliding window of their own stay as they are.
    minference reads no farther, but long prompts in less time: through block lists, while positions, the cache and
    decoding stay the model's.  Scales may be attached before or after.  An extension is no part of a saved checkpoint.

    Args:
        model: a transformers model with loaded weights, or PEFT's or torch.compile's wrapper of one.
        method: one of those that docs/context_extension.md tells apart.
        trained: positions that the model was trained on; None for what its config says.
        options: of the method.  linear, ntk, dynamic_ntk and yarn: ``factor``, how many times the trained length.
            giraffe: ``k``, or ``low``, ``high`` and ``rho`` (`seal_ops.rope_frequencies`).  self_extend: ``group`` and
            ``window``.  dual_chunk: ``length`` (the trained one) and ``chunk`` (3/4 of that).  lm_infinite: ``sinks``
            (10), ``window`` and ``limit`` (the trained length).  streaming: ``sinks`` (4) and ``window`` (the rest).
            minference: ``pattern`` ("vertical_slash", "a_shape" or, chosen for every head and prompt, "auto"; or a dict
            of these by layer, for all heads or a list for each); ``vertical`` (1000) keys and ``slash`` (6096)
            distances of the first pattern, by the last ``last_q`` (64) queries; ``sinks`` (1024) and ``window`` (4096)
            of the second; ``keeps`` (0.95), the share of these queries' attention from which "auto" takes it;
            ``dense`` (4096), up to which texts are read densely; ``block`` (64) tokens.

    Returns:
        An `Extension`, which says what the options are and how far the model reads.

    Raises:
        ValueError: unknown or bad options, a model that is extended already, or one whose rotary embedding the method
            cannot change.

    Source:
        The papers that docs/context_extension.md names.
    """
    owner = unwrapped(model, "extend")
    if EXTENSION in owner.__dict__:
        raise ValueError(
            f"{FAIL}model is extended already (by {owner.__dict__[EXTENSION].method}); call seal_ops.unextend"
        )
    length = trained_length(owner) if trained is None else trained
    if not isinstance(length, int) or length < 1:
        raise ValueError(
            f"{FAIL}trained must be given as a number of positions that the config does not name, got {trained!r}"
        )
    found = resolved(method, options, length)
    extension = Extension(method, found, METHODS[method].reach(found, length), owner)
    if METHODS[method].rope_type is not None:
        extension.undo = _replace_frequencies(owner, method, found, length)
    else:
        _run_program(extension, length)
    owner.__dict__[EXTENSION] = extension
    return extension


def unextend(model: nn.Module) -> nn.Module:
    """Takes the extension off: frequencies and attention are bit for bit what they were.

    Scales stay on.

    Returns:
        The model.

    Raises:
        ValueError: the model is not extended.
    """
    owner = unwrapped(model, "unextend")
    extension = owner.__dict__.pop(EXTENSION, None)
    if extension is None:
        raise ValueError(f"seal_ops.unextend: model must be extended, this {type(owner).__name__} is not")
    for undo in extension.undo:
        undo()
    if extension.patch is not None:
        for layer in extension.patch.layers:
            layer.program = None
        extension.patch.remove(PROGRAM)
    return model


@contextlib.contextmanager
def extended(model: nn.Module, method: str, **options):
    """Inside the block ``model`` is extended, as by `extend`.

    Yields:
        The model.
    """
    extend(model, method, **options)
    try:
        with recomputed_inside(model, "extended"):
            yield model
    finally:
        unextend(model)


def _replace_frequencies(model: nn.Module, method: str, options: dict, trained: int) -> list[Callable[[], None]]:
    found = [rotary for rotary in rotaries(model) if not rotary.buffer.startswith("sliding_attention")]
    if not found:
        raise ValueError(f"{FAIL}model must have a rotary embedding with frequencies, {type(model).__name__} has none")
    for rotary in found:
        if not rotary.is_default():
            kind = repr(rotary.rope_type) if rotary.rope_type != "default" else "another kind"
            raise ValueError(
                f"{FAIL}{method} needs a rotary embedding of default frequencies, {type(model).__name__} has one of "
                f"{kind}"
            )
    rope_type, parameters = METHODS[method].rope_type, {k: v for k, v in options.items() if v is not None}
    if method == "giraffe":
        rope_type = "power" if "k" in parameters else "truncated"
    return [replace(rotary, rope_type, trained, parameters) for rotary in found]


def _run_program(extension: Extension, trained: int) -> None:
    """Gives the layers of the model their programs, and puts the patch on."""
    model, method = extension.owner, extension.method
    patch = patch_on(model) or Patch(model, _layers(model))
    long = [layer for layer in patch.layers if not layer.windowed]
    if not long:
        raise ValueError(f"{FAIL}{method} needs layers without a window of their own, {type(model).__name__} has none")
    for layer in long:
        if layer.composed is not None:
            raise ValueError(
                f"{FAIL}{method} needs attention that runs in the fused ops, {_name(layer)} has {layer.composed}"
            )
    if METHODS[method].positions:
        programs = [_program(extension, layer, trained) for layer in long]
    else:
        programs = _prefills(extension.options, long)
    for layer, program in zip(long, programs):
        layer.program = program
    extension.layers, extension.patch = len(long), patch
    patch.install(PROGRAM)


def _layers(model: nn.Module) -> list[AttentionLayer]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # what stays unfused is refused below
            return find_attention_layers(model)
    except ValueError as error:
        raise ValueError(str(error).replace("seal_ops.attach: ", FAIL, 1)) from error


def _name(layer: AttentionLayer) -> str:
    kind = type(layer.module)
    return getattr(kind, "_seal_base", kind).__name__


def _prefills(options: dict, layers: list[AttentionLayer]) -> list[BlockPrefill]:
    try:
        patterns = head_patterns(options["pattern"], {layer.index: layer.num_heads for layer in layers})
    except ValueError as error:
        raise ValueError(f"{FAIL}{error}") from None
    return [BlockPrefill(own, options) for own in patterns]


def _program(extension: Extension, layer: AttentionLayer, trained: int):
    method, name = METHODS[extension.method], _name(layer)
    if layer.rotation != "deferred":
        raise ValueError(
            f"{FAIL}{extension.method} needs a half-split rotation as the last step before attention, {name} has none"
        )
    match = matching(extension.owner, layer.turn, layer.dtype)
    if match is None:
        raise ValueError(f"{FAIL}{extension.method} needs rotary frequencies in a buffer, those of {name} are in none")
    rotary, factor = match
    if extension.method == "dynamic_ntk":
        if not rotary.is_default():
            raise ValueError(f"{FAIL}dynamic_ntk needs a rotary embedding of default frequencies, {name} has another")
        return LengthFrequencies(2 * rotary.frequencies.numel(), rotary.base, trained, extension.options["factor"])
    if "dynamic" in rotary.rope_type or rotary.rope_type == "longrope":
        raise ValueError(
            f"{FAIL}{extension.method} needs frequencies that do not depend on the length, {name} has "
            f"{rotary.rope_type!r}"
        )
    table = Table(rotary.frequencies, factor)
    return PositionProgram(method.run, extension.options, table, method.rows(extension.options))
