"""Files that are replaced in one step: a reader sees the old content or the new, never half of it."""

import contextlib
import os
import shutil
import tempfile


@contextlib.contextmanager
def replacing(path):
    """Yields the path of an empty file beside ``path`` to write; it takes the place of ``path`` if nothing was raised.

    The parent folder is created.  Raises ``OSError`` naming the path where it cannot be written.
    """
    path = os.fspath(path)
    folder = os.path.dirname(path) or "."
    os.makedirs(folder, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=folder, prefix="." + os.path.basename(path) + ".", suffix=".tmp")
    os.close(handle)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's 0600 is for secrets
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def replacing_folder(path):
    """Yields an empty folder beside ``path`` to fill; it takes the place of ``path`` if nothing was raised.

    Raises ``FileExistsError`` where ``path`` exists and is not an empty folder.
    """
    path = os.path.normpath(os.fspath(path))
    if os.path.exists(path) and not (os.path.isdir(path) and not os.listdir(path)):
        raise FileExistsError(f"output folder must be new or empty, got {path}")
    parent = os.path.dirname(path) or "."
    os.makedirs(parent, exist_ok=True)
    temporary = tempfile.mkdtemp(dir=parent, prefix="." + os.path.basename(path) + ".")
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o777 & ~umask)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def atomic_write(path, content) -> None:
    """Replaces the file ``path`` by ``content`` (``str``, as UTF-8, or ``bytes``) in one step."""
    data = content.encode() if isinstance(content, str) else content
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(data)
