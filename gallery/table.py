"""The index: a folder with one LanceDB table, a row a tile, and what it was made with.

A tile is an image file, or a window of one. Whatever is written is one commit: who reads sees all
of it or nothing, and a process that is killed leaves the commit before. One process writes at a
time. Sizes in the shapes below: R rows, D of an embedding, n objects of a tile.
"""

import datetime
import json
import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from escaping import escaped
from gallery.footprints import centre
from locking import locked_folder

FORMAT = 1  # of the columns and of the settings: raise it when older indexes cannot be read
TABLE = "tiles"
LOCK = "index.lock"
_FOLDER = f"{TABLE}.lance"
INSTALL = "pip install -r requirements-search.txt"

# ------------------------------------------------------------------ what a row is


class Settings(NamedTuple):
    """What an index was made with. Rows that are made otherwise cannot stand beside its rows."""

    images: str  # the folder that paths are relative to
    checkpoint: str  # the model's file or name
    digest: str  # of the model's weights and of all else that embeddings depend on
    labels: list  # lines of the label map
    width: int  # D
    precision: str  # of the image tower
    tile: int | None  # side of the windows in pixels; None for whole images
    overlap: int | None  # of the windows, in pixels
    bands: list | None  # which three are red, green and blue, from 1 on
    stretch: list | None  # percentiles of a scene that become 0 and 255

    def columns(self):
        """Columns that filters may name: {name: "number", "text" or "time"}."""
        return {**FILTERED, **dict.fromkeys(kind_columns(self.labels), "number")}


FILTERED = {
    "id": "text",
    "path": "text",
    "bytes": "number",
    "modified": "time",
    "left": "number",
    "top": "number",
    "width": "number",
    "height": "number",
    "lat": "number",
    "lon": "number",
    "objects": "number",
}

_OTHERS = ("vector", "detections", "labels", "boxes", "footprint")


def kind_columns(labels):
    """The column that counts each kind, by class id: its first name with underscores.

    labels: lines of a label map. Names of other columns, and of kinds before, get `_2` and so on.
    """
    taken = {*FILTERED, *_OTHERS}
    names = []
    for line in [*labels, "other"]:
        first = line.split(",")[0].strip().lower()
        plain = re.sub(r"\W+", "_", first).strip("_") or "kind"
        name = plain
        number = 2
        while name in taken:
            name = f"{plain}_{number}"
            number += 1
        taken.add(name)
        names.append(name)
    return names


class Tile(NamedTuple):
    """A row, but for what is known of its file."""

    window: tuple  # (left, top, width, height) in pixels of the file's image
    vector: np.ndarray  # (D), of unit length
    class_ids: np.ndarray  # (n)
    boxes: np.ndarray  # (n, 6): cx, cy, w, h in pixels of the window, angle, score
    footprint: list | None  # four corners (lon, lat), from the upper left clockwise


class Stamp(NamedTuple):
    """By what a change of a file is told."""

    bytes: int
    modified: int  # microseconds since 1970
    detections: str  # size and time of its detection file; "" for none


def tile_id(path, window, is_whole):
    """The name of a tile: its file's path, and of a window where it lies."""
    if is_whole:
        return path
    return f"{path}#{','.join(str(number) for number in window)}"


def _schema(settings):
    import pyarrow as pa

    number, real = pa.int32(), pa.float64()
    fields = [
        pa.field("id", pa.string()),
        pa.field("path", pa.string()),
        pa.field("bytes", pa.int64()),
        pa.field("modified", pa.timestamp("us", tz="UTC")),
        pa.field("detections", pa.string()),
        *(pa.field(name, number) for name in ("left", "top", "width", "height")),
        pa.field("lat", real),
        pa.field("lon", real),
        pa.field("footprint", pa.list_(real)),  # 8: lon, lat of four corners
        pa.field("objects", number),
        *(pa.field(name, number) for name in kind_columns(settings.labels)),
        pa.field("labels", pa.list_(pa.int16())),  # n class ids
        pa.field("boxes", pa.list_(pa.float32())),  # 6 n
        pa.field("vector", pa.list_(pa.float32(), settings.width)),
    ]
    content = {"format": FORMAT, **settings._asdict()}
    return pa.schema(fields, metadata={"fgcross": json.dumps(content)})


