"""How much of the host's memory a plan may pin: what says so, what a user says instead, and that the plan tells."""

import builtins
import io

import pytest
import torch
from command_line import seal
from families import FAMILIES

import seal_ops
from seal_ops.huggingface.modes import mode
from seal_ops.training.memory_plan import memory
from seal_ops.training.memory_plan.execution import INPUT, OFFLOADED
from seal_ops.training.memory_plan.planning import Planner
from seal_ops.training.memory_plan.simulation import expected

GIB = 2**30


@pytest.fixture
def host(monkeypatch):
    """Sets what the system's files say; None: there is no such file."""
    monkeypatch.delenv("SEAL_HOST_MEMORY", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    opened = builtins.open

    def say(available=None, limit=None, used=0, cached=0):
        files = {
            "/proc/meminfo": available and f"MemTotal: 9 kB\nMemAvailable: {available // 1024} kB\n",
            "/sys/fs/cgroup/memory.max": limit and f"{limit}\n",
            "/sys/fs/cgroup/memory.current": f"{used}\n",
            "/sys/fs/cgroup/memory.stat": f"anon 1\ninactive_file {cached}\n",
        }

        def open_(name, *args, **kwargs):
            if name not in files:
                return opened(name, *args, **kwargs)
            if files[name] is None:
                raise FileNotFoundError(name)
            return io.StringIO(files[name])

        monkeypatch.setattr(builtins, "open", open_)

    return say


def test_the_least_that_anything_says_and_what_says_it(host):
    host(available=20 * GIB)
    assert memory.host_memory() == memory.HostMemory(20 * GIB, "MemAvailable of /proc/meminfo")
    host(available=20 * GIB, limit="max")
    assert memory.host_memory().source == "MemAvailable of /proc/meminfo"
    host(available=20 * GIB, limit=16 * GIB, used=5 * GIB, cached=2 * GIB)
    assert memory.host_memory() == memory.HostMemory(
        13 * GIB, "memory.max of the control group in /sys/fs/cgroup"
    )  # fmt: skip


def test_what_the_user_says_counts_instead(host, monkeypatch):
    host(available=2 * GIB, limit=100 * GIB)
    monkeypatch.setenv("SEAL_HOST_MEMORY", "64.5")
    assert memory.host_memory() == memory.HostMemory(round(64.5 * GIB), "SEAL_HOST_MEMORY")
    assert memory.host_share() == memory.host_memory(), "all of it, as with memory="
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert memory.host_share() == memory.HostMemory(round(21.5 * GIB), "SEAL_HOST_MEMORY, for each of 3 processes")
    monkeypatch.setenv("SEAL_HOST_MEMORY", "")
    assert memory.host_share() == memory.HostMemory(
        round(2 * GIB // 3 * 0.92), "MemAvailable of /proc/meminfo, for each of 3 processes, less 8 %"
    )


@pytest.mark.parametrize("wrong", ["much", "0", "-1", "nan", "inf"])
def test_a_number_that_is_none(wrong, host, monkeypatch):
    monkeypatch.setenv("SEAL_HOST_MEMORY", wrong)
    model = FAMILIES["llama"].build()
    seal_ops.attach(model, "head")
    sentence = f"SEAL_HOST_MEMORY must be a number of GiB above 0, got '{wrong}'"
    for call in (lambda: seal_ops.plan(model, 64), lambda: seal_ops.train(model, [{"input_ids": [1, 2], "labels": [1, 2]}])):  # noqa: E501  # fmt: skip
        with pytest.raises(ValueError, match=sentence):
            call()


def test_the_command_says_so_too(capsys, monkeypatch):
    monkeypatch.setenv("SEAL_HOST_MEMORY", "much")
    code, _, err = seal(capsys, "plan", "--model", "models/seal-tiny", "--length", 64)
    assert code == 1 and "SEAL_HOST_MEMORY must be a number of GiB above 0, got 'much'" in err


@pytest.fixture
def planner(monkeypatch):
    """A plan for a GPU, whose costs were measured on this CPU."""
    model = FAMILIES["llama"].build(num_hidden_layers=30)
    seal_ops.attach(model, "channel")
    with mode(model, True):
        found = Planner(model, 300, 8)
        costs = {tile: found.measurement.costs(tile) for tile in (None,)}
        monkeypatch.setattr(found.measurement, "costs", lambda tile, plain=False: costs[tile])
        found.device = torch.device("cuda")
        monkeypatch.setattr(found, "_throughput", lambda: "none was measured here")
        yield found


def test_a_plan_says_when_the_hosts_memory_was_what_was_missing(planner, host, monkeypatch):
    costs, count = planner.measurement.costs(None), 30
    inputs, offloaded = (expected(costs, (what,) * count, 1, planner.trained) for what in (INPUT, OFFLOADED))
    assert offloaded.peak < inputs.peak and offloaded.host > 0
    host(available=4 * GIB)
    plan = planner._each(offloaded.peak, 0, None)
    assert OFFLOADED in plan.keeps and plan.fits and "SEAL_HOST_MEMORY" not in str(plan)
    host(available=offloaded.host // 3 // 1024 * 1024)
    refused = planner._each(offloaded.peak, 0, None)
    assert refused.group > plan.group == 1 and "passed over for the host's memory: its inputs would take" in str(
        refused
    )
    assert "available (MemAvailable of /proc/meminfo, less 8 %); SEAL_HOST_MEMORY=GIB says otherwise" in str(refused)
    monkeypatch.setenv("SEAL_HOST_MEMORY", "4")
    assert planner._each(offloaded.peak, 0, None).keeps == plan.keeps
    monkeypatch.delenv("SEAL_HOST_MEMORY")
    little = planner._each(1, 0, None)
    assert not little.fits and "SEAL_HOST_MEMORY" not in str(little), "the host's memory would not have helped"
