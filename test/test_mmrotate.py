"""mmrotate's results: JSON and arrays, angles of its three versions, pickles refused."""

import json
import math
import pickle

import numpy as np
import pytest

import detections
from conftest import write_image
from det_formats.det_json import load_detections
from det_formats.geometry import corners_of
from det_formats.mmrotate import PICKLE

SHIP = [20.0, 30.0, 8.0, 4.0, 0.5, 0.9]
PLANE = [50.0, 10.0, 6.0, 6.0, -0.25, 0.5]


def convert(tmp_path, source, *options, names="ship\nairplane\n"):
    """{image stem: its detections} of a file or folder of results for the images a and b."""
    for name in ("a.png", "b.png"):
        write_image(tmp_path / "images" / name, size=(100, 80))
    (tmp_path / "names.txt").write_text(names)
    out = tmp_path / "out"
    where = ["--images", str(tmp_path / "images"), "--out", str(out), "--overwrite"]
    fixed = ["convert", "mmrotate", str(source), *where, "--names", str(tmp_path / "names.txt")]
    detections.main([*fixed, *options])
    return {path.stem: load_detections(path) for path in out.glob("*.json")}


def write_json(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
    return path


EXPECTED = {
    "a": [{"label": "ship", "bbox": SHIP}, {"label": "airplane", "bbox": PLANE}],
    "b": [],
}


def test_one_file_of_json_holds_all_images(tmp_path):
    results = write_json(tmp_path / "all.json", {"a.png": [[SHIP], [PLANE]], "b": [[], []]})
    assert convert(tmp_path, results) == EXPECTED


def test_a_file_of_json_an_image_is_of_the_image_of_its_name(tmp_path):
    write_json(tmp_path / "results" / "a.json", [[SHIP], [PLANE]])
    write_json(tmp_path / "results" / "b.json", [[], []])
    assert convert(tmp_path, tmp_path / "results") == EXPECTED


def test_arrays_are_of_an_image_and_a_class(tmp_path):
    none = np.zeros((0, 6))
    arrays = {"a.png/0": np.array([SHIP]), "a.png/1": np.array([PLANE])}
    np.savez(tmp_path / "all.npz", **arrays, **{"b.png/1": none, "b.png/0": none})
    assert convert(tmp_path, tmp_path / "all.npz") == EXPECTED


def test_a_folder_may_hold_json_and_arrays(tmp_path):
    write_json(tmp_path / "results" / "b.json", [[], []])
    arrays = {"a/0": np.array([SHIP]), "a/1": np.array([PLANE])}
    np.savez(tmp_path / "results" / "a.npz", **arrays)
    assert convert(tmp_path, tmp_path / "results") == EXPECTED


def test_an_image_in_no_file_was_not_looked_at(tmp_path):
    results = write_json(tmp_path / "all.json", {"a.png": [[], []]})
    assert convert(tmp_path, results) == {"a": []}


# ------------------------------------------------------------------ angles

# A box around (50, 40) with w = 20, h = 10. At 30 degrees half of w is (10 cos, 10 sin) =
# (8.660, 5), half of h is (-5 sin, 5 cos) = (-2.5, 4.330). The first corner is the centre less
# both, (43.840, 30.670); the second lies w further. Other angles turn and mirror these numbers.
ANGLES = [
    ("oc", 30, [(43.840, 30.670), (61.160, 40.670)]),
    ("oc", 90, [(55, 30), (55, 50)]),
    ("oc", -5, [(39.602, 35.891), (59.526, 34.147)]),  # a detector's, a little out of (0, 90]
    ("le90", -30, [(38.840, 40.670), (56.160, 30.670)]),
    ("le90", -90, [(45, 50), (45, 30)]),
    ("le135", 120, [(59.330, 33.840), (49.330, 51.160)]),
    ("le135", -45, [(39.393, 43.536), (53.536, 29.393)]),
]


@pytest.mark.parametrize(("version", "degrees", "corners"), ANGLES)
def test_angles_turn_w_from_x_towards_y_in_every_version(tmp_path, version, degrees, corners):
    row = [50, 40, 20, 10, math.radians(degrees), 0.5]
    results = write_json(tmp_path / "a.json", [[row], []])
    [one] = convert(tmp_path, results, "--angle-version", version)["a"]
    [found] = corners_of([one["bbox"]])
    assert found[:2] == pytest.approx(np.array(corners), abs=1e-3)


@pytest.mark.parametrize(
    ("version", "range_", "inside", "outside"),
    [
        ("le90", "-0.5 pi to 0.5 pi", (-1.5710, 1.5710), (-1.5730, 1.5730)),
        ("le135", "-0.25 pi to 0.75 pi", (-0.7860, 2.3565), (-0.7870, 2.3580)),
        ("oc", "-0.5 pi to 1.0 pi", (-1.5710, 3.1420), (-1.5730, 45.0)),  # degrees
    ],
)
def test_an_angle_out_of_its_version_is_refused(tmp_path, version, range_, inside, outside):
    rows = [[50, 40, 20, 10, angle, 0.5] for angle in inside]
    results = write_json(tmp_path / "a.json", [rows, []])
    assert len(convert(tmp_path, results, "--angle-version", version)["a"]) == 2
    for angle in outside:
        write_json(results, [[[50, 40, 20, 10, angle, 0.5]], []])
        with pytest.raises(ValueError) as error:
            convert(tmp_path, results, "--angle-version", version)
        assert f"a.json: a, class 0, row 0: angle {angle:g}: expected {range_}" in str(error.value)
        assert "the range of" in str(error.value) and "unit is another" in str(error.value)


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (3, "a: expected a list of rows for each class"),
        ([3, []], "a: expected a list of rows for each class"),
        ({"a": [[]], "b": {}}, "b: expected a list of rows for each class"),
        ({"c\x1b": [[], []]}, r"c\\x1b: .*no image 'c\\x1b' below it"),
        ({".": [[], []]}, r"no image '\.' below it"),
        ([[SHIP[:5]], []], "a, class 0, row 0: expected 6 numbers, found 5"),
        ([[3], []], "a, class 0, row 0: expected 6 numbers, found 1"),
        ([[], [[*SHIP[:5], math.nan]]], "a, class 1, row 0: expected a number .* found nan"),
        ([[[20, 30, 8, -4, 0.5, 0.9]], []], "row 0: bbox w, h: expected sizes above 0"),
        ([[SHIP], [], []], "a, class 0, row 0: classes: 3 here, 2 in --names"),
        ([[SHIP]], "a, class 0, row 0: classes: 1 here, 2 in --names"),
    ],
)
def test_json_that_holds_something_else_is_refused(tmp_path, content, problem):
    with pytest.raises(ValueError, match=problem):
        convert(tmp_path, write_json(tmp_path / "a.json", content))


