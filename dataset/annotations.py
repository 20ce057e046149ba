"""Caption files and splits: from the forms in use to images with their sentences.

Three forms are told apart by what lies in the data root:

    txt       lists `<split>_filename.txt` + `<split>_caps.txt`, a name per image or per caption
    karpathy  `dataset*.json`: {"images": [{"filename", "split", "sentences": [{"raw"}, ...]}, ...]}
    pir       `*_train.json`, `*_val.json`, `*_test.json`: [{"image", "caption"}, ...], the caption
              one string or a list of them, as PIR and HarMA ship theirs

Nothing here opens an image.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

from escaping import escaped
from options import FORMS

SPLITS = ("train", "val", "test")


_NEEDED = {
    "txt": "<split>_filename.txt + <split>_caps.txt",
    "karpathy": "dataset*.json",
    "pir": "*_train.json, *_val.json, *_test.json with lists of image and caption",
}


_PIR_WORDS = 30  # PIR cuts a caption after so many


class Record(NamedTuple):
    """An image's name as the annotation file has it, and its sentences."""

    name: str
    captions: tuple


class Annotations(NamedTuple):
    """All records by split, where they came from, and where captions were blank."""

    splits: dict  # split name -> list of Record
    origin: str  # form, files, and what was done to the captions
    blank: list  # "file: line or image" of every blank caption
    empty: list  # names of images that have no other captions: they are left out
    broken: tuple = ()  # "file: line or image" of captions with a lone surrogate, left out


# ------------------------------------------------------------------ single captions


def normal_form(caption):
    """The form in which two captions count as the same: stripped, case folded."""
    return caption.strip().casefold()


def prepared(caption, caption_form=None):
    """A caption as the model shall see it, stripped; "" where nothing is left of it.

    caption_form: a list, as of --caption-form, or None. "pir" in it does what PIR and HarMA do:
    lower case, without , . ' ! ? " ( ) * # : ; ~, a space for - and /, white space squeezed, cut
    after 30 words. A text with one {} goes around the result, as "a satellite photo of {}". Raises
    ValueError for anything else.
    """
    cleans, template = _cleaning_and_template(caption_form)
    text = caption.strip()
    if cleans:
        text = re.sub(r"[,.'!?\"()*#:;~]", "", text.lower())
        words = re.sub("[-/]", " ", text).split()
        text = " ".join(words[:_PIR_WORDS])
    return (template or "{}").replace("{}", text) if text else ""


def prepared_sentences(sentences, caption_form):
    """Sentences as the captions that a model was trained on; ValueError where nothing is left."""
    texts = [prepared(sentence, caption_form) for sentence in sentences]
    if "" in texts:
        sentence = sentences[texts.index("")]
        raise ValueError(f"'{sentence}': no word is left, cleaned as the model's captions")
    return texts


def _cleaning_and_template(caption_form):
    """(whether captions are cleaned, the text around them or None) of a caption form."""
    form = caption_form or []
    templates = [part for part in form if part != "pir"]
    for template in templates:
        around = template.replace("{}", "")
        if template.count("{}") != 1 or "{" in around or "}" in around:
            raise ValueError(
                f"--caption-form '{template}': expected pir, or a text with exactly one {{}} and "
                "no other braces"
            )
    if len(templates) > 1 or form.count("pir") > 1:
        raise ValueError(
            f"--caption-form: {len(form)} given; give pir, one text with {{}}, or one of each"
        )
    return "pir" in form, templates[0] if templates else None


# ------------------------------------------------------------------ files


