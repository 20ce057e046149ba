"""detections.py: other programs' files to ours and back, folders checked and drawn."""

import json
import math

import numpy as np
import pytest
from PIL import Image

import detections
from conftest import box, write_detections, write_image
from det_formats.det_json import load_detections
from det_formats.geometry import corners_of

SQUARE = "10 10 30 10 30 20 10 20"  # (20, 15), 20 x 10 pixels
BOX = [20.0, 15.0, 20.0, 10.0, 0.0, 1.0]


@pytest.fixture
def tiles(tmp_path):
    """A folder with the images a.png, b.png and sub/c.png of 100 x 80 pixels."""
    for name in ("a.png", "b.png", "sub/c.png"):
        write_image(tmp_path / "tiles" / name, (100, 80))
    return tmp_path / "tiles"


@pytest.fixture
def convert(tiles, tmp_path):
    """Converts {file: text} and options: convert("dota", {"a.txt": ...}); returns the counts."""

    def run(form, files, *arguments, out="det_json"):
        folder = tmp_path / "labels"
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        places = ["--images", str(tiles), "--out", str(tmp_path / out)]
        return detections.main(["convert", form, str(folder), *places, *arguments])

    return run


def written(tmp_path, out="det_json"):
    """{name: detections} of all files that were written."""
    files = sorted((tmp_path / out).rglob("*"))
    return {str(f.relative_to(tmp_path / out)): load_detections(f) for f in files if f.is_file()}


# ------------------------------------------------------------------ convert


def test_files_of_labels_become_ours_and_empty_where_there_is_none(convert, tmp_path, capsys):
    counts = convert("dota", {"a.txt": f"imagesource:GoogleEarth\ngsd:0.3\n{SQUARE} plane 1\n"})
    assert written(tmp_path) == {
        "a.json": [{"label": "airplane", "bbox": BOX}],
        "b.json": [],
        "sub/c.json": [],
    }
    assert counts["unlisted"] == 2 and counts["unlisted_as"] == "empty"
    assert (
        "1 objects of 1 files; 2 of 3 images are in none, taken as empty" in capsys.readouterr().out
    )


def test_the_real_files_of_dota_are_read(real_data, tmp_path):
    labels = real_data / "detections" / "DOTA_labelTxt"
    for file in labels.glob("*.txt"):
        write_image(tmp_path / "tiles" / f"{file.stem}.png", (8, 8))
    places = ["--images", str(tmp_path / "tiles"), "--out", str(tmp_path / "det_json")]
    counts = detections.main(["convert", "dota", str(labels), *places])
    assert (counts["files"], counts["objects"], counts["unlisted"]) == (7, 984, 0)
    found = written(tmp_path)["P1888.json"]
    # Its third line: 465 371 455 372 451 324 460 323 large-vehicle 0
    assert found[2]["label"] == "large vehicle"
    assert found[2]["bbox"][:2] == pytest.approx([457.75, 347.5], abs=1)


def test_unlisted_images_can_stay_without_a_file(convert, tmp_path):
    convert("dota", {"a.txt": "", "sub/c.txt": SQUARE + " ship 0"}, "--unlisted", "missing")
    assert written(tmp_path) == {"a.json": [], "sub/c.json": [{"label": "ship", "bbox": BOX}]}


def test_result_files_are_of_all_images_and_one_label(convert, tmp_path):
    results = {
        "Task1_small-vehicle.txt": f"a 0.9 {SQUARE}\nsub/c 0.5 {SQUARE}\n",
        "Task1_ship.txt": f"a 0.25 {SQUARE}\n",
    }
    convert("dota", results)
    found = written(tmp_path)
    labels = [(one["label"], one["bbox"][5]) for one in found["a.json"]]
    assert labels == [("ship", 0.25), ("vehicle", 0.9)]  # small-vehicle is its name in DOTA
    assert found["sub/c.json"][0]["bbox"] == [*BOX[:5], 0.5]
    assert found["b.json"] == []


