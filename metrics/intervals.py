"""How sure a figure is: 95 % bootstrap intervals over images, for one result and for a difference.

Images are drawn with replacement, each with its captions; the gallery stays whole (percentile
bootstrap, Efron and Tibshirani 1993). What an interval holds is the chance in the choice of test
images, not that of training: several seeds tell that.

`per_image` in the functions below is a result file's dict: "names", "captions" (how many each) and,
for "image_to_text" and "text_to_image", lists by recall ("R@1", ...): the chance of a hit, for
"text_to_image" its sum over the image's captions. All figures are percent and come as {"mR": ...,
"image_to_text": {"R@1": ...}, "text_to_image": {...}}.
"""

import json
import re
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np

from metrics.ranks import DIRECTIONS

SAMPLES = 2000  # draws of the images
PERCENTILES = (2.5, 97.5)  # of the drawn figures: they bound an interval
GONE = ("tensorboard",)  # options of older runs that are no more, and never changed a result


class Difference(NamedTuple):
    """A difference of two figures in points, and its 95 % interval."""

    value: float
    low: float
    high: float


# ------------------------------------------------------------------ figures of weighted images


def _table(per_image):
    """Columns by image (I, C + 1): the recalls of both directions, then the number of captions."""
    columns = []
    for direction in DIRECTIONS:
        columns += per_image[direction].values()
    columns.append(per_image["captions"])
    lengths = {len(column) for column in [*columns, per_image["names"]]}
    if len(lengths) > 1 or lengths == {0}:
        raise ValueError(f"per_image: expected lists of one length, found {sorted(lengths)}")
    return np.array(columns, dtype=float).T  # (I, C + 1)


def _figures(sums, images):
    """Figures (..., C + 1), the recalls and last mR, of a table's column sums (..., C + 1).

    images: how many images were summed. The last column sum is their number of captions.
    """
    recalls_a_direction = sums.shape[-1] // 2
    image_hits = sums[..., :recalls_a_direction]
    text_hits = sums[..., recalls_a_direction:-1]
    captions = sums[..., -1:]
    recalls = np.concatenate([100 * image_hits / images, 100 * text_hits / captions], axis=-1)
    mean_recall = recalls.mean(axis=-1, keepdims=True)
    return np.concatenate([recalls, mean_recall], axis=-1)


def _named(per_image, values):
    """Values in the order of `_figures` under their names."""
    named = {"mR": values[-1]}
    place = 0
    for direction in DIRECTIONS:
        named[direction] = {}
        for recall in per_image[direction]:
            named[direction][recall] = values[place]
            place += 1
    return named


def _intervals(table, samples, seed):
    """The 2.5th and 97.5th percentile of each figure, (2, C + 1), over draws of images."""
    rng = np.random.default_rng(seed)
    images = len(table)
    sums = []
    for _ in range(samples):
        drawn = rng.integers(images, size=images)
        times = np.bincount(drawn, minlength=images)
        sums.append(times @ table)
    return np.percentile(_figures(np.array(sums), images), PERCENTILES, axis=0)


def figures(per_image):
    """The figures of a table: mR and recalls in percent."""
    table = _table(per_image)
    return _named(per_image, _figures(table.sum(axis=0), len(table)).tolist())


def bootstrap(per_image, samples=SAMPLES, seed=0):
    """[low, high] of mR and of each recall: the 95 % percentile interval over images."""
    bounds = _intervals(_table(per_image), samples, seed)  # (2, C + 1)
    return _named(per_image, bounds.T.tolist())


# ------------------------------------------------------------------ two results


def _in_order_of(first, other):
    """The other table in the order of the first; ValueError where images or captions differ."""
    if _same_images_in_another_order(first["names"], other["names"]):
        other = _reordered(other, first["names"])
    _require_equal(first, other, "names", "images")
    _require_equal(first, other, "captions", "numbers of captions")
    return other


def _same_images_in_another_order(names, other_names):
    names_are_unique = len(set(names)) == len(names) == len(other_names)
    return names != other_names and names_are_unique and set(names) == set(other_names)


def _reordered(per_image, names):
    """The table with its images in the order of the names."""
    row_of = {name: row for row, name in enumerate(per_image["names"])}
    rows = [row_of[name] for name in names]
    result = {"names": names, "captions": [per_image["captions"][row] for row in rows]}
    for direction in DIRECTIONS:
        result[direction] = {
            recall: [hits[row] for row in rows] for recall, hits in per_image[direction].items()
        }
    return result


def _require_equal(first, other, field, what):
    """ValueError that names the first image whose entries in the field differ."""
    names = [*first["names"], "the end"]
    for name, own, others in zip_longest(names, first[field], other[field]):
        if own != others:
            raise ValueError(
                f"the {what} differ, first at {name}: evaluate both on the same files and split"
            )


def paired(per_image_a, per_image_b, samples=SAMPLES, seed=0):
    """Difference a - b of mR and of each recall, as a `Difference` with its 95 % interval.

    Both are drawn together, so that what is hard in an image cancels out. Raises ValueError where
    the images are not the same.
    """
    per_image_b = _in_order_of(per_image_a, per_image_b)
    differences = _table(per_image_a)  # (I, C + 1)
    differences[:, :-1] -= _table(per_image_b)[:, :-1]  # all but the numbers of captions
    values = _figures(differences.sum(axis=0), len(differences))
    low, high = _intervals(differences, samples, seed)
    columns = zip(values.tolist(), low.tolist(), high.tolist(), strict=True)
    return _named(per_image_a, [Difference(*column) for column in columns])


