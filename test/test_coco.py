"""COCO: annotations and results read, annotations written and read back."""

import json
import math
import random

import pytest

import detections
from conftest import box, write_image
from det_formats import coco
from det_formats.det_json import load_detections

SIZE = (100, 80)


def convert(tmp_path, content, *options, names=None):
    """{image path: its detections} of what a file holds of the images 1, 12 and sea/a."""
    for name in ("1.png", "12.png", "sea/a.png"):
        write_image(tmp_path / "images" / name, size=SIZE)
    source, out = tmp_path / "found.json", tmp_path / "out"
    source.write_text(content if isinstance(content, str) else json.dumps(content))
    if names is not None:
        (tmp_path / "names.txt").write_text(names)
        options = [*options, "--names", str(tmp_path / "names.txt")]
    folders = ["--images", str(tmp_path / "images"), "--out", str(out), "--overwrite"]
    detections.main(["convert", "coco", str(source), *folders, *options])
    return {
        path.relative_to(out).with_suffix("").as_posix(): load_detections(path)
        for path in sorted(out.rglob("*.json"))
    }


def annotations(*objects):
    """The content of a file with these annotations, of the image sea/a but for their image_id."""
    return {
        "images": [{"id": 7, "file_name": "sea/a.png"}, {"id": 3, "file_name": "12.jpg"}],
        "categories": [{"id": 5, "name": "ship"}, {"id": 0, "name": "bridge"}],
        "annotations": [{"image_id": 7, "category_id": 5, **one} for one in objects],
    }


UPRIGHT = {"bbox": [10, 20, 30, 40]}  # centre (10 + 30 / 2, 20 + 40 / 2)


# ------------------------------------------------------------------ annotations


def test_annotations_tell_images_classes_and_scores(tmp_path):
    other = {**UPRIGHT, "image_id": 3, "category_id": 0, "score": 0.25, "segmentation": []}
    found = convert(tmp_path, annotations(UPRIGHT, other))
    assert found == {
        "sea/a": [{"label": "ship", "bbox": [25.0, 40.0, 30.0, 40.0, 0.0, 1.0]}],
        "12": [{"label": "bridge", "bbox": [25.0, 40.0, 30.0, 40.0, 0.0, 0.25]}],
    }


def test_a_listed_image_without_annotations_has_no_objects_and_others_are_missing(tmp_path):
    assert convert(tmp_path, annotations()) == {"12": [], "sea/a": []}
    assert convert(tmp_path, annotations(), "--unlisted", "empty") == {
        **{"1": [], "12": []},
        "sea/a": [],
    }


# From (10, 20) a rectangle has the side (8, 6), of length 10 and angle atan(6 / 8), and the side
# (-3, 4), of length 5. So its corners are (10, 20), (18, 26), (15, 30), (7, 24), and its centre is
# (12.5, 25). A point on a side, and the corners shared out to two polygons, change nothing.
OUTLINES = [
    [[10, 20, 18, 26, 15, 30, 7, 24]],
    [[10, 20, 14, 23, 18, 26, 15, 30, 7, 24]],
    [[10, 20, 18, 26, 15, 30], [15, 30, 7, 24, 10, 20]],
]


@pytest.mark.parametrize("outlines", OUTLINES, ids=["corners", "five points", "two polygons"])
def test_polygons_count_before_the_bbox(tmp_path, outlines):
    [one] = convert(tmp_path, annotations({**UPRIGHT, "segmentation": outlines}))["sea/a"]
    assert one["bbox"] == pytest.approx([12.5, 25, 10, 5, math.atan(6 / 8), 1])


def test_the_corners_of_turned_boxes_as_ultralytics_writes_them(tmp_path):
    [one] = convert(tmp_path, annotations({"poly": OUTLINES[0][0], "rbox": [0] * 5}))["sea/a"]
    assert one["bbox"] == pytest.approx([12.5, 25, 10, 5, math.atan(6 / 8), 1])


def test_names_beside_categories_are_refused(tmp_path):
    with pytest.raises(ValueError, match='"categories" have the names; leave --names out'):
        convert(tmp_path, annotations(UPRIGHT), names="1 ship\n")


def test_a_key_that_stands_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the key 'images' stands twice"):
        convert(tmp_path, '{"images": [], "images": [], "categories": [], "annotations": []}')


def test_two_names_of_one_image_are_refused(tmp_path):
    content = annotations(UPRIGHT)
    content["images"].append({"id": 8, "file_name": "a.tif"})
    with pytest.raises(ValueError, match="sea/a.png is in .*found.json already; leave one out"):
        convert(tmp_path, content)


