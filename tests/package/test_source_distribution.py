"""A source distribution holds all that it is built from, and a wheel made from it is the package."""

import os
import pathlib
import subprocess
import sys
import tarfile
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


def backend(call, folder):
    """What setuptools' build backend makes in a folder, without the extension; pip would call the same."""
    code = f"from setuptools import build_meta; build_meta.{call}"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "SEAL_BUILD_EXT": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="the tests run without their checkout")
def test_the_package_is_built_from_a_source_distribution(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    parts = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CMakeLists.txt", "csrc", "seal_ops")
    for part in parts:  # links, so that nothing is written into the checkout
        (checkout / part).symlink_to(ROOT / part)
    backend(f"build_sdist({str(tmp_path / 'made')!r})", checkout)
    (archive,) = (tmp_path / "made").glob("*.tar.gz")
    with tarfile.open(archive) as file:
        # The filter came with 3.11.4 and 3.10.12; later Pythons warn without it.
        file.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (unpacked,) = tmp_path.glob("seal_ops-*")
    for path in (ROOT / "csrc").rglob("*.*"):
        assert (unpacked / path.relative_to(ROOT)).is_file(), path
    assert (unpacked / "CMakeLists.txt").is_file()
    backend(f"build_wheel({str(tmp_path / 'made')!r})", unpacked)
    (wheel,) = (tmp_path / "made").glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    package = [p for p in (ROOT / "seal_ops").rglob("*.*") if p.suffix in (".py", ".html", ".yaml", ".typed")]
    assert {str(p.relative_to(ROOT)) for p in package} | {"seal_ops/ops/schemas.inc"} <= held
