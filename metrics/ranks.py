"""Ranks of images among texts and of texts among images, exact where scores tie.

Everything here is arrays in, arrays out; evaluate.py makes figures of it. Ties are real: identical
captions have identical features. A rank is therefore an expectation under random order of the tied,
computed exactly, with an optimistic and a pessimistic bound.

Nothing is sorted and no whole matrix of scores is needed: a rank is a count of what scores higher,
and blocks of images and texts are counted one after another. Memory grows with I + T, not I x T.

Sizes in the shapes below: I images, T texts (captions, each as often as it was written), U distinct
texts, A asked texts, Q queries, G items of their gallery, P pairs of both, N any of these pairs.
"""

from collections import defaultdict
from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import numpy as np

KS = (1, 5, 10)  # of the recalls that the field reports
DIRECTIONS = ("image_to_text", "text_to_image")
NAN = "scores hold NaN: the model or its input is broken"
BLOCK = 1024  # images, and distinct texts, of a block


def direction_name(direction):
    """A direction in words: "image to text"."""
    return direction.replace("_", " ")


# ------------------------------------------------------------------ ranks of some queries


class Ranks(NamedTuple):
    """Where each query's best relevant item stands: all (Q,) integer arrays."""

    better: np.ndarray  # texts (or images) that score higher
    tied: np.ndarray  # those that score the same, itself included
    relevant: np.ndarray  # relevant ones among the tied

    def expected(self):
        """Expected rank if the tied are in random order (minimum of r draws from 1 ... m)."""
        return self.better + (self.tied + 1) / (self.relevant + 1)

    def bounds(self):
        """(optimistic, pessimistic) rank: the tied in the best and in the worst order."""
        return self.better + 1, self.better + self.tied - self.relevant + 1

    def recall(self, k):
        """(pessimistic, expected, optimistic) probability (Q,) of a rank of at most k.

        Expected: 1 - C(m - r, k') / C(m, k'), with k' places left for m tied, r of them relevant.
        """
        places = np.clip(k - self.better, 0, self.tied)
        miss = np.ones(len(places))
        for j in range(k):
            left = np.maximum(self.tied - self.relevant - j, 0) / np.maximum(self.tied - j, 1)
            miss = np.where(j < places, miss * left, miss)
        best, worst = self.bounds()
        return (worst <= k).astype(float), 1 - miss, (best <= k).astype(float)


class Rivals(NamedTuple):
    """The gallery items that decide each query, the first one where several score the same.

    All (Q,) integer arrays.
    """

    own: np.ndarray  # the best-scoring relevant item
    wrong: np.ndarray  # the best-scoring item not all of which is relevant, -1 for none


class Pairs(NamedTuple):
    """Pairs of queries and items by their numbers: all (P,) integer arrays, no pair twice."""

    queries: np.ndarray
    items: np.ndarray
    times: np.ndarray  # how many of the texts (or images) that the item stands for are relevant


class Queries(NamedTuple):
    """The queries of one direction.

    Equal texts are one gallery item that counts as several: ranks count texts, not items.
    """

    counts: np.ndarray  # (G,) how many texts (or images) an item stands for
    relevant: Pairs  # at least one of each query
    scores: Callable  # of queries (N,) and items (N,): their scores (N,)
    tolerance: Callable  # of scores (N,): see `MatrixScores`


class Block(NamedTuple):
    """Scores of some queries and some items of their gallery."""

    queries: slice
    items: slice
    scores: np.ndarray  # (queries, items), each within the tolerance


class _Counter:
    """Counts, block by block, what scores higher than a query's best relevant item or the same."""

    def __init__(self, queries):
        self._queries = queries
        pairs = queries.relevant
        scores = queries.scores(pairs.queries, pairs.items)  # (P,)
        self._best = np.full(pairs.queries.max() + 1, -np.inf)  # (Q,)
        np.maximum.at(self._best, pairs.queries, scores)
        is_best = scores == self._best[pairs.queries]
        self._better = np.zeros(len(self._best), dtype=int)
        self._tied = np.zeros(len(self._best), dtype=int)
        self._relevant = _sums(pairs.queries, pairs.times * is_best, size=len(self._best))

    def add(self, block):
        """Count the items of a `Block`. What is nearer than the tolerance is scored by itself."""
        best = self._best[block.queries]
        counts = self._queries.counts[block.items]
        tolerance = self._queries.tolerance(best)
        kind = block.scores.dtype
        higher = block.scores > (best + tolerance).astype(kind)[:, None]
        near = block.scores >= (best - tolerance).astype(kind)[:, None]
        near ^= higher  # what is higher has reached this bound too
        rows, columns = _places(near)
        exact = self._queries.scores(block.queries.start + rows, block.items.start + columns)
        better = counts[columns] * (exact > best[rows])
        tied = counts[columns] * (exact == best[rows])
        self._better[block.queries] += _weighted(higher, counts)
        self._better[block.queries] += _sums(rows, better, size=len(best))
        self._tied[block.queries] += _sums(rows, tied, size=len(best))

    def ranks(self):
        """The `Ranks` of the queries, once all blocks are counted."""
        return Ranks(self._better, self._tied, self._relevant)


