"""Files that are written whole or not at all.

A root file because every room writes: checkpoints, caches, features, exports, logs. A process that
is killed, or a disk that is full, leaves the old file as it was.
"""

import os
import secrets
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def written_whole(path, flush=True):
    """Gives a temporary path beside `path`; what is written to it takes the name at the end.

    with written_whole("models/best_model.pth") as temporary:
        torch.save(content, temporary)

    Files and folders alike; of a link, what it leads to. After an error nothing of the new content
    is left, and what stood at `path` stays. A killed process leaves `NAME.*.tmp`. A device or pipe
    has no name to take: it is written to as it is. flush=False is for many small files that can be
    made again: a power cut may leave an empty one. Raises OSError that names `path`; torch's file
    writer reports a full disk as RuntimeError, which becomes an OSError too.
    """
    path = Path(path)
    if path.exists() and not (path.is_file() or path.is_dir()):
        try:
            yield path
        except OSError as error:
            raise OSError(f"{path}: not written ({error})") from error
        return
    target = Path(os.path.realpath(path)) if path.is_symlink() else path
    temporary = target.with_name(f"{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        if not target.parent.is_dir():
            target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if flush and temporary.is_file():
            _flush_to_disk(temporary)
        os.replace(temporary, target)
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and _TORCHS_WRITER not in str(error):
            raise
        reason = str(error).splitlines()[0]
        raise OSError(
            f"{path}: not written ({reason}); what stood there is whole, is the disk full?"
        ) from error
    finally:
        if os.path.lexists(temporary):
            _remove(temporary)


def _remove(path):
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):  # what is wrong has been told
            path.unlink()


def write_text(path, text, flush=True):
    """Write a text file whole or not at all; flush, and OSError, as of `written_whole`."""
    with written_whole(path, flush) as temporary:
        temporary.write_text(text, encoding="utf-8")


_TORCHS_WRITER = "inline_container.cc"  # stands in whatever error torch.save's writer raises


def _flush_to_disk(path):
    """Wait until the content is on the disk: a power cut could leave the name without it."""
    with open(path, "r+b") as file:
        os.fsync(file.fileno())
