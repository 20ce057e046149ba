"""No image that one data set validates or tests on is in the training images of any."""

import numpy as np
import pytest
from PIL import Image

from conftest import IMAGE_SIZE, MODEL_CONFIG, equal_batches, write_image, write_karpathy
from dataloader import joint_image_set, read_data_sets
from dataset.batches import TrainingSet
from dataset.overlap import without_held_out
from det_formats.det_json import read_label_map
from options import AUGMENTATIONS, default_options

ONE = {
    "train": {"a": ("a ship", "Two "), "b": ("a road",), "c": ("a Lake", "a pond"), "d": ("x",)},
    "val": {"i": ("a shore",)},
    "test": {"t": ("a lake", "a pier"), "u": ("A POND",)},
}
TWO = {
    "train": {"b": ("a shore",), "e": ("a ship",), "f": ("Eight",), "g": ("STRASSE", "nine")},
    "val": {"h": ("a ship",)},
    "test": {"v": ("straße", "eight ships"), "w": (" eight ",)},
}
NOTHING = {"by_name": [], "by_content": [], "no_caption_left": [], "captions": 0}


@pytest.fixture
def pair(tmp_path):
    """Roots of the data sets one and two, which have only captions in common."""
    roots = tmp_path / "one", tmp_path / "two"
    for root, splits, height in zip(roots, (ONE, TWO), (40, 44), strict=True):
        for i, name in enumerate(name for records in splits.values() for name in records):
            write_image(root / "imgs" / f"{name}.png", (36 + i, height))
        write_karpathy(root, splits)
    return roots


def replace_image(root, name, source):
    """Give an image the pixels of another file, in another format."""
    (root / "imgs" / f"{name}.png").unlink()
    Image.open(source).save(root / "imgs" / f"{name}.bmp")


def joint(pair, **changes):
    """(data sets, joint ImageSet, records, what is left out), as training reads them."""
    options = {**default_options("train"), "dataset": ["one", "two"], **changes}
    data_sets = read_data_sets({**options, "data_root": [str(root) for root in pair]})
    image_set = joint_image_set(data_sets, "train", IMAGE_SIZE, read_label_map())
    records, left_out = without_held_out(data_sets, image_set)
    return data_sets, image_set, records, left_out


def naive(data_sets, held_out=("test", "val")):
    """The names that are to be left out of each data set, by loops over names and pixels."""

    def pixels(data, record):
        [path] = (data.root / "imgs").glob(f"{record.name.split('.')[0]}.*")
        return np.array(Image.open(path).convert("RGB"))

    held = []
    for data in data_sets:
        for split in held_out:
            held += [(data, record) for record in data.records(split)]
    found = {}
    for data in data_sets:
        found[data.name] = {"by_name": [], "by_content": []}
        stems = [r.name.split(".")[0] for other, r in held if other is data]
        for record in data.records("train"):
            own = pixels(data, record)
            if record.name.split(".")[0] in stems:
                found[data.name]["by_name"].append(record.name)
            elif any(np.array_equal(own, pixels(*image)) for image in held):
                found[data.name]["by_content"].append(record.name)
    return found


def training_set(image_set, records):
    return TrainingSet(
        image_set,
        records,
        model_config=MODEL_CONFIG,
        augment=AUGMENTATIONS,
        drop_graphs=0.1,
        seed=0,
    )


def drawn(image_set, records):
    """Stems of the images that training sees in an epoch, sorted."""
    batches = training_set(image_set, records).batches(1, 1)
    return sorted(image_set.paths[i].stem for batch in batches for i in batch["index"])


def test_nothing_is_left_out_where_nothing_overlaps(pair, capsys):
    """Not even almost the same image, nor one that is turned."""
    pixels = np.array(Image.open(pair[0] / "imgs" / "t.png"))
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(pair[1] / "imgs" / "e.png")
    Image.fromarray(np.rot90(pixels)).save(pair[1] / "imgs" / "f.png")
    data_sets, image_set, records, left_out = joint(pair)
    assert left_out == {"one": NOTHING, "two": NOTHING}
    assert "left out" not in capsys.readouterr().out
    whole = [record for data in data_sets for record in data.records("train")]
    assert records == whole
    found = training_set(image_set, records).batches(1, 3)
    equal_batches(found, training_set(image_set, whole).batches(1, 3))
    assert drawn(image_set, records) == sorted("abcdbefg")


