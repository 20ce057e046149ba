"""mmrotate's results: rows cx, cy, w, h, theta, score of each class, in pixels and radians.

    {"a.png": [rows of class 0, rows of class 1, ...], ...}    JSON, one file for all images
    [rows of class 0, rows of class 1, ...]                    JSON, a file an image, of its name
    a.png/0, a.png/1, ...                                      arrays (n, 6) of numpy.savez

Every image has each class, with no rows where nothing was found: its number is its place. theta
turns the side w from +x towards +y, as in our files. The angle versions differ in its range only,
by which it is checked.
"""

import math
from collections import Counter
from pathlib import Path

import numpy as np

from det_formats.entries import Detection, Entry, json_of, numbers
from escaping import escaped

SUFFIX = (".json", ".npz", ".pkl")  # the last is refused, with a way out
UNLISTED = "missing"

SLACK = 1e-3  # radians: angles are of 32 or 16 bits
RANGES = {  # of theta, in pi
    "le90": (-0.5, 0.5),
    "le135": (-0.25, 0.75),
    # Of annotations (0, 0.5] in mmrotate 0.x and [-0.5, 0) in 1.x; a detector's own angles are not
    # brought back into it.
    "oc": (-0.5, 1.0),
}

PICKLE = "\n".join(
    (
        "a pickle can run code, so it is not read. One of mmrotate 0.x that you trust: by Python, "
        'with names = [one["filename"] for one in build_dataset(cfg.data.test).data_infos]:',
        'import numpy, pickle; results = pickle.load(open("results.pkl", "rb")); '
        "assert len(results) == len(names)",
        'numpy.savez("results.npz", **{f"{name}/{i}": rows for name, classes in '
        "zip(names, results) for i, rows in enumerate(classes)})",
    )
)


def entries(file, image):
    suffix = Path(file).suffix.lower()
    if suffix == ".pkl":
        raise ValueError(PICKLE)
    if suffix == ".npz":
        by_image = _by_image(_arrays_of(file))
    else:
        content = json_of(file)
        by_image = content if isinstance(content, dict) else {image: content}
    for name, classes in by_image.items():
        if not isinstance(classes, list) or not all(isinstance(rows, list) for rows in classes):
            raise ValueError(f"{escaped(name)}: expected a list of rows for each class")
    for name, classes in by_image.items():
        yield Entry(name, escaped(name), None)
        for number, rows in enumerate(classes):
            for i, row in enumerate(rows):
                place = f"{escaped(name)}, class {number}, row {i}"
                yield Entry(name, place, (number, len(classes), row))


def _arrays_of(file):
    """{key: nested lists} of a file of numpy.savez."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return {key: arrays[key].tolist() for key in arrays.files}
    except Exception as error:  # zipfile, zlib and numpy have several kinds for damaged files
        raise ValueError(f"expected arrays of numpy.savez: {error}") from None


def _by_image(arrays):
    """{image: [rows of class 0, ...]} of arrays by their keys."""
    found = {}
    for name, count in Counter(key.rpartition("/")[0] for key in arrays).items():
        keys = [f"{name}/{number}" for number in range(count)]
        missing = [key for key in keys if key not in arrays]
        if missing:
            raise ValueError(
                f"no array '{escaped(missing[0])}'; expected image.png/0, image.png/1 and so on, "
                "of every class, without rows where nothing was found"
            )
        found[name] = [arrays[key] for key in keys]
    return found


def detection(content, size, hints):
    number, count, row = content
    if count != len(hints.names):
        raise ValueError(f"classes: {count} here, {len(hints.names)} in --names")
    *box, score = numbers(row, 6)
    low, high = RANGES[hints.angle_version]
    if not low * math.pi - SLACK <= box[4] <= high * math.pi + SLACK:
        raise ValueError(
            f"angle {box[4]:.6g}: expected {low} pi to {high} pi radians, the range of "
            f"{hints.angle_version}; --angle-version or the unit is another"
        )
    return Detection(label=hints.names[number], score=score, box=tuple(box))