def test_bad_lines_are_refused_by_file_and_line(convert, tmp_path):
    lines = f"{SQUARE} 7 0.9\n{SQUARE} ship 0.9\n"
    with pytest.raises(ValueError) as error:
        convert("dota", {"a.txt": lines})
    assert "line 1: expected a label behind the coordinates, found 7" in str(error.value)
    assert "line 2: expected the difficulty behind the label, found 0.9" in str(error.value)


def test_bad_lines_of_several_files_are_told_together(convert, tmp_path):
    lines = f"{SQUARE} ship 0\n1 2 3\n{SQUARE.replace('20', 'x')} ship 0\n{SQUARE} ship 0 1.5\n"
    with pytest.raises(ValueError) as error:
        convert("dota", {"a.txt": lines, "d.txt": "", "b.txt": "0 0 1 1 2 2 3 3 ship 0"})
    shown = str(error.value).replace(f"{tmp_path}/labels/", "")
    assert shown.splitlines()[0].startswith("5 entries cannot be read; mend them, or")
    assert "a.txt: line 2: expected eight coordinates and a label, found 3 fields" in shown
    assert "a.txt: line 3: expected a number below 1e9 in size, found 'x'" in shown
    assert "a.txt: line 4: score: expected a number in [0, 1]" in shown
    assert "b.txt: line 1: bbox w, h: expected sizes above 0" in shown  # four points on one line
    assert "d.txt: line 1:" in shown and "no image 'd' below it" in shown
    assert not (tmp_path / "det_json").exists()


def test_bad_lines_can_be_left_out_and_are_listed(convert, tmp_path, capsys):
    report = tmp_path / "report.json"
    counts = convert(
        "dota", {"a.txt": f"1 2\n{SQUARE} ship 0"}, "--skip-bad", "--json", str(report)
    )
    assert len(written(tmp_path)["a.json"]) == 1
    assert "left out:" in capsys.readouterr().out
    assert json.loads(report.read_text()) == counts
    assert len(counts["bad"]) == 1 and "a.txt: line 1:" in counts["bad"][0]


def test_thresholds_and_suppression_count_what_they_leave_out(convert, tmp_path):
    lines = [
        f"{SQUARE} ship 0 0.9",
        "11 10 31 10 31 20 11 20 ship 0 0.8",  # one pixel further: IoU 190 / 210
        "11 10 31 10 31 20 11 20 plane 0 0.8",  # of another kind
        f"{SQUARE} ship 0 0.1",
        "50 50 52 50 52 90 50 90 ship 0 0.9",  # two pixels wide
    ]
    options = ("--least-score", "0.2", "--least-side", "3", "--nms", "0.5")
    counts = convert("dota", {"a.txt": "\n".join(lines)}, *options)
    found = [(one["label"], one["bbox"][5]) for one in written(tmp_path)["a.json"]]
    assert found == [("ship", 0.9), ("airplane", 0.8)]
    assert counts["below_threshold"] == 2 and counts["suppressed"] == 1
    assert len(convert("dota", {}, "--nms", "0.91", out="all")["bad"]) == 0
    assert len(written(tmp_path, "all")["a.json"]) == 4  # two equal boxes are one


def test_it_can_be_repeated_and_replaces_nothing_unasked(convert, tmp_path):
    convert("dota", {"a.txt": f"{SQUARE} ship 0"})
    before = {file: file.read_bytes() for file in (tmp_path / "det_json").rglob("*.json")}
    assert convert("dota", {})["written"] == 0
    with pytest.raises(ValueError, match="1 files have other content; name another --out"):
        convert("dota", {"a.txt": ""})
    assert {file: file.read_bytes() for file in before} == before
    assert convert("dota", {}, "--overwrite")["written"] == 1
    assert written(tmp_path)["a.json"] == []


def test_two_files_of_one_image_are_refused(convert):
    with pytest.raises(ValueError, match=r"sub/c.png is in .*/c.txt already; leave one out"):
        convert("dota", {"c.txt": "", "sub/c.txt": SQUARE + " ship 0"})
    counts = convert("dota", {}, "--skip-bad")
    assert len(counts["bad"]) == 1 and counts["objects"] == 0