@pytest.mark.parametrize(
    ("arrays", "problem"),
    [
        ({"a/0": np.zeros((0, 6)), "a/2": np.zeros((0, 6))}, "no array 'a/1'; expected image"),
        ({"arr_0": np.array([SHIP])}, "no array '/0'"),
        ({"a/0": np.array(SHIP), "a/1": np.zeros((0, 6))}, "row 0: expected 6 numbers, found 1"),
        ({"a/0": np.array(3.0)}, "a: expected a list of rows"),
        ({"a/0": np.array([None])}, "expected arrays of numpy.savez: .*allow_pickle"),
    ],
)
def test_arrays_of_another_form_are_refused(tmp_path, arrays, problem):
    np.savez(tmp_path / "all.npz", **arrays)
    with pytest.raises(ValueError, match=problem):
        convert(tmp_path, tmp_path / "all.npz")


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "changed", "one array"])
def test_damaged_arrays_are_refused(tmp_path, damage):
    path = tmp_path / "all.npz"
    np.savez_compressed(path, **{"a/0": np.tile(SHIP, (50, 1)), "a/1": np.zeros((0, 6))})
    whole = path.read_bytes()
    changed = whole[:80] + bytes(20) + whole[100:]
    bytes_of = {"empty": b"", "text": b"a 1 2 3", "cut": whole[:-50], "changed": changed}
    path.write_bytes(bytes_of.get(damage, whole))
    if damage == "one array":
        with open(path, "wb") as file:
            np.save(file, np.array([SHIP]))
    with pytest.raises(ValueError, match="all.npz: expected arrays of numpy.savez"):
        convert(tmp_path, path)


def test_a_pickle_is_refused_with_a_recipe_that_works(tmp_path, monkeypatch):
    rows = [np.array([row], dtype=np.float32) for row in (SHIP, PLANE)]
    none = np.zeros((0, 6), dtype=np.float32)
    (tmp_path / "results.pkl").write_bytes(pickle.dumps([rows, [none, none]]))
    with pytest.raises(ValueError) as error:
        convert(tmp_path, tmp_path / "results.pkl")
    assert f"results.pkl: {PICKLE}" in str(error.value)
    monkeypatch.chdir(tmp_path)
    recipe = "\n".join(str(error.value).split("\n")[-2:])
    exec(recipe, {"names": ["a.png", "b.png"]})
    found = convert(tmp_path, "results.npz")
    assert [one["label"] for one in found["a"]] == ["ship", "airplane"]
    assert [one["bbox"] for one in found["a"]] == [pytest.approx(SHIP), pytest.approx(PLANE)]
    assert found["b"] == []
    with pytest.raises(AssertionError):
        exec(recipe, {"names": ["a.png"]})


def test_names_of_the_classes_are_needed(tmp_path):
    write_image(tmp_path / "images" / "a.png")
    results = write_json(tmp_path / "a.json", [[SHIP]])
    folders = ["--images", str(tmp_path / "images"), "--out", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="classes are numbers; give their names by --names FILE"):
        detections.main(["convert", "mmrotate", str(results), *folders])


def test_a_folder_without_a_file_of_a_suffix_is_refused(tmp_path):
    (tmp_path / "results").mkdir()
    with pytest.raises(ValueError, match="no file in it ends in .json or .npz or .pkl"):
        convert(tmp_path, tmp_path / "results")
