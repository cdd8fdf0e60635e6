"""What an extended model's layers run in the place of plain attention. Queries and keys come unrotated."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...ops.functional import packed_positions, rope_attention
from ...ops.rotary_tables import rope_frequencies, rope_tables


class Table:
    """cos and sin of one set of frequencies, with as many positions as were asked for so far."""

    def __init__(self, frequencies: Tensor, factor: float):
        self.frequencies, self.factor = frequencies.detach().float().cpu(), factor
        self._made: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def read(self, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """fp32 [N, R/2] with N >= rows."""
        if device not in self._made or self._made[device][0].shape[0] < rows:
            with torch.inference_mode(False), torch.no_grad():  # a table of inference mode could not be trained with
                size = 1 << max(6, (rows - 1).bit_length())
                self._made[device] = rope_tables(size, self.frequencies, self.factor, device)
        return self._made[device]


class _Everywhere:
    """Runs every call of its layer, and wants a cache of unrotated keys."""

    unrotated = True

    def serves(self, queries: int, keys: int) -> bool:
        return True


class PositionProgram(_Everywhere):
    """One of `seal_ops.position_programs` with its options."""

    def __init__(self, run: Callable, options: dict, table: Table, rows: int):
        self.run, self.options, self.table, self.rows = run, options, table, rows

    def attend(self, q: Tensor, k: Tensor, v: Tensor, longest: int, **call) -> Tensor:
        """q, k, v dense or packed; ``longest``: no sequence has more keys. ``call``: arguments of the program."""
        cos, sin = self.table.read(max(longest, self.rows), q.device)
        return self.run(q, k, v, cos, sin, **self.options, **call)


class LengthFrequencies(_Everywhere):
    """True positions, turned by frequencies that depend on how many keys a row or sequence has."""

    def __init__(self, head_dim: int, base: float, trained: int, factor: float):
        self.arguments = dict(base=base, max_position_embeddings=trained, factor=factor)
        self.head_dim, self.trained = head_dim, trained
        self._last: tuple | None = None  # the layers of one step ask for the same

    def _angles(self, lengths: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin of every key of sequences of these lengths, laid end to end."""
        if self._last is None or self._last[0] != (lengths, device):
            with torch.inference_mode(False), torch.no_grad():
                parts = []
                for length in lengths:
                    asked = max(length, self.trained)  # transformers' own schedule starts there
                    frequencies, factor = rope_frequencies(self.head_dim, "dynamic", seq_len=asked, **self.arguments)
                    parts.append(rope_tables(length, frequencies, factor, device))
                self._last = (lengths, device), tuple(torch.cat(part) for part in zip(*parts))
        return self._last[1]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, longest: int, **call) -> Tensor:
        """As `PositionProgram.attend`; packed lengths are read from the device."""
        cu = call.get("cu_seqlens")
        if cu is None:
            cos, sin = self._angles((k.shape[1],), q.device)
            return rope_attention(q, k, v, cos, sin, **call)
        cu_k = cu if call.get("cu_seqlens_k") is None else call["cu_seqlens_k"]
        cos, sin = self._angles(tuple(cu_k.diff().tolist()), q.device)
        keys = torch.arange(k.shape[0], device=k.device)
        first = cu_k[:-1].repeat_interleave(cu.diff(), output_size=q.shape[0])
        return rope_attention(q, k, v, cos, sin, first + packed_positions(cu, q.shape[0], cu_k), keys, **call)
