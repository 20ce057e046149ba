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
from dataset.batches import ImageSet, TrainingSet, collate, require_readable, trim
from det_formats.det_json import read_label_map
from options import AUGMENTATIONS
from V_Graph import GEOMETRY, arrays_from_boxes

LABEL_MAP = read_label_map()
RECORDS = [Record(name, captions) for name, captions in CAPTIONS.items()]


# ------------------------------------------------------------------ image sets


def make_set(paths, detections, **settings):
    settings = {"image_size": IMAGE_SIZE, "label_map": LABEL_MAP, "max_objects": 20, **settings}
    return ImageSet(paths, detections, **settings)


def load(root, **settings):
    """The five images as an ImageSet."""
    paths = [root / "imgs" / f"{record.name.removesuffix('.tif')}.png" for record in RECORDS]
    files = [root / "det_json" / f"{path.stem}.json" for path in paths]
    return make_set(paths, [file if file.is_file() else None for file in files], **settings)


def test_items_are_pixels_and_graphs_in_the_order_of_the_files(five):
    found = load(five)
    assert [path.stem for path in found.paths] == ["a", "b", "c", "d", "e"]
    for i, path in enumerate(found.paths):
        expected = clip.preprocess(IMAGE_SIZE)(images.open_image(path))
        torch.testing.assert_close(preprocess.normalize(found[i]["image"]), expected)
        assert found[i]["index"] == i
    assert [int(found[i]["mask"].sum()) for i in range(5)] == [1, 2, 0, 4, 1]
    class_ids = np.array([LABEL_MAP.class_id("ship")] * 2)
    boxes = np.array([box(6, 7, 7, 4, 0.0), box(12, 12, 7, 5, 0.3)])
    expected = arrays_from_boxes(class_ids, boxes, SIZES[1], 20, len(LABEL_MAP))
    assert torch.equal(found[1]["nodes"], torch.from_numpy(expected.nodes))
    assert torch.equal(found[1]["adjacency"], torch.from_numpy(expected.adjacency))


def test_missing_detections_and_dropped_objects_are_counted(five):
    found = load(five, max_objects=3)
    assert found.missing == 1 and not found[2]["mask"].any() and not found[2]["nodes"].any()
    assert found.dropped == 1 and found[3]["nodes"].shape == (3, len(LABEL_MAP) + GEOMETRY)
    counts = "1 of 5 images without a detection file, 1 objects beyond 3 dropped"
    assert found.counts() == counts


@pytest.mark.parametrize("rows", [0, 4.5, 5])
def test_neither_cache_nor_workers_change_a_batch(five, tmp_path, rows):
    settings = {"cache_gb": rows * 3 * IMAGE_SIZE**2 / 2**30, "cache_dir": tmp_path / "cache"}
    expected = list(load(five).batches(2))
    found = load(five, **settings)
    assert (tmp_path / "cache").exists() == (rows < 5)
    equal_batches(found.batches(2), expected)
    equal_batches(found.batches(2, workers=2), expected)


def test_exchanged_graphs_are_all_used_once_and_none_by_its_own_image(tmp_path):
    """Each is that of the other image's detections and of the other image's size."""
    paths = [write_image(tmp_path / f"{i}.png", (40 + i, 40)) for i in range(9)]
    files = [write_detections(tmp_path / f"{i}.json", [box(3 + 4 * i, 20)]) for i in range(9)]
    own = make_set(paths, files)
    for seed in range(5):
        exchanged = make_set(paths, files, exchange=seed)
        assert sorted(exchanged.source) == list(range(9))
        for i, source in enumerate(exchanged.source):
            assert i != source
            assert torch.equal(exchanged[i]["nodes"], own[source]["nodes"])
            assert torch.equal(exchanged[i]["image"], own[i]["image"])


def test_no_edges_leave_the_nodes(five):
    own = load(five)
    bare = load(five, edges=False)
    for i in range(5):
        assert torch.equal(own[i]["nodes"], bare[i]["nodes"])
        assert torch.equal(own[i]["mask"], bare[i]["mask"])
        assert not bare[i]["adjacency"].any()
    assert own[1]["adjacency"].any()


def test_unreadable_images_are_one_error_with_the_first_ten(tmp_path):
    good = [write_image(tmp_path / f"good_{i}.png") for i in range(2)]
    bad = [tmp_path / f"bad_{i:02d}.png" for i in range(12)]
    for path in bad[::2]:  # cut short; the others are not there
        path.write_bytes(good[0].read_bytes()[:500])
    first = make_set([*bad[:5], good[0]], [None] * 6)
    second = make_set([good[1], *bad[5:]], [None] * 8)
    with pytest.raises(ValueError, match="^12 images are missing or unreadable") as failure:
        require_readable(first, second)
    named = [path.name in str(failure.value) for path in bad]
    assert named == [True] * 10 + [False] * 2 and "good" not in str(failure.value)
    assert require_readable(make_set(good, [None] * 2)) is None


# ------------------------------------------------------------------ training items


