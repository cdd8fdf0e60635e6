"""Compiles the CUDA kernels with nvcc (no GPU needed) and reads what ptxas and the disassembly say of them.

Fails on any C75xx warning of ptxas (wgmma serialised, setmaxnreg ignored), on a register spill or a stack frame in a
kernel that uses the tensor cores, and where the forward's or the backward's disassembly holds no HGMMA (wgmma) or
decoding's no HMMA (mma.sync) at all. Prints seconds, registers and counts of both.
usage: python tests/check_cuda_build.py [--jobs N] [--keep DIR]
"""

import argparse
import concurrent.futures
import importlib.util
import os
import pathlib
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent


BUILD = runpy.run_path(
    str(ROOT / "setup.py")
)  # its functions and flags; the build starts only where it is the main program


def disassembler() -> str | None:
    """cuobjdump: on PATH, or the copy in Triton's wheel."""
    found = shutil.which("cuobjdump")
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None:
        inside = pathlib.Path(spec.submodule_search_locations[0]) / "backends/nvidia/bin/cuobjdump"
        found = str(inside) if inside.exists() else None
    return found


def kernels(ptxas: str) -> dict[str, dict[str, int]]:
    """Registers, stack, spills of every kernel, from `ptxas -v`."""
    found, name = {}, None
    for line in ptxas.splitlines():
        if m := re.search(r"Compiling entry function '(\S+)'", line):
            name = m[1]
        elif name and (
            m := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line)
        ):
            found[name] = {"stack": int(m[1]), "spills": int(m[2]) + int(m[3])}
        elif name and (m := re.search(r"Used (\d+) registers", line)):
            found.setdefault(name, {"stack": 0, "spills": 0})["registers"] = int(m[1])
    return found


def product_counts(dump: str, binary: pathlib.Path) -> dict[str, dict[str, int]]:
    """HGMMA and HMMA instructions of every kernel in the disassembly."""
    counts, name = {}, None
    text = subprocess.run([dump, "--dump-sass", str(binary)], capture_output=True, text=True, check=True).stdout
    for line in text.splitlines():
        if m := re.search(r"Function : (\S+)", line):
            name = m[1]
            counts[name] = {"HGMMA": 0, "HMMA": 0}
        elif name and (m := re.search(r"\b(HGMMA|HMMA)\.", line)):
            counts[name][m[1]] += 1
    return counts


def compile_one(source: str, flags: list[str], folder: pathlib.Path):
    binary = folder / (pathlib.Path(source).stem + ".o")
    start = time.time()
    done = subprocess.run(
        ["nvcc", "-c", *flags, "-Xcompiler", "-fPIC", "-Icsrc", "-o", str(binary), source],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return source, done, binary, time.time() - start


def link(folder: pathlib.Path) -> list[str]:
    """Links the objects as setup.py does and looks whose C++ runtime the library uses; returns the faults."""
    library = folder / "kernels.so"
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    done = subprocess.run(
        [*compiler, "-shared", "-o", str(library), *map(str, sorted(folder.glob("*.o"))), *BUILD["dynamic_runtime"]()],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        return [f"the kernels do not link: {done.stderr.strip()}"]
    found = BUILD["elf"]().read(library)
    print(f"C++ runtime of the linked kernels: {found}")
    return [found.fault] if found.own_std else []  # that they load none at all is no fault


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--keep", type=pathlib.Path, help="folder for the object files (default: a temporary one)")
    options = parser.parse_args()
    sources, flags = [path for path in BUILD["sources"]("cuda") if path.endswith(".cu")], BUILD["NVCC_FLAGS"]
    dump = disassembler()
    if dump is None:
        print("no cuobjdump here (it comes with CUDA and with Triton's wheel): products are not counted")
    failures, start = [], time.time()
    expected = {"sm90/attention_forward": "HGMMA", "sm90/attention_backward": "HGMMA", "sm90/attention_decode": "HMMA"}
    totals = dict.fromkeys(expected, 0)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or pathlib.Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
            for source, done, binary, seconds in pool.map(lambda s: compile_one(s, flags, folder), sources):
                print(f"{source}: {seconds:.1f} s")
                output = done.stdout + done.stderr
                if done.returncode:
                    failures.append(f"{source}: nvcc failed\n{output}")
                    continue
                failures += [
                    f"{source}: {line.strip()}" for line in output.splitlines() if re.search(r"\bC75\d\d\b", line)
                ]
                counts = product_counts(dump, binary) if dump else {}
                for name, used in kernels(output).items():
                    products = counts.get(name, {"HGMMA": 0, "HMMA": 0})
                    tensor_core = sum(products.values()) > 0
                    print(
                        f"  {used.get('registers', 0):3d} registers {used['spills']:4d} spilled bytes "
                        f"{products['HGMMA']:4d} HGMMA {products['HMMA']:4d} HMMA  {name[:110]}"
                    )
                    if tensor_core and (used["spills"] or used["stack"]):
                        failures.append(
                            f"{source}: {name}: {used['spills']} bytes spilled, {used['stack']} bytes of stack"
                        )
                for kind, instruction in expected.items():
                    totals[kind] += sum(c[instruction] for c in counts.values()) if kind in source else 0
        failures += link(folder)
    failures += [
        f"{kind}*.cu: not one {expected[kind]} in the disassembly" for kind, n in totals.items() if dump and n == 0
    ]
    print(f"{len(sources)} CUDA sources compiled in {time.time() - start:.0f} s with {options.jobs} jobs")
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
