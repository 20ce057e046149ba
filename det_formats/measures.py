"""What is detected in an image, in a few bins: counts, places, shapes of groups, relations.

Object evidence looks these up in its tables. A group is all boxes of one kind in an image. Sizes in
the shapes below: K labels, R relations.
"""

import itertools
import math
from typing import NamedTuple

import numpy as np

RELATIONS = (
    "left", "right", "above", "below", "beside", "around", "between", "apart", "in", "on",
)  # fmt: skip
COUNT_BINS = (1, 2, 3, 4, 5, 7, 10, 15)  # the least count of each bin but the first, which is 0
_SHIFT_BINS = (-0.3, -0.12, -0.04, 0.0, 0.04, 0.12, 0.3)  # fractions of the image's side
RELATION_BINS = {  # of a relation's measure, see `relation_measure`
    "left": _SHIFT_BINS,
    "right": _SHIFT_BINS,
    "above": _SHIFT_BINS,
    "below": _SHIFT_BINS,
    "beside": (0.6, 0.8, 1.0, 1.3, 1.8, 2.5, 4.0),  # gaps in sizes of the two boxes
    "between": (0.6, 0.8, 1.0, 1.3, 1.8, 2.5, 4.0),
    "around": (1.2, 1.6, 2.0, 2.4, 2.8, 3.4, 6.2),  # radians without an object
    "apart": (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4),  # fractions of the diagonal
    "in": (0.01, 0.25, 0.5, 0.75, 0.99),  # share of centres inside
    "on": (0.01, 0.25, 0.5, 0.75, 0.99),
}
RELATION_CELLS = 8
PLACE_CELLS = 10  # three by three from the upper left, row by row; the last is for spread groups
SHAPE_CELLS = 10  # three of straightness by three of spread; the last is for fewer than three


def count_bin(count):
    """The bin of COUNT_BINS that a detected count falls into."""
    return int(np.searchsorted(COUNT_BINS, count, side="right"))


class Found(NamedTuple):
    """What is detected in an image, in bins."""

    counts: np.ndarray  # (K) bin of each kind's count
    places: dict  # kind: cell of its group
    shapes: dict  # kind: cell of its group's shape
    pairs: dict  # (kind, other kind): bin of each of RELATIONS, (R)


def find(class_ids, boxes, size, labels):
    """What is Found in an image, from arrays as of `V_Graph.detection_arrays`.

    size: (width, height) in pixels; labels: K.
    """
    counts = np.bincount(class_ids, minlength=labels)  # (K)
    groups = {int(kind): boxes[class_ids == kind] for kind in np.unique(class_ids)}
    places = {kind: place_cell(group, size) for kind, group in groups.items()}
    shapes = {kind: shape_cell(group, size) for kind, group in groups.items()}
    pairs = {}
    for kind, other in itertools.permutations(groups, 2):
        pairs[kind, other] = relation_bins(groups[kind], groups[other], size)
    return Found(np.searchsorted(COUNT_BINS, counts, side="right"), places, shapes, pairs)


def place_cell(boxes, size):
    """In which of PLACE_CELLS a group (n, 6) lies."""
    centres = boxes[:, :2] / np.array(size)  # (n, 2)
    if (centres.max(axis=0) - centres.min(axis=0)).max() > 0.5:
        return PLACE_CELLS - 1
    column, row = np.clip(centres.mean(axis=0) * 3, 0, 2).astype(int)
    return int(3 * row + column)


def shape_cell(boxes, size):
    """Of which of SHAPE_CELLS the arrangement of a group (n, 6) is."""
    if len(boxes) < 3:
        return SHAPE_CELLS - 1
    steps = boxes[:, :2] - boxes[:, :2].mean(axis=0)  # (n, 2)
    along, across = np.sqrt(np.linalg.eigvalsh(steps.T @ steps / len(boxes))[::-1].clip(min=0))
    straight = np.searchsorted((0.1, 0.35), across / max(along, 1e-9))
    spread = np.searchsorted((0.1, 0.2), along / math.hypot(*size))
    return int(3 * straight + spread)


def relation_bins(a, b, size):
    """The bin of each of RELATIONS, (R), for a group of boxes (n, 6) and another (m, 6)."""
    bins = []
    for relation in RELATIONS:
        measured = relation_measure(relation, a, b, size)
        bins.append(int(np.searchsorted(RELATION_BINS[relation], measured, side="right")))
    return np.array(bins)


def relation_measure(relation, a, b, size):
    """The number by which a relation of the boxes a (n, 6) to b (m, 6) is told.

    A tenth of the objects may be wrong: tenths are taken instead of the least and the largest.

    left, right, above, below   by how much of the image's side a's centres lie further so than b's
    beside, between             from a's objects to the nearest of b, in half sizes of the two
    around                      largest angle, as seen from b's middle, without an object of a
    apart                       between the nearest centres, in diagonals of the image
    in, on                      share of a's centres that lie inside a box of b
    """
    steps = b[None, :, :2] - a[:, None, :2]  # (n, m, 2), from a to b
    gaps = np.hypot(steps[..., 0], steps[..., 1])  # (n, m)
    if relation in ("left", "right", "above", "below"):
        axis = 0 if relation in ("left", "right") else 1
        sign = 1 if relation in ("left", "above") else -1
        return np.quantile(sign * steps[..., axis], 0.1) / size[axis]
    if relation in ("beside", "between"):
        sizes = a[:, None, 2:4].max(axis=-1) + b[None, :, 2:4].max(axis=-1)  # (n, m)
        return np.quantile((2 * gaps / sizes).min(axis=1), 0.9)
    if relation == "around":
        from_middle = a[:, :2] - b[:, :2].mean(axis=0)  # (n, 2)
        bearings = np.sort(np.arctan2(from_middle[:, 1], from_middle[:, 0]))
        return np.diff(bearings, append=bearings[0] + 2 * math.pi).max()
    if relation == "apart":
        return np.quantile(gaps, 0.1) / math.hypot(*size)
    cos, sin = np.cos(b[:, 4]), np.sin(b[:, 4])  # (m)
    along = np.abs(steps[..., 0] * cos + steps[..., 1] * sin) <= b[:, 2] / 2  # (n, m)
    across = np.abs(steps[..., 1] * cos - steps[..., 0] * sin) <= b[:, 3] / 2
    return (along & across).any(axis=1).mean()
