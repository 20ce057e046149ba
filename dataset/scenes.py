"""Synthetic aerial scenes: the data set that FG-CROSS trains on when no other is given.

    python -m dataset.scenes                        # writes data/scenes
    python -m dataset.scenes --out DIR --seed 1     # other scenes
    python -m dataset.scenes --twins                # writes data/twins, to be told apart

Each scene is drawn from its own seed: a ground (grass, water, a shore, ...), sometimes a road, and
1 to 20 objects of ten kinds in up to three groups, as rotated shapes with shadow and noise. Five
sentences state what was drawn: kinds, counts, ground, arrangement, spatial relations. Detections
are as a fair detector gives them: off by 5 % of the box size, 10 % missed, 5 % false alarms. Two
scenes of three are drawn as pairs of twins, with the same ground, kinds and counts but other
relations; where all objects find room, which is in 42 of the test split's 100 pairs, only relations
tell the two apart.

Files follow the RSITMD layout (`images/`, `*_filename.txt`, `*_caps.txt`, `det_json/`), with its
quirk that the test list has a name per caption. The generator is frozen: published figures depend
on every draw. What is learned here holds by construction and says nothing about real images.
"""

from options import answer_early

if __name__ == "__main__":
    answer_early("scenes", __doc__)  # before slow packages are imported

import itertools
import json
import math
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from dataset.sentences import describe, telling
from dataset.shapes import KINDS, SIDE, Canvas, composition, draw, layout
from options import parse_options, run
from progress import Progress
from writing import written_whole

VERSION = 1


FOLDER = "data/scenes"  # where nothing else is said
MARKER = "scenes.json"  # says what a folder holds, and whether all of it is written


CLEAN = "clean_json"  # folder of detections without errors


SPLITS = {"train": 2000, "val": 300, "test": 300}


SAMPLES = 5  # further scenes: the images in test/


PAIRS = 1000  # of twins


TWINS = 10_000  # keys of their random draws end with it or more, those of scenes with 0, 1 or 2


SENTENCES = 3  # at most so many of each twin


# ------------------------------------------------------------------ detections and files


def detect(rng, items):
    """What a detector with the errors named above would report, in det_json's format."""
    found = []
    for item in items:
        if rng.random() < 0.1:  # missed
            continue
        sides = np.array([item.w, item.h])
        w, h = sides * (1 + rng.normal(0, 0.05, 2))
        x, y = rng.normal([item.x, item.y], 0.05 * sides)
        score = min(1.0, 0.3 + 0.7 * rng.beta(6, 2))
        angle = item.angle + rng.normal(0, 0.05)
        found.append(_detection(KINDS[item.kind], x, y, w, h, angle, score))
    false_alarms = int(rng.binomial(len(items), 0.05))
    kinds = list(KINDS.values())
    for _ in range(false_alarms):
        kind = kinds[int(rng.integers(len(kinds)))]
        x, y = rng.uniform(8, SIDE - 8, 2)
        w = rng.uniform(*kind.length)
        angle = rng.uniform(-math.pi, math.pi)
        score = rng.uniform(0.3, 0.6)
        found.append(_detection(kind, x, y, w, w * kind.aspect, angle, score))
    return found


def _detection(kind, *numbers):
    """An entry of det_json from a kind and cx, cy, w, h, angle, score."""
    return {"label": kind.names[0], "bbox": [round(float(number), 3) for number in numbers]}


def scene(seed, index):
    """Scene number `index`: pixels (SIDE, SIDE, 3) uint8, sentences, detections, canvas."""
    pair, twin = divmod(index, 2)
    alone = pair % 3 == 0  # the others share their composition
    content = composition(np.random.default_rng((seed, pair, twin if alone else 2)))
    _, _, groups, relation_order = content
    rng = np.random.default_rng((seed, index, 1))
    canvas = layout(rng, content, relation_order[twin])
    while not canvas.items:
        canvas = layout(rng, content, relation_order[twin])
    pixels = _pixels(rng, canvas)
    sentences = describe(rng, canvas, groups)
    return pixels, sentences, detect(rng, canvas.items), canvas


