"""Learning curves of a training run."""

import importlib.util
from pathlib import Path


def plot_log(lines, path):
    """Draw loss and validation mR by epoch to a PNG file.

    lines: dicts of a log.jsonl, with epoch, loss and val_mR. Raises ValueError where there is no
    line, and where matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure  # large, and needed by this function alone
    except ImportError:
        raise ValueError(f"{path}: drawing needs matplotlib: pip install matplotlib") from None
    if not lines:
        raise ValueError(f"{path}: nothing to draw, the log has no epoch yet")
    figure = Figure(figsize=(7, 5), layout="constrained")
    upper, lower = figure.subplots(2, sharex=True)
    epochs = [line["epoch"] for line in lines]
    for axes, key, name in ((upper, "loss", "loss"), (lower, "val_mR", "validation mR")):
        axes.plot(epochs, [line[key] for line in lines], marker=".")
        axes.set(xlabel="epoch", ylabel=name)
        axes.grid(alpha=0.3)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=120)


def require_matplotlib():
    """Raise ValueError, before any work, where `plot_log` would later find no matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot: pip install matplotlib, or leave it out")
