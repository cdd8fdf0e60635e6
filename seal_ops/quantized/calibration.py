"""What calibration samples show of each layer's input: the diagonal of ``XᵀX``, and chosen columns of it.

The sums are accumulated while the model reads the samples; no input is kept.  Layers that read one tensor share its
sums.  Nothing but the decoder is run, so no logits are computed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..huggingface.modes import mode
from ..tasks.encoding import Encoder


def to_token_ids(samples: Iterable, tokenizer, call: str, window: int) -> list[list[int]]:
    """Token ids of calibration samples, cut into pieces of at most ``window`` tokens.

    An item is a text, token ids (a list or a tensor), a sample of a task, or a dict with ``input_ids``, ``text``,
    ``messages``, or ``prompt`` and ``answer``.  Texts need the tokenizer.
    """
    encoder, pieces = None, []
    if isinstance(samples, (str, bytes, Mapping)):
        raise ValueError(f"seal_ops.{call}: calibration must be a list of samples, got one {type(samples).__name__}")
    for number, item in enumerate(samples):
        where = f"seal_ops.{call}: calibration[{number}]"
        item = {"text": item} if isinstance(item, str) else item
        ids = _ids(item)
        if ids is None:
            if not isinstance(item, Mapping):
                raise ValueError(f"{where} must be a text, token ids, a sample or a dict, got {type(item).__name__}")
            if tokenizer is None:
                raise ValueError(f"{where} is text and needs the argument tokenizer, got None")
            encoder = encoder or Encoder(tokenizer, None, f"seal_ops.{call}")
            ids = _encoded(item, encoder, where)
        pieces += [ids[start : start + window] for start in range(0, len(ids), window)]
    if not pieces:
        raise ValueError(f"seal_ops.{call}: calibration must hold at least one sample, got none")
    return pieces


def _ids(item) -> list[int] | None:
    found = item.get("input_ids") if isinstance(item, Mapping) else getattr(item, "input_ids", item)
    if isinstance(found, Tensor):
        found = found.reshape(-1).tolist()
    if isinstance(found, (list, tuple)) and found and all(isinstance(i, int) for i in found):
        return list(found)
    return None


def _encoded(item: Mapping, encoder: Encoder, where: str) -> list[int]:
    answer = item.get("answer", item.get("completion"))
    if isinstance(item.get("text"), str):
        return encoder.text(item["text"])
    if isinstance(item.get("messages"), (list, tuple)):
        return encoder.conversation(item["messages"], where)[0]
    if isinstance(item.get("prompt"), str) and isinstance(answer, str):
        prompt_ids, answer_ids = encoder(item["prompt"], answer)
        return prompt_ids + answer_ids
    raise ValueError(f"{where} must hold input_ids, text, messages, or prompt and answer, got {sorted(item)}")


@dataclass
class Statistics:
    """``squares``: layer -> diag(XᵀX), fp32 [in], a mean over ``tokens``.  ``cross``: layer -> XᵀX[:, index], fp32
    [in, k], likewise.  ``stream``: the layers that read what a norm gives, so the residual stream."""

    squares: dict[str, Tensor] = field(default_factory=dict)
    cross: dict[str, Tensor] = field(default_factory=dict)
    stream: set[str] = field(default_factory=set)
    tokens: int = 0


@torch.no_grad()
def read(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    pieces: list[list[int]],
    *,
    index: Mapping[str, Tensor] | None = None,
    batch_tokens: int = 16_384,
    call: str = "attach_weak_columns",
) -> Statistics:
    """Runs the model over ``pieces`` and accumulates; with ``index`` the chosen columns, else the diagonal.

    ``batch_tokens``: most tokens of a forward pass, in pieces of one length.  Memory: the model's own, one pass's
    activations and the sums.  Raises ValueError where a layer reads nothing, or something that is not finite.
    """
    found, reader = Statistics(), _Reader(targets, index)
    decoder = _decoder(model, targets)
    device = model.get_input_embeddings().weight.device
    with mode(model, False), reader.watching(decoder):
        for batch in _batches(pieces, batch_tokens):
            found.tokens += batch.numel()
            decoder(input_ids=batch.to(device), use_cache=False)
    for name in targets:
        if name not in reader.sums:
            raise ValueError(f"seal_ops.{call}: {name} must read something in a forward pass, got a layer never called")
        value = reader.sums[name] / found.tokens
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"seal_ops.{call}: the input of {name} must be finite on calibration, got NaN or infinity")
        (found.squares if index is None else found.cross)[name] = value
    found.stream = reader.stream
    return found


def _decoder(model: nn.Module, targets: Mapping[str, nn.Module]) -> nn.Module:
    """The part of the model below the head, where all targets are in it."""
    prefix = getattr(model, "base_model_prefix", "")
    inner = getattr(model, prefix, None) if prefix else None
    if isinstance(inner, nn.Module) and all(name.startswith(f"{prefix}.") for name in targets):
        return inner
    return model


def _batches(pieces: list[list[int]], batch_tokens: int):
    """Token ids [B, S]; rows of one length, so that nothing is padded."""
    by_length: dict[int, list[list[int]]] = {}
    for piece in pieces:
        by_length.setdefault(len(piece), []).append(piece)
    for length, rows in by_length.items():
        size = max(1, batch_tokens // length)
        for start in range(0, len(rows), size):
            yield torch.tensor(rows[start : start + size], device="cpu")


class _Reader:
    """Hooks that accumulate what the targets read."""

    def __init__(self, targets, index):
        self.targets, self.index = targets, index
        self.sums: dict[str, Tensor] = {}
        self.stream: set[str] = set()
        self.last: tuple = (None, None, None)  # a tensor, a key, what was made of it
        self.normed = None  # the last output of a norm

    @contextlib.contextmanager
    def watching(self, decoder: nn.Module):
        targets = {id(m) for m in self.targets.values()}
        handles = [m.register_forward_pre_hook(self._hook(name)) for name, m in self.targets.items()]
        for module in decoder.modules():
            if id(module) not in targets and _is_norm(module):
                handles.append(module.register_forward_hook(self._note_norm))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.last, self.normed = (None, None, None), None

    def _note_norm(self, module, args, output):
        self.normed = output if isinstance(output, Tensor) else None

    def _hook(self, name):
        def hook(module, args, kwargs=None):
            x = args[0]
            if x is self.normed:
                self.stream.add(name)
            index = None if self.index is None else self.index[name]
            seen, key, value = self.last
            same = seen is x and (key is index or (index is not None and torch.equal(key, index)))
            if not same:
                value = _squares(x) if index is None else _products(x, index)
                self.last = (x, index, value)
            if name in self.sums:
                self.sums[name] += value
            else:
                self.sums[name] = value.clone()

        return hook


def _is_norm(module: nn.Module) -> bool:
    """A module whose weights are vectors only."""
    own = list(module.parameters(recurse=False))
    return bool(own) and all(p.dim() == 1 for p in own) and not any(True for _ in module.children())


def _squares(x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    kind = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(rows, 2, 0, dtype=kind).square()


def _products(x: Tensor, index: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    picked = rows.index_select(1, index)
    if x.is_cuda and x.element_size() == 2:
        return torch.mm(rows.t(), picked, out_dtype=torch.float32)
    kind = torch.promote_types(x.dtype, torch.float32)
    return rows.to(kind).t() @ picked.to(kind)
