"""Documents of packed rows: where they begin, as transformers noticed it or as the positions say."""

from __future__ import annotations

import functools
import sys

import torch
from torch import Tensor
from transformers import masking_utils


def _code(make, *args):
    """The code of the functions that a maker of mask functions returns; None where this transformers has no such."""
    maker = getattr(masking_utils, make, None)
    return None if maker is None else maker(*args).__code__


_BOTH = _code("and_masks", masking_utils.causal_mask_function)
_DOCUMENTS = _code("packed_sequence_mask_function", None)
_BY_POSITION = _code("remap_positions_for_packed_sequence", None, None)
_WINDOW = _code("sliding_window_overlay", 1)


def noticed_documents(mask_function, config) -> Tensor | None:
    """Numbers of the documents [B, S] that transformers noticed in positions, where they are all that it added.

    ``mask_function``: as it comes to the mask registry.  None where it is not causal (or a sliding window) with
    documents, and for models whose code works on the mask as on a tensor.
    """
    parts = _parts(mask_function)
    if parts is None or len(parts) != 2 or _is(parts[1], _DOCUMENTS) is False or not _hands_masks_on(type(config)):
        return None
    base = parts[0]
    if _is(base, _BY_POSITION):  # in a document positions count as indices do
        base = _held(base)["mask_function"]
    windowed = _parts(base)
    if windowed is not None:
        if len(windowed) != 2 or not _is(windowed[0], _WINDOW):
            return None
        base = windowed[1]
    return _held(parts[1])["packed_sequence_mask"] if base is masking_utils.causal_mask_function else None


def _is(function, code) -> bool:
    return code is not None and getattr(function, "__code__", None) is code


def _held(function) -> dict:
    """The variables that a function has from the one that made it."""
    return dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in function.__closure__)))


def _parts(function) -> tuple | None:
    return _held(function)["mask_functions"] if _is(function, _BOTH) else None


def _hands_masks_on(config_class: type) -> bool:
    """Whether the code of a model only passes its masks on: False where it asks for tensors, or cannot be read."""
    module = config_class.__module__
    code = sys.modules.get(module.replace("configuration_", "modeling_")) if "configuration_" in module else None
    path = getattr(code, "__file__", None)
    return path is not None and not _asks_for_tensors(path)


@functools.cache
def _asks_for_tensors(path: str) -> bool:
    try:
        with open(path, encoding="utf-8") as file:
            return "allow_is_causal_skip=False" in file.read()
    except (OSError, UnicodeDecodeError):
        return True


def boundaries(begins: Tensor) -> Tensor:
    """cu_seqlens int32 [documents + 1] of rows in which ``begins`` [B, S] says where a document begins."""
    begins = begins.clone()
    begins[:, 0] = True
    starts = begins.flatten().nonzero().squeeze(1)
    return torch.cat([starts, starts.new_full((1,), begins.numel())]).to(torch.int32)


def begins_by_number(numbers: Tensor) -> Tensor:
    """Boolean [B, S]: where a document begins, for the numbers of documents [B, S]."""
    return torch.diff(numbers, prepend=numbers[:, :1] - 1) != 0


def begins_by_position(position_ids: Tensor, batch: int) -> Tensor:
    """Boolean [B, S]: where a document begins, since its position [B or 1, S] is not above the one before."""
    return (torch.diff(position_ids, prepend=position_ids[:, :1]) <= 0).expand(batch, -1)


def same_document(cu_seqlens: Tensor, batch: int, length: int) -> Tensor:
    """Boolean [B, 1, S, S]: whether two tokens lie in one sequence of the batch's B * S tokens."""
    tokens = torch.arange(batch * length, dtype=torch.int32, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens, tokens, right=True).view(batch, 1, length)
    return document[..., :, None] == document[..., None, :]
