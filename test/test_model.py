"""The graph branch, its fusion with CLIP, and checkpoints."""

import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch_geometric.nn import GCNConv as SparseGCNConv

import clip
import model
from backbones.towers import CLIP
from conftest import changed
from det_formats.det_json import read_label_map
from loss import directions, info_nce
from model import GCNConv, is_checkpoint, load_checkpoint, save_checkpoint
from V_Graph import MAX_OBJECTS, arrays_from_boxes

LABELS = read_label_map()
COUNTS = (5, 0, 20, 1, 3)  # objects of the images in a batch; one has none
WITHOUT = 1
FUSIONS = (0.75, "gate")
TOLERANCE = {"cpu": 1e-6, "cuda": 1e-5}

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.fixture
def random_model(tiny_model):
    """tiny_model with random biases: zeros, as they start, would hide what padding does."""

    def build(**changes):
        network = tiny_model(**changes)
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.2)
        return network

    return build


def graphs(counts, device="cpu", max_objects=MAX_OBJECTS, seed=0, shuffled=False):
    """Nodes, adjacency and mask of random scenes with so many objects."""
    batch = []
    for i, count in enumerate(counts):
        rng = np.random.default_rng((seed, i))
        low, high = [0, 0, 5, 5, -3, 0.3], [640, 480, 60, 60, 3, 1]
        class_ids, boxes = rng.integers(0, len(LABELS), count), rng.uniform(low, high, (count, 6))
        arrays = arrays_from_boxes(class_ids, boxes, (640, 480), max_objects, len(LABELS))
        nodes, adjacency, mask, _ = arrays
        if shuffled:
            order = rng.permutation(max_objects)
            nodes, adjacency, mask = nodes[order], adjacency[order][:, order], mask[order]
        batch.append((nodes, adjacency, mask))
    return [torch.from_numpy(np.stack(arrays)).to(device) for arrays in zip(*batch, strict=True)]


def pixels(number, device="cpu", size=32):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(number, 3, size, size, generator=generator).to(device)


def pair(network, image, graph, text):
    """The unit embeddings of images, fused with their graphs, and of texts."""
    fused = network.branches(network.encode_image(image), *graph)[2]
    return fused, F.normalize(network.encode_text(text), dim=-1)


@torch.no_grad()
def embed(network, image, graph):
    """The images' fused embeddings, as the model gives them."""
    return network.branches(network.encode_image(image), *graph)[2]


def largest(a, b):
    return (a - b).abs().max().item()


# ------------------------------------------------------------------ graph convolution


def test_gcn_of_two_hand_computed_objects():
    layer = GCNConv(1, 1)
    nn.init.ones_(layer.lin.weight)
    nn.init.constant_(layer.bias, 10.0)
    x = torch.tensor([[[2.0], [4.0], [99.0]]])
    adjacency = torch.tensor([[[0, 0.5, 0.7], [0.5, 0, 0.7], [0.7, 0.7, 0]]])
    mask = torch.tensor([[True, True, False]])
    found = layer(x, adjacency, mask)[0, :2, 0]
    # Both degrees are 1.5: (2 + 0.5 * 4) / 1.5 and (4 + 0.5 * 2) / 1.5, the third does not count.
    torch.testing.assert_close(found, torch.tensor([10 + 4 / 1.5, 10 + 5 / 1.5]))


# ------------------------------------------------------------------ an image's own embedding


@torch.no_grad()
def plain_graph_features(network, nodes, adjacency):
    """The graph's features (E) of one image without padding, by PyTorch Geometric's layers."""
    edges = adjacency.nonzero().T  # (2, edges)
    x = network.node_projection(nodes)
    for dense in (network.gcn1, network.gcn2, network.gcn3):
        sparse = SparseGCNConv(*dense.lin.weight.shape).to(x.device)
        sparse.load_state_dict(dense.state_dict())
        x = F.relu(sparse(x, edges, adjacency[tuple(edges)]))
    return network.mlp(x.sum(dim=0))


