"""Data sets by their options: lists that fit, splits, image files and detections in their order."""

import shutil

import numpy as np
import pytest
import torch

import clip
from backbones import preprocess
from conftest import (
    CAPTIONS,
    IMAGE_SIZE,
    box,
    write_detections,
    write_image,
    write_karpathy,
)
from dataloader import RetrievalData, joint_image_set, read_data_sets, sources
from dataset import images
from dataset.batches import require_readable
from det_formats.det_json import read_label_map
from options import default_options

LABEL_MAP = read_label_map()
VAL = {"a.tif": ("a ship",)}


def options_of(**changes):
    return {**default_options("train"), "dataset": ["mini"], **changes}


def data_of(root, **changes):
    options = options_of(data_root=[str(root)], **changes)
    return RetrievalData(options, *sources(options))


def load(root, graph="object", **changes):
    return data_of(root, graph=graph, **changes).image_set("train", IMAGE_SIZE, LABEL_MAP)


# ------------------------------------------------------------------ options


def test_every_data_set_has_its_own_places():
    given = {"data_root": ["A", "B"], "det_json": ["D", "E"], "annotations": ["txt", "pir"]}
    first, second = sources(options_of(dataset=["one", "two"], **given))
    assert (first.name, str(first.root), first.det_json, first.form) == ("one", "A", "D", "txt")
    assert (second.name, str(second.root), second.det_json, second.form) == ("two", "B", "E", "pir")
    [alone] = sources(options_of(data_root=["A"]))
    assert (alone.det_json, alone.form) == (None, "auto")
    [scenes] = sources(options_of(dataset=["scenes"]))
    assert scenes.root.as_posix() == "data/scenes"


@pytest.mark.parametrize("name", ["data_root", "det_json", "annotations"])
def test_lists_that_do_not_fit_are_errors_that_name_the_option(name):
    flag = "--" + name.replace("_", "-")
    for count in (1, 3):
        lists = {"data_root": ["A", "B"], name: ["txt"] * count}
        with pytest.raises(ValueError, match=f"^{flag}: {count} given for --dataset one"):
            sources(options_of(dataset=["one", "two"], **lists))


@pytest.mark.parametrize(
    ("data_sets", "roots", "message"),
    [
        (["one", "two", "one"], ["A", "B", "C"], "--dataset one two one: a name is there twice"),
        (["scenes", "mini"], None, "--dataset mini needs --data-root"),
        (["mini"], ["gone"], "gone: .*--data-root"),
    ],
)
def test_places_that_are_not_certain_are_errors(data_sets, roots, message):
    with pytest.raises(ValueError, match=message):
        read_data_sets(options_of(dataset=data_sets, data_root=roots))


def test_a_folder_of_detections_is_optional_unless_it_is_given(five):
    with pytest.raises(ValueError, match="gone: .*--det-json"):
        data_of(five, det_json=["gone"])
    shutil.rmtree(five / "det_json")
    assert load(five).missing == 5


FOUND_NONE = "none of 5 images has a detection file there; looked for imgs/a.json, imgs/b.json, "


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, FOUND_NONE + "imgs/c.json, ...; the folder is empty; name the folder"),
        (
            {f"{i}.json": "[]" for i in range(9)},
            FOUND_NONE + "imgs/c.json, ...; the folder holds 0.json, 1.json, 2.json, ...; name",
        ),
        (
            {"classes.txt": "ship", "x/a.txt": "0 0.5 0.5 0.1 0.1"},
            FOUND_NONE + "imgs/c.json, ...; the folder holds classes.txt, x/a.txt; a.txt is YOLO",
        ),
        (
            {"a.json": "[]", "b.json": "[]"},
            "2 of 5 images have a detection file there, all of them empty lists; name the folder",
        ),
    ],
    ids=["empty folder", "of others", "YOLO", "empty lists"],
)
def test_detections_that_no_image_has_end_training_and_are_said_elsewhere(
    five, tmp_path, capsys, files, message
):
    folder = tmp_path / "other"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")
    given = {"data_root": [str(five)], "det_json": [str(folder)]}
    with pytest.raises(ValueError) as error:
        read_data_sets(options_of(**given))
    assert str(error.value).startswith(f"{folder}: {message}")
    load(five, det_json=given["det_json"])  # as evaluate.py does
    assert capsys.readouterr().err == f"warning: mini train: {error.value}\n"
    shutil.rmtree(five / "det_json")
    folder.rename(five / "det_json")
    read_data_sets(options_of(data_root=[str(five)]))  # not asked for: no error


