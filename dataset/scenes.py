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

import json
import math
import time
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from dataset.shapes import GROUNDS, KINDS, SIDE, composition, draw, layout
from options import parse_options

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


NUMBERS = (
    "no one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty"
).split()


# ------------------------------------------------------------------ sentences


def relations(a, b):
    """Which relations of WORDS hold between the items `a` and the items `b`, from positions."""
    pa, pb = (np.array([(i.x, i.y) for i in items]) for items in (a, b))
    true = []
    for axis, names in ((0, ("left", "right")), (1, ("above", "below"))):
        if pa[:, axis].max() + 6 < pb[:, axis].min():
            true.append(names[0])
        if pb[:, axis].max() + 6 < pa[:, axis].min():
            true.append(names[1])
    gaps = np.hypot(*(pa[:, None] - pb[None]).transpose(2, 0, 1))  # (A, B)
    sizes = np.array([i.w for i in a])[:, None] + np.array([i.w for i in b])
    near = (gaps < 0.72 * sizes + 3).any(axis=1)
    if len(b) == 1 and len(a) > 3 and near.all():
        bearings = np.sort(np.arctan2(*(pa - pb[0]).T))
        if np.diff(bearings, append=bearings[0] + 2 * math.pi).max() < 2.6:
            return ["around"]
    if near.all():
        true.append("beside")
    if gaps.min() > 55:
        true.append("apart")
    return true


def _place_name(items):
    """Where in the image a group is: "upper left corner", "centre", or None where spread out."""
    points = np.array([(i.x, i.y) for i in items]) / SIDE
    if (points.max(0) - points.min(0)).max() > 0.4:
        return None
    x, y = (0 if c < 0.38 else 2 if c > 0.62 else 1 for c in points.mean(0))
    row, column = ("upper", "", "lower")[y], ("left", "", "right")[x]
    if row and column:
        return f"{row} {column} corner"
    return f"{row or column} part" if row or column else "centre"


def describe(rng, canvas, groups):
    """Five sentences that are true of the canvas; which facts each states is drawn."""
    members = [[i for i in canvas.items if i.group == g] for g in range(len(groups))]
    present = [g for g in range(len(groups)) if members[g]]

    def pick(options):
        return str(options[int(rng.integers(len(options)))])

    def noun(g, arranged=False):
        kind, _, arrangement = groups[g]
        count, name = len(members[g]), pick(KINDS[kind].names)
        if count == 1:
            return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
        text = f"{NUMBERS[count]} {name}s"
        if arranged and count > 2 and count == groups[g][1] and not hosted[g]:
            how = {"row": "in a row", "packed": "packed together", "scattered": "scattered about"}
            text += f" {how[arrangement]}"
        return text

    def listing(chosen):
        nouns = [noun(g) for g in chosen]
        return " and ".join([", ".join(nouns[:-1]), nouns[-1]] if len(nouns) > 1 else nouns)

    pairs = []
    for a in present:
        for b in present:
            if a < b:
                pairs += [(a, b, r) for r in relations(members[a], members[b])]
    hosted = [any(r in ("beside", "around") and g in (a, b) for a, b, r in pairs) for g in range(3)]
    ground = pick(GROUNDS[canvas.ground][0])
    road = pick((" beside a road", " along a road", " near a road")) if canvas.road else ""

    def related(exchanged):
        if not pairs:
            g = present[0]
            where = _place_name(members[g])
            return noun(g, True) + (f" in the {where} of the image" if where else "")
        a, b, relation = pairs[int(rng.integers(len(pairs)))]
        if exchanged:
            return f"{noun(b)} {pick(WORDS[relation][1])} {noun(a)}"
        return f"{noun(a, True)} {pick(WORDS[relation][0])} {noun(b)}"

    first = present[0]
    where = _place_name(members[first])
    are = "are" if len(members[first]) > 1 or len(present) > 1 else "is"
    sentences = (
        f"{related(False)} on {ground}",
        f"there {are} {listing(present)} on {ground}{road}",
        related(True),
        f"{ground}{road} with {listing(present[::-1])}",
        f"{noun(first, True)}{f' in the {where} of the image' if where else road} on {ground}",
    )
    return [sentence[0].upper() + sentence[1:] + " ." for sentence in sentences]


# ------------------------------------------------------------------ detections and files


