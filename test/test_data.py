"""Image sets, training items and batches: nothing is lost, mixed up or guessed."""

import numpy as np
import pytest
import torch
from PIL import Image

import clip
import images
from augment import AUGMENTATIONS
from conftest import DEFINITION, N_PX, SIZES, box, write_detections, write_karpathy
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
CAPTIONS = {  # five images, one to five captions each, some of them shared
    "a.tif": ("a ship", "two ships"),
    "b.tif": ("a plane", "A Plane", "two planes near a road"),
    "c.tif": ("a car",),
    "d.tif": ("a ship", "a boat", "a vessel", "one ship", "a ship on the water"),
    "e.tif": ("snow", "snowy ground"),
}


def write_image(path, size=(40, 40), value=None):
    """An image file of noise, seeded by its name, or of one grey value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(list(path.stem.encode()))
    pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    if value is not None:
        pixels[:] = value
    Image.fromarray(pixels).save(path)
    return path


def equal_batches(first, second):
    first, second = list(first), list(second)
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


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
