"""Decode the images of a split once: into RAM while it is large enough, else into a cache file.

A cache file is for one list of images, detections and labels and for one size. It is believed only
if size and time of every file it was made from are as they were, and is never changed: a new one
is written beside it and takes its name. In bytes:

    preamble   magic, length and digest of the header
    4096 ...   pixels (I, 3, image_size, image_size) uint8
    then       header, JSON: fingerprint, sizes, hashes, boxes, unknown labels

The header comes last, since it is known only when all images are decoded.
"""

import contextlib
import hashlib
import json
import math
import os
import secrets
import struct
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np
import PIL
import torch
import torchvision
from tqdm import tqdm

from backbones import preprocess
from dataset import images
from det_formats.det_json import load_detections
from V_Graph import detection_arrays

# Raise it whenever `images.open_image`, `images.content_hash`, `clip.resize_and_crop` or
# `V_Graph.detection_arrays` gives other values than before: caches made until then become stale.

PREPROCESSING = 1


_MAGIC = b"FG-CROSS cache 1"  # raise the number when the layout of the file changes


_PREAMBLE = struct.Struct("<16sQ16s")


_START = 4096  # a whole page, so that the pixels are aligned


_REMEDY = "name another folder with --cache-dir, or keep the images in RAM with a larger --cache-gb"


class Decoded(NamedTuple):
    """The images of a split and their detections. Where there are problems, pixels are missing."""

    pixels: object  # (I, 3, image_size, image_size) uint8; item i is a tensor
    sizes: list  # (width, height) of the original image in pixels; None where unreadable
    hashes: list  # `images.content_hash` of the original image; None where unreadable
    problems: list  # what is wrong with missing and unreadable images
    boxes: list  # (slots, boxes) of each image, as `V_Graph.detection_arrays`


