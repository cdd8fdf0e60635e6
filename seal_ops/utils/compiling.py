"""Marks for torch.compile that cost nothing where nothing is compiled."""

from collections.abc import Callable


def constant(function: Callable) -> Callable:
    """`torch.compiler.assume_constant_result`: a trace takes what the function returns then for good.

    torch's own imports the compiler, and with it Triton, as soon as a function is marked; this sets the same mark.
    """
    function._dynamo_marked_constant = True
    return function
