"""The calls that are under way: what a library that calls ours did not pass on."""

import sys
import types
from collections.abc import Iterator


def callers() -> Iterator[types.FrameType]:
    """The frames of the calls that led here, the innermost first."""
    frame = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back
