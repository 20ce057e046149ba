"""Plausible nonsense in boxes: numbers that can be read but mean something else than ours.

A single box proves little, so each kind is decided by evidence over all boxes of a folder. The
thresholds were set so that detections of real images (1,289 boxes on UCM-captions, 6,337 on RSICD)
and of the synthetic scenes raise nothing, and each of these raises its kind when it is rewritten.
"""

from typing import NamedTuple

import numpy as np

from escaping import escaped

FRACTIONS = "fractions"
DEGREES = "degrees"
CORNERS = "corners"
TOP_LEFT = "top left"
OUTSIDE = "outside"

# A number as a fraction of the image, with room for boxes that reach over its border. Boxes in
# pixels that all lie in the first pixel and a half do not exist: the least of the real ones, by its
# largest number, is at 21.
LARGEST_FRACTION = 1.5

# Radians beyond a full turn are used by no convention. Of degrees drawn from a half turn about 93 %
# are beyond; boxes along the axes are 0 in both, and do not count.
FULL_TURN = 6.3
LEAST_BEYOND_TURN = 0.1  # of the angles that are not 0

LEAST_BOXES = 10  # fewer prove neither corners nor the top left: large objects may look alike

# Of centres and sizes 6 to 8 % of the real boxes look like corners (w > cx and h > cy: large
# objects near the middle or the upper left); of corners all do, but for those over the border.
LEAST_AS_CORNERS = 0.9
# A folder of very large objects has such boxes only, too; but those do not reach far over the
# border. Of real boxes at most 3 % do; of the same as corners about half.
LEAST_BEYOND_BORDER = 0.1
FAR = 0.05  # beyond the border, as a fraction of the side

# Real boxes reach over the left or upper border as often as over the right or lower one. Top left
# corners read as centres only reach over the first two, and hardly if moved by half their size.
A_LITTLE = 0.02  # beyond the border, as a fraction of the side
LEAST_OVER_LEFT = 0.02  # of the boxes, and at least LEAST_BOXES: chance gives no ten to one
MOST_OVER_RIGHT = 0.1  # of those over the left or upper border
MOST_OVER_MOVED = 0.5  # of those over the left or upper border as they are

# No real box has more than half of its area outside. A stray one in a hundred is let pass.
LEAST_OUTSIDE = 0.01


class _Table(NamedTuple):
    """All boxes of a folder below each other, n of them, in images of width and height pixels."""

    names: list  # (n) the image of each
    boxes: np.ndarray  # (n, 6)
    sizes: np.ndarray  # (n, 2)


def findings(boxes_by_image, sizes):
    """What seems wrong with the boxes of a folder: a list of (kind, evidence), empty if nothing.

    boxes_by_image: {image: boxes (n, 6)} as in our files; sizes: {image: (width, height) in
    pixels}, None for an image that cannot be read, which does not count. Kinds are the names above;
    the evidence is a line with numbers and an example. Where boxes are put wrongly, only the first
    kind that explains it is given.
    """
    table = _table(boxes_by_image, sizes)
    if not table.names:
        return []
    found = []
    degrees = _degrees(table)
    if degrees:
        found.append((DEGREES, degrees))
        boxes = table.boxes.copy()
        boxes[:, 4] = np.radians(boxes[:, 4])
        table = table._replace(boxes=boxes)
    for kind, check in _CHECKS.items():
        evidence = check(table)
        if evidence:
            found.append((kind, evidence))
            break
    return found


def _table(boxes_by_image, sizes):
    names = []
    boxes = []
    size_of_each = []
    for image, own in boxes_by_image.items():
        if sizes.get(image) is not None:
            names += [image] * len(own)
            boxes += list(own)
            size_of_each += [sizes[image]] * len(own)
    return _Table(
        names=names,
        boxes=np.array(boxes, dtype=float).reshape(-1, 6),  # (n, 6)
        sizes=np.array(size_of_each, dtype=float).reshape(-1, 2),  # (n, 2)
    )


# ------------------------------------------------------------------ the kinds