def read_text(path):
    """A text file in UTF-8, with or without byte-order mark; ValueError names file and line."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{escaped(path)}: line {line}: expected text in UTF-8: {error}") from None


def _json(path):
    try:
        return json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON: {error}") from None


def _lines(path):
    """Lines of a text file, without the newline; UTF-8 with or without byte-order mark."""
    text = read_text(path)
    return text.removesuffix("\n").split("\n") if text else []


def _field(container, key, kinds, place):
    """A field of a JSON object, if it is of one of these types."""
    value = container.get(key) if isinstance(container, dict) else None
    if not isinstance(value, kinds):
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"{place}: field '{key}': expected {expected}, found {value!r:.60}")
    return value


def _inside(name, place):
    """The name, if it is one and stays below the data root, on whichever system it is read."""
    parts = name.replace("\\", "/").split("/")
    if not name.strip():
        raise ValueError(f"{place}: the name is blank; expected the name of an image")
    if parts[-1] in ("", "."):
        raise ValueError(f"{place}: '{escaped(name)}' names no file; expected the name of an image")
    if ".." in parts or parts[0] == "" or re.match("[A-Za-z]:", name):
        raise ValueError(
            f"{place}: '{escaped(name)}' leads out of the data root; write it relative to "
            "the root, without .. or a drive"
        )
    return name


# ------------------------------------------------------------------ the three forms
# Each reader gives (split, name, caption, place) in file order, place naming file and entry.


def _text_rows(split, names_file, captions_file):
    names = [line.strip() for line in _lines(names_file)]
    captions = _lines(captions_file)
    if not names or not captions or len(captions) % len(names):
        raise ValueError(
            f"{names_file} has {len(names)} lines and {captions_file} {len(captions)}: expected "
            "one name per caption, or the same number of captions for every name"
        )
    for i, name in enumerate(names):
        _inside(name, f"{names_file}: line {i + 1}")
    captions_per_name = len(captions) // len(names)
    for i, caption in enumerate(captions):
        name = names[i // captions_per_name]
        yield split, name, caption, f"{captions_file.name}: line {i + 1}"


def _read_txt(files):
    root = files[0].parent
    for split in SPLITS:
        names_file = root / f"{split}_filename.txt"
        captions_file = root / f"{split}_caps.txt"
        if (names_file in files) != (captions_file in files):
            raise ValueError(
                f"{names_file} and {captions_file}: one is there, the other is missing"
            )
        if names_file in files:
            yield from _text_rows(split, names_file, captions_file)


def _read_karpathy(files):
    [path] = files
    for i, image in enumerate(_field(_json(path), "images", (list,), path)):
        place = f"{path}: image {i}"
        name = _inside(_field(image, "filename", (str,), place), place)
        split = _field(image, "split", (str,), place)
        if image.get("filepath"):
            folder = _inside(_field(image, "filepath", (str,), place), place)
            name = f"{folder}/{name}"
        sentences = _field(image, "sentences", (list,), place)
        if not sentences:
            yield split, name, "", f"{path.name}: {name}, no sentence"
        for j, sentence in enumerate(sentences):
            raw = _field(sentence, "raw", (str,), f"{place}, sentence {j}")
            yield split, name, raw, f"{path.name}: {name}, sentence {j}"


def _pir_rows(split, path):
    entries = _json(path)
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: expected a list of images with captions, found {entries!r:.60}")
    for i, entry in enumerate(entries):
        place = f"{path}: entry {i}"
        # The folder is the split's name, whatever the images' real folder is called.
        name = _field(entry, "image", (str,), place).removeprefix(f"{split}/")
        _inside(name, place)
        captions = _field(entry, "caption", (str, list), place)
        if isinstance(captions, str):
            captions = [captions]
        if not captions:
            yield split, name, "", f"{path.name}: entry {i}, {name}, no caption"
        for j, caption in enumerate(captions):
            if not isinstance(caption, str):
                raise ValueError(f"{place}, caption {j}: expected str, found {caption!r:.60}")
            yield split, name, caption, f"{path.name}: entry {i}, {name}, caption {j}"


def _read_pir(files):
    for path in files:
        yield from _pir_rows(path.stem.rpartition("_")[2], path)


_READERS = {"txt": _read_txt, "karpathy": _read_karpathy, "pir": _read_pir}


# ------------------------------------------------------------------ which form


def _is_pir(path):
    """Whether a file holds PIR's list, and not detections or something else of that name."""
    try:
        content = _json(path)
    except ValueError:
        return True  # so that it is not passed over: reading it says what is wrong
    if not isinstance(content, list) or not content:
        return False
    first = content[0]
    return isinstance(first, dict) and "image" in first and "caption" in first


def _txt_sets(root):
    files = []
    for split in SPLITS:
        for kind in ("filename", "caps"):
            path = root / f"{split}_{kind}.txt"
            if path.is_file():
                files.append(path)
    return [files] if files else []


def _pir_sets(root):
    by_prefix = {}
    for split in SPLITS:
        for path in sorted(root.glob(f"*_{split}.json")):
            prefix = path.name.removesuffix(f"_{split}.json")
            by_prefix.setdefault(prefix, []).append(path)
    return [files for files in by_prefix.values() if any(_is_pir(path) for path in files)]


def _sources(root):
    """What lies in a data root: {form: list of sets}, each set the list of its files."""
    pir_sets = _pir_sets(root)
    pir_files = [path for files in pir_sets for path in files]
    karpathy_files = sorted(path for path in root.glob("dataset*.json") if path not in pir_files)
    return {
        "txt": _txt_sets(root),
        "karpathy": [[path] for path in karpathy_files],
        "pir": pir_sets,
    }


