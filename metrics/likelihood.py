"""Log-likelihood ratios of what is detected given what a sentence states: tables, scores, reasons.

log P(detected | stated) - log P(detected), summed over the statements, which count as independent
(naive Bayes). What is detected is in bins, so that all is looked up in small tables.

Sizes in the shapes below: I images, T sentences, K labels, S statements of a count, C bins, R
relations, U columns, one for each statement that can be made of a kind.
"""

from collections import defaultdict
from typing import NamedTuple

import numpy as np

from dataset.statements import ARRANGEMENTS, COUNTS, PLACES, UNMENTIONED
from det_formats.measures import (
    COUNT_BINS,
    PLACE_CELLS,
    RELATION_CELLS,
    RELATIONS,
    SHAPE_CELLS,
)

# ------------------------------------------------------------------ tables

# Entries and weights are multiples of these: their products and sums are exact in float32, in any
# order, so that equal images and sentences tie exactly.
TABLE_STEP = 1 / 1024
WEIGHT_STEP = 1 / 64
LARGEST = 6.0  # of an entry: one statement alone decides nothing

OWN = 8  # mentions of a kind that count as much as the prior that all kinds share
SHARED = 2  # mentions of all kinds together that count as much as no difference at all


class Tables(NamedTuple):
    """Log-likelihood ratios, float32, of what is detected given a statement against none."""

    counts: np.ndarray  # (K, S + 1, C): by kind, statement (the last: not mentioned) and bin
    shared: np.ndarray  # (S + 1, C): what all kinds share, for one of which nothing is known
    places: np.ndarray  # (places, PLACE_CELLS)
    arrangements: np.ndarray  # (arrangements, SHAPE_CELLS)
    relations: np.ndarray  # (R, RELATION_CELLS)


def fit(found, statements, labels):
    """Tables from training images: what is Found in each, or None, and its sentences' Statements.

    found: (I); statements: (I) lists; labels: K. An image without a detection
    file does not count. Each other one counts once, however many sentences it has.
    """
    bins = len(COUNT_BINS) + 1
    counts = np.zeros((labels, UNMENTIONED + 1, bins))
    all_counts = np.zeros((labels, bins))
    tallies = {
        "places": np.zeros((len(PLACES), PLACE_CELLS)),
        "arrangements": np.zeros((len(ARRANGEMENTS), SHAPE_CELLS)),
        "relations": np.zeros((len(RELATIONS), RELATION_CELLS)),
    }
    overall = {name: np.zeros_like(tally) for name, tally in tallies.items()}
    kinds = np.arange(labels)
    for one, sentences in zip(found, statements, strict=True):
        if one is None or not sentences:
            continue
        all_counts[kinds, one.counts] += 1
        _tally_all(overall, one)
        for sentence in sentences:
            share = 1 / len(sentences)
            mentioned = np.zeros(labels)
            for kind, statement, weight in sentence.counts:
                counts[kind, statement, one.counts[kind]] += share * weight
                mentioned[kind] = weight
            if sentence.counts:
                counts[kinds, UNMENTIONED, one.counts] += share * (1 - mentioned)
            _tally(tallies, one, sentence, share)
    ratios = {name: _ratios(tally, overall[name]) for name, tally in tallies.items()}
    own, shared = _count_ratios(counts, all_counts)
    return Tables(own, shared, **ratios)


def _tally(tallies, one, sentence, share):
    """Add what is found of what a sentence states of places, arrangements and relations."""
    for kind, place, weight in sentence.places:
        if kind in one.places:
            tallies["places"][place, one.places[kind]] += share * weight
    for kind, arrangement, weight in sentence.arrangements:
        if kind in one.shapes:
            tallies["arrangements"][arrangement, one.shapes[kind]] += share * weight
    for kind, other, relation, weight in sentence.relations:
        if (kind, other) in one.pairs:
            cell = one.pairs[kind, other][relation]
            tallies["relations"][relation, cell] += share * weight


def _tally_all(overall, one):
    """Add what is found of all kinds and pairs, whatever is said of them."""
    for cell in one.places.values():
        overall["places"][:, cell] += 1
    for cell in one.shapes.values():
        overall["arrangements"][:, cell] += 1
    for cells in one.pairs.values():
        overall["relations"][np.arange(len(RELATIONS)), cells] += 1