@pytest.mark.parametrize("fusion", FUSIONS)
def test_embeddings_equal_a_plain_computation_of_each_image(random_model, device, fusion):
    network = random_model(fusion=fusion).to(device)
    image = pixels(len(COUNTS), device)
    nodes, adjacency, mask = graphs(COUNTS, device, shuffled=True)
    both = mask[:, :, None] & mask[:, None, :]  # (B, N, N)
    padded = torch.where(mask[..., None], nodes, 7.0), torch.where(both, adjacency, 0.5), mask
    with torch.no_grad():
        encoded = network.encode_image(image)
        image_features, graph_features, fused = network.branches(encoded, *padded)
    for i, own in enumerate(mask):
        a = F.normalize(image_features[i], dim=0)
        if i == WITHOUT:
            assert torch.equal(fused[i], a) and not graph_features[i].any()
            continue
        vector = plain_graph_features(network, nodes[i, own], adjacency[i][own][:, own])
        assert largest(graph_features[i], vector) <= 10 * TOLERANCE[device.type]
        b = F.normalize(vector, dim=0)
        share = fusion
        if fusion == "gate":
            share = torch.sigmoid(network.gate(torch.cat([a, b])))
        expected = F.normalize((1 - share) * a + share * b, dim=0)
        assert largest(fused[i], expected) <= TOLERANCE[device.type]
        assert largest(fused[i], a) > 1e-3


@pytest.mark.parametrize("fusion", FUSIONS)
def test_batch_mates_size_and_order_change_nothing(random_model, device, fusion):
    network = random_model(fusion=fusion).to(device)
    image, graph = pixels(len(COUNTS), device), graphs(COUNTS, device)
    together = embed(network, image, graph)
    for rows in ([0], [1], [2], [3], [4], [0, 2], [3, 1, 4, 0, 2]):
        found = embed(network, image[rows], [part[rows] for part in graph])
        assert largest(together[rows], found) <= TOLERANCE[device.type]
    assert largest(together.norm(dim=-1), torch.ones(5, device=device)) <= 1e-6
    assert torch.pdist(together).min() > 1e-3


def test_a_bag_of_counts_sees_counts_alone(tiny_model, device):
    network = tiny_model(graph="counts").to(device)
    nodes, adjacency, mask = graphs(COUNTS, device, shuffled=True)
    image = pixels(len(COUNTS), device)
    whole = embed(network, image, (nodes, adjacency, mask))
    elsewhere = nodes.clone()
    elsewhere[..., network.labels :] = 0.5  # all objects at one place
    assert torch.equal(embed(network, image, (elsewhere, 0 * adjacency, mask)), whole)
    levels = network.thermometer(nodes, mask).unflatten(1, (network.labels, -1)).sum(dim=-1)
    for i, own in enumerate(mask):
        counts = nodes[i, own][:, : network.labels].sum(dim=0)  # of each kind
        assert torch.equal(levels[i], counts.clamp(max=10))
    with torch.no_grad():
        alone = F.normalize(network.encode_image(image), dim=-1)
    assert torch.equal(whole[WITHOUT], alone[WITHOUT])


# ------------------------------------------------------------------ fusion


def test_without_graph_the_model_is_clip(random_model, tiny_model_config, device):
    network = random_model(graph="none").to(device)
    plain = CLIP(tiny_model_config)
    assert [n for n, _ in network.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert not network.new_parameters()
    plain.load_state_dict(network.state_dict())
    plain = plain.to(device).eval()
    image, text = pixels(5, device), clip.tokenize(["a ship", "two planes"]).to(device)
    with torch.no_grad():
        for graph in (graphs(COUNTS, device), (None, None, None)):
            image_features, text_features = pair(network, image, graph, text)
            assert torch.equal(image_features, F.normalize(plain.encode_image(image), dim=-1))
            assert torch.equal(text_features, F.normalize(plain.encode_text(text), dim=-1))


# ------------------------------------------------------------------ the model called


@torch.no_grad()
def test_called_without_graphs_the_model_is_clip(random_model, tiny_model_config):
    network = random_model()
    plain = CLIP(tiny_model_config).eval()
    plain.load_state_dict(network.state_dict(), strict=False)
    image, text = pixels(5), clip.tokenize(["a ship", "two planes"])
    for found, expected in zip(network(image, text), plain(image, text), strict=True):
        assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="together"):
        network(image, text, graphs(COUNTS)[0])


@torch.no_grad()
@pytest.mark.parametrize("graph", ["object", "none"])
def test_called_with_graphs_the_model_gives_logits_or_embeddings(random_model, graph):
    network = random_model(graph=graph)
    image, text, arrays = pixels(5), clip.tokenize(["a ship", "two planes"]), graphs(COUNTS)
    fused, texts = pair(network, image, arrays, text)
    per_image, per_text = network(image, text, *arrays)
    cosines = F.cosine_similarity(fused[:, None], texts[None], dim=-1)  # (5, 2)
    torch.testing.assert_close(per_image, network.logit_scale.exp() * cosines)
    assert torch.equal(per_text, per_image.T)
    encoded = network.encode_image(image), texts
    for found in (
        network(image, text, *arrays, features_only=True),
        network(*encoded, *arrays, encoded=True, features_only=True),
    ):
        assert torch.equal(found[0], fused) and torch.equal(found[1], texts)


