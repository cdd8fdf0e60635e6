"""Fixtures of the tests of the integration with transformers."""

import pytest
import torch

from seal_ops.huggingface import attention as attention_module
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
    """The names of what the patched model calls for an attention, in order."""
    names = []
    for module, name in (
        (attention_module, "attention"),
        (attention_module, "rope"),
        (rotation, "rope"),
        (attention_module, "rope_attention"),
        (attention_module, "_composed"),
    ):

        def spy(*args, _name=name, _function=getattr(module, name), **kwargs):  # noqa: B008
            names.append(_name + ("-packed" if kwargs.get("cu_seqlens") is not None else ""))
            return _function(*args, **kwargs)

        monkeypatch.setattr(module, name, spy)
    return names