def _pixels(rng, canvas):
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    return draw(canvas.items, canvas.ground, canvas.road, canvas.distance(x, y), rng)


def _write(image_file, detection_file, seed, index):
    """Write one scene's image and detections; returns its sentences."""
    pixels, sentences, detections, _ = scene(seed, index)
    Image.fromarray(pixels).save(image_file, compress_level=1)
    detection_file.write_text(json.dumps(detections), encoding="utf-8")
    return sentences


def _write_lines(path, lines):
    text = "".join(f"{line}\n" for line in lines)
    path.write_text(text, encoding="utf-8", newline="\n")


def _write_split(folder, split, indices, seed):
    """Write the images, detections and lists of a split that has these scenes."""
    names = []
    captions = []
    for index in Progress(indices, f"{split} scenes to {folder}", "images"):
        name = f"scene_{index}"
        detection_file = folder / "det_json" / f"{name}.json"
        sentences = _write(folder / "images" / f"{name}.png", detection_file, seed, index)
        repeats = len(sentences) if split == "test" else 1
        names += [f"{name}.png"] * repeats
        captions += sentences
    _write_lines(folder / f"{split}_filename.txt", names)
    _write_lines(folder / f"{split}_caps.txt", captions)


# ------------------------------------------------------------------ twins


class Twin(NamedTuple):
    """One of a pair of scenes that only relations and places tell apart."""

    pixels: np.ndarray  # (SIDE, SIDE, 3) uint8
    sentences: list  # (text, what it states) of each: true of this twin, false of the other
    detections: list
    clean: list  # the same without the detector's errors
    canvas: Canvas


def twins(seed, pair):
    """Pair number `pair`: two `Twin`s with the same ground, kinds and counts.

    All that is drawn is placed, in both. Both have as many sentences: an answer by the images
    alone is right for half of them. What does not fit is drawn anew.
    """
    for attempt in itertools.count():
        key = (seed, pair, attempt)
        content = composition(np.random.default_rng((*key, TWINS)))
        _, _, groups, relation_order = content
        drawn = sum(count for _, count, _ in groups)
        rngs = [np.random.default_rng((*key, TWINS + twin)) for twin in (1, 2)]
        canvases = [
            layout(rng, content, relation)
            for rng, relation in zip(rngs, relation_order[:2], strict=True)
        ]
        if len(groups) < 2 or any(len(canvas.items) < drawn for canvas in canvases):
            continue
        sentences = [
            telling(rng, canvas, other)
            for rng, canvas, other in zip(rngs, canvases, canvases[::-1], strict=True)
        ]
        number = min(SENTENCES, *map(len, sentences))
        if number:
            parts = zip(rngs, canvases, sentences, strict=True)
            return [_twin(rng, canvas, own[:number]) for rng, canvas, own in parts]


def _twin(rng, canvas, sentences):
    pixels = _pixels(rng, canvas)
    clean = []
    for item in canvas.items:
        kind = KINDS[item.kind]
        clean.append(_detection(kind, item.x, item.y, item.w, item.h, item.angle, 1.0))
    return Twin(pixels, sentences, detect(rng, canvas.items), clean, canvas)


def _write_twins(folder, pairs, seed):
    """Write the images, both forms of detections, the list of a test split, and `twins.json`."""
    entries = []
    names = []
    captions = []
    for pair in Progress(range(pairs), f"twins to {folder}", "pairs"):
        entry = {"images": [], "sentences": []}
        for number, twin in enumerate(twins(seed, pair)):
            name = f"twin_{2 * pair + number}"
            Image.fromarray(twin.pixels).save(folder / "images" / f"{name}.png", compress_level=1)
            for place, detections in (("det_json", twin.detections), (CLEAN, twin.clean)):
                text = json.dumps(detections)
                (folder / place / f"{name}.json").write_text(text, encoding="utf-8")
            entry["images"].append(f"{name}.png")
            for text, states in twin.sentences:
                entry["sentences"].append({"text": text, "of": number, "states": states})
                names.append(f"{name}.png")
                captions.append(text)
        entries.append(entry)
    _write_lines(folder / "test_filename.txt", names)
    _write_lines(folder / "test_caps.txt", captions)
    text = json.dumps(entries, indent=1) + "\n"
    (folder / "twins.json").write_text(text, encoding="utf-8", newline="\n")