@pytest.mark.parametrize(
    ("one", "problem"),
    [
        ({}, 'neither "segmentation" nor "bbox"'),
        ({"bbox": [10, 20, 30]}, "expected 4 numbers, found 3"),
        ({"bbox": [10, 20, 30, 40, 0.5]}, "expected 4 numbers, found 5"),
        ({"bbox": [10, 20, 30, -40]}, "bbox w, h: expected sizes above 0"),
        ({"bbox": [10, 20, 30, math.nan]}, "expected a number .* found nan"),
        ({**UPRIGHT, "attributes": {"rotation": 30.0}}, "attributes: rotation 30.0, which bbox"),
        ({**UPRIGHT, "category_id": 1}, 'category_id 1 is not in "categories"'),
        ({**UPRIGHT, "category_id": [5]}, r'category_id \[5\] is not in "categories"'),
        ({**UPRIGHT, "score": None}, "expected a number .* found None"),
        ({**UPRIGHT, "score": 1.5}, r"score: expected a number in \[0, 1\]"),
        (
            {"segmentation": [[10, 20, 18, 26]]},
            "expected x and y of three points or more, found 4 numbers",
        ),
        (
            {"segmentation": [10, 20, 18, 26, 15, 30]},
            "expected x and y of three points or more, found 1 numbers",
        ),
        ({"segmentation": "mask"}, "segmentation: expected a list of polygons, found 'mask'"),
        (
            {**UPRIGHT, "iscrowd": 1, "segmentation": {"counts": [9, 3], "size": [80, 100]}},
            "segmentation: RLE, a mask of pixels; expected polygons",
        ),
    ],
)
def test_an_annotation_that_is_no_box_is_refused_alone(tmp_path, one, problem):
    content = annotations(UPRIGHT, one)
    with pytest.raises(ValueError, match=rf"found\.json: annotations 1: {problem}"):
        convert(tmp_path, content)
    assert len(convert(tmp_path, content, "--skip-bad")["sea/a"]) == 1


IMAGE, TWICE = {"id": 7, "file_name": "1.png"}, {"id": 7, "file_name": "12.png"}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (3, 'expected a list of results, or "images" as a list of objects'),
        ({"images": [], "categories": []}, '.* or "annotations" as a list of objects'),
        ({**annotations(), "categories": [3]}, '.* or "categories" as a list of objects'),
        ({**annotations(), "images": [{"id": 7}]}, 'images 0: expected "id" and "file_name"'),
        (
            {**annotations(), "categories": [{"name": "a"}]},
            'categories 0: expected "id" and "name"',
        ),
        ({**annotations(), "images": [IMAGE, TWICE]}, "images 1: id 7 stands twice"),
        (annotations({"image_id": 8}), 'annotations 0: image_id 8 is not in "images"'),
        (
            {**annotations({"image_id": True}), "images": [{"id": 1, "file_name": "1.png"}]},
            'annotations 0: image_id True is not in "images"',
        ),
        (
            {**annotations(), "images": [{"id": 1, "file_name": "2.png"}]},
            "images: .*no image '2.png'",
        ),
        ([{"bbox": [1, 2, 3, 4]}], 'result 0: expected an object with "image_id"'),
        ([3], 'result 0: expected an object with "image_id"'),
        ("[", "expected JSON"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path, content, problem):
    with pytest.raises(ValueError, match=rf"found\.json: {problem}"):
        convert(tmp_path, content)


# ------------------------------------------------------------------ results

RESULT = {"image_id": 12, "category_id": 1, "bbox": [10, 20, 30, 40], "score": 0.5}
OURS = {"label": "ship", "bbox": [25.0, 40.0, 30.0, 40.0, 0.0, 0.5]}
NAMES = "1 ship\n2\tstorage tank\n"


@pytest.mark.parametrize(
    ("image", "path"),
    [
        ({"image_id": 12}, "12"),
        ({"image_id": "a"}, "sea/a"),
        ({"image_id": 1, "file_name": "a.png"}, "sea/a"),
    ],
)
def test_results_name_their_image_by_file_name_or_by_id(tmp_path, image, path):
    assert convert(tmp_path, [{**RESULT, **image}], names=NAMES) == {path: [OURS]}


def test_the_names_of_results_stand_behind_their_ids(tmp_path):
    found = convert(tmp_path, [{**RESULT, "category_id": 2}], names=NAMES)
    assert found["12"][0]["label"] == "storage tank"


