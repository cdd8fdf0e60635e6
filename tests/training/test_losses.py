"""The loss of a training step beside PyTorch's own: the same numbers, and far less memory."""

import pytest
import torch
import torch.nn.functional as F

from seal_ops.training.losses import summed_cross_entropy


def drawn(dtype, rows=37, vocabulary=50):
    logits = (4 * torch.randn(rows, vocabulary)).to(dtype).requires_grad_()
    targets = torch.randint(0, vocabulary, (rows,))
    targets[::5] = -100
    return logits, targets


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("piece", [1, 150, 2**24])
def test_is_pytorchs(dtype, piece):
    """Value and gradient, in pieces of one row, of three and of all, with rows that have no target."""
    logits, targets = drawn(dtype)
    expected = F.cross_entropy(logits.float(), targets, reduction="sum")
    found = summed_cross_entropy(logits, targets, piece)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)
    (wanted,) = torch.autograd.grad(expected / 7, logits)
    (got,) = torch.autograd.grad(found / 7, logits)
    assert got.dtype == dtype and not got[::5].any()
    torch.testing.assert_close(got, wanted, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-7)


def test_all_rows_without_a_target():
    logits, targets = drawn(torch.float32)
    loss = summed_cross_entropy(logits, torch.full_like(targets, -100))
    assert float(loss) == 0 and not torch.autograd.grad(loss, logits)[0].any()


def test_keeps_the_logits_alone():
    """What is kept, and what the largest operation writes, in bytes."""
    rows, vocabulary, piece = 64, 1000, 4000
    logits = torch.randn(rows, vocabulary, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(0, vocabulary, (rows,))
    kept, written = [], []

    class Written(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            written.extend(t.nbytes for t in (out if isinstance(out, (tuple, list)) else [out]) if torch.is_tensor(t))
            return out

    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = summed_cross_entropy(logits, targets, piece)
    assert sum(t.nbytes for t in kept) == logits.nbytes + targets.nbytes
    with Written():
        summed_cross_entropy(logits.detach().requires_grad_(), targets, piece).backward()
    assert max(written) == logits.nbytes, "the gradient, in 16 bits; no fp32 tensor of all rows"
    del loss
