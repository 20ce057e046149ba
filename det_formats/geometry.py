"""Rotated boxes: corners, smallest rectangles, overlap, non-maximum suppression.

A box is (cx, cy, w, h, angle) as in our files: pixels, and radians from the +x axis towards +y, y
pointing down. Corners are (x, y) in the order of the outline, those of a box from the one at
(-w / 2, -h / 2) along the side w. Sizes in the shapes below: n boxes, P points.
"""

import math

import numpy as np

EXACT = 1e-6  # of a rectangle's diagonal: as far as its corners may be off


# ------------------------------------------------------------------ boxes and corners


def corners_of(boxes):
    """Corners (n, 4, 2) of boxes (n, 5 or more), of which the first five numbers count."""
    boxes = np.asarray(boxes, dtype=float)
    cos, sin = np.cos(boxes[:, 4]), np.sin(boxes[:, 4])
    along = np.stack([cos, sin], axis=1) * boxes[:, 2:3] / 2  # (n, 2)
    across = np.stack([-sin, cos], axis=1) * boxes[:, 3:4] / 2  # (n, 2)
    outline = np.stack([-along - across, along - across, along + across, across - along], axis=1)
    return boxes[:, None, :2] + outline  # (n, 4, 2)


def boxes_of(corners):
    """The boxes (n, 5) of four points each, (n, 4, 2).

    A rectangle keeps its first side as w. What is none, as people draw by hand, gets its smallest
    rectangle.
    """
    corners = np.asarray(corners, dtype=float).reshape(-1, 4, 2)
    boxes = np.concatenate([corners.mean(axis=1), _sides(corners)], axis=1)  # (n, 5)
    off = np.abs(corners_of(boxes) - corners).max(axis=(1, 2), initial=0)
    others = off > EXACT * np.hypot(boxes[:, 2], boxes[:, 3])
    if others.any():
        # The sides of the hull are among the six lines through two of the four points.
        ends = corners[others]  # (m, 4, 2)
        lines = ends[:, [1, 2, 3, 2, 3, 3]] - ends[:, [0, 0, 0, 1, 1, 2]]  # (m, 6, 2)
        boxes[others] = _around(ends, lines)
    return boxes


def _sides(corners):
    """(w, h, angle) of rectangles by their first two sides, (n, 3)."""
    first = corners[:, 1] - corners[:, 0]  # (n, 2)
    second = corners[:, 2] - corners[:, 1]
    angle = np.arctan2(first[:, 1], first[:, 0])
    return np.stack([np.hypot(*first.T), np.hypot(*second.T), angle], axis=1)


def smallest_rectangle(points):
    """The box (5) of least area around points (P, 2); its angle lies in [0, pi / 2).

    One of its sides lies along a side of the convex hull, so each of those is tried. Points on one
    line give a box without height or width.
    """
    hull = _hull(np.asarray(points, dtype=float))
    sides = np.roll(hull, -1, axis=0) - hull  # (P, 2)
    return _around(hull[None], sides[None])[0]


def _around(points, sides):
    """The boxes (m, 5) around points (m, P, 2) that have least area among those along the sides.

    sides: (m, S, 2), directions to try.
    """
    angles = np.arctan2(sides[..., 1], sides[..., 0]) % (math.pi / 2)  # (m, S)
    cos, sin = np.cos(angles), np.sin(angles)
    axes = np.stack([np.stack([cos, sin], axis=-1), np.stack([-sin, cos], axis=-1)], axis=-2)
    along = np.einsum("msad,mpd->msap", axes, points)  # (m, S, 2, P)
    low, high = along.min(axis=-1), along.max(axis=-1)  # (m, S, 2)
    best = (high - low).prod(axis=-1).argmin(axis=1)  # (m)
    rows = np.arange(len(points))
    low, high, axes = low[rows, best], high[rows, best], axes[rows, best]
    centres = np.einsum("ma,mad->md", (low + high) / 2, axes)  # (m, 2)
    return np.concatenate([centres, high - low, angles[rows, best][:, None]], axis=1)


def _hull(points):
    """The corners of the convex hull of points, in order; of points on one line, its ends.

    By Andrew's two chains (1979): from left to right along the one side, and back along the other.
    """
    ordered = sorted({(x, y) for x, y in points.tolist()})
    if len(ordered) < 3:
        return np.array(ordered)
    hull = []
    for way in (ordered, ordered[::-1]):
        chain = []
        for point in way:
            while len(chain) > 1 and not _turns_left(*chain[-2:], point):
                chain.pop()
            chain.append(point)
        hull += chain[:-1]  # the other chain begins with the last
    return np.array(hull)


def _turns_left(a, b, c):
    """Whether the way from point a over b to c turns to the left, x to the right and y up."""
    return (b[0] - a[0]) * (c[1] - a[1]) > (b[1] - a[1]) * (c[0] - a[0])


def are_outside(boxes, size):
    """(n) whether boxes (n, 5 or more) lie wholly outside of an image of (width, height)."""
    corners = corners_of(boxes)  # (n, 4, 2)
    low, high = corners.min(axis=1), corners.max(axis=1)
    return ((high < 0) | (low > np.array(size))).any(axis=1)


# ------------------------------------------------------------------ overlap


def overlap(corners, other):
    """The area that two convex outlines share, each (P, 2), in any direction.

    The one is clipped by the sides of the other (Sutherland and Hodgman 1974).
    """
    sign = 1 if _area(other) > 0 else -1
    left = [tuple(point) for point in corners]
    for start, end in zip(other, np.roll(other, -1, axis=0), strict=True):
        left = _clipped(left, start, (end - start) * sign)
        if len(left) < 3:
            return 0.0
    return abs(_area(np.array(left)))


def _clipped(points, start, side):
    """What of an outline lies on the inner hand of a line, given by a point and its direction."""
    inside = [side[0] * (y - start[1]) - side[1] * (x - start[0]) for x, y in points]
    kept = []
    for i, (x, y) in enumerate(points):
        before = inside[i - 1]
        if (before < 0) != (inside[i] < 0):
            share = before / (before - inside[i])
            from_x, from_y = points[i - 1]
            kept.append((from_x + share * (x - from_x), from_y + share * (y - from_y)))
        if inside[i] >= 0:
            kept.append((x, y))
    return kept


def _area(corners):
    """The area of an outline (P, 2), negative where it turns the other way."""
    x, y = (corners - corners[0]).T
    return float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2


def suppress(boxes, scores, kinds, most):
    """Indices of the boxes that non-maximum suppression keeps, in rising order.

    boxes (n, 5), scores (n), kinds (n): by falling score, a box goes that has an IoU above `most`
    with one of its kind that stays. Of equal scores the first counts more.
    """
    if len(scores) == 0:
        return []
    boxes = np.asarray(boxes, dtype=float)
    corners = corners_of(boxes)
    low, high = corners.min(axis=1), corners.max(axis=1)  # (n, 2)
    areas = boxes[:, 2] * boxes[:, 3]
    kinds = np.asarray(kinds)
    kept = []
    for i in np.argsort(-np.asarray(scores), kind="stable"):
        rivals = np.array(kept, dtype=int)
        near = (kinds[rivals] == kinds[i]) & (
            (low[rivals] < high[i]) & (high[rivals] > low[i])
        ).all(axis=1)
        for j in rivals[near]:
            shared = overlap(corners[i], corners[j])
            if shared > most * (areas[i] + areas[j] - shared):
                break
        else:
            kept.append(int(i))
    return sorted(kept)
