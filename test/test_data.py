"""Image sets, training items and batches: nothing is lost, mixed up or guessed."""

import numpy as np
import pytest
import torch

import clip
from backbones import preprocess
from conftest import (
    CAPTIONS,
    IMAGE_SIZE,
    MODEL_CONFIG,
    SIZES,
    box,
    equal_batches,
    write_detections,
    write_image,
)
from dataset import images
from dataset.annotations import Record
from dataset.augment import AUGMENTATIONS
from dataset.batches import ImageSet, TrainingSet, collate, require_readable, trim
from det_formats.det_json import read_label_map
from V_Graph import GEOMETRY, arrays_from_boxes

LABEL_MAP = read_label_map()
RECORDS = [Record(name, captions) for name, captions in CAPTIONS.items()]


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


def load(root, max_objects=20, **how):
    """The five images as an ImageSet."""
    paths = [root / "imgs" / f"{record.name.removesuffix('.tif')}.png" for record in RECORDS]
    files = [root / "det_json" / f"{path.stem}.json" for path in paths]
    files = [file if file.is_file() else None for file in files]
    return ImageSet(paths, files, IMAGE_SIZE, LABEL_MAP, max_objects, **how)


def items_equal(first, second):
    assert len(first) == len(second)
    for i in range(len(first)):
        assert all(torch.equal(first[i][k], second[i][k]) for k in ("image", "nodes", "adjacency"))


def test_items_are_in_the_order_of_the_records(five):
    found = load(five)
    assert [path.stem for path in found.paths] == ["a", "b", "c", "d", "e"]
    for i, path in enumerate(found.paths):
        expected = clip.preprocess(IMAGE_SIZE)(images.open_image(path))
        torch.testing.assert_close(preprocess.normalize(found[i]["image"]), expected)
        assert found[i]["index"] == i
    assert [int(found[i]["mask"].sum()) for i in range(5)] == [1, 2, 0, 4, 1]


def test_nodes_are_those_of_the_detections_and_the_files_size(five):
    found = load(five)
    class_ids = np.array([LABEL_MAP.class_id("ship")] * 2)
    boxes = np.array([box(6, 7, 7, 4, 0.0), box(12, 12, 7, 5, 0.3)])
    expected = arrays_from_boxes(class_ids, boxes, SIZES[1], 20, len(LABEL_MAP))
    assert torch.equal(found[1]["nodes"], torch.from_numpy(expected.nodes))
    assert torch.equal(found[1]["adjacency"], torch.from_numpy(expected.adjacency))


@pytest.mark.parametrize("rows", [0, 4.5])
def test_pixels_in_a_cache_file_change_no_item(five, tmp_path, rows):
    how = {"cache_gb": rows * 3 * IMAGE_SIZE**2 / 2**30, "cache_dir": tmp_path / "cache"}
    small = load(five, **how)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    items_equal(small, load(five))
    items_equal(load(five, **how), load(five))  # found there


@pytest.mark.parametrize("cache_gb", [0, 4])
def test_workers_change_no_batch(five, tmp_path, cache_gb):
    found = load(five, cache_gb=cache_gb, cache_dir=tmp_path / "cache")
    equal_batches(found.batches(2, workers=2), found.batches(2))


def test_missing_detections_are_an_empty_graph_and_counted(five):
    found = load(five)
    assert found.missing == 1
    assert not found[2]["mask"].any() and not found[2]["nodes"].any()
    assert "1 of 5 images without a detection file" in found.counts()


def test_objects_beyond_the_maximum_are_counted(five):
    found = load(five, max_objects=3)
    assert found.dropped == 1 and found[3]["nodes"].shape == (3, len(LABEL_MAP) + GEOMETRY)
    assert "1 objects beyond 3 dropped" in found.counts()


