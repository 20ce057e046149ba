"""What the audit counts, by hand on small folders, and on the real data sets."""

import io
import json

import pytest
from PIL import Image

import audit
from conftest import box, write_detections, write_image, write_karpathy
from dataset import images
from dataset.annotations import Record, read_annotations
from det_formats.det_json import LabelMap


def jpeg():
    buffer = io.BytesIO()
    Image.radial_gradient("L").save(buffer, "JPEG")
    return buffer.getvalue()


def run(capsys, *arguments):
    """(result, printed lines) of the command."""
    result = audit.main([str(argument) for argument in arguments])
    return result, capsys.readouterr().out.splitlines()


# ------------------------------------------------------------------ captions

TRAIN = [
    Record("a.png", ("one", "two", "two")),
    Record("b.png", ("one", "three", "Six", "six ")),
]
TEST = [
    Record("c.png", ("one", "one", "five")),
    Record("d.png", ("five", "six", "two")),
    Record("e.png", ("one", "two", "three")),
    Record("f.png", ("seven", "seven")),
]


def test_caption_figures_by_hand():
    found = audit.caption_figures(TEST, TRAIN)
    assert found == {
        "images": 4,
        "captions": 11,
        "distinct_captions": 6,
        "captions_per_image": {"min": 2, "max": 3},
        "images_by_captions": {"2": 1, "3": 3},
        "images_with_duplicates": 2,  # c, f
        "images_with_one_text": 1,  # f
        "captions_of_another_image": 7,  # one: 2 of c, 1 of e; five: c, d; two: d, e
        "most_tokens": 3,  # a word, start and end
        "longest_caption": "one",
        "captions_too_long": 0,
        "in_train": {"captions_found_in_train": 6, "of": 11, "images_wholly": 1},  # e; not six
        "ceiling": {"R@1": pytest.approx(800 / 11), "R@5": 100.0, "R@10": 100.0},
    }
    assert audit.caption_figures(TRAIN)["captions_of_another_image"] == 2
    assert not {"in_train", "ceiling"} & audit.caption_figures(TRAIN).keys()
    assert audit.caption_figures(TEST, [])["in_train"] is None


def test_the_ceiling_counts_the_rows_of_the_images_that_own_most():
    """ "x" has 15 rows in 12 images, three in one and two in another; "y" has one of its own."""
    rows = {0: 1, 1: 2, 2: 3, **dict.fromkeys(range(3, 12), 1)}
    records = [Record(f"{i}.png", ("x",) * n) for i, n in rows.items()] + [Record("z.png", ("y",))]
    hits = {"R@1": 3 + 1, "R@5": 3 + 2 + 3 * 1 + 1, "R@10": 3 + 2 + 8 * 1 + 1}
    expected = {k: pytest.approx(100 * n / 16) for k, n in hits.items()}
    assert audit.ceiling(audit.owners(records)) == expected


def test_every_row_above_the_context_is_counted():
    long, fits = " ".join(["ship"] * 76), " ".join(["ship"] * 75)  # 78 and 77 with start and end
    found = audit.caption_figures([Record("a", (long, fits)), Record("b", (long,))])
    assert (found["most_tokens"], found["captions_too_long"]) == (78, 2)
    assert found["longest_caption"] == long
    assert found["images_with_one_text"] == 0  # b has one caption, not one text for several


# ------------------------------------------------------------------ images


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda whole: whole, None),
        (lambda whole: whole[:-2], "no end-of-image marker"),
        (lambda whole: whole[:100], "no end-of-image marker"),  # within the header
        (lambda whole: whole[:-2] + bytes(100), "no end-of-image marker"),
        (lambda whole: whole + b"abc", "3 bytes after the end-of-image marker"),
        (lambda whole: b"GIF" + whole[:-2], None),
    ],
)
def test_the_end_of_a_jpeg(change, fault):
    assert images.jpeg_fault(change(jpeg())) == fault


def test_images_that_repeat_by_name_and_by_content(tmp_path):
    values = {"a.png": 1, "b.png": 2, "c.png": 1, "d.png": 1, "x/e.png": 3, "y/e.png": 4}
    for name, value in values.items():
        write_image(tmp_path / "imgs" / name, value=value)
    splits = {
        "train": ["a.png", "b.png", "c.png", "x/e.png"],
        "val": ["b.tif", "y/e.png"],
        "test": ["d.png"],
    }
    texts = {split: {name: [name] for name in names} for split, names in splits.items()}
    write_karpathy(tmp_path, texts)
    found = audit.audit("mine", audit.scan(tmp_path), tmp_path / "det_json", LabelMap([]))
    nothing = {"train": [], "val": [], "test": [], "train/test": [], "val/test": []}
    assert found["images"]["same_name"] == {**nothing, "train/val": [["b.png", "b.tif"]]}
    assert found["images"]["same_content"] == {
        **nothing,
        "train": [["a.png", "c.png"]],
        "train/val": [["b.png", "b.tif"]],
        "train/test": [["a.png", "d.png"]],
    }


