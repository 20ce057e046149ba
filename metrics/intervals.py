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

DIRECTIONS = ("image_to_text", "text_to_image")


SAMPLES = 2000


_BOUNDS = (2.5, 97.5)  # percentiles


class Difference(NamedTuple):
    """A difference of two figures in points, and its 95 % interval."""

    value: float
    low: float
    high: float


# ------------------------------------------------------------------ figures of weighted images


def _table(per_image):
    """Columns by image (I, C + 1): the recalls of both directions, then the number of captions."""
    columns = [values for name in DIRECTIONS for values in per_image[name].values()]
    lengths = {len(column) for column in [*columns, per_image["captions"], per_image["names"]]}
    if len(lengths) > 1 or not min(lengths):
        raise ValueError(f"per_image: expected lists of one length, found {sorted(lengths)}")
    return np.array([*columns, per_image["captions"]], dtype=float).T


def _figures(sums, images):
    """Column sums (..., C + 1) over that many images to figures (..., C + 1), the last is mR."""
    half = sums.shape[-1] // 2
    to_text = 100 * sums[..., :half] / images
    to_image = 100 * sums[..., half:-1] / sums[..., -1:]
    recalls = np.concatenate([to_text, to_image], axis=-1)
    return np.concatenate([recalls, recalls.mean(axis=-1, keepdims=True)], axis=-1)


def _named(per_image, values):
    """Values in the order of the figures under their names."""
    *values, mean = values
    values, named = iter(values), {"mR": mean}
    for direction in DIRECTIONS:
        named[direction] = {name: next(values) for name in per_image[direction]}
    return named


def _bounds(table, samples, seed):
    """The 2.5th and 97.5th percentile of each figure, (2, C + 1), over draws of images."""
    rng, images = np.random.default_rng(seed), len(table)
    draws = (rng.integers(images, size=images) for _ in range(samples))
    sums = np.array([np.bincount(draw, minlength=images) @ table for draw in draws])
    return np.percentile(_figures(sums, images), _BOUNDS, axis=0)


def figures(per_image):
    """The figures of a table: mR and recalls in percent."""
    table = _table(per_image)
    return _named(per_image, _figures(table.sum(axis=0), len(table)).tolist())


def bootstrap(per_image, samples=SAMPLES, seed=0):
    """[low, high] of mR and of each recall: the 95 % percentile interval over images."""
    return _named(per_image, _bounds(_table(per_image), samples, seed).T.tolist())


# ------------------------------------------------------------------ two results


def _in_order_of(first, other):
    """The other table in the order of the first; ValueError where images or captions differ."""
    names, others = first["names"], other["names"]
    if names != others and len(set(names)) == len(names) and set(names) == set(others):
        place = {name: i for i, name in enumerate(others)}
        order = [place[name] for name in names]
        sides = {
            direction: {key: [row[i] for i in order] for key, row in other[direction].items()}
            for direction in DIRECTIONS
        }
        captions = [other["captions"][i] for i in order]
        other = {"names": names, "captions": captions, **sides}
    for field, what in (("names", "images"), ("captions", "numbers of captions")):
        if first[field] != other[field]:
            pairs = enumerate(zip_longest(first[field], other[field]))
            at = next(i for i, (own, others) in pairs if own != others)
            name = [*first["names"], "the end"][at]
            raise ValueError(
                f"the {what} differ, first at {name}: evaluate both on the same files and split"
            )
    return other


def paired(per_image_a, per_image_b, samples=SAMPLES, seed=0):
    """Difference a - b of mR and of each recall, as a `Difference` with its 95 % interval.

    Both are drawn together, so that what is hard in an image cancels out. Raises ValueError where
    the images are not the same.
    """
    per_image_b = _in_order_of(per_image_a, per_image_b)
    table = _table(per_image_a)
    table[:, :-1] -= _table(per_image_b)[:, :-1]
    values = _figures(table.sum(axis=0), len(table))
    columns = np.stack([values, *_bounds(table, samples, seed)], axis=1).tolist()
    return _named(per_image_a, [Difference(*column) for column in columns])


def averaged(per_images):
    """The mean of several runs' tables, image by image; ValueError where the images differ."""
    first = per_images[0]
    per_images = [_in_order_of(first, table) for table in per_images]
    mean = {
        direction: {
            name: np.mean([table[direction][name] for table in per_images], axis=0).tolist()
            for name in first[direction]
        }
        for direction in DIRECTIONS
    }
    return {"names": first["names"], "captions": first["captions"], **mean}


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
    """What a result's training was, seed and `free` options aside, as a string to compare.

    Options that did nothing do not count: an older run has not all of them. Runs that each began
    with weights of their own, in files which differ in the run's seed, as runs/first-0/plain.pt,
    are alike.
    """
    options = result["training_options"]
    options = {name: value for name, value in options.items() if value is not None}
    if options.get("train") != "lora":
        options.pop("lora", None)
    seed = options.get("seed")
    options = {name: options[name] for name in options.keys() - {*free, "seed"}}
    if Path(options.get("clip") or "").suffix:
        options["clip"] = re.sub(rf"(?<!\d){seed}(?!\d)", "SEED", options["clip"])
    return json.dumps(options, sort_keys=True, default=str)


def _by_seed(results):
    return {result["training_options"].get("seed"): result["per_image"] for result in results}


def _pairs(a, b):
    first, second = _by_seed(a), _by_seed(b)
    if len(a) < 2 or not len(a) == len(b) == len(first) or first.keys() != second.keys():
        return {}
    return {
        seed: (*(figures(own[seed])["mR"] for own in (first, second)),
               paired(first[seed], second[seed])["mR"])
        for seed in first
    }  # fmt: skip


def _compared(dataset, split, a, b, free):
    for results in (a, b):
        if len({method(result, free) for result in results}) > 1:
            raise ValueError("a file holds runs that differ in more than the seed: a file a method")
    if len({result["caption_equivalence"] for result in [*a, *b]}) > 1:
        raise ValueError("one with --caption-equivalence, one without: evaluate both alike")
    tables = [averaged([result["per_image"] for result in results]) for results in (a, b)]
    return Comparison(
        dataset,
        split,
        len(tables[0]["names"]),
        (len(a), len(b)),
        tuple(map(figures, tables)),
        paired(*tables),
        _pairs(a, b),
    )


def compare(results_a, results_b, free=()):
    """Comparisons of the results in two files, for each data set and split that both hold.

    Several results of a split in a file are runs of one method, which differ in seed and `free`
    options alone: they are averaged. What one file alone holds is left out. Raises ValueError where
    nothing is in both, and where methods in a file, images or protocol differ.
    """
    groups = [{}, {}]
    for results, own in zip((results_a, results_b), groups, strict=True):
        for result in results:
            own.setdefault((result["dataset"], result["split"]), []).append(result)
    a, b = groups
    both = [key for key in a if key in b]
    if not both:
        held = [", ".join(" ".join(key) for key in own) or "nothing" for own in groups]
        raise ValueError(f"no data set and split in both: {held[0]} and {held[1]}")
    found = []
    for key in both:
        try:
            found.append(_compared(*key, a[key], b[key], free))
        except ValueError as error:
            raise ValueError(f"{' '.join(key)}: {error}") from None
    return found
