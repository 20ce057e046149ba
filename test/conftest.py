"""Shared fixtures: devices, real data where FGCROSS_DATA names them, small models."""

import os
from pathlib import Path

import pytest
import torch

import model
from V_Graph import read_labels

ROOT = Path(__file__).parent.parent
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
