"""The synthetic scenes in words: which relations and places hold, and sentences that state them.

Apart from `scenes.py`, which draws, detects and writes. `describe` is frozen with the generator;
`telling` makes sentences by which two twins are told apart.

Sizes in the shapes below: A and B items of two groups.
"""

import itertools
import math
from typing import NamedTuple

import numpy as np

from dataset.shapes import GROUNDS, KINDS, SIDE
from dataset.vocabulary import NUMBERS

WORDS = {  # a true relation in words, and in words with the groups exchanged
    "left": (("left of", "to the left of"), ("right of", "to the right of")),
    "right": (("right of", "to the right of"), ("left of", "to the left of")),
    "above": (("above",), ("below",)),
    "below": (("below",), ("above",)),
    "beside": (("right beside", "close to", "next to"), ("close to", "next to")),
    "around": (("around", "in a ring around"), ("surrounded by", "in the middle of")),
    "apart": (("far from", "away from"), ("far from", "away from")),
}


DIRECTIONS = ("left", "right", "above", "below")


ARRANGEMENTS = {
    "row": "in a row",
    "packed": "packed together",
    "scattered": "scattered about",
}


ROADS = (" beside a road", " along a road", " near a road")


# ------------------------------------------------------------------ what holds


def _positions(items):
    return np.array([(item.x, item.y) for item in items])


def relations(a, b):
    """Which relations of WORDS hold between the items `a` and the items `b`, from positions."""
    points_a = _positions(a)  # (A, 2)
    points_b = _positions(b)  # (B, 2)
    true = []
    for axis, before, after in ((0, "left", "right"), (1, "above", "below")):
        if points_a[:, axis].max() + 6 < points_b[:, axis].min():
            true.append(before)
        if points_b[:, axis].max() + 6 < points_a[:, axis].min():
            true.append(after)
    steps = points_a[:, None] - points_b[None]  # (A, B, 2)
    gaps = np.hypot(steps[..., 0], steps[..., 1])  # (A, B)
    sizes = np.array([item.w for item in a])[:, None] + np.array([item.w for item in b])
    near = (gaps < 0.72 * sizes + 3).any(axis=1)  # (A)
    if len(b) == 1 and len(a) > 3 and near.all():
        steps = points_a - points_b[0]
        bearings = np.sort(np.arctan2(steps[:, 0], steps[:, 1]))
        first_again = bearings[0] + 2 * math.pi
        if np.diff(bearings, append=first_again).max() < 2.6:
            return ["around"]
    if near.all():
        true.append("beside")
    if gaps.min() > 55:
        true.append("apart")
    return true


def _third(fraction, names):
    """The name of the low, middle or high part of the image that a mean position lies in."""
    low, middle, high = names
    if fraction < 0.38:
        return low
    if fraction > 0.62:
        return high
    return middle


def _place_name(items):
    """Where in the image a group is: "upper left corner", "centre", or None where spread out."""
    points = _positions(items) / SIDE
    if (points.max(0) - points.min(0)).max() > 0.4:
        return None
    x, y = points.mean(0)
    row = _third(y, ("upper", "", "lower"))
    column = _third(x, ("left", "", "right"))
    if row and column:
        return f"{row} {column} corner"
    if row or column:
        return f"{row or column} part"
    return "centre"


def may_hold(relation, a, b):
    """Whether a relation of the items `a` to the items `b` holds at least loosely.

    What is said of one twin shall be plainly false of the other, not by a pixel. So a direction may
    hold where the middles of the groups lie so, "beside" where any two items of both are near,
    "around" where the one lies among the others, "apart" where no two are really near.
    """
    points_a = _positions(a)  # (A, 2)
    points_b = _positions(b)  # (B, 2)
    if relation in DIRECTIONS:
        axis = 0 if relation in ("left", "right") else 1
        step = points_b[:, axis].mean() - points_a[:, axis].mean()
        return step > 0 if relation in ("left", "above") else step < 0
    if relation == "around":
        middle = points_b.mean(axis=0)
        return bool(((points_a.min(axis=0) < middle) & (middle < points_a.max(axis=0))).all())
    gaps = np.hypot(*(points_a[:, None] - points_b[None]).transpose(2, 0, 1))  # (A, B)
    if relation == "apart":
        return gaps.min() > 40
    sizes = np.array([item.w for item in a])[:, None] + np.array([item.w for item in b])
    return bool((gaps < 0.9 * sizes + 6).any())


def may_lie(place, items):
    """Whether items lie at least loosely in a place, a name as of `_place_name`.

    They do where their middle lies in this half of the image, for the centre in its inner quarter.
    """
    x, y = _positions(items).mean(axis=0) / SIDE
    holds = {
        "left": x < 0.5,
        "right": x > 0.5,
        "upper": y < 0.5,
        "lower": y > 0.5,
        "centre": max(abs(x - 0.5), abs(y - 0.5)) < 0.25,
    }
    return all(holds.get(word, True) for word in place.split())


class _Group(NamedTuple):
    """The items of one kind in a scene, as sentences speak of them."""

    kind: str
    items: list  # those that found room
    arrangement: str  # "row", "packed" or "scattered"
    arranged: bool  # whether the arrangement is to be seen


