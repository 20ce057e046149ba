"""Detections to object graphs: what FG-CROSS sees beside the pixels.

    python V_Graph.py det_json/sample_1.json --image test/sample_1.png --draw graph.png

prints the objects, the strongest edges and the matrices' sizes, and draws them over the image.
A file `det_json/<image stem>.json` lists {"label", "bbox": [cx, cy, w, h, angle, score]}; lengths
are pixels of the original image, the angle is in radians from the +x axis towards +y (y points
down), the score lies in [0, 1]. `det_json/README.md` is the full description.

Sizes in the shapes below: N objects (padded), F node features, K labels, "other" included.
"""

import argparse
import math
from pathlib import Path
from typing import NamedTuple

import networkx as nx
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from det_formats.det_json import LABELS, load_detections, read_label_map

_COLOURS = ["#e6194b", "#3cb44b", "#ffe119", "#4363d8", "#f58231", "#911eb4", "#42d4f4", "#f032e6"]


def draw_graph(image, graph, scale=None):
    """Boxes, labels and edges of a `V_Graph.build_graph` over an image; returns a new image.

    The picture is enlarged by `scale` (default: to about 768 pixels) so that labels are readable;
    an edge is the more opaque the higher its weight, and edges below 0.05 are left out.
    """
    scale = scale or max(1, round(768 / max(image.size)))
    canvas = image.resize((image.width * scale, image.height * scale), Image.BICUBIC)
    pen, font = ImageDraw.Draw(canvas, "RGBA"), ImageFont.load_default(13)
    boxes = [tuple(scale * v for v in node["box"][:4]) for _, node in graph.nodes(data=True)]
    for i, j, edge in graph.edges(data=True):
        if edge["weight"] >= 0.05:
            alpha = int(60 + 195 * edge["weight"])
            pen.line([boxes[i][:2], boxes[j][:2]], fill=(255, 255, 255, alpha), width=2)
    labels = sorted({node["label"] for _, node in graph.nodes(data=True)})
    for (cx, cy, w, h), (i, node) in zip(boxes, graph.nodes(data=True), strict=True):
        colour = _COLOURS[labels.index(node["label"]) % len(_COLOURS)]
        cos, sin = math.cos(node["box"][4]), math.sin(node["box"][4])
        corners = [
            (cx + sx * w / 2 * cos - sy * h / 2 * sin, cy + sx * w / 2 * sin + sy * h / 2 * cos)
            for sx, sy in ((-1, -1), (1, -1), (1, 1), (-1, 1))
        ]
        pen.polygon(corners, outline=colour, width=2)
        text = f"{i} {node['label']} {node['score']:.2f}"
        left, top, right, bottom = pen.textbbox((cx, cy), text, font=font)
        pen.rectangle([left - 1, top - 1, right + 1, bottom + 1], fill=(0, 0, 0, 150))
        pen.text((cx, cy), text, fill="white", font=font)
    return canvas


MAX_OBJECTS = 20  # as published


GEOMETRY = 7  # columns of node features after the K label columns


EDGE_DECAY = 0.1  # fraction of the image diagonal over which an edge's weight falls to 1 / e


SLOTS = 20  # side of the published matrices


PUBLISHED_LABELS = {"plane": 0, "car": 1, "building": 2}


# ------------------------------------------------------------------ graphs


def _distances(boxes):
    """Distances of the centres in pixels, (N, N)."""
    steps = boxes[:, None, :2] - boxes[None, :, :2]  # (N, N, 2)
    return np.sqrt((steps**2).sum(-1))


def build_graph(detections, size):
    """All detections as an undirected networkx.Graph; no label is dropped.

    size: (width, height) in pixels. Nodes carry label, box (six numbers as in the file),
    area (fraction of the image) and score. Edges carry distance (fraction of the diagonal),
    bearing (radians from the lower-numbered node to the other) and weight, exp(-distance / 0.1).
    """
    graph = nx.Graph(size=tuple(size))
    for i, detection in enumerate(detections):
        *_, w, h, _, score = box = detection["bbox"]
        area = w * h / (size[0] * size[1])
        graph.add_node(i, label=detection["label"], box=tuple(box), area=area, score=score)
    boxes = _box_array(detections)
    distances = _distances(boxes) / math.hypot(*size)
    for i in range(len(boxes)):
        for j in range(i + 1, len(boxes)):
            x, y = boxes[j, :2] - boxes[i, :2]
            distance = float(distances[i, j])
            weight = math.exp(-distance / EDGE_DECAY)
            graph.add_edge(i, j, distance=distance, bearing=math.atan2(y, x), weight=weight)
    return graph