class _Finder:
    """Finds, block by block, the best-scoring item of each query that is not wholly relevant."""

    def __init__(self, queries):
        self._queries = queries
        pairs = queries.relevant
        whole = pairs.times == queries.counts[pairs.items]
        self._whole = pairs.queries[whole], pairs.items[whole]
        size = pairs.queries.max() + 1
        self._scores = np.full(size, -np.inf)  # (Q,) the best so far
        self._items = np.full(size, -1)  # (Q,)

    def add(self, block):
        """Look through the items of a `Block`; a query's blocks come in the items' order."""
        rows, columns = _inside(block, *self._whole)
        scores = block.scores.copy()
        scores[rows, columns] = -np.inf
        scores[:, self._queries.counts[block.items] == 0] = -np.inf  # which stand for no text
        top = scores.max(axis=1)
        least = top - 2 * self._queries.tolerance(top)  # that a score may be off, and the top one
        near = scores >= least.astype(scores.dtype)[:, None]
        near &= scores > -np.inf
        rows, columns = _places(near)
        found = block.queries.start + rows, block.items.start + columns
        queries, items, scores = _firsts(*found, self._queries.scores(*found))
        ahead = scores > self._scores[queries]
        self._scores[queries[ahead]] = scores[ahead]
        self._items[queries[ahead]] = items[ahead]

    def rivals(self):
        """The `Rivals` of the queries, once all blocks are looked through."""
        pairs = self._queries.relevant
        scores = self._queries.scores(pairs.queries, pairs.items)
        _, own, _ = _firsts(pairs.queries, pairs.items, scores)
        return Rivals(own, self._items)


def _sums(places, values, size):
    """Whole numbers (N,) summed by their places (N,): (size,)."""
    return np.bincount(places, weights=values, minlength=size).astype(int)


def _weighted(mask, counts):
    """How much each row of a mask (Q, G) counts, with counts (G,) of its columns: (Q,)."""
    if (counts == 1).all():
        return mask.view(np.uint8).sum(axis=1, dtype=np.uint32).astype(int)
    # A product in float32 is fast, though not as fast, and exact for sums below 2**24.
    return (mask.astype(np.float32) @ counts.astype(np.float32)).astype(int)


def _places(mask):
    """Rows and columns (N,) where a mask is set, in the order in which it lies in memory."""
    order = "C" if mask.flags.c_contiguous else "F"
    places = np.flatnonzero(mask.ravel(order))  # several times as fast as np.nonzero of the mask
    return np.unravel_index(places, mask.shape, order)


def _inside(block, queries, items):
    """Rows and columns in a `Block` of those pairs, queries (P,) and items (P,), that it holds."""
    inside = (queries >= block.queries.start) & (queries < block.queries.stop)
    inside &= (items >= block.items.start) & (items < block.items.stop)
    return queries[inside] - block.queries.start, items[inside] - block.items.start


def _firsts(queries, items, scores):
    """Of each query that has pairs the best one, the first of equals: (queries, items, scores)."""
    order = np.lexsort((items, -scores, queries))
    _, first = np.unique(queries[order], return_index=True)
    chosen = order[first]
    return queries[chosen], items[chosen], scores[chosen]


# ------------------------------------------------------------------ both directions


