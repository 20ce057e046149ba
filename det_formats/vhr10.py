"""NWPU VHR-10's ground truth (Cheng et al. 2014), a file an image.

(x1,y1),(x2,y2),class     the upper left and the lower right corner, in pixels; class 1 to 10
"""

import re

from det_formats.entries import Detection, lines_of, numbers

SUFFIX = ".txt"
UNLISTED = "missing"
CLASSES = (
    "airplane",
    "ship",
    "storage tank",
    "baseball diamond",
    "tennis court",
    "basketball court",
    "ground track field",
    "harbor",
    "bridge",
    "vehicle",
)

VALUE = r" ?([^(), ]+) ?"  # the data set's own files have a space before many numbers
CORNER = rf"\({VALUE},{VALUE}\)"
LINE = re.compile(rf"{CORNER} ?, ?{CORNER} ?,{VALUE}")

entries = lines_of


def detection(content, size, hints):
    line = " ".join(content)
    found = LINE.fullmatch(line)
    if not found:
        raise ValueError(f"expected (x1,y1),(x2,y2),class, found {line!r:.60}")
    x1, y1, x2, y2, number = numbers(found.groups())
    if number not in range(1, len(CLASSES) + 1):
        raise ValueError(f"expected a class from 1 to {len(CLASSES)}, found {found[5]!r:.60}")
    box = ((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1, 0.0)
    return Detection(label=CLASSES[int(number) - 1], box=box)
