"""Scales that are powers of two, from the bits of a row's largest value."""

import torch

FORMAT = torch.float8_e4m3fn
EXPONENT, MOST = 23, 254  # of fp32: where its exponent's bits begin, and the largest exponent of a finite number
# 448, the largest value of e4m3, is 1.75 * 2^8: a mantissa above 1.75 needs one more power of two.
ABOVE, POWER = (1 << EXPONENT) - 1 - 0x600000, 8
