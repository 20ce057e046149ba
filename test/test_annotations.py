"""Caption files, splits, and what is wrong with them."""

import json

import pytest

from conftest import write_karpathy
from dataset.annotations import (
    SPLITS,
    Annotations,
    Record,
    normal_form,
    prepared,
    read_annotations,
    with_validation,
)

FORMS = ("txt", "karpathy", "pir")


def write_lists(root, split, names, captions):
    root.mkdir(parents=True, exist_ok=True)
    (root / f"{split}_filename.txt").write_text("".join(f"{n}\n" for n in names), encoding="utf-8")
    (root / f"{split}_caps.txt").write_text("".join(f"{c}\n" for c in captions), encoding="utf-8")


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def write_pir(root, split, entries, name="x"):
    content = [{"image": image, "caption": caption} for image, caption in entries]
    write_json(root / f"{name}_{split}.json", content)


def write_as(form, root, splits):
    """Write {split: {name: captions}} in a form, as a user's files have them."""
    if form == "karpathy":
        write_karpathy(root, splits)
    for split, captions_of in splits.items():
        if form == "pir":
            entries = [(f"{split}/{name}", list(own)) for name, own in captions_of.items()]
            write_pir(root, split, entries)
        if form == "txt":
            names = [name for name, own in captions_of.items() for _ in own]
            write_lists(root, split, names, [text for own in captions_of.values() for text in own])


def as_dicts(found):
    """{split: {name: captions}} of Annotations."""
    return {split: dict(records) for split, records in found.splits.items()}


def error_of(root, *settings):
    with pytest.raises(ValueError) as failure:
        read_annotations(root, *settings)
    return str(failure.value)


# ------------------------------------------------------------------ annotation formats


TEXTS = {"b.tif": ("one", "two"), "a.tif": ("three", "four")}


@pytest.mark.parametrize(
    "form", ["txt", "a name an image", "karpathy", "pir", "an entry a caption"]
)
def test_all_formats_give_the_same_records_of_every_split(tmp_path, form):
    expected = {split: {f"{split}_{n}": own for n, own in TEXTS.items()} for split in SPLITS}
    for split, captions_of in expected.items():
        rows = [(name, text) for name, own in captions_of.items() for text in own]
        if form == "a name an image":
            write_lists(tmp_path, split, captions_of, [text for _, text in rows])
        if form == "an entry a caption":
            write_pir(tmp_path, split, [(f"{split}/{name}", text) for name, text in rows])
    write_as(form, tmp_path, expected)
    found = read_annotations(tmp_path)
    assert as_dicts(found) == expected and found.blank == found.empty == []
    assert [record.name for record in found.splits["val"]] == ["val_b.tif", "val_a.tif"]


def test_rows_of_an_image_that_are_apart_are_joined_in_order(tmp_path):
    write_lists(tmp_path, "test", ["b.tif", "a.tif", "b.tif"], ["one", "two", "three"])
    write_pir(tmp_path, "test", [("b.tif", "one"), ("a.tif", ["two"]), ("b.tif", "three")])
    for form in ("txt", "pir"):
        records = read_annotations(tmp_path, form).splits["test"]
        assert records == [Record("b.tif", ("one", "three")), Record("a.tif", ("two",))]


def test_folders_are_part_of_a_name_but_for_that_of_pirs_split(tmp_path):
    entry = {"filepath": "x", "filename": "a.jpg", "split": "val", "sentences": [{"raw": "x"}]}
    write_json(tmp_path / "dataset_coco.json", {"images": [entry]})
    names = ["val/a.tif", "train/b.tif", "val/val/c.tif", "valley/d.tif", "e.tif"]
    write_pir(tmp_path, "val", [(name, "one") for name in names])
    assert list(as_dicts(read_annotations(tmp_path, "karpathy"))["val"]) == ["x/a.jpg"]
    found = list(as_dicts(read_annotations(tmp_path, "pir"))["val"])
    assert found == ["a.tif", "train/b.tif", "val/c.tif", "valley/d.tif", "e.tif"]


