"""Detections to object graphs: what FG-CROSS sees beside the pixels.

    python V_Graph.py det_json/sample_1.json --image test/sample_1.png --draw graph.png

prints the objects, the strongest edges and the matrices' sizes, and draws them over the image.
A file `det_json/<image stem>.json` lists {"label", "bbox": [cx, cy, w, h, angle, score]}; lengths
are pixels of the original image, the angle is in radians from the +x axis towards +y (y points
down), the score lies in [0, 1]. `det_json/README.md` is the full description.

Sizes in the shapes below: N objects (padded), F node features, K labels, "other" included.
"""

from options import answer_early

if __name__ == "__main__":
    answer_early("V_Graph", __doc__)  # before slow packages are imported

import itertools
import math
import sys
from typing import NamedTuple

import numpy as np

from det_formats.det_json import LABELS, load_detections, read_label_map
from escaping import escaped
from options import MAX_OBJECTS, parse_options, run

GEOMETRY = 7  # columns of node features after the K label columns


EDGE_DECAY = 0.1  # fraction of the image diagonal over which an edge's weight falls to 1 / e


SLOTS = 20  # side of the published matrices


PUBLISHED_LABELS = {"plane": 0, "car": 1, "building": 2}


# ------------------------------------------------------------------ graphs


def build_graph(detections, size):
    """All detections as an undirected networkx.Graph; no label is dropped.

    size: (width, height) in pixels. Nodes carry label, box (six numbers as in the file),
    area (fraction of the image) and score. Edges carry distance (fraction of the diagonal),
    bearing (radians from the lower-numbered node to the other) and weight, exp(-distance / 0.1).
    """
    import networkx as nx  # slow to import, and the model's arrays do without

    width, height = size
    graph = nx.Graph(size=(width, height))
    for i, detection in enumerate(detections):
        box = detection["bbox"]
        _, _, w, h, _, score = box
        area = w * h / (width * height)
        graph.add_node(i, label=detection["label"], box=tuple(box), area=area, score=score)
    boxes = _box_array(detections)
    distances = _distances(boxes[:, :2]) / math.hypot(width, height)  # (n, n)
    for i, j in itertools.combinations(range(len(detections)), 2):
        distance = float(distances[i, j])
        weight = math.exp(-distance / EDGE_DECAY)
        x, y = boxes[j, :2] - boxes[i, :2]
        graph.add_edge(i, j, distance=distance, bearing=math.atan2(y, x), weight=weight)
    return graph


def detection_arrays(detections, label_map):
    """(class ids (n) int, boxes (n, 6) float) of detections, for `arrays_from_boxes`."""
    class_ids = [label_map.class_id(detection["label"]) for detection in detections]
    return np.array(class_ids, dtype=int), _box_array(detections)


def _box_array(detections):
    boxes = [detection["bbox"] for detection in detections]
    return np.array(boxes, dtype=float).reshape(-1, 6)  # (n, 6)


def _distances(centres):
    """Distances between centres (..., n, 2) in pixels, (..., n, n)."""
    x, y = centres[..., 0], centres[..., 1]
    dx = x[..., :, None] - x[..., None, :]
    dy = y[..., :, None] - y[..., None, :]
    return np.sqrt(dx**2 + dy**2)


class GraphArrays(NamedTuple):
    """An image's graph as the model takes it; what stands behind `mask` is padding."""

    nodes: np.ndarray  # (N, F) float32
    adjacency: np.ndarray  # (N, N) float32, symmetric, in [0, 1], zero diagonal
    mask: np.ndarray  # (N) bool
    dropped: int  # objects beyond max_objects


def graph_arrays(detections, size, max_objects=MAX_OBJECTS, label_map=None):
    """Detections to node features, adjacency and mask, padded to N = max_objects.

    size: (width, height) in pixels. A node's F = K + 7 features are its label, one-hot, then
    centre in [-1, 1] by side, log area, elongation times cosine and sine of the doubled angle,
    elongation, score: nothing depends on the image's resolution. Edge weights are
    exp(-distance / 0.1), the distance a fraction of the diagonal: near objects count, coincident
    ones have 1. Beyond max_objects the lowest scores go first, then smaller areas, then the larger
    cx, cy.
    """
    if label_map is None:
        label_map = read_label_map()
    class_ids, boxes = detection_arrays(detections, label_map)
    return arrays_from_boxes(class_ids, boxes, size, max_objects, len(label_map))


