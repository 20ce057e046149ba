"""Data sets by their options: lists that fit, splits that stay apart, no test image in training."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import clip
import dataloader as retrieval_data
from backbones import preprocess
from conftest import (
    CAPTIONS,
    IMAGE_SIZE,
    MODEL_CONFIG,
    box,
    equal_batches,
    write_detections,
    write_image,
    write_karpathy,
)
from dataloader import RetrievalData, augmentations, joint_image_set, read_data_sets, sources
from dataset import images
from dataset.augment import AUGMENTATIONS
from dataset.batches import TrainingSet, require_readable
from dataset.overlap import without_test
from det_formats.det_json import read_label_map
from train import parse

LABEL_MAP = read_label_map()


def options_of(root, *arguments):
    return parse(["--dataset", "mini", "--data-root", str(root), *arguments])[0]


def data_of(root, *arguments):
    options = options_of(root, *arguments)
    return RetrievalData(options, *sources(options))


def load(root, *arguments):
    return data_of(root, *arguments).image_set("train", IMAGE_SIZE, LABEL_MAP)


# ------------------------------------------------------------------ options


def options(dataset, **lists):
    return {"dataset": dataset, "data_root": None, "det_json": None, "annotations": None, **lists}


def test_every_data_set_has_its_own_places():
    given = {"data_root": ["A", "B"], "det_json": ["D", "E"], "annotations": ["txt", "pir"]}
    first, second = sources(options(["one", "two"], **given))
    assert (first.name, str(first.root), first.det_json, first.form) == ("one", "A", "D", "txt")
    assert (second.name, str(second.root), second.det_json, second.form) == ("two", "B", "E", "pir")
    [alone] = sources(options(["one"], data_root=["A"]))
    assert (alone.det_json, alone.form) == (None, "auto")
    assert str(sources(options(["scenes"]))[0].root) == str(retrieval_data.Path("data/scenes"))


@pytest.mark.parametrize("option", ["data_root", "det_json", "annotations"])
@pytest.mark.parametrize("names", [["one"], ["one", "two"], ["one", "two", "three"]], ids=len)
def test_lists_that_do_not_fit_are_errors_that_name_the_option(option, names):
    for count in {1, 2, 3, 4} - {len(names)}:
        lists = {"data_root": len(names) * ["A"], option: count * ["txt"]}
        with pytest.raises(ValueError) as failure:
            sources(options(names, **lists))
        message, flag = str(failure.value), "--" + option.replace("_", "-")
        assert message.startswith(f"{flag}: {count} given for --dataset {' '.join(names)}")


def test_a_name_given_twice_is_an_error():
    with pytest.raises(ValueError, match="--dataset one two one: a name is there twice"):
        sources(options(["one", "two", "one"], data_root=["A", "B", "C"]))


@pytest.mark.parametrize("names", [["mini"], ["scenes", "mini"]])
def test_only_scenes_has_a_place_of_its_own(names):
    with pytest.raises(ValueError, match="--dataset mini needs --data-root"):
        sources(options(names))


def test_folders_that_do_not_exist_are_errors_that_name_the_option(five, tmp_path):
    gone = str(tmp_path / "gone")
    with pytest.raises(ValueError, match="gone.*--data-root"):
        data_of(gone)
    with pytest.raises(ValueError, match="gone.*--det-json"):
        data_of(five, "--det-json", gone)


def test_another_data_set_called_scenes_is_an_error_and_stays_as_it_is(five):
    def tree():
        return {p: p.is_file() and p.read_bytes() for p in five.rglob("*")}

    before = tree()
    with pytest.raises(ValueError, match="--dataset") as failure:
        data_of(five, "--dataset", "scenes")
    assert str(five) in str(failure.value)
    assert tree() == before


@pytest.mark.parametrize(
    ("train", "dataset", "given", "expected"),
    [
        ("all", ["scenes"], None, []),
        ("all", ["ucm", "scenes"], None, []),
        ("all", ["ucm"], None, list(AUGMENTATIONS)),
        ("lora", ["ucm"], None, list(AUGMENTATIONS)),
        ("all", ["scenes"], ["flip"], ["flip"]),
        ("graph", ["ucm"], None, []),
    ],
)
def test_scenes_and_images_of_frozen_towers_are_not_augmented_by_default(
    train, dataset, given, expected
):
    assert augmentations({"train": train, "dataset": dataset, "augment": given}) == expected


# ------------------------------------------------------------------ one data set


def test_images_are_in_the_order_of_the_records(five):
    write_karpathy(five, {"train": dict(reversed(CAPTIONS.items())), "val": {"a": ("a ship",)}})
    found = load(five)
    assert [path.stem for path in found.paths] == ["e", "d", "c", "b", "a"]
    assert [int(item["mask"].sum()) for item in map(found.__getitem__, range(5))] == [1, 4, 0, 2, 1]
    for item, path in zip(map(found.__getitem__, range(5)), found.paths, strict=True):
        expected = clip.preprocess(IMAGE_SIZE)(images.open_image(path))
        torch.testing.assert_close(preprocess.normalize(item["image"]), expected)


def test_captions_and_what_is_missing_are_printed(five, capsys):
    found = load(five, "--max-objects", "3")
    assert found.missing == 1 and found.dropped == 1
    assert f"mini train: 13 captions, {found.counts()}\n" in capsys.readouterr().out


def test_graph_control_follows_the_options(five):
    own, exchanged = load(five), load(five, "--graph-control", "exchanged")
    assert (exchanged.source != np.arange(5)).all() and (own.source == np.arange(5)).all()
    bare = load(five, "--graph-control", "no-edges")
    assert own[1]["adjacency"].any() and not bare[1]["adjacency"].any()


def test_the_cache_follows_the_options(five, tmp_path):
    load(five, "--cache-dir", str(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()
    load(five, "--cache-dir", str(tmp_path / "cache"), "--cache-gb", "0")
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.parametrize("link", ["root", "folder", "files"])
def test_data_behind_symbolic_links_are_the_same(five, tmp_path, link):
    linked = tmp_path / "linked"
    if link == "root":
        linked.symlink_to(five)
    else:
        linked.mkdir()
        shutil.copy(five / "dataset.json", linked)
        for name in ("imgs", "det_json"):
            if link == "folder":
                (linked / name).symlink_to(five / name)
                continue
            (linked / name).mkdir()
            for path in (five / name).iterdir():
                (linked / name / path.name).symlink_to(path)
    own, found = load(five), load(linked)
    assert found.hashes == own.hashes and found.problems == [] and found.missing == own.missing
    equal_batches(found.batches(2), own.batches(2))


def refusal(*image_sets):
    """The one error over all these sets."""
    with pytest.raises(ValueError) as failure:
        require_readable(*image_sets)
    return str(failure.value)


def test_images_that_no_file_fits_are_one_error_with_the_first_ten(five):
    gone = {f"gone_{i:02d}.tif": ("one",) for i in range(12)}
    write_karpathy(five, {"train": {**CAPTIONS, **gone}, "val": {"a.tif": ("a ship",)}})
    message = refusal(load(five))
    assert message.startswith("12 images are missing or unreadable")
    assert [f"gone_{i:02d}" in message for i in range(12)] == [True] * 10 + [False] * 2


def test_problems_of_all_splits_are_one_error(five):
    write_image(five / "imgs" / "f.png")
    write_image(five / "more" / "f.png")
    (five / "imgs" / "b.png").write_bytes(b"cut short")
    (five / "imgs" / "e.png").write_bytes(b"")
    train = {"gone.tif": ("one",), "a.tif": ("two",), "b.tif": ("three",)}
    val = {"e.tif": ("four",), "f.tif": ("five",), "lost.tif": ("six",), "c.tif": ("seven",)}
    write_karpathy(five, {"train": train, "val": val})
    data = data_of(five)
    sets = [data.image_set(split, IMAGE_SIZE, LABEL_MAP) for split in ("train", "val")]
    assert [len(image_set.problems) for image_set in sets] == [2, 3]
    message = refusal(*sets)
    assert message.startswith("5 images are missing or unreadable")
    for name in ("'gone.tif'", "b.png", "e.png", "imgs/f.png", "more/f.png", "'lost.tif'"):
        assert name in message
    for name in ("a.png", "c.png"):
        assert name not in message


def test_unknown_split_is_an_error_that_lists_those_there_are(five):
    with pytest.raises(ValueError, match="no split 'test'; there are train, val"):
        data_of(five).records("test")


def reported(root, capsys):
    data_of(root).report()
    return capsys.readouterr().out.splitlines()


def test_report_names_origin_sizes_and_what_was_blank(five, capsys):
    splits = {"train": CAPTIONS, "val": {"a.tif": ("a ship",)}}
    write_karpathy(five, splits)
    origin = f"mini: Karpathy-style JSON {five / 'dataset.json'}; images: train"
    assert reported(five, capsys) == [f"{origin} 5, val 1"]
    write_karpathy(five, {**splits, "train": {**CAPTIONS, "c.tif": (" ",), "e.tif": ()}})
    assert reported(five, capsys) == [
        f"{origin} 3, val 1",
        "mini: 2 blank captions dropped: dataset.json: c.tif, sentence 0, "
        "dataset.json: e.tif, no sentence",
        "mini: 2 images left out for want of captions: c.tif, e.tif",
    ]


@pytest.mark.parametrize("count", [10, 12])
def test_report_lists_ten_places_and_says_if_there_are_more(five, capsys, count):
    bare = {f"bare_{i:02d}.tif": (" ",) for i in range(count)}
    write_karpathy(five, {"train": {**CAPTIONS, **bare}, "val": {"a.tif": ("a ship",)}})
    _, *lines = reported(five, capsys)
    for line, what in zip(lines, ("blank captions", "images left out"), strict=True):
        assert line.startswith(f"mini: {count} {what}")
        named = [f"bare_{i:02d}.tif" in line for i in range(count)]
        assert named == [True] * 10 + [False] * (count - 10)
        assert line.endswith(", ...") == (count > 10)


@pytest.mark.parametrize("split", ["train", "val"])
def test_cleaning_and_template_hold_for_every_split(five, split):
    splits = {split: {"b.tif": ("A small-boat, (white)!", "...")} for split in ("train", "val")}
    write_karpathy(five, splits)
    assert data_of(five).records(split)[0].captions == splits[split]["b.tif"]
    how = ("--clean", "pir", "--template", "seen: {}.")
    assert data_of(five, *how).records(split)[0].captions == ("seen: a small boat white.",)


def test_more_dev_images_than_training_images_stop_training_alone(five):
    size = len(data_of(five).records("train"))
    data = data_of(five, "--dev-images", str(size))
    assert data.records("val") == data_of(five).records("val")  # other splits are as they were
    with pytest.raises(ValueError, match="no split 'dev'.*--dev-images is not below the number"):
        data.records(data.validation)


def test_dev_images_are_drawn_alike_for_every_seed(five):
    first, *others = (data_of(five, "--dev-images", "2", "--seed", str(seed)) for seed in range(4))
    drawn = {split: [r.name for r in first.records(split)] for split in ("train", "dev")}
    assert len(drawn["dev"]) == 2 and sorted(drawn["train"] + drawn["dev"]) == sorted(CAPTIONS)
    assert all(data.drawn_split == first.drawn_split == drawn for data in others)
    assert first.validation == "dev" and data_of(five).validation == "val"
    assert [record.name for record in first.records("val")] == ["a.tif"]


# ------------------------------------------------------------------ several data sets


ONE = {
    "train": {"a": ("a ship", "Two "), "b": ("a road",), "c": ("a Lake", "a pond"), "d": ("x",)},
    "val": {"i": ("eight",)},
    "test": {"t": ("a lake", "a pier"), "u": ("A POND",)},
}
TWO = {
    "train": {"b": ("a shore",), "e": ("a ship",), "f": ("Eight",), "g": ("STRASSE", "nine")},
    "val": {"h": ("a ship",)},
    "test": {"v": ("straße", "eight ships"), "w": (" eight ",)},
}


def make_set(root, splits, height):
    """A data set: noise for every name and, for all images but the first, detections."""
    for i, name in enumerate(name for records in splits.values() for name in records):
        write_image(root / "imgs" / f"{name}.png", (36 + i, height))
        if i:
            found = [box(4 + 3 * i, 7 + 5 * j) for j in range(i)]
            write_detections(root / "det_json" / f"{name}.json", found)
    write_karpathy(root, splits)


@pytest.fixture
def pair(tmp_path):
    """Roots of the data sets one and two, which have only captions in common."""
    roots = tmp_path / "one", tmp_path / "two"
    for root, splits, height in zip(roots, (ONE, TWO), (40, 44), strict=True):
        make_set(root, splits, height)
    return roots


def file_of(root, name):
    [path] = (root / "imgs").glob(f"{name.split('.')[0]}.*")
    return path


def replace_image(root, name, source, suffix):
    """Give an image of the data set at root the pixels of another file, in another format."""
    file_of(root, name).unlink()
    Image.open(source).save(root / "imgs" / f"{name}{suffix}", lossless=True)


def joint(pair, *more):
    """(data sets, joint ImageSet, records, what is left out), as training reads them."""
    named = ["--dataset", "one", "two", "--data-root", *map(str, pair)]
    settings = parse([*named, *more])[0]
    data_sets = read_data_sets(settings)
    image_set = joint_image_set(data_sets, "train", IMAGE_SIZE, LABEL_MAP)
    require_readable(image_set)
    return data_sets, image_set, *without_test(data_sets, image_set, settings["drop_test_captions"])


def naive(data_sets, held=("test",)):
    """The names that are to be left out of each data set, by loops over names and pixels."""

    def pixels(data, record):
        return np.array(Image.open(file_of(data.root, record.name)).convert("RGB"))

    tests = [(data, r) for data in data_sets for split in held for r in data.records(split)]
    found = {}
    for data in data_sets:
        found[data.name] = {"by_name": [], "by_content": []}
        for record in data.records("train"):
            own = pixels(data, record)
            stems = [r.name.split(".")[0] for other, r in tests if other is data]
            if record.name.split(".")[0] in stems:
                found[data.name]["by_name"].append(record.name)
            elif any(np.array_equal(own, pixels(*test)) for test in tests):
                found[data.name]["by_content"].append(record.name)
    return found


def drawn(image_set, records, epochs=4):
    """Stems of the images that training sees in some epochs, sorted."""
    train_set = TrainingSet(image_set, records, MODEL_CONFIG, AUGMENTATIONS, 0.1, 0)
    batches = [batch for epoch in range(epochs) for batch in train_set.batches(epoch, 1)]
    return sorted(image_set.paths[i].stem for batch in batches for i in batch["index"])


NOTHING = {"by_name": [], "by_content": [], "no_caption_left": [], "captions": 0}


def test_joint_images_and_records_are_aligned(pair, capsys):
    data_sets, image_set, records, _ = joint(pair)
    assert [record.name for record in records] == list("abcdbefg")
    assert [path.relative_to(pair[i > 3]).stem for i, path in enumerate(image_set.paths)] == list(
        "abcdbefg"
    )
    alone = [data.image_set("train", IMAGE_SIZE, LABEL_MAP) for data in data_sets]
    items = [part[i] for part in alone for i in range(len(part))]
    for i, item in enumerate(items):
        keys = ("image", "nodes", "adjacency", "mask")
        assert all(torch.equal(image_set[i][key], item[key]) for key in keys)
        assert image_set[i]["index"] == i
    assert image_set.hashes == alone[0].hashes + alone[1].hashes
    assert "one + two train: 11 captions, 2 of 8 images without" in capsys.readouterr().out


def test_detections_of_each_data_set_are_its_own(pair, tmp_path):
    (pair[1] / "det_json").rename(tmp_path / "other")
    folders = ["--det-json", str(pair[0] / "det_json"), str(tmp_path / "other")]
    image_set = joint(pair, *folders)[1]
    assert [len(class_ids) for class_ids, _ in image_set.boxes] == [0, 1, 2, 3, 0, 1, 2, 3]


def test_validation_and_test_stay_with_their_data_set(pair):
    for data, splits in zip(joint(pair)[0], (ONE, TWO), strict=True):
        for split in ("val", "test"):
            assert [record.name for record in data.records(split)] == list(splits[split])
            paths = data.image_set(split, IMAGE_SIZE, LABEL_MAP).paths
            assert paths == [file_of(data.root, name) for name in splits[split]]


def test_nothing_is_left_out_where_nothing_overlaps(pair, capsys):
    data_sets, image_set, records, left_out = joint(pair)
    assert left_out == {"one": NOTHING, "two": NOTHING}
    assert "left out" not in capsys.readouterr().out
    whole = [record for data in data_sets for record in data.records("train")]
    assert records == whole
    how = MODEL_CONFIG, AUGMENTATIONS, 0.1, 0
    found, plain = (TrainingSet(image_set, part, *how) for part in (records, whole))
    for epoch in (1, 2):
        equal_batches(found.batches(epoch, 3), plain.batches(epoch, 3))
    assert drawn(image_set, records) == sorted(4 * list("abcdbefg"))


@pytest.mark.parametrize("suffix", [".bmp", ".tiff", ".webp"])
def test_images_of_any_test_split_are_left_out_of_training(pair, capsys, suffix):
    one, two = pair
    write_karpathy(one, {**ONE, "test": {**ONE["test"], "b.tif": ("x",)}})  # two has a b as well
    replace_image(one, "d", file_of(one, "t"), ".bmp")
    replace_image(two, "f", file_of(one, "u"), suffix)
    data_sets, image_set, records, left_out = joint(pair)
    assert left_out == {
        "one": {**NOTHING, "by_name": ["b"], "by_content": ["d"]},
        "two": {**NOTHING, "by_content": ["f"]},
    }
    for name, reasons in naive(data_sets).items():
        assert reasons.items() <= left_out[name].items()
    assert [r.name for r in records if not r.captions] == ["b", "d", "f"]
    assert drawn(image_set, records, epochs=6) == sorted(6 * list("acbeg"))
    lines = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert [line.split(";")[0] for line in lines] == [
        f"{name}: left out of training, being in a test split: {n} images by name, 1 by content, "
        "0 captions"
        for name, n in (("one", 1), ("two", 0))
    ]


def test_almost_the_same_image_is_kept(pair):
    pixels = np.array(Image.open(file_of(pair[0], "t")))
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(file_of(pair[1], "e"))
    Image.fromarray(np.rot90(pixels)).save(file_of(pair[1], "f"))
    data_sets, _, _, left_out = joint(pair)
    assert left_out == {"one": NOTHING, "two": NOTHING}
    assert all(
        reasons == {"by_name": [], "by_content": []} for reasons in naive(data_sets).values()
    )


def test_test_captions_are_dropped_on_demand(pair, capsys):
    assert joint(pair)[3]["one"] == NOTHING
    _, image_set, records, left_out = joint(pair, "--drop-test-captions")
    assert left_out == {
        "one": {**NOTHING, "no_caption_left": ["c"], "captions": 2},
        "two": {**NOTHING, "no_caption_left": ["f"], "captions": 2},
    }
    kept = [("a ship", "Two"), ("a road",), (), ("x",), ("a shore",), ("a ship",), (), ("nine",)]
    assert [record.captions for record in records] == kept
    assert drawn(image_set, records) == sorted(4 * list("abdbeg"))
    out = capsys.readouterr().out
    assert "two: left out of training, being in a test split: 0 images by name, 0 by" in out
    assert out.count("2 captions; 1 images have no caption left") == 2


def test_captions_of_images_that_are_left_out_are_not_counted(pair):
    replace_image(pair[1], "f", file_of(pair[0], "t"), ".bmp")
    left_out = joint(pair, "--drop-test-captions")[3]
    assert left_out["two"] == {**NOTHING, "by_content": ["f"], "captions": 1}


def test_unreadable_test_images_are_counted_and_the_others_compared(pair, capsys):
    replace_image(pair[0], "d", file_of(pair[1], "w"), ".bmp")
    file_of(pair[0], "u").unlink()
    file_of(pair[1], "v").write_bytes(b"broken")
    left_out = joint(pair)[3]
    assert left_out == {"one": {**NOTHING, "by_content": ["d"]}, "two": NOTHING}
    lines = [line for line in capsys.readouterr().out.splitlines() if "not readable" in line]
    assert [line.split(" images")[0] for line in lines] == ["one test: 1", "two test: 1"]


def test_beside_a_dev_split_val_is_held_out_too(pair):
    replace_image(pair[0], "a", file_of(pair[1], "h"), ".bmp")
    replace_image(pair[0], "b", file_of(pair[0], "i"), ".bmp")
    data_sets, _, _, left_out = joint(pair, "--dev-images", "1")
    assert sorted(left_out["one"]["by_content"]) == ["a", "b"]
    for name, reasons in naive(data_sets, ("test", "val")).items():
        assert reasons.items() <= left_out[name].items()
    assert joint(pair)[3] == {"one": NOTHING, "two": NOTHING}
