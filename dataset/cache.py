"""Decode the images of a split once: into RAM while it is large enough, else into a cache on disk.

A cache is a pair of files for one list of images, detections and labels and for one size:

    NAME.npy     pixels (I, 3, image_size, image_size) uint8 as numpy maps them; after them, where
                 numpy does not look, the digest of the JSON file
    NAME.json    what the pixels were made from, and sizes, hashes, boxes and unknown labels

It is believed only if the digest fits, so that both are of one writing, and if size and time of
every file it was made from are as they were. A cache is never changed: a new pair takes its names.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import torch

from backbones.preprocess import pixels_of, resize_and_crop
from dataset import images
from dataset.ahead import ahead
from det_formats.det_json import load_detections
from progress import Progress
from V_Graph import detection_arrays
from writing import written_whole

# Raise it whenever `images.open_image`, `images.content_hash`, `preprocess.resize_and_crop` or
# `V_Graph.detection_arrays` gives other values than before, or the JSON file gets other fields:
# caches made until then become stale.
PREPROCESSING = 2

LEFTOVER_AGE = 24 * 60 * 60  # seconds after which an unfinished file is of a killed process

RAM_GIB = 4  # of pixels of a split that are kept in RAM

REMEDY = "name a folder with more room in the environment variable FGCROSS_CACHE"


class Decoded(NamedTuple):
    """The images of a split and their detections. Where there are problems, pixels are missing."""

    pixels: object  # (I, 3, image_size, image_size) uint8; item i is a tensor
    sizes: list  # (width, height) of the original image in pixels; None where unreadable
    hashes: list  # `images.content_hash` of the original image; None where unreadable
    problems: list  # what is wrong with missing and unreadable images
    boxes: list  # (class ids, boxes) of each image, as `V_Graph.detection_arrays`


def cache_dir():
    """The folder for cache files: FGCROSS_CACHE, else `fg-cross` below the user's cache."""
    named = os.environ.get("FGCROSS_CACHE")
    if named:
        return Path(named)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fg-cross"


def read_images(paths, detections, image_size, label_map, ram_gib=RAM_GIB):
    """Decode I images and read their detections (None for an image without), or find both cached.

    Up to ram_gib GiB of pixels are kept in RAM; more are mapped from a file in `cache_dir()`.
    Returns a Decoded, which lists unreadable images; a set that has some is not cached. Raises
    ValueError for a malformed detection file and a folder that takes no cache.
    """
    shape = (len(paths), 3, image_size, image_size)
    if math.prod(shape) <= ram_gib * 2**30:
        return _read_into_memory(paths, detections, shape, label_map)
    pixel_file = _pixel_file(paths, detections, image_size, label_map)
    # Taken before decoding: a file that changes meanwhile makes the cache stale, not wrong.
    fingerprint = _fingerprint([*paths, *detections])
    if pixel_file.exists():
        try:
            return _open(pixel_file, shape, fingerprint, label_map)
        except ValueError as error:
            print(f"{error}; it is rebuilt")
    return _build(pixel_file, paths, detections, shape, fingerprint, label_map)


# ------------------------------------------------------------------ what a cache is made from


def _digest(content):
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _pixel_file(paths, detections, image_size, label_map):
    """Where the pixels of just these images, detections and labels lie."""
    names = [path and os.path.abspath(path) for path in [*paths, *detections]]
    key = _digest(json.dumps([names, label_map.lines]).encode())
    return cache_dir().absolute() / f"{len(paths)}-images-{image_size}px-{key}.npy"


def _fingerprint(paths):
    """A digest of size and time of every file, and of what turns them into pixels."""
    versions = [PREPROCESSING, PIL.__version__]
    return _digest(json.dumps([versions, [_size_and_time(path) for path in paths]]).encode())


def _size_and_time(path):
    """None for an image without detections and for a missing file, which is reported later."""
    if path is None:
        return None
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def read_boxes(files, label_map):
    """(class ids, boxes) of each detection file, and the labels that became "other"."""
    other = len(label_map) - 1
    boxes = []
    unknown = set()
    for file in Progress(files, "read detections", "files"):
        found = [] if file is None else load_detections(file)
        boxes.append(detection_arrays(found, label_map))
        labels = {detection["label"] for detection in found}
        unknown |= {label for label in labels if label_map.class_id(label) == other}
    return boxes, sorted(unknown)