class MatrixScores:
    """A matrix of scores (I, U) as `Retrieval` reads it. metrics/scores.py has some by features.

    `pairs` gives scores as they count. `block` gives many at once, which may be less precise: where
    one of them differs from a score that counts by more than the `tolerance` of that, it is certain
    which of the two is higher. Of a matrix both are the same.
    """

    def __init__(self, matrix):
        self._matrix = matrix
        self.shape = matrix.shape

    def pairs(self, images, texts):
        """The scores (N,) of images (N,) and distinct texts (N,)."""
        return self._matrix[images, texts]

    def block(self, images, texts):
        """The scores of two slices, (texts, images)."""
        return self._matrix[images, texts].T

    def tolerance(self, scores):
        """By how much a score of a block has to differ from each of some scores (N,): (N,)."""
        return np.zeros_like(scores)

    def part(self, images, texts):
        """The scores of some images and distinct texts, by arrays of their numbers."""
        return MatrixScores(self._matrix[np.ix_(images, texts)])


class Retrieval:
    """Scores of a split's images and texts, and which belong together.

    Equal texts are scored once, as one distinct text, and counted as often as they were written. An
    example: image 0 has the text "a ship", image 1 has the texts "a ship" and "a plane". These are
    three texts, two of them distinct:

        image_of_text      [0, 1, 1]
        distinct_of_text   [0, 0, 1]

    A text is relevant to every image that owns a text of the same group. Usually there is a group
    for each image, its own texts. As a query a distinct text is asked once for each of its groups,
    here "a ship" for group 0, "a ship" for group 1, and "a plane" for group 1:

        group_of_text      [0, 1, 1]
        distinct_of_asked  [0, 0, 1]
        asked_of_text      [0, 1, 2]

    "a ship" stands for two texts, one of which is relevant to image 0: a tie of two, whose expected
    rank is 1.5. Where equal captions shall fit equal images, there is a group for each distinct
    text, and each is asked once:

        group_of_text      [0, 0, 1]
        distinct_of_asked  [0, 1]
        asked_of_text      [0, 0, 1]

    Now both texts "a ship" are relevant to image 0: rank 1.
    """

    def __init__(self, scores, image_of_text, distinct_of_text=None, group_of_text=None):
        """scores: `MatrixScores` or the like; the rest is as of `retrieval`."""
        images, distinct = scores.shape
        self.scores = scores
        self.image_of_text = np.asarray(image_of_text)  # (T,)
        _require_captions(self.image_of_text, images)
        if distinct_of_text is None:
            distinct_of_text = np.arange(len(self.image_of_text))
        if group_of_text is None:
            group_of_text = self.image_of_text
        self.distinct_of_text = np.asarray(distinct_of_text)  # (T,)
        _, self.group_of_text = np.unique(group_of_text, return_inverse=True)  # (T,)

        asked = _distinct_pairs(self.distinct_of_text, self.group_of_text)
        self.distinct_of_asked, group_of_asked, self.asked_of_text = asked
        owned_images, owned_asked = self._owned(group_of_asked)
        times = np.bincount(self.asked_of_text)[owned_asked]
        image, text, pair = _distinct_pairs(owned_images, self.distinct_of_asked[owned_asked])
        self._of_images = Queries(
            counts=np.bincount(self.distinct_of_text, minlength=distinct),
            relevant=Pairs(image, text, _sums(pair, times, size=len(image))),
            scores=scores.pairs,
            tolerance=scores.tolerance,
        )
        self._of_asked = Queries(
            counts=np.ones(images, dtype=int),
            relevant=Pairs(owned_asked, owned_images, np.ones_like(owned_asked)),
            scores=self._scores_of_asked,
            tolerance=scores.tolerance,
        )

    def _owned(self, group_of_asked):
        """Images and asked texts that are relevant to each other, by their numbers: (P,) each."""
        asked_of_group = defaultdict(list)
        for asked, group in enumerate(group_of_asked.tolist()):
            asked_of_group[group].append(asked)
        images, groups, _ = _distinct_pairs(self.image_of_text, self.group_of_text)
        owned_images, owned_asked = [], []
        for image, group in zip(images.tolist(), groups.tolist(), strict=True):
            for asked in asked_of_group[group]:
                owned_images.append(image)
                owned_asked.append(asked)
        return np.array(owned_images), np.array(owned_asked)

    def _scores_of_asked(self, asked, images):
        return self.scores.pairs(images, self.distinct_of_asked[asked])

    def _blocks(self):
        """A `Block` of images as queries and one of asked texts, of all images and texts in turn.

        Both are of the same scores, which are computed once.
        """
        all_images, all_texts = self.scores.shape
        for images in _slices(all_images):
            for texts in _slices(all_texts):
                scores = self.scores.block(images, texts)  # (texts, images)
                ends = np.searchsorted(self.distinct_of_asked, [texts.start, texts.stop])
                asked = slice(*ends.tolist())
                rows = self.distinct_of_asked[asked] - texts.start
                of_asked = scores  # (asked, images)
                if not np.array_equal(rows, np.arange(len(scores))):  # else spare the copy
                    of_asked = scores[rows]
                yield Block(images, texts, scores.T), Block(asked, images, of_asked)

    def ranks(self):
        """`Ranks` of all queries, counted once: (of the images (I,), of the texts (T,))."""
        return self._ranks

    @cached_property
    def _ranks(self):
        counters = _Counter(self._of_images), _Counter(self._of_asked)
        for blocks in self._blocks():
            for counter, block in zip(counters, blocks, strict=True):
                counter.add(block)
        of_images, of_asked = (counter.ranks() for counter in counters)
        return of_images, Ranks(*(column[self.asked_of_text] for column in of_asked))

    def rivals(self):
        """`Rivals` of all queries: (of the images (I,), of the texts (T,)).

        Of the images they are distinct texts, of the texts they are images.
        """
        finders = _Finder(self._of_images), _Finder(self._of_asked)
        for blocks in self._blocks():
            for finder, block in zip(finders, blocks, strict=True):
                finder.add(block)
        of_images, of_asked = (finder.rivals() for finder in finders)
        return of_images, Rivals(*(column[self.asked_of_text] for column in of_asked))

    def is_relevant(self, image, texts):
        """Whether each of the texts (N,), by their numbers, is relevant to an image: (N,)."""
        own_groups = self.group_of_text[self.image_of_text == image]
        return np.isin(self.group_of_text[texts], own_groups)

    def part(self, images):
        """The Retrieval of some images, an array of their numbers, and of their texts."""
        texts = np.flatnonzero(np.isin(self.image_of_text, images))
        distinct, distinct_of_text = np.unique(self.distinct_of_text[texts], return_inverse=True)
        place = {image: i for i, image in enumerate(images.tolist())}
        return Retrieval(
            scores=self.scores.part(images, distinct),
            image_of_text=[place[image] for image in self.image_of_text[texts].tolist()],
            distinct_of_text=distinct_of_text,
            group_of_text=self.group_of_text[texts],
        )


