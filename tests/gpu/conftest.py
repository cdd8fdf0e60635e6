"""Tests that need a GPU; run_all.sh runs them together with the shared suite. Without one they are skipped, not passed."""
import os

import pytest
import torch

from seal_ops.backends import why_not


def pytest_configure(config):
    config.addinivalue_line("markers", "xdist_group(name): tests of a group run one after another in one worker of pytest-xdist")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.path.parts:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(params=("cuda", "triton"))
def backend(request) -> str:
    """The backends with kernels of their own; skipped with the library's own sentence where one cannot run."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    reason = why_not(request.param, "attention", torch.device("cuda", 0), torch.bfloat16, 64)
    if reason:
        pytest.skip(reason)
    return request.param


@pytest.fixture
def device(backend) -> torch.device:
    return torch.device("cuda", 0)


@pytest.fixture
def poisoned():
    """Every tensor that is allocated uninitialised holds NaN (integers: their largest value), workspaces included."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(5, device="cuda").isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def _device_survives():
    """A kernel's fault shows in the test that launched it. The process is of no use afterwards: a worker of pytest-xdist ends
    here, is reported with the test's name, and is replaced, so that one fault does not fail every test after it."""
    yield
    if torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            if "PYTEST_XDIST_WORKER" in os.environ:
                os._exit(1)
            raise
