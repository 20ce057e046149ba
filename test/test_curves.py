"""Learning curves, read back as pixels."""

import sys

import numpy as np
import pytest
from PIL import Image

from training import curves


def test_learning_curves_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    lines = [{"epoch": e, "loss": 1 / e, "val_mR": 10.0 * e} for e in (1, 2, 3)]
    curves.plot_log(lines, tmp_path / "new" / "curve.png")
    with Image.open(tmp_path / "new" / "curve.png") as image:
        pixels = np.asarray(image.convert("RGB"))
        assert image.format == "PNG"
    coloured = np.ptp(pixels.astype(int), axis=2).max(axis=1) > 60  # rows with a curve in them
    half = len(pixels) // 2
    assert coloured[:half].any() and coloured[half:].any()
    curves.plot_log(lines[:1], tmp_path / "one.png")
    with pytest.raises(ValueError, match="no epoch"):
        curves.plot_log([], tmp_path / "none.png")


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match="--plot: pip install matplotlib"):
        curves.require_matplotlib()
