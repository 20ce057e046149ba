"""Large images seen through windows: no object is lost or doubled at a seam."""

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy import ndimage

from dataset.detecting import Settings, detect_all
from dataset.views import Seen, merged, views
from det_formats.det_json import read_label_map
from det_formats.onnx_detector import Found

LABELS = read_label_map()
SIZE = (150, 110)
SIDE, OVERLAP = 64, 20  # what is as long as 20 - 2 * 64 / 128 = 19 pixels is whole in some window


class Blobs:
    """A detector that sees what a window shows: the bounds of red and of green blobs."""

    names = ("ship", "harbor")

    def letterboxed(self, image):
        return np.asarray(image)

    def detect(self, pictures, least_score, most_overlap):
        return [self._found(picture) for picture in pictures]

    def _found(self, picture):
        boxes, kinds = [], []
        for kind in range(len(self.names)):
            blobs, _ = ndimage.label(picture[:, :, kind] > 0)
            for rows, columns in ndimage.find_objects(blobs):
                w, h = columns.stop - columns.start, rows.stop - rows.start
                boxes.append([columns.start + w / 2, rows.start + h / 2, w, h, 0.0])
                kinds.append(kind)
        return Found(np.array(boxes).reshape(-1, 5), np.ones(len(boxes)), np.array(kinds, int))


@pytest.fixture
def look(tmp_path):
    """Draws rectangles (left, top, w, h) in two colours, detects them; returns label and bounds."""

    def run(rectangles, side=SIDE, overlap=OVERLAP, scales=(1,)):
        image = Image.new("RGB", SIZE)
        pen = ImageDraw.Draw(image)
        for i, (left, top, w, h) in enumerate(rectangles):
            colour = "#f00" if i % 2 else "#0f0"
            pen.rectangle((left, top, left + w - 1, top + h - 1), fill=colour)
        image.save(tmp_path / "a.png")
        settings = Settings(side, overlap, scales, 0.25, 0.55, batch_size=4)
        problems = []
        [one] = detect_all(Blobs(), [tmp_path / "a.png"], settings, LABELS, problems)
        assert not problems
        low, sizes = one.boxes[:, :2] - one.boxes[:, 2:4] / 2, one.boxes[:, 2:4]
        rows = np.concatenate([low, sizes], axis=1).tolist()
        return sorted(zip(one.labels, rows, strict=True))

    return run


def grid(left, top, w, h):
    """Rectangles with gaps of 3 pixels all over the image, the first one at (left, top)."""
    rectangles = []
    for y in range(top, SIZE[1], h + 3):
        for x in range(left, SIZE[0], w + 3):
            rectangles.append((x, y, min(w, SIZE[0] - x), min(h, SIZE[1] - y)))
    return rectangles