def detect(rng, items):
    """What a detector with the errors named above would report, in det_json's format."""
    found = []
    for item in items:
        if rng.random() < 0.1:
            continue
        w, h = np.array([item.w, item.h]) * (1 + rng.normal(0, 0.05, 2))
        x, y = rng.normal([item.x, item.y], 0.05 * np.array([item.w, item.h]))
        score = min(1.0, 0.3 + 0.7 * rng.beta(6, 2))
        found.append(
            (KINDS[item.kind].names[0], x, y, w, h, item.angle + rng.normal(0, 0.05), score)
        )
    for _ in range(int(rng.binomial(len(items), 0.05))):
        kind = list(KINDS.values())[int(rng.integers(len(KINDS)))]
        (x, y), w = rng.uniform(8, SIDE - 8, 2), rng.uniform(*kind.length)
        angle, score = rng.uniform(-math.pi, math.pi), rng.uniform(0.3, 0.6)
        found.append((kind.names[0], x, y, w, w * kind.aspect, angle, score))
    return [
        {"label": label, "bbox": [round(float(v), 3) for v in numbers]} for label, *numbers in found
    ]


def scene(seed, index):
    """Scene number `index`: pixels (SIDE, SIDE, 3) uint8, sentences, detections, canvas."""
    pair, twin = divmod(index, 2)
    alone = pair % 3 == 0  # the others share their composition
    content = composition(np.random.default_rng((seed, pair, twin if alone else 2)))
    rng = np.random.default_rng((seed, index, 1))
    canvas = layout(rng, content, content[3][twin])
    while not canvas.items:
        canvas = layout(rng, content, content[3][twin])
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    pixels = draw(canvas.items, canvas.ground, canvas.road, canvas.distance(x, y), rng)
    return pixels, describe(rng, canvas, content[2]), detect(rng, canvas.items), canvas


def _write(image_file, detection_file, seed, index):
    """Write one scene's image and detections; returns its sentences."""
    pixels, sentences, detections, _ = scene(seed, index)
    Image.fromarray(pixels).save(image_file, compress_level=1)
    detection_file.write_text(json.dumps(detections), encoding="utf-8")
    return sentences


def generate(folder, seed=0, splits=SPLITS):
    """Write the data set below `folder`, or leave it as it is when it is there already.

    `scenes.json` names version, seed and splits and says whether all is written: an interrupted or
    differing data set is written anew. Returns the number of images. Raises ValueError where the
    folder holds something else.
    """
    folder = Path(folder)
    stamp = {"version": VERSION, "seed": seed, "splits": splits, "complete": True}
    marker = folder / "scenes.json"
    if marker.is_file():
        if json.loads(marker.read_text(encoding="utf-8")) == stamp:
            return sum(splits.values())
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(
            f"{folder}: holds other files than scenes; name your own data set with --dataset"
        )
    for name in ("images", "det_json"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    marker.write_text(json.dumps({**stamp, "complete": False}), encoding="utf-8")
    numbers = iter(tqdm(range(sum(splits.values())), desc=f"scenes to {folder}", unit="image"))
    for split, size in splits.items():
        names, captions = [], []
        for _ in range(size):
            index = next(numbers)
            image, detections = f"images/scene_{index}.png", f"det_json/scene_{index}.json"
            sentences = _write(folder / image, folder / detections, seed, index)
            names += [Path(image).name] * (len(sentences) if split == "test" else 1)
            captions += sentences
        for kind, lines in (("filename", names), ("caps", captions)):
            text = "".join(f"{line}\n" for line in lines)
            (folder / f"{split}_{kind}.txt").write_text(text, encoding="utf-8", newline="\n")
    marker.write_text(json.dumps(stamp), encoding="utf-8")
    return sum(splits.values())


def samples(image_folder, detection_folder):
    """Write the five sample scenes and `queries.txt`, one sentence that fits each."""
    image_folder, detection_folder = Path(image_folder), Path(detection_folder)
    queries = []
    for number in range(SAMPLES):
        image, detections = f"sample_{number + 1}.png", f"sample_{number + 1}.json"
        index = sum(SPLITS.values()) + 2 * number  # one of each pair of twins
        sentences = _write(image_folder / image, detection_folder / detections, 0, index)
        queries.append(sentences[1])
    text = "".join(f"{line}\n" for line in queries)
    (image_folder / "queries.txt").write_text(text, encoding="utf-8", newline="\n")


def main(arguments=None):
    options = parse_options("scenes", __doc__, arguments)
    if options.samples:
        samples("test", "det_json")
        return
    start = time.perf_counter()
    number = generate(options.out, options.seed)
    print(f"{options.out}: {number} scenes, {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
