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
import json
import os
import platform
import re
import shutil
import tempfile
import time

_TEMPORARY = re.compile(r"\..*\.seal-([0-9a-f]{8})-(\d+)-[^.]*\.tmp")
_OLD = 86_400  # seconds after which no write can still be going on
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}  # faults of the place, not of the writer
_IN_TEXT = re.compile(r"\(os error (\d+)\)")  # how safetensors, which knows no OSError, tells them


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
        _make(folder)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise _said(error, f"output must be a file in a writable folder, got {path!r} ({error.strerror})") from None
    return path


def check_folder(path, call: str, argument: str) -> str:
    """The path of a folder that can be written, for a long run to ask before its work; it is created.

    Raises ``OSError``, one sentence in the name of ``call``, where it cannot be written.
    """
    path = os.fspath(path)
    try:
        _make(path)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "no permission to write")
    except OSError as error:
        raise _said(error, f"{call}: {argument} must be a writable folder, got {path} ({error.strerror})") from None
    return path


@contextlib.contextmanager
def replacing_files(folder, name: str = "files"):
    """Yields an empty folder inside ``folder`` to fill; if nothing was raised its files go up, each in one step.

    Raises ``OSError``, one sentence that names the place, where there is no room or no right to write.
    """
    folder = os.fspath(folder)
    temporary = _temporary(folder, name)
    try:
        with _saying_where(os.path.join(folder, name) if name != "files" else folder):
            yield temporary
        umask = os.umask(0)
        os.umask(umask)
        for parent, folders, names in os.walk(temporary):
            place = os.path.normpath(os.path.join(folder, os.path.relpath(parent, temporary)))
            for inner in folders:
                os.makedirs(os.path.join(place, inner), exist_ok=True)
            for file in sorted(names):
                os.chmod(os.path.join(parent, file), 0o666 & ~umask)  # 0600 of a temporary file is for secrets
                os.replace(os.path.join(parent, file), os.path.join(place, file))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def replacing_folder(path):
    """Yields an empty folder beside ``path`` to fill; it takes the place of ``path`` if nothing was raised.

    Raises ``FileExistsError`` where ``path`` exists and is not an empty folder, also where another process has filled
    it meanwhile, and ``OSError`` where there is no room or no right to write.
    """
    path = os.path.normpath(os.fspath(path))
    if os.path.exists(path) and not (os.path.isdir(path) and not os.listdir(path)):
        raise FileExistsError(f"output folder must be new or empty, got {path}")
    temporary = _temporary(os.path.dirname(path) or ".", path)
    try:
        with _saying_where(path):
            yield temporary
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o777 & ~umask)
        try:
            os.replace(temporary, path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise FileExistsError(
                f"output folder must be new or empty, got {path}, which another process has filled meanwhile"
            ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def atomic_write(path, content) -> None:
    """Replaces the file ``path`` by ``content`` (``str``, as UTF-8, or ``bytes``) in one step."""
    data = content.encode() if isinstance(content, str) else content
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(data)


def write_adapter(folder, weights: tuple[str, dict], config: tuple[str, dict]) -> None:
    """Writes the two files of an adapter, each (name, content); both are whole before either takes its place."""
    from safetensors.torch import save_file

    with replacing_files(folder) as temporary:
        save_file(weights[1], os.path.join(temporary, weights[0]), metadata={"format": "pt"})
        with open(os.path.join(temporary, config[0]), "w", encoding="utf-8") as file:
            file.write(json.dumps(config[1], indent=2) + "\n")


def read_text(path) -> str:
    """The text of a file, without the mark that editors on Windows begin one with.

    Raises:
        ValueError: it is not UTF-8; one sentence that names it.
    """
    with open(path, encoding="utf-8-sig") as file:
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


def _make(folder):
    try:
        os.makedirs(folder, exist_ok=True)
    except FileExistsError:  # which would not say what is wrong with it
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from None


def _temporary(folder, name):
    """A new empty folder in ``folder``, for what is to be called ``name``."""
    try:
        _make(folder)
        _sweep(folder)
        return tempfile.mkdtemp(dir=folder, **_affixes(name))
    except OSError as error:
        raise _said(error, f"output must be in a writable folder, got {folder!r} ({error.strerror})") from None


@contextlib.contextmanager
def _saying_where(path):
    """A full disc inside the block becomes one sentence that names ``path``, whichever library met it."""
    try:
        yield
    except Exception as error:
        found = _IN_TEXT.search(str(error))
        code = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
        if code not in _NO_ROOM:
            raise
        raise _NotWritten(code, os.strerror(code), os.fspath(path)) from None


class _NotWritten(OSError):
    """In one sentence, and yet with an error number, for a writer round this one."""

    def __str__(self):
        return f"could not write {self.filename!r} ({self.strerror}); what was there before is unchanged"


def _said(error, sentence):
    """An error of the same kind that says ``sentence``; with its strerror, for callers with a sentence of their own."""
    found = type(error)(sentence)
    found.strerror = error.strerror
    return found


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
