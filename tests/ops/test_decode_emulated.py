"""The CUDA kernels of decoding without a GPU: their source on the CPU, warps, barriers and copies emulated.

The arithmetic, every index and the order of waits and copies are those of csrc/; what is not seen is the hardware
(tests/gpu). Skipped where there is no C++ compiler or no CUDA toolkit, whose headers the source includes.
"""

import pathlib
import re
import shutil
import subprocess

import pytest

HERE = pathlib.Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"


def toolkit() -> pathlib.Path | None:
    """The include folder of the CUDA toolkit."""
    nvcc = shutil.which("nvcc")
    folders = ([pathlib.Path(nvcc).resolve().parents[1]] if nvcc else []) + [pathlib.Path("/usr/local/cuda")]
    return next((f / "include" for f in folders if (f / "include/cuda_bf16.h").exists()), None)


pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or toolkit() is None, reason="needs g++ and the CUDA toolkit's headers"
)


def emulated_source(folder: pathlib.Path) -> pathlib.Path:
    """A copy of csrc/cuda in which the emulator stands for the PTX wrappers."""
    shutil.copytree(CSRC / "cuda", folder / "cuda")
    sm90 = folder / "cuda/sm90"
    constants = re.findall(r"^constexpr float k\w+ = .*;", (sm90 / "ptx.cuh").read_text(), re.M)
    (sm90 / "constants.h").write_text("#pragma once\nnamespace seal::sm90 {\n" + "\n".join(constants) + "\n}\n")
    for file in ("fibers.h", "ptx.cuh", "tma.cuh", "wgmma.cuh"):
        shutil.copyfile(HERE / "emulator" / file, sm90 / file)
    for file, pattern, replacement in (
        ("mma.cuh", r"// c\[4\] \+= a.*?(?=// Addresses of a tile)", ""),  # in the emulator's ptx.cuh
        ("decode_kernel.cuh", r"extern __shared__ [^;]* memory\[\];", "uint8_t* memory = emulator::shared_memory;"),
    ):
        text, count = re.subn(pattern, replacement, (sm90 / file).read_text(), flags=re.S)
        assert count == 1, f"{file} no longer has the text that the emulator takes out"
        (sm90 / file).write_text(text)
    shutil.copyfile(HERE / "emulator/decode.cpp", folder / "decode.cpp")
    return folder


def test_the_kernels_agree_with_fp64_whatever_the_order_of_their_threads(tmp_path):
    source = emulated_source(tmp_path)
    subprocess.run(
        [
            "g++",
            "-std=c++17",
            "-O1",
            "-w",
            f"-I{toolkit()}",
            f"-I{source}",
            "-o",
            source / "decode",
            source / "decode.cpp",
        ],
        check=True,
    )
    done = subprocess.run([source / "decode"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("right") == 24
