"""What goes with a softmax in some models, on the device: a soft cap of the scores, a sink in the denominator, a gate.

Each is None where a call does not have it, and then leaves nothing in the compiled kernel.

    soft cap  c tanh(s / c). The matrix kernels get `cap`, c / ln 2, and 2 sigma / (c ln 2) as the factor of the scores
    sink      a key without a value: it joins the sum of a finished row, so that nothing else of a kernel knows of it
    gate      (pointer, strides over batch rows, tokens, heads, channels; without the last where a head has one value)
"""

import triton
import triton.language as tl

from .tiling import LN2, LOG2E

_LN2 = tl.constexpr(LN2)
_LOG2E = tl.constexpr(LOG2E)


@triton.jit
def bent(x, EXACT: tl.constexpr):
    """tanh(x ln 2 / 2), to 2^-23 of 1; EXACT (fp32 operands): to some 2^-22 of itself, small ones too."""
    t = 1.0 - 2.0 / (1.0 + tl.exp2(x))
    if EXACT:
        y = x * (0.5 * _LN2)
        u = y * y
        series = 62.0 / 2835.0 - u * (1382.0 / 155925.0)
        series = 1.0 + u * (-1.0 / 3.0 + u * (2.0 / 15.0 + u * (-17.0 / 315.0 + u * series)))
        t = tl.where(tl.abs(y) < 0.4, y * series, t)
    return t


@triton.jit
def with_sink(acc, total, top, own):
    """A row's accumulator, sum and maximum with one more logit `own` (base 2) that brings no value."""
    base = tl.maximum(top, own)
    base = tl.where(base == float("-inf"), 0.0, base)
    decay = tl.exp2(top - base)
    return acc * decay[:, None], total * decay + tl.exp2(own - base), base


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-x * _LOG2E))


@triton.jit
def softplus(x):
    """log(1 + exp(x)), small ones to fp32's own accuracy."""
    e = tl.exp2(-tl.abs(x) * _LOG2E)
    return tl.maximum(x, 0.0) + tl.where(
        e < 0.0078125, e * (1.0 - e * (0.5 - e * (1.0 / 3.0))), tl.log2(1.0 + e) * _LN2
    )


@triton.jit
def load_gate(gate, batch, tokens, head, inside, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """[rows, BLOCK_D], or [rows, 1] where a head has one value, in fp32; `head` is one for all rows, or one a row."""
    at = batch.to(tl.int64) * gate[1] + tokens.to(tl.int64) * gate[2] + head.to(tl.int64) * gate[3]
    if len(gate) == 4:
        value = tl.load(gate[0] + at, mask=inside, other=0.0)[:, None]
    else:
        d = tl.arange(0, BLOCK_D)
        value = tl.load(
            gate[0] + at[:, None] + d[None, :] * gate[4], mask=inside[:, None] & (d < HEAD_DIM)[None, :], other=0.0
        )
    return value.to(tl.float32)


@triton.jit
def opened(value, FUNCTION: tl.constexpr):
    """What a gate multiplies the output by."""
    if FUNCTION == "sigmoid":
        return sigmoid(value)
    else:
        return softplus(value)


@triton.jit
def slope(value, FUNCTION: tl.constexpr):
    """f'(gate) / f(gate): times grad_out times the gated output it is the gate's gradient, and never divides by 0."""
    if FUNCTION == "sigmoid":
        return sigmoid(-value)
    else:
        f = softplus(value)
        return tl.where(f > 0, sigmoid(value) / tl.where(f > 0, f, 1.0), 1.0)
