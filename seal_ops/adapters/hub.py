"""Adapters on the Hugging Face hub: fetched by name, pushed from a folder."""

from __future__ import annotations

import os
import tempfile

from ..huggingface.hub import reason
from . import files


def resolve(
    name_or_path: str | os.PathLike,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    subfolder: str | None = None,
    call: str = "load",
) -> str:
    """The folder of an adapter: a local one, or a snapshot of a repository on the hub.

    Raises ValueError where ``name_or_path`` is not a name, and FileNotFoundError, one sentence, where there is nothing
    under it.
    """
    if not isinstance(name_or_path, (str, os.PathLike)) or not isinstance(os.fspath(name_or_path), str):
        raise ValueError(
            f"seal_ops.{call}: save_directory must be a folder or a name on the hub, got {files.shown(name_or_path)}"
        )
    if not isinstance(subfolder, (str, type(None))):
        raise ValueError(f"seal_ops.{call}: subfolder must be a name or None, got {files.shown(subfolder)}")
    path = os.fspath(name_or_path)
    if not os.path.isdir(path):
        if not path or os.path.exists(path) or os.path.isabs(path) or path.startswith(".") or path.count("/") > 1:
            raise FileNotFoundError(
                f"seal_ops.{call}: save_directory must hold {files.CONFIG_FILE}, got {path!r} without it"
            )
        path = _download(path, revision, token, subfolder, call)
    return files.find(os.path.join(path, subfolder) if subfolder else path, call)


def _download(name: str, revision, token, subfolder: str | None, call: str) -> str:
    from huggingface_hub import snapshot_download

    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    names = (files.CONFIG_FILE, files.WEIGHTS_FILE, files.CARD_FILE)
    wanted = [*(prefix + name for name in names), f"{prefix}{files.SUBFOLDER}/*"]
    try:
        return snapshot_download(name, revision=revision, token=token, allow_patterns=wanted)
    except Exception as error:  # the client raises errors of several libraries
        raise FileNotFoundError(
            f"seal_ops.{call}: save_directory must be a folder or a name on the hub, got {name!r}: {reason(error)}"
        ) from error


def push(
    scales,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
):
    """Uploads what ``scales.save_pretrained`` writes, model card included, to a repository; returns the commit info.

    Args:
        scales: the `Scales`.
        repo_id: ``name`` or ``owner/name``; made where it is not there.
        private: of a new repository.
        token: as on the hub.
        revision: a branch; made where it is not there.
        commit_message: of the commit.
        create_pr: opens a pull request.

    Raises OSError, one sentence, where the hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as folder:
        scales.save_pretrained(folder)
        try:
            api = HfApi(token=token)
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision is not None and not create_pr and not revision.startswith("refs/"):
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message or "Upload SEAL scales",
            )
        except Exception as error:  # as above
            raise OSError(
                f"seal_ops.Scales.push_to_hub: repo_id must be a repository that can be written, got "
                f"{repo_id!r}: {reason(error)}"
            ) from error