def test_one_label_of_an_image_comes_from_one_file_of_results(convert):
    results = {"one/Task1_ship.txt": f"a 0.9 {SQUARE}", "two/Task1_ship.txt": f"a 0.9 {SQUARE}"}
    with pytest.raises(ValueError, match="Task1_ship.txt has ship of a.png; leave one out"):
        convert("dota", results)


def test_what_could_not_be_read_is_not_taken_as_empty(convert, tmp_path, capsys):
    files = {"a.txt": "1 2 3", "Task1_ship.txt": "b 0.9 1 2 3"}
    counts = convert("dota", files, "--skip-bad")
    assert counts["unclear"] == ["a.png", "b.png"]
    assert written(tmp_path) == {"sub/c.json": []}
    shown = capsys.readouterr().out
    assert "2 images get no file, as nothing sound is left: a.png, b.png" in shown


def test_of_a_name_that_means_two_images_none_is_taken_as_empty(convert, tiles, tmp_path):
    write_image(tiles / "other" / "c.png", (10, 10))
    counts = convert("dota", {"c.txt": f"{SQUARE} ship 0"}, "--skip-bad")
    assert counts["unclear"] == ["other/c.png", "sub/c.png"]
    assert written(tmp_path).keys() == {"a.json", "b.json"}


def test_no_image_is_taken_as_empty_where_a_file_of_many_cannot_be_read(convert, tmp_path):
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "Task1_ship.txt").write_bytes(b"\xff\xfe")
    counts = convert("dota", {"a.txt": ""}, "--skip-bad")
    assert counts["unlisted_as"] == "missing"
    assert written(tmp_path) == {"a.json": []}


def test_labels_and_results_of_one_image_are_refused_together(convert):
    files = {"Task1_ship.txt": f"a 0.9 {SQUARE}", "a.txt": f"{SQUARE} boat 0"}
    with pytest.raises(ValueError, match="a.png is in .*Task1_ship.txt already; leave one out"):
        convert("dota", files)


def test_labels_that_the_label_map_does_not_know_are_kept_and_told(convert, tmp_path, capsys):
    convert("dota", {"a.txt": f"{SQUARE} lighthouse 0"})
    assert written(tmp_path)["a.json"][0]["label"] == "lighthouse"
    assert "warning: label 'lighthouse' is in no line of the label map" in capsys.readouterr().out


def test_files_of_other_runs_stay_and_are_counted(convert, tmp_path):
    convert("dota", {"a.txt": ""})
    counts = convert("dota", {}, "--unlisted", "missing")
    assert (counts["written"], counts["the_same_before"], counts["others_in_out"]) == (0, 1, 2)


def test_nonsense_boxes_are_a_warning(convert, capsys):
    lines = "\n".join(
        f"{500 + i} 500 {540 + i} 500 {540 + i} 520 {500 + i} 520 ship 0" for i in range(9)
    )
    convert("dota", {"a.txt": lines})
    assert "warning: outside: 9 of 9 boxes lie mostly outside" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "yolo", "{tmp}"], "yolo: classes are numbers; give their names by --names"),
        (["convert", "dota", "{tmp}/no"], "no such file or folder"),
        (["convert", "dota", "{tmp}/tiles"], "no file in it ends in .txt"),
        (["convert", "dota", "x", "--names", "x"], "--names does nothing without format yolo-obb"),
        (["convert", "dota", "x", "--nms", "2"], "--nms 2.0: expected 1 or less"),
        (["convert", "yolo", "x", "--names", "{tmp}/data.yaml"], "of a data.yaml copy the names"),
        (["export", "coco", "x", "--scores"], "--scores does nothing without format dota|yolo-obb"),
        (["export", "dota", "{tmp}/no"], "no such folder; check DET_JSON"),
    ],
)
def test_mistakes_are_told_in_a_line(tiles, tmp_path, arguments, message):
    (tmp_path / "data.yaml").write_text("names:\n  0: ship\n")
    filled = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    with pytest.raises(ValueError, match=message):
        detections.main([*filled, "--images", str(tiles), "--out", str(tmp_path / "out")])