def rows_of(files, settings):
    """An Arrow table of rows: files is a list of (path, Stamp, Tiles of this file)."""
    import pyarrow as pa

    schema = _schema(settings)
    kinds = kind_columns(settings.labels)
    columns = {name: [] for name in schema.names}
    for path, stamp, tiles in files:
        for tile in tiles:
            counts = np.bincount(tile.class_ids, minlength=len(kinds))
            lon, lat = centre(tile.footprint) if tile.footprint else (None, None)
            row = {
                "id": tile_id(path, tile.window, settings.tile is None),
                "path": path,
                "bytes": stamp.bytes,
                "modified": stamp.modified,
                "detections": stamp.detections,
                **dict(zip(("left", "top", "width", "height"), tile.window, strict=True)),
                "lat": lat,
                "lon": lon,
                "footprint": tile.footprint and np.ravel(tile.footprint).tolist(),
                "objects": len(tile.class_ids),
                **dict(zip(kinds, counts.tolist(), strict=True)),
                "labels": tile.class_ids,
                "boxes": np.ravel(tile.boxes),
                "vector": tile.vector,
            }
            for name, value in row.items():
                columns[name].append(value)
    arrays = [pa.array(columns[field.name], field.type) for field in schema]
    return pa.Table.from_arrays(arrays, schema=schema)


# ------------------------------------------------------------------ open and make


def _database(folder):
    try:
        import lancedb
    except ImportError:
        raise ValueError(f"an index is a LanceDB table: {INSTALL}") from None
    return lancedb.connect(str(folder))


def is_remote(folder):
    """Whether a place is on object storage."""
    return "://" in str(folder)


def exists(folder):
    """Whether a folder, or a place on object storage, holds an index."""
    if not is_remote(folder):  # one that was killed before its first commit is none
        return any(Path(folder, _FOLDER, "_versions").glob("*.manifest"))
    try:
        return TABLE in _database(folder).list_tables().tables
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{escaped(folder)}: not reached ({reason})") from None


