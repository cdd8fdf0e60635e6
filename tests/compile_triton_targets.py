"""Compiles every Triton kernel and every tile of configs.py for GPUs that are not here, and checks what they need
against what those have: shared memory of a block, registers, tensor memory. No device is needed.

usage: compile_triton_targets.py [--arch 80 86 ...] [--quick] [--chosen] [--jobs N] [--markdown FILE]

The kernels' own host code makes the launches, with CPU tensors and a driver that only names a target: what is compiled
is what a call would compile. Exit code 1 where none of a kernel's tiles fits.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import os
import re
import subprocess
import sys
import tempfile

# Bytes of shared memory that a block may ask for (CUDA programming guide, technical specifications by compute
# capability).
SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
NAMES = {80: "A100", 86: "RTX 30", 89: "RTX 40, L4", 90: "H100, H200", 100: "B200", 120: "RTX 50"}
REGISTERS = 64 << 10  # of a multiprocessor: a block that needs more does not start
HEAD_DIMS = (32, 64, 128, 256)
TILED = ("_forward", "_dkdv", "_dq", "_split")  # kernels whose tiles configs.py lists


@dataclasses.dataclass
class Use:
    """What one compiled kernel needs: bytes of shared memory, registers and bytes of spilled stack a thread."""

    arch: int
    kernel: str
    dtype: str
    head_dim: int
    variant: str
    tile: tuple | None
    number: int
    shared: int
    warps: int
    registers: int = 0
    stack: int = 0
    problem: str = ""

    def __str__(self) -> str:
        tile = "" if self.tile is None else "{}x{} w{} s{}".format(*self.tile[:4])
        return (
            f"sm_{self.arch} {self.kernel} {self.dtype} head_dim {self.head_dim} {self.variant} {tile}: "
            f"{self.shared / 1024:.1f} KB shared, {self.registers} registers, {self.stack} B stack"
            + (f"; {self.problem}" if self.problem else "")
        )


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes of a thread, as cuobjdump reads them from the compiled code."""
    import triton.backends.nvidia

    tool = os.path.join(os.path.dirname(triton.backends.nvidia.__file__), "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", said).groups()
    return int(registers), int(stack)


