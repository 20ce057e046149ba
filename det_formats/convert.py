"""What readers find in an image, as our own detections: boxes, labels, thresholds, suppression."""

from typing import NamedTuple

import numpy as np

from det_formats import (
    coco,
    dota,
    geojson,
    label_studio,
    mmrotate,
    vhr10,
    voc,
    yolo,
    yolo_obb,
)
from det_formats.det_json import check_detections
from det_formats.geometry import boxes_of, smallest_rectangle, suppress

READERS = {  # by what a user calls the format
    "dota": dota,
    "yolo-obb": yolo_obb,
    "yolo": yolo,
    "mmrotate": mmrotate,
    "coco": coco,
    "voc": voc,
    "vhr10": vhr10,
    "label-studio": label_studio,
    "geojson": geojson,
}
WRITERS = {"dota": dota, "yolo-obb": yolo_obb}  # a text an image
WRITERS_TOGETHER = {"coco": coco}  # one text for all images


class Limits(NamedTuple):
    """Which detections are kept."""

    score: float = 0.0  # the least
    side: float = 0.0  # the least length of the shorter side, in pixels
    iou: float | None = None  # the largest with another of the kind; None: no suppression


class Finished(NamedTuple):
    """An image's detections as in our files, and what was left out of them."""

    detections: list
    problems: list  # "place: what is wrong", of those that are none
    below: int  # a threshold
    suppressed: int


def finished(found, label_map, limits):
    """The Finished of (place, Detection) pairs of an image, in their order.

    A label that the LabelMap knows becomes the first name of its class; others stay.
    """
    boxes = _boxes(found)
    names = {label: folded(label, label_map) for label in {one.label for _, one in found}}
    kept, problems = [], []
    below = 0
    for (place, one), box in zip(found, boxes, strict=True):
        entry = {"label": names[one.label], "bbox": [*box, one.score]}
        try:
            [checked] = check_detections([entry], place)
        except ValueError as error:
            problems.append(str(error).replace(": entry 0", "", 1))
            continue
        _, _, w, h, _, score = checked["bbox"]
        if score < limits.score or min(w, h) < limits.side:
            below += 1
        else:
            kept.append(checked)
    count = len(kept)
    if limits.iou is not None and count > 1:
        values = np.array([one["bbox"] for one in kept])  # (n, 6)
        labels = [one["label"] for one in kept]
        left = suppress(values, values[:, 5], labels, limits.iou)
        kept = [kept[i] for i in left]
    return Finished(kept, problems, below, count - len(kept))


def _boxes(found):
    """A box, five floats, of each (place, Detection)."""
    boxes = [one.box for _, one in found]
    fours = [i for i, (_, one) in enumerate(found) if one.box is None and len(one.points) == 4]
    if fours:
        corners = np.array([found[i][1].points for i in fours])  # (n, 4, 2)
        for i, box in zip(fours, boxes_of(corners).tolist(), strict=True):
            boxes[i] = box
    return [
        smallest_rectangle(one.points).tolist() if box is None else box
        for box, (_, one) in zip(boxes, found, strict=True)
    ]


def folded(label, label_map):
    """The first name of a label's class in a LabelMap; the label itself where it has none there."""
    if not label_map.knows(label):
        return label
    return label_map.names([label_map.class_id(label)])[0]