# ------------------------------------------------------------------ gradients


def backward(network, counts, device="cpu"):
    """The gradients of InfoNCE on images with so many objects each."""
    text = clip.tokenize([f"{i} ships" for i in range(len(counts))]).to(device)
    graph = graphs(counts, device)
    fused, texts = pair(network, pixels(len(counts), device), graph, text)
    positives = torch.eye(len(counts), dtype=torch.bool, device=device)
    info_nce(directions(fused, texts, positives), network.logit_scale).backward()
    return {name: parameter.grad for name, parameter in network.named_parameters()}


@pytest.mark.parametrize("fusion", FUSIONS)
def test_gradients_reach_every_parameter(random_model, device, fusion):
    network = random_model(fusion=fusion).to(device).train()
    for name, gradient in backward(network, COUNTS, device).items():
        assert torch.isfinite(gradient).all() and gradient.abs().max() > 1e-8, name


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_gradients_are_finite_in_half_precision(random_model, fusion, precision):
    network = random_model(fusion=fusion).train()
    assert 0 in COUNTS  # an image without objects
    with torch.autocast("cpu", precision):
        gradients = backward(network, COUNTS)
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_batch_without_any_object_leaves_the_graph_branch_alone(tiny_model, fusion):
    network = tiny_model(fusion=fusion).train()
    new = network.new_parameters()
    for name, gradient in backward(network, (0, 0)).items():
        if name in new:
            assert gradient is None or not gradient.any(), name
        else:
            assert torch.isfinite(gradient).all() and gradient.any(), name


# ------------------------------------------------------------------ checkpoints


def options(**changes):
    return {"graph": "object", "fusion": 0.6, **changes}


@pytest.fixture
def save(tiny_model, tiny_model_config, tmp_path):
    """Writes a small model's checkpoint: save(epoch=3); its path."""

    def write(network=None, labels=LABELS.lines, chosen=None, **state):
        path = tmp_path / "runs" / "best.pt"
        network, chosen = network or tiny_model(), chosen or options()
        save_checkpoint(path, network, tiny_model_config, labels, chosen, **state)
        return path

    return write


@pytest.mark.parametrize(
    "chosen",
    [
        options(),
        options(fusion="gate"),
        options(graph="none"),
        options(graph="exchanged"),
        options(graph="counts"),
    ],
    ids=["sum", "gate", "none", "control", "counts"],
)
def test_a_checkpoint_alone_rebuilds_an_equal_model(
    tiny_model, tiny_model_config, save, device, chosen
):
    network = tiny_model(**chosen).to(device)
    nn.init.normal_(network.logit_scale)
    state = {"epoch": 3, "best_score": 12.5, "history": [{"loss": 0.5}], "rng": torch.ones(3)}
    path = save(network, chosen=chosen, **state)
    torch.manual_seed(1)
    again, checkpoint = load_checkpoint(path, device)
    image, graph = pixels(len(COUNTS), device), graphs(COUNTS, device)
    # CUDA may choose another algorithm; the CPU gives the same bits.
    allowed = 0 if device.type == "cpu" else 1e-6
    assert largest(embed(network, image, graph), embed(again, image, graph)) <= allowed
    assert not changed(network.state_dict(), again.state_dict()) and not again.training
    assert (again.graph, again.fusion) == (network.graph, chosen["fusion"])
    assert (checkpoint["epoch"], checkpoint["best_score"]) == (3, 12.5)
    assert checkpoint["options"] == chosen and checkpoint["labels"] == LABELS.lines
    assert checkpoint["definition"] == tiny_model_config
    weights = torch.load(path, weights_only=True)["weights"]  # without code, without CUDA
    assert {tensor.device.type for tensor in weights.values()} == {"cpu"}
    assert load_checkpoint(path)[0].logit_scale.device.type == "cpu"


def test_a_checkpoint_keeps_its_own_labels(tiny_model_config, save):
    labels = ["ship, boat", "bridge"]
    network = model.build(tiny_model_config, labels, options())
    assert network.node_projection.in_features == 2 + 1 + 7
    again, checkpoint = load_checkpoint(save(network, labels))
    assert checkpoint["labels"] == labels
    assert torch.equal(again.node_projection.weight, network.node_projection.weight)


