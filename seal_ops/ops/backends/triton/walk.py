"""The walk of a tile over blocks of the other side, as the mask (masks.Mask) says: one for all attention kernels.

A query tile visits the blocks of the sinks, then those of one range of keys; a key tile visits one range of queries.
In the range the blocks full_begin..full_end need no mask: `blocks` is (begin, full_begin, full_end, end), behind them
(sink_begin, sink_end) where a query tile's mask has sinks. With block lists (masks.blocks) it is (begin, begin, begin,
end, 0, 0, list, per): step i is block i % per of the list's element i // per, all of them masked. Its length tells
which, since Triton 3.6 returns no None in a tuple.

`bounds` is (len_q, len_k, lower, upper, chunk, chunk_lower, chunk_upper, shift, sinks) of one sequence and head. What a
mask does not have is None, which compiles it away: a causal call compiles to the range from 0 to its diagonal.
"""

import triton
import triton.language as tl

_UNBOUNDED = tl.constexpr(1 << 30)
# The kernels' arguments for a mask: host.Geometry.mask gives their values.
MASK_ARGUMENTS = ("lower", "upper", "chunk", "chunk_lower", "chunk_upper", "shift", "shifted_from", "sinks")


@triton.jit
def _chunk_start(position, difference, chunk, shift):
    """First position of the chunk that lies `difference` chunks after that of `position`, cut to what fits in 32
    bits."""
    if shift is not None:
        position += shift
    # Division on the device cuts towards zero; a query before the first key stands below it.
    own = tl.where(position < 0, -1 - (-1 - position) // chunk, position // chunk)
    start = (own + difference).to(tl.int64) * chunk
    if shift is not None:
        start -= shift
    return tl.minimum(tl.maximum(start, -_UNBOUNDED), _UNBOUNDED).to(tl.int32)


@triton.jit
def _first_key(position, bounds):
    """First key that the band and the chunks let a query see; it must have such a limit."""
    _, _, lower, _, chunk, chunk_lower, _, shift, _ = bounds
    if chunk_lower is None:
        first = position + lower
    else:
        first = _chunk_start(position, chunk_lower, chunk, shift)
        if lower is not None:
            first = tl.maximum(first, position + lower)
    return first


@triton.jit
def _last_key(position, bounds):
    _, _, _, upper, chunk, _, chunk_upper, shift, _ = bounds
    if chunk_upper is None:
        last = position + upper
    else:
        last = _chunk_start(position, chunk_upper + 1, chunk, shift) - 1
        if upper is not None:
            last = tl.minimum(last, position + upper)
    return last


@triton.jit
def _first_query(key, bounds):
    """First query (not its position) that band and chunks let see a key; the mask must have such a limit."""
    len_q, len_k, _, upper, chunk, _, chunk_upper, shift, _ = bounds
    if chunk_upper is None:
        first = key + len_q - len_k - upper
    else:
        first = _chunk_start(key, -chunk_upper, chunk, shift) + len_q - len_k
        if upper is not None:
            first = tl.maximum(first, key + len_q - len_k - upper)
    return first


@triton.jit
def _last_query(key, bounds):
    len_q, len_k, lower, _, chunk, chunk_lower, _, shift, _ = bounds
    if chunk_lower is None:
        last = key + len_q - len_k - lower
    else:
        last = _chunk_start(key, 1 - chunk_lower, chunk, shift) - 1 + len_q - len_k
        if lower is not None:
            last = tl.minimum(last, key + len_q - len_k - lower)
    return last


@triton.jit
def key_blocks(first, bounds, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Key blocks of the query tile that starts at row `first`: see key_blocks_of."""
    return key_blocks_of(first, tl.minimum(first + BLOCK_M, bounds[0]) - 1, bounds, BLOCK_N)


@triton.jit
def key_blocks_of(first, last, bounds, BLOCK_N: tl.constexpr):
    """`blocks` of keys for the queries first..last. Query i stands at the position i + len_k - len_q."""
    len_q, len_k, lower, upper, _, chunk_lower, chunk_upper, _, sinks = bounds
    position = first + len_k - len_q
    last += len_k - len_q
    begin = 0
    end = len_k
    full_begin = 0
    full_end = len_k
    if upper is not None or chunk_upper is not None:
        end = tl.maximum(tl.minimum(len_k, _last_key(last, bounds) + 1), 0)
        full_end = tl.maximum(tl.minimum(len_k, _last_key(position, bounds) + 1), 0)
    if lower is not None or chunk_lower is not None:
        begin = tl.minimum(tl.maximum(_first_key(position, bounds), 0), end)
        full_begin = tl.maximum(_first_key(last, bounds), 0)
    begin, full_begin, full_end, end = _in_blocks(begin, full_begin, full_end, end, BLOCK_N)
    if sinks is None:
        return begin, full_begin, full_end, end
    else:
        wanted = tl.cdiv(tl.maximum(tl.minimum(tl.minimum(sinks, last + 1), len_k), 0), BLOCK_N)
        empty = begin >= end  # then the range may begin anywhere: behind the sinks
        begin = tl.where(empty, wanted, begin)
        end = tl.where(empty, wanted, tl.maximum(end, wanted))
        full_begin = tl.where(empty, wanted, full_begin)
        full_end = tl.where(empty, wanted, full_end)
        return begin, full_begin, full_end, end, tl.minimum(0, begin), tl.minimum(wanted, begin)


@triton.jit
def query_blocks(first, bounds, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """`blocks` of queries for the key tile that starts at key `first`. Keys beyond len_k do not need the mask: every
    key has its own gradient row, and those rows are never written."""
    len_q, len_k, lower, upper, _, chunk_lower, chunk_upper, _, sinks = bounds
    last = tl.minimum(first + BLOCK_N, len_k) - 1
    begin = 0
    end = len_q
    full_begin = 0
    full_end = len_q
    if upper is not None or chunk_upper is not None:
        begin = tl.minimum(tl.maximum(_first_query(first, bounds), 0), len_q)
        full_begin = tl.maximum(_first_query(last, bounds), 0)
    if lower is not None or chunk_lower is not None:
        end = tl.maximum(tl.minimum(len_q, _last_query(last, bounds) + 1), begin)
        full_end = tl.maximum(tl.minimum(len_q, _last_query(first, bounds) + 1), 0)
    if sinks is not None:  # a sink is seen by every query from its own position on
        row = tl.maximum(first + len_q - len_k, 0)
        begin = tl.where(first < sinks, tl.where(begin < end, tl.minimum(begin, row), row), begin)
        end = tl.where(first < sinks, len_q, end)
        all_sinks = last < sinks
        full_begin = tl.where(all_sinks, tl.maximum(last + len_q - len_k, 0), full_begin)
        full_end = tl.where(all_sinks, len_q, full_end)
    begin, full_begin, full_end, end = _in_blocks(begin, full_begin, full_end, end, BLOCK_M)
    return begin, full_begin, full_end, end


@triton.jit
def listed(lists, batch, head, first, BLOCK: tl.constexpr):
    """`blocks` of the other side, in blocks of BLOCK: those that host.BlockLists has for the tile that starts at row
    `first`."""
    order_ptr, counts_ptr, stride_b, stride_h, columns, size = lists
    row = batch * stride_b + head * stride_h + first // size
    per = size // BLOCK
    begin = row * 0
    end = tl.load(counts_ptr + row) * per
    return begin, begin, begin, end, begin, begin, order_ptr + row.to(tl.int64) * columns, per


@triton.jit
def _in_blocks(begin, full_begin, full_end, end, BLOCK: tl.constexpr):
    begin = begin // BLOCK
    end = tl.maximum(tl.cdiv(end, BLOCK), begin)
    full_begin = tl.minimum(tl.maximum(tl.cdiv(full_begin, BLOCK), begin), end)
    full_end = tl.minimum(tl.maximum(full_end // BLOCK, full_begin), end)
    return begin, full_begin, full_end, end


@triton.jit
def loop_range(blocks, MASKED: tl.constexpr):
    """Range of the loop over the full blocks, or over the masked ones: the sinks, and both sides of the full ones."""
    if MASKED:
        begin = blocks[0]
        if len(blocks) == 6:
            begin -= blocks[5] - blocks[4]
        return begin, blocks[3] - (blocks[2] - blocks[1])
    else:
        return blocks[1], blocks[2]


@triton.jit
def block_start(i, blocks, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """First row of the block of step i: the masked loop leaps from the sinks to the range, and over its full blocks."""
    if len(blocks) == 8:
        return (tl.load(blocks[6] + i // blocks[7]) * blocks[7] + i % blocks[7]) * BLOCK
    elif MASKED:
        block = i + tl.where(i >= blocks[1], blocks[2] - blocks[1], 0)
        if len(blocks) == 6:
            block = tl.where(i < blocks[0], i - blocks[0] + blocks[5], block)
        return block * BLOCK
    else:
        return i * BLOCK


@triton.jit
def seen(queries, keys, bounds):
    """Which (query, key) pairs of one block take part; `queries` and `keys` broadcast against each other."""
    len_q, len_k, lower, upper, _, chunk_lower, chunk_upper, _, sinks = bounds
    last = len_k - 1  # the last key that each query sees: one comparison a pair
    if upper is not None or chunk_upper is not None:
        last = tl.minimum(_last_key(queries + (len_k - len_q), bounds), last)
    allowed = keys <= tl.where(queries < len_q, last, -1)
    if lower is not None or chunk_lower is not None:
        allowed &= keys >= _first_key(queries + (len_k - len_q), bounds)
    if sinks is not None:
        last = tl.minimum(tl.minimum(queries + (len_k - len_q), sinks - 1), len_k - 1)
        allowed |= keys <= tl.where(queries < len_q, last, -1)
    return allowed
