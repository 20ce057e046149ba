"""Plausible nonsense in boxes: each kind is seen where it is, and none in clean folders."""

import numpy as np
import pytest
from PIL import Image

from dataset import images
from dataset.scenes import scene
from det_formats import sanity
from det_formats.det_json import load_detections
from det_formats.sanity import findings


def as_fractions(boxes, size):
    return np.column_stack([boxes[:, :4] / [*size, *size], boxes[:, 4:]])


def as_degrees(boxes, size):
    return np.column_stack([boxes[:, :4], np.degrees(boxes[:, 4]), boxes[:, 5]])


def as_top_left(boxes, size):
    return np.column_stack([boxes[:, :2] - boxes[:, 2:4] / 2, boxes[:, 2:]])


def as_corners(boxes, size):
    low = boxes[:, :2] - boxes[:, 2:4] / 2
    return np.column_stack([low, low + boxes[:, 2:4], boxes[:, 4:]])


def of_twice_the_size(boxes, size):
    return np.column_stack([boxes[:, :4] * 2, boxes[:, 4:]])


CHANGES = {
    as_fractions: sanity.FRACTIONS,
    as_degrees: sanity.DEGREES,
    as_top_left: sanity.TOP_LEFT,
    as_corners: sanity.CORNERS,
    of_twice_the_size: sanity.OUTSIDE,
}


def kinds(boxes, sizes):
    return [kind for kind, _ in findings(boxes, sizes)]


def changed(boxes, sizes, change):
    return {image: change(own, sizes[image]) for image, own in boxes.items()}


@pytest.fixture(scope="module")
def scenes():
    """(boxes, sizes) of sixty scenes."""
    boxes, sizes = {}, {}
    for i in range(60):
        detections = scene(0, i)[2]
        boxes[f"{i}.png"] = np.array([d["bbox"] for d in detections]).reshape(-1, 6)
        sizes[f"{i}.png"] = (128, 128)
    return boxes, sizes


@pytest.mark.parametrize("change", CHANGES)
def test_each_kind_is_seen_once_and_alone(scenes, change):
    boxes, sizes = scenes
    [(kind, evidence)] = findings(changed(boxes, sizes, change), sizes)
    assert kind == CHANGES[change]
    assert ".png, 128 x 128 pixels: [" in evidence and "\n" not in evidence


def test_clean_folders_raise_nothing(scenes):
    boxes, sizes = scenes
    assert findings(boxes, sizes) == []
    assert findings({image: own[:0] for image, own in boxes.items()}, sizes) == []
    assert findings(boxes, dict.fromkeys(sizes)) == []  # no image could be read
    for image, own in boxes.items():  # nor does a single image
        assert findings({image: own}, sizes) == []


def test_degrees_do_not_hide_what_else_is_wrong(scenes):
    boxes, sizes = scenes
    both = changed(changed(boxes, sizes, as_degrees), sizes, as_top_left)
    assert kinds(both, sizes) == [sanity.DEGREES, sanity.TOP_LEFT]
    upright = np.tile([3.0, 50.0, 96.0, 4.0, 90.0, 0.9], (30, 1))  # inside, turned by 90 degrees
    assert kinds({"a.png": upright}, {"a.png": (100, 100)}) == [sanity.DEGREES]


def test_large_objects_are_no_corners_and_one_side_alone_is_no_top_left():
    """As a folder of stadiums, and boxes that reach over all borders alike."""
    size = {"a.png": (100, 100)}
    large = np.tile([50.0, 50.0, 96.0, 90.0, 0.0, 0.9], (30, 1))
    assert kinds({"a.png": large}, size) == []
    left = np.tile([3.0, 50.0, 14.0, 10.0, 0.0, 0.9], (30, 1))  # over the border by 4
    right = left + [94.0, 0, 0, 0, 0, 0]
    assert kinds({"a.png": left}, size) == [sanity.TOP_LEFT]
    assert kinds({"a.png": np.concatenate([left, right[:5]])}, size) == []
    wide = np.tile([45.0, 50.0, 96.0, 10.0, 0.0, 0.9], (30, 1))  # moved by 48 it would leave
    assert kinds({"a.png": wide}, size) == []


@pytest.mark.parametrize(("outside", "found"), [(0, []), (1, []), (2, [sanity.OUTSIDE])])
def test_a_stray_box_in_a_hundred_is_let_pass(outside, found):
    boxes = np.tile([50.0, 50.0, 20.0, 10.0, 0.0, 0.9], (150, 1))
    boxes[:outside, 0] = -3.0  # seven of twenty pixels inside
    assert kinds({"a.png": boxes}, {"a.png": (100, 100)}) == found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["UCM", "RSICD"])
def test_real_detections_raise_nothing_and_each_kind_if_rewritten(real_data, name):
    root = real_data / name
    paths = [path for paths in images.index_images(root).values() for path in paths]
    boxes, sizes = {}, {}
    for path, file in images.match_detections(paths, root / "det_json").items():
        detections = load_detections(file)
        if detections:
            boxes[path] = np.array([d["bbox"] for d in detections])
            sizes[path] = Image.open(root / path).size
    assert len(boxes) > 600 and findings(boxes, sizes) == []
    for change, kind in CHANGES.items():
        if change is not as_degrees:  # all angles are 0
            assert kinds(changed(boxes, sizes, change), sizes) == [kind]
