"""Annotations, image files, sets, batches, augmentation: nothing is lost, mixed up or guessed."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import clip
import images
from annotations import SPLITS, Annotations, Record, normal_form, read_annotations, with_validation
from augment import (
    AUGMENTATIONS,
    augmented,
    draw_affine,
    draw_colour,
    move_boxes,
    stored_size,
)
from dataloader import (
    ImageSet,
    RetrievalData,
    TrainingSet,
    augmentations,
    collate,
    require_readable,
    trim,
)
from train import parse
from V_Graph import GEOMETRY, arrays_from_boxes, read_labels

VOCABULARY = read_labels()
N_PX = 32
DEFINITION = {"image_size": N_PX, "text": {"context_length": 77}}
SIZES = ((64, 64), (96, 64), (64, 96))  # width, height: 96 or 128 pixels without rounding
CAPTIONS = {  # five images, one to five captions each, some of them shared
    "a.tif": ("a ship", "two ships"),
    "b.tif": ("a plane", "A Plane", "two planes near a road"),
    "c.tif": ("a car",),
    "d.tif": ("a ship", "a boat", "a vessel", "one ship", "a ship on the water"),
    "e.tif": ("snow", "snowy ground"),
}


def write_lists(root, split, names, captions):
    root.mkdir(parents=True, exist_ok=True)
    (root / f"{split}_filename.txt").write_text("".join(f"{n}\n" for n in names), encoding="utf-8")
    (root / f"{split}_caps.txt").write_text("".join(f"{c}\n" for c in captions), encoding="utf-8")


def write_karpathy(root, splits, name="dataset.json"):
    """Write {split: {file name: captions}} as Karpathy-style JSON."""
    root.mkdir(parents=True, exist_ok=True)
    entries = [
        {"filename": image, "split": split, "sentences": [{"raw": text} for text in captions]}
        for split, records in splits.items()
        for image, captions in records.items()
    ]
    (root / name).write_text(json.dumps({"images": entries}), encoding="utf-8")


def write_image(path, size=(40, 40), value=None):
    """An image file of noise, seeded by its name, or of one grey value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(list(path.stem.encode()))
    pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    if value is not None:
        pixels[:] = value
    Image.fromarray(pixels).save(path)
    return path


def box(x, y, w=10.0, h=5.0, angle=0.0, score=0.9):
    return [float(v) for v in (x, y, w, h, angle, score)]


def write_detections(path, boxes, label="ship"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([{"label": label, "bbox": b} for b in boxes]), encoding="utf-8")
    return path


def as_dict(records):
    return {record.name: record.captions for record in records}


def equal_batches(first, second):
    first, second = list(first), list(second)
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


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


# ------------------------------------------------------------------ image files


