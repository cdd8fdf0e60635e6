"""Bytes of tensors: how many are alive at most while something runs, and how many a graph keeps."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ...huggingface.modes import attention_ops
from . import memory
from .operations import operations_of


def _local(value):
    """This process' part of a DTensor (tensor parallelism), whose own storage stands for none; all else as it is."""
    return getattr(value, "_local_tensor", value)


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make inside, until they die.

    ``live``, ``peak``: bytes now, and at most.  ``attention``: bytes that the fused attention has returned.  What an
    operation allocates within itself and frees again is not seen.  ``linear_operations``, ``attention_operations``: of
    what ran, where ``operations`` asks for it.
    """

    def __init__(self, operations: bool = False):
        super().__init__()
        self._counts = operations
        self.live = self.peak = self.attention = 0
        self.linear_operations = self.attention_operations = 0
        self._known: dict[int, weakref.finalize] = {}
        self._attention_ops = attention_ops()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self._counts:
            linear, attention = operations_of(func, *tree_map(_local, (args, kwargs, out)))
            self.linear_operations += linear
            self.attention_operations += attention
        given = None
        for tensor in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if not isinstance(tensor, Tensor):
                continue
            storage = _local(tensor).untyped_storage()
            key = storage._cdata
            if func in self._attention_ops:
                self.attention += storage.nbytes()
            if key in self._known:
                continue
            if given is None:  # a view of an input, or the input itself, is none of ours
                leaves = (t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
                given = {_local(t).untyped_storage()._cdata for t in leaves}
            if key not in given:
                size = storage.nbytes()
                self.live += size
                self.peak = max(self.peak, self.live)
                self._known[key] = weakref.finalize(storage, self._gone, key, size)
        return out

    def _gone(self, key: int, size: int) -> None:
        self.live -= size
        self._known.pop(key, None)


class Meter:
    """Memory of a stretch of work above what lay there at its start: of CUDA's allocator, elsewhere `LiveBytes`."""

    def __init__(self, device: torch.device, operations: bool = False):
        self.device, self._counter, self._on = device, LiveBytes(operations), False
        self._allocator = device.type == "cuda"

    def start(self) -> None:
        self._counter.__enter__()
        self._on = True
        memory.begin_peak(self.device)
        self._before = memory.requested(self.device) if self._allocator else 0

    def lap(self) -> int:
        """Most bytes since the start or the last lap."""
        if self._allocator:
            peak = memory.requested(self.device, peak=True) - self._before
            memory.begin_peak(self.device)
            return peak
        peak, self._counter.peak = self._counter.peak, self._counter.live
        return peak

    def now(self) -> int:
        """Bytes at present."""
        return memory.requested(self.device) - self._before if self._allocator else self._counter.live

    @property
    def counted(self) -> LiveBytes:
        """What was counted beside the peak."""
        return self._counter

    def stop(self) -> None:
        if self._on:
            self._counter.__exit__(None, None, None)
        self._on = False

    def __enter__(self) -> Meter:
        self.start()
        return self

    def __exit__(self, *error) -> None:
        self.stop()


class Saved:
    """Bytes of the storages that graphs built inside keep for their backward pass at present, without those of
    ``given``."""

    def __init__(self, given: Iterable[Tensor]):
        self._given = {_local(t).untyped_storage()._cdata for t in given}
        self._met: dict[int, weakref.finalize] = {}
        self.bytes = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def met(self, tensor: Tensor) -> bool:
        """Whether the storage of ``tensor`` is among those kept."""
        return _local(tensor).untyped_storage()._cdata in self._met

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = _local(tensor).untyped_storage()
        key = storage._cdata
        if key not in self._met:
            size = 0 if key in self._given else storage.nbytes()
            self.bytes += size
            self._met[key] = weakref.finalize(storage, self._gone, key, size)
        # An operation that saves its own result would hold itself through it, and for ever where nothing runs it
        # backward, as what the cut last layer computes of its rows before attention.
        return tensor.detach()

    def _gone(self, key: int, size: int) -> None:
        self.bytes -= size  # another storage may come to lie at its address
        self._met.pop(key, None)

    def __enter__(self) -> Saved:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._hooks.__exit__(*error)
