"""What a sentence states of an image's objects, as object evidence looks it up.

A statement is of a kind's count, its place, its arrangement, or of the relation of two kinds.
"""

import itertools
import math
from collections import defaultdict
from typing import NamedTuple

from det_formats.measures import RELATIONS

COUNTS = ("0", "1", "2", "3", "4", "5-6", "7-9", "10+", "at least 2", "at least 3", "many", "some")
PLACES = (
    "middle", "left", "right", "top", "bottom", "edge", "corner",
    "top left corner", "top right corner", "bottom left corner", "bottom right corner",
)  # fmt: skip
ARRANGEMENTS = ("in a row", "in rows", "neatly arranged", "packed together", "scattered")
UNMENTIONED = len(COUNTS)  # the statement that a sentence makes of a kind by leaving it out

_LARGEST_EXACT = ((4, None), (6, "5-6"), (9, "7-9"), (math.inf, "10+"))


def count_statement(count, form):
    """Which of COUNTS a node of a sentence's graph states, as an index."""
    if form == "exact":
        for largest, name in _LARGEST_EXACT:
            if count <= largest:
                return COUNTS.index(name or str(count))
    if form == "at_least":
        return COUNTS.index("at least 2" if count <= 2 else "at least 3")
    return COUNTS.index("many" if form == "many" else "some")


class Statements(NamedTuple):
    """What a sentence states, in class ids and indices, each with a weight in (0, 1].

    The weight of a word that stands for n kinds is 1 / n for each.
    """

    counts: list  # (kind, index in COUNTS, weight)
    places: list  # (kind, index in PLACES, weight)
    arrangements: list  # (kind, index in ARRANGEMENTS, weight)
    relations: list  # (kind, other kind, index in RELATIONS, weight)


def statements_of(graph):
    """The Statements of a `T_Graph.build_text_graph`."""
    mentions = defaultdict(list)  # kind: (count, form, weight) of its nodes
    places = []
    arrangements = []
    for _, node in graph.nodes(data=True):
        weight = 1 / len(node["kinds"])
        place = f"{node['corner']} corner" if node["corner"] else node["place"]
        for kind in node["kinds"]:
            mentions[kind].append((node["count"], node["count_form"], weight))
            if place in PLACES:
                places.append((kind, PLACES.index(place), weight))
            for attribute in node["attributes"]:
                if attribute in ARRANGEMENTS:
                    arrangements.append((kind, ARRANGEMENTS.index(attribute), weight))
    counts = [(kind, *_total(found)) for kind, found in sorted(mentions.items())]
    relations = []
    for i, j, edge in graph.edges(data=True):
        kinds, others = graph.nodes[i]["kinds"], graph.nodes[j]["kinds"]
        for kind, other in itertools.product(kinds, others):
            if kind != other:  # which of one kind's objects are meant is not known
                relation = RELATIONS.index(edge["relation"])
                relations.append((kind, other, relation, 1 / (len(kinds) * len(others))))
    return Statements(counts, places, arrangements, relations)


def _total(mentions):
    """(statement, weight) of all nodes of a kind together: two planes and a plane are three."""
    weight = max(weight for _, _, weight in mentions)
    if any(count is None for count, _, _ in mentions):
        forms = {form for _, form, _ in mentions}
        return count_statement(None, "many" if "many" in forms else "unknown"), weight
    total = sum(count for count, _, _ in mentions)
    exact = all(form == "exact" for _, form, _ in mentions)
    return count_statement(total, "exact" if exact else "at_least"), weight
