"""Ranks against loops over random tie orders, and the lists of single queries against loops."""

import math

import numpy as np
import pytest

from metrics import ranks
from metrics.ranks import (
    Ranks,
    per_image,
    query_rows,
    retrieval,
    retrieval_ranks,
    top_items,
    worst_and_best,
)

OWNERS = np.array([0, 0, 1, 2, 2, 2, 3, 4, 4, 5, 5, 5])  # the image of each caption
IMAGES = 6
SHUFFLES = 20000  # shared by the queries of a matrix
KS = (1, 3, 5)


def score_matrix(kind, columns=12):
    scores = np.random.default_rng(0).uniform(-1, 1, (IMAGES, columns))
    return {"distinct": scores, "rounded": scores.round(), "equal": 0 * scores}[kind]


def queries(scores, owners=OWNERS):
    """(scores of a query, whether each gallery item is relevant), image to text first."""
    scores = np.asarray(scores)
    to_text = [(row, owners == i) for i, row in enumerate(scores)]
    to_image = [(scores[:, t], np.arange(len(scores)) == owners[t]) for t in range(len(owners))]
    return to_text, to_image


def first_relevant(scores, relevant, order):
    """Rank, from 1, of the first relevant item, the tied being in the given order."""
    ranked = order[np.argsort(-scores[order], kind="stable")]
    return 1 + int(np.flatnonzero(relevant[ranked])[0])


def check_against_orders(ranks, cases):
    """Expected ranks and recalls against shuffles, the bounds against the best and worst order."""
    rng = np.random.default_rng(0)
    for q, (scores, relevant) in enumerate(cases):
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


# ------------------------------------------------------------------ ranks


@pytest.mark.parametrize("kind", ["distinct", "rounded", "equal"])
def test_ranks_are_the_mean_over_orders_of_the_tied(kind):
    scores = score_matrix(kind)
    for own, cases in zip(retrieval_ranks(scores, OWNERS), queries(scores), strict=True):
        check_against_orders(own, cases)


def test_expected_recall_of_two_relevant_among_five_tied():
    # A miss of both in k draws: (3/5), (3/5)(2/4), (3/5)(2/4)(1/3), 0.
    ranks = Ranks(*(np.array([n]) for n in (0, 5, 2)))
    found = [ranks.recall(k)[1][0] for k in (1, 2, 3, 4, 5)]
    assert found == pytest.approx([0.4, 0.7, 0.9, 1.0, 1.0])
    assert ranks.expected()[0] == pytest.approx(1 * 0.4 + 2 * 0.3 + 3 * 0.2 + 4 * 0.1)
    assert [ranks.recall(k)[0][0] for k in (3, 4)] == [0, 1]
    assert ranks.recall(1)[2][0] == 1


@pytest.mark.parametrize("kind", ["distinct", "rounded", "equal"])
def test_distinct_texts_equal_repeated_columns(kind):
    text_index = np.array([3, 0, 1, 1, 2, 2, 0, 4, 3, 3, 4, 1])
    scores = score_matrix(kind, columns=5)
    repeated = retrieval_ranks(scores[:, text_index], OWNERS)
    for found, expected in zip(retrieval_ranks(scores, OWNERS, text_index), repeated, strict=True):
        assert all(map(np.array_equal, found, expected))


@pytest.mark.parametrize("kind", ["distinct", "rounded", "equal"])
def test_caption_groups_equal_a_loop(kind):
    scores = score_matrix(kind)
    groups = np.array([0, 1, 2, 0, 3, 4, 5, 1, 1, 6, 7, 2])
    of_image = [set(groups[i == OWNERS]) for i in range(IMAGES)]
    to_text, to_image = queries(scores)
    to_text = [
        (row, np.array([g in of_image[i] for g in groups])) for i, (row, _) in enumerate(to_text)
    ]
    to_image = [
        (column, np.array([groups[t] in own for own in of_image]))
        for t, (column, _) in enumerate(to_image)
    ]
    found = retrieval_ranks(scores, OWNERS, groups=groups)
    for own, cases in zip(found, (to_text, to_image), strict=True):
        check_against_orders(own, cases)


# ------------------------------------------------------------------ single queries

GROUPS = np.array([0, 1, 2, 0, 3, 4, 5, 1, 1, 6, 7, 2])  # of the captions, over images
NAMES = [f"{i}.png" for i in range(IMAGES)]
CAPTIONS = [f"caption {t}" for t in range(len(OWNERS))]


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


