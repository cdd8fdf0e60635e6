"""Shared by all tests: backends as a parameter, devices, and Triton's interpreter where there is no GPU."""

import os

# Before CUDA counts its devices: every worker's first GPU is another.
if "SEAL_GPUS" in os.environ and "PYTEST_XDIST_WORKER" in os.environ:
    gpus = os.environ["SEAL_GPUS"].split(",")
    turn = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw")) % len(gpus)
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[turn:] + gpus[:turn])

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", min(2, os.cpu_count() or 1))))
os.environ.setdefault("SEAL_TRITON_AUTOTUNE", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402
from devices import device_of  # noqa: E402

from seal_ops.ops.dispatch import NAMES, why_not  # noqa: E402


@pytest.fixture(params=NAMES)
def backend(request) -> str:
    """Every backend in turn; skipped with the library's own sentence where it cannot run."""
    reason = why_not(request.param, "attention", device_of(request.param), torch.float16, 64)
    if reason:
        pytest.skip(reason)
    return request.param


@pytest.fixture
def device(backend) -> torch.device:
    return device_of(backend)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