def open_index(folder):
    """(table, Settings) of an index; ValueError where there is none that can be read."""
    if not exists(folder):
        raise ValueError(f"{escaped(folder)}: no index; make one: python search.py index")
    try:
        table = _database(folder).open_table(TABLE)
        content = json.loads(table.schema.metadata[b"fgcross"])
        found = content.pop("format")
        settings = Settings(**content) if found == FORMAT else None
    except (KeyError, TypeError, ValueError, OSError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{escaped(folder)}: not an index of this project ({reason})") from None
    if settings is None:
        raise ValueError(f"{escaped(folder)}: of another version of this code; index anew")
    return table, settings


def create(folder, settings):
    """The table of a new index, with no rows."""
    return _database(folder).create_table(TABLE, schema=_schema(settings))


def require_own(folder):
    """Raise ValueError for a folder that holds other things than an index."""
    shown = escaped(folder)
    if str(folder).startswith("file:"):
        raise ValueError(f"--out {shown}: give the path without file:")
    if "?" in str(folder):  # by which addresses end
        raise ValueError(f"--out {shown}: LanceDB takes no ? in a path; name another folder")
    path = Path(folder)
    if is_remote(folder) or not path.exists() or exists(folder):
        return
    if not path.is_dir():
        raise ValueError(f"--out {escaped(folder)}: no folder; name another one")
    others = [one.name for one in path.iterdir() if one.name not in (LOCK, _FOLDER)]
    if others:
        raise ValueError(
            f"--out {escaped(folder)}: holds other files, as {escaped(min(others))}; name a new "
            "folder"
        )


def writing(folder):
    """Hold an index against other writers, see `locking.locked_folder`.

    On object storage there is no lock: two writers there have to be kept apart by their users.
    """
    if is_remote(folder):
        import contextlib

        return contextlib.nullcontext()
    return locked_folder(folder, LOCK, "writes this index")


def require_checkpoint(folder, settings, name, digest):
    """Raise ValueError where another checkpoint than the one of this name made an index."""
    if settings.digest != digest:
        raise ValueError(
            f"{escaped(folder)}: made with another checkpoint, {escaped(settings.checkpoint)} with "
            f"the hash {settings.digest}; {escaped(name)} has {digest}"
        )


def require_same(folder, found, wanted):
    """Raise ValueError where an index was made with other Settings than are wanted now."""
    require_checkpoint(folder, found, wanted.checkpoint, wanted.digest)
    for name in Settings._fields:
        before, now = getattr(found, name), getattr(wanted, name)
        if name not in ("checkpoint", "digest") and before != now:
            raise ValueError(
                f"{escaped(folder)}: made with {name} {escaped(before)}, now {escaped(now)}; give "
                "the same, or another --out"
            )


# ------------------------------------------------------------------ read and write


def stamps(table):
    """{path: Stamp} of all files of an index."""
    names = ["path", "bytes", "modified", "detections"]
    found = table.search().select(names).to_arrow()
    modified = found["modified"].cast("int64")
    columns = zip(
        found["path"].to_pylist(),
        found["bytes"].to_pylist(),
        modified.to_pylist(),
        found["detections"].to_pylist(),
        strict=True,
    )
    return {path: Stamp(*stamp) for path, *stamp in columns}


def put(table, rows, replaced):
    """Write rows in one commit, in the place of all rows of the paths in `replaced`."""
    if replaced:
        merge = table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
        merge.when_not_matched_by_source_delete(_of_paths(replaced)).execute(rows)
    else:
        table.add(rows)


def put_fragments(table, fragments, replaced):
    """As `put`, for rows that were written already: `fragments`, lance.FragmentMetadata."""
    import lance

    dataset = table.to_lance()
    removed = []
    updated = []
    for fragment in dataset.get_fragments() if replaced else []:
        left = fragment.delete(_of_paths(replaced))
        if left is None:
            removed.append(fragment.fragment_id)
        elif left != fragment.metadata:
            updated.append(left)
    if fragments or removed or updated:
        operation = lance.LanceOperation.Update(
            removed_fragment_ids=removed, updated_fragments=updated, new_fragments=fragments
        )
        lance.LanceDataset.commit(dataset, operation, read_version=dataset.version)
        table.checkout_latest()


def remove(table, paths):
    """Take all rows of these paths out, in a commit for each thousand paths."""
    for start in range(0, len(paths), 1000):
        table.delete(_of_paths(paths[start : start + 1000]))


def _of_paths(paths):
    quoted = ", ".join("'" + path.replace("'", "''") + "'" for path in paths)
    return f"path IN ({quoted})"


def tidy(table, keep_versions):
    """Join small files, and remove old versions and what a killed process has left behind."""
    table.optimize(cleanup_older_than=datetime.timedelta(days=36500))
    table.to_lance().cleanup_old_versions(
        retain_versions=keep_versions,
        # Where the lock is held nobody else writes: what no commit knows is a dead process's.
        delete_unverified=not is_remote(table.uri),
    )


def ids_where(table, condition):
    """The ids of the rows that fulfil an SQL condition, as a list."""
    found = table.search().where(condition).select(["id"]).to_arrow()
    return found["id"].to_pylist()


def nearest(table, vector, number, condition, columns, probes, refine=None):
    """Rows near a vector (D) by the table's index of vectors, as an Arrow table, nearest first.

    condition: an SQL condition, or None; rows that do not fulfil it are no neighbours. probes: how
    many partitions of the index are searched; with a condition all, as what is left of the nearest
    ones may be little. refine: so many times `number` rows are compared by their vectors; None:
    none, the order is rough.
    """
    found = (
        table.search(vector)
        .distance_type("cosine")
        .limit(number)
        .nprobes(probes)
        .select([*columns, "_distance"])
    )
    if refine is not None:
        found = found.refine_factor(refine)
    if condition is not None:
        found = found.where(condition, prefilter=True).maximum_nprobes(0)  # no limit
    return found.to_arrow().drop_columns("_distance")


def create_vector_index(table, partitions):
    """Make the index of vectors, in one commit: one bit a dimension, in partitions."""
    from lancedb.index import IvfRq

    config = IvfRq(distance_type="cosine", num_bits=1, num_partitions=partitions)
    table.create_index("vector", config=config)


def partitions(table):
    """How many partitions the index of vectors has; None where there is no index."""
    # Else all centroids are loaded and LanceDB prints a warning that they are.
    os.environ.setdefault("LANCE_INCLUDE_VECTOR_CENTROIDS", "false")
    for index in table.list_indices():
        if index.columns == ["vector"]:
            parts = table.to_lance().stats.index_stats(index.name)["indices"]
            return max(part["num_partitions"] for part in parts)
    return None


def vectors_at(table, rows):
    """The vectors (R, D) of rows, given by their places in the table, in any order."""
    return vectors_of(table.take_offsets(rows).select(["vector"]).to_arrow()["vector"])


def read(table, columns):
    """Columns of all rows, as an Arrow table."""
    return table.search().select(list(columns)).to_arrow()


def read_in_batches(table, columns):
    """Columns of all rows, as Arrow tables one after another: not all are in memory at once."""
    import pyarrow as pa

    for batch in table.search().select(list(columns)).to_batches():
        yield pa.Table.from_batches([batch])


def vectors_of(column):
    """An Arrow column of vectors as one tensor (R, D), float32."""
    vectors = torch.empty(len(column), column.type.list_size)
    start = 0
    for chunk in column.chunks:
        values = chunk.flatten().to_numpy().reshape(-1, column.type.list_size)
        vectors[start : start + len(values)].numpy()[:] = values
        start += len(values)
    return vectors
