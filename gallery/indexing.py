"""Encode a folder of images into an index: only what is new or has changed since the last time."""

import itertools
import os
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.utils import parametrize

from clip_gcn_image_feature_integration import (
    digest_of_weights,
    encode_batch,
    full_precision,
    image_settings,
)
from dataset.batches import Images
from dataset.feature_store import digest
from dataset.images import (
    files_below,
    is_image,
    match_detections,
    no_objects,
    require_detection_folder,
)
from det_formats.det_json import LabelMap
from escaping import escaped
from gallery import table
from gallery.rasters import reading_of
from gallery.reading import Cut, File, tiles
from progress import Progress

COMMIT_ROWS = 4096  # about how many rows are one commit
COMMIT_SECONDS = 30  # and after how long there is one, so that a kill costs no more

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def pick_precision(name, device):
    """--precision, else bf16 where the machine computes in it natively."""
    if name is not None:
        return name
    if torch.device(device).type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    found = getattr(torch.cpu, "get_capabilities", dict)()  # not in older versions
    return "bf16" if found.get("amx_bf16") or found.get("avx512_bf16") else "fp32"


def digest_of(model, checkpoint):
    """A digest, hexadecimal, of all that embeddings depend on besides images and boxes."""
    options = checkpoint["options"]
    return digest(
        digest_of_weights(model.state_dict(), checkpoint["definition"]),
        [options[name] for name in ("graph", "fusion", "max_objects")],
        checkpoint["labels"],
    ).hex()


# ------------------------------------------------------------------ what is to be done


class Plan(NamedTuple):
    """What an index lacks."""

    todo: list  # Files that are new or have changed
    stamps: dict  # {name: table.Stamp} of all files
    known: set  # names of todo that are in the index, with other content
    gone: list  # names that are in the index and not below the folder any more
    same: int  # files that are as they were
    problems: list  # lines for files that cannot be in an index


def plan(images, det_json, known):
    """The Plan for a folder of images and one of detections, or None; known: `table.stamps`."""
    names = [name for name in files_below(images) if is_image(name)]
    if not names:
        raise ValueError(f"{escaped(images)}: no image below it")
    problems = [
        f"{escaped(name)}: the name is not UTF-8; rename it" for name in names if not _is_text(name)
    ]
    names = [name for name in names if _is_text(name)]
    detections = dict.fromkeys(names)
    if det_json:
        require_detection_folder(det_json)
        detections = match_detections(names, det_json)
        if not any(detections.values()):
            raise ValueError(no_objects(names, list(detections.values()), det_json))
    elif any(stamp.detections for stamp in known.values()):
        raise ValueError(
            "the index has objects; name the folder of their detections by --det-json, or take "
            "another --out"
        )
    stamps = {}
    todo = []
    for name in names:
        path = Path(images, name)
        stamps[name] = _stamp(path, detections[name])
        if known.get(name) != stamps[name]:
            todo.append(File(path, name, detections[name]))
    gone = sorted(set(known) - set(names))
    changed = {file.name for file in todo} & set(known)
    return Plan(todo, stamps, changed, gone, len(names) - len(todo), problems)


def _is_text(name):
    """Whether a name is all UTF-8: the table takes no other bytes."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _stamp(path, detections):
    """The table.Stamp of an image file; of a link to nothing one that no file has."""
    try:
        found = os.stat(path)
        of_detections = ""
        if detections is not None:
            own = os.stat(detections)
            of_detections = f"{own.st_size} {own.st_mtime_ns}"
    except OSError:
        return table.Stamp(-1, 0, "")
    return table.Stamp(found.st_size, found.st_mtime_ns // 1000, of_detections)


# ------------------------------------------------------------------ encode and write


class Done(NamedTuple):
    """What an indexing did."""

    files: int  # that were encoded
    tiles: int
    empty: int  # windows without data, left out
    removed: int  # files that are gone
    same: int
    problems: list  # lines for files that could not be read
    seconds: float  # of reading, encoding and writing
    objects: int


def update(own_table, settings, todo, model, checkpoint, device, batch_size, threads):
    """Bring an index up to a Plan; returns the Done."""
    cut = cut_of(settings, checkpoint)
    graphs = Images([], [], [], **image_settings(checkpoint))
    table.remove(own_table, todo.gone)
    begin = time.monotonic()
    reads = tiles(todo.todo, cut, threads)
    encoded = encode(reads, graphs, model, device, batch_size, PRECISIONS[settings.precision])
    writer = _Writer(own_table, settings, todo)
    for _ in Progress(writer.files(encoded), "index", "images", total=len(todo.todo)):
        pass
    return Done(
        files=writer.done,
        tiles=writer.tiles,
        empty=writer.empty,
        removed=len(todo.gone),
        same=todo.same,
        problems=[*todo.problems, *writer.problems],
        seconds=time.monotonic() - begin,
        objects=writer.objects,
    )


def cut_of(settings, checkpoint):
    """How files become tiles of an index with these Settings, for a checkpoint's model."""
    return Cut(
        image_size=checkpoint["definition"]["image_size"],
        label_map=LabelMap(checkpoint["labels"]),
        reading=reading_of(settings.bands, settings.stretch),
        tile=settings.tile,
        overlap=settings.overlap,
    )