def make_files(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return images.index_images(root)


def test_image_is_found_by_its_stem_in_any_folder_and_format(tmp_path):
    index = make_files(tmp_path, "imgs/81.jpg", "imgs/82.PNG", "imgs/8.jpg", "imgs/notes.txt")
    assert images.find_image("81.tif", index, tmp_path) == "imgs/81.jpg"
    assert images.find_image("81", index, tmp_path) == "imgs/81.jpg"
    assert images.find_image("82.tif", index, tmp_path) == "imgs/82.PNG"


def test_name_with_folders_is_found_by_its_path(tmp_path):
    index = make_files(tmp_path, "imgs/port/1.jpg", "imgs/airport/1.jpg", "2.jpg")
    assert images.find_image("port/1.tif", index, tmp_path) == "imgs/port/1.jpg"
    assert images.find_image("airport\\1.tif", index, tmp_path) == "imgs/airport/1.jpg"


@pytest.mark.parametrize("name", ["notes.tif", "1.tif", "port/8.tif", "notes.txt"])
def test_a_name_that_no_image_fits_is_an_error_with_both(tmp_path, name):
    index = make_files(tmp_path, "imgs/81.jpg", "imgs/8.jpg", "imgs/notes.txt")
    with pytest.raises(ValueError) as failure:
        images.find_image(name, index, tmp_path)
    assert f"'{name}'" in str(failure.value) and str(tmp_path) in str(failure.value)


def test_bare_name_that_fits_two_files_is_an_error_with_both(tmp_path):
    index = make_files(tmp_path, "a/1.jpg", "b/1.jpg")
    with pytest.raises(ValueError) as failure:
        images.find_image("1.tif", index, tmp_path)
    assert "a/1.jpg" in str(failure.value) and "b/1.jpg" in str(failure.value)


def test_stems_with_dots_are_kept_apart(tmp_path):
    index = make_files(tmp_path, "tile_1.5.jpg", "tile_1.6.jpg")
    assert images.find_image("tile_1.5", index, tmp_path) == "tile_1.5.jpg"
    assert images.find_image("tile_1.6.tif", index, tmp_path) == "tile_1.6.jpg"


# ------------------------------------------------------------------ image sets


@pytest.fixture
def folder(tmp_path):
    """The images of CAPTIONS with captions; all but the third with one to four detections."""
    for i, (name, size) in enumerate(zip(CAPTIONS, [*SIZES, (40, 40), (33, 50)], strict=True)):
        stem = name.removesuffix(".tif")
        write_image(tmp_path / "imgs" / f"{stem}.png", size)
        if i != 2:
            boxes = [box(5 + 6 * j + i, 7 + 5 * j, 6 + i, 4 + j, 0.3 * j) for j in range(1 + i % 4)]
            write_detections(tmp_path / "det_json" / f"{stem}.json", boxes)
    write_karpathy(tmp_path, {"train": CAPTIONS, "val": {"a.tif": ("a ship",)}})
    return tmp_path


def options_of(folder, *arguments):
    return parse(["--dataset", "mini", "--data-root", str(folder), *arguments])


def load(folder, *arguments):
    return RetrievalData(options_of(folder, *arguments)).image_set("train", N_PX, VOCABULARY)


def items_equal(first, second):
    assert len(first) == len(second)
    for i in range(len(first)):
        assert all(torch.equal(first[i][k], second[i][k]) for k in ("image", "nodes", "adjacency"))


def test_items_are_in_the_order_of_the_records(folder):
    found = load(folder)
    assert [path.stem for path in found.paths] == ["a", "b", "c", "d", "e"]
    for i, path in enumerate(found.paths):
        expected = clip.preprocess(N_PX)(images.open_image(path))
        torch.testing.assert_close(clip.normalize(found[i]["image"]), expected)
        assert found[i]["index"] == i
    assert [int(found[i]["mask"].sum()) for i in range(5)] == [1, 2, 0, 4, 1]


def test_nodes_are_those_of_the_detections_and_the_files_size(folder):
    found = load(folder)
    slots = np.array([VOCABULARY.slot("ship")] * 2)
    boxes = np.array([box(6, 7, 7, 4, 0.0), box(12, 12, 7, 5, 0.3)])
    expected = arrays_from_boxes(slots, boxes, SIZES[1], 20, len(VOCABULARY))
    assert torch.equal(found[1]["nodes"], torch.from_numpy(expected.nodes))
    assert torch.equal(found[1]["adjacency"], torch.from_numpy(expected.adjacency))


@pytest.mark.parametrize("cached", [0, 2])
def test_a_small_cache_changes_no_item(folder, cached):
    gigabytes = (cached + 0.5) * 3 * N_PX**2 / 2**30
    small = load(folder, "--cache-gb", str(gigabytes))
    assert small.cached == cached
    items_equal(small, load(folder))


def test_workers_change_no_batch(folder):
    found = load(folder, "--cache-gb", str(2.5 * 3 * N_PX**2 / 2**30))
    equal_batches(found.batches(2, workers=2), found.batches(2))


def test_missing_detections_are_an_empty_graph_and_counted(folder, capsys):
    found = load(folder)
    assert found.missing == 1
    assert not found[2]["mask"].any() and not found[2]["nodes"].any()
    assert "1 of 5 images without a detection file" in found.counts()
    assert f"mini train: 13 captions, {found.counts()}\n" in capsys.readouterr().out


def test_objects_beyond_the_maximum_are_counted(folder, capsys):
    found = load(folder, "--max-objects", "3")
    assert found.dropped == 1 and found[3]["nodes"].shape == (3, len(VOCABULARY) + GEOMETRY)
    assert "1 objects beyond 3 dropped" in found.counts()
    assert found.counts() in capsys.readouterr().out


def test_exchanged_graphs_are_all_used_once_and_none_by_its_own_image(tmp_path):
    paths = [write_image(tmp_path / f"{i}.png") for i in range(9)]
    files = [write_detections(tmp_path / f"{i}.json", [box(3 + 4 * i, 20)]) for i in range(9)]
    own = ImageSet(paths, files, N_PX, VOCABULARY, 20)
    for seed in range(5):
        exchanged = ImageSet(paths, files, N_PX, VOCABULARY, 20, exchange=seed)
        source = [
            next(j for j in range(9) if torch.equal(exchanged[i]["nodes"], own[j]["nodes"]))
            for i in range(9)
        ]
        assert sorted(source) == list(range(9))
        assert all(i != j for i, j in enumerate(source))
        assert all(torch.equal(exchanged[i]["image"], own[i]["image"]) for i in range(9))


def test_exchange_follows_the_options(folder):
    own, exchanged = load(folder), load(folder, "--graph-control", "exchanged")
    assert (exchanged.source != np.arange(5)).all() and (own.source == np.arange(5)).all()


def test_an_exchanged_graph_keeps_the_size_of_its_own_image(folder):
    found, own = load(folder, "--graph-control", "exchanged"), load(folder)
    for i, source in enumerate(found.source):
        assert torch.equal(found[i]["nodes"], own[source]["nodes"])


def test_no_edges_leave_the_nodes(folder):
    own, bare = load(folder), load(folder, "--graph-control", "no-edges")
    for i in range(5):
        assert torch.equal(own[i]["nodes"], bare[i]["nodes"]) and not bare[i]["adjacency"].any()
    assert own[1]["adjacency"].any()


def test_a_set_without_edges_has_its_nodes(tmp_path):
    path = write_image(tmp_path / "a.png")
    file = write_detections(tmp_path / "a.json", [box(9, 20), box(12, 20)])
    own = ImageSet([path], [file], N_PX, VOCABULARY, 20)[0]
    bare = ImageSet([path], [file], N_PX, VOCABULARY, 20, edges=False)[0]
    assert own["adjacency"].any() and not bare["adjacency"].any()
    assert torch.equal(own["nodes"], bare["nodes"]) and torch.equal(own["mask"], bare["mask"])


# ------------------------------------------------------------------ errors of a data set


def refusal(*image_sets):
    """The one error over all these sets."""
    with pytest.raises(ValueError) as failure:
        require_readable(*image_sets)
    return str(failure.value)


def test_unreadable_images_are_one_error_with_the_first_ten(tmp_path):
    paths = [write_image(tmp_path / f"good_{i}.png") for i in range(3)]
    whole = paths[0].read_bytes()
    for i in range(12):
        path = tmp_path / f"bad_{i:02d}.png"
        if i % 2:  # cut short; the others are not there
            path.write_bytes(whole[:500])
        paths.insert(2 * i, path)
    message = refusal(ImageSet(paths, [None] * len(paths), N_PX, VOCABULARY, 20))
    assert message.startswith("12 images are missing or unreadable")
    assert [f"bad_{i:02d}.png" in message for i in range(12)] == [True] * 10 + [False] * 2
    assert "good" not in message


def test_images_that_no_file_fits_are_one_error_with_the_first_ten(folder):
    gone = {f"gone_{i:02d}.tif": ("one",) for i in range(12)}
    write_karpathy(folder, {"train": {**CAPTIONS, **gone}, "val": {"a.tif": ("a ship",)}})
    message = refusal(load(folder))
    assert message.startswith("12 images are missing or unreadable")
    assert [f"gone_{i:02d}" in message for i in range(12)] == [True] * 10 + [False] * 2


def test_problems_of_all_splits_are_one_error(folder):
    write_image(folder / "imgs" / "f.png")
    write_image(folder / "more" / "f.png")
    (folder / "imgs" / "b.png").write_bytes(b"cut short")
    (folder / "imgs" / "e.png").write_bytes(b"")
    train = {"gone.tif": ("one",), "a.tif": ("two",), "b.tif": ("three",)}
    val = {"e.tif": ("four",), "f.tif": ("five",), "lost.tif": ("six",), "c.tif": ("seven",)}
    write_karpathy(folder, {"train": train, "val": val})
    data = RetrievalData(options_of(folder))
    sets = [data.image_set(split, N_PX, VOCABULARY) for split in ("train", "val")]
    assert [len(image_set.problems) for image_set in sets] == [2, 3]
    message = refusal(*sets)
    assert message.startswith("5 images are missing or unreadable")
    for name in ("'gone.tif'", "b.png", "e.png", "imgs/f.png", "more/f.png", "'lost.tif'"):
        assert name in message
    for name in ("a.png", "c.png"):
        assert name not in message


def test_readable_sets_are_no_error(folder):
    assert load(folder).problems == [] and require_readable(load(folder), load(folder)) is None


def test_folders_that_do_not_exist_are_errors_that_name_the_option(folder, tmp_path):
    gone = str(tmp_path / "gone")
    with pytest.raises(ValueError, match="gone.*--data-root"):
        RetrievalData(options_of(gone))
    with pytest.raises(ValueError, match="gone.*--det-json"):
        RetrievalData(options_of(folder, "--det-json", gone))
    with pytest.raises(ValueError, match="--dataset mini needs --data-root"):
        RetrievalData(parse(["--dataset", "mini"]))


def test_another_data_set_called_scenes_is_an_error_and_stays_as_it_is(folder):
    def tree():
        return {p: p.is_file() and p.read_bytes() for p in folder.rglob("*")}

    before = tree()
    with pytest.raises(ValueError, match="--dataset") as failure:
        RetrievalData(options_of(folder, "--dataset", "scenes"))
    assert str(folder) in str(failure.value)
    assert tree() == before


def test_unknown_split_is_an_error_that_lists_those_there_are(folder):
    with pytest.raises(ValueError, match="no split 'test'; there are train, val"):
        RetrievalData(options_of(folder)).records("test")


def reported(folder, capsys):
    RetrievalData(options_of(folder)).report()
    return capsys.readouterr().out.splitlines()


def test_report_names_origin_sizes_and_what_was_blank(folder, capsys):
    splits = {"train": CAPTIONS, "val": {"a.tif": ("a ship",)}}
    write_karpathy(folder, splits)
    origin = f"mini: Karpathy-style JSON {folder / 'dataset.json'}; images: train"
    assert reported(folder, capsys) == [f"{origin} 5, val 1"]
    write_karpathy(folder, {**splits, "train": {**CAPTIONS, "c.tif": (" ",), "e.tif": ()}})
    assert reported(folder, capsys) == [
        f"{origin} 3, val 1",
        "mini: 2 blank captions dropped: dataset.json: c.tif, sentence 0, "
        "dataset.json: e.tif, no sentence",
        "mini: 2 images left out for want of captions: c.tif, e.tif",
    ]


@pytest.mark.parametrize("count", [10, 12])
def test_report_lists_ten_places_and_says_if_there_are_more(folder, capsys, count):
    bare = {f"bare_{i:02d}.tif": (" ",) for i in range(count)}
    write_karpathy(folder, {"train": {**CAPTIONS, **bare}, "val": {"a.tif": ("a ship",)}})
    _, *lines = reported(folder, capsys)
    for line, what in zip(lines, ("blank captions", "images left out"), strict=True):
        assert line.startswith(f"mini: {count} {what}")
        named = [f"bare_{i:02d}.tif" in line for i in range(count)]
        assert named == [True] * 10 + [False] * (count - 10)
        assert line.endswith(", ...") == (count > 10)


# ------------------------------------------------------------------ training items


def training_set(folder, augment=(), drop_graphs=0.0, seed=0):
    data = RetrievalData(options_of(folder))
    image_set = data.image_set("train", N_PX, VOCABULARY)
    return TrainingSet(image_set, data.records("train"), DEFINITION, augment, drop_graphs, seed)


def test_drawn_captions_belong_to_their_image_and_all_occur(folder):
    data = training_set(folder)
    for i, own in enumerate(CAPTIONS.values()):
        found = {tuple(data[epoch, i]["text"].tolist()) for epoch in range(60)}
        assert found == set(map(tuple, clip.tokenize(own).tolist()))


def test_equal_texts_have_equal_ids_whatever_their_case(folder):
    item = training_set(folder)
    assert item[0, 1]["caption_ids"].tolist() == [2, 2, 3]
    assert item[0, 0]["caption_ids"][0] == item[0, 3]["caption_ids"][0]
    for epoch in range(20):
        for i in range(5):
            assert item[epoch, i]["text_id"] in item[epoch, i]["caption_ids"]


def test_draws_depend_on_seed_epoch_and_image_alone(folder):
    first, again = (training_set(folder, AUGMENTATIONS, 0.3, seed=4) for _ in range(2))
    other = training_set(folder, AUGMENTATIONS, 0.3, seed=5)
    keys = [(epoch, i) for epoch in range(8) for i in range(5)]
    order = {key: first[key] for key in reversed(keys)}
    for key in keys:
        assert all(
            torch.equal(order[key][k], again[key][k]) for k in ("affine", "colour", "text", "nodes")
        )
    affines = {tuple(order[key]["affine"].flatten().tolist()) for key in keys}
    assert len(affines) == len(keys)
    assert not any(torch.equal(order[key]["affine"], other[key]["affine"]) for key in keys)


def test_order_of_images_is_seeded_and_differs_over_epochs(folder):
    def order(seed, epoch):
        batches = training_set(folder, seed=seed).batches(epoch, 5)
        return [i for batch in batches for i in batch["index"].tolist()]

    assert order(0, 1) == order(0, 1)
    assert sorted(order(0, 1)) == [0, 1, 2, 3, 4]
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (1, 2, 3)}) > 3


