"""The package itself: one list of sources, one list of schemas, the environment report, an install without a
compiler."""

import importlib.machinery
import importlib.util
import os
import pathlib
import re
import runpy
import shutil
import subprocess
import sys

import pytest
import torch
from installed import environment

import seal_ops
from seal_ops.ops import registration
from seal_ops.ops.dispatch import OPS, extension
from seal_ops.ops.environment import facts, report
from seal_ops.ops.registration import schemas
from seal_ops.utils import elf

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_every_source_file_is_listed_once_and_exists():
    lines = [line.split() for line in (ROOT / "csrc/sources.txt").read_text().splitlines() if line and line[0] != "#"]
    listed = [path for _, path in lines]
    assert len(set(listed)) == len(listed) and {kind for kind, _ in lines} == {"cpp", "cuda"}
    found = {str(p.relative_to(ROOT / "csrc")) for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".cu")}
    assert set(listed) == found
    for build in ("setup.py", "CMakeLists.txt"):
        text = (ROOT / build).read_text()
        assert "sources.txt" in text and not re.search(r"\.(cu|cpp)\b", text)


def test_ops_are_exactly_the_schemas():
    assert [s.split("(")[0] for s in schemas()] == list(OPS)
    for schema in schemas():
        name = schema.split("(")[0]
        registered = getattr(torch.ops.seal, name).default._schema
        assert registered == torch._C.parse_schema(f"seal::{schema}")


def test_report_names_every_backend_with_one_sentence():
    text = report()
    chosen = seal_ops.backends()
    for op in OPS:
        assert f"{op:20s} {chosen[op]['chosen']}" in text
    for name in ("cuda", "triton", "cpu", "reference"):
        assert name == chosen["attention"]["chosen"] or f"not {name} (any op): " in text
    assert facts()["torch"] == torch.__version__.split("+")[0] or facts()["torch"] == torch.__version__
    assert isinstance(extension(), str) == (facts()["extension"] == extension())


def test_command_prints_the_report(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "seal_ops", "env"], capture_output=True, text=True, cwd=tmp_path, env=environment()
    )
    assert done.returncode == 0
    printed, _, steps = done.stdout.partition("\n\nfused steps over part of a cache: ")
    assert printed.strip() == report().strip() and steps.startswith("off (")


def test_importing_the_kernels_needs_no_transformers(tmp_path):
    code = "import sys, seal_ops; sys.exit('transformers' in sys.modules or 'triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment()).returncode == 0


def test_pure_python_has_the_same_ops(tmp_path):
    """Without an extension the schemas come from Python: install so, and run an op in a fresh interpreter."""
    env = {**os.environ, "SEAL_BUILD_EXT": "0"}
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--no-build-isolation",
            "--target",
            str(tmp_path / "site"),
            str(ROOT),
        ],
        check=True,
        env=env,
        capture_output=True,
    )
    assert not list((tmp_path / "site/seal_ops").glob("_C*"))
    code = (
        "import torch, seal_ops, pathlib; q = torch.randn(1, 4, 2, 8);"
        "assert str(pathlib.Path(seal_ops.__file__)).startswith(SITE), seal_ops.__file__;"
        "print(seal_ops.attention(q, q, q).shape, seal_ops.backends('cpu')['attention']['cuda'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code.replace("SITE", repr(str(tmp_path)))],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**env, "PYTHONPATH": str(tmp_path / "site")},
    )
    assert done.returncode == 0, done.stderr
    assert "[1, 4, 2, 8]" in done.stdout and "the C++ extension was not built" in done.stdout


