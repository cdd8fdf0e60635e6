"""Build of seal_ops: pure Python, or with the C++ extension, or with the CUDA kernels; see "Installation" in README.md.

What is built is decided by the tools at hand, never by a visible GPU:
  SEAL_BUILD_EXT   auto (default: where torch and a C++ compiler are), 0, 1 (fail where it cannot be built)
  SEAL_BUILD_CUDA  auto (default: where nvcc and a CUDA build of torch are), 0, 1 (fail where it cannot be built)
  MAX_JOBS         parallel compilations (ninja)
The list of sources is csrc/sources.txt, which CMakeLists.txt reads too.
"""
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = pathlib.Path(__file__).resolve().parent
ARCHITECTURES = ("90a",)
NVCC_FLAGS = ["-O3", "-std=c++17", "-lineinfo", "--expt-relaxed-constexpr", "-Xptxas", "-v", "-DNDEBUG",
              *(f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES)]


def sources(*kinds: str) -> list[str]:
    """Paths of the named kinds (cpp, cuda) from csrc/sources.txt."""
    lines = (line.split() for line in (ROOT / "csrc" / "sources.txt").read_text().splitlines()
             if line.strip() and not line.startswith("#"))
    return [f"csrc/{path}" for kind, path in lines if kind in kinds]


def wanted(name: str, missing: str | None) -> bool:
    """Whether to build a part: its variable says 0 or 1, or auto looks at what is missing."""
    choice = os.environ.get(name, "auto")
    if choice not in ("auto", "0", "1"):
        sys.exit(f"seal_ops build: {name} must be auto, 0 or 1, got {choice!r}")
    if choice == "1" and missing:
        sys.exit(f"seal_ops build: {name}=1, but {missing}")
    if choice == "auto" and missing:
        print(f"seal_ops build: {name}=auto leaves this part out: {missing}", file=sys.stderr)
    return choice == "1" or (choice == "auto" and not missing)


def missing_for_extension() -> str | None:
    # pip's isolated build hides the environment's packages. The extension has to be compiled against the very torch that
    # will run it, so that one is looked up where this interpreter installs; a private copy could only be the wrong one.
    if importlib.util.find_spec("torch") is None:
        sys.path += [path for path in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}]
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed in this environment (install it before seal_ops to get the extension)"
    if not any(shutil.which(c) for c in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        return "no C++ compiler was found"
    return None


def missing_for_cuda() -> str | None:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    nvcc = shutil.which("nvcc") or (CUDA_HOME and shutil.which("nvcc", path=os.path.join(CUDA_HOME, "bin")))
    if not nvcc:
        return "nvcc was not found (put it on PATH or set CUDA_HOME)"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    found = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", found)
    if not release or (int(release[1]), int(release[2])) < (12, 8):
        return f"nvcc must be 12.8 or newer, got {release.group(0) if release else 'an unknown version'}"
    return None


def extension() -> dict:
    """Arguments of setup() that build the extension, or none."""
    if not wanted("SEAL_BUILD_EXT", missing_for_extension()):
        return {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    cxx = ["-O2", "-std=c++20", "-Wall", "-Wno-unknown-pragmas"]
    if wanted("SEAL_BUILD_CUDA", missing_for_cuda()):
        cxx += ["-DSEAL_WITH_CUDA", f'-DSEAL_CUDA_ARCHITECTURES="{",".join("sm_" + a for a in ARCHITECTURES)}"']
        # torch adds -gencode flags of its own for the visible GPU unless a list is given; ours say everything.
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "9.0a")
        module = CUDAExtension("seal_ops._C", sources("cpp", "cuda"), include_dirs=[str(ROOT / "csrc")],
                               extra_compile_args={"cxx": cxx, "nvcc": NVCC_FLAGS})
    else:
        module = CppExtension("seal_ops._C", sources("cpp"), include_dirs=[str(ROOT / "csrc")], extra_compile_args=cxx)
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildExtension}}


class BuildPython(build_py):
    """Puts the schema file beside the package, where the pure-Python build reads it."""

    def run(self):
        super().run()
        target = pathlib.Path(self.build_lib) / "seal_ops" / "ops"
        if not getattr(self, "editable_mode", False):
            target.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / "csrc" / "schemas.inc", target / "schemas.inc")


arguments = extension()
arguments.setdefault("cmdclass", {})["build_py"] = BuildPython
setup(**arguments)
