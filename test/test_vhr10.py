"""Ground truth of NWPU VHR-10: lines as the data set has them, all files of it, what is refused."""

import json
from collections import Counter

import pytest

import detections
from conftest import write_image
from det_formats import vhr10
from det_formats.det_json import read_label_map

SIZE = (1000, 800)


def read(file):
    """The detections in a file."""
    own = [content for _, _, content in vhr10.entries(file, "image") if content is not None]
    return [vhr10.detection(content, SIZE, None) for content in own]


@pytest.mark.parametrize(
    "line", ["(652,73),(694,123),1", "(652, 73),( 694,123),1 ", " ( 652 ,  73) , (694,123) , 1"]
)
def test_two_corners_are_an_upright_box(tmp_path, line):
    file = tmp_path / "001.txt"
    file.write_text(f"{line}\r\n")
    [airplane] = read(file)
    assert airplane.label == "airplane" and airplane.score == 1 and airplane.points is None
    # (652 + 694) / 2 and (73 + 123) / 2, 694 - 652 and 123 - 73
    assert airplane.box == (673, 98, 42, 50, 0)


def test_the_ten_classes_have_the_data_sets_names_and_a_slot_each(tmp_path):
    file = tmp_path / "all.txt"
    file.write_text("".join(f"(1,2),(3,4),{number}\n" for number in range(1, 11)))
    names = [one.label for one in read(file)]
    assert names == (
        "airplane,ship,storage tank,baseball diamond,tennis court,basketball court,"
        "ground track field,harbor,bridge,vehicle"
    ).split(",")
    label_map = read_label_map()
    slots = {label_map.class_id(name) for name in names}
    assert len(slots) == 10 and label_map.other not in slots


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("652,73,694,123,1", r"expected \(x1,y1\),\(x2,y2\),class, found '652,73"),
        ("(652,73),(694,123)", "expected .*class, found"),
        ("(652,7 3),(694,123),1", "expected .*class, found"),
        ("(652,73),(694,123),1 1", "expected .*class, found"),
        ("(652,nan),(694,123),1", "expected a number below 1e9 in size, found 'nan'"),
        ("(652,73),(694,123),0", "expected a class from 1 to 10, found '0'"),
        ("(652,73),(694,123),11", "expected a class from 1 to 10, found '11'"),
        ("(652,73),(694,123),1.5", "expected a class from 1 to 10, found '1.5'"),
    ],
)
def test_other_lines_are_refused(tmp_path, line, message):
    file = tmp_path / "001.txt"
    file.write_text(line)
    with pytest.raises(ValueError, match=message):
        read(file)


def test_every_file_of_the_data_set_is_read(real_data):
    files = sorted((real_data / "detections" / "NWPU_VHR10_ground_truth").glob("*.txt"))
    found = [one for file in files for one in read(file)]
    assert len(files) == 60
    assert Counter(one.label for one in found) == {"airplane": 594, "storage tank": 22}
    assert all(w > 0 and h > 0 for _, _, w, h, _ in (one.box for one in found))


def test_an_image_without_a_file_was_not_looked_at(tmp_path):
    for name in ("001", "002", "003"):
        write_image(tmp_path / "images" / f"{name}.png")
    (tmp_path / "truth").mkdir()
    (tmp_path / "truth" / "001.txt").write_text("(2,4),(12,24),9 \n")
    (tmp_path / "truth" / "002.txt").write_text("")
    images, out = str(tmp_path / "images"), tmp_path / "out"
    truth = str(tmp_path / "truth")
    detections.main(["convert", "vhr10", truth, "--images", images, "--out", str(out)])
    written = {file.stem: json.loads(file.read_text()) for file in out.iterdir()}
    assert written == {"001": [{"label": "bridge", "bbox": [7, 14, 10, 20, 0, 1]}], "002": []}