def test_two_images_of_one_name_are_refused(tiles, tmp_path):
    write_image(tiles / "a.jpg", (10, 10))
    with pytest.raises(ValueError, match="a.jpg and a.png would share one file of detections"):
        detections.main(["check", str(tmp_path), "--images", str(tiles)])


# ------------------------------------------------------------------ export


@pytest.mark.parametrize("form", ["dota", "yolo-obb", "coco"])
def test_there_and_back_is_the_same(tiles, tmp_path, form):
    rng = np.random.default_rng(0)
    labels = ["ship", "storage tank", "own thing"]
    for name in ("a", "sub/c"):
        boxes = [
            {
                "label": labels[i % 3],
                "bbox": [*rng.uniform(5, 70, 4), *rng.uniform(-3, 1, 1), score],
            }
            for i, score in enumerate(rng.uniform(0, 1, 50))
        ]
        path = tmp_path / "before" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(boxes))
    images = ["--images", str(tiles)]
    scores = ["--scores"] if form != "coco" else []
    out = ["--out", str(tmp_path / "x"), *scores]
    detections.main(["export", form, str(tmp_path / "before"), *images, *out])
    names = ["--names", str(tmp_path / "x" / "classes.txt")] if form == "yolo-obb" else []
    back = ["--out", str(tmp_path / "after"), "--unlisted", "missing"]
    detections.main(["convert", form, str(tmp_path / "x"), *images, *names, *back])
    before, after = written(tmp_path, "before"), written(tmp_path, "after")
    assert before.keys() == after.keys() == {"a.json", "sub/c.json"}
    for name, own in before.items():
        others = after[name]
        if form == "dota":  # which has no spaces in labels
            own = [{**one, "label": one["label"].replace("own thing", "own-thing")} for one in own]
        assert [one["label"] for one in own] == [one["label"] for one in others]
        boxes, found = (np.array([one["bbox"] for one in side]) for side in (own, others))
        np.testing.assert_allclose(corners_of(found), corners_of(boxes), atol=1e-9)
        np.testing.assert_allclose(found[:, 2:4], boxes[:, 2:4], atol=1e-9)
        assert (found[:, 5] == boxes[:, 5]).all()


@pytest.mark.parametrize(
    ("form", "image", "label", "message"),
    [
        ("yolo-obb", "a", "two\nlines", "no line of classes.txt can hold it"),
        ("dota", "a", "747", "label '747': a number; rename"),
        ("dota", "Task1_a", "ship", "DOTA would take its file for results; rename it"),
    ],
)
def test_what_could_not_be_read_back_is_not_exported(tiles, tmp_path, form, image, label, message):
    write_image(tiles / "Task1_a.png", (10, 10))
    write_detections(tmp_path / "det" / f"{image}.json", [box(5, 5)], label=label)
    command = ["export", form, str(tmp_path / "det"), "--images", str(tiles)]
    with pytest.raises(ValueError, match=message):
        detections.main([*command, "--out", str(tmp_path / "out")])


def test_scores_are_left_out_unless_asked_for(tiles, tmp_path):
    write_detections(tmp_path / "det" / "a.json", [box(20, 15, 20, 10, 0.0, 0.5)])
    command = ["yolo-obb", str(tmp_path / "det"), "--images", str(tiles), "--out"]
    detections.main(["export", *command, str(tmp_path / "plain")])
    detections.main(["export", *command, str(tmp_path / "scored"), "--scores"])
    # Of an image of 100 x 80 pixels.
    plain = "0 0.1 0.125 0.3 0.125 0.3 0.25 0.1 0.25"
    assert (tmp_path / "plain" / "a.txt").read_text() == f"{plain}\n"
    assert (tmp_path / "scored" / "a.txt").read_text() == f"{plain} 0.5\n"


# ------------------------------------------------------------------ check, draw


