"""Caption files, splits, and what is wrong with them."""

import json

import pytest

import images
from annotations import SPLITS, Annotations, Record, normal_form, read_annotations, with_validation
from conftest import write_karpathy


def write_lists(root, split, names, captions):
    root.mkdir(parents=True, exist_ok=True)
    (root / f"{split}_filename.txt").write_text("".join(f"{n}\n" for n in names), encoding="utf-8")
    (root / f"{split}_caps.txt").write_text("".join(f"{c}\n" for c in captions), encoding="utf-8")


def as_dict(records):
    return {record.name: record.captions for record in records}


# ------------------------------------------------------------------ annotation formats


def test_all_formats_give_the_same_records(tmp_path):
    texts = {"x.tif": ("one", "two"), "y.tif": ("three", "four"), "z.tif": ("five", "six")}
    captions = [caption for own in texts.values() for caption in own]
    write_karpathy(tmp_path / "json", {"test": texts})
    write_lists(tmp_path / "per_image", "test", texts, captions)
    names = [name for name, own in texts.items() for _ in own]
    write_lists(tmp_path / "per_caption", "test", names, captions)
    expected = [Record(name, own) for name, own in texts.items()]
    for folder in ("json", "per_image", "per_caption"):
        assert read_annotations(tmp_path / folder).splits == {"test": expected}


def test_every_split_is_read(tmp_path):
    for split in SPLITS:
        write_lists(tmp_path / "lists", split, [f"{split}.tif"], [f"of {split}"])
    write_karpathy(tmp_path / "json", {s: {f"{s}.tif": [f"of {s}"]} for s in SPLITS})
    for folder in ("lists", "json"):
        splits = read_annotations(tmp_path / folder).splits
        assert splits == {s: [Record(f"{s}.tif", (f"of {s}",))] for s in SPLITS}


def test_rows_of_an_image_that_are_apart_are_joined_in_order(tmp_path):
    write_lists(tmp_path, "test", ["b.tif", "a.tif", "b.tif"], ["one", "two", "three"])
    records = read_annotations(tmp_path).splits["test"]
    assert records == [Record("b.tif", ("one", "three")), Record("a.tif", ("two",))]


def test_karpathy_folder_of_an_image_is_part_of_its_name(tmp_path):
    entry = {
        "filepath": "val2014",
        "filename": "a.jpg",
        "split": "val",
        "sentences": [{"raw": "x"}],
    }
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": [entry]}), encoding="utf-8")
    assert read_annotations(tmp_path).splits["val"][0].name == "val2014/a.jpg"


def test_byte_order_mark_and_windows_line_ends_leave_no_trace(tmp_path):
    mark = b"\xef\xbb\xbf"
    (tmp_path / "train_filename.txt").write_bytes(mark + b"a.tif\r\nb.tif\r\n")
    captions = mark + " ein Schiff \r\nzwei Häfen\r\n".encode()
    (tmp_path / "train_caps.txt").write_bytes(captions)
    records = read_annotations(tmp_path).splits["train"]
    assert records == [Record("a.tif", ("ein Schiff",)), Record("b.tif", ("zwei Häfen",))]


def test_lists_without_a_last_line_end_are_read_whole(tmp_path):
    (tmp_path / "train_filename.txt").write_text("a.tif\nb.tif", encoding="utf-8")
    (tmp_path / "train_caps.txt").write_text("one\ntwo", encoding="utf-8")
    assert as_dict(read_annotations(tmp_path).splits["train"]) == {
        "a.tif": ("one",),
        "b.tif": ("two",),
    }


def test_blank_captions_are_named_and_shift_nothing(tmp_path):
    names = ["a.tif", "b.tif", "c.tif"]
    write_lists(tmp_path, "train", names, ["one", "  ", "", "\t", "five", "six"])
    found = read_annotations(tmp_path)
    assert as_dict(found.splits["train"]) == {"a.tif": ("one",), "c.tif": ("five", "six")}
    assert found.blank == [f"train_caps.txt: line {line}" for line in (2, 3, 4)]
    assert found.empty == ["b.tif"]