# ------------------------------------------------------------------ decoding


class DecodedImage(NamedTuple):
    """A decoded image, or what is wrong with it."""

    pixels: object = None  # (3, image_size, image_size) uint8, contiguous
    size: tuple | None = None
    content_hash: str | None = None
    problem: str | None = None


def decode(path, image_size, hashed=False):
    """The DecodedImage of a file, without content hash unless it is asked for."""
    try:
        image = images.open_image(path)
    except ValueError as error:
        return DecodedImage(problem=str(error))
    pixels = pixels_of(resize_and_crop(image, image_size))  # (3, image_size, image_size)
    content_hash = images.content_hash(image) if hashed else None
    return DecodedImage(pixels, image.size, content_hash)


def _decode(paths, image_size):
    """Yield a DecodedImage for each path, in order; several are decoded at once, but few wait."""
    threads = os.cpu_count() or 1
    items = Progress(paths, "decode", "images")
    return ahead(lambda path: decode(path, image_size, hashed=True), items, 4 * threads, threads)


def _collected(pixels, decoded, boxes):
    """A Decoded from the DecodedImages of a split."""
    return Decoded(
        pixels=pixels,
        sizes=[image.size for image in decoded],
        hashes=[image.content_hash for image in decoded],
        problems=[image.problem for image in decoded if image.problem],
        boxes=boxes,
    )


def _read_into_memory(paths, detections, shape, label_map):
    """A Decoded whose pixels are a tensor."""
    boxes, _ = read_boxes(detections, label_map)
    pixels = torch.zeros(shape, dtype=torch.uint8)
    decoded = []
    for i, image in enumerate(_decode(paths, shape[-1])):
        if image.pixels is not None:
            pixels[i] = torch.from_numpy(image.pixels)
        decoded.append(image._replace(pixels=None))
    return _collected(pixels, decoded, boxes)


# ------------------------------------------------------------------ writing a pair


class _UnreadableImages(Exception):
    """Ends the writing of a cache, so that no file of it is left."""


def _build(pixel_file, paths, detections, shape, fingerprint, label_map):
    """Write a new pair and open it; where images are unreadable a Decoded without pixels."""
    boxes, unknown = read_boxes(detections, label_map)
    _remove_leftovers(pixel_file)
    try:
        decoded = _write_pair(pixel_file, paths, shape, fingerprint, boxes, unknown)
    except OSError as error:
        # Windows refuses where a faster process has its own pair in use, which is as good.
        with contextlib.suppress(ValueError):
            return _open(pixel_file, shape, fingerprint, label_map)
        size = f"{math.prod(shape) / 2**30:.2g} GiB"
        reason = _first_cause(error)
        raise ValueError(
            f"{pixel_file.parent}: no cache of {size} there ({reason}); {REMEDY}"
        ) from None
    if decoded.problems:
        return decoded
    try:
        return _open(pixel_file, shape, fingerprint, label_map)
    except ValueError as error:
        raise ValueError(f"{error}, and another process writes it; {REMEDY}") from None


