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
import shlex
import shutil
import subprocess
import sys
import sysconfig

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = pathlib.Path(__file__).resolve().parent
ARCHITECTURES = ("90a",)
NVCC_FLAGS = [
    "-O3",
    "-std=c++17",
    "-lineinfo",
    "--expt-relaxed-constexpr",
    "-Xptxas",
    "-v",
    "-DNDEBUG",
    *(f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES),
]


def sources(*kinds: str) -> list[str]:
    """Paths of the named kinds (cpp, cuda) from csrc/sources.txt."""
    lines = (
        line.split()
        for line in (ROOT / "csrc" / "sources.txt").read_text().splitlines()
        if line.strip() and not line.startswith("#")
    )
    return [f"csrc/{path}" for kind, path in lines if kind in kinds]


def chosen(name: str) -> str:
    choice = os.environ.get(name, "auto")
    if choice not in ("auto", "0", "1"):
        sys.exit(f"seal_ops build: {name} must be auto, 0 or 1, got {choice!r}")
    return choice


def wanted(name: str, missing: str | None) -> bool:
    """Whether to build a part: its variable says 0 or 1, or auto looks at what is missing."""
    choice = chosen(name)
    if choice == "1" and missing:
        sys.exit(f"seal_ops build: {name}=1, but {missing}")
    if choice == "auto" and missing:
        print(f"seal_ops build: {name}=auto leaves this part out: {missing}", file=sys.stderr)
    return choice == "1" or (choice == "auto" and not missing)


def missing_for_extension() -> str | None:
    # pip's isolated build hides the environment's packages. The extension has to be compiled against the very torch
    # that will run it, so that one is looked up where this interpreter installs; a private copy could only be the
    # wrong one.
    if importlib.util.find_spec("torch") is None:
        sys.path += [path for path in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}]
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed in this environment (install it before seal_ops to get the extension)"
    named = os.environ.get("CXX")  # torch takes it and no other
    if named and not runs([*shlex.split(named), "--version"]):
        return f"the C++ compiler that CXX names does not run ({named})"
    if not named and not any(shutil.which(c) for c in ("c++", "g++", "clang++")):
        return "no C++ compiler was found"
    if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
        return "Python's headers are not installed (a package such as python3-dev has them)"
    return None


def runs(command: list[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


def missing_for_cuda() -> str | None:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    if CUDA_HOME is None:
        return "nvcc was not found (put it on PATH or set CUDA_HOME)"
    nvcc = shutil.which("nvcc", path=os.path.join(CUDA_HOME, "bin"))  # torch runs this one, whatever PATH has
    if not nvcc:
        return f"nvcc was not found in {CUDA_HOME}/bin (CUDA_HOME)"
    found = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", found)
    if not release or (int(release[1]), int(release[2])) < (12, 8):
        return f"nvcc must be 12.8 or newer, got {release.group(0) if release else 'an unknown version'}"
    if release[1] != torch.version.cuda.split(".")[0]:
        return f"nvcc must have the major version of torch's CUDA {torch.version.cuda}, got {release.group(0)}"
    return None


def dynamic_runtime() -> list[str]:
    """Linker input that makes the extension use the process's libstdc++, whatever the compiler's default.

    A compiler that links it statically would give the extension stream classes of its own, which crash on the process's
    locale objects.

    The library's file, named before the compiler's own `-lstdc++`, resolves every symbol; nothing is left for an
    archive. The compiler is asked for it first; where it has only an archive, the libstdc++ that torch has loaded
    serves.
    """
    if sys.platform != "linux":
        return []
    from torch.utils.cpp_extension import get_cxx_compiler

    asked = subprocess.run(
        [*shlex.split(get_cxx_compiler()), "-print-file-name=libstdc++.so.6"], capture_output=True, text=True
    )
    loaded = [
        line.split()[-1] for line in pathlib.Path("/proc/self/maps").read_text().splitlines() if "libstdc++.so" in line
    ]
    return [path for path in (asked.stdout.strip(), *loaded) if os.path.isabs(path) and os.path.exists(path)][:1]


def elf():
    """seal_ops/utils/elf.py: whose C++ runtime a library uses. By its path: the package is not to be imported here."""
    spec = importlib.util.spec_from_file_location("elf", ROOT / "seal_ops" / "utils" / "elf.py")
    sys.modules["elf"] = module = importlib.util.module_from_spec(spec)  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def extension() -> dict:
    """Arguments of setup() that build the extension, or none."""
    kernels = chosen("SEAL_BUILD_CUDA")
    missing = missing_for_extension()
    if not wanted("SEAL_BUILD_EXT", missing):
        if kernels == "1":  # they are a part of the extension
            sys.exit(f"seal_ops build: SEAL_BUILD_CUDA=1, but {missing or 'SEAL_BUILD_EXT=0'}")
        return {}
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    class Build(BuildExtension):
        def build_extensions(self):
            super().build_extensions()
            for built in self.extensions if sys.platform == "linux" else ():
                fault = elf().read(self.get_ext_fullpath(built.name)).fault
                if fault:
                    sys.exit(f"seal_ops build: {fault}; use a compiler with a shared libstdc++, or SEAL_BUILD_EXT=0")

    # Python's own flags ask for debug information: 15 MB instead of one, and the folders of the machine that built it.
    # The names of source files in messages lose those folders, too.
    cxx = ["-O2", "-g0", "-std=c++20", "-Wall", "-Wno-unknown-pragmas"]
    cxx += [f"-ffile-prefix-map={folder}/=" for folder in (ROOT, pathlib.Path(torch.__file__).parents[1])]
    common = dict(include_dirs=[str(ROOT / "csrc")], extra_link_args=dynamic_runtime())
    if wanted("SEAL_BUILD_CUDA", missing_for_cuda()):
        cxx += ["-DSEAL_WITH_CUDA", f'-DSEAL_CUDA_ARCHITECTURES="{",".join("sm_" + a for a in ARCHITECTURES)}"']
        # torch adds -gencode flags of its own for the visible GPU unless a list is given; ours say everything.
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "9.0a")
        module = CUDAExtension(
            "seal_ops._C", sources("cpp", "cuda"), extra_compile_args={"cxx": cxx, "nvcc": NVCC_FLAGS}, **common
        )
    else:
        module = CppExtension("seal_ops._C", sources("cpp"), extra_compile_args=cxx, **common)
    return {"ext_modules": [module], "cmdclass": {"build_ext": Build}}


class BuildPython(build_py):
    """Puts the schema file beside the package, where the pure-Python build reads it."""

    def run(self):
        super().run()
        target = pathlib.Path(self.build_lib) / "seal_ops" / "ops"
        if not getattr(self, "editable_mode", False):
            target.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / "csrc" / "schemas.inc", target / "schemas.inc")


if __name__ == "__main__":  # else its functions are wanted: tests/check_cuda_build.py
    arguments = extension()
    arguments.setdefault("cmdclass", {})["build_py"] = BuildPython
    setup(**arguments)