class Recorder:
    """Stands in for the driver and for the launches; keeps what every launch would have needed."""

    def __init__(self, arch: int, chosen_only: bool = False):
        from triton.backends.compiler import GPUTarget
        from triton.runtime import driver
        from triton.runtime.jit import JITFunction

        from seal_ops.ops.backends.triton.host import products_from_shared_memory

        self.target, self.arch, self.chosen_only = GPUTarget("cuda", arch, 32), arch, chosen_only
        self.found: list[Use] = []
        self.where = dict(kernel="", dtype="", head_dim=0, variant="", tile=None, number=0)
        driver.set_active(self)
        compiled = lambda kernel, grid, *a, **k: self.record(kernel, kernel.run(*a, grid=grid, warmup=True, **k))
        JITFunction.__getitem__ = lambda kernel, grid: functools.partial(compiled, kernel, grid)
        os.environ["SEAL_TRITON_TMA"] = "1" if products_from_shared_memory(arch // 10) else "0"

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.arch  # another device for every target: Triton caches by device

    def get_current_stream(self, device):
        return 0

    def record(self, kernel, compiled):
        metadata = compiled.metadata
        name = kernel.fn.__name__
        where = {**self.where, **({} if name in TILED else dict(kernel=name, tile=None, number=0))}
        use = Use(self.arch, **where, shared=metadata.shared, warps=metadata.num_warps)
        use.registers, use.stack = resources(compiled.asm["cubin"])
        if metadata.shared > SHARED[self.arch]:
            use.problem = f"more shared memory than {SHARED[self.arch] >> 10} KB"
        elif use.registers * 32 * metadata.num_warps > REGISTERS:
            use.problem = f"more registers than {REGISTERS}"
        elif (getattr(metadata, "tmem_size", None) or 0) > 512:
            use.problem = "more tensor memory than 512 columns"
        self.found.append(use)

    def choose(self, kernel: str, like, launch, size=None):
        """What configs.choose does, with every tile, or up to the one that is taken."""
        from seal_ops.ops.backends.triton import configs, host

        every = configs.tiles(kernel, like.element_size(), like.shape[-1], host.uses_tma(like))
        for number, tile in enumerate(every):
            self.where |= dict(kernel=kernel, tile=dataclasses.astuple(tile), number=number)
            before = len(self.found)
            launch(tile)
            if self.chosen_only and not any(use.problem for use in self.found[before:]):
                return tile
        return every[0]


UNBOUNDED = 1 << 30
TERMS = ("sink", "gate", "softcap")
HEAD_TERMS = ("sink", "head gate", "softcap")  # one gate a head
# name: scale, packed (with a gradient into the log-sum-exp and, where no sink or gate forbids it, a per-row offset),
# window, mask, block lists, and what goes with the softmax
VARIANTS = {
    "plain": (False, False, None, None, False, ()),
    "scaled": (True, False, None, None, False, ()),
    "packed": (True, True, 100, None, False, ()),
    "sinks": (True, False, None, [-99, 0, 0, -UNBOUNDED, UNBOUNDED, 0, UNBOUNDED, 4], False, ()),
    "shifted": (True, True, None, [-UNBOUNDED, 0, 64, 0, 0, 32, 4, 2], False, ()),
    "listed": (True, False, None, None, True, ()),
    "capped": (True, False, 100, None, False, ("softcap",)),
    "terms": (True, True, 100, None, False, TERMS),
    "head gate": (True, True, 100, None, False, HEAD_TERMS),
}


def compile_for(
    arch: int, dtype: str, head_dim: int, variant: str, forward_only: bool = False, chosen_only: bool = False
) -> list[Use]:
    """All kernels of a forward, a backward with rotary embedding and of decoding, every tile or up to the taken one."""
    os.environ.pop("TRITON_INTERPRET", None)
    import torch

    from seal_ops.ops.backends.triton import backward, decode, forward, merge, rotary
    from seal_ops.ops.backends.triton.host import Geometry

    recorder = Recorder(arch, chosen_only)
    forward.choose = backward.choose = decode.choose = recorder.choose
    recorder.where |= dict(dtype=dtype, head_dim=head_dim, variant=variant)
    scaled, packed, window, mask, listed, terms = VARIANTS[variant]

    def tensors(tokens, keys=256):
        shape = lambda s, h: (2 * s, h, head_dim) if packed else (2, s, h, head_dim)
        return [torch.zeros(shape(*size), dtype=getattr(torch, dtype)) for size in ((tokens, 8), (keys, 2), (keys, 2))]

    lengths = lambda n: torch.tensor([0, n, 2 * n], dtype=torch.int32) if packed else None
    scale = torch.zeros(8, head_dim) if scaled else None
    offset = torch.zeros(2, 8, head_dim) if packed and not terms else None
    q, k, v = tensors(256)
    arguments = dict(window=window, mask=mask, cu_seqlens=lengths(256))
    if listed:
        arguments |= dict(blocks=torch.ones(1, 8, 2, 2, dtype=torch.bool), block_size=128)

    def gate_of(queries):
        """A gate for every channel, for every head, or none."""
        found = [queries if t == "gate" else queries[..., :1].contiguous() for t in terms if "gate" in t]
        return found[0] if found else None

    given = dict(sink=torch.zeros(8), softcap=50.0)
    arguments |= {name: given[name] for name in terms if name in given} | dict(gate=gate_of(q))
    out, lse = forward.attention(q, k, v, scale, offset, **arguments)
    if forward_only:
        return recorder.found
    grad_lse = lse if packed else None
    needs = (True, True, True, scale is not None, offset is not None, True, True)
    backward.attention_backward(q, grad_lse, q, k, v, out, lse, scale, offset, needs=needs, **arguments)
    table = torch.zeros(512, head_dim // 2)
    rotary.rope(q, k, table, table)
    merge.merge_attention([out] * 3, [lse] * 3)
    merge.merge_attention_backward(q, lse, [out] * 3, [lse] * 3)
    for tokens, splits in ((1, 4), (8, 4), (16, 4)):  # times four heads of a group: 16, 32 and 64 rows
        q, k, v = tensors(tokens)
        out, lse = torch.empty_like(q), torch.empty(q.shape[:-1])
        cap = arguments.get("softcap")
        geometry = Geometry.of(q, k, None, True, window, mask, lengths(tokens), lengths(256), cap)
        after = dict(sink=arguments.get("sink"), gate=gate_of(q))
        decode.attention(q, k, v, scale, offset, out, lse, geometry, tokens, splits, **after)
    return recorder.found


def failures(found: list[Use]) -> list[str]:
    """A sentence for every kernel none of whose tiles fits, and for every helper that does not."""
    groups: dict[tuple, list[Use]] = {}
    for use in found:
        groups.setdefault((use.arch, use.kernel, use.dtype, use.head_dim, use.variant), []).append(use)
    return [f"no tile fits: {uses[0]}" for uses in groups.values() if all(use.problem for use in uses)]


def chosen(found: list[Use]) -> list[Use]:
    """Of every kernel, variant and target the first tile that fits."""
    best: dict[tuple, Use] = {}
    for use in found:
        key = (use.arch, use.kernel, use.dtype, use.head_dim, use.variant)
        if not use.problem and (key not in best or use.number < best[key].number):
            best[key] = use
    return list(best.values())


def markdown(found: list[Use]) -> str:
    """The table of docs/kernel_notes_triton.md: the chosen tile by kernel and target, its largest need over the
    variants."""
    archs = sorted({use.arch for use in found})
    heads = ["kernel, dtype, head_dim", *(f"sm_{a} ({NAMES[a]})" for a in archs)]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    rows: dict[tuple, dict[int, list[Use]]] = {}
    for use in chosen(found):
        if use.tile is not None:
            rows.setdefault((use.kernel, use.dtype, use.head_dim), {}).setdefault(use.arch, []).append(use)
    for (kernel, dtype, head_dim), cells in rows.items():
        line = [f"{kernel} {dtype} {head_dim}"]
        for arch in archs:
            uses = cells.get(arch, [])
            if not uses:
                line.append("–")
                continue
            tiles = sorted({use.tile[:4] for use in uses})
            needs = f"{max(u.shared for u in uses) / 1024:.0f} KB, {max(u.registers for u in uses)} r"
            if stack := max(u.stack for u in uses):
                needs += f", {stack} B stack"
            line.append(f"{' / '.join('{}×{} w{} s{}'.format(*t) for t in tiles)}: {needs}")
        lines.append("| " + " | ".join(line) + " |")
    return "\n".join(lines) + "\n"


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", default=sorted(SHARED), choices=sorted(SHARED))
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--head-dim", type=int, nargs="+", default=HEAD_DIMS)
    parser.add_argument("--variant", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument(
        "--quick", action="store_true", help="the forward alone, bf16, head_dim 64, sm_80 and sm_120: seconds"
    )
    parser.add_argument("--chosen", action="store_true", help="of each kernel's tiles only up to the first that fits")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--markdown", help="writes the table of what is chosen")
    parser.add_argument("--all", action="store_true", help="prints every tile, not only what does not fit or spills")
    options = parser.parse_args(argv)
    work = [
        (arch, dtype, head_dim, variant, False, options.chosen)
        for dtype in options.dtype
        for variant in (options.variant if dtype != "float32" else options.variant[:1])
        for head_dim in options.head_dim
        for arch in options.arch
    ]
    if options.quick:
        work = [(arch, "bfloat16", 64, variant, True) for arch, variant in ((80, "terms"), (120, "head gate"))]
    found: list[Use] = []
    with concurrent.futures.ProcessPoolExecutor(options.jobs) as pool:
        for part in concurrent.futures.as_completed([pool.submit(compile_for, *item) for item in work]):
            found += part.result()
            for use in part.result():
                if options.all or use.problem or use.stack:
                    print(use, flush=True)
    wrong = failures(found)
    spilling = sum(use.stack > 0 for use in chosen(found))
    targets = ", ".join(f"sm_{arch}" for arch in sorted({use.arch for use in found}))
    too_big = sum(bool(use.problem) for use in found)
    print(
        f"{len(found)} kernels compiled for {targets}; {too_big} do not fit and give way to the next tile; "
        f"{spilling} of those chosen use stack"
    )
    print(*wrong, sep="\n")
    if options.markdown:
        with open(options.markdown, "w", encoding="utf-8") as file:
            file.write(markdown(found))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