def test_workers_change_no_training_batch(folder):
    data = training_set(folder, AUGMENTATIONS, 0.5)
    equal_batches(data.batches(3, 2, workers=2), data.batches(3, 2))


def test_only_a_last_smaller_batch_beside_others_is_dropped(folder):
    data = training_set(folder)
    sizes = {size: [len(b["index"]) for b in data.batches(0, size)] for size in (2, 5, 8)}
    assert sizes == {2: [2, 2], 5: [5], 8: [5]}


def test_graphs_are_dropped_at_their_rate(folder):
    data = training_set(folder, drop_graphs=0.25)
    kept = [data[epoch, 3]["mask"].any() for epoch in range(400)]
    assert np.mean(kept) == pytest.approx(0.75, abs=0.07)
    assert all(training_set(folder)[epoch, 3]["mask"].sum() == 4 for epoch in range(20))


def test_collate_pads_caption_ids_and_cuts_texts(folder):
    data = training_set(folder)
    items = [data[0, i] for i in range(5)]
    batch = collate(items)
    assert batch["caption_ids"].shape == (5, 5)
    assert batch["caption_ids"][2].tolist() == [*items[2]["caption_ids"].tolist(), *[-1] * 4]
    longest = max(int(item["text"].count_nonzero()) for item in items)
    assert batch["text"].shape == (5, longest)
    for row, item in zip(batch["text"], items, strict=True):
        assert torch.equal(row, item["text"][:longest]) and not item["text"][longest:].any()
    assert batch["index"].tolist() == [0, 1, 2, 3, 4]


