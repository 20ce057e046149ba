"""Ranks of images among texts and of texts among images, exact where scores tie.

Everything here is arrays in, arrays out; evaluate.py makes figures of it. Ties are real: identical
captions have identical features. A rank is therefore an expectation under random order of the tied,
computed exactly, with an optimistic and a pessimistic bound.

Sizes in the shapes below: I images, T caption rows, U distinct texts, Q queries, G gallery items.
"""

from typing import NamedTuple

import numpy as np

KS = (1, 5, 10)  # of the recalls that the field reports


DIRECTIONS = ("image_to_text", "text_to_image")


_CHUNK = 1024  # queries ranked at once


class Ranks(NamedTuple):
    """Where each query's best relevant item stands: all (Q,) integer arrays."""

    better: np.ndarray  # items that score higher
    tied: np.ndarray  # items that score the same, itself included
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


def rank(scores, relevant, rows):
    """Ranks of the best relevant item of each query.

    scores: (Q, G); relevant: (Q, G), how many of an item's gallery rows are relevant to the query;
    rows: (G,), how many gallery rows the item stands for.
    """
    best = np.where(relevant > 0, scores, -np.inf).max(axis=1, keepdims=True)  # (Q, 1)
    equal = scores == best
    better = ((scores > best) * rows).sum(axis=1)
    return Ranks(better, (equal * rows).sum(axis=1), (equal * relevant).sum(axis=1))


def rivals(scores, relevant, rows):
    """The best relevant and the best wrong item of each query: (own, rival), each (Q,).

    The arguments are those of `rank`. Where nothing is wrong, the rival is -1.
    """
    own = np.where(relevant > 0, scores, -np.inf).argmax(axis=1)
    wrong = rows > relevant
    rival = np.where(wrong, scores, -np.inf).argmax(axis=1)
    return own, np.where(wrong.any(axis=1), rival, -1)


# ------------------------------------------------------------------ both directions


class Retrieval(NamedTuple):
    """Scores of a split's images and texts, and which belong together; made by `retrieval`."""

    scores: np.ndarray  # (I, U), images by distinct texts
    image_of_text: np.ndarray  # (T,) the image of each caption row
    text_index: np.ndarray  # (T,) the column of each caption row
    groups: np.ndarray  # (T,) a row is relevant to every image that owns its group
    owns: np.ndarray  # (I, groups) 0 or 1
    texts: np.ndarray  # (groups, U) how many rows of the group a text stands for

    def image_queries(self, which):
        """Images `which` as queries: (scores (Q, U), relevant (Q, U), rows (U,)) for `rank`."""
        relevant = (self.owns[which] @ self.texts).astype(int)
        return self.scores[which], relevant, self.texts.sum(axis=0).astype(int)

    def text_queries(self, which):
        """Caption rows `which` as queries: (scores (Q, I), relevant (Q, I), rows (I,))."""
        relevant = self.owns[:, self.groups[which]].T.astype(int)
        rows = np.ones(len(self.scores), dtype=int)
        return self.scores[:, self.text_index[which]].T, relevant, rows

    def in_chunks(self, function):
        """Columns of function(scores, relevant, rows) over all queries: (of images, of texts)."""
        found = []
        for queries, count in (
            (self.image_queries, len(self.scores)),
            (self.text_queries, len(self.text_index)),
        ):
            starts = range(0, count, _CHUNK)
            parts = [function(*queries(slice(start, start + _CHUNK))) for start in starts]
            found.append([np.concatenate(column) for column in zip(*parts, strict=True)])
        return tuple(found)

    def ranks(self):
        """Ranks in both directions: (image to text (I), text to image (T))."""
        to_text, to_image = self.in_chunks(rank)
        return Ranks(*to_text), Ranks(*to_image)


def retrieval(scores, image_of_text, text_index=None, groups=None):
    """A Retrieval of scores (I, U); ValueError on NaN and for an image without caption.

    image_of_text: (T,) the image of each caption row; text_index: (T,) the column of each row, by
    default the row itself (U = T). groups: (T,) ids; a caption is relevant to every image that has
    one of the same group (default: its image alone).
    """
    scores, image_of_text = np.asarray(scores), np.asarray(image_of_text)
    text_index = np.arange(len(image_of_text)) if text_index is None else np.asarray(text_index)
    groups = image_of_text if groups is None else np.asarray(groups)
    _check(scores, image_of_text)
    groups = np.unique(groups, return_inverse=True)[1]
    owns = np.zeros((len(scores), groups.max() + 1), dtype=np.float32)
    owns[image_of_text, groups] = 1
    texts = np.zeros((owns.shape[1], scores.shape[1]), dtype=np.float32)
    np.add.at(texts, (groups, text_index), 1)
    return Retrieval(scores, image_of_text, text_index, groups, owns, texts)


