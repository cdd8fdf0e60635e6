"""The loss of a training step, whose memory is that of the logits in their own dtype and a few rows in fp32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..tasks.sample import IGNORE_INDEX

_PIECE = 2**24  # fp32 numbers that are written out at once


class _SummedCrossEntropy(torch.autograd.Function):
    """Kept for the backward pass: the logits, as they are.  Their softmax is made again, some rows at a time."""

    @staticmethod
    def forward(ctx, logits, targets, piece):
        ctx.save_for_backward(logits, targets)
        ctx.rows = max(1, piece // logits.shape[-1])
        losses = [
            F.cross_entropy(rows.float(), aims, reduction="none", ignore_index=IGNORE_INDEX)
            for rows, aims in zip(logits.split(ctx.rows), targets.split(ctx.rows))
        ]
        return torch.cat(losses).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        logits, targets = ctx.saved_tensors
        found = torch.empty_like(logits)
        pieces = (logits.split(ctx.rows), targets.split(ctx.rows), found.split(ctx.rows))
        for rows, aims, out in zip(*pieces):
            part = rows.float().softmax(-1)
            counts = aims != IGNORE_INDEX
            part[torch.arange(len(aims), device=aims.device), aims.where(counts, 0)] -= 1
            out.copy_(part.mul_(grad * counts[:, None]))
        return found, None, None


def summed_cross_entropy(logits: Tensor, targets: Tensor, piece: int = _PIECE) -> Tensor:
    """The sum of the rows' cross entropies in fp32: logits [N, vocabulary], targets int64 [N], -100 for none.

    PyTorch's own keeps the logits in fp32, their logarithm and the gradients of both, 12 bytes a logit in all beside
    the 16-bit ones: with 4,096 labels and a vocabulary of 128,256 that is 6 GB, more than any layer of an 8B model.
    Here it is the gradient in the logits' dtype, and ``piece`` numbers in fp32 at a time.
    """
    return _SummedCrossEntropy.apply(logits, targets, piece)
