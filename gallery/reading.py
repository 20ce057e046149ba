"""Image files to tiles, read and cut in threads while the model encodes what came before.

The tiles of a file come in order, files too. A file's thread waits while enough of its tiles are
waiting, so few pixels are in memory, whatever the size of a scene.
"""

import queue
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from backbones.preprocess import pixels_of, resize_and_crop
from dataset.cache import read_boxes
from gallery.rasters import cut_boxes, open_scene, tiles_of

WAITING = 64  # tiles of one file


class File(NamedTuple):
    """An image file to be read."""

    path: object  # of the file
    name: str  # its path in the index
    detections: object  # its detection file, or None


class Cut(NamedTuple):
    """How files become tiles."""

    image_size: int  # pixels a side of what the model takes
    label_map: object
    reading: object  # a rasters.Reading
    tile: int | None  # side of the windows in pixels; None for whole images
    overlap: int | None


class Read(NamedTuple):
    """A tile, or with window None the end of a file."""

    file: File
    window: tuple | None = None  # (left, top, width, height) in pixels
    pixels: object = None  # (3, image_size, image_size) uint8
    class_ids: object = None
    boxes: object = None  # (n, 6) in pixels of the window
    footprint: list | None = None
    empty: int = 0  # at the end: windows without data
    problem: str | None = None  # at the end: what is wrong with the file


def tiles(files, cut, threads):
    """Every Read of some Files, in order."""
    stop = threading.Event()
    waiting = deque()
    ahead = 2 * threads if cut.tile else 64 * threads
    with ThreadPoolExecutor(threads) as pool:
        try:
            for file in files:
                found = queue.Queue(WAITING)
                pool.submit(_read_file, file, cut, found, stop)
                waiting.append(found)
                if len(waiting) > ahead:
                    yield from _drained(waiting.popleft())
            while waiting:
                yield from _drained(waiting.popleft())
        finally:
            stop.set()  # threads that wait would keep the process
            pool.shutdown(wait=True, cancel_futures=True)


def _drained(found):
    """All Reads of a file."""
    while True:
        one = found.get()
        if isinstance(one, BaseException):
            raise one
        yield one
        if one.window is None:
            return


def _read_file(file, cut, found, stop):
    """Put the Reads of a file into a queue; an error that is no fault of the file, too."""
    try:
        for one in tiles_of_file(file, cut):
            _put(found, one, stop)
    except Exception as error:
        _put(found, error, stop)


def _put(found, one, stop):
    while not stop.is_set():
        try:
            found.put(one, timeout=0.1)
            return
        except queue.Full:
            pass
    raise RuntimeError("stopped")


def tiles_of_file(file, cut):
    """Every Read of one File, in order; the last one ends it."""
    empty = 0
    try:
        [(class_ids, boxes)], _ = read_boxes([file.detections], cut.label_map)
        with open_scene(file.path, cut.reading) as scene:
            windows = [(0, 0, *scene.size)]
            if cut.tile:
                windows = tiles_of(scene.size, cut.tile, cut.overlap)
            for window in windows:
                image = scene.read(window)
                if image is None:
                    empty += 1
                    continue
                pixels = pixels_of(resize_and_crop(image, cut.image_size))
                own_ids, own_boxes = class_ids, boxes
                if cut.tile:
                    own_ids, own_boxes = cut_boxes(class_ids, boxes, window)
                    own_ids = np.array(own_ids, dtype=int)
                yield Read(file, window, pixels, own_ids, own_boxes, scene.footprint(window))
    except (OSError, ValueError) as error:
        yield Read(file, problem=str(error))
        return
    yield Read(file, empty=empty)
