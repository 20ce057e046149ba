"""Formats of others: tell a file of COCO, DOTA or YOLO detections by its content.

Nothing here reads detections; it is for errors that say what a file is. `convert` has the readers.
"""

import json
from pathlib import Path

COCO = "COCO: one JSON file for all images"
COCO_RESULTS = "COCO results: one JSON list for all images"
DOTA = "DOTA: four corners, a label and a difficulty a line"
YOLO = "YOLO: a class number and fractions of the image a line"

SHOWN = "python detections.py convert makes our format of it"


def foreign_format(content):
    """Which format of others the text of a file is in: one of the above, or None."""
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError):
        return _format_of_lines(content.splitlines())
    if isinstance(parsed, dict) and isinstance(parsed.get("annotations"), list):
        return COCO
    if isinstance(parsed, list) and parsed and isinstance(parsed[0], dict):
        if "image_id" in parsed[0] and "bbox" in parsed[0]:
            return COCO_RESULTS
    return _format_of_lines(content.splitlines())


def foreign_format_of_file(path):
    """`foreign_format` of a file; None for one that cannot be read as text."""
    try:
        return foreign_format(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError):
        return None


def _format_of_lines(lines):
    """DOTA or YOLO where the first line with numbers in it is theirs; else None."""
    for line in lines:
        if line.startswith(("imagesource:", "gsd:")):  # the head of a DOTA file
            return DOTA
        fields = line.split()
        if fields:
            return _format_of_fields(fields)
    return None


def _format_of_fields(fields):
    if len(fields) in (9, 10) and _are_numbers(fields[:8]) and not is_number(fields[8]):
        return DOTA
    # A box has four numbers behind the class, an oriented one eight; a score may follow.
    if len(fields) in (5, 6, 9, 10) and fields[0].isdecimal() and _are_numbers(fields):
        return YOLO
    return None


def _are_numbers(fields):
    return all(is_number(field) for field in fields)


def is_number(field):
    """Whether a text is a number."""
    try:
        float(field)
    except ValueError:
        return False
    return True
