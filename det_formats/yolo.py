"""YOLO's upright boxes, a file an image: `yolo predict ... save_txt save_conf` writes them.

    class cx cy w h [score [track]]     centre and size as fractions of the image

Numbers have six digits. Where nothing is found, no file is written. A box that lies wholly in the
border around an image has a width or height of 0 there, and is refused as no box.
"""

from det_formats.entries import Detection, lines_of, name_of, numbers

SUFFIX = ".txt"
UNLISTED = "empty"

entries = lines_of


def detection(content, size, hints):
    if len(content) not in (5, 6, 7):
        raise ValueError(f"expected a class, centre and size, found {len(content)} fields")
    width, height = size
    cx, cy, w, h = numbers(content[1:5])
    score = score_of(content[5:])
    box = (cx * width, cy * height, w * width, h * height, 0.0)
    return Detection(label=name_of(content[0], hints), score=score, box=box)


def score_of(fields):
    """The score in what follows a box; 1.0 where nothing does.

    Raises ValueError for one above 1, as the number of a track is: `yolo track` without save_conf
    writes it in the score's place. The track 1 cannot be told from a score of 1.
    """
    if not fields:
        return 1.0
    [score] = numbers(fields[0])
    if len(fields) > 1 and not fields[1].isdecimal():
        raise ValueError(
            f"expected the number of a track behind the score, found {fields[1]:.60}; outlines of "
            "segmentation are no boxes"
        )
    if score > 1:
        raise ValueError(
            f"expected a score in 0 to 1, found {fields[0]:.60}; of tracks write scores, too, by "
            "save_conf=True"
        )
    return score
