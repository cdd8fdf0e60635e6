"""One attention layer of a model: what was observed of it, and the class that its module has while scales are attached.

The module's class is exchanged for a subclass, made once for each class, in which only ``forward`` differs.  So copies,
replicas and pickles of the module stay attached, and hooks that other libraries lay on the instance stay theirs.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ..ops.dispatch import chosen
from ..ops.masks import Mask
from .context_extension.rolling_cache import check_padding
from .masks import NAME
from .model_parallel import ulysses
from .rotation import Rotation, rotary_functions, with_fused_rotation

GRANULARITIES = ("head", "channel")


def why_no_soft_cap(backend: str | None, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why a soft cap is composed from PyTorch's parts; None where Triton runs it, or the oracle, asked for by name."""
    runs = chosen(backend or "auto", "attention", device, dtype, head_dim, ("softcap",))
    return None if runs == "triton" or backend == "reference" else "soft-capped scores"


@dataclasses.dataclass(eq=False)
class AttentionLayer:
    """One self-attention module of a model, as observed, and what is laid on it.

    ``index``: the module's ``layer_idx`` where every layer of the model has one of its own, else its running number.
    ``output_projection``: the linear module that reads the attention output (under its name in the model,
    ``projection_name``), or None.  ``commutes``: the granularities whose scales may as well multiply what the output
    projection reads, so that they can be merged: both where it reads the attention output itself or a gated one, none
    behind a norm.  ``rotation``: "deferred" (fused with attention where there is no cache), "in place" (fused by
    itself) or None.  ``unfit_shapes``: why no backend runs its attention, or None.
    ``scaling`` (set by `seal_ops.attach`), called, gives fp32 [Hq], [Hq, D], [B, Hq, 1] or [B, Hq, D]; it counts while
    the patch is on the model for scales.  ``turn``: cos and sin of position 1 as the layer was given them, where its
    rotation is deferred.  ``program`` (set by `seal_ops.extend`): what runs in the place of plain attention, as in
    `context_extension.programs` and `context_extension.block_prefill`.  ``training_mask``: in the place of causal
    masks, in training mode.  ``tensor_group``: the processes among which the heads are divided, where the model is
    tensor parallel.
    """

    name: str
    module: nn.Module
    index: int = -1
    num_heads: int = 0
    num_kv_heads: int = 0
    head_dim: int = 0
    device: torch.device | None = None  # of the attention call
    dtype: torch.dtype | None = None
    output_projection: nn.Module | None = None
    projection_name: str | None = None
    commutes: tuple[str, ...] = ()
    rotation: str | None = None
    unfused: str | None = None  # why a rotary function that is there was not replaced
    unfit_shapes: str | None = None
    soft_capped: bool = False
    bystanders: tuple[nn.Module, ...] = ()  # the model's other modules that may call attention, without scales
    windowed: bool = False  # by a sliding window of the model's own
    turn: tuple[Tensor, Tensor] | None = None
    scaling: nn.Module | None = None
    scaled: bool = True
    program: object | None = None
    training_mask: Mask | None = None
    backend: str | None = None
    tensor_group: object | None = None
    probe: object | None = None  # discovery's, while it watches
    in_a_model: bool = False  # said by the patch; not copied, a copy's own patch says it again

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "in_a_model"}

    @property
    def o_proj(self) -> nn.Module | None:
        return self.output_projection

    @property
    def direct(self) -> bool:
        """Whether channel scales may be merged."""
        return "channel" in self.commutes

    @property
    def composed(self) -> str | None:
        """Why attention is put together from PyTorch's parts on the layer's backend, or None."""
        if self.soft_capped and self.unfit_shapes is None:
            return why_no_soft_cap(self.backend, self.device, self.dtype, self.head_dim)
        return self.unfit_shapes

    def current(self, batch: int | None = None) -> Tensor | None:
        """The scale; where rows have scales of their own, those of a batch of so many rows (None: as they were given).

        Through a call: offloading hooks fill the parameters of modules that are called.
        """
        return None if self.scaling is None or not self.scaled else self.scaling(batch=batch)


