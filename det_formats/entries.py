"""What the readers of other programs' formats share.

A reader is a module with

    SUFFIX      of its files; a tuple where there are several
    UNLISTED    what an image means that no file tells of: "empty", looked at and nothing found, or
                "missing", not looked at
    entries(file, image)              the Entries of a file; image: the name that its own tells
    detection(content, size, hints)   an Entry's content as a Detection; size: of its image, pixels

A reader of map coordinates has a third function:

    georeference(path)                of an image file: what `detection` gets in place of the size

All raise ValueError that says what was expected; `detections.py` adds file and place.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

from det_formats.det_json import LARGEST


class Entry(NamedTuple):
    """What a file says of an object, as it stands there."""

    image: str  # name of the image
    place: str  # in the file: "line 3"
    content: object  # None: nothing but that the image was looked at


class Detection(NamedTuple):
    """An object: its label, its score, and either a box or points around it, in pixels."""

    label: str
    score: float = 1.0  # of annotations, which have none
    box: tuple | None = None  # (cx, cy, w, h, angle) as in our files
    points: list | None = None  # (x, y) each, three or more


class Hints(NamedTuple):
    """What the user says of a format that its files do not tell."""

    names: list | None  # of classes, by number
    angle_version: str  # of mmrotate


def text_of(file):
    """The text of a file; ValueError where it is none."""
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"expected text in UTF-8: {error}") from None
    if "\0" in text:
        raise ValueError("a NUL character, so no text")
    return text


def json_of(file):
    """What a JSON file holds; ValueError where it is none."""
    try:
        return json.loads(text_of(file), object_pairs_hook=_with_keys_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected JSON: {error}") from None


def _with_keys_once(pairs):
    """A JSON object as a dict; ValueError where a key stands twice, of which one would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r:.60} stands twice in an object")
    return found


def member(values, key, kind):
    """What a JSON object holds by a key: a dict, list or str; ValueError where it is none."""
    value = values.get(key) if isinstance(values, dict) else None
    if not isinstance(value, kind):
        raise ValueError(f"expected {key!r}, {_KINDS[kind]}, found {value!r:.60}")
    return value


_KINDS = {dict: "an object", list: "a list", str: "a text"}


def lines_of(file, image):
    """Entries of a text file with an object a line, whose content is the line's fields.

    The first one has no content: an empty file is an image without objects.
    """
    yield Entry(image, "line 1", None)
    for number, line in enumerate(text_of(file).splitlines(), start=1):
        fields = line.split()
        if fields:
            yield Entry(image, f"line {number}", fields)


def numbers(values, count=None):
    """Values, texts or numbers, as floats; ValueError for others, and for another count."""
    values = list(values) if isinstance(values, (list, tuple)) else [values]
    if count is not None and len(values) != count:
        raise ValueError(f"expected {count} numbers, found {len(values)}")
    try:
        found = [float(value) for value in values]
    except (TypeError, ValueError, OverflowError):
        found = [math.nan]
    # Sums are quick to look at, and tell at once that nearly all values are sound.
    if not sum(map(abs, found)) < LARGEST or bool in map(type, values):
        _require_numbers(values)
    return found


def _require_numbers(values):
    """Raise ValueError for the first value that is no number of sensible size."""
    for value in values:
        try:
            is_sound = not isinstance(value, bool) and abs(float(value)) < LARGEST
        except (TypeError, ValueError, OverflowError):
            is_sound = False
        if not is_sound:
            raise ValueError(f"expected a number below 1e9 in size, found {value!r:.60}")


def points_of(values):
    """(x, y) points of numbers in a row; ValueError where these are no three points or more."""
    values = numbers(values)
    if len(values) < 6 or len(values) % 2:
        raise ValueError(f"expected x and y of three points or more, found {len(values)} numbers")
    return list(zip(values[::2], values[1::2], strict=True))


def name_of(number, hints):
    """The name of a class by its number; ValueError for one that has none."""
    [value] = numbers(number)
    if value != int(value) or not 0 <= value < len(hints.names):
        raise ValueError(f"class {number!r:.60}: --names has classes 0 to {len(hints.names) - 1}")
    return hints.names[int(value)]
