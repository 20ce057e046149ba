"""Lists of single queries against loops and hand-made cases."""

import numpy as np
import pytest

from metrics.queries import query_rows, top_items, worst_and_best
from metrics.ranks import retrieval
from test_ranks import CAPTIONS, GROUPS, IMAGES, KINDS, NAMES, OWNERS, looped_queries, score_matrix


@pytest.mark.parametrize("groups", [OWNERS, GROUPS], ids=["strict", "equivalent"])
@KINDS
def test_query_rows_equal_a_loop(kind, groups):
    scores = score_matrix(kind)
    rows = query_rows(retrieval(scores, OWNERS, group_of_text=groups), NAMES, CAPTIONS)
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
    numbers = [*range(IMAGES), *range(len(OWNERS))]
    assert [row["query"] for row in rows] == numbers


def test_a_text_of_two_images_is_its_own_rival():
    """One column of scores for the captions of both images: for each, the other's is wrong."""
    found = retrieval([[0.9, 0.1], [0.8, 0.2]], [0, 1, 1], distinct_of_text=[0, 0, 1])
    first, second, *_ = query_rows(found, ["a", "b"], ["sea, of a", "sea, of b", "land, of b"])
    assert (first["caption"], first["competitor"]) == ("sea, of a", "sea, of b")
    assert (second["caption"], second["competitor"]) == ("sea, of b", "sea, of a")
    assert first["score"] == first["competitor_score"] == 0.9
    assert (first["rank"], first["optimistic"], first["pessimistic"]) == (1.5, 1, 2)


def test_where_nothing_is_wrong_there_is_no_rival():
    found = retrieval(np.ones((2, 2)), [0, 1], group_of_text=[7, 7])
    for row in query_rows(found, ["a", "b"], ["same", "same"]):
        assert row["competitor"] is row["competitor_score"] is None
        assert row["rank"] == row["pessimistic"] == 1


def test_worst_and_best_are_the_ends_of_the_ranks():
    columns = ("query", "rank", "competitor_score", "caption")
    cases = [(0, 1, -0.1, "a"), (1, 9, 0.2, "b"), (2, 9, 0.3, "c")]
    cases += [(3, 1, -0.9, "d"), (4, 5, 0.1, "e"), (5, 8, 0.5, "b")]
    same = {"direction": "text_to_image", "competitor": "x", "score": 0.0}
    rows = [{**same, **dict(zip(columns, case, strict=True))} for case in cases]
    chosen = worst_and_best(rows, worst=3, best=9)
    numbers = {kind: [r["query"] for r in own] for (_, kind), own in chosen.items() if own}
    # 5 asks what 1 asks: it is left out. 2 is further behind than 1, 3 further ahead than 0.
    assert numbers == {"worst": [2, 1, 4], "best": [3, 0]}
    assert chosen["image_to_text", "worst"] == []


def test_top_items_are_sorted_and_marked():
    scores = np.array([[0.9, 0.5, 0.7, 0.1], [0.2, 0.6, 0.7, 0.4], [0.3, 0.1, 0.8, 0.5]])
    found = retrieval(scores, [0, 1, 2, 0, 1], distinct_of_text=[0, 1, 2, 3, 2])
    captions = ["a", "b", "c of 2", "d", "c of 1"]
    assert top_items(found, captions, "image_to_text", 1, top=3) == [
        {"caption": "c of 1", "times": 2, "score": 0.7, "own": True},
        {"caption": "b", "times": 1, "score": 0.6, "own": True},
        {"caption": "d", "times": 1, "score": 0.4, "own": False},
    ]
    assert top_items(found, captions, "text_to_image", 4) == [
        {"image": 2, "score": 0.8, "own": False},
        {"image": 0, "score": 0.7, "own": False},
        {"image": 1, "score": 0.7, "own": True},
    ]
