"""The published FG-CROSS: its checkpoints load, its forward pass is met, what is wrong with it."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import clip_gcn_image_feature_integration as integration
import evaluate
import infer
import model
from backbones import model_configs
from conftest import ROOT
from dataset.batches import ImageSet
from det_formats.det_json import LabelMap, load_detections
from model import load_checkpoint
from V_Graph import PUBLISHED_LABELS, build_matrices, published_arrays

PUBLISHED = ROOT / "test" / "fixtures" / "published"
OUTPUTS = np.load(PUBLISHED / "outputs.npz")
TOLERANCE = 1e-5


def model_config():
    """The fixtures' sizes as a model config; the heads are CLIP's, a width of 64 each."""
    sizes = json.loads((PUBLISHED / "config.json").read_text(encoding="utf-8"))
    vision = {"patch_size": sizes["vision_patch_size"], "width": sizes["vision_width"]}
    text = {"context_length": sizes["context_length"], "vocab_size": sizes["vocab_size"]}
    text["width"] = sizes["transformer_width"]
    return {
        "embed_dim": sizes["embed_dim"],
        "image_size": sizes["image_resolution"],
        "vision": {**vision, "layers": sizes["vision_layers"], "heads": 1},
        "text": {**text, "layers": sizes["transformer_layers"], "heads": 1},
    }


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """Path of the published state dict, whose sizes are among the model configs."""
    folder = tmp_path / "model_configs"
    folder.mkdir()
    (folder / "published.json").write_text(json.dumps(model_config()), encoding="utf-8")
    monkeypatch.setattr(model_configs, "MODELS", folder)
    return PUBLISHED / "state_dict.pt"


@pytest.fixture
def network(checkpoint):
    return load_checkpoint(checkpoint)[0]


def output(name):
    return torch.from_numpy(OUTPUTS[name])


def graph(adjacency=None, degree=None):
    """The fixtures' matrices, or others in their place, as the model takes them."""
    adjacency = output("adjacency") if adjacency is None else adjacency
    degree = output("degree") if degree is None else degree
    return degree, adjacency, torch.ones(adjacency.shape[:2], dtype=torch.bool)


@torch.no_grad()
def fused(network, *matrices, images=8):
    """What the published encode_image returns: the sum, not normalised."""
    image_features, graph_features, _ = network.branches(
        network.encode_image(output("image")[:images]), *(part[:images] for part in matrices)
    )
    return network.fuse(image_features, graph_features, None)


def met(found, name):
    torch.testing.assert_close(found, output(name), rtol=0, atol=TOLERANCE)


# ------------------------------------------------------------------ the forward pass


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(("prefix", "under"), [("", False), ("module.", True)])
def test_a_published_checkpoint_loads_in_every_form(checkpoint, tmp_path, zipped, prefix, under):
    theirs = torch.load(checkpoint, weights_only=True)
    state = {f"{prefix}{name}": tensor for name, tensor in theirs.items()}
    content = {"epoch": 3, "state_dict": state} if under else state
    path = tmp_path / "best_model.pth"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert model.is_checkpoint(path)
    network, saved = load_checkpoint(path)
    assert network.state_dict().keys() == saved["weights"].keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in network.state_dict().items())
    sizes = {"name": "published", **model_config(), "activation": "quickgelu"}
    assert saved["definition"] == sizes
    assert saved["labels"] == ["plane", "car", "building"] and not network.training


def test_a_published_checkpoint_of_other_names_or_sizes_is_refused(
    checkpoint, tmp_path, monkeypatch
):
    weights = torch.load(checkpoint, weights_only=True)
    more = {**weights, "mlp.4.bias": torch.ones(1)}
    fewer = {name: tensor for name, tensor in weights.items() if name != "mlp.2.bias"}
    for changed, name in ((fewer, "mlp.2.bias"), (more, "mlp.4.bias")):
        torch.save(changed, tmp_path / "best_model.pth")
        with pytest.raises(ValueError, match=rf"(?s)best_model\.pth: .*{name}"):
            load_checkpoint(tmp_path / "best_model.pth")
    monkeypatch.setattr(model_configs, "MODELS", tmp_path)  # where no model config is
    with pytest.raises(ValueError, match=r"state_dict\.pt: of the published FG-CROSS"):
        load_checkpoint(checkpoint)


def test_towers_graph_pass_and_logits_are_the_published_ones(network):
    met(fused(network, *graph()), "image_features")
    scaled = graph(degree=output("degree") / 65025)
    met(fused(network, *scaled), "image_features_degree_over_65025")
    with torch.no_grad():
        image_features = network.encode_image(output("image"))
        text_features = network.encode_text(output("text"))
        met(image_features, "visual")
        met(text_features, "text_features")
        images = network.branches(image_features, *graph())[2]
        texts = F.normalize(text_features, dim=-1)
        met(network.logit_scale.exp() * images @ texts.T, "logits_per_image")


def test_edges_and_their_weights_count_as_published(network):
    adjacency, published = output("adjacency"), output("image_features")
    for name, changed in (("no_edges", 0 * adjacency), ("unit_edges", (adjacency != 0).float())):
        found = fused(network, *graph(changed))
        met(found, f"image_features_{name}")
        assert (found - published).abs().max() > 10 * TOLERANCE