# ------------------------------------------------------------------ a whole data set


@pytest.fixture
def faulty(tmp_path):
    """A data set with one fault of every kind."""
    root = tmp_path / "faulty"
    names = ("a.png", "b.png", "x/twice.png", "y/twice.png", "never named.png")
    for value, name in enumerate(names):
        write_image(root / "imgs" / name, value=value)
    (root / "imgs" / "cut.jpg").write_bytes(jpeg()[:500])
    (root / "imgs" / "padded.jpg").write_bytes(jpeg() + bytes(8))
    train = {"a.png": ["one", " "], "b.png": ["one"], "empty.png": [""], "padded.jpg": ["six"]}
    test = {"gone.png": ["two"], "twice.png": ["three"], "cut.jpg": ["one"]}
    write_karpathy(root, {"train": train, "test": test})
    ships = [box(8, 8), box(4, 4), box(2, 2)]
    write_detections(root / "det_json" / "a.json", ships)
    write_detections(root / "det_json" / "b.json", ships[:1], label="whale")
    write_detections(root / "det_json" / "padded.json", [])
    (root / "det_json" / "cut.json").write_text("[{}]", encoding="utf-8")
    return root


def test_every_fault_is_found_and_none_is_an_error(faulty, tmp_path, capsys):
    options = ("--dataset", "mine", "--data-root", faulty, "--max-objects", 2)
    result, lines = run(capsys, *options, "--json", tmp_path / "out" / "audit.json")
    assert json.loads((tmp_path / "out" / "audit.json").read_text(encoding="utf-8")) == result
    assert result["blank_captions"] == [
        "dataset.json: a.png, sentence 1",
        "dataset.json: empty.png, sentence 0",
    ]
    assert result["images_without_captions"] == ["empty.png"]
    assert [result["splits"][split]["images"] for split in ("train", "test")] == [3, 3]
    pictures = result["images"]
    assert pictures["read"] == 3
    assert pictures["missing_images"] == ["gone.png"]
    [ambiguous], [unreadable] = pictures["ambiguous_images"], pictures["unreadable_images"]
    assert "'twice.png' fits imgs/x/twice.png and imgs/y/twice.png" in ambiguous
    assert unreadable.startswith(f"{faulty / 'imgs' / 'cut.jpg'}: not readable")
    assert pictures["corrupt_jpegs"] == [
        "imgs/cut.jpg: no end-of-image marker",
        "imgs/padded.jpg: 8 bytes after the end-of-image marker",
    ]
    found = result["detections"]
    [unusable] = found["unusable_detections"]
    assert unusable.startswith(f"{faulty / 'det_json' / 'cut.json'}: entry 0: label")
    assert found["labels"] == {"ship": 3, "whale": 1}
    assert found["objects_outside_vocabulary"] == {"whale": 1}
    counts = ("images", "with_file", "with_objects", "objects", "objects_dropped")
    assert tuple(found["splits"]["train"][key] for key in counts) == (3, 3, 2, 4, 1)
    assert tuple(found["splits"]["test"][key] for key in counts) == (1, 1, 0, 0, 0)
    assert lines[-1] == (
        "findings: blank captions 2, images without captions 1, captions of another image 2, "
        "captions found in train 1, missing images 1, ambiguous images 1, unreadable images 1, "
        "corrupt jpegs 2, unusable detections 1, objects outside vocabulary 1, objects dropped 1"
    )
    assert "  missing images: 1 (gone.png)" in lines
    assert "    ceiling: R@1 100.00, R@5 100.00, R@10 100.00" in lines


def test_nonsense_is_a_finding_and_names_are_shown_escaped(tmp_path, capsys):
    for name in ("a.png", "b.png"):
        write_image(tmp_path / name)
    gone = "gone\x1b[2J\u202e.png"
    texts = {"a.png": ["one", "two \ud800"], "b.png": ["three"], gone: ["four"]}
    write_karpathy(tmp_path, {"test": texts})
    options = ("--dataset", "mine", "--data-root", tmp_path)
    write_detections(tmp_path / "det_json" / "other.json", [box(9, 9)])
    result, lines = run(capsys, *options)
    [without] = result["detections"]["no_objects"]
    assert without.startswith(f"{tmp_path / 'det_json'}: none of 2 images has a detection file")
    assert result["captions_with_lone_surrogates"] == ["dataset.json: a.png, sentence 1"]
    assert "  missing images: 1 (gone\\x1b[2J\\u202e.png)" in lines
    write_detections(tmp_path / "det_json" / "a.json", [box(0.5, 0.5, 0.2, 0.1)])
    result, lines = run(capsys, *options)
    assert result["detections"]["no_objects"] == []
    [implausible] = result["detections"]["implausible_boxes"]
    assert implausible.startswith("fractions: ") and "a.png, 40 x 40 pixels" in implausible
    assert lines[-1] == (
        "findings: captions with lone surrogates 1, missing images 1, implausible boxes 1"
    )


