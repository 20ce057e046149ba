"""Scores of images and texts, computed from their features as `ranks.Retrieval` asks for them.

Sizes in the shapes below: I images, T texts (captions, each as often as it was written), U distinct
texts, D the embedding width, N pairs of an image and a text.
"""

import hashlib
from typing import NamedTuple

import numpy as np
import torch

from metrics.ranks import NAN

PAIRS = 256  # scored at once by `FeatureScores.pairs`: few enough for a cache
FEW = 256  # images, and texts, of which is looked how far their scores scatter
FAR = 256  # tolerances of float32: where scores scatter by less, it would tell too few apart


class FeatureScores(NamedTuple):
    """Products of features in float64, with evidence added or not: scores (I, U).

    The score of a pair is a function of the two features and their evidence alone. Whatever else is
    scored with it, and in which order, it is the same to the bit: equal features tie exactly.
    """

    image_features: np.ndarray
    text_features: np.ndarray
    image_rows: np.ndarray  # (I,) the features of each image; equal ones are one row
    text_rows: np.ndarray  # (U,) the features of each distinct text
    images: np.ndarray  # (I,) the number of each image for `evidence`; of a text it is its row
    evidence: object  # as of `feature_scores`, or None
    size: float  # the largest that a product can be
    precision: type  # of blocks: float32 or float64; those of `pairs` are float64

    @property
    def shape(self):
        return len(self.image_rows), len(self.text_rows)

    def pairs(self, images, texts):
        """The scores (N,) of images (N,) and distinct texts (N,)."""
        parts = [np.empty(0)]
        for start in range(0, len(images), PAIRS):
            chunk = slice(start, start + PAIRS)
            scores = self._products(images[chunk], texts[chunk])
            if self.evidence is not None:
                scores += self._evidence_of_pairs(images[chunk], texts[chunk])
            parts.append(scores)
        return np.concatenate(parts)

    def _products(self, images, texts):
        """The products (N,) of pairs, each row summed by itself; equal pairs are one."""
        # Where a model gives all images the same features, nearly all pairs are equal.
        width = len(self.text_features)
        keys = self.image_rows[images].astype(np.int64) * width + self.text_rows[texts]
        keys, place = np.unique(keys, return_inverse=True)
        image_features = self.image_features[keys // width].astype(np.float64)
        text_features = self.text_features[keys % width].astype(np.float64)
        return (image_features * text_features).sum(axis=1)[place]

    def _evidence_of_pairs(self, images, texts):
        """The evidence (N,) of pairs, from that of all these images for all these texts."""
        images, rows = np.unique(self.images[images], return_inverse=True)
        texts, columns = np.unique(self.text_rows[texts], return_inverse=True)
        return self._evidence(images, texts)[rows, columns]

    def _evidence(self, images, texts):
        evidence = np.asarray(self.evidence(images, texts), dtype=np.float64)
        if np.isnan(evidence).any():
            raise ValueError(NAN)
        return evidence

    def block(self, images, texts):
        """The scores of two slices, (texts, images), by one matrix product."""
        image_features = self.image_features[self.image_rows[images]]
        text_features = self.text_features[self.text_rows[texts]]
        image_features = image_features.astype(self.precision, copy=False)
        text_features = text_features.astype(self.precision, copy=False)
        scores = text_features @ image_features.T  # (texts, images)
        if self.evidence is not None:
            scores += self._evidence(self.images[images], self.text_rows[texts]).T
        return scores

    def tolerance(self, scores):
        """By how much a score of a block has to differ from each of some scores (N,): (N,)."""
        width = self.image_features.shape[1]
        error = _error(width, self.precision) + _error(width, np.float64)
        return error * (self.size + np.abs(scores))

    def part(self, images, texts):
        """The scores of some images and distinct texts, by arrays of their numbers."""
        return self._replace(
            image_rows=self.image_rows[images],
            text_rows=self.text_rows[texts],
            images=self.images[images],
        )


def feature_scores(image_features, text_features, evidence=None):
    """(`FeatureScores` of features (I, D) and (T, D), the distinct text (T,) of each text).

    evidence: a function that gives, for arrays of numbers of images (M,) and of texts (N,), what
    is added to their products, (M, N); texts of equal features have that of the first. It is asked
    for again for scores that lie close together: ranks take several times as long with it. Raises
    ValueError for features that are not finite.
    """
    image_features = _as_array(image_features)
    text_features = _as_array(text_features)
    norms = _largest_norm(image_features), _largest_norm(text_features)
    size = norms[0] * norms[1]
    if not np.isfinite(size):
        raise ValueError(NAN)
    first_images, distinct_of_image = _distinct(image_features)
    first_texts, distinct_of_text = _distinct(text_features)
    scores = FeatureScores(
        image_features=image_features,
        text_features=text_features,
        image_rows=first_images[distinct_of_image],
        text_rows=first_texts,
        images=np.arange(len(image_features)),
        evidence=evidence,
        size=size,
        precision=_precision(
            image_features[first_images[:FEW]], text_features[first_texts[:FEW]], norms
        ),
    )
    return scores, distinct_of_text


def _error(width, precision):
    """How far a score is off at most, as a share of the largest product and the score together.

    A sum of D products, added in any order, is off by at most D u / (1 - D u), where u is the
    rounding of one operation (Higham, Accuracy and Stability of Numerical Algorithms, 2002, section
    3.1). Four more are for the rounding of both features to the precision, for adding evidence, and
    for the bound that is compared with.
    """
    rounding = (width + 4) * np.finfo(precision).eps / 2
    return rounding / (1 - rounding)


def _precision(image_features, text_features, norms):
    """Of blocks: float32, which is twice as fast, or float64, where it tells too few apart."""
    some_images = image_features.astype(np.float64)
    some_texts = text_features.astype(np.float64)
    scatter = (some_texts @ some_images.T).std()
    error = norms[0] * norms[1] * _error(image_features.shape[1], np.float32)
    fits = all(1e-10 < norm < 1e10 for norm in norms)  # no feature or product leaves its range
    return np.float32 if fits and scatter > FAR * error else np.float64


def _as_array(features):
    """Features as an array, in float64 if they are, else in float32, which holds other floats."""
    features = torch.as_tensor(features).contiguous()
    return (features if features.dtype == torch.float64 else features.float()).numpy()


def _parts(features):
    """Features, some rows at a time."""
    return [features[start : start + PAIRS] for start in range(0, len(features), PAIRS)]


def _largest_norm(features):
    """The length of the longest row; not finite where an entry is not."""
    norms = [np.linalg.norm(part.astype(np.float64), axis=1) for part in _parts(features)]
    return np.concatenate(norms).max()


def _distinct(features):
    """The first of each of the distinct rows, and each row's number among them: arrays.

    Rows are told apart by digests, which take a hundredth of the memory of sorted copies.
    """
    number_of_digest = {}
    first = []
    distinct_of_row = []
    for part in _parts(features):
        for row in part + 0.0:  # -0.0, which is equal to 0.0, becomes 0.0
            digest = hashlib.blake2b(row, digest_size=16).digest()
            if digest not in number_of_digest:
                number_of_digest[digest] = len(number_of_digest)
                first.append(len(distinct_of_row))
            distinct_of_row.append(number_of_digest[digest])
    return np.array(first), np.array(distinct_of_row)
