"""Row of bench.py: from the command line to the printed matrix."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import model
from backbones.model_configs import read_model_config
from benchmarks.frame import compared, require_equal
from benchmarks.indexing import random_model

ROOT = Path(__file__).parent.parent


def startup(device, small):
    """`python infer.py` on the five sample images against the import of torch alone.

    Ours does the import and more, so the ratio is below 1: at 0.5 it takes twice as long. The model
    is "small" with random weights, and no run knows features of an earlier one.
    """
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        network, checkpoint = random_model(read_model_config("small"), "cpu")
        file = Path(folder, "model.pth")
        fields = [checkpoint[name] for name in ("definition", "labels", "options")]
        model.save_checkpoint(file, network, *fields)

        def run(*arguments):
            environment = {**os.environ, "FGCROSS_CACHE": tempfile.mkdtemp(dir=folder)}
            # Compiled modules stay on the disk, as they do for everybody else.
            environment.pop("PYTHONDONTWRITEBYTECODE", None)
            done = subprocess.run(
                [sys.executable, *arguments],
                cwd=ROOT,
                env=environment,
                capture_output=True,
                text=True,
            )
            if done.returncode != 0:
                raise RuntimeError(f"bench: {' '.join(arguments)}: {done.stderr.strip()}")
            return done.stdout

        printed = set()

        def matrix():
            printed.add(run("infer.py", "--checkpoint", str(file), "--device", str(device)))

        result = compared(
            "infer.py, model small, 5 images and 5 sentences",
            {"python infer.py": matrix, "import torch": lambda: run("-c", "import torch")},
            repetitions=1 if small else 5,
        )
        shown = next(iter(printed))
        is_whole = "Similarity Score Matrix" in shown and "Query 5:" in shown
        require_equal(is_whole and len(printed) == 1, "the matrices of all runs")
    return [result]