def test_a_file_in_the_place_of_a_folder_of_detections_is_named(five):
    path = five / "coco.json"
    path.write_text('{"images": [], "annotations": []}', encoding="utf-8")
    with pytest.raises(ValueError, match="coco.json: this is COCO"):
        data_of(five, det_json=[str(path)])
    with pytest.raises(ValueError, match="dataset.json: a file; --det-json takes the folder"):
        data_of(five, det_json=[str(five / "dataset.json")])


# ------------------------------------------------------------------ one data set


def test_images_are_in_the_order_of_the_records(five, capsys):
    write_karpathy(five, {"train": dict(reversed(CAPTIONS.items())), "val": VAL})
    found = load(five, max_objects=3)
    assert [path.stem for path in found.paths] == ["e", "d", "c", "b", "a"]
    items = [found[i] for i in range(5)]
    assert [int(item["mask"].sum()) for item in items] == [1, 3, 0, 2, 1]
    for item, path in zip(items, found.paths, strict=True):
        expected = clip.preprocess(IMAGE_SIZE)(images.open_image(path))
        torch.testing.assert_close(preprocess.normalize(item["image"]), expected)
    assert found.missing == 1 and found.dropped == 1
    assert f"mini train: 13 captions, {found.counts()}\n" in capsys.readouterr().out


def test_without_a_graph_branch_no_graphs_are_made(five):
    found = load(five, graph="none")
    assert found[1]["nodes"].shape[0] == 0 and found.dropped == 0
    assert found.counts() == "1 of 5 images without a detection file"
    own = load(five)
    for boxes, expected in zip(found.boxes, own.boxes, strict=True):  # evidence reads them
        assert np.array_equal(boxes[1], expected[1])


def test_control_experiments_have_other_graphs(five):
    own = load(five)
    exchanged = load(five, graph="exchanged")
    assert (exchanged.source != np.arange(5)).all() and (own.source == np.arange(5)).all()
    bare = load(five, graph="no-edges")
    assert own[1]["adjacency"].any() and not bare[1]["adjacency"].any()


def test_problems_of_all_splits_are_one_error(five):
    write_image(five / "more" / "c.png")
    (five / "imgs" / "b.png").write_bytes(b"cut short")
    splits = {"train": ("a.tif", "b.tif", "gone.tif"), "val": ("c.tif", "lost.tif")}
    write_karpathy(five, {s: dict.fromkeys(names, ("one",)) for s, names in splits.items()})
    data = data_of(five)
    sets = [data.image_set(split, IMAGE_SIZE, LABEL_MAP) for split in ("train", "val")]
    with pytest.raises(ValueError, match="^4 images are missing or unreadable") as failure:
        require_readable(*sets)
    for name in ("b.png", "'gone.tif'", "imgs/c.png", "more/c.png", "'lost.tif'"):
        assert name in str(failure.value)


def test_report_names_origin_sizes_and_what_was_blank(five, capsys):
    data_of(five).report()
    origin = f"mini: Karpathy-style JSON {five / 'dataset.json'}; images: train"
    assert capsys.readouterr().out.splitlines() == [f"{origin} 5, val 1"]
    names = [f"bare_{i:02d}.tif" for i in range(12)]
    write_karpathy(five, {"train": {**CAPTIONS, **dict.fromkeys(names, (" ",))}, "val": VAL})
    data_of(five).report()
    places = ", ".join(f"dataset.json: {name}, sentence 0" for name in names[:10])
    assert capsys.readouterr().out.splitlines() == [
        f"{origin} 5, val 1",
        f"mini: 12 blank captions dropped: {places}, ...",
        f"mini: 12 images left out for want of captions: {', '.join(names[:10])}, ...",
    ]


def test_cleaning_and_template_hold_for_every_split(five):
    captions = ("A small-boat, (white)!", "...")
    write_karpathy(five, {split: {"b.tif": captions} for split in ("train", "val")})
    plain, cleaned = data_of(five), data_of(five, caption_form=["pir", "seen: {}."])
    for split in ("train", "val"):
        assert plain.records(split)[0].captions == captions
        assert cleaned.records(split)[0].captions == ("seen: a small boat white.",)


# ------------------------------------------------------------------ validation and test splits


