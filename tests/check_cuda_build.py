"""Compiles the CUDA kernels with nvcc (no GPU needed) and reads what ptxas and the disassembly say of them.

Fails on any C75xx warning of ptxas (wgmma serialised, setmaxnreg ignored), on a register spill or a stack frame in any
kernel, on more registers than REGISTERS has for it, where the forward's or the backward's disassembly holds no HGMMA
(wgmma) or decoding's no HMMA (mma.sync) at all, and where the forward's softmax is not in the order that after()
(csrc/cuda/sm90/softmax.cuh) forces on ptxas. Prints seconds, registers and counts of both.
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

# Most registers a thread, by a pattern of the mangled name; the first that fits counts. The kernels with wgmma start
# with an equal share for all warpgroups (setmaxnreg moves it); of the others as many thread blocks must fit a
# multiprocessor as their launch bounds say.
REGISTERS = [
    (r"attention_forwardI.*ForwardConfigI\w+?Li64ELi128ELi3E", 128),  # four warpgroups
    (r"attention_forwardI", 168),
    (r"attention_backward_(main|wide|query)I", 168),
    (r"attention_backward_rowsI.*Lb1E", 80),  # with a scale
    (r"attention_backward_rowsI", 64),
    (r"attention_backward_tilesI", 128),
    (r"attention_backward_sumI", 32),
    (r"attention_decode_combineI", 32),
    (r"attention_decodeI", 255),
    (r"rope_kernelI", 96),
]

# Exponentials between the forward's wait for S' and its wait for P V: in every step, in the step of the unmasked loop
# (the best), and before K is released. Without after() and the release that depends on a score: 0, 13 and 0.
LEAST_EXPONENTIALS, LEAST_IN_LOOP, LEAST_BEFORE_RELEASE = 7, 14, 5

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


def disassembly(dump: str, binary: pathlib.Path) -> dict[str, list[str]]:
    """The instructions of every kernel."""
    found, name = {}, None
    text = subprocess.run([dump, "--dump-sass", str(binary)], capture_output=True, text=True, check=True).stdout
    for line in text.splitlines():
        if m := re.search(r"Function : (\S+)", line):
            name = m[1]
            found[name] = []
        elif name and (m := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line)):
            found[name].append(m[1])
    return found


def product_counts(instructions: list[str]) -> dict[str, int]:
    """HGMMA and HMMA instructions."""
    return {kind: sum(bool(re.search(rf"\b{kind}\.", i)) for i in instructions) for kind in ("HGMMA", "HMMA")}


def register_fault(name: str, used: dict[str, int]) -> str | None:
    """Why the registers of a kernel are wrong; None where they are not."""
    if used["spills"] or used["stack"]:
        return f"{used['spills']} bytes spilled, {used['stack']} bytes of stack"
    limit = next((most for pattern, most in REGISTERS if re.search(pattern, name)), None)
    if limit is None:
        return "no entry in REGISTERS"
    return f"{used['registers']} registers, at most {limit} expected" if used["registers"] > limit else None


def softmax_steps(instructions: list[str]) -> list[tuple[int, int | None]]:
    """Of each step of the forward: exponentials between its two waits for products, and before K is released there."""
    steps, exponentials, released = [], None, None
    for instruction in instructions:
        if "WARPGROUP.DEPBAR.LE gsb0, 0x1" in instruction:
            exponentials, released = 0, None
        elif exponentials is None:
            continue
        elif "WARPGROUP.DEPBAR.LE gsb0, 0x0" in instruction:
            steps.append((exponentials, released))
            exponentials = None
        elif "MUFU.EX2" in instruction:
            exponentials += 1
        elif "SYNCS.ARRIVE" in instruction:
            released = exponentials
    return steps


def order_fault(instructions: list[str]) -> str | None:
    """Why the order of the forward's softmax is not the forced one; None where it is."""
    steps = softmax_steps(instructions)
    if not steps or any(released is None for _, released in steps):
        return f"no step with two waits for products and a release of K between them, of {len(steps)}"
    least, most = min(count for count, _ in steps), max(count for count, _ in steps)
    before = min(released for _, released in steps)
    if least >= LEAST_EXPONENTIALS and most >= LEAST_IN_LOOP and before >= LEAST_BEFORE_RELEASE:
        return None
    return (
        f"exponentials before the wait for P V: {least} to {most} a step, {before} before K is released; expected at "
        f"least {LEAST_EXPONENTIALS}, {LEAST_IN_LOOP} in the loop and {LEAST_BEFORE_RELEASE}"
    )


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
                code = disassembly(dump, binary) if dump else {}
                for name, used in kernels(output).items():
                    products = product_counts(code.get(name, []))
                    print(
                        f"  {used.get('registers', 0):3d} registers {used['spills']:4d} spilled bytes "
                        f"{products['HGMMA']:4d} HGMMA {products['HMMA']:4d} HMMA  {name[:110]}"
                    )
                    fault = register_fault(name, used)
                    if (
                        fault is None and code and re.search(r"attention_forwardI.*MaskingE0", name)
                    ):  # the band's, as measured
                        fault = order_fault(code[name])
                    if fault:
                        failures.append(f"{source}: {name}: {fault}")
                    for kind, instruction in expected.items():
                        totals[kind] += products[instruction] if kind in source else 0
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
