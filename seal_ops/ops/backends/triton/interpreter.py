"""Triton 3.6's interpreter turns one-element arrays into Python integers, which numpy 2.4 and later refuse
(https://github.com/triton-lang/triton/issues/9171, repaired in later releases). Loops over run-time bounds need it
repaired."""

import numpy
import triton
from triton.runtime import interpreter


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def repair() -> None:
    """Idempotent, and nothing where Triton or numpy do not need it."""
    original = interpreter._patch_lang_tensor
    if _version(triton.__version__) > (3, 6) or _version(numpy.__version__) < (2, 4) or hasattr(original, "repaired"):
        return

    def patch(tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    patch.repaired = True
    interpreter._patch_lang_tensor = patch