def test_items_have_the_maps_and_colours_that_are_asked_for(folder):
    for augment, keys in (
        ((), set()),
        (("flip",), {"affine"}),
        (("crop", "turn"), {"affine"}),
        (("colour",), {"colour"}),
        (AUGMENTATIONS, {"affine", "colour"}),
    ):
        batch = collate([training_set(folder, augment)[0, i] for i in range(5)])
        assert keys == {"affine", "colour"} & batch.keys()
        assert all(batch[key].shape == (5, 2, 3) for key in keys)
        assert all(batch[key].dtype == torch.float32 for key in keys)


def test_trim_keeps_the_last_end_token():
    tokens = clip.tokenize(["a", "a rather longer sentence than the other"])
    cut = trim(tokens)
    assert cut.shape[1] == int(tokens[1].count_nonzero())
    assert (cut.max(dim=1).values == tokens.max()).all()
    full = clip.tokenize("word " * 100)
    assert torch.equal(trim(full), full)


def test_scenes_are_not_augmented_by_default():
    assert augmentations({"augment": None, "dataset": "scenes"}) == []
    assert augmentations({"augment": None, "dataset": "ucm"}) == list(AUGMENTATIONS)
    assert augmentations({"augment": ["flip"], "dataset": "scenes"}) == ["flip"]


