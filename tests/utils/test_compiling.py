import torch

from seal_ops.utils.compiling import constant


def test_the_mark_is_torchs_own():
    ours, theirs = constant(lambda: 1), torch.compiler.assume_constant_result(lambda: 1)
    assert vars(ours) == vars(theirs) != {}
