"""Caption files, splits, and what is wrong with them."""

import json

import pytest

from conftest import write_karpathy
from dataset import images
from dataset.annotations import (
    FORMS,
    SPLITS,
    Annotations,
    Record,
    normal_form,
    prepared,
    read_annotations,
    with_validation,
)


def write_lists(root, split, names, captions):
    root.mkdir(parents=True, exist_ok=True)
    (root / f"{split}_filename.txt").write_text("".join(f"{n}\n" for n in names), encoding="utf-8")
    (root / f"{split}_caps.txt").write_text("".join(f"{c}\n" for c in captions), encoding="utf-8")


def write_pir(root, split, entries, name="x"):
    root.mkdir(parents=True, exist_ok=True)
    content = [{"image": image, "caption": caption} for image, caption in entries]
    (root / f"{name}_{split}.json").write_text(json.dumps(content), encoding="utf-8")


def write_as(form, root, splits):
    """Write records of every split in a form, as a user's files have them."""
    if form == "karpathy":
        write_karpathy(root, {split: dict(records) for split, records in splits.items()})
    for split, records in splits.items():
        if form == "pir":
            write_pir(root, split, [(f"{split}/{r.name}", list(r.captions)) for r in records])
        if form == "txt":
            names = [r.name for r in records for _ in r.captions]
            write_lists(root, split, names, [text for r in records for text in r.captions])


def count(found):
    return sum(len(record.captions) for own in found.splits.values() for record in own)


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
    write_pir(tmp_path / "pir", "test", [(f"test/{n}", own) for n, own in texts.items()])
    rows = [(f"test/{n}", text) for n, own in texts.items() for text in own]
    write_pir(tmp_path / "pir_rows", "test", rows)
    expected = [Record(name, own) for name, own in texts.items()]
    for folder in ("json", "per_image", "per_caption", "pir", "pir_rows"):
        assert read_annotations(tmp_path / folder).splits == {"test": expected}


def test_every_split_is_read(tmp_path):
    for split in SPLITS:
        write_lists(tmp_path / "lists", split, [f"{split}.tif"], [f"of {split}"])
        write_pir(tmp_path / "pir", split, [(f"{split}/{split}.tif", f"of {split}")])
    write_karpathy(tmp_path / "json", {s: {f"{s}.tif": [f"of {s}"]} for s in SPLITS})
    for folder in ("lists", "json", "pir"):
        splits = read_annotations(tmp_path / folder).splits
        assert splits == {s: [Record(f"{s}.tif", (f"of {s}",))] for s in SPLITS}


def test_rows_of_an_image_that_are_apart_are_joined_in_order(tmp_path):
    write_lists(tmp_path, "test", ["b.tif", "a.tif", "b.tif"], ["one", "two", "three"])
    write_pir(tmp_path, "test", [("b.tif", "one"), ("a.tif", ["two"]), ("b.tif", "three")])
    for form in ("txt", "pir"):
        records = read_annotations(tmp_path, form).splits["test"]
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


def test_only_the_folder_of_its_own_split_is_taken_off_a_pir_name(tmp_path):
    names = ["val/a.tif", "train/b.tif", "val/val/c.tif", "valley/d.tif", "e.tif"]
    write_pir(tmp_path, "val", [(name, "one") for name in names])
    found = [record.name for record in read_annotations(tmp_path).splits["val"]]
    assert found == ["a.tif", "train/b.tif", "val/c.tif", "valley/d.tif", "e.tif"]


def test_byte_order_mark_and_windows_line_ends_leave_no_trace(tmp_path):
    mark = b"\xef\xbb\xbf"
    (tmp_path / "train_filename.txt").write_bytes(mark + b"a.tif\r\nb.tif\r\n")
    captions = mark + " ein Schiff \r\nzwei Häfen\r\n".encode()
    (tmp_path / "train_caps.txt").write_bytes(captions)
    records = read_annotations(tmp_path).splits["train"]
    assert records == [Record("a.tif", ("ein Schiff",)), Record("b.tif", ("zwei Häfen",))]