@torch.no_grad()
def encode(reads, graphs, model, device, batch_size, precision):
    """(Read, vector (D) or None at a file's end) of Reads, in their order.

    graphs: a dataset.batches.Images, for its graphs.
    """
    model.eval()
    waiting = []
    count = 0
    with full_precision(), parametrize.cached():
        for one in itertools.chain(reads, [None]):
            if one is not None:
                waiting.append(one)
                count += one.window is not None
            if count == batch_size or (one is None and waiting):
                vectors = iter(())
                if count:
                    vectors = iter(_encoded(waiting, graphs, model, device, precision))
                for read in waiting:
                    yield read, next(vectors) if read.window is not None else None
                waiting = []
                count = 0


def _encoded(waiting, graphs, model, device, precision):
    """Vectors (B, D) of the tiles among Reads."""
    own = [read for read in waiting if read.window is not None]
    boxes = [(read.class_ids, read.boxes) for read in own]
    batch = graphs.graphs(boxes, sizes=[read.window[2:] for read in own])
    batch["image"] = torch.from_numpy(np.stack([read.pixels for read in own]))
    return encode_batch(model, batch, device, precision)["fused"].numpy()


def tile_of(read, vector):
    """The table.Tile of a Read and its vector (D)."""
    boxes = np.asarray(read.boxes, dtype=np.float32).reshape(-1, 6)
    return table.Tile(read.window, vector, read.class_ids, boxes, read.footprint)


class _Writer:
    """Collects tiles by file and commits whole files."""

    def __init__(self, own_table, settings, todo):
        self.table = own_table
        self.settings = settings
        self.stamps = todo.stamps
        self.known = todo.known
        self.done = self.tiles = self.empty = self.objects = 0
        self.problems = []
        self._finished = []  # (name, Stamp, Tiles) of files that are not committed yet
        self._failed = []  # names of files that could not be read
        self._rows = 0  # of these files
        self._last = time.monotonic()

    def files(self, encoded):
        """Write all tiles; gives the name of each file when it is done."""
        own = []
        for read, vector in encoded:
            if read.window is not None:
                own.append(tile_of(read, vector))
                continue
            self._end(read, own)
            own = []
            yield read.file.name
        self._commit()

    def _end(self, read, own):
        """A file is read to its end, or as far as it could be read."""
        name = read.file.name
        if read.problem is not None:
            self.problems.append(read.problem)
            self._failed.append(name)
        else:
            self._finished.append((name, self.stamps[name], own))
            self.done += 1
            self.tiles += len(own)
            self.empty += read.empty
            self.objects += sum(len(tile.class_ids) for tile in own)
            self._rows += len(own)
        if self._rows >= COMMIT_ROWS or time.monotonic() - self._last > COMMIT_SECONDS:
            self._commit()

    def _commit(self):
        ended = [*self._failed, *(name for name, _, _ in self._finished)]
        replaced = [name for name in ended if name in self.known]
        rows = table.rows_of(self._finished, self.settings)
        if rows.num_rows:
            table.put(self.table, rows, replaced)
        else:
            table.remove(self.table, replaced)
        self._finished = []
        self._failed = []
        self._rows = 0
        self._last = time.monotonic()