def test_blank_captions_of_json_are_named(tmp_path):
    write_karpathy(tmp_path, {"train": {"a.tif": ["one", " "], "b.tif": [""]}})
    found = read_annotations(tmp_path)
    assert as_dict(found.splits["train"]) == {"a.tif": ("one",)}
    assert found.blank == ["dataset.json: a.tif, sentence 1", "dataset.json: b.tif, sentence 0"]
    assert found.empty == ["b.tif"]


def test_images_without_a_sentence_in_json_are_named_and_left_out(tmp_path):
    write_karpathy(tmp_path, {"train": {"a.tif": ["one"], "b.tif": []}, "test": {"c.tif": []}})
    found = read_annotations(tmp_path)
    assert found.splits == {"train": [Record("a.tif", ("one",))], "test": []}
    assert found.blank == [f"dataset.json: {name}, no sentence" for name in ("b.tif", "c.tif")]
    assert found.empty == ["b.tif", "c.tif"]


def test_normal_form_ignores_case_and_rim():
    assert normal_form(" A Ship ") == normal_form("a ship") != normal_form("a  ship")


# ------------------------------------------------------------------ annotation errors


def test_lists_that_do_not_divide_are_an_error_with_both_names(tmp_path):
    write_lists(tmp_path, "train", ["a.tif", "b.tif"], ["one", "two", "three"])
    message = r"train_filename\.txt has 2 lines and .*train_caps\.txt 3"
    with pytest.raises(ValueError, match=message):
        read_annotations(tmp_path)


def test_an_empty_name_list_is_an_error(tmp_path):
    write_lists(tmp_path, "train", [], ["one"])
    with pytest.raises(ValueError, match=r"train_filename\.txt has 0 lines"):
        read_annotations(tmp_path)


def test_a_blank_name_is_an_error_with_its_line(tmp_path):
    write_lists(tmp_path, "val", ["a.tif", " ", "c.tif"], ["one", "two", "three"])
    with pytest.raises(ValueError, match=r"val_filename\.txt: line 2 is blank"):
        read_annotations(tmp_path)


@pytest.mark.parametrize("gone", ["test_filename.txt", "test_caps.txt"])
def test_a_missing_partner_file_is_an_error(tmp_path, gone):
    write_lists(tmp_path, "train", ["a.tif"], ["one"])
    write_lists(tmp_path, "test", ["b.tif"], ["two"])
    (tmp_path / gone).unlink()
    with pytest.raises(ValueError, match=r"test_filename\.txt and .*test_caps\.txt: one is there"):
        read_annotations(tmp_path)


def test_no_annotations_are_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"found neither") as failure:
        read_annotations(tmp_path)
    assert str(tmp_path) in str(failure.value)


def test_several_annotations_are_an_error_that_lists_them(tmp_path):
    write_karpathy(tmp_path, {"test": {"a.tif": ["one"]}})
    write_karpathy(tmp_path, {"test": {"a.tif": ["one"]}}, "dataset_2.json")
    with pytest.raises(ValueError, match=r"found dataset\.json, dataset_2\.json"):
        read_annotations(tmp_path)
    (tmp_path / "dataset_2.json").unlink()
    write_lists(tmp_path, "test", ["a.tif"], ["one"])
    with pytest.raises(ValueError, match=r"found dataset\.json, \*_filename\.txt"):
        read_annotations(tmp_path)


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ([], "field 'images'"),
        ({"images": {}}, "field 'images'"),
        ({"images": ["a.tif"]}, "image 0: field 'filename'"),
        ({"images": [{"split": "test", "sentences": []}]}, "image 0: field 'filename'"),
        ({"images": [{"filename": 7, "split": "x", "sentences": []}]}, "image 0: field 'filename'"),
        ({"images": [{"filename": "a", "sentences": []}]}, "image 0: field 'split'"),
        ({"images": [{"filename": "a", "split": "x"}]}, "image 0: field 'sentences'"),
        (
            {
                "images": [
                    {"filename": "a", "split": "x", "sentences": [{"raw": "y"}, {"tokens": []}]}
                ]
            },
            "image 0, sentence 1: field 'raw'",
        ),
    ],
)
def test_malformed_json_is_an_error_with_file_and_field(tmp_path, content, place):
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError) as failure:
        read_annotations(tmp_path)
    assert str(path) in str(failure.value) and place in str(failure.value)