def test_marks_and_line_ends_of_other_systems_leave_no_trace(tmp_path):
    mark = b"\xef\xbb\xbf"
    (tmp_path / "train_filename.txt").write_bytes(mark + b"a.tif\r\nb.tif\r\n")
    captions = " ein Schiff \r\nzwei Häfen".encode()  # and no last line end
    (tmp_path / "train_caps.txt").write_bytes(mark + captions)
    content = json.dumps([{"image": "a.tif", "caption": "zwei Häfen"}], ensure_ascii=False)
    (tmp_path / "x_train.json").write_text(content, encoding="utf-8-sig")
    records = read_annotations(tmp_path, "txt").splits["train"]
    assert records == [Record("a.tif", ("ein Schiff",)), Record("b.tif", ("zwei Häfen",))]
    assert as_dicts(read_annotations(tmp_path, "pir")) == {"train": {"a.tif": ("zwei Häfen",)}}


def test_blank_captions_are_named_and_shift_nothing(tmp_path):
    names = ["a.tif", "b.tif", "c.tif"]
    write_lists(tmp_path, "train", names, ["one", "  ", "", "\t", "five", "six"])
    entries = [("a.tif", ["one", " "]), ("b.tif", ""), ("d.tif", []), ("c.tif", ["five", "six"])]
    write_pir(tmp_path, "train", entries)
    splits = {"train": {"a.tif": ["one", " "], "b.tif": [""], "c.tif": ["five", "six"]}}
    write_karpathy(tmp_path, {**splits, "test": {"d.tif": []}})
    blank = {
        "txt": [f"train_caps.txt: line {line}" for line in (2, 3, 4)],
        "karpathy": [
            "dataset.json: a.tif, sentence 1",
            "dataset.json: b.tif, sentence 0",
            "dataset.json: d.tif, no sentence",
        ],
        "pir": [
            "x_train.json: entry 0, a.tif, caption 1",
            "x_train.json: entry 1, b.tif, caption 0",
            "x_train.json: entry 2, d.tif, no caption",
        ],
    }
    for form in FORMS:
        found = read_annotations(tmp_path, form)
        assert as_dicts(found)["train"] == {"a.tif": ("one",), "c.tif": ("five", "six")}
        assert found.blank == blank[form]
        assert found.empty == (["b.tif"] if form == "txt" else ["b.tif", "d.tif"])
    assert read_annotations(tmp_path, "karpathy").splits["test"] == []


@pytest.mark.parametrize("form", ["karpathy", "pir", "txt"])
def test_lone_surrogates_are_an_error_with_file_and_place(tmp_path, form):
    broken = "a \\ud83d ship"
    if form == "karpathy":
        sentences = f'[{{"raw": "x"}}, {{"raw": "{broken}"}}]'
        image = f'{{"filename": "a", "split": "train", "sentences": {sentences}}}'
        content = f'{{"images": [{image}]}}'
        name, place = "dataset.json", "a, sentence 1"
    elif form == "pir":
        content = f'[{{"image": "a", "caption": ["x", "{broken}"]}}]'
        name, place = "mine_train.json", "entry 0, a, caption 1"
    else:  # UTF-8 itself has none
        (tmp_path / "train_filename.txt").write_text("a\n", encoding="utf-8")
        content = "x\n" + broken.encode().decode("unicode_escape") + "\n"
        name, place = "train_caps.txt", "line 2: expected text in UTF-8"
    (tmp_path / name).write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError) as error:
        read_annotations(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / name}: {place}: ")
    if form != "txt":
        found = read_annotations(tmp_path, leave_out_broken=True)
        assert found.broken == (f"{name}: {place}",)
        assert found.splits["train"] == [Record("a", ("x",))]


# ------------------------------------------------------------------ cleaning