@pytest.mark.parametrize(
    "given, sentence",
    [
        (dict(SEAL_BUILD_CUDA="yes"), "SEAL_BUILD_CUDA must be auto, 0 or 1, got 'yes'"),
        (dict(SEAL_BUILD_CUDA="yes", SEAL_BUILD_EXT="0"), "SEAL_BUILD_CUDA must be auto, 0 or 1, got 'yes'"),
        (dict(SEAL_BUILD_CUDA="1"), "SEAL_BUILD_CUDA=1, but "),
        (dict(SEAL_BUILD_CUDA="1", SEAL_BUILD_EXT="0"), "SEAL_BUILD_CUDA=1, but SEAL_BUILD_EXT=0"),
        (
            dict(SEAL_BUILD_CUDA="1", SEAL_BUILD_EXT="auto", CXX="/nowhere/g++"),
            "SEAL_BUILD_CUDA=1, but the C++ compiler that CXX names does not run (/nowhere/g++)",
        ),
        (dict(CXX="/nowhere/g++"), "SEAL_BUILD_EXT=1, but the C++ compiler that CXX names does not run (/nowhere/g++)"),
        (dict(CXX="false"), "SEAL_BUILD_EXT=1, but the C++ compiler that CXX names does not run (false)"),
    ],
    ids=lambda value: None if isinstance(value, str) else ",".join(f"{n}={v}" for n, v in value.items()),
)
def test_a_build_that_cannot_be_is_one_sentence(given, sentence):
    if given == dict(SEAL_BUILD_CUDA="1") and torch.version.cuda is not None:
        pytest.skip("CUDA can be built here")
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "SEAL_BUILD_EXT": "1", **given},
    )
    assert done.returncode != 0 and f"seal_ops build: {sentence}" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "home, release, sentence",
    [
        (None, "", "nvcc was not found (put it on PATH or set CUDA_HOME)"),
        ("empty", "", "nvcc was not found in {home}/bin (CUDA_HOME)"),
        ("cuda", "release 12.6", "nvcc must be 12.8 or newer, got release 12.6"),
        ("cuda", "release 12.9", "nvcc must have the major version of torch's CUDA 13.0, got release 12.9"),
        ("cuda", "release 14.0", "nvcc must have the major version of torch's CUDA 13.0, got release 14.0"),
        ("cuda", "release 13.2", None),
    ],
)
def test_nvcc_is_the_one_that_torch_runs(home, release, sentence, tmp_path, monkeypatch):
    """Not the one on PATH; and torch ends in a traceback where its CUDA is of another major version."""
    from torch.utils import cpp_extension

    for name in ("cuda", "path"):
        (tmp_path / name / "bin").mkdir(parents=True)
        script = tmp_path / name / "bin" / "nvcc"
        script.write_text(f"#!/bin/sh\necho Cuda compilation tools, {release if name == 'cuda' else 'release 13.0'}\n")
        script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "path" / "bin"), prepend=os.pathsep)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    home = home and str(tmp_path / home)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", home)
    missing = runpy.run_path(str(ROOT / "setup.py"))["missing_for_cuda"]()
    assert missing == (sentence and sentence.format(home=home))


def test_without_pythons_headers_there_is_no_extension(tmp_path, monkeypatch):
    build = runpy.run_path(str(ROOT / "setup.py"))
    path = build["sysconfig"].get_path
    monkeypatch.setattr(build["sysconfig"], "get_path", lambda n: str(tmp_path) if n == "include" else path(n))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(build["shutil"], "which", lambda name, **_: f"/usr/bin/{name}")
    assert "Python's headers are not installed" in build["missing_for_extension"]()


@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
@pytest.mark.parametrize(
    "given, sentence",
    [
        ("-DSEAL_BUILD_CUDA=maybe", "SEAL_BUILD_CUDA must be AUTO, ON or OFF, got maybe"),
        ("-DCMAKE_DISABLE_FIND_PACKAGE_Torch=ON", "torch was not found: CMAKE_PREFIX_PATH must name its folder"),
    ],
)
def test_cmake_says_what_is_wrong_in_one_sentence(given, sentence, tmp_path):
    """It asks for a compiler first, so it is told of one that need not work."""
    command = ["cmake", "-S", str(ROOT), "-B", str(tmp_path), "-DCMAKE_CXX_COMPILER_WORKS=1", given]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0 and sentence in " ".join(done.stderr.split()), done.stderr


