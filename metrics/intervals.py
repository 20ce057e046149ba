"""How sure a figure is: 95 % bootstrap intervals of a method's figures, and of a difference of two.

A method's runs differ in their seed. One draw takes as many runs as there are, with replacement,
then as many images as there are, with replacement and each with its captions. The images are the
same for all runs of the draw, since all were measured on the same ones; the gallery stays whole.
The interval reaches from the 2.5th to the 97.5th percentile of the figures of 2,000 draws
(percentile bootstrap: Efron and Tibshirani 1993, chapter 13; hierarchical bootstrap, here of two
crossed levels: Owen 2007, "The pigeonhole bootstrap").

So the interval holds the chance in the choice of test images and that of training. Of one run it
holds the images' alone. Of few runs, R, the chance of training comes out too small: the drawn means
have (R - 1) / R of the variance that a mean of R runs has.

A table by image, `per_image` below, is a result file's dict: "names", "captions" (how many each)
and, for "image_to_text" and "text_to_image", lists by recall ("R@1", ...): the chance of a hit, for
"text_to_image" its sum over the image's captions. `runs` are such tables, of one method. All
figures are percent and come as {"mR": ..., "image_to_text": {"R@1": ...}, "text_to_image": {...}}.
Sizes in the shapes below: R runs, I images, C recalls of both directions, S draws.
"""

from itertools import zip_longest
from typing import NamedTuple

import numpy as np

from metrics.methods import methods, seeds_of
from metrics.ranks import DIRECTIONS

SAMPLES = 2000  # draws
PERCENTILES = (2.5, 97.5)  # of the drawn figures: they bound an interval


class Difference(NamedTuple):
    """A difference of two figures in points, and its 95 % interval."""

    value: float
    low: float
    high: float


# ------------------------------------------------------------------ figures of weighted images


def _columns_of_one(per_image):
    """Columns by image (C + 1, I): the recalls of both directions, then the number of captions."""
    columns = []
    for direction in DIRECTIONS:
        columns += per_image[direction].values()
    columns.append(per_image["captions"])
    lengths = {len(column) for column in [*columns, per_image["names"]]}
    if len(lengths) > 1 or lengths == {0}:
        raise ValueError(f"per_image: expected lists of one length, found {sorted(lengths)}")
    return np.array(columns, dtype=float)


def _columns(runs, first):
    """The columns of runs (R, C + 1, I), their images in the order of the table `first`."""
    return np.array([_columns_of_one(_in_order_of(first, run)) for run in runs])


def _figures(sums, images):
    """Figures (..., C + 1), the recalls and last mR, of the columns' sums (..., C + 1).

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


def _mean_sums(columns):
    """The columns' sums over all images, (C + 1), the mean of the runs."""
    return columns.sum(axis=2).mean(axis=0)


# ------------------------------------------------------------------ draws


def _sums_of_drawn_images(columns, samples, seed):
    """The columns' sums over each draw of images, (S, R, C + 1)."""
    runs, width, images = columns.shape
    table = columns.reshape(runs * width, images).T  # (I, R (C + 1))
    rng = np.random.default_rng(seed)
    sums = []
    for _ in range(samples):
        drawn = rng.integers(images, size=images)
        times = np.bincount(drawn, minlength=images)
        sums.append(times @ table)
    return np.array(sums).reshape(samples, runs, width)


def _times_drawn(runs, samples, rng):
    """How often each draw holds each run, (S, R)."""
    drawn = rng.integers(runs, size=(samples, runs))
    is_run = drawn[:, :, None] == np.arange(runs)  # (S, R, R)
    return is_run.sum(axis=1)


def _drawn_sums(columns, samples, seed, level):
    """The columns' sums over each draw of runs and images, (S, C + 1), the mean of its runs.

    Images are drawn by the seed, runs by (seed, level): one seed gives the same images for another
    level, and for any number of runs.
    """
    runs = len(columns)
    sums = _sums_of_drawn_images(columns, samples, seed)  # (S, R, C + 1)
    times = _times_drawn(runs, samples, np.random.default_rng([seed, level]))  # (S, R)
    return (times[:, :, None] * sums).sum(axis=1) / runs


def _bounds(sums, images):
    """The 2.5th and 97.5th percentile of the figures, (2, C + 1), of sums (S, C + 1)."""
    return np.percentile(_figures(sums, images), PERCENTILES, axis=0)


def figures(runs):
    """mR and recalls in percent, the mean of the runs; ValueError where their images differ."""
    first = runs[0]
    columns = _columns(runs, first)
    return _named(first, _figures(_mean_sums(columns), len(first["names"])).tolist())


def bootstrap(runs, samples=SAMPLES, seed=0):
    """[low, high] of mR and of each recall: the 95 % interval over runs and images.

    Of one run it is over images only. Raises ValueError where the runs' images differ.
    """
    first = runs[0]
    sums = _drawn_sums(_columns(runs, first), samples, seed, level=1)
    bounds = _bounds(sums, len(first["names"]))  # (2, C + 1)
    return _named(first, bounds.T.tolist())


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


