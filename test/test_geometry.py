"""Rotated boxes: corners and back, smallest rectangles, overlap and suppression, by oracles."""

import math

import numpy as np
import pytest
import shapely

from det_formats.geometry import (
    EXACT,
    boxes_of,
    corners_of,
    overlap,
    smallest_rectangle,
    suppress,
)


def random_boxes(seed, count=500):
    """Boxes of all shapes and angles, (n, 5)."""
    rng = np.random.default_rng(seed)
    sides = 10 ** rng.uniform(-1, 3.5, (count, 2))
    angles = rng.uniform(-2 * math.pi, 2 * math.pi, (count, 1))
    return np.concatenate([rng.uniform(-50, 4000, (count, 2)), sides, angles], axis=1)


@pytest.mark.parametrize(
    ("angle", "corners"),
    [
        (0, [(8, 19), (12, 19), (12, 21), (8, 21)]),
        (math.pi / 2, [(11, 18), (11, 22), (9, 22), (9, 18)]),  # +x has turned towards +y: down
        (math.pi, [(12, 21), (8, 21), (8, 19), (12, 19)]),
        (-math.pi / 2, [(9, 22), (9, 18), (11, 18), (11, 22)]),
    ],
)
def test_corners_begin_at_the_upper_left_of_the_box_as_it_lies(angle, corners):
    np.testing.assert_allclose(corners_of([(10, 20, 4, 2, angle)])[0], corners, atol=1e-12)


def test_corners_tell_the_box_again():
    boxes = random_boxes(seed=0)
    found = boxes_of(corners_of(boxes))
    np.testing.assert_allclose(found[:, :4], boxes[:, :4], atol=1e-6)
    turns = (found[:, 4] - boxes[:, 4]) / (2 * math.pi)
    # An angle is as sure as its side is long: at 4,000 pixels a double has 1e-12 of them left.
    np.testing.assert_allclose(turns, np.round(turns), atol=1e-6)
    np.testing.assert_allclose(corners_of(found), corners_of(boxes), atol=1e-6)


def test_a_rectangle_may_begin_at_any_corner_and_turn_either_way():
    [corners] = corners_of([(100, 50, 40, 10, 0.3)])
    for start in range(4):
        for outline in (np.roll(corners, start, axis=0), np.roll(corners, start, axis=0)[::-1]):
            [(cx, cy, w, h, angle)] = boxes_of([outline])
            assert (cx, cy) == pytest.approx((100, 50))
            long, turned = (w, angle) if w > h else (h, angle + math.pi / 2)
            assert long == pytest.approx(40)
            assert math.tan(turned) == pytest.approx(math.tan(0.3))


def test_points_that_are_no_rectangle_get_their_smallest_one():
    [box] = boxes_of([[(0, 0), (10, 0), (8, 4), (2, 4)]])
    np.testing.assert_allclose(box, (5, 2, 10, 4, 0), atol=1e-9)
    almost = corners_of([(50, 50, 30, 20, 0.4)])[0]
    almost[2] += 10 * EXACT * 30
    assert boxes_of([almost])[0][4] == pytest.approx(0.4, abs=1e-4)


@pytest.mark.parametrize("seed", range(20))
def test_the_smallest_rectangle_is_that_of_shapely(seed):
    rng = np.random.default_rng(seed)
    points = rng.normal(0, 1, (rng.integers(3, 12), 2)) @ rng.normal(0, 40, (2, 2))
    box = smallest_rectangle(points)
    expected = shapely.minimum_rotated_rectangle(shapely.MultiPoint(points))
    assert box[2] * box[3] == pytest.approx(expected.area, rel=1e-9)
    outline = shapely.Polygon(corners_of([box])[0]).buffer(1e-6)
    assert all(outline.contains(shapely.Point(point)) for point in points)
    assert 0 <= box[4] < math.pi / 2


@pytest.mark.parametrize("points", [[(0, 0), (3, 4), (6, 8)], [(0, 0), (6, 8)]])
def test_points_on_a_line_give_a_box_without_area(points):
    _, _, w, h, _ = smallest_rectangle(points)
    assert sorted((w, h)) == pytest.approx([0, 10], abs=1e-9)


def near_pairs(seed, count=300):
    """Pairs of boxes that mostly share some area."""
    rng = np.random.default_rng(seed)
    boxes = random_boxes(seed, count)
    boxes[:, 2:4] = rng.uniform(5, 60, (count, 2))
    others = boxes.copy()
    others[:, :2] += rng.normal(0, 20, (count, 2))
    others[:, 2:4] *= rng.uniform(0.5, 2, (count, 2))
    others[:, 4] += rng.normal(0, 1, count)
    return boxes, others


def test_overlap_is_that_of_shapely():
    pairs = zip(*near_pairs(seed=1), strict=True)
    shared = 0
    for box, other in pairs:
        one, two = corners_of([box, other])
        expected = shapely.Polygon(one).intersection(shapely.Polygon(two)).area
        shared += expected > 0
        assert overlap(one, two) == pytest.approx(expected, abs=1e-6)
        assert overlap(two[::-1], one) == pytest.approx(expected, abs=1e-6)
    assert 100 < shared < 300


def test_overlap_by_hand():
    def shared(*boxes):
        return overlap(*corners_of(boxes))

    assert shared((0, 0, 4, 2, 0), (2, 0, 4, 2, 0)) == pytest.approx(4)
    # A square and itself turned by 45 degrees share a regular octagon.
    octagon = 2 * (math.sqrt(2) - 1)
    assert shared((0, 0, 1, 1, 0), (0, 0, 1, 1, math.pi / 4)) == pytest.approx(octagon)
    assert shared((0, 0, 4, 2, 0), (0, 0, 4, 2, 0)) == pytest.approx(8)
    assert shared((0, 0, 4, 2, 0), (4, 0, 4, 2, 0)) == 0  # they touch


def naive_suppress(boxes, scores, kinds, most):
    """Suppression in the plainest words: the best that is left goes in, its rivals go out."""
    outlines = [shapely.Polygon(corners) for corners in corners_of(boxes)]
    left = sorted(range(len(boxes)), key=lambda i: -scores[i])
    kept = []
    while left:
        best = left.pop(0)
        kept.append(best)
        for i in list(left):
            shared = outlines[best].intersection(outlines[i]).area
            union = outlines[best].union(outlines[i]).area
            if kinds[i] == kinds[best] and shared / union > most:
                left.remove(i)
    return sorted(kept)


@pytest.mark.parametrize("most", [0, 0.1, 0.5])
def test_suppression_keeps_what_a_naive_loop_keeps(most):
    boxes = np.concatenate(near_pairs(seed=2, count=40))
    boxes[:, :2] /= 20  # crowded
    rng = np.random.default_rng(3)
    scores = np.round(rng.uniform(size=len(boxes)), 1)  # many equal ones
    kinds = rng.integers(0, 2, len(boxes))
    kept = suppress(boxes, scores, kinds, most)
    assert kept == naive_suppress(boxes, scores, kinds, most)
    assert 0 < len(kept) < len(boxes)


def test_nothing_is_suppressed_of_nothing():
    assert suppress([], [], [], 0.5) == []
    assert boxes_of(np.zeros((0, 4, 2))).shape == (0, 5)