class GraphArrays(NamedTuple):
    """An image's graph as the model eats it; objects behind `mask` are padding."""

    nodes: np.ndarray  # (N, F) float32
    adjacency: np.ndarray  # (N, N) float32, symmetric, in [0, 1], zero diagonal
    mask: np.ndarray  # (N) bool
    dropped: int  # objects beyond max_objects


def detection_arrays(detections, label_map):
    """Detections as slots (n) int and boxes (n, 6) float, for `arrays_from_boxes`."""
    class_ids = np.array([label_map.class_id(d["label"]) for d in detections], dtype=int)
    return class_ids, _box_array(detections)


def _box_array(detections):
    return np.array([d["bbox"] for d in detections], dtype=float).reshape(-1, 6)


def arrays_from_boxes(class_ids, boxes, size, max_objects, labels):
    """`graph_arrays` for detections that are arrays already; labels: K."""
    area = boxes[:, 2] * boxes[:, 3]
    # Slot, side and angle come last, so that the order in the file never matters.
    keys = boxes[:, 4], boxes[:, 2], class_ids, boxes[:, 1], boxes[:, 0], -area, -boxes[:, 5]
    order = np.lexsort(keys)[:max_objects]
    dropped = len(boxes) - len(order)
    class_ids, boxes, area = class_ids[order], boxes[order], area[order]
    n, (width, height) = len(order), size
    nodes = np.zeros((max_objects, labels + GEOMETRY), dtype=np.float32)
    nodes[np.arange(n), class_ids] = 1
    cx, cy, w, h, angle, score = boxes.T
    # Exchanging w and h flips the sign of the first factor, turning by pi / 2 that of the second:
    # the same box has the same features, and a square has no direction.
    lengthened = (w - h) / (w + h)
    columns = (
        2 * cx / width - 1,
        2 * cy / height - 1,
        np.log10(area / (width * height)) / 2 + 1,
        lengthened * np.cos(2 * angle),
        lengthened * np.sin(2 * angle),
        np.abs(lengthened),
        score,
    )
    for i, column in enumerate(columns):
        nodes[:n, labels + i] = column
    adjacency = np.zeros((max_objects, max_objects), dtype=np.float32)
    adjacency[:n, :n] = np.exp(_distances(boxes) / (-EDGE_DECAY * math.hypot(*size)))
    np.fill_diagonal(adjacency, 0)
    return GraphArrays(nodes, adjacency, np.arange(max_objects) < n, dropped)


def graph_arrays(detections, size, max_objects=MAX_OBJECTS, label_map=None):
    """Detections to node features, adjacency and mask, padded to N = max_objects.

    size: (width, height) in pixels. A node's F = K + 7 features are its label, one-hot, then
    centre in [-1, 1] by side, log area, elongation times cosine and sine of the doubled angle,
    elongation, score: nothing depends on the image's resolution. Edge weights are
    exp(-distance / 0.1), the distance a fraction of the diagonal: near objects count, coincident
    ones have 1. Beyond max_objects the lowest scores go first, then smaller areas, then the larger
    cx, cy.
    """
    label_map = label_map or read_label_map()
    class_ids, boxes = detection_arrays(detections, label_map)
    return arrays_from_boxes(class_ids, boxes, size, max_objects, len(label_map))


# ------------------------------------------------------------------ published matrices