def _first_cause(error):
    """What the system said, below the errors that `written_whole` made of it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _remove_leftovers(pixel_file):
    """Remove what killed processes have left of earlier attempts: it may be large."""
    for path in pixel_file.parent.glob(f"{pixel_file.stem}.*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > LEFTOVER_AGE:
                path.unlink()


def _write_pair(pixel_file, paths, shape, fingerprint, boxes, unknown):
    """Write both files, unless images are unreadable; returns a Decoded without pixels.

    The pixels take their name first: a process that is killed before the header has taken its own
    leaves pixels whose digest fits no header.
    """
    no_pixels = torch.empty(0, *shape[1:], dtype=torch.uint8)
    decoded = []
    try:
        with (
            written_whole(_header_file(pixel_file)) as header_temporary,
            written_whole(pixel_file) as temporary,
        ):
            with open(temporary, "xb") as file:
                file.write(_array_header(shape))
                for image in _decode(paths, shape[-1]):
                    if image.pixels is not None:
                        # Into no memory map: on a full disk that would kill the process.
                        file.write(image.pixels)
                    decoded.append(image._replace(pixels=None))
                result = _collected(no_pixels, decoded, boxes)
                if result.problems:
                    raise _UnreadableImages
                header = _header(fingerprint, result, unknown)
                file.write(_digest(header).encode())
            header_temporary.write_bytes(header)
    except _UnreadableImages:
        pass
    return result


def _array_header(shape):
    """The bytes that a .npy file of such pixels begins with."""
    file = io.BytesIO()
    entries = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, entries)
    return file.getvalue()


def _header_file(pixel_file):
    return pixel_file.with_suffix(".json")


def _header(fingerprint, decoded, unknown):
    """The bytes of the JSON file; equal for equal images, whoever writes it."""
    header = {
        "fingerprint": fingerprint,
        "sizes": decoded.sizes,
        "hashes": decoded.hashes,
        "boxes": [(class_ids.tolist(), rows.tolist()) for class_ids, rows in decoded.boxes],
        "unknown": unknown,
    }
    return json.dumps(header).encode()


# ------------------------------------------------------------------ reading a pair


class MappedPixels:
    """Pixels (I, 3, image_size, image_size) uint8 in a file; an item is read when asked for.

    An array of numbers, (B), gives the items of all, stacked.
    Pickled, it is the file's name: loader processes map the file anew, or raise ValueError where
    it is not the same any more.
    """

    def __init__(self, path, array, digest):
        self.path = path
        self.shape = array.shape
        self.digest = digest  # of the JSON file that belongs to the pixels
        self._array = array

    def __len__(self):
        return len(self._array)

    def __getitem__(self, i):
        return torch.from_numpy(np.take(self._array, i, axis=0))  # a copy: the map is read-only

    def __reduce__(self):
        return _map_again, (self.path, self.shape, self.digest)


def _map_again(path, shape, digest):
    with contextlib.suppress(ValueError):
        pixels = _map(path, shape)
        if pixels.digest == digest:
            return pixels
    raise ValueError(f"{path}: removed or rebuilt while it was in use; start again")


def _map(path, shape):
    """MappedPixels of a file; ValueError says what is wrong with the file."""
    array_header = _array_header(shape)
    end = len(array_header) + math.prod(shape)
    try:
        with open(path, "rb") as file:  # once: another process may replace the file meanwhile
            found = file.read(len(array_header))
            if not array_header.startswith(found):
                raise ValueError(f"{path}: foreign (no array of {shape} bytes)")
            if os.fstat(file.fileno()).st_size != end + len(_digest(b"")):
                raise ValueError(f"{path}: truncated (not as long as it was written)")
            array = np.memmap(file, np.uint8, "r", len(array_header), shape)
            file.seek(end)
            digest = file.read().decode("ascii", errors="replace")
    except OSError as error:
        raise ValueError(f"{path}: not readable ({error.strerror})") from None
    return MappedPixels(path, array, digest)


def _open(pixel_file, shape, fingerprint, label_map):
    """A Decoded from a pair of files; ValueError says why the pair cannot be used."""
    pixels = _map(pixel_file, shape)
    header = _read_header(_header_file(pixel_file), pixels.digest)
    if header["fingerprint"] != fingerprint:
        raise ValueError(f"{pixel_file}: stale (images, detections or versions have changed)")
    for label in header["unknown"]:
        label_map.class_id(label)  # warns, as reading the detections does
    boxes = []
    for class_ids, rows in header["boxes"]:
        boxes.append((np.array(class_ids, dtype=int), np.array(rows, dtype=float).reshape(-1, 6)))
    sizes = [tuple(size) for size in header["sizes"]]
    return Decoded(pixels, sizes, header["hashes"], problems=[], boxes=boxes)


def _read_header(path, digest):
    """The content of a JSON file that has this digest; ValueError says what is wrong with it."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: not readable ({error.strerror})") from None
    if _digest(content) != digest:
        raise ValueError(f"{path}: foreign (not written together with the pixels beside it)")
    return json.loads(content)
