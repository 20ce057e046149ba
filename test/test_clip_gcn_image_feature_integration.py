"""The one encoder: its features depend on nothing but their image or text; promises checked."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import clip
import clip_gcn_image_feature_integration as integration
import model
from clip_gcn_image_feature_integration import (
    SAMPLES,
    SCENES,
    encode_images,
    encode_texts,
    load_images,
)
from conftest import ROOT, box, write_detections, write_image
from model import load_checkpoint

NAMES = [f"sample_{i}.png" for i in range(1, 6)]
BATCH_MATES = "no dependence on batch mates"
OWN_GRAPH = "own graph: another image's changes the embedding"
BARE = "without objects, exactly CLIP's embedding"


@pytest.fixture
def checkpoint(save_tiny):
    """Path of a tiny model's checkpoint, its options those of train.py."""
    return save_tiny("tiny.pth")


@pytest.fixture
def samples(checkpoint):
    """The sample images with their graphs, one of them without."""
    paths = [SAMPLES / name for name in NAMES]
    found = load_images(paths, NAMES, ROOT / "det_json", load_checkpoint(checkpoint)[1])
    class_ids, boxes = found.boxes[1]
    found.boxes[1] = class_ids[:0], boxes[:0]
    return found


# ------------------------------------------------------------------ encoding


@pytest.mark.parametrize("fusion", [0.5, "gate"])
def test_batch_size_changes_no_image(tiny_model, samples, device, fusion):
    network = tiny_model(fusion=fusion).to(device).train()
    whole = encode_images(network, samples, device)
    assert set(whole) == {"clip", "graph", "fused"}
    assert not network.training and not whole["fused"].requires_grad
    for size in (1, 2, 3):
        parts = encode_images(network, samples, device, batch_size=size)
        for name, values in whole.items():
            assert values.shape == (5, 32) and values.device.type == "cpu"
            scale = max(1.0, values.norm(dim=-1).max().item())
            tolerance = (1e-6 if device.type == "cpu" else 1e-4) * scale
            assert (parts[name] - values).abs().max() <= tolerance
    assert (whole["fused"].norm(dim=-1) - 1).abs().max() <= 1e-6


def test_each_distinct_text_is_encoded_once_and_comes_back_in_its_place(
    tiny_model, device, monkeypatch
):
    network, rows, widths = tiny_model().to(device).train(), [], []
    encode = network.encode_text

    def counted(tokens):
        rows.extend(tuple(row) for row in tokens.tolist())
        widths.append(tokens.shape[1])
        return encode(tokens)

    monkeypatch.setattr(network, "encode_text", counted)
    texts = ["snow", "a ship", "a plane on grass", "A Ship", "a ship ", "snow"] * 3
    found = encode_texts(network, texts, device, batch_size=1)
    assert len(rows) == len(set(rows)) == 3
    assert widths == [3, 4, 6]  # by length, not by the first tokens
    assert found.shape == (18, 32) and found.device.type == "cpu"
    assert not network.training and not found.requires_grad
    for same in (3, 4, 7):  # the same tokens
        assert torch.equal(found[1], found[same])
    for text, feature in zip(texts, found, strict=True):
        with torch.no_grad():
            expected = F.normalize(encode(clip.tokenize(text).to(device)), dim=-1)[0]
        torch.testing.assert_close(feature, expected.cpu(), rtol=0, atol=1e-5)