def test_json_may_begin_with_a_byte_order_mark(tmp_path):
    content = json.dumps([{"image": "train/a.tif", "caption": "zwei Häfen"}], ensure_ascii=False)
    (tmp_path / "x_train.json").write_text(content, encoding="utf-8-sig")
    assert read_annotations(tmp_path).splits == {"train": [Record("a.tif", ("zwei Häfen",))]}


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


def test_blank_captions_of_pir_are_named(tmp_path):
    write_pir(tmp_path, "train", [("a.tif", ["one", " "]), ("b.tif", ""), ("c.tif", [])])
    found = read_annotations(tmp_path)
    assert found.splits == {"train": [Record("a.tif", ("one",))]}
    assert found.blank == [
        "x_train.json: entry 0, a.tif, caption 1",
        "x_train.json: entry 1, b.tif, caption 0",
        "x_train.json: entry 2, c.tif, no caption",
    ]
    assert found.empty == ["b.tif", "c.tif"]


def test_origin_names_form_files_and_what_was_done(tmp_path):
    write_lists(tmp_path, "test", ["a.tif"], ["one"])
    write_pir(tmp_path, "test", [("a.tif", "one")])
    txt, pir = (read_annotations(tmp_path, form).origin for form in ("txt", "pir"))
    assert txt == f"text lists in {tmp_path}: test_filename.txt, test_caps.txt"
    assert pir == f"PIR-style JSON in {tmp_path}: x_test.json"
    changed = read_annotations(tmp_path, "txt", "pir", "a photo of {}").origin
    assert changed == f"{txt}; captions cleaned as by pir; captions within 'a photo of {{}}'"


# ------------------------------------------------------------------ cleaning


def test_cleaning_as_by_pir():
    text = " Two-storey  HOUSES, (red/blue)\tare *here*: \"it's #1\"; isn't it?! ~ "
    assert prepared(text, "pir") == "two storey houses red blue are here its 1 isnt it"
    assert prepared(" ".join(map(str, range(31))), "pir") == " ".join(map(str, range(30)))
    assert prepared(text) == text.strip()
    assert prepared(" - ?", "pir") == prepared(" \n") == ""


def test_a_template_is_applied_after_cleaning_and_never_to_nothing():
    template = "A photo: {}, from above."
    assert prepared(" A-B. ", "pir", template) == "A photo: a b, from above."
    assert prepared("{0} {x} {}", template="see {}") == "see {0} {x} {}"
    assert prepared("...", "pir", template) == ""


def test_what_cleaning_leaves_blank_is_named_and_shifts_nothing(tmp_path):
    write_lists(tmp_path, "train", ["a.tif", "b.tif", "c.tif"], ["One.", "...", "A-b"])
    found = read_annotations(tmp_path, clean="pir", template="see {}")
    assert as_dict(found.splits["train"]) == {"a.tif": ("see one",), "c.tif": ("see a b",)}
    assert found.blank == ["train_caps.txt: line 2"] and found.empty == ["b.tif"]


@pytest.mark.parametrize("template", ["", "a photo", "{} and {}", "{0}", "{{}}", "{} {", "{x} {}"])
def test_a_template_without_exactly_one_place_is_an_error(tmp_path, template):
    write_lists(tmp_path, "train", ["a.tif"], [" "])
    with pytest.raises(ValueError, match="exactly one {}"):
        read_annotations(tmp_path, template=template)


def test_an_unknown_cleaning_is_an_error_that_lists_those_there_are():
    with pytest.raises(ValueError, match="cleaning 'lower': expected one of none, pir"):
        prepared("one", "lower")


def test_normal_form_ignores_case_and_rim():
    assert normal_form(" A Ship ") == normal_form("a ship") != normal_form("a  ship")


# ------------------------------------------------------------------ annotation errors