def arrays_from_boxes(class_ids, boxes, size, max_objects, label_count):
    """`graph_arrays` of detections that are arrays already.

    class_ids: (n); boxes: (n, 6); size: (width, height) in pixels; label_count: K.
    """
    batch = batch_from_boxes([(class_ids, boxes)], [size], max_objects, label_count)
    return GraphArrays(*(values[0] for values in batch))


def batch_from_boxes(detections, sizes, max_objects, label_count):
    """`arrays_from_boxes` of B images at once, stacked: (B, N, F), (B, N, N), (B, N) and (B).

    detections: (class ids (n), boxes (n, 6)) of each image; sizes: (width, height) of each.
    """
    counts = np.array([len(class_ids) for class_ids, _ in detections], dtype=int)  # (B)
    owners = np.repeat(np.arange(len(counts)), counts)  # the image of each of all M objects
    class_ids = np.concatenate([np.zeros(0, dtype=int), *(ids for ids, _ in detections)])  # (M)
    boxes = np.concatenate([np.zeros((0, 6)), *(own for _, own in detections)])  # (M, 6)
    order = _most_certain(class_ids, boxes, owners)
    places = np.arange(len(order)) - (np.cumsum(counts) - counts)[owners]  # (M), within an image
    kept = places < max_objects
    owners, places = owners[kept], places[kept]
    class_ids, boxes = class_ids[order[kept]], boxes[order[kept]]
    mask = np.arange(max_objects) < counts[:, None]  # (B, N)
    widths, heights = np.array(sizes).reshape(-1, 2).T

    nodes = np.zeros((*mask.shape, label_count + GEOMETRY), dtype=np.float32)  # (B, N, F)
    nodes[owners, places, class_ids] = 1
    nodes[owners, places, label_count:] = _geometry(boxes, (widths[owners], heights[owners]))

    most = int(min(max_objects, counts.max(initial=0)))  # pairs of padding would take time
    held = mask[:, :most]
    centres = np.zeros((*held.shape, 2))  # (B, most, 2)
    centres[owners, places] = boxes[:, :2]
    scales = np.array([-EDGE_DECAY * math.hypot(*size) for size in sizes])  # (B)
    weights = np.exp(_distances(centres) / scales[:, None, None])  # (B, most, most)
    pairs = held[:, :, None] & held[:, None, :] & ~np.eye(most, dtype=bool)
    adjacency = np.zeros((*mask.shape, max_objects), dtype=np.float32)  # (B, N, N)
    adjacency[:, :most, :most] = np.where(pairs, weights, 0)
    return GraphArrays(nodes, adjacency, mask, dropped=np.maximum(counts - max_objects, 0))


def seen_objects(detections, max_objects=MAX_OBJECTS, label_map=None):
    """Indices of the detections that `graph_arrays` keeps, in its order."""
    class_ids, boxes = detection_arrays(detections, label_map or read_label_map())
    owners = np.zeros(len(boxes), dtype=int)
    return _most_certain(class_ids, boxes, owners)[:max_objects].tolist()


def _most_certain(class_ids, boxes, owners):
    """Indices (M) of boxes: by owner, falling score, then falling area, then rising cx and cy.

    Class id, width and angle decide last, so that the order in the file never matters.
    """
    cx, cy, w, h, angle, score = boxes.T
    # The last key counts most.
    return np.lexsort((angle, w, class_ids, cy, cx, -w * h, -score, owners))


def _geometry(boxes, size):
    """Node features behind the label, (M, 7), of boxes (M, 6); size: widths and heights, (M)."""
    width, height = size
    cx, cy, w, h, angle, score = boxes.T
    # Exchanging w and h flips the sign of the first factor, turning by pi / 2 that of the second:
    # the same box has the same features, and a square has no direction.
    elongation = (w - h) / (w + h)
    columns = [
        2 * cx / width - 1,
        2 * cy / height - 1,
        np.log10(w * h / (width * height)) / 2 + 1,
        elongation * np.cos(2 * angle),
        elongation * np.sin(2 * angle),
        np.abs(elongation),
        score,
    ]
    return np.array(columns).T  # (M, 7)


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
        slots = [PUBLISHED_LABELS.get(detection["label"], SLOTS) for detection in detections]
    else:
        slots = list(range(len(detections)))
    adjacency, degree = _matrices(np.array(slots, dtype=int), _box_array(detections))
    if rule == "object":
        degree = degree / 255**2
    return adjacency, degree