def _ratios(tally, overall):
    """Log-likelihood ratios of tallies (statements, cells) against those of all."""
    cells = tally.shape[1]
    usual = (overall + 1 / cells) / (overall.sum(axis=1, keepdims=True) + 1)
    stated = (tally + OWN * usual) / (tally.sum(axis=1, keepdims=True) + OWN)
    return _rounded(np.log(stated / usual))


def _count_ratios(counts, all_counts):
    """The ratios (K, S + 1, C) of counts, each kind's drawn to those (S + 1, C) that all share."""
    shared_usual = (all_counts.sum(axis=0) + 1) / (all_counts.sum() + all_counts.shape[1])  # (C)
    images = all_counts.sum(axis=1, keepdims=True)
    usual = (all_counts + shared_usual) / (images + 1)  # (K, C)
    mentions = counts.sum(axis=-1)  # (K, S + 1)
    expected = np.einsum("ks,kc->sc", mentions, usual)  # if statements said nothing
    shared = _shared_ratios(counts.sum(axis=0), expected, shared_usual)
    prior = usual[:, None] * np.exp(shared)  # (K, S + 1, C)
    prior /= prior.sum(axis=-1, keepdims=True)
    stated = (counts + OWN * prior) / (mentions[..., None] + OWN)
    return _rounded(np.log(stated / usual[:, None])), _rounded(shared)


# The numbers that a vague statement leaves open, of which it is the mean where nobody makes it.
_OPEN = {
    "at least 2": COUNTS[2:8],
    "at least 3": COUNTS[3:8],
    "many": COUNTS[5:8],
    "some": COUNTS[1:8],
}


def _shared_ratios(found, expected, usual):
    """Ratios (S + 1, C) of tallies of all kinds together against those expected; usual: (C)."""
    weak = SHARED * usual
    ratios = np.log((found + weak) / (expected + weak))
    for name, numbers in _OPEN.items():
        row = COUNTS.index(name)
        mean = np.exp([ratios[COUNTS.index(number)] for number in numbers]).mean(axis=0)  # (C)
        ratios[row] = np.log((found[row] + weak * mean) / (expected[row] + weak))
    return ratios


def _rounded(ratios):
    return (np.round(ratios.clip(-LARGEST, LARGEST) / TABLE_STEP) * TABLE_STEP).astype(np.float32)


# ------------------------------------------------------------------ scores


def scores(tables, found, statements):
    """Evidence (I, T), float32, of what is Found in images, or None, for sentences' Statements.

    0 for an image without a detection file and for a sentence that states nothing of a known kind.
    """
    result = np.zeros((len(found), len(statements)), dtype=np.float32)
    images = [i for i, one in enumerate(found) if one is not None]
    if not images or not statements:
        return result
    weights = _weights(statements, labels=len(tables.counts))  # (T, U)
    used = np.flatnonzero(weights.any(axis=0))
    looked_up = _looked_up(tables, [found[i] for i in images])  # (images, U)
    result[images] = looked_up[:, used] @ weights[:, used].T
    _add_relations(result, tables, found, statements)
    return result


def _widths():
    """How many columns a kind has for counts, places and arrangements."""
    return UNMENTIONED + 1, len(PLACES), len(ARRANGEMENTS)


def _weights(statements, labels):
    """How often sentences state what a kind can be said to be, (T, U)."""
    counts, places, arrangements = (
        np.zeros((len(statements), labels, width), dtype=np.float32) for width in _widths()
    )
    for t, sentence in enumerate(statements):
        if sentence.counts:
            counts[t, :, UNMENTIONED] = 1
        for kind, statement, weight in sentence.counts:
            counts[t, kind, statement] += rounded_weight(weight)
            counts[t, kind, UNMENTIONED] -= rounded_weight(weight)
        for kind, place, weight in sentence.places:
            places[t, kind, place] += rounded_weight(weight)
        for kind, arrangement, weight in sentence.arrangements:
            arrangements[t, kind, arrangement] += rounded_weight(weight)
    parts = [part.reshape(len(statements), -1) for part in (counts, places, arrangements)]
    return np.concatenate(parts, axis=1)  # (T, U)