@pytest.mark.parametrize(
    ("names", "change", "problem"),
    [
        (None, {}, "results have ids alone; give an id and a name a line by --names FILE"),
        ("ship\nbridge\n", {}, "--names 'ship': expected an id and a name, as '1 ship'"),
        ("1 ship\n1 bridge\n", {}, "--names has two lines for id 1"),
        (NAMES, {"category_id": 0}, "category_id 0 is not in --names"),
        (NAMES, {"category_id": 3}, "category_id 3 is not in --names"),
        (NAMES, {"score": None}, "expected a number .* found None"),
        (NAMES, {"image_id": 2}, ".*no image '2' below it"),
        (NAMES, {"file_name": "."}, r".*no image '\.' below it"),
    ],
)
def test_results_whose_ids_mean_nothing_certain_are_refused(tmp_path, names, change, problem):
    with pytest.raises(ValueError, match=rf"found\.json: result 0: {problem}"):
        convert(tmp_path, [{**RESULT, **change}], names=names)


def test_results_are_read_with_their_annotation_file_as_documented(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "annotations.json").write_text(json.dumps(annotations(UPRIGHT, UPRIGHT)))
    results = [{**RESULT, "image_id": 3, "category_id": 5}]
    (tmp_path / "results.json").write_text(json.dumps(results))
    lines = [line.strip() for line in coco.__doc__.splitlines()]
    start = next(i for i, line in enumerate(lines) if line.startswith("import json"))
    exec("\n".join(lines[start : start + 2]))
    assert convert(tmp_path, (tmp_path / "both.json").read_text()) == {"sea/a": [], "12": [OURS]}


# ------------------------------------------------------------------ writing


def test_what_is_written_is_plain_coco():
    ship = {"label": "ship", "bbox": box(12.5, 25, 10, 5, math.atan(6 / 8), 0.5)}
    sizes = {"sea/a.png": SIZE, "1.png": (30, 20)}
    text = coco.written_together({"sea/a.png": [ship], "1.png": []}, sizes, ["bridge", "ship"])
    whole = json.loads(text)
    assert whole["images"] == [
        {"id": 1, "file_name": "1.png", "width": 30, "height": 20},
        {"id": 2, "file_name": "sea/a.png", "width": 100, "height": 80},
    ]
    assert whole["categories"] == [{"id": 1, "name": "bridge"}, {"id": 2, "name": "ship"}]
    [one] = whole["annotations"]
    [outline] = one.pop("segmentation")
    assert outline == pytest.approx(OUTLINES[0][0])  # x from 7 to 18, y from 20 to 30
    assert one.pop("bbox") == pytest.approx([7, 20, 11, 10])
    ids = {"id": 1, "image_id": 2, "category_id": 2}
    assert one == {**ids, "area": 50.0, "iscrowd": 0, "score": 0.5}
    swapped = {"1.png": [], "sea/a.png": [ship]}
    assert coco.written_together(swapped, sizes, ["bridge", "ship"]) == text


def test_there_and_back_gives_the_same_boxes(tmp_path):
    rng = random.Random(0)
    own = {"1.png": [], "12.png": [], "sea/a.png": []}
    for _ in range(200):
        centre = rng.uniform(-20, 120), rng.uniform(-20, 120)
        sides = rng.uniform(0.1, 200), rng.uniform(0.1, 200)
        bbox = box(*centre, *sides, rng.uniform(-7, 7), rng.random())
        one = {"label": rng.choice(["ship", "bridge", "harbor"]), "bbox": bbox}
        own[rng.choice(["1.png", "sea/a.png"])].append(one)
    text = coco.written_together(own, dict.fromkeys(own, SIZE), ["bridge", "harbor", "ship"])
    found = convert(tmp_path, text)
    assert [*found] == ["1", "12", "sea/a"] and found["12"] == []
    for path, expected in own.items():
        back = found[path.removesuffix(".png")]
        assert [one["label"] for one in back] == [one["label"] for one in expected]
        for one, other in zip(back, expected, strict=True):
            turn = (one["bbox"][4] - other["bbox"][4] + 1) % (2 * math.pi) - 1
            assert turn == pytest.approx(0, abs=1e-6)
            without_angle = [*other["bbox"][:4], one["bbox"][4], other["bbox"][5]]
            assert one["bbox"] == pytest.approx(without_angle, abs=1e-6)
