"""Label Studio's JSON: corners that stay, names of images, who looked, what is refused."""

import json
import math

import numpy as np
import pytest

import detections
from conftest import write_image
from dataset.images import SUFFIXES
from det_formats import label_studio
from det_formats.geometry import corners_of

SIZE = (400, 200)


def rectangle(x, y, width, height, rotation=0, labels=("ship",), **more):
    value = {"x": x, "y": y, "width": width, "height": height, "rotation": rotation}
    value["rectanglelabels"] = list(labels)
    return {"type": "rectanglelabels", "to_name": "any", "value": value, **more}


def polygon(points):
    value = {"points": points, "closed": True, "polygonlabels": ["pier"]}
    return {"type": "polygonlabels", "value": value}


def task(*results, image="a.png", **of_annotations):
    """A task with an annotation for each result, a list of regions."""
    annotations = [{"result": list(regions), **of_annotations} for regions in results]
    return {"data": {"image": image}, "annotations": annotations, "predictions": [{"result": [7]}]}


def entries(tmp_path, tasks):
    file = tmp_path / "export.json"
    file.write_text(json.dumps(tasks), encoding="utf-8")
    return list(label_studio.entries(file, "export"))


def box_of(region, size=SIZE):
    return label_studio.detection(region, size, None).box


# ------------------------------------------------------------------ boxes


# 50 % and 20 % of 400 x 200 pixels: the corner lies at (200, 100), the sides are 80 and 40 long.
# From the corner to the centre it is (40, 20), turned: (40 cos - 20 sin, 40 sin + 20 cos).
@pytest.mark.parametrize(
    ("cos", "sin", "cx", "cy"),
    [
        (1, 0, 240, 120),
        (0.8, 0.6, 220, 140),  # 32 - 12, 24 + 16
        (0, 1, 180, 140),  # -20, 40
        (-0.6, 0.8, 160, 120),  # -24 - 16, 32 - 12
        (-1, 0, 160, 80),  # -40, -20
        (-0.8, -0.6, 180, 60),  # -32 + 12, -24 - 16
        (0, -1, 220, 60),  # 20, -40
        (0.6, -0.8, 240, 80),  # 24 + 16, -32 + 12
    ],
)
def test_a_rectangle_is_turned_clockwise_around_its_upper_left_corner(cos, sin, cx, cy):
    angle = math.atan2(sin, cos) % (2 * math.pi)
    box = box_of(rectangle(50, 50, 20, 20, rotation=math.degrees(angle)))
    assert box == pytest.approx((cx, cy, 80, 40, angle))
    assert corners_of([box])[0, 0] == pytest.approx((200, 100))


def test_two_rectangles_that_overlap_on_the_screen_are_the_same_outline():
    # Issue 2293 of Label Studio, on 1000 x 500 pixels: 300 x 100 at (200, 100), turned by 90
    # degrees, overlaps 100 x 300 at (100, 100) exactly.
    turned = box_of(rectangle(20, 20, 30, 20, rotation=90), size=(1000, 500))
    upright = box_of(rectangle(10, 20, 10, 60), size=(1000, 500))
    from_upper_left = np.roll(corners_of([turned])[0], 1, axis=0)
    assert from_upper_left == pytest.approx(corners_of([upright])[0])


def test_a_polygon_is_points_in_percent():
    found = label_studio.detection(polygon([[10, 10], [20, 10], [20, 30]]), SIZE, None)
    assert found.label == "pier" and found.box is None
    assert found.points == [(40, 20), (80, 20), (80, 60)]


@pytest.mark.parametrize(
    ("region", "message"),
    [
        ({"type": "brushlabels"}, "expected the type rectanglelabels or polygonlabels, found 'br"),
        ({"type": "rectangle"}, "expected the type rectanglelabels or polygonlabels, found 'rect"),
        (7, "expected the type rectanglelabels or polygonlabels, found None"),
        ({"type": "rectanglelabels"}, "expected 'value', an object, found None"),
        (rectangle(1, 2, 3, 4, labels=()), "expected one label, found \\[\\]"),
        (rectangle(1, 2, 3, 4, labels=("ship", "boat")), "expected one label, found"),
        (rectangle(1, None, 3, 4), "expected a number below 1e9 in size, found None"),
        (polygon([[1, 2], [3, 4]]), "expected x and y of three points or more"),
        (polygon([[1, 2], [3, 4], [5]]), "expected 2 numbers, found 1"),
        (
            rectangle(1, 2, 3, 4, original_width=200, original_height=400),
            r"drawn on another image, of \[200, 400\] pixels, not \[400, 200\]",
        ),
        (rectangle(1, 2, 3, 4, image_rotation=90), "image_rotation 90: turn the image back"),
    ],
)
def test_other_regions_are_refused(region, message):
    with pytest.raises(ValueError, match=message):
        label_studio.detection(region, SIZE, None)


