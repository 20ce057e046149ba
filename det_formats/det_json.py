"""The project's own format of detections: labels, reading, checking."""

import json
import warnings
from pathlib import Path

LABELS = Path(__file__).parent.parent / "det_json" / "labels.txt"


class LabelMap:
    """Label names and aliases to slots 0 ... K - 2; anything else shares the last, "other"."""

    def __init__(self, lines):
        self.lines = [line.strip() for line in lines if line.strip() and line.strip()[0] != "#"]
        self._class_ids = {}
        for class_id, line in enumerate(self.lines):
            for name in line.split(","):
                if self._class_ids.setdefault(_fold(name), class_id) != class_id:
                    raise ValueError(f"labels: '{name.strip()}' stands in two lines; remove one")
        self._known = dict(self._class_ids)

    def __len__(self):
        return len(self.lines) + 1

    def class_id(self, label):
        """Slot of a label. A label that is in no line is reported once and takes "other"."""
        if label not in self._known:
            folded = _fold(label)
            if folded not in self._class_ids:
                warnings.warn(f"unknown label '{label}' takes the slot 'other'", stacklevel=2)
            self._known[label] = self._class_ids.get(folded, len(self.lines))
        return self._known[label]


def _fold(name):
    return "".join(c for c in name.casefold() if c not in " -_\t")


def read_label_map(path=LABELS):
    """The vocabulary in a file like `det_json/labels.txt`."""
    try:
        return LabelMap(Path(path).read_text(encoding="utf-8-sig").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: not readable as a label file; check --labels ({error})"
        ) from None


def _number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9


def _check(entry, fail):
    """One entry as {"label", "bbox": six floats}; calls fail(field, expected, found)."""
    if not isinstance(entry, dict):
        fail("entry", 'an object with "label" and "bbox"', entry)
    label, box = entry.get("label"), entry.get("bbox")
    if not isinstance(label, str) or not label.strip():
        fail("label", "a non-empty string", label)
    if isinstance(box, list) and len(box) == 5 and "score" in entry:
        box = [*box, entry["score"]]
    if not isinstance(box, list) or len(box) != 6:
        fail("bbox", '[cx, cy, w, h, angle, score], or five numbers and a "score"', box)
    for name, value in zip(("cx", "cy", "w", "h", "angle", "score"), box, strict=True):
        if not _number(value):
            fail(f"bbox {name}", "a number below 1e9 in size", value)
    if min(box[2:4]) < 1e-6:
        fail("bbox w, h", "sizes above 0, at least 1e-6 pixels", box[2:4])
    if not 0 <= box[5] <= 1:
        fail("score", "a number in [0, 1], the last of bbox", box[5])
    return {"label": label, "bbox": [float(value) for value in box]}


def load_detections(path):
    """Read and check one detection file.

    Returns a list of {"label": str, "bbox": [cx, cy, w, h, angle, score]}, empty for an image
    without objects. Raises ValueError that names file, entry, field and what was expected.
    """
    path = Path(path)
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON in UTF-8: {error}") from None
    if not isinstance(entries, list):
        raise ValueError(f"{path}: expected a list of detections, found {type(entries).__name__}")
    detections = []
    for i, entry in enumerate(entries):

        def fail(field, expected, found, i=i):
            raise ValueError(f"{path}: entry {i}: {field}: expected {expected}, found {found!r}")

        detections.append(_check(entry, fail))
    return detections
