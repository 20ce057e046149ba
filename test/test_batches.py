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
from dataset import batches, images
from dataset.annotations import Record
from dataset.batches import ImageSet, TrainingSet, collate, trim
from det_formats.det_json import LabelMap, read_label_map
from options import AUGMENTATIONS
from V_Graph import arrays_from_boxes

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
    bare = load(five, edges=False)
    assert torch.equal(bare[1]["nodes"], found[1]["nodes"])
    assert found[1]["adjacency"].any() and not bare[1]["adjacency"].any()


@pytest.mark.parametrize("rows", [0, 4.5, 5])
def test_neither_cache_nor_workers_change_a_batch(five, cache_folder, rows):
    expected = list(load(five).batches(2))
    found = load(five, ram_gib=rows * 3 * IMAGE_SIZE**2 / 2**30)
    assert cache_folder.exists() == (rows < 5)
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


@pytest.mark.parametrize("settings", [{}, {"edges": False}, {"exchange": 1}, {"published": True}])
def test_kept_graphs_are_those_that_are_made_anew(five, monkeypatch, settings):
    if "published" in settings:
        settings = {**settings, "label_map": LabelMap(["ship", "car", "building"])}
    monkeypatch.setattr(batches, "AT_ONCE", 2)
    kept = load(five, **settings)
    assert kept.kept_graphs is not None
    monkeypatch.setattr(batches, "GRAPHS_GIB", 0)
    anew = load(five, **settings)
    assert anew.kept_graphs is None
    equal_batches(kept.batches(2), anew.batches(2))
    assert any(graphs["nodes"].any() for graphs in kept.batches(2))
    for i in range(5):
        equal_batches([kept[i]], [anew[i]])


def test_a_set_without_objects_leaves_the_other_as_it_was(five):
    images = load(five)
    bare = images.without_objects()
    assert not bare[3]["mask"].any() and not bare[3]["nodes"].any()
    assert images[3]["mask"].sum() == 4
    assert torch.equal(bare[3]["image"], images[3]["image"])


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


def test_drawn_captions_belong_to_their_image_and_all_occur(five):
    data = training_set(five)
    for i, captions in enumerate(CAPTIONS.values()):
        texts = {tuple(data[epoch, i]["text"].tolist()) for epoch in range(60)}
        assert texts == {tuple(row) for row in clip.tokenize(captions).tolist()}
    data.text_features = torch.arange(len(data.captions))[:, None]
    for epoch in range(9):  # features are those of the drawn caption
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
    drawn = []
    for epoch in range(5):
        for batch in data.batches(epoch, 1):
            drawn += batch["index"]
    assert sorted(drawn) == sorted(5 * [0, 2, 4])


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


DRAWN = {"flip": "affine", "turn": "affine", "crop": "affine", "colour": "colour", "erase": "hole"}


@pytest.mark.parametrize("augment", [(), *[(name,) for name in DRAWN], AUGMENTATIONS])
def test_items_have_the_maps_and_colours_that_are_asked_for(five, augment):
    shapes = {"affine": (5, 2, 3), "colour": (5, 2, 3), "hole": (5, 2)}
    data = training_set(five, augment)
    batch = collate([data[0, i] for i in range(5)])
    names = {DRAWN[name] for name in augment}
    assert names == shapes.keys() & batch.keys()
    for name in names:
        assert batch[name].shape == shapes[name] and batch[name].dtype == torch.float32
