"""python detections.py detect: images to files of detections, done once, resumed, told."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

import detections
from conftest import ROOT, write_image
from dataset.detecting import Settings, write_found
from det_formats.det_json import load_detections, read_label_map
from det_formats.onnx_detector import Found

pytest.importorskip("onnxruntime", reason="pip install -r requirements-onnx.txt")

FIXTURES = ROOT / "test" / "fixtures"
PREDICTED = json.loads((FIXTURES / "obb.json").read_text())
OURS = ["ship", "storage tank", "vehicle"]  # of the classes ship, storage-tank, small-vehicle


@pytest.fixture
def tiles(tmp_path):
    """A folder with the samples 1 and 4 as a.png and sub/b.png."""
    for name, number in (("a.png", 1), ("sub/b.png", 4)):
        (tmp_path / "tiles" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "test" / f"sample_{number}.png", tmp_path / "tiles" / name)
    return tmp_path / "tiles"


@pytest.fixture
def detect(tiles, tmp_path):
    """Runs the command with further options; returns its counts."""

    def run(*arguments):
        places = ["--images", str(tiles), "--out", str(tmp_path / "det_json")]
        model = ["--model", str(FIXTURES / "obb.onnx"), "--device", "cpu"]
        return detections.main(["detect", *model, *places, *arguments])

    return run


def test_each_image_gets_a_file_of_what_the_detector_finds(detect, tmp_path, capsys):
    counts = detect("--json", str(tmp_path / "counts.json"))
    for file, name in (("a.json", "sample_1"), ("sub/b.json", "sample_4")):
        rows = np.array(PREDICTED[f"obb {name}"])
        found = load_detections(tmp_path / "det_json" / file)
        assert len(found) == len(rows)
        for one in found:
            apart = np.abs(rows[:, :6] - one["bbox"]).max(axis=1)
            assert apart.min() < 1e-4
            assert one["label"] == OURS[int(rows[apart.argmin(), 6])]
    assert counts["images"] == counts["written"] == 2 and counts["skipped"] == 0
    assert json.loads((tmp_path / "counts.json").read_text()) == counts
    assert f"{counts['objects']} objects of 2 images; 0 of 2 images had" in capsys.readouterr().out


def test_images_that_have_a_file_are_skipped_unless_asked(detect, tmp_path, capsys):
    file = tmp_path / "det_json" / "a.json"
    file.parent.mkdir()
    file.write_text("[]")
    assert detect()["skipped"] == 1
    assert "1 of 2 images had a file and were skipped" in capsys.readouterr().out
    assert file.read_text() == "[]"
    assert detect("--again")["skipped"] == 0
    assert load_detections(file)


def test_unreadable_images_are_an_error_that_comes_last(detect, tiles, tmp_path):
    (tiles / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(
        ValueError, match="1 images cannot be read, all others are done; .*\n.*0.png"
    ):
        detect()
    assert not (tmp_path / "det_json" / "0.json").exists()
    assert (tmp_path / "det_json" / "sub" / "b.json").exists()


def test_unreadable_images_can_be_passed_over_and_are_listed(detect, tiles, capsys):
    (tiles / "z.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    counts = detect("--skip-unreadable")
    assert counts["written"] == 2
    [line] = counts["unreadable"]
    assert f"warning: {line}" in capsys.readouterr().out


def test_a_large_image_is_seen_through_windows(detect, tiles, tmp_path):
    # Two samples side by side, a window each: what is clear of the seam is found as in the sample.
    large = Image.new("RGB", (256, 128))
    large.paste(Image.open(tiles / "a.png"), (0, 0))
    large.paste(Image.open(tiles / "sub/b.png"), (128, 0))
    large.save(tiles / "large.png")
    detect("--overlap", "0", "--nms", "1")
    found = {name: load_detections(tmp_path / f"det_json/{name}.json") for name in ("a", "large")}
    boxes = np.array([one["bbox"] for one in found["large"]])
    inside = [one["bbox"] for one in found["a"] if one["bbox"][0] < 90]
    assert len(inside) > 20
    for box in inside:
        assert np.abs(boxes - box).max(axis=1).min() < 1e-6


def test_a_scale_of_two_sees_windows_of_half_the_side(detect, tmp_path):
    found = {}
    for choice in (["--scales", "1"], ["--scales", "2"], ["--window", "64"]):
        detect("--again", "--least-score", "0.35", *choice)
        found[choice[1]] = load_detections(tmp_path / "det_json" / "a.json")
    assert found["1"] != found["2"] == found["64"] != []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--overlap", "128"], "--overlap 128: expected less than the window's 128"),
        (["--window", "0"], "--window 0: expected 1 or more"),
        (["--scales", "1", "0"], "--scales 0.0: expected more than 0"),
        (["--labels", "no.txt"], "no.txt: not readable as a label file"),
        (["--model", "no.onnx"], "no.onnx: not readable"),
        (["--images", "no"], "no: no such folder; check --images"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_mistakes_are_told_in_a_line(detect, arguments, message):
    with pytest.raises(ValueError, match=message):
        detect(*arguments)


# ------------------------------------------------------------------ boxes that are none


class Fixed:
    """A detector that finds the same in each image."""

    names = ("ship",)

    def __init__(self, *boxes):
        self.boxes = np.array(boxes, dtype=float)

    def letterboxed(self, image):
        return image

    def detect(self, images, least_score, most_overlap):
        count = len(self.boxes)
        return [Found(self.boxes, np.full(count, 0.5), np.zeros(count, int)) for _ in images]


def test_boxes_beside_the_image_and_boxes_without_area_are_left_out_and_listed(tmp_path):
    image, file = write_image(tmp_path / "a.png", (100, 80)), tmp_path / "out" / "a.json"
    # Half the diagonal of a square of 10 is 7.07: turned, its left corner is at 101.03 or at 99.93.
    beside, reaching = [108.1, 40, 10, 10, np.pi / 4], [107, 60, 10, 10, np.pi / 4]
    detector = Fixed(beside, reaching, [50, 40, 0, 10, 0], [50, 60, 20, 10, 0])
    settings = Settings(128, 0, (1,), 0.25, 0.5, 8)
    written = write_found(detector, {image: file}, settings, read_label_map())
    assert [one["bbox"][:2] for one in load_detections(file)] == [[107, 60], [50, 60]]
    assert (written.images, written.objects) == (1, 2)
    first, second = written.left_out
    assert first == f"{image}: ship: wholly outside of the image"
    assert second.startswith(f"{image}: bbox w, h: expected sizes above 0")