@pytest.mark.skipif(sys.platform != "linux" or isinstance(extension(), str), reason="needs the C++ extension on Linux")
def test_the_extension_holds_no_folder_of_its_build_and_no_debug_information():
    """Python's flags ask for debug information, which was 96 % of the file."""
    built = pathlib.Path(extension().__file__).read_bytes()
    assert b".debug_info" not in built
    assert str(ROOT).encode() + b"/" not in built
    assert str(pathlib.Path(torch.__file__).parents[1]).encode() not in built


COMPILER = shutil.which(os.environ.get("CXX", "g++"))
PROBE = """
#include <sstream>
#include <stdexcept>
extern "C" void probe(int n) { std::ostringstream s; s << n; throw std::runtime_error(s.str()); }
"""


@pytest.mark.skipif(sys.platform != "linux" or COMPILER is None, reason="needs Linux and a C++ compiler")
def test_a_static_libstdcxx_is_undone_and_found(tmp_path, monkeypatch):
    """The build's linker input makes a compiler with a static libstdc++ by default use the shared one; without it the
    reader says so."""
    wrapper = tmp_path / "static-g++"
    wrapper.write_text(f'#!/bin/sh\nexec {COMPILER} -static-libstdc++ "$@"\n')
    wrapper.chmod(0o755)
    (tmp_path / "probe.cpp").write_text(PROBE)
    monkeypatch.setenv("CXX", str(wrapper))
    build = runpy.run_path(str(ROOT / "setup.py"))
    for inputs, count in (([], 100), (build["dynamic_runtime"](), 0)):
        library = tmp_path / f"{count}.so"
        subprocess.run(
            [str(wrapper), "-shared", "-fPIC", "-o", str(library), str(tmp_path / "probe.cpp"), *inputs], check=True
        )
        found = elf.read(library)
        assert len(found.own_std) >= count and (found.fault is None) == (count == 0) == (not found.own_std), found
        assert build["elf"]().read(library).fault == found.fault
        assert f"{len(found.own_std)} std:: symbols of its own" in str(found)
    with pytest.raises(ValueError, match="must be a 64-bit little-endian ELF file"):
        elf.read(tmp_path / "probe.cpp")


@pytest.mark.skipif(sys.platform != "linux" or isinstance(extension(), str), reason="needs the C++ extension on Linux")
def test_the_extension_shares_the_runtime_of_the_process():
    found = elf.read(extension().__file__)
    assert found.fault is None and found.own_std == ()
    assert facts()["C++ runtime"] == f"{found}" and "libstdc++.so.6, 0 std:: symbols of its own" in report()


def test_no_source_of_the_ops_uses_a_stream():
    """Messages are appended to strings (csrc/ops/text.h says why); TORCH_CHECK and c10::str format through a stream."""
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix in (".cpp", ".h", ".cu", ".cuh"):
            code = re.sub(r"//.*", "", path.read_text())
            assert not re.search(
                r"TORCH_CHECK|TORCH_INTERNAL_ASSERT|c10::str\(|stringstream|<iostream>|std::cout|std::cerr", code
            ), path


def test_an_extension_of_other_sources_is_refused(monkeypatch):
    """Calls that it would misread ended the process."""
    if isinstance(extension(), str):
        pytest.skip(extension())
    registration.check_extension()
    lines = registration.schemas()
    first = next(n for n, line in enumerate(lines) if line.startswith("attention("))
    lines[first] = lines[first].replace(") ->", ", int added=0) ->")
    monkeypatch.setattr(registration, "schemas", lambda: lines)
    with pytest.raises(ImportError, match="must be built from the sources beside it, got one with another seal::att"):
        registration.check_extension()
    lines[first] = "new_op(Tensor q) -> Tensor"
    with pytest.raises(ImportError, match="another seal::new_op"):
        registration.check_extension()


def test_the_extension_of_another_copy_is_not_taken(tmp_path, monkeypatch):
    """As the finder of an editable installation offers it where sources lie on PYTHONPATH."""
    spec = importlib.machinery.ModuleSpec("seal_ops._C", None, origin=str(tmp_path / "seal_ops" / "_C.so"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    assert "the C++ extension was not built" in extension.__wrapped__()