def test_lists_that_do_not_divide_are_an_error_with_both_names(tmp_path):
    write_lists(tmp_path, "train", ["a.tif", "b.tif"], ["one", "two", "three"])
    message = r"train_filename\.txt has 2 lines and .*train_caps\.txt 3"
    with pytest.raises(ValueError, match=message):
        read_annotations(tmp_path)


@pytest.mark.parametrize(("names", "captions"), [([], ["one"]), (["a.tif"], [])])
def test_an_empty_list_is_an_error(tmp_path, names, captions):
    write_lists(tmp_path, "train", names, captions)
    message = rf"filename\.txt has {len(names)} lines and .*_caps\.txt {len(captions)}"
    with pytest.raises(ValueError, match=message):
        read_annotations(tmp_path)


def test_a_blank_name_is_an_error_with_its_line(tmp_path):
    write_lists(tmp_path, "val", ["a.tif", " ", "c.tif"], ["one", "two", "three"])
    with pytest.raises(ValueError, match=r"val_filename\.txt: line 2: the name is blank"):
        read_annotations(tmp_path)


@pytest.mark.parametrize("gone", ["test_filename.txt", "test_caps.txt"])
def test_a_missing_partner_file_is_an_error(tmp_path, gone):
    write_lists(tmp_path, "train", ["a.tif"], ["one"])
    write_lists(tmp_path, "test", ["b.tif"], ["two"])
    (tmp_path / gone).unlink()
    with pytest.raises(ValueError, match=r"test_filename\.txt and .*test_caps\.txt: one is there"):
        read_annotations(tmp_path)


OUTSIDE = ["../a.tif", "b/../../a.tif", "b\\..\\a.tif", "..", "/a.tif", "\\a.tif", "//host/b/a.tif"]
OUTSIDE += ["\\\\host\\b\\a.tif", "C:\\a.tif", "c:/a.tif", "C:a.tif"]


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize(
    ("form", "place"),
    [
        ("txt", "test_filename.txt: line 2"),
        ("karpathy", "dataset.json: image 1"),
        ("pir", "x_test.json: entry 1"),
    ],
)
def test_a_name_that_leads_out_of_the_root_is_an_error_with_its_place(tmp_path, name, form, place):
    records = [Record("..a.tif", ("one",)), Record(name, ("two",))]
    write_as(form, tmp_path, {"test": records})
    with pytest.raises(ValueError, match="leads out of the data root") as failure:
        read_annotations(tmp_path)
    assert f"{tmp_path / place}: '" in str(failure.value)


def test_folders_of_names_that_lead_out_of_the_root_are_errors(tmp_path):
    write_pir(tmp_path / "pir", "test", [("test//etc/a.tif", "one")])
    entry = {"filepath": "..", "filename": "a.tif", "split": "test", "sentences": [{"raw": "one"}]}
    (tmp_path / "dataset.json").write_text(json.dumps({"images": [entry]}), encoding="utf-8")
    for root in (tmp_path, tmp_path / "pir"):
        with pytest.raises(ValueError, match="leads out of the data root"):
            read_annotations(root)


def test_a_data_root_and_an_image_folder_may_be_links(tmp_path):
    pictures = tmp_path / "elsewhere" / "pictures"
    pictures.mkdir(parents=True)
    (pictures / "a.png").touch()
    write_lists(tmp_path / "real", "test", ["a.tif"], ["one"])
    root = tmp_path / "link"
    root.symlink_to(tmp_path / "real", target_is_directory=True)
    (root / "imgs").symlink_to(pictures, target_is_directory=True)
    [record] = read_annotations(root).splits["test"]
    assert images.find_image(record.name, images.index_images(root), root) == "imgs/a.png"


# ------------------------------------------------------------------ which form


def write_all_forms(root):
    for form in FORMS[1:]:
        write_as(form, root, {"test": [Record(f"{form}.tif", ("one",))]})


