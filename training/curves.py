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
    epochs = [line["epoch"] for line in lines]
    names = {"loss": "loss", "val_mR": "validation mR"}
    for axes, key in zip(figure.subplots(2, sharex=True), names, strict=True):
        axes.plot(epochs, [line[key] for line in lines], marker=".")
        axes.set(xlabel="epoch", ylabel=names[key])
        axes.grid(alpha=0.3)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=120)


def require_packages(options):
    """Raise ValueError, before any work, where an option needs a package that is missing."""
    for option, package in (("plot", "matplotlib"), ("tensorboard", "tensorboard")):
        if options[option] and importlib.util.find_spec(package) is None:
            raise ValueError(f"--{option}: pip install {package}, or leave it out")


def curves(options, out, epoch):
    """A function that draws the log's lines as --tensorboard and --plot say."""
    writer = None
    if options["tensorboard"]:
        from torch.utils.tensorboard import SummaryWriter  # large, and needed here alone

        writer = SummaryWriter(out / "tensorboard", purge_step=epoch)

    def draw(lines):
        if writer:
            for name in ("loss", "val_mR", "logit_scale", "data_seconds", "compute_seconds"):
                writer.add_scalar(name, lines[-1][name], lines[-1]["epoch"])
            writer.flush()
        if options["plot"]:
            plot_log(lines, out / "curve.png")

    return draw