# ------------------------------------------------------------------ augmentation


def rendered(boxes, size, scale=4):
    """The boxes filled with white on black, (height, width) in [0, 1], smooth at their rims."""
    picture = Image.new("L", (size[0] * scale, size[1] * scale))
    pen = ImageDraw.Draw(picture)
    for cx, cy, w, h, angle, _ in boxes:
        along = np.array([math.cos(angle), math.sin(angle)]) * w / 2
        across = np.array([-math.sin(angle), math.cos(angle)]) * h / 2
        corners = [
            (cx, cy) + a * along + b * across for a, b in ((1, 1), (1, -1), (-1, -1), (-1, 1))
        ]
        pen.polygon([tuple(scale * corner) for corner in corners], fill=255)
    return picture.reduce(scale)


def as_seen(picture, n_px):
    """What the model sees of a PIL image, as (1, 3, n_px, n_px) uint8."""
    pixels = np.array(clip.resize_and_crop(n_px)(picture.convert("RGB")))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def brightness(normalised):
    """Normalised pixels (1, 3, H, W) back to brightness (H, W) in [0, 1]."""
    mean, std = clip.MEAN[0], clip.STD[0]
    return (normalised[0, 0].numpy() * std + mean).clip(0, 1)


def moved_pixels(picture, affine, n_px):
    pixels = as_seen(picture, stored_size(n_px, ("crop",)))
    maps = torch.from_numpy(affine).float()[None]
    return brightness(augmented(clip.normalize(pixels), n_px, maps))