def _degrees(table):
    angles = table.boxes[:, 4]
    beyond = np.abs(angles) > FULL_TURN
    turned = int((angles != 0).sum())
    if beyond.sum() < max(1, LEAST_BEYOND_TURN * turned):
        return None
    return (
        f"{beyond.sum()} of {turned} angles other than 0 are beyond 2 pi, as degrees are; expected "
        f"radians ({_example(table, beyond)})"
    )


def _fractions(table):
    numbers = table.boxes[:, :4]
    if numbers.max() > LARGEST_FRACTION or numbers.min() < 1 - LARGEST_FRACTION:
        return None
    every = np.ones(len(numbers), dtype=bool)
    return (
        f"cx, cy, w, h of all {len(numbers)} boxes lie within 0 to 1, as fractions of the image "
        f"do; expected pixels ({_example(table, every)})"
    )


def _corners(table):
    first, second = table.boxes[:, :2], table.boxes[:, 2:4]  # (n, 2) each
    as_corners = (
        (second > first) & (first >= -FAR * table.sizes) & (second <= (1 + FAR) * table.sizes)
    ).all(axis=1)
    over_left, over_right = _beyond_border(table, FAR)
    over = over_left | over_right
    if len(over) < LEAST_BOXES or as_corners.mean() < LEAST_AS_CORNERS:
        return None
    if over.mean() < LEAST_BEYOND_BORDER:
        return None
    return (
        f"{as_corners.sum()} of {len(over)} boxes have w > cx and h > cy, as corners x1, y1, x2, "
        f"y2 have, and {over.sum()} reach far out of their image; expected the centre and the size "
        f"({_example(table, over & as_corners)})"
    )


def _top_left(table):
    over_left, over_right = _beyond_border(table, A_LITTLE)
    if over_left.sum() < max(LEAST_BOXES, LEAST_OVER_LEFT * len(over_left)):
        return None
    if over_right.sum() > MOST_OVER_RIGHT * over_left.sum():
        return None
    moved = table.boxes.copy()
    moved[:, :2] += moved[:, 2:4] / 2
    still_over_left, still_over_right = _beyond_border(table._replace(boxes=moved), A_LITTLE)
    if (still_over_left | still_over_right).sum() > MOST_OVER_MOVED * over_left.sum():
        return None
    return (
        f"{over_left.sum()} of {len(over_left)} boxes reach over the left or upper border, "
        f"{over_right.sum()} over the others, as if cx, cy were the top left corner; expected the "
        f"centre ({_example(table, over_left)})"
    )


def _outside(table):
    low, high = _extent(table.boxes)
    inside = np.minimum(high, table.sizes) - np.maximum(low, 0)
    share = (inside.clip(min=0) / (high - low)).prod(axis=1)
    outside = share < 0.5
    if outside.sum() < max(1, LEAST_OUTSIDE * len(outside)):
        return None
    return (
        f"{outside.sum()} of {len(outside)} boxes lie mostly outside their image; are they of "
        f"images of this size? ({_example(table, outside)})"
    )


_CHECKS = {FRACTIONS: _fractions, CORNERS: _corners, TOP_LEFT: _top_left, OUTSIDE: _outside}


# ------------------------------------------------------------------ geometry


def _extent(boxes):
    """(lowest x and y, highest x and y), (n, 2) each, of rotated boxes (n, 6)."""
    cos, sin = np.abs(np.cos(boxes[:, 4])), np.abs(np.sin(boxes[:, 4]))
    w, h = boxes[:, 2], boxes[:, 3]
    half = np.stack([w * cos + h * sin, w * sin + h * cos], axis=1) / 2  # (n, 2)
    return boxes[:, :2] - half, boxes[:, :2] + half


def _beyond_border(table, fraction):
    """Which boxes reach over the left or upper border, and which over the others, (n) bool each.

    fraction: of the image's side, up to which it does not count.
    """
    low, high = _extent(table.boxes)
    over_left = (low < -fraction * table.sizes).any(axis=1)
    over_right = (high > (1 + fraction) * table.sizes).any(axis=1)
    return over_left, over_right


def _example(table, which):
    """The first of these boxes, with its image, in words."""
    i = int(np.argmax(which))
    numbers = ", ".join(f"{number:.4g}" for number in table.boxes[i])
    width, height = table.sizes[i]
    return f"{escaped(table.names[i])}, {width:.0f} x {height:.0f} pixels: [{numbers}]"
