"""Pictures of graphs: where labels and outlines stand, which edges are drawn, what is marked."""

import math

import numpy as np
import pytest
from PIL import Image

from det_formats.drawing import FAINTEST, draw_graph, place_labels, strongest_edges
from test_graph import detection, random_detections
from V_Graph import build_graph, seen_objects

# ------------------------------------------------------------------ labels


def crowded(seed, size):
    """Rectangles of sixty objects, most in clusters and some across the border, and label sizes."""
    rng = np.random.default_rng(seed)
    clusters = rng.uniform(0, size, (4, 2))
    centres = clusters[rng.integers(4, size=60)] + rng.normal(0, 60, (60, 2))
    sides = rng.uniform(4, 90, (60, 2))
    boxes = np.concatenate([centres - sides / 2, centres + sides / 2], axis=1)
    return boxes, np.stack([rng.integers(20, 140, 60), np.full(60, 19)], axis=1)


def overlap(a, b):
    """Whether two rectangles share an area."""
    return max(a[0], b[0]) < min(a[2], b[2]) and max(a[1], b[1]) < min(a[3], b[3])


@pytest.mark.parametrize("size", [(256, 256), (1000, 1000), (700, 90)])
@pytest.mark.parametrize("seed", range(5))
def test_labels_lie_inside_the_picture_beside_their_box_and_apart(size, seed):
    boxes, labels = crowded(seed, size)
    taken = [(0, 0, 60, 60)]
    places = place_labels(boxes, labels, size, taken)
    assert places == place_labels(boxes.tolist(), labels.tolist(), size, taken)
    found = [place for place in places if place is not None]
    for k, place in enumerate(found):
        assert 0 <= place[0] and 0 <= place[1] and place[2] <= size[0] and place[3] <= size[1]
        assert not any(overlap(place, other) for other in found[:k] + taken)
    for box, label, place in zip(boxes, labels, places, strict=True):
        if place is not None:
            assert (place[2] - place[0], place[3] - place[1]) == pytest.approx(tuple(label))
            # It touches its box, or lies in the middle of it.
            assert overlap(box + (-0.01, -0.01, 0.01, 0.01), place)
    assert len(found) >= 10


def test_places_are_tried_in_the_order_that_is_told():
    size, box, label = (200, 100), (80, 40, 120, 60), (10, 10)
    above = [(80, 30, 90, 40), (95, 30, 105, 40), (110, 30, 120, 40)]
    below = [(80, 60, 90, 70), (95, 60, 105, 70), (110, 60, 120, 70)]
    beside, middle = [(120, 45, 130, 55), (70, 45, 80, 55)], (95, 45, 105, 55)
    taken = []
    for expected in [*above, *below, *beside, middle]:
        assert place_labels([box], [label], size, taken) == [expected]
        taken.append(expected)
    assert place_labels([box], [label], size, taken) == [None]


def test_a_label_keeps_off_other_boxes_where_it_can():
    box, other = (80, 40, 120, 60), (70, 10, 130, 39)
    assert place_labels([box, other], [(20, 10)] * 2, (200, 100))[0] == (80, 60, 100, 70)
    everywhere = (0, 0, 200, 100)
    assert place_labels([box, everywhere], [(20, 10)] * 2, (200, 100))[0] == (80, 30, 100, 40)


@pytest.mark.parametrize("box", [(-50, -50, -1, -1), (210, 0, 250, 50)])
def test_boxes_outside_of_the_picture_have_no_label(box):
    assert place_labels([box], [(20, 10)], (200, 100)) == [None]
    assert place_labels([], [], (200, 100)) == []


# ------------------------------------------------------------------ edges


@pytest.mark.parametrize("number", [0, 1, 2, 60])
def test_each_object_has_its_two_strongest_edges(number):
    graph = build_graph(random_detections(number), (640, 480))
    edges = strongest_edges(graph)
    assert len(edges) <= 2 * number
    drawn = {(i, j) for i, j, _ in edges}
    assert all(i < j and weight == graph.edges[i, j]["weight"] for i, j, weight in edges)
    expected = set()
    for i in graph:
        ranked = sorted(graph[i], key=lambda j: -graph.edges[i, j]["weight"])
        near = [j for j in ranked if graph.edges[i, j]["weight"] >= FAINTEST]
        expected |= {(min(i, j), max(i, j)) for j in near[:2]}
    assert drawn == expected