def overlap(a, b):
    """Intersection over union of two grey pictures."""
    return np.minimum(a, b).sum() / np.maximum(a, b).sum()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("augment", [("flip",), ("turn",), ("crop",), AUGMENTATIONS])
def test_boxes_move_with_the_pixels(size, augment):
    centre = size[0] / 2 + 9, size[1] / 2 - 6  # well inside, and unlike any mirror image
    boxes, slots = np.array([box(*centre, 17, 6, 0.5)]), np.array([3])
    picture, checked = rendered(boxes, size), 0
    for seed in range(40):
        affine = draw_affine(np.random.default_rng(seed), augment)
        kept, moved, moved_size = move_boxes(slots, boxes, size, affine)
        expected = brightness(clip.normalize(as_seen(rendered(moved, moved_size), 96)))
        if len(kept) == 0 or max(expected[[0, -1]].max(), expected[:, [0, -1]].max()) > 0:
            continue  # cut off at the rim
        assert overlap(moved_pixels(picture, affine, 96), expected) > 0.8
        assert kept.tolist() == [3] and moved[0, 5] == boxes[0, 5]
        checked += 1
    assert checked >= 20


@pytest.mark.parametrize("size", SIZES)
def test_brightest_pixel_is_where_the_moved_centre_says(size):
    centre = size[0] / 2 - 10, size[1] / 2 + 4
    boxes, slots = np.array([box(*centre, 3, 3)]), np.array([0])
    picture, n_px, checked = rendered(boxes, size), 96, 0
    for seed in range(60):
        affine = draw_affine(np.random.default_rng(seed), AUGMENTATIONS)
        _, moved, (width, height) = move_boxes(slots, boxes, size, affine)
        middle, half = np.array([width, height]) / 2, min(width, height) / 2
        at = ((moved[0, :2] - middle) / half + 1) * n_px / 2 - 0.5
        if at.min() < 6 or at.max() > n_px - 7:
            continue
        seen = moved_pixels(picture, affine, n_px)
        rows, columns = np.mgrid[:n_px, :n_px]
        found = (seen * columns).sum() / seen.sum(), (seen * rows).sum() / seen.sum()
        assert found == pytest.approx(tuple(at), abs=0.4)
        checked += 1
    assert checked > 30