def _is_cache(value) -> bool:
    """A cache, known by its type, or by having ``update`` where it is of no type of transformers'."""
    return isinstance(value, Cache) or (
        not isinstance(value, (Tensor, dict, int)) and callable(getattr(value, "update", None))
    )


def _is_embeddings(value) -> bool:
    """(cos, sin), each [B, S, R]."""
    return (
        isinstance(value, (tuple, list))
        and len(value) == 2
        and all(isinstance(t, Tensor) for t in value)
        and value[0].dim() == 3
        and value[0].shape == value[1].shape
        and value[0].is_floating_point()
    )


def _waiting(args: tuple, kwargs: dict, unrotated_cache: bool) -> tuple[tuple, dict]:
    """The arguments of an attention module with the rotation left to the attention call; as they are with a cache.

    A cache wants rotated keys before the attention call, but for a program, which turns them when it reads them.
    Arguments are known by what they are: names have changed.
    """
    if not unrotated_cache and any(_is_cache(value) for value in itertools.chain(args, kwargs.values())):
        return args, kwargs
    places = [i for i, v in enumerate(args) if _is_embeddings(v)] + [n for n, v in kwargs.items() if _is_embeddings(v)]
    if len(places) != 1:
        return args, kwargs
    place = places[0]
    rotation = Rotation(*(args[place] if isinstance(place, int) else kwargs[place]))
    stand_in = (rotation, rotation.sin)
    if isinstance(place, int):
        args = (*args[:place], stand_in, *args[place + 1 :])
    else:
        kwargs = {**kwargs, place: stand_in}
    return args, {**kwargs, "seal_rotation": rotation}


def attached_class(cls: type, backend: str | None) -> type:
    """The subclass of an attention class that modules with scales have; ``forward`` differs, and how it is pickled."""
    # Other libraries change classes and the functions in their files; a subclass belongs to the state it was made in.
    return _attached_class(cls, backend, cls.forward, rotary_functions(cls.forward))


@functools.cache
def _attached_class(cls: type, backend: str | None, original, _state: tuple) -> type:
    fused = with_fused_rotation(original, backend)

    @functools.wraps(original)
    def forward(self, *args, **kwargs):
        layer = getattr(self, "_seal_layer", None)
        if layer is None:  # detached; called by a hook that another library had put round this function
            return original(self, *args, **kwargs)
        if self.config._attn_implementation != NAME:
            raise RuntimeError(
                f"seal_ops: attn_implementation must stay {NAME!r} while scales are attached (another one "
                f"would leave them out), got {self.config._attn_implementation!r}; set {NAME!r} again, or "
                f"call seal_ops.merge or seal_ops.detach first"
            )
        if layer.scaling is not None and not layer.in_a_model:  # a copy, or out of a pickle
            raise RuntimeError(
                f"seal_ops: a module with scales must be copied with its whole model, got {type(self).__name__} "
                f"copied by itself, whose scales would neither train nor merge with the model's; copy the model, or "
                f"attach after the layers were copied (PEFT's layer_replication and modules_to_save do so)"
            )
        if layer.program is not None:
            check_padding((*args, *kwargs.values()))
        if ulysses.is_on(NAME):  # q and k change on their way to attention, so the rotation is not deferred
            kwargs = ulysses.gatherable(kwargs)
        elif layer.rotation == "deferred":
            args, kwargs = _waiting(args, kwargs, layer.program is not None and layer.program.unrotated)
        function = fused if layer.rotation else original
        if layer.probe is not None:
            return layer.probe.run(function, args, kwargs)
        return function(self, *args, **kwargs)

    def __reduce_ex__(self, protocol):
        return (_rebuilt, (cls, backend), *super(attached, self).__reduce_ex__(protocol)[2:])

    attached = type(
        cls.__name__,
        (cls,),
        {
            "forward": forward,
            "__reduce_ex__": __reduce_ex__,
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
            "__doc__": cls.__doc__,
            "_seal_base": cls,
            "_seal_fused": fused is not None,
        },
    )
    return attached


def _rebuilt(cls: type, backend: str | None) -> nn.Module:
    """An empty module of the attached class: what unpickling and copying start from."""
    attached = attached_class(cls, backend)
    return attached.__new__(attached)
