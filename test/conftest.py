"""Shared by the tests: devices, real data where FGCROSS_DATA names them, small models and sets."""

import importlib.abc
import json
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import model
from backbones import model_configs
from backbones.towers import CLIP
from dataset import scenes
from det_formats.det_json import LABELS, read_label_map


class Without(importlib.abc.MetaPathFinder):
    """A finder of modules that does not find some packages, as if they were not installed."""

    def __init__(self, finder, names):
        self.finder = finder
        self.names = names

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            return None
        return self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)


BLOCKED = os.environ.get("FGCROSS_BLOCKED", "").split()
if BLOCKED:
    sys.meta_path[:] = [Without(finder, BLOCKED) for finder in sys.meta_path]

ROOT = Path(__file__).parent.parent
IMAGE_SIZE = 32
MODEL_CONFIG = {"image_size": IMAGE_SIZE, "text": {"context_length": 77}}  # as far as data go
SIZES = ((64, 64), (96, 64), (64, 96))  # width, height: 96 or 128 pixels without rounding
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request):
    """Every device of this machine."""
    return torch.device(request.param)


@pytest.fixture(scope="session", autouse=True)
def no_cache_of_the_user(tmp_path_factory):
    """Caches of all tests lie in a folder that goes with them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FGCROSS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def cache_folder(tmp_path, monkeypatch):
    """A folder for the caches of one test, which is not there yet."""
    monkeypatch.setenv("FGCROSS_CACHE", str(tmp_path / "user" / "cache"))
    return tmp_path / "user" / "cache"


@pytest.fixture
def seeded(monkeypatch):
    """The same weights each time, and convolutions in fp32 on CUDA, too, where TF32 is default."""
    torch.manual_seed(0)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def models(tmp_path, monkeypatch):
    """The small model configs of clips.py, in a folder that stands for models/."""
    from clips import MODEL_CONFIGS  # here, so that only these tests need other libraries

    folder = tmp_path / "models"
    folder.mkdir()
    for name, sizes in MODEL_CONFIGS.items():
        (folder / f"{name}.json").write_text(json.dumps(sizes))
    monkeypatch.setattr(model_configs, "MODELS", folder)
    return folder


@pytest.fixture(scope="session")
def real_data():
    """Folder of the real data sets; tests that need them skip where FGCROSS_DATA is unset."""
    folder = os.environ.get("FGCROSS_DATA")
    if not folder:
        pytest.skip("FGCROSS_DATA is unset: no real data on this machine")
    return Path(folder)


@pytest.fixture
def tiny_model_config():
    """A model config small enough for tests."""
    return {
        "name": "tiny",
        "embed_dim": 32,
        "image_size": 32,
        "vision": {"patch_size": 16, "width": 32, "layers": 2, "heads": 2},
        "text": {"context_length": 77, "vocab_size": 49408, "width": 32, "layers": 1, "heads": 2},
    }


@pytest.fixture
def tiny_model(tiny_model_config):
    """Builds a small FGCross with seeded random weights: tiny_model(fusion="gate")."""

    def build(**changes):
        torch.manual_seed(0)
        options = {"graph": "object", "fusion": 0.5, **changes}
        return model.build(tiny_model_config, read_label_map().lines, options).eval()

    return build


@pytest.fixture(scope="session")
def mini(tmp_path_factory):
    """A data set of 48 scenes under a name of its own."""
    folder = tmp_path_factory.mktemp("mini")
    scenes.generate(folder, splits={"train": 24, "val": 12, "test": 12})
    return folder


def write_karpathy(root, splits, name="dataset.json"):
    """Write {split: {file name: captions}} as Karpathy-style JSON."""
    root.mkdir(parents=True, exist_ok=True)
    entries = [
        {"filename": image, "split": split, "sentences": [{"raw": text} for text in captions]}
        for split, records in splits.items()
        for image, captions in records.items()
    ]
    (root / name).write_text(json.dumps({"images": entries}), encoding="utf-8")


def box(x, y, w=10.0, h=5.0, angle=0.0, score=0.9):
    return [float(v) for v in (x, y, w, h, angle, score)]


def write_detections(path, boxes, label="ship"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([{"label": label, "bbox": b} for b in boxes]), encoding="utf-8")
    return path


def write_image(path, size=(40, 40), value=None):
    """An image file of noise, seeded by its name, or of one grey value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(list(path.stem.encode()))
    pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    if value is not None:
        pixels[:] = value
    Image.fromarray(pixels).save(path)
    return path


CAPTIONS = {  # five images, one to five captions each, some of them shared
    "a.tif": ("a ship", "two ships"),
    "b.tif": ("a plane", "A Plane", "two planes near a road"),
    "c.tif": ("a car",),
    "d.tif": ("a ship", "a boat", "a vessel", "one ship", "a ship on the water"),
    "e.tif": ("snow", "snowy ground"),
}