@pytest.mark.parametrize("scales", [(1,), (1, 2), (1, 0.5)], ids=str)
@pytest.mark.parametrize("shift", [0, 5, 11])
def test_windows_see_what_the_whole_image_shows(look, shift, scales):
    blobs = grid(shift, shift // 2, 12, 7)
    whole = look(blobs, side=max(SIZE), overlap=0)
    assert len(whole) == len(blobs)
    assert look(blobs, scales=scales) == whole


@pytest.mark.parametrize("left", range(24, 68))
def test_the_longest_object_that_fits_is_found_once_wherever_it_lies(look, left):
    # Windows are 0 to 64, 44 to 108 and 86 to 150: an object at 44 to 64 lies near a border of two.
    assert look([(left, left // 2, 19, 19)]) == [("harbor", [left, left // 2, 19, 19])]


def test_a_long_object_stays_in_pieces_or_is_seen_whole_at_a_smaller_scale(look):
    ship = (20, 30, 80, 9)  # 44 of its pixels in one window, 56 in the next, 20 in both
    assert look([ship]) == [("harbor", [20, 30, 44, 9]), ("harbor", [44, 30, 56, 9])]
    assert look([ship], scales=(1, 0.5)) == [("harbor", [20, 30, 80, 9])]


def test_a_part_goes_by_half_of_which_a_larger_part_shows(look):
    # 34 pixels in one window, 36 in the next; 20 of the 34 lie in both, more than half.
    assert look([(30, 30, 50, 9)]) == [("harbor", [44, 30, 36, 9])]


# ------------------------------------------------------------------ views


def test_a_scale_of_two_has_windows_of_half_the_side():
    found = views((100, 100), side=200, overlap=40, scales=[1, 2])
    # The image fills the window of scale 1, so those of scale 2 have 50 pixels and share 10.
    starts = (0, 40, 50)
    expected = [(left, top, left + 50, top + 50) for top in starts for left in starts]
    assert found == [(0, 0, 100, 100), *expected]


def test_equal_scales_are_looked_at_once():
    assert len(views((90, 50), side=100, overlap=20, scales=[1, 0.5, 1])) == 1


# ------------------------------------------------------------------ merging

LEFT, RIGHT = (0, 0, 64, 64), (36, 0, 100, 64)  # of an image of 100 x 64 pixels


def seen(window, *objects):
    """A Seen of (box, score, label) each, in one of two windows."""
    boxes = np.array([box for box, _, _ in objects], dtype=float).reshape(-1, 5)
    scores = np.array([score for _, score, _ in objects])
    return Seen(window, boxes, scores, [label for *_, label in objects])


def test_of_two_sights_of_an_object_the_better_one_stays():
    one = ([50, 30, 10, 6, 0.3], 0.6, "ship")
    other = ([50.5, 30, 10, 6, 0.3], 0.8, "ship")
    boxes, scores, labels = merged([seen(LEFT, one), seen(RIGHT, other)], (100, 64), most=0.5)
    assert (boxes.tolist(), scores.tolist(), labels) == ([other[0]], [0.8], ["ship"])


def test_labels_are_told_apart():
    ship, plane = ([50, 30, 10, 6, 0.3], 0.6, "ship"), ([50, 30, 10, 6, 0.3], 0.8, "airplane")
    _, _, labels = merged([seen(LEFT, ship), seen(RIGHT, plane)], (100, 64), most=0.5)
    assert labels == ["ship", "airplane"]


def test_a_turned_box_is_near_a_border_by_its_corners():
    # Half the diagonal of a square of 10, 7.07: the corner at 63.07 is in the last half pixel.
    for angle, score in ((np.pi / 4, 0.6), (0, 0.9)):
        left = ([56.5, 30, 10, 10, angle], 0.9, "ship")
        right = ([56.5, 30, 10, 10, angle], 0.6, "ship")  # which is whole, so it goes before parts
        _, scores, _ = merged([seen(LEFT, left), seen(RIGHT, right)], (100, 64), most=0.5)
        assert scores.tolist() == [score]


def test_what_only_the_window_of_a_part_has_found_is_kept():
    part = ([58, 30, 12, 8, 0], 0.9, "ship")  # it ends where LEFT does; RIGHT sees it whole
    boxes, _, _ = merged([seen(LEFT, part), seen(RIGHT)], (100, 64), most=0.5)
    assert boxes.tolist() == [part[0]]
    ship = ([60, 30, 16, 8, 0], 0.5, "ship")
    boxes, _, _ = merged([seen(LEFT, part), seen(RIGHT, ship)], (100, 64), most=0.5)
    assert boxes.tolist() == [ship[0]]


@pytest.mark.parametrize("y", [3, 61])
def test_borders_of_the_image_are_no_seams(y):
    # Both reach beyond the image of 64 rows. Of parts the larger one would stay, not the better.
    better, larger = ([50, y, 10, 8, 0], 0.9, "ship"), ([50, y, 11, 8, 0], 0.6, "ship")
    boxes, _, _ = merged([seen(LEFT, better), seen(RIGHT, larger)], (100, 64), most=0.5)
    assert boxes.tolist() == [better[0]]


@pytest.mark.parametrize(("label", "left"), [("ship", 1), ("harbor", 2)])
def test_a_part_goes_beside_a_box_of_its_label_alone(label, left):
    # From 28 to 64 in LEFT; RIGHT begins at 36. 31 of its 36 pixels, from 31 to 62, are a ship's.
    part = ([46, 30, 36, 8, 0], 0.9, label)
    ship = ([46.5, 30, 31, 20, 0], 0.5, "ship")
    boxes, _, _ = merged([seen(LEFT, part, ship), seen(RIGHT)], (100, 64), most=0.9)
    assert len(boxes) == left


def test_an_image_without_objects_has_none():
    boxes, scores, labels = merged([seen(LEFT), seen(RIGHT)], (100, 64), most=0.5)
    assert boxes.shape == (0, 5) and scores.shape == (0,) and labels == []