def test_the_same_checkpoint_is_the_same_file(save):
    assert save().read_bytes() == save().read_bytes()


def refused(path, reason=""):
    with pytest.raises(ValueError, match=re.escape(str(path)) + reason):
        load_checkpoint(path)


def test_what_is_no_checkpoint_is_told_and_refused(tiny_model_config, tmp_path, plain_clip):
    state = CLIP(tiny_model_config).state_dict()
    fields = dict.fromkeys(model.FIELDS, {})
    contents = {
        "clip.pt": state,
        "number.pt": {"state_dict": {**state, model.PUBLISHED: 3}},
        "inside.pt": {"inside": fields, model.PUBLISHED + ".more": {}},
        "code.pt": {**fields, "weights": tmp_path.exists},
        "weights.pt": {"weights": {}},
        "tensor.pt": torch.zeros(2),
        "list.pt": [1],
    }
    for name, content in contents.items():
        torch.save(content, tmp_path / name)
    save_file(state, tmp_path / "clip.safetensors")
    (tmp_path / "text.pt").write_text(" ".join(model.FIELDS))
    for path in (*tmp_path.iterdir(), plain_clip, tmp_path, tmp_path / "none"):
        assert not is_checkpoint(path)
        refused(path)


def test_a_broken_checkpoint_is_refused_with_its_path(save):
    path = save()
    whole = path.read_bytes()
    broken = (b"", b"hello world", b"PK\x03\x04 broken", b"PK\x05\x06" + bytes(18), whole[:-1000])
    for content in (*broken, whole.replace(b"PK\x01\x02", b"PK??")):
        path.write_bytes(content)
        refused(path, r": broken.*\(\w+Error\)$")


def test_code_in_a_checkpoint_is_refused_with_its_path(tmp_path):
    path = tmp_path / "other.pt"
    torch.save({**dict.fromkeys(model.FIELDS, {}), "options": tmp_path.exists}, path)
    refused(path, r": reading it would run code from the file \(\S*getattr\), which is refused")


def test_other_versions_and_weights_that_do_not_fit_are_refused_with_the_path(save):
    refused(save(labels=LABELS.lines[:-1]), ": weights and model config")
    refused(save(version=model.VERSION - 1), ": from another version")


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("weights", 3, "'weights': expected a dict of tensors, found 3"),
        ("labels", ["ship", 1], "'labels'"),
        ("labels", ["ship", "Ship, boat", "a"], "labels: 'Ship' stands in two lines"),
        ("definition", {"text": {"vocab_size": 10**6}}, ".*vocab_size is 1000000, but 49408"),
        ("definition", {"text": {"vocab_size": 10**9}}, ".*vocab_size"),
        ("definition", {"text": {"heads": 3}}, ".*3 heads"),
        ("definition", {"activation": "relu"}, ".*activation"),
        ("options", {"fusion": "product"}, ".*fusion': expected gate or a number"),
        ("options", {"fusion": math.nan}, ".*fusion': expected gate or a number"),
        ("options", {"graph": "published", "fusion": "gate"}, ".*fusion': expected a number"),
        ("options", {"max_objects": "20"}, ".*max_objects"),
        ("options", {"train": "lora"}, ".*lora"),
    ],
)
def test_a_field_of_a_checkpoint_that_makes_no_model_is_named(save, field, value, reason):
    path = save()
    content = torch.load(path, weights_only=True)
    if field == "definition" and "text" in value:
        value = {"text": {**content[field]["text"], **value["text"]}}
    if isinstance(value, dict):
        value = {**content[field], **value}
    torch.save({**content, field: value}, path)
    refused(path, f": .*{reason}")


def without_numbers(tensor):
    """A tensor of the same shape of which the file holds one number."""
    return torch.zeros(()).expand(tensor.shape)


def with_one(value):
    """A change of one number of a matrix."""

    def change(tensor):
        tensor = tensor.clone()
        tensor[1, 1] = value
        return tensor

    return change


@pytest.mark.parametrize(
    "change",
    [
        *map(with_one, (math.nan, math.inf, -math.inf)),
        lambda tensor: tensor.half() * math.nan,
        lambda tensor: tensor.long(),
        without_numbers,
    ],
)
def test_weights_of_a_checkpoint_are_finite_numbers_that_are_there(save, change):
    path = save()
    content = torch.load(path, weights_only=True)
    content["weights"]["gcn1.lin.weight"] = change(content["weights"]["gcn1.lin.weight"])
    torch.save(content, path)
    refused(path, ": .*gcn1.lin.weight")