def test_flip_turn_and_crop_draw_what_they_say():
    def drawn_maps(augment):
        return [draw_affine(np.random.default_rng(seed), augment) for seed in range(400)]

    identity = np.eye(2, 3)
    assert all((m == identity).all() for m in drawn_maps(()))
    flips = np.array([m[0, 0] for m in drawn_maps(("flip",))])
    assert set(flips) == {1, -1} and abs(flips.mean()) < 0.15
    turns = {tuple(m[:, :2].flatten().round().astype(int)) for m in drawn_maps(("turn",))}
    assert turns == {(1, 0, 0, 1), (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0)}
    crops = np.stack(drawn_maps(("crop",)))
    zooms, shifts = crops[:, 0, 0], crops[:, :, 2]
    assert zooms.min() < 0.62 and zooms.max() > 0.98 and (zooms >= 0.6).all()
    # The visible part lies within the image, and reaches its rims.
    assert (abs(shifts) <= 1 - zooms[:, None]).all()
    assert (abs(shifts) / (1 - zooms[:, None])).max() > 0.95
    both = {tuple(m[:, :2].flatten().round().astype(int)) for m in drawn_maps(("turn", "flip"))}
    assert len(both) == 8


def test_boxes_outside_are_left_out():
    boxes = np.array([box(20, 20), box(50, 50), box(60, 5)])
    zoomed = np.array([[0.75, 0, -0.25], [0, 0.75, -0.25]])  # shows 0 ... 48 of 64
    slots, moved, size = move_boxes(np.array([1, 2, 3]), boxes, (64, 64), zoomed)
    assert slots.tolist() == [1] and size == (64, 64)
    assert moved[0] == pytest.approx(box(20 / 0.75, 20 / 0.75, 10 / 0.75, 5 / 0.75))


def test_boxes_beside_the_crop_of_a_wide_image_stay():
    boxes = np.array([box(5, 24)])  # the model sees columns 16 ... 64 of 80
    slots, moved, size = move_boxes(np.array([1]), boxes, (80, 48), np.eye(2, 3))
    assert slots.tolist() == [1] and size == (80, 48) and moved[0] == pytest.approx(boxes[0])


def test_quarter_turns_exchange_width_and_height():
    boxes = np.array([box(70, 10, angle=0.25)])
    turn = np.array([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0]])
    _, moved, size = move_boxes(np.array([1]), boxes, (80, 48), turn)
    assert size == (48, 80)
    # Output (x, y) shows input (-y, x): the box at (30, -14) from the middle comes to (-14, -30).
    assert moved[0] == pytest.approx(box(24 - 14, 40 - 30, angle=0.25 - math.pi / 2))
    _, back, size = move_boxes(np.array([1]), moved, size, -turn)
    assert size == (80, 48) and back[0] == pytest.approx(boxes[0])


