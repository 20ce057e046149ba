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
def written_whole(path):
    """Gives a temporary path beside `path`; what is written to it takes the name at the end.

    with written_whole("models/best_model.pth") as temporary:
        torch.save(content, temporary)

    Files and folders alike. After an error nothing of the new content is left, and what stood at
    `path` stays. A killed process leaves `NAME.*.tmp`. Raises OSError that names `path`; torch
    reports a full disk as RuntimeError, which becomes an OSError too.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if temporary.is_file():
            _flush_to_disk(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise OSError(
            f"{path}: not written ({reason}); what stood there is whole, is the disk full?"
        ) from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            with suppress(OSError):  # its folder may be none: what is wrong is told above
                temporary.unlink()


def _flush_to_disk(path):
    """Wait until the content is on the disk: a power cut could leave the name without it."""
    with open(path, "r+b") as file:
        os.fsync(file.fileno())
