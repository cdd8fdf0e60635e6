"""How much memory is free and in use, and how fast a device was measured to be.

All that asks CUDA's allocator stands here.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys

import torch

from ...utils.memory import free_on_gpu

# Left free of what a plan may use: for the allocator's gaps, and what operations allocate within themselves. A choice,
# not a measurement.
RESERVE = 0.08
HOST_MEMORY = "SEAL_HOST_MEMORY"  # GiB of the host's memory, in the place of what the system says


@dataclasses.dataclass(frozen=True)
class Throughput:
    """Operations a second in bf16, measured: of a large matrix product, and of our attention forward and backward.

    ``source``: the results that hold the figures: the matrix product of the run, Llama 3.1 8B's heads at 131,072
    tokens.
    """

    linear: float
    attention: float
    attention_backward: float
    source: str


THROUGHPUTS = {
    "NVIDIA H200": Throughput(776.4e12, 694.4466e12, 583.3932e12, "benchmarks/results/headline-h200-a22c778.json"),
}


def throughput_of(device: torch.device, dtype: torch.dtype) -> Throughput | str:
    """The figures of a device, or why there are none, as the end of a sentence after "because"."""
    if device.type != "cuda":
        return f"none was measured on a {device.type}"
    name = torch.cuda.get_device_name(device)
    if dtype != torch.bfloat16:
        return f"none was measured in {dtype}"
    return THROUGHPUTS.get(name, f"none was measured on a {name}")


def used(device: torch.device) -> int:
    """Bytes that this process has in use on a device."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # no Linux
        return 0


def begin_peak(device: torch.device) -> None:
    """From now on `peak` and `requested` count the peak anew; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> int:
    """Bytes in use at most: on a GPU since `begin_peak`, on the CPU since the process began (0: not known)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024


def requested(device: torch.device, peak: bool = False) -> int:
    """Bytes that were asked of CUDA's allocator, now or at most since `begin_peak`: without what it adds to a block.

    That is up to a MiB a block and depends on what was freed before, which short samples would take for growth.
    """
    torch.cuda.synchronize(device)
    stats = torch.cuda.memory_stats(device)
    if stats.get("requested_bytes.all.current", 0) == 0:  # another allocator, which does not count them
        return torch.cuda.max_memory_allocated(device) if peak else torch.cuda.memory_allocated(device)
    return stats[f"requested_bytes.all.{'peak' if peak else 'current'}"]


def give_back(device: torch.device) -> None:
    """Returns what PyTorch holds unused."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def free(device: torch.device) -> int:
    """Bytes that this process can still allocate on a device, those that PyTorch holds unused among them."""
    return free_on_gpu(device) if device.type == "cuda" else host_memory().bytes


@dataclasses.dataclass(frozen=True)
class HostMemory:
    """Bytes of the host's memory that are available to a process, and what says so."""

    bytes: int
    source: str


def host_memory() -> HostMemory:
    """What is available of the host's memory to the processes on it: the least that anything says, or what
    ``SEAL_HOST_MEMORY`` (GiB) does.

    A machine whose memory grows as it is used, as virtual ones do, has more than it says.

    Raises:
        ValueError: ``SEAL_HOST_MEMORY`` is no number above 0.
    """
    given = os.environ.get(HOST_MEMORY)
    if given:
        try:
            gib = float(given)
        except ValueError:
            gib = math.nan
        if not 0 < gib < math.inf:
            raise ValueError(f"seal_ops: {HOST_MEMORY} must be a number of GiB above 0, got {given!r}")
        return HostMemory(round(gib * 2**30), HOST_MEMORY)
    found = [one for one in (_system(), _group()) if one is not None]
    return min(found, key=lambda one: one.bytes, default=HostMemory(0, "nothing here says how much there is"))


def host_share() -> HostMemory:
    """Of `host_memory`, what each of the run's processes on this host may take, less the reserve."""
    processes, found = processes_here(), host_memory()
    parts = [found.source] + [f"for each of {processes} processes"] * (processes > 1)
    count = found.bytes // processes
    if found.source != HOST_MEMORY:
        parts.append(f"less {RESERVE:.0%}".replace("%", " %"))
        count = round(count * (1 - RESERVE))
    return HostMemory(count, ", ".join(parts))


def processes_here() -> int:
    """Processes of the run on this host, as torchrun says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or 1)


def _system() -> HostMemory | None:
    try:
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return HostMemory(int(line.split()[1]) * 1024, "MemAvailable of /proc/meminfo")
    except OSError:
        pass
    try:
        import psutil  # accelerate brings it
    except ImportError:
        return None
    return HostMemory(int(psutil.virtual_memory().available), "psutil")


def _group() -> HostMemory | None:
    """What is left of the limit of the process's control group, as containers set one."""
    folder = "/sys/fs/cgroup"
    try:
        with open(f"{folder}/memory.max") as file:
            limit = file.read().strip()
        with open(f"{folder}/memory.current") as file:
            current = int(file.read())
        with open(f"{folder}/memory.stat") as file:  # caches of files make way
            cached = sum(int(v) for k, v in map(str.split, file) if k == "inactive_file")
    except (OSError, ValueError):
        return None
    if limit == "max":
        return None
    return HostMemory(max(0, int(limit) - current + cached), f"memory.max of the control group in {folder}")