def averaged(per_images):
    """The mean of several runs' tables, image by image; ValueError where the images differ."""
    first = per_images[0]
    per_images = [_in_order_of(first, table) for table in per_images]
    result = {"names": first["names"], "captions": first["captions"]}
    for direction in DIRECTIONS:
        result[direction] = {}
        for recall in first[direction]:
            runs = [table[direction][recall] for table in per_images]
            result[direction][recall] = np.mean(runs, axis=0).tolist()
    return result


# ------------------------------------------------------------------ two files


class Comparison(NamedTuple):
    """A data set's split in two result files."""

    dataset: str
    split: str
    images: int
    runs: tuple  # how many results each file has of it
    figures: tuple  # of the two files, each the mean over its runs
    difference: dict  # of `Difference`s
    pairs: dict  # seed -> (mR, mR, Difference), where the files have the same several seeds


def method(result, free):
    """What a result's training was, as a string: results of one method differ in chance alone.

    free: names of options that change no result. They are left out, as is the seed, and so are
    options that did nothing, which an older run may not have: those without a value, and `lora`
    where LoRA was not trained. Runs of several seeds may each begin with weights of their own, as
    runs/first-0/plain.pt: the run's seed in such a path becomes SEED.
    """
    options = result["training_options"]
    ignored = {*free, *GONE, "seed"}
    if options.get("train") != "lora":
        ignored.add("lora")
    relevant = {}
    for name, value in options.items():
        if name not in ignored and value is not None:
            relevant[name] = value
    start = relevant.get("clip")
    if start and Path(start).suffix:  # a file, not a CLIP's name
        relevant["clip"] = _without_seed(start, options.get("seed"))
    return json.dumps(relevant, sort_keys=True, default=str)


def _without_seed(path, seed):
    """A path with SEED for every number that is the seed."""
    whole_number = rf"(?<!\d){seed}(?!\d)"
    return re.sub(whole_number, "SEED", path)


def seeds_of(results):
    """The seeds that results were trained with, in their order; None for a plain CLIP."""
    return [result["training_options"].get("seed") for result in results]


def _pairs(results_a, results_b):
    """{seed: (mR of a, mR of b, their Difference)}, empty where seeds are not the same several."""
    seeds_a, seeds_b = seeds_of(results_a), seeds_of(results_b)
    seeds_are_unique = len(set(seeds_a)) == len(seeds_a) == len(seeds_b)
    if len(seeds_a) < 2 or not seeds_are_unique or set(seeds_a) != set(seeds_b):
        return {}
    table_of_b = {
        seed: result["per_image"] for seed, result in zip(seeds_b, results_b, strict=True)
    }
    pairs = {}
    for seed, result in zip(seeds_a, results_a, strict=True):
        a, b = result["per_image"], table_of_b[seed]
        pairs[seed] = (figures(a)["mR"], figures(b)["mR"], paired(a, b)["mR"])
    return pairs


def _compared(place, results_a, results_b, free):
    """The `Comparison` of a place, which is (data set, split)."""
    for results in (results_a, results_b):
        if len({method(result, free) for result in results}) > 1:
            raise ValueError("a file holds runs that differ in more than the seed: a file a method")
    protocols = {result["caption_equivalence"] for result in [*results_a, *results_b]}
    if len(protocols) > 1:
        raise ValueError("one with --caption-equivalence, one without: evaluate both alike")
    mean_a = averaged([result["per_image"] for result in results_a])
    mean_b = averaged([result["per_image"] for result in results_b])
    dataset, split = place
    return Comparison(
        dataset=dataset,
        split=split,
        images=len(mean_a["names"]),
        runs=(len(results_a), len(results_b)),
        figures=(figures(mean_a), figures(mean_b)),
        difference=paired(mean_a, mean_b),
        pairs=_pairs(results_a, results_b),
    )


def by_place(results):
    """Results in lists by what they were measured on: {(data set, split): results}."""
    places = {}
    for result in results:
        places.setdefault((result["dataset"], result["split"]), []).append(result)
    return places


def compare(results_a, results_b, free=()):
    """Comparisons of the results in two files, for each data set and split that both hold.

    Several results of a split in a file are runs of one method, which differ in seed and `free`
    options alone: they are averaged. What one file alone holds is left out. Raises ValueError where
    nothing is in both, and where methods in a file, images or protocol differ.
    """
    places_a, places_b = by_place(results_a), by_place(results_b)
    found = []
    for place in places_a:
        if place not in places_b:
            continue
        try:
            found.append(_compared(place, places_a[place], places_b[place], free))
        except ValueError as error:
            raise ValueError(f"{' '.join(place)}: {error}") from None
    if not found:
        raise ValueError(
            f"no data set and split in both: {_in_words(places_a)} and {_in_words(places_b)}"
        )
    return found


def _in_words(places):
    """The data sets and splits of a file: "ucm test, rsicd test"."""
    return ", ".join(" ".join(place) for place in places) or "nothing"