@pytest.fixture
def five(tmp_path):
    """A data set: the images of CAPTIONS; all but the third with one to four detections."""
    root = tmp_path / "five"
    for i, (name, size) in enumerate(zip(CAPTIONS, [*SIZES, (40, 40), (33, 50)], strict=True)):
        stem = name.removesuffix(".tif")
        write_image(root / "imgs" / f"{stem}.png", size)
        if i != 2:
            boxes = [box(5 + 6 * j + i, 7 + 5 * j, 6 + i, 4 + j, 0.3 * j) for j in range(1 + i % 4)]
            write_detections(root / "det_json" / f"{stem}.json", boxes)
    write_karpathy(root, {"train": CAPTIONS, "val": {"a.tif": ("a ship",)}})
    return root


def equal_batches(first, second):
    """Assert that two iterables of batches are the same to the bit, and not empty."""
    first, second = list(first), list(second)
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


def save_archive(network, image_size, path):
    """Write a CLIP as a TorchScript archive, as OpenAI does: its activation is certain."""
    inputs = {
        "encode_image": torch.zeros(1, 3, image_size, image_size),
        "encode_text": torch.zeros(1, 77, dtype=torch.long),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates TorchScript
        torch.jit.save(torch.jit.trace_module(network.eval(), inputs, check_trace=False), path)


@pytest.fixture
def plain_clip(tmp_path):
    """Path of an archive of weights whose shapes are those of models/small.json."""
    torch.manual_seed(0)
    network = CLIP(model_configs.read_model_config("small"))
    save_archive(network, 96, tmp_path / "plain.pt")
    return tmp_path / "plain.pt"


@pytest.fixture
def save_tiny(tmp_path, tiny_model_config):
    """Writes a small model's checkpoint: save_tiny("a.pth", "--seed", "1", epoch=7)."""

    def save(name, *arguments, **state):
        from train import parse  # here, so that only these tests need all of training

        graph = [] if "--graph" in arguments else ["--graph", "object"]
        options = parse([*graph, *arguments])[0]
        labels = read_label_map(options["labels"] or LABELS).lines
        torch.manual_seed(options["seed"])
        network = model.build(tiny_model_config, labels, options)
        model.save_checkpoint(tmp_path / name, network, tiny_model_config, labels, options, **state)
        return tmp_path / name

    return save


# ------------------------------------------------------------------ training runs

RESNET = {"width": 8, "layers": [1, 1, 1, 1], "heads": 4}


@pytest.fixture
def run(mini, tmp_path, cache_folder, tiny_model_config, monkeypatch):
    """Trains a tiny model: run("--epochs", "2", vision=...); returns its folder."""
    import train  # here, so that only these tests need all of training
    import training.step as learner

    def start(*arguments, out="out", vision=None, overwrite=True):
        model_config = {**tiny_model_config, "vision": vision or tiny_model_config["vision"]}
        monkeypatch.setattr(learner, "read_model_config", lambda name: model_config)
        fixed = ["--dataset", "mini", "--data-root", str(mini)]
        folder = ["--out", str(tmp_path / out)] if out else []
        folder += ["--overwrite"] if overwrite else []
        device = [] if "--device" in arguments else ["--device", "cpu"]
        graph = [] if {"--graph", "--resume"} & {*arguments} else ["--graph", "object"]
        small = ["--augment", *device, *graph, "--batch-size", "8", "--epochs", "1"]
        train.main([*fixed, *folder, *small, *arguments])
        return tmp_path / out if out else None

    return start


@pytest.fixture
def started(monkeypatch):
    """The weights that training starts from, once it has run."""
    import train

    before, start = {}, train.start_model

    def remember(*arguments):
        network, *rest = start(*arguments)
        before.update({k: v.clone() for k, v in network.state_dict().items()})
        return network, *rest

    monkeypatch.setattr(train, "start_model", remember)
    return before


@pytest.fixture
def pretrained(tmp_path, tiny_model_config, monkeypatch):
    """The path of a CLIP archive, and its state dict, of a model config that clip.load knows."""
    monkeypatch.setattr(model_configs, "model_config_names", lambda: ["tiny"])
    monkeypatch.setattr(model_configs, "read_model_config", lambda name: tiny_model_config)
    torch.manual_seed(7)
    network = CLIP(tiny_model_config)
    path = tmp_path / "clip.pt"
    save_archive(network, IMAGE_SIZE, path)
    return path, network.state_dict()


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text("utf-8").splitlines()]


def weights_of(folder, name="last.pth"):
    return model.load_checkpoint(folder / name)[1]["weights"]


def changed(before, after):
    """Names of the weights that differ."""
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def is_new(name):
    return name.split(".")[0] in {"node_projection", "gcn1", "gcn2", "gcn3", "mlp", "gate"}