def _groups_and_pairs(canvas, groups):
    """The groups that found room, and all (group, group, relation) that hold between two."""
    items = [[item for item in canvas.items if item.group == g] for g in range(len(groups))]
    present = [g for g in range(len(groups)) if items[g]]
    true = []
    for a, b in itertools.combinations(present, 2):
        for relation in relations(items[a], items[b]):
            true.append((a, b, relation))
    hosts = set()  # groups at others, and those with others about them
    for a, b, relation in true:
        if relation in ("beside", "around"):
            hosts |= {a, b}
    found = {}
    for g in present:
        kind, count, arrangement = groups[g]
        whole = len(items[g]) == count
        arranged = len(items[g]) > 2 and whole and g not in hosts
        found[g] = _Group(kind, items[g], arrangement, arranged)
    pairs = [(found[a], found[b], relation) for a, b, relation in true]
    return list(found.values()), pairs


# ------------------------------------------------------------------ sentences


def _pick(rng, options):
    return str(options[int(rng.integers(len(options)))])


def _noun(rng, group, arrangement=False):
    """As "a ship", "two planes"; with arrangement as "three cars in a row", where it is seen."""
    count = len(group.items)
    name = _pick(rng, KINDS[group.kind].names)
    if count == 1:
        article = "an" if name[0] in "aeiou" else "a"
        return f"{article} {name}"
    text = f"{NUMBERS[count]} {name}s"
    if arrangement and group.arranged:
        text += f" {ARRANGEMENTS[group.arrangement]}"
    return text


def _listing(rng, groups):
    """As "two ships, a car and three planes"."""
    return listed([_noun(rng, group) for group in groups])


def listed(nouns):
    """Nouns in words: "two ships, a car and three planes"."""
    if len(nouns) == 1:
        return nouns[0]
    return f"{', '.join(nouns[:-1])} and {nouns[-1]}"


def _in_place(group):
    """As " in the centre of the image"; "" where the group is spread out."""
    place = _place_name(group.items)
    return f" in the {place} of the image" if place else ""


def _related(rng, groups, pairs, exchanged):
    """Two groups and a relation that holds; where none does, the first group and its place."""
    if not pairs:
        return _noun(rng, groups[0], arrangement=True) + _in_place(groups[0])
    a, b, relation = pairs[int(rng.integers(len(pairs)))]
    words, words_exchanged = WORDS[relation]
    if exchanged:
        return f"{_noun(rng, b)} {_pick(rng, words_exchanged)} {_noun(rng, a)}"
    return f"{_noun(rng, a, arrangement=True)} {_pick(rng, words)} {_noun(rng, b)}"


def describe(rng, canvas, groups):
    """Five sentences that are true of the canvas; which facts each states is drawn.

    groups: (kind, count, arrangement) of each, as `shapes.composition` gives them. The order of
    the draws is frozen.
    """
    present, pairs = _groups_and_pairs(canvas, groups)
    ground = _pick(rng, GROUNDS[canvas.ground][0])
    road = _pick(rng, ROADS) if canvas.road else ""
    first = present[0]
    one = len(present) == 1 and len(first.items) == 1
    verb = "is" if one else "are"
    sentences = (
        f"{_related(rng, present, pairs, exchanged=False)} on {ground}",
        f"there {verb} {_listing(rng, present)} on {ground}{road}",
        _related(rng, present, pairs, exchanged=True),
        f"{ground}{road} with {_listing(rng, present[::-1])}",
        f"{_noun(rng, first, arrangement=True)}{_in_place(first) or road} on {ground}",
    )
    return [_finished(sentence) for sentence in sentences]


def _finished(sentence):
    return sentence[0].upper() + sentence[1:] + " ."


def telling(rng, canvas, other):
    """Sentences true of a canvas and plainly false of its twin: relations first, then places.

    Each states one of these, beside kinds and counts, which the two have in common. Returns
    (sentence, what it states) of each: "direction", "beside", "around", "apart" or "place".
    """
    ground = _pick(rng, GROUNDS[canvas.ground][0])
    own = _by_group(canvas)
    others = _by_group(other)
    related = []
    for a, b in itertools.combinations(own, 2):
        for relation in relations(own[a].items, own[b].items):
            if not may_hold(relation, others[a].items, others[b].items):
                states = "direction" if relation in DIRECTIONS else relation
                related.append((_one_relation(rng, own[a], own[b], relation, ground), states))
    placed = []
    for g, group in own.items():
        place = _place_name(group.items)
        if place is not None and not may_lie(place, others[g].items):
            sentence = f"{_noun(rng, group)}{_in_place(group)} on {ground}"
            placed.append((_finished(sentence), "place"))
    return _shuffled(rng, related) + _shuffled(rng, placed)


def _shuffled(rng, found):
    return [found[i] for i in rng.permutation(len(found))]


def _by_group(canvas):
    """The groups of a canvas by their numbers."""
    found = {}
    for g in sorted({item.group for item in canvas.items}):
        items = [item for item in canvas.items if item.group == g]
        found[g] = _Group(items[0].kind, items, arrangement="", arranged=False)
    return found


def _one_relation(rng, a, b, relation, ground):
    """A sentence in a form of `describe`'s: the groups as they are, or exchanged."""
    words, words_exchanged = WORDS[relation]
    if rng.random() < 0.5:
        return _finished(f"{_noun(rng, b)} {_pick(rng, words_exchanged)} {_noun(rng, a)}")
    return _finished(f"{_noun(rng, a)} {_pick(rng, words)} {_noun(rng, b)} on {ground}")
