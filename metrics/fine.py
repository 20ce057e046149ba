"""Fine measures: whether a model reads what a sentence says of objects, or the scene alone.

Figures of four sets (metrics/fine_sets.py makes them, metrics/README.md says what each one proves):

    counting      a caption that states a number of a kind, against nine with other numbers
    kind swap     a caption that names a kind, against nine that name another in its place
    twins         two images, and sentences that are true of one of them
    within class  retrieval among the images of the query's own scene class

Beside counting and kind swap stands a blind score, by the text alone: the score of a text averaged
over all images of the split. What the blind answer gets right, the image was not needed for.

Sizes in the shapes below: Q queries, A alternatives of each.
"""

from functools import lru_cache

import numpy as np

from dataset.annotations import prepared
from det_formats.det_json import LabelMap
from metrics.fine_sets import (
    OTHERS,
    counted_right,
    counting_set,
    kind_swap_set,
    read_twins,
    scene_classes,
)
from metrics.protocol import measure_ranks
from metrics.ranks import DIRECTIONS, KS, Ranks, per_image

FEWEST = 10  # images of a class in which is searched: R@10 needs ten
SIDES = ("without_evidence", "with_evidence")

# ------------------------------------------------------------------ figures


def wins(scores, others):
    """How often scores are above others, of any one shape: 1, of equal ones a half, else 0."""
    return (scores > others) + 0.5 * (scores == others)


def accuracy(scores, alternatives):
    """Figures in percent of true texts' scores (Q,) against those of alternatives (Q, A).

    pairs: how often the true text scores above an alternative, ties are a half; chance is 50. top1:
    how often it scores above all, ties as in random order; chance is 100 / (A + 1).
    """
    pairs, top1 = per_query(scores, alternatives)
    return {"pairs": 100 * float(pairs.mean()), "top1": 100 * float(top1.mean())}


def per_query(scores, alternatives):
    """pairs and top1 of `accuracy` for each query, as shares: (Q,) each."""
    scores = np.asarray(scores)[:, None]  # (Q, 1)
    alternatives = np.asarray(alternatives)  # (Q, A)
    pairs = wins(scores, alternatives).mean(axis=1)
    beaten = (alternatives > scores).any(axis=1)
    tied = (alternatives == scores).sum(axis=1)
    return pairs, np.where(beaten, 0.0, 1 / (1 + tied))


# ------------------------------------------------------------------ within a class


def within_classes(found, class_of_image, names, ks=KS):
    """The protocol of a `ranks.Retrieval`, each query among the images of its own class alone.

    class_of_image: a class or None for each image. Classes with fewer than FEWEST images and images
    without class are left out. Returns None where nothing is left, else the figures, which are
    means over queries as ever, sizes, and the table by image of `ranks.per_image`.
    """
    members = {}
    for i, name in enumerate(class_of_image):
        members.setdefault(name, []).append(i)
    kept = [own for name, own in members.items() if name is not None and len(own) >= FEWEST]
    if not kept:
        return None
    parts = [found.part(np.array(own)) for own in kept]
    ranks = [part.ranks() for part in parts]
    sides = [_joined([of_images for of_images, _ in ranks])]
    sides.append(_joined([of_texts for _, of_texts in ranks]))
    tables = [
        per_image(part, [names[i] for i in own], ks) for part, own in zip(parts, kept, strict=True)
    ]
    images = sum(map(len, kept))
    return {
        "classes": len(kept),
        "images": images,
        "captions": sum(len(part.image_of_text) for part in parts),
        "images_left_out": len(class_of_image) - images,
        **measure_ranks(*sides, ks),
        "per_image": _joined_tables(tables),
    }


def _joined(ranks):
    columns = [np.concatenate(column) for column in zip(*ranks, strict=True)]
    return Ranks(*columns)


def _joined_tables(tables):
    joined = {"names": [], "captions": []}
    joined.update({direction: {} for direction in DIRECTIONS})
    for one in tables:
        for column in ("names", "captions"):
            joined[column] += one[column]
        for direction in DIRECTIONS:
            for recall, hits in one[direction].items():
                joined[direction].setdefault(recall, []).extend(hits)
    return joined


# ------------------------------------------------------------------ a model on a split


def fine_measures(scorer, records, label_map, class_ids, root, caption_form, retrievals):
    """The figures of a split, as a dict of plain values.

    scorer: an `evaluate.Scorer`. records, label_map: the split's. class_ids: (objects,) for
    each image. root: the data set's folder, where `twins.json` and `classes.json` may lie.
    caption_form: that of the twins' sentences, see `prepared`. retrievals: the `ranks.Retrieval`
    without evidence, and the one with it or None. Raises ValueError for a file of another form and
    for twins that are no images of the split.
    """
    names = [record.name for record in records]
    asked = tuple(records), tuple(label_map.lines)
    counting = _queries(counting_set, *asked)
    is_right = [counted_right(query, class_ids[query.image]) for query in counting]
    classes = scene_classes(root, names)
    within = []
    for found in retrievals:
        within.append(None if found is None else within_classes(found, classes, names))
    return {
        "counting": _against_others(scorer, counting, names, is_right),
        "kind_swap": _against_others(scorer, _queries(kind_swap_set, *asked), names),
        "within_class": _both(within, lambda one: one) if within[0] else None,
        "twins": _twins(scorer, root, caption_form, names),
    }


