"""Features that a model gave to image files before, kept in a file beside the cache.

One SQLite file for each model; a row for each image, by a digest of all that its features depend
on. Several processes may read and write it, and a killed one leaves what it has added.
"""

import hashlib
import json
import os
import sqlite3
import sys
from pathlib import Path

import numpy as np

DIGEST = 16  # bytes
AT_ONCE = 500  # keys in one question


def digest(*parts):
    """A digest of bytes, or of what JSON can hold."""
    found = hashlib.blake2b(digest_size=DIGEST)
    for part in parts:
        content = part if isinstance(part, bytes) else json.dumps(part).encode()
        found.update(len(content).to_bytes(8, "big") + content)
    return found.digest()


def key_of_image(path, class_ids, boxes):
    """The digest of an image file and its boxes; None where there is no such file.

    The file counts by its place, size and time; class_ids (n) and boxes (n, 6) are arrays.
    """
    try:
        found = os.stat(path)
    except OSError:
        return None
    of_file = [os.path.abspath(path), found.st_size, found.st_mtime_ns]
    return digest(of_file, class_ids.tobytes(), boxes.tobytes())


class FeatureStore:
    """The rows of one model. Where the file cannot be used, a line says so and none is kept.

    model_digest: of all that the features of an image depend on besides the image.
    """

    def __init__(self, folder, model_digest):
        self.path = Path(folder) / f"features-{model_digest.hex()}.sqlite"
        self.connection = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._open()
        except (OSError, sqlite3.Error) as error:
            self._give_up(error)

    def _open(self):
        try:
            self._connect()
        except sqlite3.OperationalError:
            raise  # locked, read-only or no space: the file itself may be whole
        except sqlite3.DatabaseError as error:
            print(f"{self.path}: not readable ({error}); it is rebuilt", file=sys.stderr)
            self.close()
            self.path.unlink()
            self._connect()

    def _connect(self):
        self.connection = sqlite3.connect(self.path)
        with self.connection:
            self.connection.execute(
                "CREATE TABLE IF NOT EXISTS features (key BLOB PRIMARY KEY, width INTEGER, "
                "height INTEGER, feature BLOB, digest BLOB) WITHOUT ROWID"
            )

    def _give_up(self, error):
        print(f"{self.path}: features are not kept ({error})", file=sys.stderr)
        self.close()
        is_damaged = isinstance(error, sqlite3.DatabaseError)
        if is_damaged and not isinstance(error, sqlite3.OperationalError):
            self.path.unlink()  # the next call begins anew

    def close(self):
        if self.connection is not None:
            self.connection.close()
        self.connection = None

    def read(self, keys):
        """{key: ((width, height), feature (D) float32)} of those keys that have a whole row.

        None among the keys, of files that are not there, has none.
        """
        found = {}
        keys = [key for key in keys if key is not None]
        for first in range(0, len(keys), AT_ONCE):
            for key, width, height, feature, check in self._rows(keys[first : first + AT_ONCE]):
                if check == digest(key, [width, height], feature):
                    found[key] = ((width, height), np.frombuffer(feature, np.float32).copy())
        return found

    def _rows(self, keys):
        if self.connection is None:
            return []
        marks = ",".join("?" * len(keys))
        question = (
            f"SELECT key, width, height, feature, digest FROM features WHERE key IN ({marks})"
        )
        try:
            return self.connection.execute(question, keys).fetchall()
        except sqlite3.Error as error:
            self._give_up(error)
            return []

    def add(self, keys, sizes, features):
        """Keep rows: keys, sizes (width, height), features (B, D) float32."""
        if self.connection is None:
            return
        rows = []
        for key, (width, height), feature in zip(keys, sizes, features, strict=True):
            content = np.ascontiguousarray(feature, dtype=np.float32).tobytes()
            check = digest(key, [width, height], content)
            rows.append((key, width, height, content, check))
        try:
            with self.connection:
                self.connection.executemany(
                    "INSERT OR REPLACE INTO features VALUES (?, ?, ?, ?, ?)", rows
                )
        except sqlite3.Error as error:
            self._give_up(error)
