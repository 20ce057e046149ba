"""Caption files and splits: from the formats in use to images with their sentences.

Two formats are told apart by what lies in the data root: official Karpathy-style JSON
(`dataset.json`, `dataset_rsicd.json`) and the lists `<split>_filename.txt` + `<split>_caps.txt`,
with one name per image or one per caption. Nothing here opens an image.
"""

import json
from pathlib import Path
from typing import NamedTuple

from sklearn.model_selection import train_test_split

SPLITS = ("train", "val", "test")


class Record(NamedTuple):
    """An image's name as the annotation file has it, and its sentences."""

    name: str
    captions: tuple


class Annotations(NamedTuple):
    """All records by split, where they came from, and where captions were blank."""

    splits: dict  # split name -> list of Record
    origin: str  # format and files
    blank: list  # "file: line or image" of every blank caption
    empty: list  # names of images that have no other captions: they are left out


def normal_form(caption):
    """The form in which two captions count as the same: stripped, case folded."""
    return caption.strip().casefold()


def _group(pairs, blank, empty):
    """(name, caption, place) in file order to records in the order of first appearance."""
    captions = {}
    for name, caption, place in pairs:
        kept = captions.setdefault(name, [])
        if caption.strip():
            kept.append(caption.strip())
        else:
            blank.append(place)
    empty += [name for name, texts in captions.items() if not texts]
    return [Record(name, tuple(texts)) for name, texts in captions.items() if texts]


def read_text(path):
    """A text file in UTF-8, with or without byte-order mark; ValueError names the file."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected text in UTF-8: {error}") from None


def _json(path):
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected JSON: {error}") from None


def _lines(path):
    """Lines of a text file, without the newline; UTF-8 with or without byte-order mark."""
    text = read_text(path)
    return text.removesuffix("\n").split("\n") if text else []


def _text_pairs(names_file, captions_file):
    names = [line.strip() for line in _lines(names_file)]
    captions = _lines(captions_file)
    if not names or len(captions) % len(names):
        raise ValueError(
            f"{names_file} has {len(names)} lines and {captions_file} {len(captions)}: expected "
            "one name per caption, or the same number of captions for every name"
        )
    if "" in names:
        raise ValueError(f"{names_file}: line {names.index('') + 1} is blank; expected a name")
    share = len(captions) // len(names)
    for i, caption in enumerate(captions):
        yield names[i // share], caption, f"{captions_file.name}: line {i + 1}"


def _read_text(root):
    splits, blank, empty = {}, [], []
    for split in SPLITS:
        names, captions = root / f"{split}_filename.txt", root / f"{split}_caps.txt"
        if names.is_file() != captions.is_file():
            raise ValueError(f"{names} and {captions}: one is there, the other is missing")
        if names.is_file():
            splits[split] = _group(_text_pairs(names, captions), blank, empty)
    return Annotations(splits, f"text lists in {root}", blank, empty)


def _field(container, key, kind, place):
    value = container.get(key) if isinstance(container, dict) else None
    if not isinstance(value, kind):
        raise ValueError(f"{place}: field '{key}': expected {kind.__name__}, found {value!r:.60}")
    return value


def _read_karpathy(path):
    pairs = {}
    for i, image in enumerate(_field(_json(path), "images", list, path)):
        place = f"{path}: image {i}"
        name, split = _field(image, "filename", str, place), _field(image, "split", str, place)
        if image.get("filepath"):
            name = f"{_field(image, 'filepath', str, place)}/{name}"
        sentences = _field(image, "sentences", list, place)
        if not sentences:
            pairs.setdefault(split, []).append((name, "", f"{path.name}: {name}, no sentence"))
        for j, sentence in enumerate(sentences):
            raw = _field(sentence, "raw", str, f"{place}, sentence {j}")
            pairs.setdefault(split, []).append((name, raw, f"{path.name}: {name}, sentence {j}"))
    blank, empty = [], []
    splits = {split: _group(rows, blank, empty) for split, rows in pairs.items()}
    return Annotations(splits, f"Karpathy-style JSON {path}", blank, empty)


def read_annotations(root):
    """The annotations in a data root, whichever format they have.

    Raises ValueError where there are none, where there are several, or where a file is malformed.
    """
    root = Path(root)
    found = sorted(root.glob("dataset*.json"))
    if any(root.glob("*_filename.txt")):
        found.append(root / "*_filename.txt")
    if len(found) != 1:
        raise ValueError(
            f"{root}: expected one of dataset*.json or *_filename.txt + *_caps.txt, "
            f"found {', '.join(path.name for path in found) or 'neither'}"
        )
    return _read_text(root) if found[0].suffix == ".txt" else _read_karpathy(found[0])


def with_validation(annotations, fraction, seed):
    """The annotations with a validation split: the shipped one, else one drawn by image.

    Returns (annotations, None) where a split was shipped, else (annotations, split) with
    {"train": names, "val": names} to be written beside the checkpoint.
    """
    if annotations.splits.get("val") or not annotations.splits.get("train"):
        return annotations, None
    records = annotations.splits["train"]
    size = max(round(fraction * len(records)), min(10, len(records) // 2))  # R@10 needs ten
    train, val = train_test_split(records, test_size=size, random_state=seed)
    drawn = {"train": [record.name for record in train], "val": [record.name for record in val]}
    splits = {**annotations.splits, "train": train, "val": val}
    origin = f"{annotations.origin}; validation drawn by image, seed {seed}"
    return annotations._replace(splits=splits, origin=origin), drawn
