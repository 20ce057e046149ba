"""What is detected, in bins: counts, places, shapes and relations, each computed by hand."""

import math

import numpy as np
import pytest

from conftest import box
from det_formats.measures import (
    COUNT_BINS,
    PLACE_CELLS,
    RELATION_BINS,
    RELATION_CELLS,
    RELATIONS,
    SHAPE_CELLS,
    find,
    place_cell,
    relation_bins,
    relation_measure,
    shape_cell,
)

SIZE = (200, 100)
SQUARE = (100, 100)


def boxes(*centres, w=10.0, h=10.0, angle=0.0):
    return np.array([box(x, y, w, h, angle) for x, y in centres])


def test_counts_fall_into_bins():
    expected = {0: 0, 1: 1, 4: 4, 5: 5, 6: 5, 7: 6, 9: 6, 10: 7, 14: 7, 15: 8, 90: 8}
    for count, cell in expected.items():
        found = find(np.full(count, 1), boxes(*[(5, 5)] * count).reshape(-1, 6), SIZE, labels=3)
        assert found.counts.tolist() == [0, cell, 0]
    assert max(expected.values()) == len(COUNT_BINS)


@pytest.mark.parametrize(
    ("centres", "cell"),
    [
        ([(10, 10)], 0),
        ([(100, 50)], 4),
        ([(199, 99)], 8),
        ([(150, 20), (190, 20)], 2),
        ([(10, 50), (190, 50)], PLACE_CELLS - 1),  # spread
    ],
)
def test_places_are_thirds_of_the_image(centres, cell):
    assert place_cell(boxes(*centres), SIZE) == cell


def test_a_row_is_told_from_a_heap():
    row = boxes(*[(10 + 10 * i, 20 + 10 * i) for i in range(6)])
    heap = boxes((20, 20), (30, 20), (20, 30), (30, 30))
    cells = shape_cell(row, SIZE), shape_cell(heap, SIZE)
    assert cells[0] // 3 == 0 and cells[1] // 3 == 2
    assert shape_cell(boxes((50, 50), (50, 50), (50, 50)), SIZE) < SHAPE_CELLS - 1  # one place
    assert shape_cell(boxes((1, 1), (2, 2)), SIZE) == SHAPE_CELLS - 1


@pytest.mark.parametrize(
    ("relation", "a", "b", "measured"),
    [
        ("left", [(20, 50)], [(60, 50)], 0.4),
        ("right", [(20, 50)], [(60, 50)], -0.4),
        ("above", [(20, 20)], [(60, 50)], 0.3),
        ("below", [(20, 20)], [(60, 50)], -0.3),
        ("beside", [(20, 50)], [(32, 50), (90, 50)], 1.2),  # twelve pixels, half sizes 5 + 5
        ("between", [(20, 50)], [(32, 50)], 1.2),
        (
            "apart",
            [(0, 0)],
            [(60, 80), (100, 100)],
            (100 + 0.1 * (2**0.5 * 100 - 100)) / 2**0.5 / 100,
        ),
        ("around", [(50, 20), (80, 50), (50, 80), (20, 50)], [(50, 50)], math.pi / 2),
        ("around", [(80, 50)], [(50, 50)], 2 * math.pi),
        ("in", [(50, 50), (56, 50)], [(50, 50)], 0.5),  # the box ends at 55
        ("on", [(50, 50), (90, 50)], [(90, 50), (50, 50)], 1.0),
    ],
)
def test_relations_are_measured(relation, a, b, measured):
    assert relation_measure(relation, boxes(*a), boxes(*b), SQUARE) == pytest.approx(measured)


def test_inside_follows_the_turned_box():
    turned = boxes((50, 50), w=40, h=4, angle=math.pi / 4)
    assert relation_measure("in", boxes((60, 60)), turned, SQUARE) == 1
    assert relation_measure("in", boxes((60, 40)), turned, SQUARE) == 0


def test_one_object_in_ten_may_be_wrong():
    a = boxes(*[(10 + i, 50) for i in range(19)], (99, 50))
    assert relation_measure("left", a, boxes((60, 50)), SQUARE) > 0


def test_relations_are_of_every_ordered_pair_of_kinds_in_any_order_of_objects():
    rng = np.random.default_rng(0)
    class_ids = np.array([0, 2, 2, 0, 2])
    rows = boxes(*rng.uniform(5, 95, (5, 2)))
    found = find(class_ids, rows, SQUARE, labels=3)
    assert set(found.pairs) == {(0, 2), (2, 0)} and set(found.places) == {0, 2}
    order = rng.permutation(5)
    again = find(class_ids[order], rows[order], SQUARE, labels=3)
    assert again.places == found.places and again.shapes == found.shapes
    for pair, cells in found.pairs.items():
        assert cells.tolist() == again.pairs[pair].tolist()
        assert len(cells) == len(RELATIONS) and cells.max() < RELATION_CELLS


def test_no_bin_lies_beyond_the_tables():
    assert set(RELATION_BINS) == set(RELATIONS)
    assert all(len(bins) < RELATION_CELLS for bins in RELATION_BINS.values())
    bins = relation_bins(boxes((1e6, 1e6)), boxes((0, 0)), SQUARE)
    assert (bins >= 0).all()


def test_nothing_detected_is_found_as_nothing():
    found = find(np.empty(0, dtype=int), np.empty((0, 6)), SIZE, labels=2)
    assert found.counts.tolist() == [0, 0] and not (found.places or found.shapes or found.pairs)