def test_a_sound_folder_has_no_errors(tiles, tmp_path, capsys):
    write_detections(tmp_path / "det" / "a.json", [box(20, 20), box(60, 60, 10, 5, 0.3)])
    write_detections(tmp_path / "det" / "b.json", [])
    write_detections(tmp_path / "det" / "stray.json", [])
    report = tmp_path / "check.json"
    command = ["check", str(tmp_path / "det"), "--images", str(tiles), "--json", str(report)]
    detections.main(command)
    shown = capsys.readouterr().out
    assert "2 objects; of 3 images 2 have a file, 1 an object" in shown
    assert "1 images without a file: sub/c.png\n" in shown
    assert "1 files without an image: stray.json" in shown
    assert "0 errors, 0 warnings" in shown
    found = json.loads(report.read_text())
    assert found["labels"] == {"ship": 2} and found["images_without_file"] == ["sub/c.png"]


def test_errors_of_a_folder_are_listed_and_end_with_1(tiles, tmp_path, capsys):
    twice = [box(20, 20), box(20, 20), box(20, 20, angle=0.1), box(500, 20), box(99, 70)]
    write_detections(tmp_path / "det" / "a.json", twice)
    (tmp_path / "det" / "b.json").write_text("[")
    with pytest.raises(SystemExit) as end:
        detections.main(["check", str(tmp_path / "det"), "--images", str(tiles)])
    assert end.value.code == 1
    shown = capsys.readouterr().out
    assert "a.json: entry 1: the same box as entry 0" in shown
    assert "a.json: entry 3: wholly outside of the image of 100 x 80 pixels" in shown
    assert "b.json: expected JSON" in shown
    assert "3 errors, 1 warnings" in shown  # one of five boxes is outside


def test_a_box_that_is_turned_is_outside_only_if_all_of_it_is(tiles, tmp_path):
    # It ends at x = -20 + 30 cos 45 degrees = 1.2 in the one case, at -19 in the other.
    write_detections(tmp_path / "det" / "a.json", [box(-20, 40, 60, 2, math.pi / 4)])
    detections.main(["check", str(tmp_path / "det"), "--images", str(tiles)])
    write_detections(tmp_path / "det" / "a.json", [box(-20, 40, 2, 60, 0)])
    with pytest.raises(SystemExit):
        detections.main(["check", str(tmp_path / "det"), "--images", str(tiles)])


def test_a_broken_image_is_an_error_of_its_folder(tiles, tmp_path, capsys):
    broken = (tiles / "b.png").read_bytes()
    (tiles / "b.png").write_bytes(broken[:120])
    write_detections(tmp_path / "det" / "a.json", [])
    with pytest.raises(SystemExit):
        detections.main(["check", str(tmp_path / "det"), "--images", str(tiles)])
    assert "b.png: not readable as an image" in capsys.readouterr().out


def test_no_image_is_drawn_over(tiles, tmp_path):
    write_detections(tmp_path / "det" / "a.json", [box(20, 20)])
    command = ["draw", str(tmp_path / "det"), "--images", str(tiles), "--out"]
    with pytest.raises(ValueError, match="one of the images; name another file"):
        detections.main([*command, str(tiles / "a.png")])
    with pytest.raises(ValueError, match="--out sheet.xyz: the suffix is of no image format"):
        detections.main([*command, "sheet.xyz"])


def test_a_sheet_shows_images_with_objects(tiles, tmp_path, capsys):
    write_detections(tmp_path / "det" / "a.json", [box(20, 20, 30, 20), box(60, 50, 30, 20, 0.5)])
    write_detections(
        tmp_path / "det" / "sub" / "c.json", [box(50, 40, 20, 20)], label="tennis court"
    )
    write_detections(tmp_path / "det" / "b.json", [])
    sheet = tmp_path / "sheet.png"
    detections.main(["draw", str(tmp_path / "det"), "--images", str(tiles), "--out", str(sheet)])
    assert "2 of 2 images with objects" in capsys.readouterr().out
    with Image.open(sheet) as picture:
        assert picture.width == 2 * 512 + 3 * 8
        colours = {colour for _, colour in picture.convert("RGB").getcolors(10**6)}
    assert {(0xE6, 0x19, 0x4B), (0x3C, 0xB4, 0x4B)} <= colours  # a label each