def generate_twins(folder, seed=0, pairs=PAIRS):
    """Write pairs of twins below `folder` as `generate` writes scenes; the number of images.

    A data set of a test split, in which an image's captions are the sentences that are true of it
    alone. `twins.json` lists the pairs, `clean_json/` holds detections without errors.
    """
    folder = Path(folder)
    stamp = {"version": VERSION, "seed": seed, "twins": pairs}
    if _begin(folder, stamp, ("images", "det_json", CLEAN)):
        _write_twins(folder, pairs, seed)
        _write_marker(folder / MARKER, stamp, complete=True)
    return 2 * pairs


# ------------------------------------------------------------------ a data set


def _write_marker(marker, stamp, complete):
    with written_whole(marker) as temporary:
        temporary.write_text(json.dumps({**stamp, "complete": complete}), encoding="utf-8")


def read_marker(folder):
    """What `scenes.json` says of a folder of scenes; None where there is none."""
    marker = Path(folder) / MARKER
    if not marker.is_file():
        return None
    try:
        return json.loads(marker.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{marker}: expected JSON: {error}") from None


def is_complete(folder):
    """Whether a folder holds scenes, of any seed, that are all written."""
    found = read_marker(folder)
    return isinstance(found, dict) and found.get("complete") is True


def generate(folder, seed=0, splits=SPLITS):
    """Write the data set below `folder`, or leave it as it is when it is there already.

    `scenes.json` names version, seed and splits and says whether all is written: an interrupted
    data set is written anew. Returns the number of images. Raises ValueError where the folder holds
    other scenes, or something else.
    """
    folder = Path(folder)
    stamp = {"version": VERSION, "seed": seed, "splits": splits}
    if _begin(folder, stamp, ("images", "det_json")):
        first = 0
        for split, size in splits.items():
            _write_split(folder, split, range(first, first + size), seed)
            first += size
        _write_marker(folder / MARKER, stamp, complete=True)
    return sum(splits.values())


def _begin(folder, stamp, subfolders):
    """Make a data set's folders and its marker; False where it is there already.

    Raises ValueError where the folder holds other scenes, or something else.
    """
    marker = folder / MARKER
    found = read_marker(folder)
    if found == {**stamp, "complete": True}:
        return False
    if found is not None and found != {**stamp, "complete": False}:
        raise ValueError(f"{folder}: holds other scenes, see {marker}; name another folder")
    if found is None and folder.exists() and any(folder.iterdir()):
        raise ValueError(
            f"{folder}: holds other files than scenes; name your own data set with --dataset"
        )
    for name in subfolders:
        (folder / name).mkdir(parents=True, exist_ok=True)
    _write_marker(marker, stamp, complete=False)
    return True


def samples(image_folder, detection_folder):
    """Write the five sample scenes and `queries.txt`, one sentence that fits each."""
    image_folder = Path(image_folder)
    detection_folder = Path(detection_folder)
    queries = []
    for number in range(SAMPLES):
        index = sum(SPLITS.values()) + 2 * number  # one of each pair of twins
        name = f"sample_{number + 1}"
        sentences = _write(
            image_folder / f"{name}.png", detection_folder / f"{name}.json", 0, index
        )
        queries.append(sentences[1])
    _write_lines(image_folder / "queries.txt", queries)


def main(arguments=None):
    options = parse_options("scenes", __doc__, arguments)
    if options.samples:
        samples("test", "det_json")
        return
    start = time.perf_counter()
    if options.twins:
        folder = options.out or "data/twins"
        number = generate_twins(folder, options.seed)
    else:
        folder = options.out or FOLDER
        number = generate(folder, options.seed)
    print(f"{folder}: {number} scenes, {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    run(main)
