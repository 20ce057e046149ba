"""Formats of others are told by their content, and none of them is taken for ours."""

import json

import pytest

from conftest import ROOT
from det_formats.det_json import load_detections
from det_formats.foreign import COCO, COCO_RESULTS, DOTA, YOLO, foreign_format

COCO_BOX = {"image_id": 1, "category_id": 3, "bbox": [1, 2, 3, 4]}
FILES = {
    json.dumps({"images": [], "annotations": [COCO_BOX], "categories": []}): COCO,
    json.dumps([{**COCO_BOX, "score": 0.5}]): COCO_RESULTS,
    "imagesource:GoogleEarth\ngsd:0.25\n1 2 3 4 5 6 7 8 ship 1\n": DOTA,
    "1.0 2.0 3.0 4.0 5.0 6.0 7.0 8.0 large-vehicle 0\n": DOTA,
    "1 2 3 4 5 6 7 8 ship": DOTA,
    "\n0 0.5 0.5 0.25 0.1\n": YOLO,
    "3 0.5 0.5 0.25 0.1 0.93": YOLO,
    "3 0.1 0.1 0.2 0.1 0.2 0.2 0.1 0.2": YOLO,
}


@pytest.mark.parametrize("content", FILES)
def test_a_file_of_others_is_called_by_name(tmp_path, content):
    assert foreign_format(content) == FILES[content]
    path = tmp_path / "a.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError) as error:
        load_detections(path)
    assert str(error.value).startswith(f"{path}: this is {FILES[content]}; ")


@pytest.mark.parametrize(
    "content", ["", "[]", "null", "7", "plane\nship", "{}", "a b c d e", "[" * 9999]
)
def test_other_files_are_not(content):
    assert foreign_format(content) is None


def test_our_own_files_are_not():
    for path in (ROOT / "det_json").iterdir():
        assert foreign_format(path.read_text(encoding="utf-8")) is None


def test_real_files_of_dota_are(real_data):
    paths = list((real_data / "detections" / "DOTA_labelTxt").glob("*.txt"))
    assert paths
    for path in paths:
        assert foreign_format(path.read_text(encoding="utf-8")) == DOTA
