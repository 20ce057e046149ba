"""YOLO's text files, upright and oriented, in the form in which version 8.4.190 writes them."""

import math

import numpy as np
import pytest

from det_formats import yolo, yolo_obb
from det_formats.convert import Limits, finished
from det_formats.det_json import read_label_map
from det_formats.entries import Hints
from det_formats.geometry import corners_of

LABELS = read_label_map()
HINTS = Hints(names=["ship", "harbor", "airplane"], angle_version="le90")
SIZE = (200, 100)


def read(reader, path, size=SIZE):
    """The Finished of a file."""
    found = []
    for entry in reader.entries(path, path.stem):
        if entry.content is not None:
            found.append((entry.place, reader.detection(entry.content, size, HINTS)))
    return finished(found, LABELS, Limits())


@pytest.fixture
def file(tmp_path):
    """Writes a file of lines."""

    def write(*lines):
        path = tmp_path / "a.txt"
        path.write_text("".join(f"{line}\n" for line in lines))
        return path

    return write


# ------------------------------------------------------------------ oriented boxes

# The box (100, 50, 60, 20) with cos 0.8 and sin 0.6: half of w is (24, 18), half of h (-6, 8). The
# program begins at the corner +w +h: (118, 76), (130, 60), (82, 24), (70, 40) of 200 x 100 pixels.
TURNED = "2 0.59 0.76 0.65 0.6 0.41 0.24 0.35 0.4"


def test_a_turned_box_is_the_rectangle_of_its_corners(file):
    [one] = read(yolo_obb, file(f"{TURNED} 0.87")).detections
    assert one["label"] == "airplane"
    np.testing.assert_allclose(one["bbox"], [100, 50, 60, 20, math.atan2(3, 4), 0.87], atol=1e-9)


# Two lines of one file for an image of 256 x 128 pixels, and the boxes that the program itself has.
PRINTED = {
    "0 0.962459 0.140565 1.20333 -0.38646 0.928829 -0.888273 0.687962 -0.361248 0.409819": [
        242.084900, -47.853317, 95.204041, 91.394379, 0.740529, 0.409819,
    ],
    "0 0.844277 0.178114 1.09966 -0.41309 0.811254 -0.911408 0.555875 -0.320204 0.401577": [
        211.907990, -46.930775, 97.567909, 100.003639, 0.712525, 0.401577,
    ],
}  # fmt: skip


def test_six_digits_give_the_program_s_own_boxes(file):
    found = read(yolo_obb, file(*PRINTED), size=(256, 128)).detections
    for one, box in zip(found, PRINTED.values(), strict=True):
        corners, own = corners_of([one["bbox"], box])
        for corner in own:  # the corners are the same, whichever comes first
            assert np.abs(corners - corner).max(axis=1).min() < 0.003  # pixels
        assert one["bbox"][5] == box[5]


# ------------------------------------------------------------------ upright boxes


def test_an_upright_box_is_a_centre_and_a_size(file):
    [one] = read(yolo, file("1 0.25 0.5 0.1 0.3 0.423462")).detections
    assert one == {"label": "harbor", "bbox": [50.0, 50.0, 20.0, 30.0, 0.0, 0.423462]}


def test_a_box_without_area_is_named(file):
    [problem] = read(yolo, file("2 0.615288 0 0.192118 0 0.332289")).problems
    assert problem.startswith("line 1: bbox w, h: expected sizes above 0")


# ------------------------------------------------------------------ both

BOXES = {yolo_obb: TURNED, yolo: "1 0.25 0.5 0.1 0.3"}
BOTH = pytest.mark.parametrize("reader", BOXES, ids=["obb", "upright"])


@BOTH
@pytest.mark.parametrize(
    ("tail", "score"),
    [("", 1.0), ("0.551015", 0.551015), ("0.551015 7", 0.551015), ("1 7", 1.0), ("1e-05", 1e-05)],
    ids=["none", "score", "score-and-track", "full-score-and-track", "small"],
)
def test_a_score_and_a_track_may_follow(file, reader, tail, score):
    [one] = read(reader, file(f"{BOXES[reader]} {tail}")).detections
    assert one["bbox"][5] == score


@BOTH
def test_a_track_in_the_score_s_place_is_refused(file, reader):
    with pytest.raises(ValueError, match="score in 0 to 1, found 7; .* save_conf=True"):
        read(reader, file(f"{BOXES[reader]} 7"))


@pytest.mark.parametrize(("reader", "points"), [(yolo, 3), (yolo_obb, 5)])
def test_outlines_of_segmentation_are_refused(file, reader, points):
    outline = " ".join(f"0.{i} 0.{i + 1}" for i in range(1, points + 1))
    with pytest.raises(ValueError, match="number of a track .* outlines of segmentation"):
        read(reader, file(f"0 {outline}"))


@BOTH
def test_lines_of_another_length_are_refused(file, reader):
    with pytest.raises(ValueError, match="expected a class.* found 4 fields"):
        read(reader, file("0 0.1 0.1 0.2"))
    with pytest.raises(ValueError, match="expected a class.* found 12 fields"):
        read(reader, file(" ".join(["0"] * 12)))


@BOTH
@pytest.mark.parametrize("number", ["3", "0.5", "-1"])
def test_a_class_without_a_name_is_refused(file, reader, number):
    line = f"{number} {BOXES[reader].split(maxsplit=1)[1]}"
    with pytest.raises(ValueError, match=rf"class '{number}': --names has classes 0 to 2"):
        read(reader, file(line))


@BOTH
def test_no_file_means_that_nothing_was_found(reader):
    assert reader.UNLISTED == "empty"  # the program writes a file for images with objects only
