"""Detections to graphs: published matrices, geometry, the order of objects, the command."""

import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import V_Graph
from conftest import ROOT
from det_formats.det_json import read_label_map
from det_formats.drawing import draw_graph
from V_Graph import (
    GEOMETRY,
    GraphArrays,
    batch_from_boxes,
    build_graph,
    build_matrices,
    detection_arrays,
    graph_arrays,
    seen_objects,
)

FIXTURES = ROOT / "test" / "fixtures"
AIRPORT = FIXTURES / "airport_2_reconstructed.json"
# The 15 areas times score that the published notebook prints for its airport, in square pixels.
AIRPORT_DEGREES = [
    265.74, 219.56, 166.71, 236.02, 169.31, 162.96, 26.38, 80.76, 23.39, 65.64, 95.07, 128.64,
    62.13, 12.79, 11.92,
]  # fmt: skip
LABEL_MAP = read_label_map()
K = len(LABEL_MAP)
SIZE = (640, 480)


def detection(label="ship", cx=100.0, cy=50.0, w=40.0, h=10.0, angle=0.0, score=0.5):
    return {"label": label, "bbox": [cx, cy, w, h, angle, score]}


def random_detections(number, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.choice([line.split(",")[0] for line in LABEL_MAP.lines], number)
    low, high = (0, 0, 5, 5, -math.pi, 0), (*SIZE, 60, 60, math.pi, 1)
    boxes = rng.uniform(low, high, (number, 6)).tolist()
    return [detection(label, *numbers) for label, numbers in zip(labels, boxes, strict=True)]


def arrays(detections, size=SIZE, max_objects=20):
    return graph_arrays(detections, size, max_objects, LABEL_MAP)


def equal(first, second, tolerance=0.0):
    """Whether two GraphArrays are the same, to a tolerance."""
    return (
        np.allclose(first.nodes, second.nodes, rtol=0, atol=tolerance)
        and np.allclose(first.adjacency, second.adjacency, rtol=0, atol=tolerance)
        and np.array_equal(first.mask, second.mask)
        and first.dropped == second.dropped
    )


# ------------------------------------------------------------------ published matrices


def test_class_rule_reproduces_the_published_matrices():
    outputs = np.load(FIXTURES / "published" / "outputs.npz")
    for index in range(8):
        adjacency, degree = build_matrices(FIXTURES / "published" / f"det_{index}.json", "class")
        np.testing.assert_allclose(adjacency, outputs["adjacency"][index], rtol=1e-6, atol=0)
        np.testing.assert_allclose(degree, outputs["degree"][index], rtol=1e-6, atol=0)
    adjacency, degree = build_matrices(AIRPORT)  # planes alone: no edges within one class
    assert not adjacency.any()
    assert np.count_nonzero(degree) == 1
    assert degree[0, 0] == pytest.approx(1416.47, abs=0.005)


def test_object_rule_reproduces_the_printed_numbers():
    adjacency, degree = build_matrices(AIRPORT, "object")
    areas = np.diag(degree) * 255**2
    np.testing.assert_allclose(areas[:15], AIRPORT_DEGREES, rtol=0, atol=0.005)
    assert np.array_equal(degree, np.diag(np.diag(degree)))
    assert adjacency.shape == (20, 20) and np.array_equal(adjacency, adjacency.T)
    assert adjacency[adjacency > 0].min() == pytest.approx(0.00421540667, rel=1e-6)
    assert adjacency.max() == pytest.approx(5.12276208, rel=1e-6)
    assert adjacency.sum() == pytest.approx(24.8252023, rel=1e-6)
    assert adjacency[0].sum() == pytest.approx(0.2498314636, rel=1e-6)
    assert adjacency[6, 14] == 0  # coincident boxes: 1 / 0 counts as 0
    assert not np.diag(adjacency).any()
    assert not degree[15:].any() and not adjacency[15:].any()


def test_object_rule_keeps_the_first_twenty_objects(tmp_path):
    detections = random_detections(25)
    matrices = []
    for number in (25, 20):
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps(detections[:number]))
        matrices.append(build_matrices(path, "object"))
    assert np.array_equal(matrices[0], matrices[1])
    with pytest.raises(ValueError, match="'class' or 'object', found 'pair'"):
        build_matrices(path, "pair")


