"""YOLO's oriented boxes, a file an image: `yolo obb predict ... save_txt save_conf` writes them.

    class x1 y1 x2 y2 x3 y3 x4 y4 [score [track]]     corners as fractions of the image

Numbers have six digits; corners may lie outside of the image. Where nothing is found, no file is
written. The program's versions have several ranges of angles, so it is good that it writes none.
"""

from det_formats.entries import Detection, lines_of, name_of, points_of
from det_formats.geometry import corners_of
from det_formats.yolo import score_of

SUFFIX = ".txt"
UNLISTED = "empty"

entries = lines_of


def detection(content, size, hints):
    if len(content) not in (9, 10, 11):
        raise ValueError(f"expected a class and eight coordinates, found {len(content)} fields")
    corners = [(x * size[0], y * size[1]) for x, y in points_of(content[1:9])]
    score = score_of(content[9:])
    return Detection(label=name_of(content[0], hints), score=score, points=corners)


def written(detections, size, names, with_scores):
    """The text of an image's file; names: of all classes, by number.

    with_scores: as predictions have them; tools that show labels take lines without alone.
    """
    corners = corners_of([one["bbox"] for one in detections]) if detections else []
    lines = []
    for one, own in zip(detections, corners, strict=True):
        places = " ".join(repr(float(value)) for value in (own / size).flat)
        score = f" {one['bbox'][5]!r}" if with_scores else ""
        lines.append(f"{names.index(one['label'])} {places}{score}\n")
    return "".join(lines)
