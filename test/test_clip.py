"""clip.load: what it returns, which activation it takes, and what it refuses."""

import json
import shlex
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image

import clip
import model
from backbones import model_configs
from backbones.towers import CLIP
from clips import (
    TOLERANCE,
    VIT,
    largest_difference,
    open_clip_config,
    open_clip_model,
    same_tensors,
)
from conftest import ROOT, save_archive

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.fixture
def plain(models):
    """The path of a state dict, which does not tell its activation."""
    torch.save(CLIP(VIT).state_dict(), models / "plain.pt")
    return models / "plain.pt"


def test_it_returns_the_model_and_its_preprocessing(plain, device):
    network, preprocess = clip.load(str(plain), device, activation="gelu")
    assert not network.training and next(network.parameters()).device.type == device.type
    assert network.model_config == {"name": "vit", **VIT, "activation": "gelu"}
    assert preprocess(Image.new("RGB", (70, 50))).shape == (3, 48, 48)
    with pytest.raises(ValueError, match="activation 'relu': expected one of quickgelu, gelu"):
        clip.load(plain, activation="relu")


def test_names_are_told_from_paths():
    assert {"ViT-B/32", "ViT-L/14@336px", "RN50"} <= set(clip.available_models())
    assert clip.is_clip_source("ViT-B/32") and clip.is_clip_source("hf-hub:a/b")
    assert not clip.is_clip_source(Path("models/ViT-B-32.pt"))
    assert not clip.is_clip_source("models/ViT-B-32.pt") and not clip.is_clip_source("ViT-B-32")


@pytest.mark.parametrize("image_size", [16, 64, 224])
def test_another_image_size_gives_what_open_clip_gives(models, capsys, image_size):
    path = models / "weights.pt"
    torch.save(open_clip_model(VIT).state_dict(), path)
    config = open_clip_config({**VIT, "image_size": image_size}, "quickgelu")
    theirs = open_clip.model.CLIP(**config).eval()
    open_clip.load_checkpoint(theirs, path)
    ours, preprocess = clip.load(path, activation="quickgelu", image_size=image_size)
    assert ours.model_config["image_size"] == image_size
    assert preprocess(Image.new("RGB", (70, 50))).shape == (3, image_size, image_size)
    assert largest_difference(ours, theirs, image_size) <= TOLERANCE


# ------------------------------------------------------------------ the activation


def test_an_activation_that_contradicts_the_source_is_refused(models, tmp_path):
    save_archive(CLIP(VIT), 48, models / "ViT-B-32.pt")
    torch.save(CLIP(VIT).state_dict(), models / "RN50.pt")
    torch.save(CLIP(VIT).state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    config = {"model_cfg": open_clip_config(VIT, "gelu")}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    for source, told, wrong in (
        (models / "ViT-B-32.pt", "quickgelu", "gelu"),
        ("ViT-B/32", "quickgelu", "gelu"),
        ("RN50", "quickgelu", "gelu"),
        (tmp_path, "gelu", "quickgelu"),
    ):
        with pytest.raises(ValueError, match=f": its activation is {told}, not {wrong}"):
            clip.load(source, activation=wrong)
        assert clip.load(source, activation=told)[0].model_config["activation"] == told


# ------------------------------------------------------------------ checkpoints of FG-CROSS


def refused_checkpoint(path):
    """The CLIP that comes of following the error for an FG-CROSS checkpoint."""
    with pytest.raises(ValueError, match="an FG-CROSS checkpoint, no plain CLIP") as error:
        clip.load(path, activation="quickgelu")
    assert str(error.value).startswith(f"{path}: ")
    command = shlex.split(str(error.value).split("`")[1])
    assert command[:2] == ["python", "clip.py"]
    out = path.with_name("plain file.pt")
    clip.main([str(out) if part == "FILE" else part for part in command[2:]])
    return clip.load(out, activation="quickgelu")[0].state_dict()


def test_a_checkpoint_of_ours_is_refused_with_the_way_to_its_clip(save_tiny, models):
    path = save_tiny("it is a.pth")
    network, content = model.load_checkpoint(path)
    (models / "tiny.json").write_text(json.dumps(content["definition"]))
    assert same_tensors(refused_checkpoint(path), network.state_dict())


def test_a_published_checkpoint_is_refused_with_the_way_to_its_clip(tmp_path, models):
    fixtures = ROOT / "test" / "fixtures" / "published"
    state = torch.load(fixtures / "state_dict.pt", weights_only=True)
    plain = {name: t for name, t in state.items() if name.split(".")[0] not in model.NEW_LAYERS}
    sizes = model_configs.sizes_of(plain)
    for tower in ("vision", "text"):
        sizes[tower]["heads"] = 1
    (models / "published.json").write_text(json.dumps(sizes))
    torch.save(state, tmp_path / "best_model.pth")
    assert refused_checkpoint(tmp_path / "best_model.pth").keys() == plain.keys()
