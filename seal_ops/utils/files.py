"""Files that are replaced in one step: a reader sees the old content or the new, never half of it.

What a process leaves that was killed inside a write is removed by the next write of the same machine into the same
folder.
"""

import contextlib
import csv
import errno
import functools
import hashlib
import io
import os
import platform
import re
import shutil
import tempfile
import time

_TEMPORARY = re.compile(r"\..*\.seal-([0-9a-f]{8})-(\d+)-[^.]*\.tmp")
_OLD = 86_400  # seconds after which no write can still be going on


@contextlib.contextmanager
def replacing(path):
    """Yields the path of an empty file to write; it takes the place of ``path`` if nothing was raised.

    The file lies in a folder of its own beside ``path``, for what writes it may need temporary files itself
    (safetensors does).  The parent folder is created.  Raises ``OSError`` naming the path where it cannot be written.
    """
    path = check_file(path)
    with replacing_files(os.path.dirname(path) or ".", os.path.basename(path)) as folder:
        temporary = os.path.join(folder, os.path.basename(path))
        open(temporary, "wb").close()
        yield temporary


def check_file(path) -> str:
    """The path of a file that can be written, for a long run to ask before its work; its folder is created.

    Raises ``OSError``, one sentence that names the path, where it cannot be written.
    """
    path = os.fspath(path)
    folder = os.path.dirname(path) or "."
    if not os.path.basename(path) or os.path.isdir(path):
        raise IsADirectoryError(f"output must be a file, got {path!r}, which is a folder")
    try:
        os.makedirs(folder, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        found = type(error)(f"output must be a file in a writable folder, got {path!r} ({error.strerror})")
        found.strerror = error.strerror  # for callers with a sentence of their own
        raise found from None
    return path


@contextlib.contextmanager
def replacing_files(folder, name: str = "files"):
    """Yields an empty folder inside ``folder`` to fill; if nothing was raised its files go up, each in one step."""
    folder = os.fspath(folder)
    os.makedirs(folder, exist_ok=True)
    _sweep(folder)
    temporary = tempfile.mkdtemp(dir=folder, **_affixes(name))
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        for file in sorted(os.listdir(temporary)):
            os.chmod(os.path.join(temporary, file), 0o666 & ~umask)  # 0600 of a temporary file is for secrets
            os.replace(os.path.join(temporary, file), os.path.join(folder, file))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
    _sweep(parent)
    temporary = tempfile.mkdtemp(dir=parent, **_affixes(path))
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


def read_text(path) -> str:
    """The text of a file; ``ValueError``, one sentence that names it, where it is not UTF-8."""
    with open(path, encoding="utf-8") as file:
        try:
            return file.read()
        except UnicodeDecodeError as error:
            raise ValueError(f"{os.fspath(path)} must be text in UTF-8, got {error}") from None


def write_csv(path, columns, rows) -> None:
    """Writes ``rows`` (dicts, or sequences in the order of ``columns``) as CSV with a heading, in one step."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([row.get(c, "") for c in columns] if isinstance(row, dict) else row for row in rows)
    atomic_write(path, text.getvalue())


def _affixes(path):
    return {"prefix": f".{os.path.basename(path)}.seal-{_where()}-{os.getpid()}-", "suffix": ".tmp"}


@functools.cache
def _where():
    """Tells places apart in which one process number means two processes: machines, boots, containers."""
    facts = [platform.node()]
    with contextlib.suppress(OSError):  # Linux only
        facts.append(os.readlink("/proc/self/ns/pid"))
        with open("/proc/sys/kernel/random/boot_id") as file:
            facts.append(file.read())
    return hashlib.sha256("".join(facts).encode()).hexdigest()[:8]


def _sweep(folder):
    """Removes what killed processes left of their writes: those of this place, and any that is a day old."""
    for name in os.listdir(folder):
        found = _TEMPORARY.fullmatch(name)
        if found is None:
            continue
        path = os.path.join(folder, name)
        with contextlib.suppress(OSError):  # gone meanwhile, or another user's
            if (found[1] == _where() and not _lives(int(found[2]))) or time.time() - os.stat(path).st_mtime > _OLD:
                shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)


def _lives(process):
    if os.name != "posix":  # elsewhere asking for a process by `kill` may end it
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True
