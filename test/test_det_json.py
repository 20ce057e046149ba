"""The project's own format of detections: labels to class ids, files read, checked and written."""

import json
import warnings

import pytest

from conftest import ROOT, box
from dataset.scenes import scene
from det_formats import det_json
from det_formats.det_json import LabelMap, load_detections, read_label_map

LABEL_MAP = read_label_map()
OTHER = len(LABEL_MAP) - 1

DOTA = (
    "plane baseball-diamond bridge ground-track-field small-vehicle large-vehicle ship "
    "tennis-court basketball-court storage-tank soccer-ball-field roundabout harbor swimming-pool "
    "helicopter"
).split()
DIOR = (
    "airplane,airport,baseball field,basketball court,bridge,chimney,dam,Expressway-Service-area,"
    "Expressway-toll-station,golf field,ground track field,harbor,overpass,ship,stadium,"
    "storage tank,tennis court,train station,vehicle,windmill"
).split(",")


# ------------------------------------------------------------------ labels


def test_aliases_and_spellings_share_the_class_id_of_their_line():
    label_map = LabelMap(LABEL_MAP.lines)
    for class_id, line in enumerate(LABEL_MAP.lines):
        for alias in line.split(","):
            spellings = [alias, alias.upper(), alias.title(), f"  {alias} "]
            spellings += [joint.join(alias.split()) for joint in ("", "-", "_", "  ", "\t")]
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert {label_map.class_id(spelling) for spelling in spellings} == {class_id}


@pytest.mark.parametrize("names", [DOTA, DIOR, ["building", "car"]], ids=["DOTA", "DIOR", "ours"])
def test_each_class_of_a_data_set_has_a_class_id_of_its_own(names):
    class_ids = [LABEL_MAP.class_id(name) for name in names]
    assert OTHER not in class_ids
    assert len(set(class_ids)) == len(names)


def test_unknown_labels_share_other_and_are_reported_once():
    label_map = LabelMap(LABEL_MAP.lines)
    for label in ("dragon", "unicorn"):
        with pytest.warns(UserWarning, match=f"'{label}'"):
            assert label_map.class_id(label) == OTHER
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert label_map.class_id("dragon") == OTHER


def test_a_name_in_two_lines_is_an_error():
    with pytest.raises(ValueError, match="'BO-AT' stands in two lines"):
        LabelMap(["ship, boat", "canoe, BO-AT"])


def test_comments_and_blank_lines_of_a_label_file_take_no_class_id(tmp_path):
    path = tmp_path / "labels.txt"
    path.write_text("\ufeff# comment\n\nship, boat\n  # another\nbridge\n", encoding="utf-8")
    label_map = read_label_map(path)
    assert [label_map.class_id(name) for name in ("ship", "boat", "bridge")] == [0, 0, 1]
    assert len(label_map) == 3


def test_a_label_file_that_cannot_be_read_is_an_error_that_names_it(tmp_path):
    (tmp_path / "latin").write_bytes(b"\xff")
    for name in ("gone", "latin"):
        with pytest.raises(ValueError, match=f"{name}.*--labels"):
            read_label_map(tmp_path / name)


# ------------------------------------------------------------------ reading and checking


def entry_of(bbox, label='"plane"'):
    return f'{{"label": {label}, "bbox": {bbox}}}'


GOOD = entry_of("[1, 2, 3, 4, 0, 0.5]")
BAD_BOXES = [
    ("bbox", "[1, 2, 3, 4, 0]"),
    ("bbox", "[1, 2, 3, 4, 0, 0.5, 7]"),
    ("bbox", "null"),
    ("bbox cx", "[NaN, 2, 3, 4, 0, 0.5]"),
    ("bbox cx", "[1e9, 2, 3, 4, 0, 0.5]"),
    ("bbox cy", "[1, -Infinity, 3, 4, 0, 0.5]"),
    ("bbox w", "[1, 2, 1e999, 4, 0, 0.5]"),
    ("bbox w", f"[1, 2, 1{'0' * 400}, 4, 0, 0.5]"),  # an integer beyond float
    ("bbox h", '[1, 2, 3, "4", 0, 0.5]'),
    ("bbox angle", "[1, 2, 3, 4, true, 0.5]"),
    ("bbox w, h", "[1, 2, 9e-7, 4, 0, 0.5]"),
    ("bbox w, h", "[1, 2, 3, -4, 0, 0.5]"),
    ("score", "[1, 2, 3, 4, 0, 1.01]"),
    ("score", "[1, 2, 3, 4, 0, -0.1]"),
]
BAD_ENTRIES = [
    *((field, entry_of(bbox)) for field, bbox in BAD_BOXES),
    *(("label", entry_of("[1, 2, 3, 4, 0, 0.5]", label)) for label in ("null", '""', '" "', "3")),
    ("label", '{"bbox": [1, 2, 3, 4, 0, 0.5]}'),
    ("bbox", '{"label": "plane"}'),
    ("score", '{"label": "plane", "bbox": [1, 2, 3, 4, 0], "score": 87}'),
    ("bbox score", '{"label": "plane", "bbox": [1, 2, 3, 4, 0], "score": "0.5"}'),
    ("entry", "null"),
]


