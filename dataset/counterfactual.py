"""Sentences that differ from a caption in one number, kind or relation, so that they are false.

They are made only where the detections agree with the caption: a number that was counted so, a kind
that was found, a relation that the boxes have.
"""

import re

import numpy as np

from det_formats.measures import relation_measure
from metrics.fine_sets import _are_alike, _numbers_of_kinds, _swapped
from T_Graph import build_text_graph

REVERSED = {"left": "right", "right": "left", "above": "below", "below": "above"}
_DIRECTION = re.compile(r"\b(left|right|above|below)\b")
CLOSEST = 4  # of the other numbers
KINDS = 4  # other kinds in a kind's place


def counterfactuals(caption, class_ids, boxes, size, label_map, rng):
    """{what is changed: false sentences} of a caption of an image with these detections."""
    text = " ".join(caption.split())
    graph = build_text_graph(text, label_map)
    counts = np.bincount(class_ids, minlength=len(label_map))
    found = {"number": [], "kind": [], "relation": []}
    for number, kinds, others in _numbers_of_kinds(text, label_map):
        if any(counts[kind] == number for kind in kinds):
            gap = [abs(other - number) for other in range(2, 12) if other != number]
            order = np.argsort(gap, kind="stable")[:CLOSEST]
            found["number"] += [others[i] for i in order]
    for kinds in {node["kinds"] for _, node in graph.nodes(data=True)}:
        if len(kinds) == 1 and counts[kinds[0]]:
            absent = [int(k) for k in rng.permutation(len(label_map.lines)) if not counts[k]]
            found["kind"] += _swapped(text, graph, kinds[0], absent[: KINDS * 2], label_map)[:KINDS]
    for match in _DIRECTION.finditer(text):
        other = text[: match.start()] + REVERSED[match[0]] + text[match.end() :]
        changed = build_text_graph(other, label_map)
        pairs = _reversed_pairs(graph, changed)
        if pairs and all(_holds(*pair, class_ids, boxes, size) for pair in pairs):
            found["relation"].append(other)
    return {name: texts for name, texts in found.items() if texts}


def _reversed_pairs(graph, changed):
    """(kind, other kind, relation) of the edges that differ; None where more differs."""
    if list(graph.edges) != list(changed.edges):
        return None
    pairs = []
    for i, j, relation in graph.edges(data="relation"):
        if changed.edges[i, j]["relation"] != relation:
            pairs.append((graph.nodes[i]["kinds"][0], graph.nodes[j]["kinds"][0], relation))
    for i, j in changed.edges:  # all else alike
        changed.edges[i, j]["relation"] = graph.edges[i, j]["relation"]
    return pairs if _are_alike(graph, changed, ()) else None


def _holds(kind, other, relation, class_ids, boxes, size):
    """Whether the boxes have a relation of two kinds."""
    a, b = boxes[class_ids == kind], boxes[class_ids == other]
    return len(a) and len(b) and relation_measure(relation, a, b, size) > 0
