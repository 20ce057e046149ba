"""Scores computed from features block by block, against exact sums and one whole matrix."""

import math

import numpy as np
import pytest
import torch

from metrics import ranks, scores
from metrics.protocol import from_features
from metrics.ranks import Retrieval, retrieval
from metrics.scores import feature_scores

IMAGES, TEXTS, WIDTH = 23, 60, 16
OWNERS = np.arange(TEXTS) % IMAGES


def drawn_features(spread=1.0, seed=0):
    """Features of images and texts, around one direction; some are equal."""
    rng = np.random.default_rng(seed)
    images = 1 + spread * rng.normal(size=(IMAGES, WIDTH))
    texts = 1 + spread * rng.normal(size=(TEXTS, WIDTH))
    images[3:6], texts[10:30] = images[0], texts[30:50]
    return images.astype(np.float32), texts.astype(np.float32)


def looped_evidence(images, texts):
    """Evidence of images and texts: a number that their own numbers give."""
    return np.array([[((7 * i + 3 * t) % 5) / 8 for t in texts] for i in images])


def whole_matrix(found):
    """All scores (I, U) of `FeatureScores`, pair by pair."""
    images, distinct = found.shape
    pairs = np.indices((images, distinct)).reshape(2, -1)
    return found.pairs(*pairs).reshape(images, distinct)


@pytest.mark.parametrize("evidence", [None, looped_evidence], ids=["cosine", "evidence"])
# At 1e-4 float32 would tell too few scores apart, so that blocks are computed in float64.
@pytest.mark.parametrize(("spread", "precision"), [(1.0, np.float32), (1e-4, np.float64)])
def test_blocks_are_within_the_tolerance_of_exact_sums(evidence, spread, precision):
    images, texts = drawn_features(spread)
    found, distinct_of_text = feature_scores(images, texts, evidence)
    assert found.precision is precision
    exact = np.empty((IMAGES, TEXTS))
    for i in range(IMAGES):
        for t in range(TEXTS):
            exact[i, t] = math.fsum(images[i].astype(float) * texts[t].astype(float))
    if evidence is not None:
        first = np.unique(distinct_of_text, return_index=True)[1][distinct_of_text]
        exact += looped_evidence(range(IMAGES), first)
    counted = whole_matrix(found)[:, distinct_of_text]
    np.testing.assert_allclose(counted, exact, rtol=1e-13)
    block = found.block(slice(2, 20), slice(1, 30)).T
    own = whole_matrix(found)[2:20, 1:30]
    assert block.dtype == precision
    assert (np.abs(block - own) <= found.tolerance(own)).all()
    assert found.tolerance(own).max() < 1e-4 * np.abs(own).max()


@pytest.mark.parametrize("spread", [1.0, 1e-3, 1e-6, 0.0])
@pytest.mark.parametrize("block", [1, 3, 7, 1024])
def test_ranks_from_features_are_those_of_the_whole_matrix(monkeypatch, spread, block):
    """The smaller the spread, the more scores float32 takes for equal; at 0 all are."""
    monkeypatch.setattr(ranks, "BLOCK", block)
    groups = np.random.default_rng(1).integers(0, 40, TEXTS)
    for precision in (np.float32, np.float64):
        found, distinct_of_text = feature_scores(*drawn_features(spread), looped_evidence)
        found = found._replace(precision=precision)
        by_blocks = Retrieval(found, OWNERS, distinct_of_text, groups)
        at_once = retrieval(whole_matrix(found), OWNERS, distinct_of_text, groups)
        for ours, expected in zip(
            [*by_blocks.ranks(), *by_blocks.rivals()],
            [*at_once.ranks(), *at_once.rivals()],
            strict=True,
        ):
            assert all(map(np.array_equal, ours, expected))


def test_a_score_is_the_same_to_the_bit_whatever_is_scored_beside_it(monkeypatch):
    found, _ = feature_scores(*drawn_features(), looped_evidence)
    expected = whole_matrix(found)
    for size in (1, 3, 7):
        monkeypatch.setattr(scores, "PAIRS", size)
        assert np.array_equal(whole_matrix(found), expected)
    rng = np.random.default_rng(0)
    images, texts = rng.integers(0, IMAGES, 50), rng.integers(0, found.shape[1], 50)
    assert np.array_equal(found.pairs(images, texts), expected[images, texts])
    own, some = np.array([5, 2, 11]), np.array([8, 1])
    assert np.array_equal(whole_matrix(found.part(own, some)), expected[np.ix_(own, some)])


def test_equal_texts_are_one_and_a_zero_has_no_sign():
    images = torch.eye(2)
    texts = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, -0.0]])
    found, distinct_of_text = feature_scores(images, texts)
    assert distinct_of_text.tolist() == [0, 1, 0]
    assert whole_matrix(found).tolist() == [[1, 0], [0, 1]]


@pytest.mark.parametrize(
    ("of_images", "of_texts"), [(1e-42, 1), (1e40, 1), (1e-42, 1e42), (1e40, 1e-40)]
)
def test_features_beyond_the_range_of_float32_are_ranked_as_ever(of_images, of_texts):
    images, texts = (features.astype(float) for features in drawn_features())
    expected = from_features(images, texts, OWNERS).ranks()
    found = from_features(images * of_images, texts * of_texts, OWNERS).ranks()
    for ours, theirs in zip(found, expected, strict=True):
        assert all(map(np.array_equal, ours, theirs))


def test_evidence_that_is_nan_is_an_error():
    def broken(images, texts):
        return np.full((len(images), len(texts)), np.nan)

    with pytest.raises(ValueError, match="scores hold NaN"):
        from_features(*drawn_features(), OWNERS, evidence=broken).ranks()
