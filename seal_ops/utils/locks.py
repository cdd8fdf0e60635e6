"""One writer at a time: a lock on an output that ends with its process, however that ends.

Why not `filelock` (4.3.1 was tried), which torch and huggingface_hub bring along:

* Its lock file stays in the folder on Unix, where it would be uploaded with the scales.  Removing it lets two holders
  in under 3.20.3 and before, and huggingface_hub allows 3.10.
* It does not say who holds a lock.
* Where a file system answers ENOLCK, ENOTSUP or EINVAL, as network folders do, it raises, and no run could write there.
  Where one answers ENOSYS, it takes the file's existence for the lock, and any file that was left behind is one.

What it has and this has not: locks on Windows.
"""

import contextlib
import errno
import os
import platform

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_UNSUPPORTED = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}  # some network file systems


def name_of(output) -> str:
    """The lock file of an output: inside a folder, beside a file."""
    output = os.fspath(output)
    folder, name = os.path.split(output)
    return os.path.join(output, ".seal.lock") if os.path.isdir(output) else os.path.join(folder, f".{name}.seal.lock")


@contextlib.contextmanager
def only_writer(output, call: str, wait: bool = False):
    """Inside the block this process alone writes to ``output``, a folder that exists or a file (None for nothing).

    The system's lock on a small file (flock), so a killed process leaves none behind.  Where the system has no locks
    (Windows, some network file systems) two writers are not told apart.

    Args:
        wait: until another writer has ended, for a short write, in place of raising.

    Raises:
        RuntimeError: another process, or another call in this one, writes there.
    """
    if output is None:
        yield
        return
    path = name_of(output)
    handle = _locked(path, wait) if fcntl is not None else None
    if handle is False:
        raise RuntimeError(f"{call}: output {os.fspath(output)} must have one writer at a time, got {_holder(path)}")
    try:
        yield
    finally:
        if handle is not None:
            with contextlib.suppress(OSError):
                os.unlink(path)  # while it is locked; who opened it before sees that it is gone
            os.close(handle)


def _locked(path, wait):
    """An open file that is locked; False where another has it; None where there are no locks."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if _is_at(handle, path):
                with contextlib.suppress(OSError):  # a full disc: it is locked all the same
                    os.ftruncate(handle, 0)
                    os.pwrite(handle, f"process {os.getpid()} on {platform.node()}".encode(), 0)
                return handle
        except OSError as error:
            os.close(handle)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return False
            if error.errno in _UNSUPPORTED:
                with contextlib.suppress(OSError):
                    os.unlink(path)
                return None
            raise
        os.close(handle)  # the one who had it has removed it


def _is_at(handle, path):
    """Whether an open file is the one of that name; one that was waited for may be gone, or another in its place."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _holder(path):
    try:
        with open(path, encoding="utf-8") as file:
            return f"{file.read() or 'another process'} at work there"
    except OSError:
        return "another process at work there"