def test_a_region_of_the_images_own_size_is_read():
    region = rectangle(0, 0, 50, 50, original_width=400, original_height=200, image_rotation=0)
    assert box_of(region) == (100, 50, 200, 100, 0)


# ------------------------------------------------------------------ images


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("a.png", "a.png"),
        ("https://example.com/x/pier%20north.TIF", "pier north.TIF"),
        ("s3://bucket/0a1b2c3d-name.png", "0a1b2c3d-name.png"),
        ("/data/upload/1/8b3f2c1a-name.png", "name.png"),
        ("https://example.com/data/upload/1/8b3f2c1a-8b3f2c1a-b.png", "8b3f2c1a-b.png"),
        ("/data/upload/1/name.png", "name.png"),
        ("https://example.com/a.png?X-Amz-Date=2026&x=b", "a.png"),
        ("/data/local-files/?d=2021/t%C3%BCr+1.png", "2021/tür+1.png"),
    ],
)
def test_an_image_is_named_by_the_end_of_its_address(tmp_path, address, name):
    [entry] = entries(tmp_path, [task([], image=address)])
    assert entry == (name, "task 1", None)


def test_the_address_stands_by_any_key(tmp_path):
    own = {**task([]), "data": {"$undefined$": "b.jpg", "note": "a pier", "number": 7}}
    assert entries(tmp_path, [own])[0].image == "b.jpg"


def test_addresses_end_like_the_images_that_are_found():
    assert set(label_studio.PICTURES) == SUFFIXES


# ------------------------------------------------------------------ tasks


def test_tasks_that_nobody_looked_at_have_no_entry(tmp_path):
    skipped = task([rectangle(1, 2, 3, 4)], was_cancelled=True)
    assert entries(tmp_path, [task(), skipped, task([], image="b.png")]) == [
        ("b.png", "task 3", None)
    ]


def test_a_skipped_annotation_beside_another_does_not_count(tmp_path):
    region = rectangle(1, 2, 3, 4)
    both = task([region], [polygon([])], was_cancelled=False)
    both["annotations"][1]["was_cancelled"] = True
    assert entries(tmp_path, [both]) == [
        ("a.png", "task 1", None),
        ("a.png", "task 1: region 1", region),
    ]


@pytest.mark.parametrize(
    ("tasks", "place", "message"),
    [
        ([task([], [])], "task 1", "2 annotations; delete all but one in Label Studio"),
        ([task([]), task([], image="x/a.jpg")], "task 2", "the image of task 1, too; delete"),
    ],
)
def test_several_annotations_of_an_image_are_refused(tmp_path, tasks, place, message):
    *_, last = entries(tmp_path, tasks)
    assert last.place == place
    with pytest.raises(ValueError, match=message):
        label_studio.detection(last.content, SIZE, None)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({}, "expected a list of tasks: export as JSON"),
        ([task([]), {"image": "a.png", "label": []}], "task 2: expected 'data', .*not as JSON-MIN"),
        ([{"data": {"image": "a.png"}}], "task 1: expected 'annotations', a list, found None"),
        ([task([], image="a.csv")], "expected the address of one image in 'data', found 0"),
        (
            [{**task([]), "data": {"left": "a.png", "right": "b.png"}}],
            "expected the address of one image in 'data', found 2",
        ),
        ([{**task(), "annotations": [7]}], "task 1: expected 'result', a list, found None"),
    ],
)
def test_other_files_are_refused_before_anything_is_read(tmp_path, tasks, message):
    file = tmp_path / "export.json"
    file.write_text(json.dumps(tasks))
    with pytest.raises(ValueError, match=message):
        next(label_studio.entries(file, "export"))


def test_an_image_with_a_refused_task_is_not_written_as_empty(tmp_path, capsys):
    for name in "abcd":
        write_image(tmp_path / "images" / f"{name}.png", SIZE)
    tasks = [
        task([rectangle(50, 50, 20, 20, rotation=90)]),
        task([], [rectangle(1, 2, 3, 4)], image="b.png"),
        task([], image="c.png"),
        task(image="d.png"),
    ]
    file, out = tmp_path / "export.json", tmp_path / "out"
    file.write_text(json.dumps(tasks))
    command = ["convert", "label-studio", str(file), "--images", str(tmp_path / "images")]
    command += ["--out", str(out)]
    with pytest.raises(ValueError, match="1 entries cannot be read.*\n.*export.json: task 2: 2 an"):
        detections.main(command)
    detections.main([*command, "--skip-bad"])
    assert "left out: " in capsys.readouterr().out
    written = {path.stem: json.loads(path.read_text()) for path in out.iterdir()}
    assert sorted(written) == ["a", "c"] and written["c"] == []
    [ship] = written["a"]
    assert ship["label"] == "ship"
    assert ship["bbox"] == pytest.approx([180, 140, 80, 40, math.pi / 2, 1])
