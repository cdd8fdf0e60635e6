"""Work in pieces that fit into memory."""

import warnings
from collections.abc import Callable, Iterator, Sequence

import torch


def free_on_gpu(device: torch.device) -> int:
    """Bytes that this process can still allocate on a GPU, those that PyTorch holds unused among them."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


class Pieces:
    """Runs work on pieces of at most ``size`` items; where one does not fit into the GPU's memory, on halves from then
    on.

    Args:
        size: items of a piece at first.
        call: whose name the warnings bear.
    """

    def __init__(self, size: int, call: str):
        self.size, self.call = size, call

    def run(self, items: Sequence, work: Callable[[Sequence], object]) -> Iterator[tuple[Sequence, object]]:
        """Yields ``(piece, work(piece))`` in order. Raises what ``work`` raises, and OutOfMemoryError for a single
        item."""
        start = 0
        while start < len(items):
            piece = items[start : start + self.size]
            try:
                result = work(piece)
            except torch.OutOfMemoryError:
                if len(piece) == 1:
                    raise
                result = None
            if result is None:  # not inside `except`, which keeps the tensors of the failed call alive
                self.size = len(piece) // 2
                torch.cuda.empty_cache()
                warnings.warn(
                    f"{self.call}: {len(piece)} at once do not fit into the GPU's memory; going on with {self.size}",
                    stacklevel=3,
                )
                continue
            start += len(piece)
            yield piece, result