def test_several_forms_are_an_error_that_lists_them_and_one_can_be_chosen(tmp_path):
    write_all_forms(tmp_path)
    with pytest.raises(ValueError) as failure:
        read_annotations(tmp_path)
    listed = (
        "--annotations txt (test_filename.txt, test_caps.txt); "
        "--annotations karpathy (dataset.json); --annotations pir (x_test.json)"
    )
    assert str(failure.value).endswith(listed) and str(tmp_path) in str(failure.value)
    for form in FORMS[1:]:
        assert read_annotations(tmp_path, form).splits == {
            "test": [Record(f"{form}.tif", ("one",))]
        }


@pytest.mark.parametrize("form", FORMS)
def test_no_annotations_are_an_error_that_says_what_is_expected(tmp_path, form):
    (tmp_path / "classes.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError) as failure:
        read_annotations(tmp_path, form)
    for part in (str(tmp_path), "<split>_filename.txt", "dataset*.json", "*_train.json"):
        assert part in str(failure.value)


@pytest.mark.parametrize(("form", "there"), [("pir", "txt"), ("txt", "pir"), ("karpathy", "pir")])
def test_a_form_that_is_not_there_is_an_error_that_says_what_is(tmp_path, form, there):
    write_as(there, tmp_path, {"test": [Record("a.tif", ("one",))]})
    message = rf"--annotations {form} needs .*; there is --annotations {there} \("
    with pytest.raises(ValueError, match=message):
        read_annotations(tmp_path, form)
    with pytest.raises(ValueError, match="--annotations coco: expected one of auto, txt"):
        read_annotations(tmp_path, "coco")


@pytest.mark.parametrize("form", ["auto", "karpathy"])
def test_two_karpathy_files_are_an_error_that_lists_them(tmp_path, form):
    for name in ("dataset.json", "dataset_2.json"):
        write_karpathy(tmp_path, {"test": {"a.tif": ["one"]}}, name)
    with pytest.raises(ValueError, match=r"\(dataset\.json\).*\(dataset_2\.json\)"):
        read_annotations(tmp_path, form)


@pytest.mark.parametrize("form", ["auto", "pir"])
def test_two_sets_of_pir_files_are_an_error_that_lists_them(tmp_path, form):
    for split, name in (("train", "x"), ("test", "x"), ("test", "y")):
        write_pir(tmp_path, split, [("a.tif", "one")], name)
    with pytest.raises(ValueError, match=r"\(x_train\.json, x_test\.json\).*\(y_test\.json\)"):
        read_annotations(tmp_path, form)


def test_other_json_is_not_taken_for_annotations(tmp_path):
    write_lists(tmp_path, "test", ["a.tif"], ["one"])
    detection = [{"label": "ship", "bbox": [1, 1, 1, 1, 0, 1]}]
    for name, content in (("wind_test", detection), ("no_val", []), ("words_train", {"a": 1})):
        (tmp_path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    assert read_annotations(tmp_path).splits == {"test": [Record("a.tif", ("one",))]}


def test_a_pir_set_may_be_called_dataset(tmp_path):
    write_pir(tmp_path, "train", [("train/a.tif", "one")], "dataset")
    assert read_annotations(tmp_path).splits == {"train": [Record("a.tif", ("one",))]}


# ------------------------------------------------------------------ malformed files


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


@pytest.mark.parametrize("name", ["dataset.json", "x_train.json"])
def test_json_that_is_cut_short_is_an_error_with_its_file(tmp_path, name):
    (tmp_path / name).write_text('[{"images": [', encoding="utf-8")
    with pytest.raises(ValueError, match=rf"{name}: expected JSON"):
        read_annotations(tmp_path)


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ([], "expected a list of images with captions"),
        ({"images": []}, "expected a list of images with captions"),
        (["a.tif"], "entry 0: field 'image'"),
        ([{"image": "a", "caption": "x"}, {"caption": "x"}], "entry 1: field 'image'"),
        ([{"image": "a"}], "entry 0: field 'caption': expected str or list, found None"),
        ([{"image": "a", "caption": ["x", 7]}], "entry 0, caption 1: expected str, found 7"),
        ([{"image": " ", "caption": "x"}], "entry 0: the name is blank"),
    ],
)
def test_malformed_pir_json_is_an_error_with_file_and_field(tmp_path, content, place):
    write_pir(tmp_path, "train", [("a.tif", "one")])
    path = tmp_path / "x_test.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError) as failure:
        read_annotations(tmp_path)
    assert f"{path}: {place}" in str(failure.value)


