"""A folder of images, and the folder of their detections that mirrors it: find, write, check."""

import itertools
from collections import Counter
from pathlib import Path, PurePosixPath

import numpy as np

from dataset.images import (
    fault_of,
    files_below,
    find_image,
    index_images,
    match_detections,
    require_detection_folder,
    size_of,
    without_suffix,
)
from det_formats import sanity
from det_formats.det_json import load_detections
from det_formats.geometry import are_outside
from escaping import escaped
from progress import Progress
from writing import write_text

SHOWN = 20  # problems that an error or a report lists on the terminal


class ImageFolder:
    """The images below a folder: found by name, their sizes read once."""

    def __init__(self, root):
        self.root = Path(root)
        if not self.root.is_dir():
            raise ValueError(f"{escaped(root)}: no such folder; check --images")
        self.index = index_images(self.root)
        self.paths = sorted(itertools.chain.from_iterable(self.index.values()))
        if not self.paths:
            raise ValueError(f"{escaped(root)}: no image below it; check --images")
        self._require_own_files()
        self._found = {}  # by name
        self._sizes = {}  # by path

    def _require_own_files(self):
        """Raise ValueError where two images would have one file of detections."""
        owners = {}
        for path in self.paths:
            first = owners.setdefault(detection_name(path), path)
            if first != path:
                both = f"{escaped(first)} and {escaped(path)}"
                raise ValueError(f"{both} would share one file of detections; rename one")

    def find(self, name):
        """The path of the image that a name means; ValueError as of `images.find_image`."""
        if name not in self._found:
            self._found[name] = find_image(name, self.index, self.root)
        return self._found[name]

    def like(self, name):
        """The paths of all images that a name may mean, by their stem alone."""
        return self.index.get(without_suffix(name).name, [])

    def size(self, path):
        """(width, height) of an image in pixels; ValueError where it is not readable."""
        if path not in self._sizes:
            self._sizes[path] = size_of(self.root / path)
        return self._sizes[path]


def detection_name(path):
    """The path of an image's file of detections, below their folder."""
    return PurePosixPath(path).with_suffix(".json").as_posix()


def read_folder(folder, images):
    """{image path: detections} of the images of an ImageFolder that have a file, in their order.

    Raises one ValueError for all files that cannot be read.
    """
    require_detection_folder(folder, option="DET_JSON")
    files = match_detections(images.paths, folder)
    found = {}
    problems = []
    for path, file in Progress(files.items(), "read", "files"):
        try:
            if file is not None:
                found[path] = load_detections(file)
        except ValueError as error:
            problems.append(str(error))
    require_none(problems, "files cannot be read", "mend them")
    return found


def write_texts(texts, out, overwrite=False):
    """Write {name: text} below a folder; returns how many were not there, or were others.

    Raises ValueError before anything is written where a file has other content, but with overwrite.
    """
    new = {}
    others = []
    for name, text in Progress(texts.items(), "compare", "files"):
        path = Path(out) / name
        if not path.exists():
            new[name] = text
        elif path.read_text(encoding="utf-8", errors="replace") != text:
            new[name] = text
            others.append(escaped(path))
    if not overwrite:
        require_none(others, "files have other content", "name another --out, or give --overwrite")
    for name, text in Progress(new.items(), "write", "files"):
        write_text(Path(out) / name, text, flush=False)
    return len(new)


def require_none(problems, what, remedy):
    """Raise one ValueError for problems, with the first ones."""
    if problems:
        raise ValueError(
            "\n  ".join([f"{len(problems)} {what}; {remedy}:", *first_lines(problems)])
        )


def first_lines(lines):
    """The first lines, and how many more there are."""
    more = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return [*lines[:SHOWN], *more]


# ------------------------------------------------------------------ checks


def findings_of(detections, images):
    """What seems wrong with boxes, by `sanity.findings`, in words.

    detections: {image path: detections} of an ImageFolder. Images that cannot be read do not count.
    """
    boxes = {}
    sizes = {}
    for path, own in detections.items():
        if own:
            boxes[path] = [one["bbox"] for one in own]
            try:
                sizes[path] = images.size(path)
            except ValueError:  # as a GeoTIFF of twelve bands
                sizes[path] = None
    return [f"{kind}: {evidence}" for kind, evidence in sanity.findings(boxes, sizes)]


def check_folder(folder, images):
    """What is right and wrong with a folder of detections, as a dict for JSON.

    "errors" are lines: files or images that cannot be read, boxes wholly outside of their image,
    the same box twice. "warnings" are lines too: `findings_of`. The rest is counted.
    """
    require_detection_folder(folder, option="DET_JSON")
    files = match_detections(images.paths, folder)
    used = {file for file in files.values() if file is not None}
    below = [Path(folder) / name for name in files_below(folder) if name.endswith(".json")]
    errors = []
    found = {}
    labels = Counter()
    for path, file in Progress(files.items(), "check", "images"):
        fault = fault_of(images.root / path)
        if fault is not None:
            errors.append(fault)
        if file is None:
            continue
        try:
            detections = load_detections(file)
        except ValueError as error:
            errors.append(str(error))
            continue
        found[path] = detections
        labels.update(one["label"] for one in detections)
        size = images.size(path) if fault is None else None
        errors += [f"{escaped(file)}: {line}" for line in _faults(detections, size)]
    return {
        "images": len(images.paths),
        "images_with_file": len(used),
        "images_with_objects": sum(bool(own) for own in found.values()),
        "images_without_file": [path for path, file in files.items() if file is None],
        "files_without_image": [
            str(file.relative_to(folder)) for file in below if file not in used
        ],
        "objects": sum(labels.values()),
        "labels": dict(labels.most_common()),
        "errors": errors,
        "warnings": findings_of(found, images),
    }


def _faults(detections, size):
    """Lines for the boxes of an image that cannot be right; size: (width, height), or None."""
    lines = []
    if detections and size is not None:
        for i in np.flatnonzero(are_outside([one["bbox"] for one in detections], size)):
            lines.append(f"entry {i}: wholly outside of the image of {size[0]} x {size[1]} pixels")
    first = {}
    for i, one in enumerate(detections):
        same = first.setdefault((one["label"], *np.round(one["bbox"][:5], 6)), i)
        if same != i:
            lines.append(f"entry {i}: the same box as entry {same}")
    return lines