def test_exchanged_graphs_are_all_used_once_and_none_by_its_own_image(tmp_path):
    paths = [write_image(tmp_path / f"{i}.png") for i in range(9)]
    files = [write_detections(tmp_path / f"{i}.json", [box(3 + 4 * i, 20)]) for i in range(9)]
    own = ImageSet(paths, files, IMAGE_SIZE, LABEL_MAP, 20)
    for seed in range(5):
        exchanged = ImageSet(paths, files, IMAGE_SIZE, LABEL_MAP, 20, exchange=seed)
        source = [
            next(j for j in range(9) if torch.equal(exchanged[i]["nodes"], own[j]["nodes"]))
            for i in range(9)
        ]
        assert sorted(source) == list(range(9))
        assert all(i != j for i, j in enumerate(source))
        assert all(torch.equal(exchanged[i]["image"], own[i]["image"]) for i in range(9))


def test_an_exchanged_graph_keeps_the_size_of_its_own_image(five):
    found, own = load(five, exchange=3), load(five)
    for i, source in enumerate(found.source):
        assert torch.equal(found[i]["nodes"], own[source]["nodes"])


def test_no_edges_leave_the_nodes(five):
    own, bare = load(five), load(five, edges=False)
    for i in range(5):
        assert torch.equal(own[i]["nodes"], bare[i]["nodes"]) and not bare[i]["adjacency"].any()
    assert own[1]["adjacency"].any()


def test_a_set_without_edges_has_its_nodes(tmp_path):
    path = write_image(tmp_path / "a.png")
    file = write_detections(tmp_path / "a.json", [box(9, 20), box(12, 20)])
    own = ImageSet([path], [file], IMAGE_SIZE, LABEL_MAP, 20)[0]
    bare = ImageSet([path], [file], IMAGE_SIZE, LABEL_MAP, 20, edges=False)[0]
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
    message = refusal(ImageSet(paths, [None] * len(paths), IMAGE_SIZE, LABEL_MAP, 20))
    assert message.startswith("12 images are missing or unreadable")
    assert [f"bad_{i:02d}.png" in message for i in range(12)] == [True] * 10 + [False] * 2
    assert "good" not in message


def test_readable_sets_are_no_error(five):
    assert load(five).problems == [] and require_readable(load(five), load(five)) is None


# ------------------------------------------------------------------ training items


def training_set(root, augment=(), drop_graphs=0.0, seed=0, records=RECORDS, **how):
    return TrainingSet(load(root, **how), records, MODEL_CONFIG, augment, drop_graphs, seed)


def test_drawn_captions_belong_to_their_image_and_all_occur(five):
    data = training_set(five)
    for i, own in enumerate(CAPTIONS.values()):
        found = {tuple(data[epoch, i]["text"].tolist()) for epoch in range(60)}
        assert found == set(map(tuple, clip.tokenize(own).tolist()))


def test_equal_texts_have_equal_ids_whatever_their_case(five):
    item = training_set(five)
    assert item[0, 1]["caption_ids"].tolist() == [2, 2, 3]
    assert item[0, 0]["caption_ids"][0] == item[0, 3]["caption_ids"][0]
    for epoch in range(20):
        for i in range(5):
            assert item[epoch, i]["text_id"] in item[epoch, i]["caption_ids"]


def test_draws_depend_on_seed_epoch_and_image_alone(five):
    first, again = (training_set(five, AUGMENTATIONS, 0.3, seed=4) for _ in range(2))
    other = training_set(five, AUGMENTATIONS, 0.3, seed=5)
    keys = [(epoch, i) for epoch in range(8) for i in range(5)]
    order = {key: first[key] for key in reversed(keys)}
    for key in keys:
        assert all(
            torch.equal(order[key][k], again[key][k])
            for k in ("affine", "colour", "hole", "text", "nodes")
        )
    affines = {tuple(order[key]["affine"].flatten().tolist()) for key in keys}
    assert len(affines) == len(keys)
    assert not any(torch.equal(order[key]["affine"], other[key]["affine"]) for key in keys)


def test_order_of_images_is_seeded_and_differs_over_epochs(five):
    def order(seed, epoch):
        batches = training_set(five, seed=seed).batches(epoch, 5)
        return [i for batch in batches for i in batch["index"].tolist()]

    assert order(0, 1) == order(0, 1)
    assert sorted(order(0, 1)) == [0, 1, 2, 3, 4]
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (1, 2, 3)}) > 3


