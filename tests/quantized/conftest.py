"""Shared by the tests of weak columns."""

import pytest
import torch


@pytest.fixture
def bitsandbytes():
    return pytest.importorskip("bitsandbytes")


@pytest.fixture
def token_ids():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 97, (length,), generator=generator).tolist() for length in (24, 24, 17, 24)]