# ------------------------------------------------------------------ what is wrong with it


def test_all_images_of_a_batch_get_one_graph_vector_that_changes_with_the_batch(network):
    published = network.encode_graph(*graph())
    assert torch.equal(published, published[:1].expand(8, -1))
    assert len({matrix.numpy().tobytes() for matrix in output("degree")}) > 1  # though they differ
    pair, together = fused(network, *graph(), images=2), fused(network, *graph())
    assert (pair - together[:2]).abs().max() > 100 * TOLERANCE


# ------------------------------------------------------------------ from files, in scripts


def test_matrices_of_an_image_set_are_those_of_its_files(tmp_path):
    files = [PUBLISHED / f"det_{i}.json" for i in range(8)]
    image = ROOT / "test" / "sample_1.png"
    with pytest.warns(UserWarning, match="unknown label"):
        images = ImageSet(
            [image] * 8,
            files,
            image_size=8,
            label_map=LabelMap(PUBLISHED_LABELS),
            max_objects=20,
            published=True,
        )
    for i, file in enumerate(files):
        item, (adjacency, degree) = images[i], build_matrices(file)
        assert np.array_equal(item["adjacency"], adjacency.astype(np.float32))
        assert np.array_equal(item["nodes"], degree.astype(np.float32))
        np.testing.assert_allclose(item["adjacency"], OUTPUTS["adjacency"][i], rtol=1e-6)
        np.testing.assert_allclose(item["nodes"], OUTPUTS["degree"][i], rtol=1e-6)
        assert item["mask"].all() and len(item["mask"]) == 20
    labels = [d["label"] for file in files for d in load_detections(file)]
    assert images.dropped == sum(label not in PUBLISHED_LABELS for label in labels) > 0


def test_hand_computed_matrices_of_arrays():
    class_ids = np.array([0, 3, 1, 0])  # two planes, one of a label that is not published, a car
    boxes = np.array(
        [[0, 0, 2, 3, 0, 0.5], [9, 9, 9, 9, 0, 1], [3, 4, 1, 1, 0, 1], [0, 0, 1, 1, 0, 1.0]]
    )
    nodes, adjacency, mask, dropped = published_arrays(class_ids, boxes)
    assert (nodes[0, 0], nodes[1, 1], nodes.sum()) == (4, 1, 5)
    assert adjacency[0, 1] == pytest.approx(2 / 5) and adjacency[1, 0] == adjacency[0, 1]
    assert np.count_nonzero(adjacency) == 2 and mask.all() and dropped == 0
    assert published_arrays(class_ids[:0], boxes[:0]).nodes.sum() == 0


@pytest.fixture
def readable(tmp_path, monkeypatch):
    """A published checkpoint whose vocabulary is CLIP's, so that it can read any sentence."""
    known = model_config()
    known["text"]["vocab_size"] = 49408
    (tmp_path / "known.json").write_text(json.dumps(known), encoding="utf-8")
    monkeypatch.setattr(model_configs, "MODELS", tmp_path)
    weights = torch.load(PUBLISHED / "state_dict.pt", weights_only=True)
    torch.manual_seed(0)
    weights["token_embedding.weight"] = torch.randn(49408, 64)
    torch.save(weights, tmp_path / "best_model.pth")
    return tmp_path / "best_model.pth"


@pytest.mark.filterwarnings("ignore:unknown label")
def test_every_script_takes_a_published_checkpoint(readable, mini, capsys):
    device = ["--device", "cpu"]
    checkpoint = ["--checkpoint", str(readable), *device]
    [found] = evaluate.main([*checkpoint, "--dataset", "mini", "--data-root", str(mini)])
    assert 0 < found["mR"] < 100 and found["training_options"]["graph"] == "published"
    assert integration.BATCHES in capsys.readouterr().err
    assert infer.main(checkpoint).shape == (5, 5)
    assert integration.main(checkpoint) == 1
    printed = capsys.readouterr().out
    assert "FAILED no dependence on batch mates" in printed


@pytest.mark.filterwarnings("ignore:unknown label")
def test_models_of_other_graphs_do_not_share_images(readable, mini, run, tmp_path, capsys):
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join(PUBLISHED_LABELS), encoding="utf-8")
    ours = run("--labels", str(labels), "--image-size", "64") / "best_model.pth"
    data = ["--dataset", "mini", "--data-root", str(mini), "--device", "cpu"]
    alone = [evaluate.main(["--checkpoint", str(path), *data])[0] for path in (ours, readable)]
    both = evaluate.main(["--checkpoint", str(ours), str(readable), *data])
    back = evaluate.main(["--checkpoint", str(readable), str(ours), *data])[::-1]
    for found in (both, back):
        assert [result["mR"] for result in found] == [result["mR"] for result in alone]
    assert "objects of other labels dropped" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:unknown label")
def test_the_published_model_trains(run):
    network, saved = load_checkpoint(run("--graph", "published") / "best_model.pth")
    assert isinstance(network, model.PublishedFGCross) and saved["labels"] == [*PUBLISHED_LABELS]
    assert saved["options"]["graph"] == "published"
