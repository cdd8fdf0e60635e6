"""Tests that need a GPU; run_all.sh runs them together with the shared suite. Without one they are skipped, not
passed."""

import fcntl
import os
import tempfile

import pytest
import torch

from seal_ops.ops.dispatch import why_not


def pytest_configure(config):
    config.pluginmanager.register(DeviceSurvives())


class DeviceSurvives:
    """A kernel's fault shows in the test that launched it, also in the shared tests. The process is of no use
    afterwards: a worker of pytest-xdist ends here, is reported with the test's name and replaced; without workers the
    session ends. One fault must not fail every test after it."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_teardown(self, item):
        if not torch.cuda.is_initialized():
            return
        try:
            torch.cuda.synchronize()
        except RuntimeError as fault:
            sentence = f"the device met a fault in {item.nodeid}: {str(fault).splitlines()[0]}"
            if "PYTEST_XDIST_WORKER" in os.environ:
                item.config.pluginmanager.getplugin("capturemanager").suspend_global_capture()
                os.write(2, f"{sentence}\n".encode())
                os._exit(1)
            pytest.exit(sentence, returncode=1)


def in_suite(item, suite: str) -> bool:
    """Whether a test is one of the backend `suite`; what has no backend in tests/gpu goes with cuda."""
    own = getattr(item, "callspec", None) and item.callspec.params.get("backend")
    if own is None:
        own = "triton" if "triton" in item.path.name else "cuda" if "gpu" in item.path.parts else None
    return own == suite


@pytest.hookimpl(trylast=True)  # after -k and -m
def pytest_collection_modifyitems(config, items):
    """SEAL_SUITE=cuda or triton keeps one backend's tests; SEAL_PART=i/n every n-th of those from the i-th on."""
    if "SEAL_SUITE" in os.environ:
        kept = [item for item in items if in_suite(item, os.environ["SEAL_SUITE"])]
        config.hook.pytest_deselected(items=[item for item in items if not in_suite(item, os.environ["SEAL_SUITE"])])
        items[:] = kept
    if "SEAL_PART" in os.environ:
        part, parts = map(int, os.environ["SEAL_PART"].split("/"))
        if not 1 <= part <= parts:
            raise pytest.UsageError(f"SEAL_PART must be i/n with 1 <= i <= n, got {os.environ['SEAL_PART']}")
        kept = items[part - 1 :: parts]
        config.hook.pytest_deselected(items=[item for n, item in enumerate(items) if n % parts != part - 1])
        items[:] = kept
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
def alone():
    """One such test at a time on a GPU, whatever worker runs it: tens of GB each."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].replace("/", "-")
    with open(os.path.join(tempfile.gettempdir(), f"seal-gpu-tests-{first}.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
        torch.cuda.empty_cache()


@pytest.fixture
def poisoned():
    """Every tensor that is allocated uninitialised holds NaN (integers: their largest value), workspaces included."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(5, device="cuda").isnan().all()
    yield
    torch.use_deterministic_algorithms(before)
