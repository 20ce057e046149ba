"""Ranks against loops over random tie orders."""

import math

import numpy as np
import pytest

from metrics import ranks
from metrics.queries import query_rows
from metrics.ranks import Ranks, per_image, retrieval

IMAGES = 6
OWNERS = np.array([0, 0, 1, 2, 2, 2, 3, 4, 4, 5, 5, 5])  # the image of each text
GROUPS = np.array([0, 1, 2, 0, 3, 4, 5, 1, 1, 6, 7, 2])  # of the texts, over images
NAMES = [f"{i}.png" for i in range(IMAGES)]
CAPTIONS = [f"caption {t}" for t in range(len(OWNERS))]
SHUFFLES = 20000  # shared by the queries of a matrix
KS = (1, 3, 5)
KINDS = pytest.mark.parametrize("kind", ["distinct", "rounded", "equal"])


def score_matrix(kind, columns=12):
    scores = np.random.default_rng(0).uniform(-1, 1, (IMAGES, columns))
    return {"distinct": scores, "rounded": scores.round(), "equal": 0 * scores}[kind]


def looped_queries(scores, groups):
    """(direction, image, scores of the gallery, relevant, its names) of each query, by loops."""
    found = []
    for i in range(IMAGES):
        own = {groups[t] for t in range(len(OWNERS)) if OWNERS[t] == i}
        relevant = np.array([group in own for group in groups])
        found.append(("image_to_text", i, scores[i], relevant, CAPTIONS))
    for t in range(len(OWNERS)):
        fits = {OWNERS[s] for s in range(len(OWNERS)) if groups[s] == groups[t]}
        relevant = np.array([i in fits for i in range(IMAGES)])
        found.append(("text_to_image", OWNERS[t], scores[:, t], relevant, NAMES))
    return found


def first_relevant(scores, relevant, order):
    """Rank, from 1, of the first relevant item, the tied being in the given order."""
    ranked = order[np.argsort(-scores[order], kind="stable")]
    return 1 + int(np.flatnonzero(relevant[ranked])[0])