@lru_cache(maxsize=4)  # several checkpoints are asked the same
def _queries(make, records, labels):
    """What `counting_set` or `kind_swap_set` makes of records and lines of labels, both tuples."""
    return make(records, LabelMap(labels))


def _both(scored, figures):
    """figures(scored) without and with evidence, None where there is none."""
    values = [None if one is None else figures(one) for one in scored]
    return dict(zip(SIDES, values, strict=True))


def _against_others(scorer, queries, names, is_right=None):
    """Figures of Queries; is_right: whether the detector counted right, to split them by."""
    if not queries:
        return None
    images = [query.image for query in queries]
    scored = scorer.scored(images, [query.texts for query in queries])

    def figures(one, chosen=slice(None)):
        values = accuracy(one.own[chosen, 0], one.own[chosen, 1:])
        blind = accuracy(one.blind[chosen, 0], one.blind[chosen, 1:])
        return {**values, **{f"blind_{name}": value for name, value in blind.items()}}

    def all_figures(one):
        pairs, top1 = per_query(one.own[:, 0], one.own[:, 1:])
        rows = {"pairs": pairs.round(4).tolist(), "top1": top1.round(4).tolist()}
        return {**figures(one), "per_query": rows}

    found = {"queries": len(queries), "names": [names[i] for i in images]}
    found.update(_both(scored, all_figures))
    for name, value in (("detector_right", True), ("detector_wrong", False)):
        chosen = [] if is_right is None else np.flatnonzero(np.array(is_right) == value)
        if len(chosen):
            parts = _both(scored, lambda one, chosen=chosen: figures(one, chosen))
            found[name] = {"queries": len(chosen), **parts}
    return found


def _twins(scorer, root, caption_form, names):
    """Figures of the pairs in `twins.json` of a data root; None where there is none."""
    pairs = read_twins(root)
    if pairs is None:
        return None
    image_of = {name: i for i, name in enumerate(names)}
    missing = {name for pair in pairs for name in pair["images"]} - set(image_of)
    if missing:
        raise ValueError(f"{root}/twins.json: '{min(missing)}' is no image of the split")
    images, texts, states, numbers = [], [], [], []
    for number, pair in enumerate(pairs):
        for sentence in pair["sentences"]:
            own = pair["images"][sentence["of"]]
            other = pair["images"][1 - sentence["of"]]
            images += [image_of[own], image_of[other]]
            texts += 2 * [[prepared(sentence["text"], caption_form)]]
            states.append(sentence.get("states", "all"))
            numbers.append(number)
    scored = scorer.scored(images, texts)

    def figures(one, chosen=slice(None)):
        own, other = one.own.reshape(-1, 2)[chosen].T
        return {"right": 100 * float(wins(own, other).mean())}

    def all_figures(one):
        own, other = one.own.reshape(-1, 2).T
        per_pair = np.bincount(numbers, wins(own, other)) / np.bincount(numbers)
        return {**figures(one), "per_pair": per_pair.round(4).tolist()}

    by_statement = {}
    for name in sorted(set(states)):
        chosen = [i for i, stated in enumerate(states) if stated == name]
        parts = _both(scored, lambda one, chosen=chosen: figures(one, chosen))
        by_statement[name] = {"sentences": len(chosen), **parts}
    found = {"pairs": len(pairs), "sentences": len(states), **_both(scored, all_figures)}
    return {**found, "by_statement": by_statement}


# ------------------------------------------------------------------ for people

_HEADS = ("cosine", "blind", "+ evidence", "blind", "chance")


def fine_table(fine, title):
    """The fine measures of a result, in percent, as lines."""
    rows = [[title, *_HEADS]]
    for name, words in (("counting", "counting"), ("kind_swap", "kind swap")):
        own = fine[name]
        if own is None:
            rows.append([f"{words}: no caption fits"])
            continue
        rows.append(_row(f"{words}, {own['queries']} captions: above another", own, "pairs", 50))
        chance = 100 / (1 + OTHERS)
        rows.append(_row(f"  best of {1 + OTHERS}", own, "top1", chance))
        for part in ("detector_right", "detector_wrong"):
            if own.get(part):
                words = f"  {part.replace('_', ' ')}, {own[part]['queries']}: best"
                rows.append(_row(words, own[part], "top1", chance))
    own = fine["within_class"]
    if own is None:
        rows.append([f"within a class: no class of {FEWEST} images known"])
    else:
        sides = [own[side] for side in SIDES]
        size = f"{sides[0]['classes']} classes, {sides[0]['images']} images"
        rows.append(_row(f"within a class, {size}: mR", own, "mR", None))
    own = fine["twins"]
    if own is not None:
        rows.append(_row(f"twins, {own['sentences']} sentences: the right one", own, "right", 50))
        for states, part in own["by_statement"].items():
            rows.append(_row(f"  {states}, {part['sentences']}", part, "right", 50))
    widest = max(len(row[0]) for row in rows)
    lines = []
    for name, *cells in rows:
        shown = "".join(cell.rjust(12) for cell in cells)
        lines.append((name.ljust(widest) + shown).rstrip())
    return "\n".join(lines)


def _row(words, own, figure, chance):
    """A row of figures with their blind ones, without and with evidence."""
    cells = []
    for side in SIDES:
        values = own[side] or {}
        cells += [values.get(figure), values.get(f"blind_{figure}")]
    return [words, *("-" if cell is None else f"{cell:.1f}" for cell in [*cells, chance])]