def write(tmp_path, content):
    path = tmp_path / "scene.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_a_malformed_entry_is_named_by_file_index_and_field(tmp_path):
    for field, entry in BAD_ENTRIES:
        path = write(tmp_path, f"[{GOOD}, {entry}]")
        with pytest.raises(ValueError) as error:
            load_detections(path)
        assert str(error.value).startswith(f"{path}: entry 1: {field}: expected "), entry


@pytest.mark.parametrize(
    ("expected", "content"),
    [
        ("JSON", b"plane 1 2 3 4"),
        ("JSON", b"[" + GOOD.encode()),
        ("JSON", b"[" * 100_000),
        ("JSON in UTF-8", b'[{"label": "\xff", "bbox": [1, 2, 3, 4, 0, 0.5]}]'),
        ("a list", GOOD.encode()),
    ],
    ids=["text", "cut short", "nested", "latin-1", "object"],
)
def test_a_malformed_file_is_named(tmp_path, expected, content):
    path = write(tmp_path, content)
    with pytest.raises(ValueError) as error:
        load_detections(path)
    assert str(error.value).startswith(f"{path}: expected {expected}")


def test_a_file_that_is_not_there_is_named(tmp_path):
    path = tmp_path / "gone\x1b.json"
    with pytest.raises(ValueError) as error:
        load_detections(path)
    assert str(error.value) == f"{tmp_path}/gone\\x1b.json: no such file"
    with pytest.raises(ValueError, match="not readable as a file"):
        load_detections(tmp_path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"", "no label"), (b"# none\n\n", "no label"), (b"ship\nplane\0\n", "line 2: a NUL")],
)
def test_label_files_that_are_empty_or_no_text_are_refused(tmp_path, content, problem):
    path = tmp_path / "labels.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"labels.txt: {problem}"):
        read_label_map(path)


def test_what_is_valid(tmp_path):
    assert load_detections(write(tmp_path, "[]")) == []
    expected = {"label": "plane", "bbox": [1.0, 2.0, 3.0, 4.0, 0.0, 0.5]}
    five = '{"label": "plane", "bbox": [1, 2, 3, 4, 0], "score": 0.5}'
    assert load_detections(write(tmp_path, f"\ufeff[{GOOD}, {five}]")) == [expected, expected]
    for score in ("0", "1", "0.0", "1.0"):
        [entry] = load_detections(write(tmp_path, f"[{entry_of(f'[1, 2, 3, 4, 0, {score}]')}]"))
        assert entry["bbox"][5] == float(score)


# ------------------------------------------------------------------ writing


def test_what_is_written_is_read_back_equal(tmp_path):
    path = tmp_path / "new" / "scene.json"
    own = [{"label": "Häfen \ud800", "bbox": box(1 / 3, -2e-7, 1e-6, 9e8, -0.1, 1.0)}]
    for detections in (own, []):
        det_json.write_detections(path, detections)
        assert load_detections(path) == detections
    assert [file.name for file in path.parent.iterdir()] == ["scene.json"]


def test_the_text_is_that_of_the_samples(tmp_path):
    for sample in (ROOT / "det_json").glob("sample_*.json"):
        det_json.write_detections(tmp_path / "again.json", load_detections(sample))
        assert (tmp_path / "again.json").read_bytes() == sample.read_bytes()
    detections = scene(0, 0)[2]
    det_json.write_detections(tmp_path / "scene.json", detections)
    assert (tmp_path / "scene.json").read_text(encoding="utf-8") == json.dumps(detections)


def test_what_is_no_detection_is_not_written(tmp_path):
    path = write(tmp_path, "[]")
    good, bad = box(1, 2), box(1, 2, score=1.5)
    with pytest.raises(ValueError, match="entry 1: score"):
        det_json.write_detections(path, [{"label": "ship", "bbox": bbox} for bbox in (good, bad)])
    assert path.read_text() == "[]" and list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_finished_leaves_the_old_one(tmp_path, monkeypatch):
    path = write(tmp_path, "[]")
    monkeypatch.setattr("os.replace", lambda source, target: open(tmp_path / "gone" / "file"))
    with pytest.raises(OSError, match="scene.json"):
        det_json.write_detections(path, [{"label": "ship", "bbox": box(1, 2)}])
    assert path.read_text() == "[]" and list(tmp_path.iterdir()) == [path]