def check_against_orders(ranks, cases):
    """Expected ranks and recalls against shuffles, the bounds against the best and worst order."""
    rng = np.random.default_rng(0)
    for q, (_, _, scores, relevant, _) in enumerate(cases):
        orders = (rng.permutation(len(scores)) for _ in range(SHUFFLES // len(cases)))
        found = np.array([first_relevant(scores, relevant, order) for order in orders])
        error = 4 * max(found.std(), 1e-9) / math.sqrt(len(found))
        assert ranks.expected()[q] == pytest.approx(found.mean(), abs=error)
        worst = first_relevant(scores, relevant, np.argsort(relevant, kind="stable"))
        best = first_relevant(scores, relevant, np.argsort(~relevant, kind="stable"))
        for k in KS:
            pessimistic, expected, optimistic = (part[q] for part in ranks.recall(k))
            hits = found <= k
            share = hits.mean()
            error = 4 * math.sqrt(max(share * (1 - share), 1 / len(found)) / len(found)) + 1e-9
            if share in (0, 1) and (worst <= k) == (best <= k):
                error = 1e-9  # no tie decides this one
            assert expected == pytest.approx(share, abs=error)
            assert (pessimistic, optimistic) == (worst <= k, best <= k)


@KINDS
@pytest.mark.parametrize("groups", [None, GROUPS], ids=["strict", "equivalent"])
def test_ranks_are_the_mean_over_orders_of_the_tied(kind, groups):
    scores = score_matrix(kind)
    cases = looped_queries(scores, OWNERS if groups is None else groups)
    of_images, of_texts = retrieval(scores, OWNERS, group_of_text=groups).ranks()
    check_against_orders(of_images, cases[:IMAGES])
    check_against_orders(of_texts, cases[IMAGES:])


def test_expected_recall_of_two_relevant_among_five_tied():
    # A miss of both in k draws: (3/5), (3/5)(2/4), (3/5)(2/4)(1/3), 0.
    ranks = Ranks(*(np.array([n]) for n in (0, 5, 2)))
    found = [ranks.recall(k)[1][0] for k in (1, 2, 3, 4, 5)]
    assert found == pytest.approx([0.4, 0.7, 0.9, 1.0, 1.0])
    assert ranks.expected()[0] == pytest.approx(1 * 0.4 + 2 * 0.3 + 3 * 0.2 + 4 * 0.1)
    assert [ranks.recall(k)[0][0] for k in (3, 4)] == [0, 1]
    assert ranks.recall(1)[2][0] == 1


@KINDS
def test_distinct_texts_equal_repeated_columns(kind):
    distinct_of_text = np.array([3, 0, 1, 1, 2, 2, 0, 4, 3, 3, 4, 1])
    scores = score_matrix(kind, columns=5)
    repeated = retrieval(scores[:, distinct_of_text], OWNERS).ranks()
    distinct = retrieval(scores, OWNERS, distinct_of_text).ranks()
    for found, expected in zip(distinct, repeated, strict=True):
        assert all(map(np.array_equal, found, expected))


def test_the_table_by_image_of_a_hand_ranked_example():
    scores = [[0.9, 0.9, 0.8], [0.7, 0.6, 0.5]]
    # Image 0: its text ties with another's. Image 1 is second. Texts: first, second, second.
    assert per_image(retrieval(scores, [0, 1, 1]), ["a", "b"], ks=(1, 2)) == {
        "names": ["a", "b"],
        "captions": [1, 2],
        "image_to_text": {"R@1": [0.5, 0.0], "R@2": [1.0, 1.0]},
        "text_to_image": {"R@1": [1.0, 0.0], "R@2": [1.0, 2.0]},
    }


# ------------------------------------------------------------------ blocks, against loops


def drawn_retrieval(seed):
    """Arguments of `retrieval`: few values of scores, so that many tie; several kinds of groups."""
    rng = np.random.default_rng(seed)
    images, distinct, texts = 9, 11, 30
    image_of_text = rng.permutation(np.arange(texts) % images)
    distinct_of_text = 1 + rng.permutation(np.arange(texts) % distinct)
    groups = [None, distinct_of_text, rng.integers(0, 6, texts)][seed % 3]
    # One column more than there are distinct texts: it stands for none.
    scores = rng.integers(0, (2, 5, 1000)[seed % 3], (images, distinct + 1)) / 8
    return scores, image_of_text, distinct_of_text, groups


def looped_ranks(scores, image_of_text, distinct_of_text, groups):
    """((better, tied, relevant), (own, wrong)) of each image, and of each text, by loops."""
    groups = image_of_text if groups is None else groups
    texts = range(len(image_of_text))
    fits = np.zeros((len(scores), len(texts)), dtype=bool)
    for i in range(len(scores)):
        for t in texts:
            fits[i, t] = any(image_of_text[s] == i and groups[s] == groups[t] for s in texts)
    of_images, of_texts = [], []
    for i in range(len(scores)):
        own = scores[i, distinct_of_text]  # (T,)
        of_images.append(standing(own, fits[i], distinct_of_text))
    for t in texts:
        own = scores[:, distinct_of_text[t]]  # (I,)
        of_texts.append(standing(own, fits[:, t], np.arange(len(scores))))
    return of_images, of_texts


def standing(scores, fits, items):
    """((better, tied, relevant), (own, wrong)) of one query; items: the item of each score."""
    best = scores[fits].max()
    ranks = (scores > best).sum(), (scores == best).sum(), (scores[fits] == best).sum()
    own = items[fits & (scores == best)].min()
    if fits.all():
        return ranks, (own, -1)
    highest = scores[~fits].max()
    return ranks, (own, items[~fits & (scores == highest)].min())


@pytest.mark.parametrize("block", [1, 3, 7, 1024])
@pytest.mark.parametrize("seed", range(6))
def test_ranks_and_rivals_are_those_of_loops_at_any_size_of_blocks(monkeypatch, seed, block):
    monkeypatch.setattr(ranks, "BLOCK", block)
    drawn = drawn_retrieval(seed)
    found = retrieval(*drawn)
    for own_ranks, rivals, looped in zip(
        found.ranks(), found.rivals(), looped_ranks(*drawn), strict=True
    ):
        assert np.stack(own_ranks, axis=1).tolist() == [list(one) for one, _ in looped]
        assert np.stack(rivals, axis=1).tolist() == [list(one) for _, one in looped]


@pytest.mark.parametrize("block", [1, 4])
def test_the_size_of_blocks_changes_no_row(monkeypatch, block):
    scores = score_matrix("rounded")
    expected = query_rows(retrieval(scores, OWNERS), NAMES, CAPTIONS)
    monkeypatch.setattr(ranks, "BLOCK", block)
    assert query_rows(retrieval(scores, OWNERS), NAMES, CAPTIONS) == expected


def test_a_part_is_the_retrieval_of_its_images_alone():
    scores, image_of_text, distinct_of_text, _ = drawn_retrieval(1)
    own = np.array([7, 2, 4])
    texts = np.flatnonzero(np.isin(image_of_text, own))
    expected = retrieval(
        scores[np.ix_(own, distinct_of_text[texts])],
        [own.tolist().index(image) for image in image_of_text[texts]],
    ).ranks()
    found = retrieval(scores, image_of_text, distinct_of_text).part(own).ranks()
    for one, other in zip(found, expected, strict=True):
        assert all(map(np.array_equal, one, other))