def test_an_unknown_split_is_an_error_that_lists_those_there_are(five):
    with pytest.raises(ValueError, match="no split 'test'; there are train, val$"):
        data_of(five).records("test")
    data = data_of(five, dev_images=5)  # as many as there are: other splits are as they were
    assert data.records("val") == data_of(five).records("val")
    with pytest.raises(ValueError, match="no split 'dev'.*--dev-images is not below the number"):
        data.records(data.validation)


def test_dev_images_are_drawn_alike_for_every_seed(five):
    first, *others = (data_of(five, dev_images=2, seed=seed) for seed in range(4))
    drawn = {split: [r.name for r in first.records(split)] for split in ("train", "dev")}
    assert len(drawn["dev"]) == 2 and sorted(drawn["train"] + drawn["dev"]) == sorted(CAPTIONS)
    assert all(data.drawn_split == first.drawn_split == drawn for data in others)
    assert first.validation == "dev" and data_of(five).validation == "val"
    assert [record.name for record in first.records("val")] == ["a.tif"]


def test_a_drawn_validation_split_follows_the_seed(five):
    write_karpathy(five, {"train": CAPTIONS})
    drawn = [[r.name for r in data_of(five, seed=seed).records("val")] for seed in (0, 0, 1, 2)]
    assert drawn[0] == drawn[1] and drawn[0] not in drawn[2:] and len(drawn[0]) == 2


# ------------------------------------------------------------------ several data sets

ONE = {"train": {"a": ("x", "y"), "b": ("x",), "c": ("z",)}, "val": {"i": ("x",)}}
TWO = {"train": {"b": ("x",), "e": ("y",)}, "val": {"h": ("x",)}, "test": {"v": ("z",)}}


@pytest.fixture
def pair(tmp_path):
    """The data sets one and two: noise and, for all images but the first, detections."""
    roots = tmp_path / "one", tmp_path / "two"
    for root, splits, height in zip(roots, (ONE, TWO), (40, 44), strict=True):
        for i, name in enumerate(name for records in splits.values() for name in records):
            write_image(root / "imgs" / f"{name}.png", (36 + i, height))
            if i:
                boxes = [box(4 + 3 * i, 7 + 5 * j) for j in range(i)]
                write_detections(root / "det_json" / f"{name}.json", boxes)
        write_karpathy(root, splits)
    return roots


def joint(pair, **changes):
    """(data sets, joint ImageSet of their training images)"""
    roots = [str(root) for root in pair]
    data_sets = read_data_sets(options_of(dataset=["one", "two"], data_root=roots, **changes))
    return data_sets, joint_image_set(data_sets, "train", IMAGE_SIZE, LABEL_MAP)


def test_joint_images_are_those_of_the_data_sets_one_after_another(pair, capsys):
    data_sets, image_set = joint(pair)
    places = [path.relative_to(pair[i > 2]).as_posix() for i, path in enumerate(image_set.paths)]
    assert places == [f"imgs/{name}.png" for name in "abcbe"]
    assert "one + two train: 6 captions, 2 of 5 images without" in capsys.readouterr().out
    alone = [data.image_set("train", IMAGE_SIZE, LABEL_MAP) for data in data_sets]
    items = [part[i] for part in alone for i in range(len(part))]
    for i, item in enumerate(items):
        for key in ("image", "nodes", "adjacency", "mask"):
            assert torch.equal(image_set[i][key], item[key])
        assert image_set[i]["index"] == i
    assert image_set.hashes == alone[0].hashes + alone[1].hashes


def test_what_seems_wrong_is_said_of_its_data_set_alone(pair, capsys):
    write_detections(pair[1] / "det_json" / "e.json", [box(0.5, 0.5, 0.1, 0.1)])
    write_detections(pair[1] / "det_json" / "b.json", [])
    joint(pair)
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: two train: fractions: cx, cy, w, h of all 1 boxes")
    assert "e.png, 37 x 44 pixels: [0.5, 0.5, 0.1, 0.1, 0, 0.9]" in line


def test_problems_of_joint_images_are_those_of_all_data_sets(pair):
    for root, name in zip(pair, ("a", "e"), strict=True):
        (root / "imgs" / f"{name}.png").unlink()
    first, second = joint(pair)[1].problems
    assert "'a'" in first and "'e'" in second


def test_detections_of_each_data_set_are_its_own(pair, tmp_path):
    (pair[1] / "det_json").rename(tmp_path / "other")
    image_set = joint(pair, det_json=[str(pair[0] / "det_json"), str(tmp_path / "other")])[1]
    assert [len(class_ids) for class_ids, _ in image_set.boxes] == [0, 1, 2, 0, 1]