@pytest.mark.parametrize(("split", "held"), [("test", "t"), ("val", "i")])
def test_held_out_images_of_any_data_set_are_left_out_of_training(pair, capsys, split, held):
    one, two = pair
    write_karpathy(one, {**ONE, split: {**ONE[split], "b.tif": ("x",)}})  # two has a b as well
    replace_image(one, "d", one / "imgs" / f"{held}.png")
    replace_image(two, "f", one / "imgs" / f"{held}.png")
    data_sets, image_set, records, left_out = joint(pair)
    assert left_out == {
        "one": {**NOTHING, "by_name": ["b"], "by_content": ["d"]},
        "two": {**NOTHING, "by_content": ["f"]},
    }
    for name, reasons in naive(data_sets).items():
        assert reasons.items() <= left_out[name].items()
    assert [record.name for record in records if not record.captions] == ["b", "d", "f"]
    assert drawn(image_set, records) == sorted("acbeg")
    lines = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    counts = [line.split("held out: ")[1] for line in lines]
    assert counts == [
        f"{by_name} images by name, 1 by content, 0 captions of other data sets' test splits; "
        "0 images have no caption left"
        for by_name in (1, 0)
    ]


def test_test_captions_of_another_data_set_are_dropped(pair, capsys):
    one, two = pair
    write_karpathy(one, {**ONE, "test": {"t": ("eight", "strasse", "a lake"), "u": ("A POND",)}})
    write_karpathy(two, {**TWO, "test": {"v": ("A LAKE ", " a Pond"), "w": ("nine", "two")}})
    _, image_set, records, left_out = joint(pair)
    assert left_out == {
        "one": {**NOTHING, "no_caption_left": ["c"], "captions": 3},
        "two": {**NOTHING, "no_caption_left": ["f"], "captions": 2},
    }
    # "nine" stands in a test split of its own data set alone.
    kept = [("a ship",), ("a road",), (), ("x",), ("a shore",), ("a ship",), (), ("nine",)]
    assert [record.captions for record in records] == kept
    assert drawn(image_set, records) == sorted("abdbeg")
    said = "captions of other data sets' test splits; 1 images have no caption left"
    assert capsys.readouterr().out.count(said) == 2
    # Captions of images that are left out are not counted.
    replace_image(two, "f", one / "imgs" / "t.png")
    assert joint(pair)[3]["two"] == {**NOTHING, "by_content": ["f"], "captions": 1}


def test_unreadable_test_images_are_counted_and_the_others_compared(pair, capsys):
    replace_image(pair[0], "d", pair[1] / "imgs" / "w.png")
    (pair[0] / "imgs" / "u.png").unlink()
    (pair[1] / "imgs" / "v.png").write_bytes(b"broken")
    left_out = joint(pair)[3]
    assert left_out == {"one": {**NOTHING, "by_content": ["d"]}, "two": NOTHING}
    lines = [line for line in capsys.readouterr().out.splitlines() if "not readable" in line]
    assert [line.split(" images")[0] for line in lines] == ["one test: 1", "two test: 1"]


def test_beside_a_dev_split_val_is_held_out_too(pair):
    """Its captions are those of a test split then; of a split to choose on they may be trained."""
    replace_image(pair[0], "a", pair[1] / "imgs" / "h.png")
    replace_image(pair[0], "b", pair[0] / "imgs" / "i.png")
    data_sets, _, _, left_out = joint(pair, dev_images=1)
    assert sorted(left_out["one"]["by_content"]) == ["a", "b"]
    for name, reasons in naive(data_sets, ("test", "val", "dev")).items():
        assert reasons.items() <= left_out[name].items()
    for dev_images in (0, 1):
        left_out = joint(pair, dev_images=dev_images)[3]
        # "a shore" is in the first one's val
        assert ("b" in left_out["two"]["no_caption_left"]) == bool(dev_images)


def test_images_of_a_drawn_dev_split_are_held_out_of_the_other_data_set(pair):
    one, two = joint(pair, dev_images=1)[0]
    [dev] = two.records("dev")
    name = one.records("train")[0].name
    replace_image(pair[0], name, pair[1] / "imgs" / f"{dev.name}.png")
    left_out = joint(pair, dev_images=1)[3]
    assert [left_out[data]["by_content"] for data in ("one", "two")] == [[name], []]
