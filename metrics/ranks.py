"""Ranks of images among texts and of texts among images, exact where scores tie.

Everything here is arrays in, arrays out; evaluate.py makes figures of it. Ties are real: identical
captions have identical features. A rank is therefore an expectation under random order of the tied,
computed exactly, with an optimistic and a pessimistic bound.

Sizes in the shapes below: I images, T texts (captions, each as often as it was written), U distinct
texts, K groups of texts, Q queries, G gallery items.
"""

from typing import NamedTuple

import numpy as np

KS = (1, 5, 10)  # of the recalls that the field reports
DIRECTIONS = ("image_to_text", "text_to_image")
CHUNK = 1024  # queries ranked at once: memory grows with it


def direction_name(direction):
    """A direction in words: "image to text"."""
    return direction.replace("_", " ")


# ------------------------------------------------------------------ queries against a gallery


class Queries(NamedTuple):
    """Some queries and the gallery that they are asked of.

    Equal texts are one gallery item that counts as several: ranks count texts, not items.
    """

    scores: np.ndarray  # (Q, G)
    relevant: np.ndarray  # (Q, G) how many of the item's texts (or images) are relevant
    counts: np.ndarray  # (G,) how many texts (or images) the item stands for


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


def ranks_of(queries):
    """The `Ranks` of `Queries`."""
    scores, relevant, counts = queries
    best = np.where(relevant > 0, scores, -np.inf).max(axis=1, keepdims=True)  # (Q, 1)
    higher = scores > best
    equal = scores == best
    return Ranks(
        better=(higher * counts).sum(axis=1),
        tied=(equal * counts).sum(axis=1),
        relevant=(equal * relevant).sum(axis=1),
    )


class Rivals(NamedTuple):
    """The gallery items that decide each query: all (Q,) integer arrays."""

    own: np.ndarray  # the best-scoring relevant item
    wrong: np.ndarray  # the best-scoring item not all of which is relevant, -1 for none


def rivals_of(queries):
    """The `Rivals` of `Queries`; the first one where several score the same."""
    scores, relevant, counts = queries
    partly_wrong = counts > relevant  # (Q, G)
    own = np.where(relevant > 0, scores, -np.inf).argmax(axis=1)
    wrong = np.where(partly_wrong, scores, -np.inf).argmax(axis=1)
    return Rivals(own, np.where(partly_wrong.any(axis=1), wrong, -1))


# ------------------------------------------------------------------ both directions


class Retrieval(NamedTuple):
    """Scores of a split's images and texts, and which belong together; made by `retrieval`.

    Equal texts are scored once, as one distinct text, and counted as often as they were written. An
    example: image 0 has the text "a ship", image 1 has the texts "a ship" and "a plane". These are
    three texts, two of them distinct:

        image_of_text     [0, 1, 1]
        distinct_of_text  [0, 0, 1]

    A text is relevant to every image that owns a text of the same group. Usually there is a group
    for each image, its own texts:

        group_of_text     [0, 1, 1]
        owns_group        [[1, 0],    image 0 owns group 0
                           [0, 1]]    image 1 owns group 1
        group_counts      [[1, 0],    group 0 holds "a ship" once
                           [1, 1]]    group 1 holds each once

    The product of the two matrices, [[1, 0], [1, 1]], counts for each image how many of the texts
    that a distinct text stands for are relevant. "a ship" stands for two texts, one of which is
    relevant to image 0: a tie of two, whose expected rank is 1.5.

    Where equal captions shall fit equal images, there is a group for each distinct text:

        group_of_text     [0, 0, 1]
        owns_group        [[1, 0],    image 0 owns "a ship"
                           [1, 1]]    image 1 owns both
        group_counts      [[2, 0],    "a ship" was written twice
                           [0, 1]]    "a plane" once

    Now the product is [[2, 0], [2, 1]]. Both texts "a ship" are relevant to image 0: rank 1.
    """

    scores: np.ndarray  # (I, U)
    image_of_text: np.ndarray  # (T,)
    distinct_of_text: np.ndarray  # (T,)
    group_of_text: np.ndarray  # (T,)
    owns_group: np.ndarray  # (I, K) 0 or 1
    group_counts: np.ndarray  # (K, U)

    def image_queries(self, images):
        """`Queries` of some images, a slice or a list; their gallery is the distinct texts."""
        return Queries(
            scores=self.scores[images],
            relevant=(self.owns_group[images] @ self.group_counts).astype(int),
            counts=self.group_counts.sum(axis=0).astype(int),
        )

    def text_queries(self, texts):
        """`Queries` of some texts, a slice or a list; their gallery is the images."""
        return Queries(
            scores=self.scores[:, self.distinct_of_text[texts]].T,
            relevant=self.owns_group[:, self.group_of_text[texts]].T.astype(int),
            counts=np.ones(len(self.scores), dtype=int),
        )

    def ranks(self):
        """`Ranks` of all queries: (of the images (I,), of the texts (T,))."""
        of_images = _in_chunks(ranks_of, self.image_queries, count=len(self.scores))
        of_texts = _in_chunks(ranks_of, self.text_queries, count=len(self.image_of_text))
        return of_images, of_texts

    def rivals(self):
        """`Rivals` of all queries: (of the images (I,), of the texts (T,))."""
        of_images = _in_chunks(rivals_of, self.image_queries, count=len(self.scores))
        of_texts = _in_chunks(rivals_of, self.text_queries, count=len(self.image_of_text))
        return of_images, of_texts


def _in_chunks(function, queries_of, count):
    """`function`, which is `ranks_of` or `rivals_of`, of `count` queries, CHUNK of them at a time.

    queries_of: gives the `Queries` of a slice.
    """
    parts = []
    for start in range(0, count, CHUNK):
        queries = queries_of(slice(start, start + CHUNK))
        parts.append(function(queries))
    kind = type(parts[0])
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    return kind(*columns)


def retrieval(scores, image_of_text, distinct_of_text=None, group_of_text=None):
    """A `Retrieval` of scores (I, U); ValueError on NaN and for an image without caption.

    image_of_text: (T,) the image that each text was written for. distinct_of_text: (T,) the column
    of each text; by default its own, U = T. group_of_text: (T,) ids; a text is relevant to every
    image that owns one of the same group, by default to its own image alone.
    """
    scores = np.asarray(scores)
    image_of_text = np.asarray(image_of_text)
    _check(scores, image_of_text)
    if distinct_of_text is None:
        distinct_of_text = np.arange(len(image_of_text))
    if group_of_text is None:
        group_of_text = image_of_text
    distinct_of_text = np.asarray(distinct_of_text)
    groups, group_of_text = np.unique(group_of_text, return_inverse=True)
    # float32: numpy multiplies integer matrices slowly, and counts below 2**24 stay exact.
    owns_group = np.zeros((len(scores), len(groups)), dtype=np.float32)
    owns_group[image_of_text, group_of_text] = 1
    group_counts = np.zeros((len(groups), scores.shape[1]), dtype=np.float32)
    np.add.at(group_counts, (group_of_text, distinct_of_text), 1)
    return Retrieval(
        scores=scores,
        image_of_text=image_of_text,
        distinct_of_text=distinct_of_text,
        group_of_text=group_of_text,
        owns_group=owns_group,
        group_counts=group_counts,
    )


def _check(scores, image_of_text):
    if np.isnan(scores).any():
        raise ValueError("scores hold NaN: the model or its input is broken")
    without = set(range(len(scores))) - set(image_of_text.tolist())
    if without:
        raise ValueError(f"{len(without)} images have no caption, the first: {min(without)}")


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
