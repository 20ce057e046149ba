"""Synthetic aerial scenes: the data set that FG-CROSS trains on when no other is given.

    python -m dataset.scenes                        # writes data/scenes
    python -m dataset.scenes --out DIR --seed 1     # other scenes

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

from dataset.shapes import GROUNDS, KINDS, SIDE, composition, draw, layout
from options import parse_options, run
from progress import Progress
from writing import written_whole

VERSION = 1


SPLITS = {"train": 2000, "val": 300, "test": 300}


SAMPLES = 5  # further scenes: the images in test/


WORDS = {  # a true relation in words, and in words with the groups exchanged
    "left": (("left of", "to the left of"), ("right of", "to the right of")),
    "right": (("right of", "to the right of"), ("left of", "to the left of")),
    "above": (("above",), ("below",)),
    "below": (("below",), ("above",)),
    "beside": (("right beside", "close to", "next to"), ("close to", "next to")),
    "around": (("around", "in a ring around"), ("surrounded by", "in the middle of")),
    "apart": (("far from", "away from"), ("far from", "away from")),
}


ARRANGEMENTS = {
    "row": "in a row",
    "packed": "packed together",
    "scattered": "scattered about",
}


ROADS = (" beside a road", " along a road", " near a road")


NUMBERS = (
    "no one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty"
).split()


# ------------------------------------------------------------------ sentences


def _positions(items):
    return np.array([(item.x, item.y) for item in items])


def relations(a, b):
    """Which relations of WORDS hold between the items `a` and the items `b`, from positions."""
    points_a = _positions(a)  # (A, 2)
    points_b = _positions(b)  # (B, 2)
    true = []
    for axis, before, after in ((0, "left", "right"), (1, "above", "below")):
        if points_a[:, axis].max() + 6 < points_b[:, axis].min():
            true.append(before)
        if points_b[:, axis].max() + 6 < points_a[:, axis].min():
            true.append(after)
    steps = points_a[:, None] - points_b[None]  # (A, B, 2)
    gaps = np.hypot(steps[..., 0], steps[..., 1])  # (A, B)
    sizes = np.array([item.w for item in a])[:, None] + np.array([item.w for item in b])
    near = (gaps < 0.72 * sizes + 3).any(axis=1)  # (A)
    if len(b) == 1 and len(a) > 3 and near.all():
        steps = points_a - points_b[0]
        bearings = np.sort(np.arctan2(steps[:, 0], steps[:, 1]))
        first_again = bearings[0] + 2 * math.pi
        if np.diff(bearings, append=first_again).max() < 2.6:
            return ["around"]
    if near.all():
        true.append("beside")
    if gaps.min() > 55:
        true.append("apart")
    return true


def _third(fraction, names):
    """The name of the low, middle or high part of the image that a mean position lies in."""
    low, middle, high = names
    if fraction < 0.38:
        return low
    if fraction > 0.62:
        return high
    return middle


def _place_name(items):
    """Where in the image a group is: "upper left corner", "centre", or None where spread out."""
    points = _positions(items) / SIDE
    if (points.max(0) - points.min(0)).max() > 0.4:
        return None
    x, y = points.mean(0)
    row = _third(y, ("upper", "", "lower"))
    column = _third(x, ("left", "", "right"))
    if row and column:
        return f"{row} {column} corner"
    if row or column:
        return f"{row or column} part"
    return "centre"


class _Group(NamedTuple):
    """The items of one kind in a scene, as sentences speak of them."""

    kind: str
    items: list  # those that found room
    arrangement: str  # "row", "packed" or "scattered"
    arranged: bool  # whether the arrangement is to be seen


def _groups_and_pairs(canvas, groups):
    """The groups that found room, and all (group, group, relation) that hold between two."""
    items = [[item for item in canvas.items if item.group == g] for g in range(len(groups))]
    present = [g for g in range(len(groups)) if items[g]]
    true = []
    for a, b in itertools.combinations(present, 2):
        for relation in relations(items[a], items[b]):
            true.append((a, b, relation))
    hosts = set()  # groups at others, and those with others about them
    for a, b, relation in true:
        if relation in ("beside", "around"):
            hosts |= {a, b}
    found = {}
    for g in present:
        kind, count, arrangement = groups[g]
        whole = len(items[g]) == count
        arranged = len(items[g]) > 2 and whole and g not in hosts
        found[g] = _Group(kind, items[g], arrangement, arranged)
    pairs = [(found[a], found[b], relation) for a, b, relation in true]
    return list(found.values()), pairs


def _pick(rng, options):
    return str(options[int(rng.integers(len(options)))])


def _noun(rng, group, arrangement=False):
    """As "a ship", "two planes"; with arrangement as "three cars in a row", where it is seen."""
    count = len(group.items)
    name = _pick(rng, KINDS[group.kind].names)
    if count == 1:
        article = "an" if name[0] in "aeiou" else "a"
        return f"{article} {name}"
    text = f"{NUMBERS[count]} {name}s"
    if arrangement and group.arranged:
        text += f" {ARRANGEMENTS[group.arrangement]}"
    return text


def _listing(rng, groups):
    """As "two ships, a car and three planes"."""
    nouns = [_noun(rng, group) for group in groups]
    if len(nouns) == 1:
        return nouns[0]
    return f"{', '.join(nouns[:-1])} and {nouns[-1]}"


def _in_place(group):
    """As " in the centre of the image"; "" where the group is spread out."""
    place = _place_name(group.items)
    return f" in the {place} of the image" if place else ""


def _related(rng, groups, pairs, exchanged):
    """Two groups and a relation that holds; where none does, the first group and its place."""
    if not pairs:
        return _noun(rng, groups[0], arrangement=True) + _in_place(groups[0])
    a, b, relation = pairs[int(rng.integers(len(pairs)))]
    words, words_exchanged = WORDS[relation]
    if exchanged:
        return f"{_noun(rng, b)} {_pick(rng, words_exchanged)} {_noun(rng, a)}"
    return f"{_noun(rng, a, arrangement=True)} {_pick(rng, words)} {_noun(rng, b)}"


def describe(rng, canvas, groups):
    """Five sentences that are true of the canvas; which facts each states is drawn.

    groups: (kind, count, arrangement) of each, as `shapes.composition` gives them. The order of
    the draws is frozen.
    """
    present, pairs = _groups_and_pairs(canvas, groups)
    ground = _pick(rng, GROUNDS[canvas.ground][0])
    road = _pick(rng, ROADS) if canvas.road else ""
    first = present[0]
    one = len(present) == 1 and len(first.items) == 1
    verb = "is" if one else "are"
    sentences = (
        f"{_related(rng, present, pairs, exchanged=False)} on {ground}",
        f"there {verb} {_listing(rng, present)} on {ground}{road}",
        _related(rng, present, pairs, exchanged=True),
        f"{ground}{road} with {_listing(rng, present[::-1])}",
        f"{_noun(rng, first, arrangement=True)}{_in_place(first) or road} on {ground}",
    )
    return [sentence[0].upper() + sentence[1:] + " ." for sentence in sentences]


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
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    pixels = draw(canvas.items, canvas.ground, canvas.road, canvas.distance(x, y), rng)
    sentences = describe(rng, canvas, groups)
    return pixels, sentences, detect(rng, canvas.items), canvas


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


def _write_marker(marker, stamp, complete):
    with written_whole(marker) as temporary:
        temporary.write_text(json.dumps({**stamp, "complete": complete}), encoding="utf-8")


def read_marker(folder):
    """What `scenes.json` says of a folder of scenes; None where there is none."""
    marker = Path(folder) / "scenes.json"
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
    number = sum(splits.values())
    stamp = {"version": VERSION, "seed": seed, "splits": splits}
    marker = folder / "scenes.json"
    found = read_marker(folder)
    if found == {**stamp, "complete": True}:
        return number
    if found is not None and found != {**stamp, "complete": False}:
        raise ValueError(f"{folder}: holds other scenes, see {marker}; name another folder")
    if found is None and folder.exists() and any(folder.iterdir()):
        raise ValueError(
            f"{folder}: holds other files than scenes; name your own data set with --dataset"
        )
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "det_json").mkdir(exist_ok=True)
    _write_marker(marker, stamp, complete=False)
    first = 0
    for split, size in splits.items():
        _write_split(folder, split, range(first, first + size), seed)
        first += size
    _write_marker(marker, stamp, complete=True)
    return number


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
    number = generate(options.out, options.seed)
    print(f"{options.out}: {number} scenes, {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    run(main)