def test_detections_that_fit_two_images_are_a_finding(faulty, capsys):
    write_detections(faulty / "det_json" / "twice.json", [box(1, 1)])
    result, _ = run(capsys, "--dataset", "mine", "--data-root", faulty)
    [problem] = result["detections"]["unusable_detections"]
    assert "twice.json" in problem
    assert result["detections"]["splits"]["train"]["with_file"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data-root", "{}/none"], "check --data-root"),
        (["--data-root", "{}/blank"], "every caption is blank"),
        (["--dataset", "a", "b", "--data-root", "{}", "{}"], "expected one data set"),
        (["--against", "{}", "{}", "--data-root", "{}"], "--against A B goes with"),
        (["--against", "{}", "{}", "--annotations", "txt", "pir", "pir"], "--against A B goes"),
    ],
)
def test_what_cannot_be_audited_is_an_error(tmp_path, options, message):
    write_karpathy(tmp_path / "blank", {"test": {"a.png": [" "]}})
    with pytest.raises(ValueError, match=message):
        audit.main([option.format(tmp_path) for option in options])


# ------------------------------------------------------------------ two data sets


def test_what_two_data_sets_share(tmp_path, capsys):
    one, two = tmp_path / "one", tmp_path / "two"
    for value, name in enumerate(("one/a.png", "one/b.png", "one/c.png", "two/imgs/a.png")):
        write_image(tmp_path / name, value=value)
    write_image(two / "imgs" / "z.png", value=1)  # as one/b.png
    texts = {"train": {"a.png": ["x", "y"]}, "test": {"b.png": ["p", "q"], "c.png": ["x", "p"]}}
    write_karpathy(one, texts)
    (two / "val_filename.txt").write_text("imgs/a.tif\nz.tif\n", encoding="utf-8")
    (two / "val_caps.txt").write_text("p\nx\nx\nX\n", encoding="utf-8")
    write_karpathy(two, {"test": {"unused.png": ["x"]}})
    options = ("--against", one, two, "--annotations", "auto", "txt")
    result, lines = run(capsys, *options, "--json", tmp_path / "shared.json")
    assert json.loads((tmp_path / "shared.json").read_text(encoding="utf-8")) == result
    assert result["same_stem"] == [["a.png", "imgs/a.tif"]]
    assert result["same_content"] == [["b.png", "z.tif"]]
    assert result["captions_in_common"] == 2  # p, x
    assert [result[name]["images_read"] for name in "AB"] == [3, 2]
    assert result["A"]["in_train_of_other"] == {"train": None, "test": None}  # two has no train
    expected = {"captions_found_in_train": 2, "of": 4, "images_wholly": 0}
    assert result["B"]["in_train_of_other"] == {"val": expected}
    assert lines[-1] == "findings: captions found in train 2, same stem 1, same content 1"


# ------------------------------------------------------------------ real data


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "form", "split", "expected"),
    [
        ("UCM", "auto", "test", (210, 1050, 377, 42, 867, 576, 55, 38.38, 84.76, 100.0)),
        ("RSICD", "auto", "val", (1094, 5470, 2313, 998, 2021, 1756, 203, 74.04, 91.79, 96.73)),
        ("RSITMD", "txt", "test", (452, 2260, 2119, 100, 6, 54, 3, 99.87, 100.0, 100.0)),
    ],
)
def test_caption_figures_of_real_data(real_data, name, form, split, expected):
    splits = read_annotations(real_data / name, form).splits
    found = audit.caption_figures(splits[split], splits["train"])
    keys = ("images", "captions", "distinct_captions", "images_with_duplicates")
    numbers = [found[key] for key in (*keys, "captions_of_another_image")]
    numbers += [found["in_train"][key] for key in ("captions_found_in_train", "images_wholly")]
    assert (*numbers, *(round(value, 2) for value in found["ceiling"].values())) == expected


@pytest.mark.slow
def test_ucm(real_data, capsys):
    result, lines = run(capsys, "--dataset", "ucm", "--data-root", real_data / "UCM")
    pictures, found = result["images"], result["detections"]
    assert pictures["read"] == 2100
    assert {key: pairs for key, pairs in pictures["same_content"].items() if pairs} == {
        "train": [["102.tif", "103.tif"]]
    }
    assert not any(pictures["same_name"].values())
    assert sum(split["objects"] for split in found["splits"].values()) == 1289
    assert sum(split["with_objects"] for split in found["splits"].values()) == 2100 - 1462
    assert len(found["labels"]) == 10 and found["objects_outside_vocabulary"] == {}
    for key in ("missing_images", "ambiguous_images", "unreadable_images", "corrupt_jpegs"):
        assert pictures[key] == []
    assert lines[-1].startswith("findings: images with duplicates 456, ")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["txt", "pir"])
def test_rsitmd_shares_names_with_rsicd(real_data, form):
    scans = []
    for name, own_form in (("RSITMD", form), ("RSICD", "auto")):
        found = read_annotations(real_data / name, own_form)
        scans.append(audit.Scan(found, found.splits, {}, {}, {}, {}, {}))  # no image is read
    assert len(audit.compare(*scans)["same_stem"]) == 267
