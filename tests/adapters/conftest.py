"""Shared by the tests of adapters."""

import pytest
import torch
from families import FAMILIES, randomise

import seal_ops


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


@pytest.fixture
def saved(tmp_path):
    """A folder with an adapter for the family "llama"."""
    scales = seal_ops.attach(FAMILIES["llama"].build(), "channel")
    randomise(scales)
    scales.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"
