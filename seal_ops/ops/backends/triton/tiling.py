"""What every attention kernel shares on the device: which tile a program owns, and how tiles are read.

Tiles of packed sequences are found without a host sync. Sequence b owns the tile numbers from cu[b] // BLOCK + b up to
cu[b + 1] // BLOCK + b + 1: always at least ceil(length / BLOCK) of them, never overlapping, total // BLOCK + B in all.
What a sequence has too many is a program that leaves at once.
"""

import triton
import triton.language as tl

from . import interpreted

LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453

_UPCAST = tl.constexpr(interpreted())  # numpy cannot multiply the interpreter's bf16


@triton.jit
def product(a, b, acc):
    """acc + a b, accumulated in fp32; acc None starts from zero. fp32 operands are never cut to TF32."""
    if _UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee" if a.dtype == tl.float32 else None)


@triton.jit
def first_tile(seq, cu_ptr, BLOCK: tl.constexpr):
    """First tile number of a packed sequence; the last of sequence b is first_tile(b + 1) - 1."""
    return tl.load(cu_ptr + seq) // BLOCK + seq


@triton.jit
def locate(pid, tiles, heads, num_seqs, cu_ptr, other_cu_ptr, length, other_length, BLOCK: tl.constexpr):
    """The tile of program `pid`: (head, batch coordinate, sequence, tile within the sequence, first token and length of
    the sequence on this side, the same two on the other side). `tiles` are those of a batch row, or packed (cu_ptr
    given) all."""
    tile = pid % tiles
    head = (pid // tiles) % heads
    if cu_ptr is not None:
        seq = 0
        end = num_seqs
        while end - seq > 1:  # first_tile(seq) <= tile < first_tile(end)
            middle = (seq + end) // 2
            below = first_tile(middle, cu_ptr, BLOCK) <= tile
            seq = tl.where(below, middle, seq)
            end = tl.where(below, end, middle)
        tile -= first_tile(seq, cu_ptr, BLOCK)
        start = tl.load(cu_ptr + seq)
        length = tl.load(cu_ptr + seq + 1) - start
        other_start = tl.load(other_cu_ptr + seq)
        other_length = tl.load(other_cu_ptr + seq + 1) - other_start
        batch = tl.full((), 0, tl.int32)
    else:
        batch = pid // (tiles * heads)
        seq = batch
        start = tl.full((), 0, tl.int32)
        other_start = tl.full((), 0, tl.int32)
    return head, batch, seq, tile, start, length, other_start, other_length


@triton.jit
def load_rows(
    source,
    batch,
    head,
    start,
    first,
    length,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TMA: tl.constexpr,
    MASKED: tl.constexpr,
):
    """[ROWS, BLOCK_D] of one head: rows first.. of a sequence of `length` tokens that starts at token `start`. `source`
    is what host.Rows.source gives. Beyond the tensor and beyond HEAD_DIM there are zeros; beyond `length` there are
    zeros or, with TMA and packed sequences, rows of the next sequence. MASKED false promises first + ROWS <= length."""
    if TMA:
        return source.load([batch, head, start + first, 0]).reshape(ROWS, BLOCK_D)
    else:
        ptr, stride_b, stride_h, stride_s = source
        ptr += batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h + (start + first).to(tl.int64) * stride_s
        r = tl.arange(0, ROWS)
        d = tl.arange(0, BLOCK_D)
        at = ptr + r[:, None] * stride_s + d[None, :]
        if MASKED:
            return tl.load(at, mask=(first + r < length)[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
        elif HEAD_DIM == BLOCK_D:
            return tl.load(at)
        else:
            return tl.load(at, mask=(d < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def load_statistics(source, which, row, at, ROWS: tl.constexpr, TMA: tl.constexpr):
    """[ROWS] of a row of the statistics that preprocess.Statistics keeps; every row has room for a whole tile too
    many."""
    if TMA:
        return source.load([which, row, at]).reshape(ROWS)
    else:
        ptr, stride_which, stride_row = source
        return tl.load(ptr + which * stride_which + row.to(tl.int64) * stride_row + at + tl.arange(0, ROWS))


@triton.jit
def load_factor(factor, seq, head, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """[1, BLOCK_D] of a scale or offset: (pointer, strides over sequences, heads, channels), 0 where it broadcasts."""
    ptr, stride_b, stride_h, stride_d = factor
    d = tl.arange(0, BLOCK_D)
    return tl.load(ptr + seq.to(tl.int64) * stride_b + head * stride_h + d * stride_d, mask=d < HEAD_DIM, other=0.0)[
        None, :
    ]


@triton.jit
def aligned_column(start, seq, PACKED: tl.constexpr):
    """Where a packed sequence that starts at token `start` begins in a row whose sequences are each aligned to 4
    elements (16 bytes of fp32, which descriptors want): the rule of first_tile with a block of 4."""
    column = start
    if PACKED:
        column = (start // 4 + seq) * 4
    return column