def rounded_weight(weight):
    """A statement's weight as a multiple of WEIGHT_STEP."""
    return round(weight / WEIGHT_STEP) * WEIGHT_STEP


def _looked_up(tables, found):
    """What the tables say of images for every statement that can be made of a kind, (I, U)."""
    labels = len(tables.counts)
    bins = np.stack([one.counts for one in found])  # (I, K)
    counts = tables.counts[np.arange(labels), :, bins]  # (I, K, S + 1)
    places = np.zeros((len(found), labels, len(PLACES)), dtype=np.float32)
    shapes = np.zeros((len(found), labels, len(ARRANGEMENTS)), dtype=np.float32)
    for i, one in enumerate(found):
        for kind, cell in one.places.items():
            places[i, kind] = tables.places[:, cell]
        for kind, cell in one.shapes.items():
            shapes[i, kind] = tables.arrangements[:, cell]
    parts = [part.reshape(len(found), -1) for part in (counts, places, shapes)]
    return np.concatenate(parts, axis=1)  # (I, U)


def _add_relations(result, tables, found, statements):
    """Add the evidence of relations: a small product for each pair of kinds that is spoken of."""
    images_of = defaultdict(list)  # pair of kinds: (image, ratios by relation)
    for i, one in enumerate(found):
        for pair, cells in (one.pairs if one is not None else {}).items():
            images_of[pair].append((i, tables.relations[np.arange(len(RELATIONS)), cells]))
    sentences_of = defaultdict(dict)  # pair of kinds: {sentence: weights by relation}
    for t, sentence in enumerate(statements):
        for kind, other, relation, weight in sentence.relations:
            row = sentences_of[kind, other].setdefault(t, np.zeros(len(RELATIONS), np.float32))
            row[relation] += rounded_weight(weight)
    for pair, weights in sentences_of.items():
        if pair in images_of:
            rows, ratios = zip(*images_of[pair], strict=True)
            result[np.ix_(rows, list(weights))] += (
                np.stack(ratios) @ np.stack([*weights.values()]).T
            )


# ------------------------------------------------------------------ why


class Reason(NamedTuple):
    """What one statement of a sentence adds to the evidence of an image."""

    statement: str  # in words
    evidence: float


def reasons(tables, one, statements, names):
    """The Reasons whose sum is the evidence of an image for a sentence, the strongest first.

    one: what is Found in the image; names: of the kinds by class id. Kinds that the sentence does
    not mention are one reason together.
    """
    found = []
    unmentioned = tables.counts[np.arange(len(names)), UNMENTIONED, one.counts]  # (K)
    rest = unmentioned.sum() if statements.counts else 0.0
    for kind, statement, weight in statements.counts:
        rest -= rounded_weight(weight) * unmentioned[kind]
        value = rounded_weight(weight) * tables.counts[kind, statement, one.counts[kind]]
        found.append(Reason(f"{COUNTS[statement]} {names[kind]}", float(value)))
    for kind, place, weight in statements.places:
        if kind in one.places:
            value = rounded_weight(weight) * tables.places[place, one.places[kind]]
            found.append(Reason(f"{names[kind]}, {PLACES[place]}", float(value)))
    for kind, arrangement, weight in statements.arrangements:
        if kind in one.shapes:
            value = rounded_weight(weight) * tables.arrangements[arrangement, one.shapes[kind]]
            found.append(Reason(f"{names[kind]} {ARRANGEMENTS[arrangement]}", float(value)))
    for kind, other, relation, weight in statements.relations:
        if (kind, other) in one.pairs:
            value = (
                rounded_weight(weight)
                * tables.relations[relation, one.pairs[kind, other][relation]]
            )
            words = f"{names[kind]} {RELATIONS[relation]} {names[other]}"
            found.append(Reason(words, float(value)))
    if statements.counts:
        found.append(Reason("kinds that are not mentioned", float(rest)))
    return sorted(found, key=lambda reason: -abs(reason.evidence))
