"""The folder of a run: a new one for each, one process at a time, nothing of the user's replaced.

A folder holds `last.pth`, `best_model.pth`, `log.jsonl` and, while a process trains, `run.lock`,
which names the process. The lock ends with the process, however that ends.
"""

import contextlib
import json
import os
import socket
import time
from contextlib import contextmanager
from pathlib import Path

from training import resume

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

RUNS = Path("runs")
LOCK = "run.lock"


# ------------------------------------------------------------------ which folder


def choose(options, runs=RUNS):
    """The folder of --out, else a new one, else, with --resume, that of the latest run.

    A new one is `runs/<data set>-N`, with the first number that is free; it is made here. Raises
    ValueError where there is no run to go on with.
    """
    if options["out"] is not None:
        return Path(options["out"])
    if options["resume"]:
        return _latest(runs)
    return _new(runs, "+".join(options["dataset"]))


def _new(runs, name):
    name = name.replace("/", "-").replace("\\", "-")
    number = 1
    while True:
        folder = runs / f"{name}-{number}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:  # another run's, which may have begun just now
            number += 1


def _latest(runs):
    states = sorted(runs.glob("*/last.pth"), key=lambda path: path.stat().st_mtime)
    if not states:
        raise ValueError(f"--resume: no run in {runs}/; name its folder with --out")
    return states[-1].parent


def require_free(out):
    """Raise ValueError where a new run would replace models: of another run, or of nobody's."""
    state, best = out / "last.pth", out / "best_model.pth"
    remedy = "take another --out, or --overwrite to replace it"
    if state.is_file():
        checkpoint = resume.read_state(state)
        progress = checkpoint["state"]["progress"]
        if progress["epoch"] <= checkpoint["options"]["epochs"]:
            raise ValueError(
                f"{state}: a run was stopped here in epoch {progress['epoch']} of "
                f"{checkpoint['options']['epochs']}; go on with --resume, {remedy}"
            )
        raise ValueError(f"{state}: a run was finished here; {remedy}")
    if best.is_file():
        raise ValueError(f"{best}: a model whose run is not in this folder; {remedy}")


# ------------------------------------------------------------------ one process at a time


class Lock:
    """A lock that is held; see `locked`."""

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
                f"{self.path.parent}: removed or replaced while the run wrote into it; what was "
                "trained since the last save is lost, start again with another --out"
            )


@contextmanager
def locked(out):
    """Hold the folder's lock, a `Lock`, against all other processes; makes the folder.

    A dead process's lock is taken over. At the end the lock goes, and so does a folder that holds
    nothing. Raises ValueError that names host and process of the holder.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / LOCK
    file = _open_locked(path)
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


def _open_locked(path):
    """The lock file, open and locked."""
    if fcntl is None:
        return _create(path)
    while True:
        file = open(path, "a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = _holder(path)
            file.close()
            raise ValueError(
                f"{path}: {holder} trains in this folder; wait for it, stop it, or take another "
                "--out"
            ) from None
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        file.close()  # the holder before removed it between our opening and locking: once more


def _create(path):
    """The lock file where files cannot be locked: that it exists is the lock."""
    try:
        return open(path, "x+", encoding="utf-8")
    except FileExistsError:
        raise ValueError(
            f"{path}: {_holder(path)} trains in this folder; if it does not any more, delete the "
            "file"
        ) from None


def _holder(path):
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']}, since {holder['started']},"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