def test_cleaning_as_by_pir():
    text = " Two-storey  HOUSES, (red/blue)\tare *here*: \"it's #1\"; isn't it?! ~ "
    assert prepared(text, ["pir"]) == "two storey houses red blue are here its 1 isnt it"
    assert prepared(" ".join(map(str, range(31))), ["pir"]) == " ".join(map(str, range(30)))
    assert prepared(text) == text.strip()
    assert prepared(" - ?", ["pir"]) == prepared(" \n") == ""
    assert normal_form(" A Ship ") == normal_form("a ship") != normal_form("a  ship")


def test_a_template_is_applied_after_cleaning_and_never_to_nothing(tmp_path):
    assert prepared(" A-B. ", ["A photo: {}, above.", "pir"]) == "A photo: a b, above."
    assert prepared("{0} {x} {}", ["see {}"]) == "see {0} {x} {}"
    write_lists(tmp_path, "train", ["a.tif", "b.tif", "c.tif"], ["One.", "...", "A-b"])
    found = read_annotations(tmp_path, caption_form=["pir", "see {}"])
    assert as_dicts(found)["train"] == {"a.tif": ("see one",), "c.tif": ("see a b",)}
    assert found.blank == ["train_caps.txt: line 2"] and found.empty == ["b.tif"]


@pytest.mark.parametrize(
    "template", ["", "lower", "a photo", "{} and {}", "{0}", "{{}}", "{} {", "{} }", "{x} {}"]
)
def test_a_template_without_exactly_one_place_is_an_error(tmp_path, template):
    assert "exactly one {}" in error_of(tmp_path, "auto", ["pir", template])


@pytest.mark.parametrize("form", [["pir", "pir"], ["a {}", "b {}"], ["a {}", "pir", "b {}"]])
def test_a_caption_form_has_one_part_of_each_kind(tmp_path, form):
    assert f"--caption-form: {len(form)} given" in error_of(tmp_path, "auto", form)


# ------------------------------------------------------------------ annotation errors


@pytest.mark.parametrize(
    ("names", "captions", "problem"),
    [
        (["a.tif", "b.tif"], ["one", "two", "three"], "has 2 lines and "),
        ([], ["one"], "has 0 lines and "),
        (["a.tif"], [], "val_caps.txt 0: expected one name"),
        (["a.tif", " ", "c.tif"], ["one", "two", "three"], "line 2: the name is blank"),
        *[(["a.tif", name], ["one", "two"], "line 2: '") for name in (".", "./", "b/", "b/.")],
    ],
)
def test_lists_that_do_not_fit_are_an_error_with_file_and_line(tmp_path, names, captions, problem):
    write_lists(tmp_path, "val", names, captions)
    message = error_of(tmp_path)
    assert message.startswith(str(tmp_path / "val_filename.txt")) and problem in message


@pytest.mark.parametrize("gone", ["test_filename.txt", "test_caps.txt"])
def test_a_missing_partner_file_is_an_error(tmp_path, gone):
    write_as("txt", tmp_path, {"train": TEXTS, "test": TEXTS})
    (tmp_path / gone).unlink()
    files = f"{tmp_path / 'test_filename.txt'} and {tmp_path / 'test_caps.txt'}"
    assert error_of(tmp_path).startswith(files)