def published_arrays(class_ids, boxes):
    """What the published code makes of an image's detections, as a GraphArrays, all 20 slots real.

    class_ids: (n), by a LabelMap of PUBLISHED_LABELS; other labels are skipped. boxes: (n, 6).
    nodes are the degree matrix and adjacency is unbounded, both (20, 20), by `build_matrices`'
    rule "class".
    """
    slots = np.where(class_ids < len(PUBLISHED_LABELS), class_ids, SLOTS)
    adjacency, degree = _matrices(slots, boxes)
    return GraphArrays(
        nodes=degree.astype(np.float32),
        adjacency=adjacency.astype(np.float32),
        mask=np.ones(SLOTS, dtype=bool),
        dropped=0,
    )


def _matrices(slots, boxes):
    """Adjacency and degree, (20, 20) each, of boxes (n, 6) in slots (n); from 20 on, skipped."""
    boxes = boxes[slots < SLOTS]
    slots = slots[slots < SLOTS]
    _, _, w, h, _, score = boxes.T
    areas = w * h * np.abs(score)
    distances = _distances(boxes[:, :2])
    inverse = np.divide(1, distances, out=np.zeros_like(distances), where=distances > 0)
    members = np.eye(SLOTS)[slots]  # (n, 20)
    adjacency = members.T @ inverse @ members  # (20, 20)
    np.fill_diagonal(adjacency, 0)
    degree = np.diag(members.T @ areas)  # (20, 20)
    return adjacency, degree


# ------------------------------------------------------------------ the command


def main(arguments=None):
    # The command alone draws and opens images; the functions above need neither.
    from dataset import images
    from det_formats import sanity
    from det_formats.drawing import draw_graph

    options = parse_options("V_Graph", __doc__, arguments)
    if options.draw:
        images.check_picture_name(options.draw)
    image = images.open_image(options.image)
    detections = load_detections(options.detections)
    label_map = read_label_map(options.labels or LABELS)
    graph = build_graph(detections, image.size)
    seen = seen_objects(detections, options.max_objects, label_map)

    file = escaped(options.detections)
    print(f"{file}: {len(graph)} objects in {image.width} x {image.height} pixels")
    print(f"{len(seen)} of {len(graph)} objects fit into the graph")
    for kind, evidence in sanity.findings({file: _box_array(detections)}, {file: image.size}):
        print(f"warning: {kind}: {evidence}", file=sys.stderr)
    for i, node in graph.nodes(data=True):
        cx, cy, w, h, angle, score = node["box"]
        label = escaped(node["label"])
        print(
            f"  {i:2d} {label:20s} centre {cx:6.1f} {cy:6.1f}  size {w:5.1f} x {h:5.1f}  "
            f"angle {math.degrees(angle):6.1f} deg  area {100 * node['area']:5.2f} %  {score:.2f}"
            f"{'' if i in seen else '  not in it'}"
        )
    pairs = itertools.combinations(sorted(seen), 2)
    for i, j in sorted(pairs, key=lambda pair: -graph.edges[pair]["weight"])[:5]:
        edge = graph.edges[i, j]
        print(f"  edge {i}-{j}: weight {edge['weight']:.3f}, distance {edge['distance']:.3f}")
    arrays = graph_arrays(detections, image.size, options.max_objects, label_map)
    print(f"nodes {arrays.nodes.shape}, adjacency {arrays.adjacency.shape}")
    for rule in ("class", "object"):
        adjacency, degree = build_matrices(options.detections, rule)
        print(f"published rule '{rule}': adjacency sum {adjacency.sum():.4f}, {adjacency.shape}")
    if options.draw:
        images.save_picture(draw_graph(image, graph, seen=seen), options.draw)
        print(f"drawn to {escaped(options.draw)}")


if __name__ == "__main__":
    run(main)