def test_workers_change_no_training_batch(five):
    data = training_set(five, AUGMENTATIONS, 0.5)
    equal_batches(data.batches(3, 2, workers=2), data.batches(3, 2))


def test_only_a_last_smaller_batch_beside_others_is_dropped(five):
    data = training_set(five)
    sizes = {size: [len(b["index"]) for b in data.batches(0, size)] for size in (2, 5, 8)}
    assert sizes == {2: [2, 2], 5: [5], 8: [5]}


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_batches_go_on_from_any_number(five, size):
    data = training_set(five, AUGMENTATIONS, 0.5)
    all_batches = list(data.batches(3, size))
    for start in range(len(all_batches)):
        equal_batches(data.batches(3, size, start=start), all_batches[start:])
    assert list(data.batches(3, size, start=len(all_batches))) == []


@pytest.mark.parametrize("start", [1, 2])
def test_batches_go_on_with_workers_too(five, start):
    data = training_set(five, AUGMENTATIONS, 0.5)
    rest = list(data.batches(3, 2))[start:]
    found = data.batches(3, 2, workers=2, start=start)
    assert len(found) == len(rest)
    for batch, expected in zip(found, rest, strict=True):
        equal_batches([batch], [expected])


def test_images_without_captions_are_never_drawn(five):
    bare = [
        record._replace(captions=()) if record.name[0] in "bd" else record for record in RECORDS
    ]
    data = training_set(five, records=bare)
    assert len(data) == 3 and len(data.batches(0, 1)) == 3
    drawn = [i for epoch in range(5) for batch in data.batches(epoch, 1) for i in batch["index"]]
    assert sorted(drawn) == sorted(5 * [0, 2, 4])
    for i in (0, 2, 4):  # all else is as before
        own = {tuple(data[epoch, i]["text"].tolist()) for epoch in range(60)}
        assert own == set(map(tuple, clip.tokenize(RECORDS[i].captions).tolist()))
        assert torch.equal(data[7, i]["text"], training_set(five)[7, i]["text"])


def test_graphs_are_dropped_at_their_rate(five):
    data = training_set(five, drop_graphs=0.25)
    kept = [data[epoch, 3]["mask"].any() for epoch in range(400)]
    assert np.mean(kept) == pytest.approx(0.75, abs=0.07)
    assert all(training_set(five)[epoch, 3]["mask"].sum() == 4 for epoch in range(20))


def test_collate_pads_caption_ids_and_cuts_texts(five):
    data = training_set(five)
    items = [data[0, i] for i in range(5)]
    batch = collate(items)
    assert batch["caption_ids"].shape == (5, 5)
    assert batch["caption_ids"][2].tolist() == [*items[2]["caption_ids"].tolist(), *[-1] * 4]
    longest = max(int(item["text"].count_nonzero()) for item in items)
    assert batch["text"].shape == (5, longest)
    for row, item in zip(batch["text"], items, strict=True):
        assert torch.equal(row, item["text"][:longest]) and not item["text"][longest:].any()
    assert batch["index"].tolist() == [0, 1, 2, 3, 4]


def test_items_have_the_maps_and_colours_that_are_asked_for(five):
    for augment, keys in (
        ((), set()),
        (("flip",), {"affine"}),
        (("crop", "turn"), {"affine"}),
        (("colour",), {"colour"}),
        (("erase",), {"hole"}),
        (AUGMENTATIONS, {"affine", "colour", "hole"}),
    ):
        batch = collate([training_set(five, augment)[0, i] for i in range(5)])
        assert keys == {"affine", "colour", "hole"} & batch.keys()
        shapes = {"affine": (5, 2, 3), "colour": (5, 2, 3), "hole": (5, 2)}
        assert all(batch[key].shape == shapes[key] for key in keys)
        assert all(batch[key].dtype == torch.float32 for key in keys)


def test_trim_keeps_the_last_end_token():
    tokens = clip.tokenize(["a", "a rather longer sentence than the other"])
    cut = trim(tokens)
    assert cut.shape[1] == int(tokens[1].count_nonzero())
    assert (cut.max(dim=1).values == tokens.max()).all()
    full = clip.tokenize("word " * 100)
    assert torch.equal(trim(full), full)
