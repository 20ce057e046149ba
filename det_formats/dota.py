"""DOTA (Xia et al. 2018): label files, a file an image, and result files, a file a class.

    x1 y1 x2 y2 x3 y3 x4 y4 label difficulty [score]     of labels, in pixels
    image score x1 y1 x2 y2 x3 y3 x4 y4                  of results, in Task1_<label>.txt

The score of label files is ours, so that there and back keeps it.
"""

from pathlib import Path

from det_formats.entries import Detection, Entry, lines_of, numbers, points_of
from det_formats.foreign import is_number
from det_formats.geometry import corners_of

SUFFIX = ".txt"
UNLISTED = "empty"
RESULTS = "Task1_"
HEAD = ("imagesource:", "gsd:")


def entries(file, image):
    label = Path(file).stem
    if not label.startswith(RESULTS):
        for entry in lines_of(file, image):
            if entry.content is None or not entry.content[0].startswith(HEAD):
                yield entry
        return
    for _, place, fields in lines_of(file, image):
        if fields is not None:
            score = fields[1:2]
            as_labels = [*fields[2:], label.removeprefix(RESULTS), "0", *score]
            yield Entry(fields[0], place, as_labels)


def detection(content, size, hints):
    if len(content) not in (9, 10, 11):
        raise ValueError(f"expected eight coordinates and a label, found {len(content)} fields")
    if is_number(content[8]):
        raise ValueError(f"expected a label behind the coordinates, found {content[8]:.60}")
    if len(content) > 9 and not content[9].isdecimal():
        raise ValueError(f"expected the difficulty behind the label, found {content[9]:.60}")
    [score] = numbers(content[10]) if len(content) == 11 else [1.0]
    return Detection(label=content[8], score=score, points=points_of(content[:8]))


def written(detections, size, names, with_scores):
    """The text of an image's label file; a label's spaces become hyphens, as in DOTA."""
    corners = corners_of([one["bbox"] for one in detections]) if detections else []
    lines = []
    for one, own in zip(detections, corners, strict=True):
        places = " ".join(repr(float(value)) for value in own.flat)
        score = f" {one['bbox'][5]!r}" if with_scores else ""
        lines.append(f"{places} {'-'.join(one['label'].split())} 0{score}\n")
    return "".join(lines)