def training_set(root, augment=(), drop_graphs=0.0, seed=0, records=RECORDS):
    return TrainingSet(
        load(root),
        records,
        model_config=MODEL_CONFIG,
        augment=augment,
        drop_graphs=drop_graphs,
        seed=seed,
    )


def texts_of(data, i):
    """The texts that image i has in 60 epochs."""
    return {tuple(data[epoch, i]["text"].tolist()) for epoch in range(60)}


def test_drawn_captions_belong_to_their_image_and_all_occur(five):
    data = training_set(five)
    for i, captions in enumerate(CAPTIONS.values()):
        assert texts_of(data, i) == {tuple(row) for row in clip.tokenize(captions).tolist()}


def test_features_of_texts_are_those_of_the_drawn_captions(five):
    data = training_set(five)
    data.text_features = torch.arange(len(data.captions))[:, None]
    for epoch in range(9):
        item = data[epoch, 3]
        caption = data.captions[int(item["text_features"])]
        assert torch.equal(item["text"], clip.tokenize(caption)[0])


def test_equal_texts_have_equal_ids_whatever_their_case(five):
    data = training_set(five)
    assert data[0, 1]["caption_ids"].tolist() == [2, 2, 3]
    assert data[0, 0]["caption_ids"][0] == data[0, 3]["caption_ids"][0]
    for epoch in range(9):
        item = data[epoch, 3]
        own = [clip.tokenize(text)[0].tolist() for text in CAPTIONS["d.tif"]]
        assert item["text_id"] == item["caption_ids"][own.index(item["text"].tolist())]


def test_draws_depend_on_seed_epoch_and_image_alone(five):
    first = training_set(five, AUGMENTATIONS, 0.3, seed=4)
    again = training_set(five, AUGMENTATIONS, 0.3, seed=4)
    other = training_set(five, AUGMENTATIONS, 0.3, seed=5)
    keys = [(epoch, i) for epoch in range(8) for i in range(5)]
    items = {key: first[key] for key in reversed(keys)}
    for key in keys:
        for name in ("affine", "colour", "hole", "text", "nodes"):
            assert torch.equal(items[key][name], again[key][name])
        assert not torch.equal(items[key]["affine"], other[key]["affine"])
    affines = {tuple(item["affine"].flatten().tolist()) for item in items.values()}
    assert len(affines) == len(keys)


def test_order_of_images_is_seeded_and_differs_over_epochs(five):
    def order(seed, epoch):
        batches = training_set(five, seed=seed).batches(epoch, 5)
        return [i for batch in batches for i in batch["index"].tolist()]

    assert order(0, 1) == order(0, 1) and sorted(order(0, 1)) == [0, 1, 2, 3, 4]
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (1, 2, 3)}) > 3


@pytest.mark.parametrize(("size", "sizes"), [(1, [1] * 5), (2, [2, 2]), (5, [5]), (8, [5])])
def test_batches_go_on_from_any_number_and_only_a_last_smaller_one_is_dropped(five, size, sizes):
    data = training_set(five, AUGMENTATIONS, 0.5)
    batches = list(data.batches(3, size))
    assert [len(batch["index"]) for batch in batches] == sizes
    for start in range(len(batches)):
        equal_batches(data.batches(3, size, start=start), batches[start:])
    assert list(data.batches(3, size, start=len(batches))) == []


@pytest.mark.parametrize("start", [0, 1])
def test_workers_change_no_training_batch(five, start):
    data = training_set(five, AUGMENTATIONS, 0.5)
    found = data.batches(3, 2, workers=2, start=start)
    assert len(found) == 2 - start
    equal_batches(found, list(data.batches(3, 2))[start:])


def test_images_without_captions_are_never_drawn(five):
    records = list(RECORDS)
    for i in (1, 3):
        records[i] = RECORDS[i]._replace(captions=())
    data = training_set(five, records=records)
    assert len(data) == 3 and len(data.batches(0, 1)) == 3
    drawn = [i for epoch in range(5) for batch in data.batches(epoch, 1) for i in batch["index"]]
    assert sorted(drawn) == sorted(5 * [0, 2, 4])
    for i in (0, 2, 4):  # all else is as before
        assert texts_of(data, i) == texts_of(training_set(five), i)


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
    full = clip.tokenize("word " * 100)
    assert torch.equal(trim(full), full)


@pytest.mark.parametrize(
    ("augment", "names"),
    [
        ((), set()),
        (("flip",), {"affine"}),
        (("turn",), {"affine"}),
        (("crop",), {"affine"}),
        (("colour",), {"colour"}),
        (("erase",), {"hole"}),
        (AUGMENTATIONS, {"affine", "colour", "hole"}),
    ],
)
def test_items_have_the_maps_and_colours_that_are_asked_for(five, augment, names):
    shapes = {"affine": (5, 2, 3), "colour": (5, 2, 3), "hole": (5, 2)}
    data = training_set(five, augment)
    batch = collate([data[0, i] for i in range(5)])
    assert names == shapes.keys() & batch.keys()
    for name in names:
        assert batch[name].shape == shapes[name] and batch[name].dtype == torch.float32