@pytest.mark.parametrize("groups", [OWNERS, GROUPS], ids=["strict", "equivalent"])
@pytest.mark.parametrize("kind", ["distinct", "rounded", "equal"])
def test_query_rows_equal_a_loop(kind, groups):
    scores = score_matrix(kind)
    rows = query_rows(retrieval(scores, OWNERS, groups=groups), NAMES, CAPTIONS)
    expected = looped_queries(scores, groups)
    assert len(rows) == len(expected) == IMAGES + len(OWNERS)
    for row, (direction, image, gallery, relevant, labels) in zip(rows, expected, strict=True):
        assert (row["direction"], row["image"], row["number"]) == (direction, NAMES[image], image)
        best = gallery[relevant].max()
        assert row["score"] == best
        assert row["optimistic"] == 1 + np.sum(gallery > best)
        assert row["pessimistic"] == 1 + np.sum(gallery[~relevant] >= best)
        rival = labels.index(row["competitor"])
        assert not relevant[rival]
        assert row["competitor_score"] == gallery[rival] == gallery[~relevant].max()
        if direction == "image_to_text":
            caption = CAPTIONS.index(row["caption"])
            assert relevant[caption] and gallery[caption] == best
    assert [row["caption"] for row in rows[IMAGES:]] == CAPTIONS


def test_a_text_of_two_images_is_its_own_rival():
    """One column of scores for the captions of both images: for each, the other's is wrong."""
    found = retrieval([[0.9, 0.1], [0.8, 0.2]], [0, 1, 1], text_index=[0, 0, 1])
    first, second, *_ = query_rows(found, ["a", "b"], ["sea, of a", "sea, of b", "land, of b"])
    assert (first["caption"], first["competitor"]) == ("sea, of a", "sea, of b")
    assert (second["caption"], second["competitor"]) == ("sea, of b", "sea, of a")
    assert first["score"] == first["competitor_score"] == 0.9
    assert (first["rank"], first["optimistic"], first["pessimistic"]) == (1.5, 1, 2)


def test_where_nothing_is_wrong_there_is_no_rival():
    found = retrieval(np.ones((2, 2)), [0, 1], groups=[7, 7])
    for row in query_rows(found, ["a", "b"], ["same", "same"]):
        assert row["competitor"] is row["competitor_score"] is None
        assert row["rank"] == row["pessimistic"] == 1


def test_worst_and_best_are_the_ends_of_the_ranks():
    def row(query, rank, ahead, caption):
        return {
            "direction": "text_to_image",
            "query": query,
            "caption": caption,
            "rank": rank,
            "competitor": "x",
            "competitor_score": ahead,
            "score": 0.0,
        }

    rows = [row(*r) for r in [(0, 1, -0.1, "a"), (1, 9, 0.2, "b"), (2, 9, 0.3, "c")]]
    rows += [row(*r) for r in [(3, 1, -0.9, "d"), (4, 5, 0.1, "e"), (5, 8, 0.5, "b")]]
    chosen = worst_and_best(rows, worst=3, best=9)
    numbers = {kind: [r["query"] for r in own] for (_, kind), own in chosen.items() if own}
    # 5 asks what 1 asks: it is left out. 2 is further behind than 1, 3 further ahead than 0.
    assert numbers == {"worst": [2, 1, 4], "best": [3, 0]}
    assert chosen["image_to_text", "worst"] == []


def test_top_items_are_sorted_and_marked():
    scores = np.array([[0.9, 0.5, 0.7, 0.1], [0.2, 0.6, 0.7, 0.4], [0.3, 0.1, 0.8, 0.5]])
    found = retrieval(scores, [0, 1, 2, 0, 1], text_index=[0, 1, 2, 3, 2])
    captions = ["a", "b", "c of 2", "d", "c of 1"]
    items = top_items(found, captions, "image_to_text", 1, top=3)
    assert [item["caption"] for item in items] == ["c of 1", "b", "d"]
    assert [item["own"] for item in items] == [True, True, False]
    assert [item["rows"] for item in items] == [2, 1, 1]
    assert [item["score"] for item in items] == [0.7, 0.6, 0.4]
    assert top_items(found, captions, "text_to_image", 4) == [
        {"image": 2, "score": 0.8, "own": False},
        {"image": 0, "score": 0.7, "own": False},
        {"image": 1, "score": 0.7, "own": True},
    ]


def test_the_table_by_image_of_a_hand_ranked_example():
    scores = np.array([[0.9, 0.1, 0.8], [0.7, 0.6, 0.5]])
    found = per_image(retrieval(scores, [0, 1, 1]), ["a", "b"], ks=(1, 2))
    # Ranks: image 0 first, image 1 second; captions 0 ... 2 first, first, second.
    assert found == {
        "names": ["a", "b"],
        "captions": [1, 2],
        "image_to_text": {"R@1": [1.0, 0.0], "R@2": [1.0, 1.0]},
        "text_to_image": {"R@1": [1.0, 1.0], "R@2": [1.0, 2.0]},
    }


def test_chunks_change_no_query(monkeypatch):
    scores = score_matrix("rounded")
    expected = query_rows(retrieval(scores, OWNERS), NAMES, CAPTIONS)
    monkeypatch.setattr(ranks, "_CHUNK", 4)
    assert query_rows(retrieval(scores, OWNERS), NAMES, CAPTIONS) == expected
