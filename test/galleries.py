"""Small folders of images with detections and indexes of them, for the tests of search.py."""

import numpy as np

import search
from conftest import box, write_detections, write_image

LABELS = ("airplane", "ship", "storage tank")


def write_tiles(folder, number=12, size=(48, 40)):
    """`imgs/` with images, some in folders, and `dets/`, where every fourth has no file."""
    rng = np.random.default_rng(0)
    for i in range(number):
        name = f"{'north/' if i % 3 == 0 else ''}t{i:02d}"
        write_image(folder / "imgs" / f"{name}.png", size)
        if i % 4 == 3:
            continue
        boxes = [box(*rng.uniform(4, 36, 2), 8, 5, rng.uniform(0, 3)) for _ in range(i % 5)]
        write_detections(folder / "dets" / f"{name}.json", boxes, LABELS[i % 3])
    return folder


def index(folder, checkpoint, *arguments, out="index", expect=0):
    """Run `search.py index` over a folder of `write_tiles`; the path of the index."""
    code = search.main(
        [
            "index", str(folder / "imgs"), "--out", str(folder / out), "--device", "cpu",
            "--det-json", str(folder / "dets"), "--checkpoint", str(checkpoint),
            "--precision", "fp32", *arguments,
        ]
    )  # fmt: skip
    assert code == expect
    return folder / out