def test_no_boxes_stay_no_boxes():
    slots, boxes, _ = move_boxes(np.zeros(0, int), np.zeros((0, 6)), (64, 64), np.eye(2, 3))
    assert len(slots) == 0 and boxes.shape == (0, 6)


def noise(device, size=N_PX):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (3, 3, size, size), generator=generator, dtype=torch.uint8)
    return clip.normalize(pixels.to(device))


def test_identity_leaves_pixels(device):
    pixels = noise(device)
    assert torch.equal(augmented(pixels, N_PX), pixels)
    found = augmented(pixels, N_PX, torch.eye(2, 3, device=device).expand(3, 2, 3))
    torch.testing.assert_close(found, pixels, rtol=0, atol=1e-5)


def test_each_image_has_its_own_map(device):
    pixels = noise(device)
    mirror = torch.tensor([[-1.0, 0, 0], [0, 1, 0]])
    maps = torch.stack([torch.eye(2, 3), mirror, torch.eye(2, 3)]).to(device)
    expected = pixels.clone()
    expected[1] = expected[1].flip(-1)
    torch.testing.assert_close(augmented(pixels, N_PX, maps), expected, rtol=0, atol=1e-5)


def test_cropped_images_come_from_larger_ones(device):
    stored = stored_size(96, ("crop", "flip"))
    assert stored == 128 and stored_size(96, ("flip", "turn", "colour")) == 96
    maps = torch.eye(2, 3, device=device).expand(3, 2, 3) * 0.75
    found = augmented(noise(device, stored), 96, maps)
    # Three quarters of 128 are 96: at this zoom every pixel is one of the stored.
    expected = noise(device, stored)[..., 16:112, 16:112]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_colours_scale_and_shift_the_channels_of_each_image(device):
    pixels = noise(device)
    colour = np.stack([draw_colour(np.random.default_rng(seed)) for seed in range(3)])
    found = augmented(pixels, N_PX, colour=torch.from_numpy(colour).float().to(device))
    for i in range(3):
        for channel in range(3):
            gain, offset = colour[i, :, channel]
            expected = gain * pixels[i, channel] + offset
            torch.testing.assert_close(found[i, channel], expected, rtol=0, atol=1e-5)
    many = np.stack([draw_colour(np.random.default_rng(seed)) for seed in range(500)])
    gains, offsets = many[:, 0], many[:, 1]
    assert 0.72 <= gains.min() < 0.8 and 1.25 < gains.max() <= 1.375
    assert -0.3 <= offsets.min() < -0.29 and 0.29 < offsets.max() <= 0.3
    assert np.mean(gains.std(axis=1)) < 0.5 * np.std(gains.mean(axis=1))  # mostly light, not tint


def test_training_items_hold_the_moved_boxes(tmp_path):
    centre, size = (36, 30), stored_size(64, AUGMENTATIONS)
    rendered([box(*centre, 4, 4)], (64, 64)).convert("RGB").save(tmp_path / "a.png")
    file = write_detections(tmp_path / "a.json", [box(*centre, 4, 4)])
    image_set = ImageSet([tmp_path / "a.png"], [file], size, VOCABULARY, 20)
    definition = {**DEFINITION, "image_size": 64}
    records = [Record("a", ("a ship",))]
    data = TrainingSet(image_set, records, definition, AUGMENTATIONS, 0.0, 0)
    rows, columns = np.mgrid[:64, :64] + 0.5
    for epoch in range(20):
        item = data[epoch, 0]
        pixels = clip.normalize(item["image"])[None]
        seen = brightness(augmented(pixels, data.n_px, item["affine"][None]))
        found = (seen * columns).sum() / seen.sum(), (seen * rows).sum() / seen.sum()
        nodes = item["nodes"][0, len(VOCABULARY) :][:2].numpy()
        assert item["mask"].sum() == 1
        assert found == pytest.approx(32 * (nodes + 1), abs=0.4)