def retrieval_ranks(scores, image_of_text, text_index=None, groups=None):
    """Ranks in both directions, (image to text (I), text to image (T)), as `retrieval` takes it."""
    return retrieval(scores, image_of_text, text_index, groups).ranks()


def _check(scores, image_of_text):
    if np.isnan(scores).any():
        raise ValueError("scores hold NaN: the model or its input is broken")
    without = set(range(len(scores))) - set(image_of_text.tolist())
    if without:
        raise ValueError(f"{len(without)} images have no caption, the first: {min(without)}")


def per_image(found, names, ks):
    """What intervals.py needs: names, numbers of captions, and the chance of a hit for each k.

    names: of the I images. For texts as queries the chances are summed over an image's captions.
    """
    to_text, to_image = ({f"R@{k}": side.recall(k)[1] for k in ks} for side in found.ranks())
    sums = {key: np.bincount(found.image_of_text, hits) for key, hits in to_image.items()}
    return {
        "names": list(names),
        "captions": np.bincount(found.image_of_text).tolist(),
        # Rounded, so that files stay small; figures move by less than a hundredth of a point.
        "image_to_text": {key: hits.round(4).tolist() for key, hits in to_text.items()},
        "text_to_image": {key: hits.round(4).tolist() for key, hits in sums.items()},
    }


# ------------------------------------------------------------------ single queries


def _row(found, image, column, own):
    """The first caption row in a column that fits the image, or that does not."""
    rows = np.flatnonzero(found.text_index == column)
    return rows[(found.owns[image, found.groups[rows]] > 0) == own][0]


def query_rows(found, names, captions):
    """What became of each query, images first: a list of dicts.

    names: of the I images; captions: the T strings. Fields: direction, query (its number among the
    I images or T captions), number and name of its image, caption (of an image its best-scoring
    one), rank (expected), optimistic, pessimistic, score (of the best relevant item), competitor
    (the best-scoring wrong caption or image) and its score, both None where nothing is wrong.
    """
    result = []
    sides = zip(DIRECTIONS, found.ranks(), found.in_chunks(rivals), strict=True)
    for direction, ranks, (own, rival) in sides:
        columns = (own, rival, ranks.expected(), *ranks.bounds())
        for q, row in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
            result.append(_query_row(found, names, captions, direction, q, *row))
    return result


def _query_row(found, names, captions, direction, q, own, rival, expected, best, worst):
    if direction == "image_to_text":
        image, caption = q, _row(found, q, own, True)
        scores = found.scores[q]
        competitor = captions[_row(found, q, rival, False)] if rival >= 0 else None
    else:
        image, caption = found.image_of_text[q], q
        scores = found.scores[:, found.text_index[q]]
        competitor = names[rival] if rival >= 0 else None
    return {
        "direction": direction,
        "query": q,
        "number": int(image),
        "image": names[image],
        "caption": captions[caption],
        "rank": expected,
        "optimistic": best,
        "pessimistic": worst,
        "score": float(scores[own]),
        "competitor": competitor,
        "competitor_score": float(scores[rival]) if rival >= 0 else None,
    }


def worst_and_best(rows, worst=20, best=10):
    """Some of `query_rows`, the most extreme first: {(direction, "worst" or "best"): queries}.

    Among equal ranks counts how far the competitor is ahead. No image and no sentence is taken
    twice as a query.
    """

    def place(row):
        ahead = -np.inf if row["competitor"] is None else row["competitor_score"] - row["score"]
        return row["rank"], ahead

    chosen = {}
    for direction in DIRECTIONS:
        own, taken = [row for row in rows if row["direction"] == direction], set()
        for kind, number in (("worst", worst), ("best", best)):
            own.sort(key=place, reverse=kind == "worst")
            chosen[direction, kind] = _first(own, number, taken)
    return chosen


def _first(rows, number, taken):
    """So many of the first rows, and of those with equal queries only one."""
    chosen = []
    for row in rows:
        query = row["query"] if row["direction"] == "image_to_text" else row["caption"]
        if query not in taken and len(chosen) < number:
            taken.add(query)
            chosen.append(row)
    return chosen


def top_items(found, captions, direction, q, top=10):
    """The best-scoring items of a query, best first: [{"image" or "caption", "score", "own"}].

    Images are numbers. A caption stands once for all of its `rows` in the gallery; `own` says
    whether the query's image has it, or whether the image is one that the caption was written for.
    """
    queries = found.image_queries if direction == "image_to_text" else found.text_queries
    scores, relevant, rows = queries([q])
    items = []
    for item in np.argsort(-scores[0], kind="stable")[:top].tolist():
        entry = {"score": float(scores[0, item]), "own": bool(relevant[0, item] > 0)}
        if direction == "image_to_text":
            caption = captions[_row(found, q, item, entry["own"])]
            items.append({"caption": caption, "rows": int(rows[item]), **entry})
        else:
            items.append({"image": item, **entry})
    return items
