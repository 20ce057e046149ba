"""A detector over many images of any size: images are decoded in threads while it computes."""

import itertools
from typing import NamedTuple

import numpy as np
from PIL import Image

from dataset.ahead import ahead
from dataset.images import open_image
from dataset.views import Seen, merged, views
from det_formats.convert import Limits, finished, folded
from det_formats.det_json import text_of_detections
from det_formats.entries import Detection
from det_formats.geometry import are_outside
from escaping import escaped
from progress import Progress
from writing import write_text

THREADS = 2  # that decode images, and as many that cut windows out of them
IMAGES_AHEAD = 2  # decoded images that wait: a large one takes much memory


class Settings(NamedTuple):
    """How images are looked at; as of `dataset.views` and of the detector."""

    side: int  # of the windows, in pixels
    overlap: int  # of the windows, in pixels
    scales: tuple
    least_score: float
    most_overlap: float
    batch_size: int  # windows at once


class Written(NamedTuple):
    """What `write_found` did."""

    images: int  # whose file was written
    objects: int
    left_out: list  # lines for boxes that are none: wholly outside of the image, or without area
    unreadable: list  # lines for images that cannot be read, and have no file


class Objects(NamedTuple):
    """What was found in an image, n objects."""

    path: object  # of the image
    size: tuple  # (width, height) in pixels
    boxes: np.ndarray  # (n, 5): as in our files
    scores: np.ndarray  # (n)
    labels: list


class Look(NamedTuple):
    """A window of an image on its way to the detector."""

    path: object  # of the image
    image: Image.Image  # the whole of it
    window: tuple  # (left, top, right, bottom) in pixels
    is_last: bool  # of its image


def write_found(detector, files, settings, label_map):
    """Write what a detector finds in each image as soon as it is done; returns the Written.

    files: {path of an image: its file of detections}; label_map: labels that this LabelMap knows
    become the first name of their class.
    """
    images = objects = 0
    left_out = []
    unreadable = []
    found = detect_all(detector, list(files), settings, label_map, unreadable)
    for own in Progress(found, "detect", "images", total=len(files)):
        detections, problems = _checked(own, label_map)
        write_text(files[own.path], text_of_detections(detections), flush=False)
        images += 1
        objects += len(detections)
        left_out += problems
    return Written(images, objects, left_out, unreadable)


def _checked(own, label_map):
    """(detections as in our files, lines for what is left out) of an Objects."""
    place = escaped(own.path)
    outside = are_outside(own.boxes, own.size)
    problems = [
        f"{place}: {escaped(own.labels[i])}: wholly outside of the image"
        for i in np.flatnonzero(outside)
    ]
    pairs = []
    for i in np.flatnonzero(~outside):
        box = tuple(own.boxes[i].tolist())
        pairs.append((place, Detection(own.labels[i], score=float(own.scores[i]), box=box)))
    result = finished(pairs, label_map, Limits())
    return result.detections, problems + result.problems


def detect_all(detector, paths, settings, label_map, problems):
    """The Objects of each image that can be read, in order.

    detector: as an `OnnxDetector`, its names, letterboxed and detect. What is wrong with images
    that cannot be read is added to the list `problems`.
    """
    opened = ahead(_opened, paths, IMAGES_AHEAD, THREADS)
    looks = _looks(opened, settings, problems)
    prepared = ahead(
        lambda look: (look, detector.letterboxed(look.image.crop(look.window))),
        looks,
        2 * settings.batch_size,
        THREADS,
    )
    seen = []
    while batch := list(itertools.islice(prepared, settings.batch_size)):
        pictures = [picture for _, picture in batch]
        results = detector.detect(pictures, settings.least_score, settings.most_overlap)
        for (look, _), found in zip(batch, results, strict=True):
            boxes = found.boxes.copy()
            boxes[:, :2] += look.window[:2]
            labels = [folded(detector.names[kind], label_map) for kind in found.kinds]
            seen.append(Seen(look.window, boxes, found.scores, labels))
            if look.is_last:
                size = look.image.size
                yield Objects(look.path, size, *merged(seen, size, settings.most_overlap))
                seen = []


def _opened(path):
    """(path, its PIL image or None, what is wrong with it or None)."""
    try:
        return path, open_image(path), None
    except ValueError as error:
        return path, None, str(error)


def _looks(opened, settings, problems):
    """A Look for each window of each image."""
    for path, image, problem in opened:
        if problem is not None:
            problems.append(problem)
            continue
        own = views(image.size, settings.side, settings.overlap, settings.scales)
        for number, window in enumerate(own, start=1):
            yield Look(path, image, window, is_last=number == len(own))