def test_json_that_is_cut_short_is_an_error_with_its_file(tmp_path):
    (tmp_path / "dataset.json").write_text('{"images": [', encoding="utf-8")
    with pytest.raises(ValueError, match=r"dataset\.json"):
        read_annotations(tmp_path)


# ------------------------------------------------------------------ real annotations


def squeezed(captions):
    return ["".join(text.split()) for text in captions]


def test_rsitmd_lists_agree_with_the_json_of_others(real_data):
    root = real_data / "RSITMD"
    found = read_annotations(root)
    expected = {}
    for split in ("train", "val"):  # the lists hold both
        for entry in json.loads((root / f"rsitmd_{split}.json").read_text(encoding="utf-8")):
            texts = entry["caption"]  # a string in train, a list in val
            own = expected.setdefault(entry["image"].split("/")[-1], [])
            own += [texts] if isinstance(texts, str) else texts
    assert len(found.splits["train"]) == 4287
    for record in found.splits["train"]:
        assert squeezed(record.captions) == squeezed(expected[record.name])


def test_rsitmd_blank_captions(real_data):
    found = read_annotations(real_data / "RSITMD")
    lines = [9631, 14011, 19576, 20916]
    assert found.blank == [f"train_caps.txt: line {n + i}" for n in lines for i in range(5)]
    without = ["mountain_2378", "railwaystation_3254", "storagetanks_4367", "viaduct_4635"]
    assert found.empty == [f"{name}.tif" for name in without]
    assert not set(found.empty) & set(as_dict(found.splits["train"]))


def test_rsitmd_test_list_has_a_name_per_caption(real_data):
    root = real_data / "RSITMD"
    found = as_dict(read_annotations(root).splits["test"])
    entries = json.loads((root / "rsitmd_test.json").read_text(encoding="utf-8"))
    expected = {entry["image"].split("/")[-1]: entry["caption"] for entry in entries}
    assert len(found) == 452 and sum(map(len, found.values())) == 2260
    assert found.keys() == expected.keys()
    for name, captions in found.items():
        assert set(captions) == {text.strip() for text in expected[name]}


def test_ucm_splits_and_files(real_data):
    root = real_data / "UCM"
    splits = read_annotations(root).splits
    assert {s: len(records) for s, records in splits.items()} == {
        "train": 1680,
        "val": 210,
        "test": 210,
    }
    index = images.index_images(root)
    for record in splits["test"]:  # named .tif, stored as .jpg
        stem = record.name.removesuffix(".tif")
        assert images.find_image(record.name, index, root) == f"imgs/{stem}.jpg"


# ------------------------------------------------------------------ validation split


def records_of(count):
    return [Record(f"{i}.tif", (f"caption {i}", f"other {i}")) for i in range(count)]


def test_a_shipped_validation_split_is_used_as_it_is():
    shipped = Annotations({"train": records_of(20), "val": records_of(3)}, "here", [], [])
    assert with_validation(shipped, 0.1, 0) == (shipped, None)


def test_without_train_records_nothing_is_drawn():
    shipped = Annotations({"test": records_of(20)}, "here", [], [])
    assert with_validation(shipped, 0.1, 0) == (shipped, None)


def test_a_drawn_validation_split_is_seeded_and_by_image():
    shipped = Annotations({"train": records_of(150), "test": records_of(4)}, "here", [], [])
    found, drawn = with_validation(shipped, 0.1, 3)
    train, val = found.splits["train"], found.splits["val"]
    assert len(val) == 15 and sorted(train + val) == sorted(records_of(150))
    assert drawn == {"train": [r.name for r in train], "val": [r.name for r in val]}
    assert found.splits["test"] == records_of(4)
    assert "seed 3" in found.origin
    assert with_validation(shipped, 0.1, 3) == (found, drawn)
    assert with_validation(shipped, 0.1, 4)[1] != drawn


@pytest.mark.parametrize(("records", "drawn"), [(50, 10), (12, 6)])
def test_a_small_drawn_validation_split_has_ten_images_or_half(records, drawn):
    shipped = Annotations({"train": records_of(records)}, "here", [], [])
    assert len(with_validation(shipped, 0.1, 0)[0].splits["val"]) == drawn