def build_matrices(path, rule="class"):
    """The published (adjacency, degree), each (20, 20) float, of one detection file.

    "class" is the published V_Graph.py: slots are plane, car, building, other labels are skipped;
    degree[a, a] sums w h |score| in square pixels, adjacency[a, b] sums 1 / d over the object pairs
    of two classes. "object" is the published notebook: slots are the first 20 objects, degree is
    w h |score| / 255^2, adjacency 1 / d. In both, d is in pixels and 1 / 0 counts as 0.
    """
    if rule not in ("class", "object"):
        raise ValueError(f"rule: expected 'class' or 'object', found {rule!r}")
    detections = load_detections(path)
    if rule == "class":
        class_ids = [PUBLISHED_LABELS.get(d["label"], SLOTS) for d in detections]
    else:
        class_ids = range(len(detections))
    adjacency, degree = _matrices(np.array(class_ids, dtype=int), _box_array(detections))
    return adjacency, degree / (1 if rule == "class" else 255**2)


def published_arrays(class_ids, boxes):
    """What the published code makes of an image's detections, as a GraphArrays, all 20 slots real.

    slots: (n), of a vocabulary of the published labels; other labels are skipped. boxes: (n, 6).
    nodes are the degree matrix and adjacency is unbounded, both (20, 20), by `build_matrices`'
    rule "class".
    """
    class_ids = np.where(class_ids < len(PUBLISHED_LABELS), class_ids, SLOTS)
    adjacency, degree = (matrix.astype(np.float32) for matrix in _matrices(class_ids, boxes))
    return GraphArrays(degree, adjacency, np.ones(SLOTS, dtype=bool), 0)


def _matrices(class_ids, boxes):
    """Adjacency and degree (20, 20) of objects in slots; those beyond the last are skipped."""
    class_ids, boxes = class_ids[class_ids < SLOTS], boxes[class_ids < SLOTS]
    areas = boxes[:, 2] * boxes[:, 3] * np.abs(boxes[:, 5])
    distances = _distances(boxes)
    inverse = np.divide(1, distances, out=np.zeros_like(distances), where=distances > 0)
    members = np.eye(SLOTS)[class_ids]  # (n, 20)
    adjacency = members.T @ inverse @ members
    np.fill_diagonal(adjacency, 0)
    return adjacency, np.diag(members.T @ areas)


def main(arguments=None):
    # The command alone draws and opens images; the functions above need neither.
    from dataset import images

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("detections", help="a file of det_json/")
    parser.add_argument("--image", required=True, help="the image that the detections belong to")
    parser.add_argument("--draw", help="write boxes, labels and edges over the image to this file")
    parser.add_argument("--labels", default=LABELS, help="label vocabulary, a label a line")
    parser.add_argument("--max-objects", type=int, default=MAX_OBJECTS, help="graph slots")
    options = parser.parse_args(arguments)
    image = images.open_image(options.image)
    detections = load_detections(options.detections)
    graph = build_graph(detections, image.size)
    print(f"{options.detections}: {len(graph)} objects in {image.width} x {image.height} pixels")
    for i, node in graph.nodes(data=True):
        cx, cy, w, h, angle, score = node["box"]
        print(
            f"  {i:2d} {node['label']:20s} centre {cx:6.1f} {cy:6.1f}  size {w:5.1f} x {h:5.1f}  "
            f"angle {math.degrees(angle):6.1f} deg  area {100 * node['area']:5.2f} %  {score:.2f}"
        )
    edges = sorted(graph.edges(data=True), key=lambda edge: -edge[2]["weight"])[:5]
    for i, j, edge in edges:
        print(f"  edge {i}-{j}: weight {edge['weight']:.3f}, distance {edge['distance']:.3f}")
    label_map = read_label_map(options.labels)
    arrays = graph_arrays(detections, image.size, options.max_objects, label_map)
    print(
        f"nodes {arrays.nodes.shape}, adjacency {arrays.adjacency.shape}, "
        f"{arrays.mask.sum()} objects, {arrays.dropped} dropped"
    )
    for rule in ("class", "object"):
        adjacency, degree = build_matrices(options.detections, rule)
        print(f"published rule '{rule}': adjacency sum {adjacency.sum():.4f}, {adjacency.shape}")
    if options.draw:
        Path(options.draw).parent.mkdir(parents=True, exist_ok=True)
        draw_graph(image, graph).save(options.draw)
        print(f"drawn to {options.draw}")


if __name__ == "__main__":
    main()