# ------------------------------------------------------------------ node features and adjacency


def test_node_features_of_a_hand_computed_box():
    nodes = arrays([detection("ship", 150, 25, 40, 10, math.pi / 6, 0.5)], (200, 100)).nodes
    # area 400 of 20,000 pixels; (40 - 10) / (40 + 10) = 0.6 at a doubled angle of 60 degrees
    expected = [0.5, -0.5, math.log10(0.02) / 2 + 1, 0.3, 0.6 * math.sin(math.pi / 3), 0.6, 0.5]
    np.testing.assert_allclose(nodes[0, K:], expected, atol=1e-6)
    assert nodes[0, :K].argmax() == LABEL_MAP.class_id("ship")
    assert nodes[0, :K].sum() == 1
    assert nodes.shape == (20, K + GEOMETRY)


def test_adjacency_of_hand_computed_distances():
    detections = [detection(cx=0, cy=0, score=0.9), detection(cx=30, cy=40, score=0.8)]
    adjacency = arrays(detections, (300, 400)).adjacency  # 50 of a diagonal of 500 pixels
    assert adjacency[0, 1] == pytest.approx(math.exp(-1), rel=1e-6)
    assert np.count_nonzero(adjacency) == 2
    coincident = arrays([detection(score=0.9), detection(score=0.8)]).adjacency
    assert coincident[0, 1] == coincident[1, 0] == 1 and coincident.sum() == 2


@pytest.mark.parametrize(("w", "h"), [(40, 10), (10, 40), (25, 25)])
@pytest.mark.parametrize("angle", [0.0, 0.3, 1.2, -2.5])
def test_equal_boxes_in_other_words_have_equal_features(w, h, angle):
    def described(w, h, angle):
        return arrays([detection(w=w, h=h, angle=angle), detection(cx=130, cy=70, score=0.4)])

    reference = described(w, h, angle)
    assert equal(reference, described(w, h, angle + math.pi), 1e-6)
    assert equal(reference, described(h, w, angle + math.pi / 2), 1e-6)
    assert equal(reference, described(h, w, angle - math.pi / 2), 1e-6)
    turned = described(w, h, angle + 0.4)  # a square has no direction, other boxes have
    assert equal(reference, turned) == (w == h)
    assert w == h or abs(reference.nodes - turned.nodes).max() > 0.1


def test_nothing_depends_on_the_resolution():
    detections = random_detections(12)
    scaled = [
        {"label": d["label"], "bbox": [3 * v for v in d["bbox"][:4]] + d["bbox"][4:]}
        for d in detections
    ]
    assert equal(arrays(detections), arrays(scaled, (1920, 1440)), 1e-6)


@pytest.mark.parametrize("n", [17, 0])
def test_adjacency_is_symmetric_bounded_and_without_loops(n):
    nodes, adjacency, mask, dropped = arrays(random_detections(n))
    assert np.array_equal(adjacency, adjacency.T)
    assert adjacency.min() >= 0 and adjacency.max() <= 1
    assert not np.diag(adjacency).any()
    assert (adjacency[:n, :n] + np.eye(n) > 0).all()
    assert not adjacency[n:].any() and not adjacency[:, n:].any() and not nodes[n:].any()
    assert mask.tolist() == [True] * n + [False] * (20 - n)
    assert dropped == 0
    assert nodes.shape == (20, K + GEOMETRY) and adjacency.shape == (20, 20)
    assert nodes.dtype == adjacency.dtype == np.float32 and mask.dtype == bool


def test_graphs_made_together_are_those_made_alone_to_the_bit():
    many = [random_detections(number, seed=number) for number in (3, 0, 20, 41)]
    sizes = [(640, 480), (30, 40), (1001, 77), (640, 480)]
    boxes = [detection_arrays(detections, LABEL_MAP) for detections in many]
    batch = batch_from_boxes(boxes, sizes, 20, K)
    assert batch.dropped.tolist() == [0, 0, 0, 21]
    for i, detections in enumerate(many):
        alone = arrays(detections, sizes[i])
        assert equal(GraphArrays(*(values[i] for values in batch)), alone)
    nothing = batch_from_boxes([], [], 20, K)
    assert [values.shape for values in nothing] == [
        (0, 20, K + GEOMETRY),
        (0, 20, 20),
        (0, 20),
        (0,),
    ]


