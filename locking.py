"""A folder that one process at a time writes to.

A root file because runs and search indexes both are such folders.
"""

import contextlib
import json
import os
import socket
import time
from contextlib import contextmanager
from pathlib import Path

from escaping import escaped

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class Lock:
    """A lock that is held; see `locked_folder`."""

    def __init__(self, path, file):
        self.path = path
        self.file = file

    def require_held(self):
        """Raise OSError where the folder or the lock in it has gone since it was taken."""
        try:
            found = os.stat(self.path)
        except OSError:
            found = None
        held = os.fstat(self.file.fileno())
        if found is None or (found.st_dev, found.st_ino) != (held.st_dev, held.st_ino):
            raise OSError(
                f"{self.path.parent}: removed or replaced while this process wrote into it; what "
                "was done since the last save is lost, start again with another --out"
            )


@contextmanager
def locked_folder(out, name, doing):
    """Hold a folder's lock, a `Lock`, against all other processes; makes the folder.

    name: of the lock's file; doing: what its holder does, for the error. A dead process's lock is
    taken over. At the end the lock goes, and so does a folder that holds nothing. Raises ValueError
    that names host and process of the holder.
    """
    out = Path(out)
    path = out / name
    file = _open_locked(path, doing)
    lock = Lock(path, file)
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "started": started}
    file.seek(0)
    file.truncate()
    file.write(json.dumps(holder) + "\n")
    file.flush()
    try:
        yield lock
    finally:
        with contextlib.suppress(OSError):
            lock.require_held()
            path.unlink()
        file.close()
        with contextlib.suppress(OSError):
            out.rmdir()  # if empty


def _open_locked(path, doing):
    """The lock file, open and locked."""
    if fcntl is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        return _create(path, doing)
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)  # the holder before may remove it
        try:
            file = open(path, "a+", encoding="utf-8")
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(path)
            file.close()
            raise ValueError(
                f"{escaped(path)}: {holder} {doing}; wait for it, stop it, or take another --out"
            ) from None
        except OSError as error:
            file.close()
            raise OSError(
                f"{escaped(path)}: cannot be locked ({error.strerror}); take an --out elsewhere"
            ) from None
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        file.close()  # the holder before removed it between our opening and locking: once more


def _create(path, doing):
    """The lock file where files cannot be locked: that it exists is the lock."""
    try:
        return open(path, "x+", encoding="utf-8")
    except FileExistsError:
        raise ValueError(
            f"{escaped(path)}: {_holder(path)} {doing}; if it does not any more, delete the file"
        ) from None


def _holder(path):
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']}, since {holder['started']},"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