def default_cache_dir():
    """The folder for cache files where none is named: `fg-cross` below the user's cache."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fg-cross"


def read_images(paths, detections, image_size, label_map, cache_gb, cache_dir=None):
    """Decode I images and read their detections (None for an image without), or find both cached.

    Up to cache_gb GiB of pixels are kept in RAM; more are mapped from a file in cache_dir (default
    `default_cache_dir()`). Returns a Decoded, which lists unreadable images; a set that has some is
    not cached. Raises ValueError for a malformed detection file and a folder that takes no cache.
    """
    shape = (len(paths), 3, image_size, image_size)
    if math.prod(shape) <= cache_gb * 2**30:
        boxes, _ = _read_boxes(detections, label_map)
        pixels = torch.zeros(shape, dtype=torch.uint8)
        return Decoded(pixels, *_decode(paths, image_size, pixels.__setitem__), boxes)
    path = _cache_file(paths, detections, image_size, label_map, cache_dir or default_cache_dir())
    # Taken before decoding: a file that changes meanwhile makes the cache stale, not wrong.
    fingerprint = _fingerprint([*paths, *detections])
    if os.path.exists(path):
        try:
            return _open(path, shape, fingerprint, label_map)
        except ValueError as error:
            print(f"{error}; it is rebuilt")
    decoded = _build(path, paths, shape, fingerprint, *_read_boxes(detections, label_map))
    if decoded.problems:
        return decoded
    try:
        return _open(path, shape, fingerprint, label_map)
    except ValueError as error:
        raise ValueError(f"{error}, and another process holds it; {_REMEDY}") from None


# ------------------------------------------------------------------ what a cache is made from


def _digest(content):
    return hashlib.blake2b(content, digest_size=16).digest()


def _cache_file(paths, detections, image_size, label_map, folder):
    """Where the cache of just these images, detections and labels lies."""
    names = [path and os.path.abspath(path) for path in [*paths, *detections]]
    key = _digest(json.dumps([names, label_map.lines]).encode()).hex()
    return Path(folder).absolute() / f"{len(paths)}-images-{image_size}px-{key}.cache"


def _fingerprint(paths):
    """A digest of size and time of every file, and of what turns them into pixels."""

    def stat(path):
        try:
            found = os.stat(path)
        except (TypeError, OSError):  # no detections, or a missing file, which is reported later
            return None
        return found.st_size, found.st_mtime_ns

    versions = PREPROCESSING, PIL.__version__, torchvision.__version__
    return _digest(json.dumps([versions, [stat(path) for path in paths]]).encode()).hex()


def _read_boxes(files, label_map):
    """(slots, boxes) of each detection file, and the labels that took the slot "other"."""
    boxes, unknown = [], set()
    for file in files:
        found = [] if file is None else load_detections(file)
        boxes.append(detection_arrays(found, label_map))
        unknown |= {
            d["label"] for d in found if label_map.class_id(d["label"]) == len(label_map) - 1
        }
    return boxes, sorted(unknown)


def _decode(paths, image_size, keep):
    """Decode all images and call keep(i, pixels) for each; returns sizes, hashes and problems."""
    transform = preprocess.resize_and_crop(image_size)

    def read(i):
        try:
            image = images.open_image(paths[i])
        except ValueError as error:
            return None, None, str(error)
        array = np.array(transform(image))  # (image_size, image_size, 3)
        keep(i, torch.from_numpy(array).permute(2, 0, 1))
        return image.size, images.content_hash(image), None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        read_all, few = pool.map(read, range(len(paths))), len(paths) < 100
        bar = tqdm(read_all, "images", len(paths), leave=False, unit="image", disable=few)
        found = list(bar)
    problems = [problem for _, _, problem in found if problem]
    return [size for size, _, _ in found], [digest for _, digest, _ in found], problems


# ------------------------------------------------------------------ the file


class MappedPixels:
    """Pixels (I, 3, image_size, image_size) uint8 in a cache file; an item is read when asked for.

    Pickled, it is the file's name: loader processes map the file anew, or raise ValueError where
    it is not the same any more.
    """

    def __init__(self, path, array, digest):
        self.path, self.shape = path, array.shape
        self._array, self._digest = array, digest

    def __len__(self):
        return len(self._array)

    def __getitem__(self, i):
        return torch.from_numpy(np.array(self._array[i]))  # a copy: the map is read-only

    def __reduce__(self):
        return _map_again, (self.path, self.shape, self._digest)


def _map_again(path, shape, digest):
    with contextlib.suppress(ValueError):
        pixels, _ = _map(path, shape)
        if pixels._digest == digest:
            return pixels
    raise ValueError(f"{path}: removed or rebuilt while it was in use; start again")


def _map(path, shape):
    """MappedPixels and header of a file; ValueError says what is wrong with the file."""
    end = _START + math.prod(shape)
    try:
        with open(path, "rb") as file:  # once: another process may replace the file meanwhile
            head = file.read(_PREAMBLE.size)
            if not head.startswith(_MAGIC[: len(head)]):
                raise ValueError(f"{path}: foreign (not a cache file of this version)")
            _, length, digest = _PREAMBLE.unpack(head.ljust(_PREAMBLE.size, b"\0"))
            if os.fstat(file.fileno()).st_size != end + length:
                raise ValueError(f"{path}: truncated (not as long as it was written)")
            file.seek(end)
            header = file.read()
            if _digest(header) != digest:
                raise ValueError(f"{path}: foreign (its header is not the one that was written)")
            array = np.memmap(file, np.uint8, "r", _START, shape)
    except OSError as error:
        raise ValueError(f"{path}: not readable ({error.strerror})") from None
    return MappedPixels(path, array, digest), json.loads(header)


def _open(path, shape, fingerprint, label_map):
    """A Decoded from a cache file; ValueError says why the file cannot be used."""
    pixels, header = _map(path, shape)
    if header["fingerprint"] != fingerprint:
        raise ValueError(f"{path}: stale (images, detections or versions have changed)")
    for label in header["unknown"]:
        label_map.class_id(label)  # warns, as reading the detections does
    boxes = [
        (np.array(class_ids, dtype=int), np.array(rows, dtype=float).reshape(-1, 6))
        for class_ids, rows in header["boxes"]
    ]
    return Decoded(pixels, [tuple(size) for size in header["sizes"]], header["hashes"], [], boxes)


def _build(path, paths, shape, fingerprint, boxes, unknown):
    """Put a new file at `path`, unless images are unreadable; returns a Decoded without pixels."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        for leftover in path.parent.glob(f"{path.name}.*"):  # of a process that was killed
            if time.time() - leftover.stat().st_mtime > 86400:
                leftover.unlink()
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            found = _decode(paths, shape[-1], _row_writer(file))
            decoded = Decoded(torch.empty(0, *shape[1:], dtype=torch.uint8), *found, boxes)
            if decoded.problems:
                return decoded
            _finish(file, decoded, shape, fingerprint, unknown)
        # Windows refuses where a faster process has its own file in use, which then is as good.
        with contextlib.suppress(PermissionError):
            os.replace(temporary, path)
        return decoded
    except OSError as error:
        size = f"{math.prod(shape) / 2**30:.2g} GiB"
        raise ValueError(f"{path.parent}: no cache of {size} there ({error}); {_REMEDY}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _row_writer(file):
    """A keep(i, pixels) for `_decode` that writes them to their place in the file."""
    lock = Lock()  # no map, since writing to one on a full disk kills the process

    def keep(i, pixels):
        row = pixels.contiguous().numpy()
        with lock:
            file.seek(_START + i * row.nbytes)
            file.write(row)

    return keep


def _finish(file, decoded, shape, fingerprint, unknown):
    """Write header and preamble, and see all of it on the disk."""
    header = {"fingerprint": fingerprint, "sizes": decoded.sizes, "hashes": decoded.hashes}
    boxes = [(class_ids.tolist(), rows.tolist()) for class_ids, rows in decoded.boxes]
    content = json.dumps({**header, "boxes": boxes, "unknown": unknown}).encode()
    file.seek(_START + math.prod(shape))
    file.write(content)
    file.seek(0)
    file.write(_PREAMBLE.pack(_MAGIC, len(content), _digest(content)))
    file.flush()
    os.fsync(file.fileno())
