"""Shared by the tests: devices, real data where FGCROSS_DATA names them, small models and sets."""

import json
import os
from pathlib import Path

import pytest
import torch

import model
import scenes
from V_Graph import read_labels

ROOT = Path(__file__).parent.parent
N_PX = 32
DEFINITION = {
    "image_size": N_PX,
    "text": {"context_length": 77},
}  # as far as data go
SIZES = ((64, 64), (96, 64), (64, 96))  # width, height: 96 or 128 pixels without rounding
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request):
    """Every device of this machine."""
    return torch.device(request.param)


@pytest.fixture(scope="session")
def real_data():
    """Folder of the real data sets; tests that need them skip where FGCROSS_DATA is unset."""
    folder = os.environ.get("FGCROSS_DATA")
    if not folder:
        pytest.skip("FGCROSS_DATA is unset: no real data on this machine")
    return Path(folder)


@pytest.fixture
def tiny_definition():
    """A model definition small enough for tests."""
    return {
        "name": "tiny",
        "embed_dim": 32,
        "image_size": 32,
        "vision": {"patch_size": 16, "width": 32, "layers": 2, "heads": 2},
        "text": {
            "context_length": 77,
            "vocab_size": 49408,
            "width": 32,
            "layers": 1,
            "heads": 2,
        },
    }


@pytest.fixture
def tiny_model(tiny_definition):
    """Builds a small FGCross with seeded random weights: tiny_model(fusion="gate")."""

    def build(**changes):
        torch.manual_seed(0)
        options = {"graph": "object", "fusion": "sum", "image_encoder_ratio": (0.5, 0.5), **changes}
        return model.build(tiny_definition, read_labels().lines, options).eval()

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