def test_the_most_extreme_numbers_that_can_be_read_give_finite_arrays():
    far = detection(cx=9e8, cy=-9e8, w=9e8, h=9e8)
    tiny = detection(w=1e-6, h=1e-6, score=0.0)
    nodes, adjacency, *_ = arrays([detection(), far, tiny, detection(w=9e8, h=1e-6)])
    assert np.isfinite(nodes).all() and np.isfinite(adjacency).all()


def test_two_thousand_graphs_a_second():
    scenes = [random_detections(20, seed) for seed in range(50)]
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        for detections in scenes:
            arrays(detections)
        seconds.append(time.perf_counter() - start)
    assert len(scenes) / min(seconds) >= 2000


# ------------------------------------------------------------------ order, and too many objects


@pytest.mark.parametrize("max_objects", [20, 5])
def test_order_of_detections_changes_nothing(max_objects):
    detections = random_detections(12) + random_detections(3)  # three of them twice
    reference = arrays(detections, max_objects=max_objects)
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(len(detections))
        shuffled = [detections[i] for i in order]
        assert equal(reference, arrays(shuffled, max_objects=max_objects))


@pytest.mark.parametrize("max_objects", [2, 1])
@pytest.mark.parametrize(
    "other", [{"label": "car"}, {"angle": 0.7}, {"w": 20.0, "h": 20.0}], ids=str
)
def test_order_changes_nothing_among_objects_alike_in_score_area_and_centre(other, max_objects):
    pair = [detection(), detection(**other)]
    assert equal(arrays(pair, max_objects=max_objects), arrays(pair[::-1], max_objects=max_objects))


@pytest.mark.parametrize(
    ("kept", "gone"),
    [
        ({"score": 0.51, "w": 5}, {"score": 0.5, "w": 50}),
        ({"w": 41, "cx": 300}, {"w": 40, "cx": 10}),
        ({"cx": 10, "cy": 90}, {"cx": 11, "cy": 10}),
        ({"cy": 10}, {"cy": 11}),
    ],
    ids=["score", "area", "cx", "cy"],
)
def test_which_of_two_objects_is_dropped(kept, gone):
    pair = [detection("ship", **kept), detection("bridge", **gone)]
    for detections in (pair, pair[::-1]):
        result = arrays(detections, max_objects=1)
        assert result.nodes[0, LABEL_MAP.class_id("ship")] == 1
        assert result.dropped == 1


def test_seen_objects_are_those_of_the_arrays_in_their_order():
    detections = random_detections(60)
    seen = seen_objects(detections, 20, LABEL_MAP)
    assert len(set(seen)) == 20
    alone = arrays([detections[i] for i in seen])
    assert equal(arrays(detections), alone._replace(dropped=40))
    scores = alone.nodes[:, -1]
    assert scores.tolist() == pytest.approx([detections[i]["bbox"][5] for i in seen])
    assert seen_objects([], 20) == []


# ------------------------------------------------------------------ build_graph


def test_graph_attributes_of_a_hand_computed_example():
    detections = [
        detection("plane", 100, 100, 30, 40, 0.1, 0.9),
        detection("dragon", 130, 140, 12, 10, -0.2, 0.3),
        detection("car", 100, 40, 60, 20, 0.0, 0.0),
    ]
    graph = build_graph(detections, (300, 400))  # a diagonal of 500 pixels
    assert [node["label"] for _, node in graph.nodes(data=True)] == ["plane", "dragon", "car"]
    areas = [node["area"] for _, node in graph.nodes(data=True)]
    assert areas == pytest.approx([0.01, 0.001, 0.01])
    assert [node["score"] for _, node in graph.nodes(data=True)] == [0.9, 0.3, 0.0]
    assert graph.nodes[1]["box"] == (130, 140, 12, 10, -0.2, 0.3)
    expected = {  # distance, bearing, weight
        (0, 1): (0.1, math.atan2(40, 30), math.exp(-1)),
        (0, 2): (0.12, -math.pi / 2, math.exp(-1.2)),
        (1, 2): (math.sqrt(10_900) / 500, math.atan2(-100, -30), math.exp(-math.sqrt(109) / 5)),
    }
    assert set(graph.edges) == set(expected)
    for edge, values in expected.items():
        found = [graph.edges[edge][name] for name in ("distance", "bearing", "weight")]
        assert found == pytest.approx(values)