def test_json_without_images_is_an_error_with_its_file(tmp_path):
    write_karpathy(tmp_path, {})
    with pytest.raises(ValueError, match=r"dataset\.json: no image"):
        read_annotations(tmp_path)


# ------------------------------------------------------------------ real annotations


def test_rsitmd_lists_and_pir_json_hold_the_same(real_data):
    """Test splits are one; the lists' train split is PIR's train and val less the blank images."""
    txt, pir = (read_annotations(real_data / "RSITMD", form) for form in ("txt", "pir"))
    assert as_dict(txt.splits["test"]) == as_dict(pir.splits["test"])
    assert [len(pir.splits[split]) for split in SPLITS] == [3435, 856, 452]
    assert pir.blank == pir.empty == []
    both = as_dict(pir.splits["train"] + pir.splits["val"])
    assert len(both) == 3435 + 856
    assert as_dict(txt.splits["train"]) == {n: c for n, c in both.items() if n not in txt.empty}
    assert set(txt.empty) < both.keys()


@pytest.mark.parametrize(("name", "form"), [("RSITMD", "txt"), ("RSITMD", "pir"), ("UCM", "auto")])
@pytest.mark.parametrize("target", FORMS[1:])
def test_real_annotations_are_the_same_in_every_form(real_data, tmp_path, name, form, target):
    splits = read_annotations(real_data / name, form).splits
    write_as(target, tmp_path, splits)
    assert read_annotations(tmp_path, target).splits == splits


@pytest.mark.parametrize("target", ["txt", "pir"])
def test_rsicd_is_the_same_in_every_form(real_data, tmp_path, target):
    splits = read_annotations(real_data / "RSICD").splits
    write_as(target, tmp_path, splits)
    assert read_annotations(tmp_path).splits == splits


def test_cleaning_real_captions(real_data):
    """Three captions of RSICD are a full stop and nothing else; all others keep words."""
    stops = {("bridge_218.jpg", 0), ("parking_211.jpg", 2), ("bridge_59.jpg", 2)}
    lost = {f"dataset_rsicd.json: {name}, sentence {i}" for name, i in stops}
    for name, form, blank in (("RSITMD", "pir", set()), ("RSICD", "auto", lost)):
        plain, clean = (read_annotations(real_data / name, form, how) for how in ("none", "pir"))
        assert set(clean.blank) == blank and plain.blank == clean.empty == []
        assert count(plain) == count(clean) + len(blank)
        texts = [text for own in clean.splits.values() for r in own for text in r.captions]
        assert all(text == text.lower() and 0 < len(text.split()) <= 30 for text in texts)


def test_rsitmd_blank_captions(real_data):
    found = read_annotations(real_data / "RSITMD", "txt")
    lines = [9631, 14011, 19576, 20916]
    assert found.blank == [f"train_caps.txt: line {n + i}" for n in lines for i in range(5)]
    without = ["mountain_2378", "railwaystation_3254", "storagetanks_4367", "viaduct_4635"]
    assert found.empty == [f"{name}.tif" for name in without]
    assert not set(found.empty) & set(as_dict(found.splits["train"]))


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


@pytest.mark.parametrize("name", [".", "./", "images/", "images/."])
def test_a_name_of_no_file_is_an_error_with_its_line(tmp_path, name):
    write_lists(tmp_path, "train", ["a.tif", name], ["one", "two"])
    with pytest.raises(ValueError, match=r"train_filename\.txt: line 2: .*names no file"):
        read_annotations(tmp_path)
