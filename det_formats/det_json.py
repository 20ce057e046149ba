"""The project's own format of detections: labels, reading, checking, writing.

A file `det_json/<image stem>.json` is a JSON list of {"label": str, "bbox": [cx, cy, w, h, angle,
score]}, empty for an image without objects. Lengths are pixels of the original image, the angle is
in radians from the +x axis towards +y (y points down), the score lies in [0, 1].
`det_json/README.md` is the full description.

The contract of this folder: each module reads one format. Whatever the format, the result is a list
of detections as above, with six floats each, in the order of the file. No detection is skipped,
repaired or guessed: what is wrong raises one ValueError that names the file, the entry, the field
and what was expected. `write_detections` writes the result of any reader in our own format.
"""

import json
import warnings
from pathlib import Path

from det_formats.foreign import SHOWN, foreign_format
from escaping import escaped
from writing import write_text

LABELS = Path(__file__).parent.parent / "det_json" / "labels.txt"


BOX_FIELDS = ("cx", "cy", "w", "h", "angle", "score")


LARGEST = 1e9  # of any number: nothing in an image is that far away or that large


SMALLEST = 1e-6  # width or height in pixels


# ------------------------------------------------------------------ labels


class LabelMap:
    """Class ids of labels.

    lines: the lines of a label file. Each holds the names of one class, separated by commas; empty
    lines and comments (#) do not count. The names of line i have class id i. All other labels share
    the last of the K class ids, "other". Upper and lower case, spaces, - and _ make no difference.

    Raises ValueError for a name that stands in two lines.
    """

    def __init__(self, lines):
        stripped = [line.strip() for line in lines]
        self.lines = [line for line in stripped if line and not line.startswith("#")]
        self.other = len(self.lines)
        self._class_ids = {}  # by name without case, spaces, - and _
        self._known = {}  # by label as written: the labels that were asked for
        for class_id, line in enumerate(self.lines):
            for name in line.split(","):
                if self._class_ids.setdefault(_folded(name), class_id) != class_id:
                    raise ValueError(
                        f"labels: '{escaped(name.strip())}' stands in two lines; remove one"
                    )

    def __len__(self):
        return len(self.lines) + 1

    def names(self, class_ids):
        """The first name of each class id, as a list."""
        lines = [*self.lines, "other"]
        return [lines[class_id].split(",")[0].strip() for class_id in class_ids]

    def knows(self, label):
        """Whether a line names a label."""
        return _folded(label) in self._class_ids

    def class_id(self, label):
        """Class id of a label. A label that no line names is reported once and gets "other"."""
        if label not in self._known:
            class_id = self._class_ids.get(_folded(label), self.other)
            if class_id == self.other:
                shown = escaped(label)
                warnings.warn(f"unknown label '{shown}': in no line of the label map", stacklevel=2)
            self._known[label] = class_id
        return self._known[label]


def _folded(name):
    return "".join(character for character in name.casefold() if character not in " -_\t")


def read_label_map(path=LABELS):
    """The LabelMap of a file like `det_json/labels.txt`.

    Raises ValueError where it cannot be read, holds a NUL character or names no label.
    """
    shown = escaped(path)
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{shown}: not readable as a label file; check --labels ({error})"
        ) from None
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise ValueError(f"{shown}: line {line}: a NUL character, so no text; check --labels")
    try:
        label_map = LabelMap(text.splitlines())
    except ValueError as error:
        raise ValueError(f"{shown}: {error}") from None
    if not label_map.lines:
        raise ValueError(f"{shown}: no label in it; expected the names of a class a line")
    return label_map


# ------------------------------------------------------------------ checking


def check_detections(entries, path):
    """The entries of a file as a list of detections, with six floats each.

    A box may have five numbers where the entry has a "score" beside it. path: the file that an
    error names. Raises ValueError for the first entry that is no detection.
    """
    if not isinstance(entries, list):
        raise ValueError(f"{path}: expected a list of detections, found {type(entries).__name__}")
    return [_check_entry(entry, f"{path}: entry {i}") for i, entry in enumerate(entries)]


def _check_entry(entry, place):
    if not isinstance(entry, dict):
        raise _wrong(place, "entry", 'an object with "label" and "bbox"', entry)
    label = entry.get("label")
    if not isinstance(label, str) or not label.strip():
        raise _wrong(place, "label", "a non-empty string", label)
    box = entry.get("bbox")
    if isinstance(box, list) and len(box) == 5 and "score" in entry:
        box = [*box, entry["score"]]
    if not isinstance(box, list) or len(box) != 6:
        expected = '[cx, cy, w, h, angle, score], or five numbers and a "score"'
        raise _wrong(place, "bbox", expected, box)
    # Sums are quick to look at, and tell at once that nearly all boxes are sound.
    if set(map(type, box)) != {float} or not sum(map(abs, box)) < LARGEST:
        for field, value in zip(BOX_FIELDS, box, strict=True):
            if not _is_number(value):
                raise _wrong(place, f"bbox {field}", "a number below 1e9 in size", value)
    _, _, w, h, _, score = box
    if w < SMALLEST or h < SMALLEST:
        raise _wrong(place, "bbox w, h", "sizes above 0, at least 1e-6 pixels", [w, h])
    if not 0 <= score <= 1:
        raise _wrong(place, "score", "a number in [0, 1], the last of bbox", score)
    return {"label": label, "bbox": list(map(float, box))}


def _is_number(value):
    """Whether a value is a number of sensible size: NaN and Infinity, which json reads, are not."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) < LARGEST


def _wrong(place, field, expected, found):
    return ValueError(f"{place}: {field}: expected {expected}, found {found!r}")


# ------------------------------------------------------------------ files


def load_detections(path):
    """Read and check one detection file.

    Returns a list of {"label": str, "bbox": [cx, cy, w, h, angle, score]}, empty for an image
    without objects. Raises ValueError that names file, entry, field and what was expected; a file
    of COCO, DOTA or YOLO is called so.
    """
    shown = escaped(path)
    try:
        content = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{shown}: expected JSON in UTF-8: {error}") from None
    except FileNotFoundError:
        raise ValueError(f"{shown}: no such file") from None
    except OSError as error:
        raise ValueError(f"{shown}: not readable as a file ({error.strerror})") from None
    try:
        entries = json.loads(content)
    except (ValueError, RecursionError) as error:
        _refuse_foreign(content, shown)
        raise ValueError(f"{shown}: expected JSON in UTF-8: {error}") from None
    try:
        return check_detections(entries, shown)
    except ValueError:
        _refuse_foreign(content, shown)
        raise


def _refuse_foreign(content, shown):
    """Raise ValueError where the text of a file is in a format of others."""
    foreign = foreign_format(content)
    if foreign:
        raise ValueError(f"{shown}: this is {foreign}; {SHOWN}") from None


def text_of_detections(detections):
    """The text of a file of detections, which have been checked: it is read back to the bit."""
    return json.dumps(detections)


def write_detections(path, detections):
    """Check detections and write them as one file, whole or not at all.

    Raises ValueError, and writes nothing, where `load_detections` would not accept one.
    """
    write_text(path, text_of_detections(check_detections(detections, path)))
