"""Sentences made from the boxes of training images, as further training text.

The rule is RemoteCLIP's (Liu et al. 2024): what lies in the middle of the image, and how many there
are of each kind. It is the rival of an object graph: the same detections, told to the text tower.
"""

import json
import os
from collections import Counter
from pathlib import Path

from PIL import Image

from dataset.annotations import read_annotations
from dataset.images import find_image, index_images, is_image, match_detections
from dataset.sentences import listed
from dataset.vocabulary import NUMBERS, plurals
from det_formats.det_json import load_detections
from writing import write_text

MOST = 10  # of a kind that are counted
MIDDLE = 0.25  # of the side, from the image's middle: what lies there is in the middle


def sentences_of(detections, size):
    """Up to two sentences about an image's detections; none where there are none.

    size: (width, height) in pixels. More than ten of a kind are "many".
    """
    if not detections:
        return []
    counts = Counter(_name(detection) for detection in detections)
    middle = Counter(_name(one) for one in detections if _is_in_middle(one["bbox"], size))
    result = [f"there are {_listing(counts)} in the image ."]
    if middle:
        result.append(f"{_listing(middle)} in the middle of the image .")
    return result


def _name(detection):
    return detection["label"].replace("_", " ").replace("-", " ").casefold()


def _is_in_middle(box, size):
    sides = zip(box, size, strict=False)
    return all(abs(centre / side - 0.5) < MIDDLE for centre, side in sides)


def _listing(counts):
    """As "two ships, a car and many planes", the most first."""
    return listed([_noun(name, count) for name, count in counts.most_common()])


def _noun(name, count):
    if count == 1:
        return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
    number = NUMBERS[count] if count <= MOST else "many"
    return f"{number} {plurals(name)[0]}"


def write(root, out, form, det_json):
    """Write a data root like another, its training images with sentences about their boxes too.

    form: of the annotations; det_json: the folder of detections. Images and detections are not
    copied: the new root has links to the old one's files. What is there already is left as it is.
    Raises ValueError where that was made from other folders.
    """
    root, out = Path(root), Path(out)
    source = json.dumps([str(root.resolve()), form, str(Path(det_json).resolve())])
    stamp = out / "made_from.json"
    if (out / "dataset.json").is_file():
        if not stamp.is_file() or stamp.read_text(encoding="utf-8") != source:
            raise ValueError(f"{out}: sentences of other boxes; remove it, or name another --out")
        return
    annotations = read_annotations(root, form)
    index = index_images(root)
    paths = [path for own in index.values() for path in own]
    files = match_detections(paths, det_json)
    entries = []
    for split, records in annotations.splits.items():
        for record in records:
            path = find_image(record.name, index, root)
            captions = list(record.captions)
            if split == "train" and files[path] is not None:
                with Image.open(root / path) as image:
                    captions += sentences_of(load_detections(files[path]), image.size)
            sentences = [{"raw": caption} for caption in captions]
            entries.append({"filename": path, "split": split, "sentences": sentences})
    out.mkdir(parents=True, exist_ok=True)
    for entry in sorted(root.iterdir()):
        if (entry.is_dir() or is_image(entry)) and not (out / entry.name).exists():
            os.symlink(entry.resolve(), out / entry.name, target_is_directory=entry.is_dir())
    write_text(stamp, source)
    write_text(out / "dataset.json", json.dumps({"images": entries}))