# ------------------------------------------------------------------ pictures


def pixels(number, seen=None, size=(640, 480)):
    """A black image with random objects drawn, (height, width, 3)."""
    graph = build_graph(random_detections(number), size)
    return np.asarray(draw_graph(Image.new("RGB", size), graph, scale=1, seen=seen), int)


@pytest.mark.parametrize("number", [0, 1, 60])
def test_a_picture_has_the_images_shape_and_lines_below_where_objects_are_told_apart(number):
    plain, marked = pixels(number), pixels(number, seen=list(range(number)))
    assert plain.shape == (480, 640, 3)
    assert marked.shape[1:] == (640, 3) and 480 < marked.shape[0] < 600
    assert np.array_equal(marked[:480], plain)
    assert plain.any() == (number > 0) and marked[480:].any()


def test_objects_that_the_model_does_not_see_are_grey_and_without_edges():
    near = [detection("ship", x, 100, 30, 30, 0.0, score) for x, score in ((100, 0.9), (150, 0.8))]
    graph = build_graph(near, (300, 200))

    def ink(picture):
        part = np.asarray(picture, int)[:200]
        return (part.max(-1) - part.min(-1) > 60), part

    both = draw_graph(Image.new("RGB", (300, 200)), graph, scale=1, seen=[0, 1])
    first = draw_graph(Image.new("RGB", (300, 200)), graph, scale=1, seen=seen_objects(near, 1))
    (coloured, _), (coloured_first, part) = ink(both), ink(first)
    assert coloured[84:117, 84:117].any() and coloured[84:117, 134:167].any()
    assert coloured_first[84:117, 84:117].any() and not coloured_first[84:117, 134:167].any()
    assert part[84:117, 134:167].max() > 150  # grey, but drawn
    assert np.asarray(both, int)[98:103, 118:132].min(-1).max() > 60  # the edge between
    assert not part[95:106, 118:132].any()


def test_a_label_without_room_leaves_its_number_and_is_counted():
    size = (400, 100)
    pictures = []
    for label in ("ship", "a ship " * 20):
        graph = build_graph([detection(label, 200, 50, 40, 40, 0.0)], size)
        pictures.append(np.asarray(draw_graph(Image.new("RGB", size), graph, scale=1, seen=[0])))
    short, long = pictures
    white = [(picture[:100].min(-1) > 200).any(0).nonzero()[0] for picture in pictures]
    assert len(white[0]) > 2 * len(white[1]) > 0
    assert len(long) > len(short) > 100  # one line more


@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize("angle", [0.0, math.pi / 6, math.pi / 2, -0.9])
def test_a_rotated_outline_is_where_its_box_is(angle, scale):
    graph = build_graph([detection("ship", 150, 200, 200, 80, angle, 1.0)], (400, 400))
    canvas = np.asarray(draw_graph(Image.new("RGB", (400, 400)), graph, scale))
    y, x = np.nonzero((canvas == (0xE6, 0x19, 0x4B)).all(-1))
    x, y = x - 150 * scale, y - 200 * scale
    # The label, red as well, starts at the centre: what is near it is left out.
    border = (x < -4) | (x > 100) | (y < -4) | (y > 20)
    x, y = x[border], y[border]
    cos, sin = math.cos(angle), math.sin(angle)
    red = np.stack([x * cos + y * sin, y * cos - x * sin], axis=1) / scale  # along, across
    outside = (abs(red) - (100, 40)).max(axis=1)  # 0 on the border
    assert abs(outside).max() < 3
    for corner in ((100, 40), (100, -40), (-100, 40), (-100, -40), (-50, 40), (-100, 0)):
        assert np.linalg.norm(red - corner, axis=1).min() < 3
