"""Any number of image files: encoded as a set in memory is, once, and again where one changed."""

import json
import os
import sqlite3
import subprocess
import sys

import pytest
import torch

from clip_gcn_image_feature_integration import encode_files, encode_images, load_images, load_model
from conftest import ROOT, box, write_detections, write_image
from dataset import stream

SIZES = ((64, 64), (96, 64), (64, 150))


@pytest.fixture
def tiles(tmp_path):
    """Paths of six images, and their detection files: None for the last."""
    paths, files = [], []
    for i in range(6):
        paths.append(write_image(tmp_path / "tiles" / f"{i}.png", SIZES[i % 3]))
        boxes = [box(9 + 5 * j, 8 + i) for j in range(i)]
        files.append(write_detections(tmp_path / "dets" / f"{i}.json", boxes) if i < 5 else None)
    return paths, files


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FGCROSS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def encode(save_tiny, tiles, cache, monkeypatch):
    """Encodes the tiles: (an EncodedFiles, names of the images that were decoded)."""
    model, checkpoint = load_model(save_tiny("tiny.pth"), "cpu")

    def start(model=model, paths=tiles[0], files=tiles[1], **settings):
        decoded = []
        decode = stream.decode
        with monkeypatch.context() as patch:
            patch.setattr(stream, "decode", lambda p, *a: decoded.append(p.name) or decode(p, *a))
            found = encode_files(model, checkpoint, paths, files, "cpu", **settings)
        return found, decoded

    return start


def test_a_stream_is_encoded_as_a_set_in_memory(encode, tiles, save_tiny, tmp_path):
    model, checkpoint = load_model(save_tiny("tiny.pth"), "cpu")
    paths, _ = tiles
    images = load_images(paths, [path.name for path in paths], tmp_path / "dets", checkpoint)
    expected = encode_images(model, images, "cpu")["fused"]
    found, _ = encode(batch_size=4)
    torch.testing.assert_close(found.features, expected, rtol=0, atol=1e-6)
    assert found.readable == list(range(6)) and not found.problems
    assert found.images.sizes == images.sizes
    assert found.images.counts() == images.counts()
    assert found.images.findings() == images.findings() and found.images.losses()


def test_what_is_known_is_not_encoded_again(encode, tiles):
    first, decoded = encode()
    assert decoded == [f"{i}.png" for i in range(6)]
    again, decoded = encode()
    assert decoded == [] and torch.equal(again.features, first.features)
    assert again.images.sizes == first.images.sizes

    paths, files = tiles
    write_detections(files[1], [box(30, 30)])  # a box elsewhere
    os.utime(paths[2], (1, 1))
    paths[3].write_bytes(paths[0].read_bytes())
    changed, decoded = encode()
    assert decoded == ["1.png", "2.png", "3.png"]
    difference = (changed.features - first.features).abs().amax(dim=1)  # (6)
    assert (difference[[0, 4, 5]] == 0).all()  # known
    assert difference[2] <= 1e-6  # encoded again, beside others
    assert (difference[[1, 3]] > 1e-3).all()


def test_boxes_that_no_branch_sees_change_no_features(save_tiny, tiles, cache, monkeypatch):
    model, checkpoint = load_model(save_tiny("plain.pth", "--graph", "none"), "cpu")
    paths, files = tiles
    first = encode_files(model, checkpoint, paths, files, "cpu")
    write_detections(files[1], [box(30, 30)])
    monkeypatch.setattr(stream, "decode", None)
    again = encode_files(model, checkpoint, paths, files, "cpu")
    assert torch.equal(again.features, first.features)
    assert first.images.boxes[1][1][0][0] == 9
    assert again.images.boxes[1][1][0][0] == 30


def test_another_model_has_features_of_its_own(encode, save_tiny):
    encode()
    other, _ = load_model(save_tiny("other.pth", "--seed", "1"), "cpu")
    assert len(encode(model=other)[1]) == 6


def test_the_published_branch_keeps_nothing(save_tiny, tiles, cache):
    model, checkpoint = load_model(save_tiny("p.pth", "--graph", "published"), "cpu")
    encode_files(model, checkpoint, *tiles, "cpu")
    assert not cache.exists()


def test_unreadable_files_are_listed_in_their_order(encode, tiles):
    paths, _ = tiles
    paths[4].write_bytes(b"no image")
    paths[1].unlink()
    for _ in range(2):
        found, _ = encode(batch_size=1)
        assert found.readable == [0, 2, 3, 5]
        assert [path.name for path in found.images.paths] == ["0.png", "2.png", "3.png", "5.png"]
        assert [problem.split(":")[0] for problem in found.problems] == [
            str(paths[1]),
            str(paths[4]),
        ]
    assert len(encode(paths=paths[1:2], files=[None])[0].features) == 0


def test_a_damaged_file_of_features_is_rebuilt(encode, cache, capsys):
    first, _ = encode()
    (file,) = cache.iterdir()
    with sqlite3.connect(file) as connection:  # a bit falls over
        connection.execute(
            "UPDATE features SET feature = zeroblob(length(feature)) WHERE width = 96"
        )
    again, decoded = encode()
    assert decoded == ["1.png", "4.png"]  # two in a batch: other last bits than of six
    torch.testing.assert_close(again.features, first.features, rtol=0, atol=1e-6)
    file.write_bytes(b"no database at all, but long enough to be looked at" * 9)
    again, decoded = encode()
    assert len(decoded) == 6 and torch.equal(again.features, first.features)
    assert f"{file}: not readable" in capsys.readouterr().err
    assert encode()[1] == []


def test_without_a_folder_for_features_none_are_kept(encode, cache, capsys):
    cache.write_text("a file")
    assert len(encode()[1]) == len(encode()[1]) == 6
    assert capsys.readouterr().err.count("features are not kept") == 2


SPAWNED = """
import json, multiprocessing, sys
from conftest import equal_batches
from dataset.annotations import Record
from dataset.batches import ImageSet, TrainingSet
from dataset.cache import read_boxes
from dataset.stream import ImageStream
from det_formats.det_json import read_label_map

if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    paths, files = json.loads(sys.argv[1])
    settings = {"image_size": 32, "label_map": read_label_map(), "max_objects": 4}
    images = ImageSet(paths, files, **settings)
    records = [Record(path, ("a ship",)) for path in paths]
    config = {"image_size": 32, "text": {"context_length": 77}}
    training = TrainingSet(
        images, records, model_config=config, augment=["crop"], drop_graphs=0.5, seed=0
    )
    equal_batches(training.batches(1, 3), training.batches(1, 3, workers=1))
    boxes, _ = read_boxes(files, settings["label_map"])
    settings = {**settings, "edges": True, "published": False}
    stream = ImageStream(paths * 12, boxes * 12, range(72), **settings)
    alone = list(stream.batches(9, workers=0))
    ahead = list(stream.batches(9, workers=1))
    equal_batches([batch.tensors for batch in alone], [batch.tensors for batch in ahead])
    assert [batch.indices for batch in alone] == [batch.indices for batch in ahead]
    print("all equal")
"""


def test_loader_processes_may_be_spawned(tiles, tmp_path):
    """As on macOS and Windows; elsewhere they are forked."""
    (tmp_path / "spawned.py").write_text(SPAWNED)
    paths, files = tiles
    places = [[str(path) for path in paths], [file and str(file) for file in files]]
    process = subprocess.run(
        [sys.executable, tmp_path / "spawned.py", json.dumps(places)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "test")])},
        capture_output=True,
        text=True,
    )
    assert process.stdout == "all equal\n", process.stderr