def _names(files):
    return ", ".join(path.name for path in files)


def _choose(root, form):
    """(form, files) that are meant; ValueError that lists what there is where that is not one."""
    if form not in FORMS:
        raise ValueError(f"--annotations {form}: expected one of {', '.join(FORMS)}")
    sources = _sources(root)
    there = [name for name, sets in sources.items() if sets]
    listed = "; ".join(
        f"--annotations {name} ({_names(files)})" for name in there for files in sources[name]
    )
    if not there:
        raise ValueError(f"{root}: no annotations; expected {'; or '.join(_NEEDED.values())}")
    if form == "auto":
        if len(there) > 1:
            raise ValueError(f"{root}: annotations in several forms, choose one: {listed}")
        [form] = there
    sets = sources[form]
    if not sets:
        raise ValueError(f"{root}: --annotations {form} needs {_NEEDED[form]}; there is {listed}")
    if len(sets) > 1:
        raise ValueError(f"{root}: annotations of one form twice, take one away: {listed}")
    return form, sets[0]


def _origin(root, form, files, caption_form):
    """Where captions come from and what was done to them, in words."""
    if form == "txt":
        origin = f"text lists in {root}: {_names(files)}"
    elif form == "karpathy":
        origin = f"Karpathy-style JSON {files[0]}"
    else:
        origin = f"PIR-style JSON in {root}: {_names(files)}"
    cleans, template = _cleaning_and_template(caption_form)
    if cleans:
        origin += "; captions cleaned as by pir"
    if template is not None:
        origin += f"; captions within '{template}'"
    return origin


def _has_lone_surrogate(text):
    """Whether half of a pair of code units is in it, as JSON can hold one: it is no character."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def read_annotations(root, form="auto", caption_form=None, leave_out_broken=False):
    """The annotations in a data root, in the form named or, with "auto", the only one there is.

    form: one of FORMS; caption_form: see `prepared`. Blank captions, before or after cleaning,
    are left out and their places listed; with leave_out_broken so are those with lone surrogates.
    Raises ValueError where there are no annotations or several, where a file is malformed, where a
    name leads out of the root, and for a lone surrogate.
    """
    root = Path(root)
    prepared("", caption_form)  # one that is wrong is an error before any file is read
    form, files = _choose(root, form)
    rows_of = {}  # split: list of (name, caption, place)
    for split, name, caption, place in _READERS[form](files):
        rows_of.setdefault(split, []).append((name, caption, place))
    if not rows_of:
        raise ValueError(f"{files[0]}: no image in it; expected images with captions")
    splits = {}
    blank = []
    empty = []
    broken = []
    for split, rows in rows_of.items():
        captions_of = {}  # name: captions, in the order of first appearance
        for name, caption, place in rows:
            captions = captions_of.setdefault(name, [])
            if _has_lone_surrogate(caption):
                if not leave_out_broken:
                    raise ValueError(
                        f"{escaped(root / place)}: a lone surrogate in the caption, half of a "
                        "character; write the character whole"
                    )
                broken.append(place)
                continue
            text = prepared(caption, caption_form)
            if text:
                captions.append(text)
            else:
                blank.append(place)
        splits[split] = [Record(name, tuple(texts)) for name, texts in captions_of.items() if texts]
        empty += [name for name, texts in captions_of.items() if not texts]
    origin = _origin(root, form, files, caption_form)
    return Annotations(splits, origin, blank, empty, tuple(broken))


def with_validation(annotations, fraction, seed, dev_images=0):
    """The annotations with a validation split: the shipped "val", else one drawn by image.

    With dev_images so many are drawn as "dev", shipped "val" or not. Returns (annotations, None)
    where nothing was drawn, else (annotations, split) with the names of "train" and of the drawn
    one, to be written beside the checkpoint. From a train of no more images nothing is drawn.
    """
    train = annotations.splits.get("train", [])
    if dev_images:
        name = "dev"
        size = dev_images
    elif annotations.splits.get("val") or not train:
        return annotations, None
    else:
        name = "val"
        at_least = min(10, len(train) // 2)  # R@10 needs ten
        size = max(round(fraction * len(train)), at_least)
    if size >= len(train):
        return annotations, None
    from sklearn.model_selection import train_test_split  # slow, and needed here alone

    train, held_out = train_test_split(train, test_size=size, random_state=seed)
    drawn = {
        "train": [record.name for record in train],
        name: [record.name for record in held_out],
    }
    splits = {**annotations.splits, "train": train, name: held_out}
    origin = f"{annotations.origin}; {name} of {size} images drawn from train, seed {seed}"
    return annotations._replace(splits=splits, origin=origin), drawn