def _distinct_pairs(first, second):
    """The distinct pairs of numbers (N,) and (N,), sorted, and the place of each among them."""
    width = int(second.max()) + 1
    keys, place = np.unique(first.astype(np.int64) * width + second, return_inverse=True)
    return keys // width, keys % width, place


def _slices(size):
    """Slices of BLOCK, one after another."""
    return [slice(start, min(start + BLOCK, size)) for start in range(0, size, BLOCK)]


def _require_captions(image_of_text, images):
    without = set(range(images)) - set(image_of_text.tolist())
    if without:
        raise ValueError(f"{len(without)} images have no caption, the first: {min(without)}")


def retrieval(scores, image_of_text, distinct_of_text=None, group_of_text=None):
    """A `Retrieval` of a matrix (I, U); ValueError on NaN and for an image without caption.

    image_of_text: (T,) the image that each text was written for. distinct_of_text: (T,) the column
    of each text; by default its own, U = T. group_of_text: (T,) ids; a text is relevant to every
    image that owns one of the same group, by default to its own image alone.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if np.isnan(scores).any():
        raise ValueError(NAN)
    return Retrieval(MatrixScores(scores), image_of_text, distinct_of_text, group_of_text)


def per_image(found, names, ks):
    """What intervals.py needs of a `Retrieval`, as a dict of lists with an entry for each image.

    names: of the I images. Beside the names it holds the number of captions and, for each direction
    and each k, the chance of a hit; for texts as queries its sum over the image's captions.
    """
    of_images, of_texts = found.ranks()
    image_hits = {}
    text_hits = {}
    for k in ks:
        _, expected, _ = of_images.recall(k)
        image_hits[f"R@{k}"] = _rounded(expected)
        _, expected, _ = of_texts.recall(k)
        text_hits[f"R@{k}"] = _rounded(np.bincount(found.image_of_text, weights=expected))
    return {
        "names": list(names),
        "captions": np.bincount(found.image_of_text).tolist(),
        "image_to_text": image_hits,
        "text_to_image": text_hits,
    }


def _rounded(hits):
    """So that files stay small; figures move by less than a hundredth of a point."""
    return hits.round(4).tolist()