OUTSIDE = ["../a.tif", "b/../../a.tif", "b\\..\\a.tif", "..", "/a.tif", "\\a.tif", "//host/b/a.tif"]
OUTSIDE += ["\\\\host\\b\\a.tif", "C:\\a.tif", "c:/a.tif", "C:a.tif"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_that_leads_out_of_the_root_is_an_error_with_its_place(tmp_path, name):
    places = {
        "txt": "test_filename.txt: line 2",
        "karpathy": "dataset.json: image 1",
        "pir": "x_test.json: entry 1",
    }
    for form, place in places.items():
        write_as(form, tmp_path, {"test": {"..a.tif": ("one",), name: ("two",)}})
        message = error_of(tmp_path, form)
        assert message.startswith(f"{tmp_path / place}: '") and "out of the data root" in message


def test_folders_of_names_that_lead_out_of_the_root_are_errors(tmp_path):
    write_pir(tmp_path, "test", [("test//etc/a.tif", "one")])
    entry = {"filepath": "..", "filename": "a.tif", "split": "test", "sentences": [{"raw": "one"}]}
    write_json(tmp_path / "dataset.json", {"images": [entry]})
    for form in ("pir", "karpathy"):
        assert "out of the data root" in error_of(tmp_path, form)


# ------------------------------------------------------------------ which form


def test_several_forms_are_an_error_that_lists_them_and_one_can_be_chosen(tmp_path):
    for form in FORMS:
        write_as(form, tmp_path, {"test": {f"{form}.tif": ("one",)}})
    message = error_of(tmp_path)
    assert message.startswith(str(tmp_path)) and "--annotations karpathy (dataset.json)" in message
    assert "--annotations txt (test_filename.txt, test_caps.txt)" in message
    for form in FORMS:
        assert as_dicts(read_annotations(tmp_path, form)) == {"test": {f"{form}.tif": ("one",)}}
    assert "coco: expected one of auto, txt" in error_of(tmp_path, "coco")


@pytest.mark.parametrize(("form", "there"), [("pir", "txt"), ("txt", "pir"), ("karpathy", "pir")])
def test_a_form_that_is_not_there_is_an_error_that_says_what_is(tmp_path, form, there):
    assert f"{tmp_path}: no annotations; expected <split>_filename" in error_of(tmp_path, form)
    write_as(there, tmp_path, {"test": TEXTS})
    message = error_of(tmp_path, form)
    assert f"--annotations {form} needs" in message
    assert f"there is --annotations {there} (" in message


def test_two_sets_of_one_form_are_an_error_that_lists_them(tmp_path):
    for name in ("dataset.json", "dataset_2.json"):
        write_karpathy(tmp_path / "karpathy", {"test": TEXTS}, name)
    for split, name in (("train", "x"), ("test", "x"), ("test", "y")):
        write_pir(tmp_path / "pir", split, [("a.tif", "one")], name)
    message = error_of(tmp_path / "karpathy", "auto")
    assert "(dataset.json)" in message and "(dataset_2.json)" in message
    message = error_of(tmp_path / "pir", "pir")
    assert "(x_train.json, x_test.json)" in message and "(y_test.json)" in message


def test_other_json_is_not_taken_for_annotations_but_pirs_may_be_called_dataset(tmp_path):
    write_lists(tmp_path / "lists", "test", ["a.tif"], ["one"])
    detection = [{"label": "ship", "bbox": [1, 1, 1, 1, 0, 1]}]
    for name, content in (("wind_test", detection), ("no_val", []), ("words_train", {"a": 1})):
        write_json(tmp_path / "lists" / f"{name}.json", content)
    assert as_dicts(read_annotations(tmp_path / "lists")) == {"test": {"a.tif": ("one",)}}
    write_pir(tmp_path, "train", [("train/a.tif", "one")], "dataset")
    assert as_dicts(read_annotations(tmp_path)) == {"train": {"a.tif": ("one",)}}


# ------------------------------------------------------------------ malformed files


def karpathy(**entry):
    """A file of one entry; fields that are None are left out."""
    entry = {"filename": "a", "split": "x", "sentences": [], **entry}
    return {"images": [{key: value for key, value in entry.items() if value is not None}]}


PIR_LIST = "expected a list of images with captions"


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("dataset.json", [], "field 'images'"),
        ("dataset.json", {"images": {}}, "field 'images'"),
        ("dataset.json", {"images": []}, "no image in it"),
        ("dataset.json", {"images": ["a.tif"]}, "image 0: field 'filename'"),
        ("dataset.json", karpathy(filename=7), "image 0: field 'filename': expected str, found 7"),
        ("dataset.json", karpathy(split=None), "image 0: field 'split'"),
        ("dataset.json", karpathy(sentences=None), "image 0: field 'sentences'"),
        (
            "dataset.json",
            karpathy(sentences=[{"raw": "y"}, {"tokens": []}]),
            "image 0, sentence 1: field 'raw'",
        ),
        ("x_test.json", [], PIR_LIST),
        ("x_test.json", {"images": []}, PIR_LIST),
        ("x_test.json", [{"image": "a", "caption": "x"}, {"caption": "x"}], "entry 1: field"),
        ("x_test.json", [{"image": "a"}], "entry 0: field 'caption': expected str or list, found"),
        ("x_test.json", [{"image": "a", "caption": ["x", 7]}], "entry 0, caption 1: expected str"),
        ("x_test.json", [{"image": " ", "caption": "x"}], "entry 0: the name is blank"),
        ("dataset.json", '[{"images": [', "expected JSON"),
        ("x_test.json", '[{"images": [', "expected JSON"),
    ],
)
def test_malformed_json_is_an_error_with_file_and_field(tmp_path, name, content, place):
    if isinstance(content, str):  # cut short
        (tmp_path / name).write_text(content, encoding="utf-8")
    else:
        if name == "x_test.json":
            write_pir(tmp_path, "train", [("a.tif", "one")])
        write_json(tmp_path / name, content)
    assert error_of(tmp_path).startswith(f"{tmp_path / name}: {place}")