def difference(runs_a, runs_b, same_seeds, samples=SAMPLES, seed=0):
    """Difference a - b of mR and of each recall, as a `Difference` with its 95 % interval.

    Both are drawn on the same images, so that what is hard in an image cancels out. same_seeds:
    whether run k of a and run k of b have the same seed; then they are drawn together, so that what
    a seed does to both cancels out too. Otherwise each method's runs are drawn by themselves.
    Raises ValueError where the images are not the same.
    """
    first = runs_a[0]
    images = len(first["names"])
    a = _columns(runs_a, first)  # (R, C + 1, I)
    b = _columns(runs_b, first)
    values = _figures(_mean_sums(a), images) - _figures(_mean_sums(b), images)  # (C + 1)
    drawn = _drawn_differences(a, b, same_seeds, samples, seed)  # (S, C + 1)
    low, high = _bounds(drawn, images).tolist()
    columns = zip(values.tolist(), low, high, strict=True)
    return _named(first, [Difference(*column) for column in columns])


def _drawn_differences(a, b, same_seeds, samples, seed):
    """The sums over each draw (S, C + 1) of columns a minus those of b, as of `difference`.

    The last column is that of both, by which hits are divided.
    """
    if same_seeds:
        a_minus_b = a - b
        a_minus_b[:, -1] = a[:, -1]
        return _drawn_sums(a_minus_b, samples, seed, level=1)
    drawn_a = _drawn_sums(a, samples, seed, level=1)
    drawn = drawn_a - _drawn_sums(b, samples, seed, level=2)
    drawn[:, -1] = drawn_a[:, -1]
    return drawn


def share_difference(runs_a, runs_b, names, same_seeds, samples=SAMPLES, seed=0):
    """Difference a - b of shares of queries, in points, as a `Difference`.

    runs_a, runs_b: a list of values by query for each run, all of the same queries. names: the
    image of each query; images are drawn, each with its queries. same_seeds: as of `difference`.
    """
    _, images = np.unique(names, return_inverse=True)
    queries = np.bincount(images)  # (I)

    def columns(runs):
        sums = [[np.bincount(images, weights=values), queries] for values in runs]
        return np.array(sums, dtype=float)  # (R, 2, I)

    a, b = columns(runs_a), columns(runs_b)
    value = 100 * (_mean_sums(a)[0] - _mean_sums(b)[0]) / len(names)
    hits, asked = _drawn_differences(a, b, same_seeds, samples, seed).T  # (S) each
    low, high = np.percentile(100 * hits / asked, PERCENTILES).tolist()
    return Difference(float(value), low, high)


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


def _have_the_same_seeds(results_a, results_b):
    """Whether the seeds are the same in both, each once; one run each has nothing to draw."""
    seeds_a, seeds_b = seeds_of(results_a), seeds_of(results_b)
    if len(seeds_a) == len(seeds_b) == 1:
        return True
    seeds_are_unique = len(set(seeds_a)) == len(seeds_a) == len(seeds_b)
    return seeds_are_unique and set(seeds_a) == set(seeds_b)


def _in_order_of_seeds(results_a, results_b):
    """The results of b in the order of a's seeds."""
    of_seed = dict(zip(seeds_of(results_b), results_b, strict=True))
    return [of_seed[seed] for seed in seeds_of(results_a)]


def _tables(results):
    return [result["per_image"] for result in results]


def _pairs(results_a, results_b):
    """{seed: (mR of a, mR of b, their Difference)} of results with the same seeds, in one order."""
    pairs = {}
    for result_a, result_b in zip(results_a, results_b, strict=True):
        a, b = _tables([result_a]), _tables([result_b])
        [seed] = seeds_of([result_a])
        pairs[seed] = (figures(a)["mR"], figures(b)["mR"], difference(a, b, same_seeds=True)["mR"])
    return pairs


def _compared(place, results_a, results_b, free):
    """The `Comparison` of a place, which is (data set, split)."""
    for results in (results_a, results_b):
        if len(methods(results, free)) > 1:
            raise ValueError("a file holds runs that differ in more than the seed: a file a method")
    protocols = {result["caption_equivalence"] for result in [*results_a, *results_b]}
    if len(protocols) > 1:
        raise ValueError("one with --caption-equivalence, one without: evaluate both alike")
    same_seeds = _have_the_same_seeds(results_a, results_b)
    several = len(results_a) > 1
    if same_seeds and several:
        results_b = _in_order_of_seeds(results_a, results_b)
    runs_a, runs_b = _tables(results_a), _tables(results_b)
    dataset, split = place
    return Comparison(
        dataset=dataset,
        split=split,
        images=len(runs_a[0]["names"]),
        runs=(len(runs_a), len(runs_b)),
        figures=(figures(runs_a), figures(runs_b)),
        difference=difference(runs_a, runs_b, same_seeds),
        pairs=_pairs(results_a, results_b) if same_seeds and several else {},
    )


def by_place(results):
    """Results in lists by what they were measured on: {(data set, split): results}."""
    places = {}
    for result in results:
        places.setdefault((result["dataset"], result["split"]), []).append(result)
    return places


def compare(results_a, results_b, free=()):
    """Comparisons of the results in two files, for each data set and split that both hold.

    Several results of a split in a file are runs of one method (see `methods`), of which the mean
    counts. What one file alone holds is left out. Raises ValueError where nothing is in both, and
    where methods in a file, images or protocol differ.
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
