"""Single queries of a `ranks.Retrieval`: where each one stands, and what beats it.

For the CSV file and the HTML page of evaluate.py. Sizes: I images, T texts.
"""

import numpy as np

from metrics.ranks import DIRECTIONS


def query_rows(found, names, captions):
    """What became of each query, images first: a list of dicts.

    names: of the I images; captions: the T strings. Fields: direction, query (its number among the
    I images or T captions), number and name of its image, caption (of an image its best-scoring
    one), rank (expected), optimistic, pessimistic, score (of the best relevant item), competitor
    (the best-scoring wrong caption or image) and its score, both None where nothing is wrong.
    """
    ranks_of_images, ranks_of_texts = found.ranks()
    rivals_of_images, rivals_of_texts = found.rivals()
    return [
        *_image_rows(found, ranks_of_images, rivals_of_images, names, captions),
        *_text_rows(found, ranks_of_texts, rivals_of_texts, names, captions),
    ]


def _image_rows(found, ranks, rivals, names, captions):
    images = np.arange(len(names))
    scores = found.scores.pairs(images, rivals.own)
    wrong_scores = found.scores.pairs(images, rivals.wrong)  # without meaning where none is wrong
    result = []
    for image, standing in enumerate(_standings(ranks)):
        own, wrong = rivals.own[image], rivals.wrong[image]
        own_text = _first_text(found, image, own, relevant=True)
        competitor, competitor_score = None, None
        if wrong >= 0:
            competitor = captions[_first_text(found, image, wrong, relevant=False)]
            competitor_score = float(wrong_scores[image])
        result.append(
            {
                "direction": "image_to_text",
                "query": image,
                "number": image,
                "image": names[image],
                "caption": captions[own_text],
                **standing,
                "score": float(scores[image]),
                "competitor": competitor,
                "competitor_score": competitor_score,
            }
        )
    return result


def _text_rows(found, ranks, rivals, names, captions):
    scores = found.scores.pairs(rivals.own, found.distinct_of_text)
    wrong_scores = found.scores.pairs(rivals.wrong, found.distinct_of_text)
    result = []
    for text, standing in enumerate(_standings(ranks)):
        wrong = rivals.wrong[text]
        image = int(found.image_of_text[text])
        competitor, competitor_score = None, None
        if wrong >= 0:
            competitor = names[wrong]
            competitor_score = float(wrong_scores[text])
        result.append(
            {
                "direction": "text_to_image",
                "query": text,
                "number": image,
                "image": names[image],
                "caption": captions[text],
                **standing,
                "score": float(scores[text]),
                "competitor": competitor,
                "competitor_score": competitor_score,
            }
        )
    return result


def _standings(ranks):
    """The ranks of each query, as a list of dicts."""
    optimistic, pessimistic = ranks.bounds()
    columns = {
        "rank": ranks.expected().tolist(),
        "optimistic": optimistic.tolist(),
        "pessimistic": pessimistic.tolist(),
    }
    return [
        {name: column[query] for name, column in columns.items()}
        for query in range(len(ranks.better))
    ]


def _first_text(found, image, distinct, relevant):
    """The first of the texts of a distinct one that is relevant to the image, or that is not."""
    texts = np.flatnonzero(found.distinct_of_text == distinct)
    return texts[found.is_relevant(image, texts) == relevant][0]


def worst_and_best(rows, worst=20, best=10):
    """Some of `query_rows`, the most extreme first: {(direction, "worst" or "best"): queries}.

    Among equal ranks counts how far the competitor is ahead. No image and no sentence is taken
    twice as a query.
    """
    chosen = {}
    for direction in DIRECTIONS:
        queries = [row for row in rows if row["direction"] == direction]
        taken = set()
        worst_first = sorted(queries, key=_badness, reverse=True)
        chosen[direction, "worst"] = _first(worst_first, worst, taken)
        best_first = sorted(queries, key=_badness)
        chosen[direction, "best"] = _first(best_first, best, taken)
    return chosen


def _badness(row):
    """Rank, then how far the competitor is ahead."""
    if row["competitor"] is None:
        return row["rank"], -np.inf
    return row["rank"], row["competitor_score"] - row["score"]


def _first(rows, number, taken):
    """So many of the first rows without those whose query is in `taken`, a set that grows."""
    chosen = []
    for row in rows:
        query = row["query"] if row["direction"] == "image_to_text" else row["caption"]
        if query not in taken and len(chosen) < number:
            taken.add(query)
            chosen.append(row)
    return chosen


def top_items(found, captions, direction, query, top=10):
    """The best-scoring items of a query: a list of dicts, best first.

    Of a text: image (its number), score, and own: whether the text is relevant to it. Of an image:
    caption, times (how often it stands in the gallery), score, and own: whether one of these is
    relevant to the image.
    """
    if direction == "image_to_text":
        return _top_texts(found, captions, query, top)
    return _top_images(found, query, top)


def _top_texts(found, captions, image, top):
    _, distinct = found.scores.shape
    scores = found.scores.pairs(np.full(distinct, image), np.arange(distinct))
    is_relevant = found.is_relevant(image, np.arange(len(found.distinct_of_text)))
    own_texts = set(found.distinct_of_text[is_relevant].tolist())
    times = np.bincount(found.distinct_of_text)
    items = []
    for item in _highest(scores, top):
        own = item in own_texts
        text = _first_text(found, image, item, relevant=own)
        shown = {"caption": captions[text], "times": int(times[item])}
        items.append({**shown, "score": float(scores[item]), "own": own})
    return items


def _top_images(found, text, top):
    images, _ = found.scores.shape
    scores = found.scores.pairs(np.arange(images), np.full(images, found.distinct_of_text[text]))
    same_group = found.group_of_text == found.group_of_text[text]
    own_images = set(found.image_of_text[same_group].tolist())
    return [
        {"image": item, "score": float(scores[item]), "own": item in own_images}
        for item in _highest(scores, top)
    ]


def _highest(scores, top):
    """The places of the highest scores, the first of equals first."""
    return np.argsort(-scores, kind="stable")[:top].tolist()
