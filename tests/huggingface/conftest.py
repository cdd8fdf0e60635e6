"""Fixtures of the seam's tests."""

import pytest
import torch

from seal_ops.huggingface import attention as seam
from seal_ops.huggingface import rotation


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """A second thread only waits on matrices this small; on a busy machine it waits long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def called(monkeypatch) -> list[str]:
    """The names of what the seam calls for an attention, in order."""
    names = []
    for module, name in (
        (seam, "attention"),
        (seam, "rope"),
        (rotation, "rope"),
        (seam, "rope_attention"),
        (seam, "_composed"),
    ):

        def spy(*args, _name=name, _function=getattr(module, name), **kwargs):  # noqa: B008
            names.append(_name + ("-packed" if kwargs.get("cu_seqlens") is not None else ""))
            return _function(*args, **kwargs)

        monkeypatch.setattr(module, name, spy)
    return names