# ------------------------------------------------------------------ real annotations


def test_rsitmd_lists_and_pir_json_hold_the_same(real_data):
    """Test splits are one; the lists' train split is PIR's train and val less the blank images."""
    txt = read_annotations(real_data / "RSITMD", "txt")
    pir = read_annotations(real_data / "RSITMD", "pir")
    assert as_dicts(txt)["test"] == as_dicts(pir)["test"]
    assert [len(pir.splits[split]) for split in SPLITS] == [3435, 856, 452]
    assert pir.blank == pir.empty == []
    both = dict(pir.splits["train"] + pir.splits["val"])
    assert len(both) == 3435 + 856 and set(txt.empty) < both.keys()
    assert as_dicts(txt)["train"] == {n: c for n, c in both.items() if n not in txt.empty}
    lines = [9631, 14011, 19576, 20916]
    assert txt.blank == [f"train_caps.txt: line {n + i}" for n in lines for i in range(5)]
    without = ["mountain_2378", "railwaystation_3254", "storagetanks_4367", "viaduct_4635"]
    assert txt.empty == [f"{name}.tif" for name in without]


# ------------------------------------------------------------------ validation split


def records_of(count):
    return [Record(f"{i}.tif", (f"caption {i}", f"other {i}")) for i in range(count)]


@pytest.mark.parametrize(
    "splits", [{"train": records_of(20), "val": records_of(3)}, {"test": records_of(20)}]
)
def test_nothing_is_drawn_where_val_is_shipped_or_train_is_not(splits):
    shipped = Annotations(splits, "here", [], [])
    assert with_validation(shipped, 0.1, 0) == (shipped, None)
    assert with_validation(shipped, 0.1, 0, dev_images=20) == (shipped, None)


def test_a_drawn_validation_split_is_seeded_and_by_image():
    shipped = Annotations({"train": records_of(150), "test": records_of(4)}, "here", [], [])
    found, drawn = with_validation(shipped, 0.1, 3)
    train = found.splits["train"]
    val = found.splits["val"]
    assert len(val) == 15 and sorted(train + val) == sorted(records_of(150))
    assert drawn == {"train": [r.name for r in train], "val": [r.name for r in val]}
    assert found.splits["test"] == records_of(4) and "seed 3" in found.origin
    assert with_validation(shipped, 0.1, 3) == (found, drawn)
    assert with_validation(shipped, 0.1, 4)[1] != drawn
    for records, size in ((50, 10), (12, 6)):  # ten images or half
        small = Annotations({"train": records_of(records)}, "here", [], [])
        assert len(with_validation(small, 0.1, 0)[0].splits["val"]) == size
