"""Large images seen through windows: which windows, and one list of objects from what they show.

A detector takes images of one size. What is larger is looked at window by window, and windows
overlap, so that an object on the seam of two is whole in one of them. `merged` keeps each object
once. How it decides, for an object and the windows of one scale:

1. A box that comes near an inner border of its window, one where the image goes on, may be that of
   a part. All others are of whole objects. What is shorter than the overlap, less twice what counts
   as near, is whole in some window.
2. Of whole objects of one label, of all scales, that overlap by more than a threshold the best
   stays, since an object in the overlap is found in several windows.
3. Parts follow, the largest first, and go where half of one lies in an object of its label that
   stays. So nothing is lost that only the window of a part has found, and an object longer than the
   overlap may remain in pieces; a larger overlap, or a scale below 1, sees it whole.

Boxes are (cx, cy, w, h, angle) as in our files. Sizes in the shapes below: n boxes.
"""

import itertools
from typing import NamedTuple

import numpy as np

from dataset.images import windows
from det_formats.geometry import corners_of, overlap, suppress

NEAR = 1 / 128  # of a window's side: as near to a border, a detector's box may end at it
HALF = 0.5  # of a part's area: as much in another box, both are of one object


class Seen(NamedTuple):
    """The objects that a detector sees in a window, in pixels of the image."""

    window: tuple  # (left, top, right, bottom) in pixels
    boxes: np.ndarray  # (n, 5)
    scores: np.ndarray  # (n)
    labels: list


def views(size, side, overlap, scales):
    """The windows of an image of (width, height) pixels at some scales, a list; equal ones once.

    side, overlap: of the windows at scale 1, in pixels. A scale of 2 has windows of half the side
    and overlap, which a detector sees twice as large. An image that is smaller than a window fills
    it, and its own longer side counts as the window's.
    """
    found = {}
    for scale in scales:
        own_side = max(1, round(min(side, max(size)) / scale))
        for window in windows(size, own_side, int(own_side * overlap / side)):
            found.setdefault(window)
    return list(found)


def merged(seen, size, most):
    """Which objects of an image stay: (boxes (n, 5), scores (n), labels) of a list of Seen.

    size: (width, height) of the image; most: the largest IoU of two of one label. In the order of
    the windows.
    """
    boxes = np.concatenate([np.empty((0, 5)), *[one.boxes for one in seen]])
    scores = np.concatenate([np.empty(0), *[one.scores for one in seen]])
    labels = list(itertools.chain.from_iterable(one.labels for one in seen))
    is_whole = np.concatenate([np.empty(0, dtype=bool), *[_whole(one, size) for one in seen]])
    whole, parts = np.flatnonzero(is_whole), np.flatnonzero(~is_whole)
    of_whole = suppress(boxes[whole], scores[whole], [labels[i] for i in whole], most)
    kept = whole[of_whole].tolist()
    kept = sorted(kept + _parts_beside(kept, parts.tolist(), boxes, labels))
    return boxes[kept], scores[kept], [labels[i] for i in kept]


def _whole(seen, size):
    """(n) whether the boxes of a Seen come near no inner border of its window."""
    corners = corners_of(seen.boxes)  # (n, 4, 2)
    low, high = corners.min(axis=1), corners.max(axis=1)
    begin, end = np.array(seen.window[:2], dtype=float), np.array(seen.window[2:], dtype=float)
    near = NEAR * (end - begin).max()
    least = np.where(begin > 0, begin + near, -np.inf)
    most = np.where(end < size, end - near, np.inf)
    return ((low >= least) & (high <= most)).all(axis=1)


def _parts_beside(kept, parts, boxes, labels):
    """Those parts, of indices of boxes, that do not lie by half in a kept box of their label."""
    corners = corners_of(boxes)  # (n, 4, 2)
    low, high = corners.min(axis=1), corners.max(axis=1)
    areas = boxes[:, 2] * boxes[:, 3]
    labels = np.array(labels)
    others = list(kept)
    stay = []
    for i in sorted(parts, key=lambda part: -areas[part]):
        rivals = np.array(others, dtype=int)
        meets = ((low[rivals] < high[i]) & (high[rivals] > low[i])).all(axis=1)
        rivals = rivals[meets & (labels[rivals] == labels[i])]
        if all(overlap(corners[i], corners[j]) <= HALF * areas[i] for j in rivals):
            others.append(i)
            stay.append(i)
    return stay