def test_device_option(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert integration.pick_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert integration.pick_device("auto") == torch.device("cuda")


# ------------------------------------------------------------------ promises


@pytest.fixture
def promises(capsys, device):
    """Runs the script on a checkpoint: (exit status, the promises kept, those broken)."""

    def run(checkpoint, *arguments):
        fixed = ["--checkpoint", str(checkpoint), "--device", str(device)]
        status = integration.main([*fixed, *arguments])
        out, err = capsys.readouterr()
        assert SCENES not in err  # the samples are scenes
        lines = {mark: [] for mark in ("ok    ", "FAILED")}
        for line in out.splitlines():
            if line[:6] in lines:
                lines[line[:6]].append(line[7:].split(" (")[0])
        return status, *lines.values()

    return run


def test_a_sound_model_keeps_all_promises(checkpoint, promises):
    assert promises(checkpoint) == (0, [BATCH_MATES, OWN_GRAPH, BARE], [])


def test_a_model_without_graph_has_one_promise(save_tiny, plain_clip, promises):
    for path in (save_tiny("none.pth", "--graph", "none"), plain_clip):
        assert promises(path) == (0, [BATCH_MATES], [])


def test_the_published_pooling_breaks_two_promises(checkpoint, monkeypatch, promises):
    def batch_mean(self, nodes, adjacency, mask):
        """The mean over all nodes of the whole batch."""
        x = self.node_projection(nodes)
        for layer in (self.gcn1, self.gcn2, self.gcn3):
            x = F.relu(layer(x, adjacency, mask))
        return self.mlp(x.mean(dim=(0, 1))).expand(len(nodes), -1)

    monkeypatch.setattr(model.FGCross, "encode_graph", batch_mean)
    assert promises(checkpoint) == (1, [BARE], [BATCH_MATES, OWN_GRAPH])


def test_a_vector_for_images_without_objects_breaks_a_promise(checkpoint, monkeypatch, promises):
    fuse = model.FGCross.fuse

    def fuse_all(self, image, graph, mask):
        return fuse(self, image, graph, torch.ones_like(mask))

    monkeypatch.setattr(model.FGCross, "fuse", fuse_all)
    assert promises(checkpoint) == (1, [BATCH_MATES, OWN_GRAPH], [BARE])


def test_a_dependence_beyond_the_devices_tolerance_breaks_a_promise(
    checkpoint, samples, device, monkeypatch
):
    network = load_checkpoint(checkpoint, device)[0]
    before = encode_images(network, samples, device)["fused"]
    branches, allowed = network.branches, integration.TOLERANCE[device.type]
    for shift, kept in ((0, True), (2 * allowed, False)):

        def shifted(features, *graph, shift=shift):
            *parts, fused = branches(features, *graph)
            return *parts, fused + shift * (len(features) == 1)

        monkeypatch.setattr(network, "branches", shifted)
        assert integration.verify(network, samples, device)[0].kept is kept
    assert torch.equal(encode_images(network, samples, device)["fused"], before)  # left as it was


def test_features_are_exported(checkpoint, tmp_path):
    out = tmp_path / "new" / "features.npz"
    integration.main(["--checkpoint", str(checkpoint), "--device", "cpu", "--out", str(out)])
    network, saved = load_checkpoint(checkpoint)
    images = load_images([SAMPLES / name for name in NAMES], NAMES, ROOT / "det_json", saved)
    expected = encode_images(network, images, "cpu")
    with np.load(out) as found:
        assert found["names"].tolist() == NAMES
        for name in ("clip", "graph", "fused"):
            assert np.array_equal(found[name], expected[name].numpy())


def test_detections_that_are_none_or_nonsense_are_a_warning(tmp_path, checkpoint, capsys):
    _, saved = load_checkpoint(checkpoint)
    image = write_image(tmp_path / "a.png")

    def warning():
        load_images([image], ["a.png"], tmp_path / "det_json", saved)
        return capsys.readouterr().err

    write_detections(tmp_path / "det_json" / "other.json", [box(9, 9)])
    assert warning().startswith(
        f"warning: {tmp_path / 'det_json'}: none of 1 images has a detection file there; looked "
        "for a.json; the folder holds other.json; "
    )
    write_detections(tmp_path / "det_json" / "a.json", [box(99, 9)])
    assert warning().startswith("warning: outside: 1 of 1 boxes lie mostly outside their image")
    write_detections(tmp_path / "det_json" / "a.json", [box(9, 9)])
    assert warning() == ""