# ------------------------------------------------------------------ the command


def test_the_command_prints_and_draws_a_sample(tmp_path, capsys):
    path, target = tmp_path / "scene.json", tmp_path / "new" / "graph.png"
    path.write_text(json.dumps([detection(cx=x, w=9) for x in (0, 30, 36, 100, 128)]))
    image = ROOT / "test" / "sample_1.png"
    files = [str(path), "--image", str(image), "--draw", str(target)]
    V_Graph.main([*files, "--max-objects", "4"])
    printed, warned = capsys.readouterr()
    assert warned == ""
    assert "5 objects in 128 x 128 pixels" in printed
    assert "4 of 5 objects fit into the graph" in printed
    lines = [line for line in printed.splitlines() if " ship " in line]
    assert [int(line.split()[0]) for line in lines] == [0, 1, 2, 3, 4]
    assert [line.endswith("not in it") for line in lines] == [False, False, False, False, True]
    edges = [line.split(":")[0].strip() for line in printed.splitlines() if "  edge " in line]
    assert edges == ["edge 1-2", "edge 0-1", "edge 0-2", "edge 2-3", "edge 1-3"]  # strongest first
    assert f"nodes (4, {K + 7}), adjacency (4, 4)\n" in printed
    for rule in ("class", "object"):
        adjacency, _ = build_matrices(path, rule)
        assert f"rule '{rule}': adjacency sum {adjacency.sum():.4f}, (20, 20)" in printed
    detections = json.loads(path.read_text())
    with Image.open(target) as drawn, Image.open(image) as original:
        graph = build_graph(detections, original.size)
        expected = draw_graph(original.convert("RGB"), graph, seen=[0, 1, 2, 3])
        assert np.array_equal(np.asarray(drawn), np.asarray(expected))


def test_the_command_warns_of_implausible_boxes(tmp_path, capsys):
    path = tmp_path / "scene.json"
    path.write_text(json.dumps([detection(cx=300, angle=50.0)]))
    V_Graph.main([str(path), "--image", str(ROOT / "test" / "sample_1.png")])
    warnings = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1] for line in warnings] == [" degrees", " outside"]


@pytest.mark.parametrize("suffix", [".png", ".JPG", ".tif", ".bmp", ".webp", ".gif"])
def test_the_picture_is_written_whole_or_not_at_all(tmp_path, monkeypatch, suffix):
    target = tmp_path / f"graph{suffix}"
    detections, image = (
        str(ROOT / name) for name in ("det_json/sample_1.json", "test/sample_1.png")
    )
    command = [detections, "--image", image, "--draw", str(target)]
    V_Graph.main(command)
    before = target.read_bytes()
    with Image.open(target) as drawn:
        assert max(drawn.size) > 128

    def fail(picture, path, format):
        Path(path).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="no space left"):
        V_Graph.main(command)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [before]


@pytest.mark.parametrize(
    ("image", "target", "message"),
    [
        ("gone.png", "graph.png", "gone.png: no such image"),
        ("notes.xyz", "graph.png", "notes.xyz: not readable as an image"),
        ("sample_1.png", "graph.xyz", "graph.xyz: the suffix is of no image format"),
    ],
)
def test_images_that_cannot_be_read_or_written_are_errors_of_one_line(
    tmp_path, capsys, image, target, message
):
    (tmp_path / "notes.xyz").write_text("no image")
    folder = ROOT / "test" if image == "sample_1.png" else tmp_path
    detections = str(ROOT / "det_json" / "sample_1.json")
    with pytest.raises(ValueError, match=message) as error:
        V_Graph.main([detections, "--image", str(folder / image), "--draw", str(tmp_path / target)])
    assert "\n" not in str(error.value) and capsys.readouterr().out == ""
