"""clip.load against the libraries that the weights are from."""

import json
import shlex
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.model import CLIP as OpenClip
from open_clip.model import CustomTextCLIP
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPConfig, CLIPModel

import clip
import model
from backbones import loading, model_configs
from backbones.model_configs import read_model_config, sizes_of
from backbones.towers import CLIP
from conftest import ROOT, save_archive
from test_towers import (
    RESNET,
    TOLERANCE,
    VIT,
    heads,
    inputs,
    largest_difference,
    randomise,
    seeded_and_in_full_precision,  # noqa: F401  a fixture, for every test here too
    shapes,
)

MODEL_CONFIGS = {"vit": VIT, "resnet": RESNET}
GELU = pytest.mark.parametrize("activation", ["quickgelu", "gelu"])


@pytest.fixture
def definitions(tmp_path, monkeypatch):
    """Two definitions of their own as models/; returns that folder."""
    folder = tmp_path / "models"
    folder.mkdir()
    for name, model_config in MODEL_CONFIGS.items():
        (folder / f"{name}.json").write_text(json.dumps(model_config))
    monkeypatch.setattr(model_configs, "MODELS", folder)
    monkeypatch.setattr(clip, "MODELS", folder)
    return folder


def open_clip_config(model_config, activation):
    """A definition as open_clip's configuration, the width of heads from their number."""
    vision = {"image_size": model_config["image_size"], **model_config["vision"]}
    channels = vision["width"] * (32 if isinstance(vision["layers"], list) else 1)
    vision["head_width"] = channels // vision.pop("heads")
    return {
        "embed_dim": model_config["embed_dim"],
        "quick_gelu": activation == "quickgelu",
        "vision_cfg": vision,
        "text_cfg": dict(model_config["text"]),
    }


def open_clip_model(name, activation="quickgelu", kind=OpenClip):
    return randomise(kind(**open_clip_config(MODEL_CONFIGS[name], activation)))


class HuggingFace(nn.Module):
    """transformers' CLIPModel with the methods of a CLIP."""

    def __init__(self, network):
        super().__init__()
        self.network = network.eval()

    def encode_image(self, pixels):
        found = self.network.get_image_features(pixel_values=pixels)
        return getattr(found, "pooler_output", found)  # a tensor before version 5

    def encode_text(self, tokens):
        found = self.network.get_text_features(input_ids=tokens)
        return getattr(found, "pooler_output", found)


def hugging_face_model(model_config, activation="quickgelu"):
    """A CLIPModel of its own random weights, far from where they start."""
    names = {"quickgelu": "quick_gelu", "gelu": "gelu"}
    config = {}
    for tower in ("vision", "text"):
        width = model_config[tower]["width"]
        config[f"{tower}_config"] = {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": model_config[tower]["layers"],
            "num_attention_heads": model_config[tower]["heads"],
            "hidden_act": names[activation],
        }
    config["vision_config"]["image_size"] = model_config["image_size"]
    config["vision_config"]["patch_size"] = model_config["vision"]["patch_size"]
    network = randomise(CLIPModel(CLIPConfig(projection_dim=model_config["embed_dim"], **config)))
    for parameter in network.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return HuggingFace(network)


def parity(theirs, path, name="vit", **options):
    """Load a file and compare the features; returns what was loaded."""
    ours, _ = clip.load(path, **options)
    size = MODEL_CONFIGS[name]["image_size"]
    assert ours.model_config["name"] == name
    assert max(largest_difference(ours, theirs, size)) <= TOLERANCE
    return ours


# ------------------------------------------------------------------ each naming and file


@GELU
@pytest.mark.parametrize("name", MODEL_CONFIGS)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_open_clips_state_dicts_load(definitions, device, name, activation, suffix):
    theirs = open_clip_model(name, activation)
    path = definitions / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(theirs.state_dict(), path)
    ours, preprocess = clip.load(str(path), device, activation=activation)
    assert not ours.training and next(ours.parameters()).device.type == device.type
    model_config = MODEL_CONFIGS[name]
    assert ours.model_config == {"name": name, **model_config, "activation": activation}
    assert heads(ours) == heads(theirs)
    size = model_config["image_size"]
    assert preprocess(Image.new("RGB", (70, 50))).shape == (3, size, size)
    assert max(largest_difference(ours, theirs, size, device)) <= TOLERANCE


@pytest.mark.parametrize("name", MODEL_CONFIGS)
def test_open_clips_training_checkpoints_load(definitions, name):
    theirs = open_clip_model(name)
    optimizer = torch.optim.AdamW(theirs.parameters())
    theirs.encode_text(clip.tokenize("a ship")).sum().backward()
    optimizer.step()
    content = {"epoch": 3, "name": "run", "optimizer": optimizer.state_dict()}
    state = {f"module.{key}": tensor for key, tensor in theirs.state_dict().items()}
    torch.save({**content, "state_dict": state}, definitions / "epoch_3.pt")
    parity(theirs, definitions / "epoch_3.pt", name, activation="quickgelu")


@GELU
def test_open_clips_custom_text_models_load(definitions, activation):
    theirs = open_clip_model("vit", activation, CustomTextCLIP)
    assert "text.token_embedding.weight" in theirs.state_dict()
    torch.save(theirs.state_dict(), definitions / "custom.pt")
    parity(theirs, definitions / "custom.pt", activation=activation)


@GELU
@pytest.mark.parametrize("file", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
def test_open_clips_folders_load_and_tell_the_activation(definitions, tmp_path, activation, file):
    theirs, folder = open_clip_model("vit", activation), tmp_path / "folder"
    folder.mkdir()
    (save_file if file.endswith(".safetensors") else torch.save)(theirs.state_dict(), folder / file)
    config = {"model_cfg": open_clip_config(VIT, activation), "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    for path in (folder, folder / file):
        assert parity(theirs, path).model_config["activation"] == activation


@GELU
@pytest.mark.parametrize("way", ["folder", "file", "bin"])
def test_hugging_faces_models_load_and_tell_the_activation(definitions, tmp_path, activation, way):
    theirs, folder = hugging_face_model(VIT, activation), tmp_path / "saved"
    theirs.network.save_pretrained(folder)
    if way == "bin":
        (folder / "model.safetensors").unlink()
        state = theirs.network.state_dict()
        for tower in ("vision", "text"):  # as older versions wrote them
            state[f"{tower}_model.embeddings.position_ids"] = torch.arange(3)[None]
        torch.save(state, folder / "pytorch_model.bin")
    ours = parity(theirs, folder / "model.safetensors" if way == "file" else folder)
    assert ours.model_config["activation"] == activation


def test_a_hugging_face_file_alone_needs_the_activation(definitions):
    theirs = hugging_face_model(VIT)
    torch.save(theirs.network.state_dict(), definitions / "weights.bin")
    with pytest.raises(ValueError, match=r"weights\.bin: nothing in it tells the activation"):
        clip.load(definitions / "weights.bin")
    parity(theirs, definitions / "weights.bin", activation="quickgelu")


class Archive(CLIP):
    """With the sizes that OpenAI's archives hold beside the weights."""

    def __init__(self, model_config):
        super().__init__(model_config)
        text = model_config["text"]
        sizes = model_config["image_size"], text["context_length"], text["vocab_size"]
        for name, size in zip(
            ("input_resolution", "context_length", "vocab_size"), sizes, strict=True
        ):
            self.register_buffer(name, torch.tensor(size))


@GELU
@pytest.mark.parametrize("name", MODEL_CONFIGS)
@pytest.mark.filterwarnings("error")
def test_torchscript_archives_load_and_tell_the_activation(definitions, name, activation):
    model_config = {**MODEL_CONFIGS[name], "activation": activation}
    theirs, path = randomise(Archive(model_config)), definitions / "archive.pt"
    save_archive(theirs, model_config["image_size"], path)
    ours = parity(theirs, path, name)
    assert ours.model_config["activation"] == activation
    assert shapes(ours) == shapes(CLIP(model_config))


def test_half_precision_becomes_fp32(definitions):
    path, state = definitions / "half.pt", randomise(CLIP(VIT)).half().state_dict()
    torch.save(state, path)
    ours, _ = clip.load(path, activation="gelu")
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    assert all(torch.equal(t, state[name].float()) for name, t in ours.state_dict().items())


@pytest.mark.parametrize("name", clip.available_models())
def test_openais_names_are_looked_for_in_models_and_tell_the_activation(definitions, name):
    path = definitions / (name.replace("/", "-").replace("@", "-") + ".pt")
    torch.save(CLIP(VIT).state_dict(), path)
    found = clip.load(name)[0].model_config
    assert found == {"name": "vit", **VIT, "activation": "quickgelu"}


def test_openais_names_are_downloaded_where_there_is_no_file(definitions, tmp_path, monkeypatch):
    def download(url, digest, path):
        path.parent.mkdir(parents=True)
        save_archive(CLIP(VIT), 48, path)
        asked.append((url, digest))

    asked = []
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.setattr(loading, "_download", download)
    assert clip.load("RN50")[0].model_config["name"] == "vit"
    digest = loading.OPENAI["RN50"]
    assert asked == [(f"{loading.OPENAI_URL}/{digest}/RN50.pt", digest)]


def test_the_hubs_names_are_asked_for_there(definitions, monkeypatch):
    torch.save(CLIP(VIT).state_dict(), definitions / "clip.pt")
    monkeypatch.setattr(clip, "find_hub", {"hf-hub:a/b@v1:clip.pt": definitions / "clip.pt"}.get)
    assert clip.load("hf-hub:a/b@v1:clip.pt", activation="gelu")[0].model_config["name"] == "vit"


def test_names_are_told_from_paths():
    assert clip.is_clip_source("ViT-B/32") and clip.is_clip_source("hf-hub:a/b")
    assert not clip.is_clip_source(Path("models/ViT-B-32.pt"))
    assert not clip.is_clip_source("models/ViT-B-32.pt") and not clip.is_clip_source("ViT-B-32")


def test_available_models_have_definitions():
    names = {n.replace("/", "-").replace("@336px", "-336") for n in clip.available_models()}
    assert {"ViT-B-32", "ViT-L-14-336", "RN50"} <= names <= set(model_configs.model_config_names())


# ------------------------------------------------------------------ the activation


def test_the_wrong_activation_costs_more_than_any_rounding():
    """In towers as deep as ViT-B's, most hidden units off, as in trained ones."""
    model_config = {
        "embed_dim": 64,
        "image_size": 64,
        "vision": {"patch_size": 16, "width": 128, "layers": 12, "heads": 2},
        "text": {**VIT["text"], "width": 64, "layers": 12, "heads": 1},
    }
    right, wrong = (
        randomise(CLIP(model_config)),
        CLIP({**model_config, "activation": "gelu"}).eval(),
    )
    for name, parameter in right.named_parameters():
        if name.endswith("c_fc.bias"):
            nn.init.normal_(parameter, -1.5, 0.5)
        elif parameter.ndim == 2 and "resblocks" in name:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    wrong.load_state_dict(right.state_dict())
    for method, values in zip(("encode_image", "encode_text"), inputs(64), strict=True):
        with torch.no_grad():
            a, b = (F.normalize(getattr(n, method)(values), dim=-1) for n in (right, wrong))
        cosines = (a * b).sum(-1)
        assert 0.99 < cosines.min() and cosines.max() < 0.9999  # measured: 0.9996 to 0.9998
        assert (a - b).abs().max() > 300 * TOLERANCE


@pytest.mark.parametrize("file", ["plain.pt", "plain.safetensors"])
def test_weights_that_do_not_tell_the_activation_need_it(definitions, file):
    save = save_file if file.endswith(".safetensors") else torch.save
    save(CLIP(VIT).state_dict(), definitions / file)
    with pytest.raises(ValueError) as error:
        clip.load(definitions / file)
    for part in (file, "nothing in it tells", "RemoteCLIP", "LAION", "--activation quickgelu|gelu"):
        assert part in str(error.value)


def test_an_activation_that_contradicts_the_source_is_refused(definitions):
    save_archive(CLIP(VIT), 48, definitions / "ViT-B-32.pt")
    for source in (definitions / "ViT-B-32.pt", "ViT-B/32"):
        with pytest.raises(
            ValueError, match=r"ViT-B-32\.pt: its activation is quickgelu, not gelu"
        ):
            clip.load(source, activation="gelu")
        assert (
            clip.load(source, activation="quickgelu")[0].model_config["activation"] == "quickgelu"
        )


def test_an_unknown_activation_is_refused(definitions):
    torch.save(CLIP(VIT).state_dict(), definitions / "plain.pt")
    with pytest.raises(ValueError, match="activation 'relu': expected one of quickgelu, gelu"):
        clip.load(definitions / "plain.pt", activation="relu")


# ------------------------------------------------------------------ what does not fit


def test_sizes_that_no_definition_has_are_refused_and_listed(definitions):
    state = CLIP(VIT).state_dict()
    state["positional_embedding"] = torch.zeros(50, 48)
    path = definitions / "other.pt"
    torch.save(state, path)
    with pytest.raises(ValueError) as error:
        clip.load(path, activation="gelu")
    for part in (str(path), "resnet, vit", "'context_length': 50", "'patch_size': 16"):
        assert part in str(error.value)


def test_sizes_that_fit_two_definitions_are_refused_and_both_named(definitions):
    twin = {**VIT, "vision": {**VIT["vision"], "heads": 4}}  # no shape tells the heads
    (definitions / "twin.json").write_text(json.dumps(twin))
    path = definitions / "weights.pt"
    torch.save(CLIP(VIT).state_dict(), path)
    with pytest.raises(ValueError, match="vit, twin alike") as error:
        clip.load(path, activation="gelu")
    assert str(path) in str(error.value) and "resnet" not in str(error.value)


def test_missing_and_unexpected_names_and_shapes_are_all_listed(definitions):
    state, path = CLIP(VIT).state_dict(), definitions / "other.pt"
    missing = ("logit_scale", "visual.transformer.resblocks.1.ln_1.bias", "ln_final.weight")
    for name in missing:
        del state[name]
    state |= {"visual.extra": torch.zeros(1), "visual.ln_pre.bias": torch.zeros(7)}
    torch.save(state, path)
    with pytest.raises(ValueError) as error:
        clip.load(path, activation="gelu")
    message = str(error.value)
    assert str(path) in message
    assert all(f"{name}" in message.split("missing: ")[1].split(";")[0] for name in missing)
    assert "unexpected: visual.extra;" in message
    assert "visual.ln_pre.bias (7,) instead of (128,)" in message


@pytest.mark.parametrize("naming", ["open_clip", "hugging_face"])
def test_a_configuration_of_other_heads_is_refused(definitions, tmp_path, naming):
    other = {**VIT, "vision": {**VIT["vision"], "heads": 4}}
    if naming == "open_clip":
        torch.save(CLIP(VIT).state_dict(), tmp_path / "open_clip_pytorch_model.bin")
        config = {"model_cfg": open_clip_config(other, "gelu")}
        (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    else:
        hugging_face_model(other).network.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"config\.json: vision .*'heads': 4.*instead of.*2"):
        clip.load(tmp_path)


def refused_checkpoint(path, *options):
    """The CLIP that comes of following the error for an FG-CROSS checkpoint."""
    with pytest.raises(ValueError, match="an FG-CROSS checkpoint, no plain CLIP") as error:
        clip.load(path, activation="quickgelu")
    assert str(error.value).startswith(f"{path}: ")
    command = shlex.split(str(error.value).split("`")[1])
    assert command[:2] == ["python", "clip.py"]
    out = path.with_name("plain file.pt")
    clip.main([str(out) if part == "FILE" else part for part in command[2:]])
    return clip.load(out, activation="quickgelu")[0]


def test_a_checkpoint_of_ours_is_refused_with_the_way_to_its_clip(save_tiny, monkeypatch):
    path = save_tiny("it is a.pth")
    network, content = model.load_checkpoint(path)
    monkeypatch.setattr(model_configs, "model_config_names", lambda: ["tiny"])
    monkeypatch.setattr(model_configs, "read_model_config", lambda name: content["definition"])
    state = refused_checkpoint(path).state_dict()
    assert all(torch.equal(tensor, network.state_dict()[key]) for key, tensor in state.items())


def test_a_published_checkpoint_is_refused_with_the_way_to_its_clip(tmp_path, definitions):
    fixtures = ROOT / "test" / "fixtures" / "published"
    state = torch.load(fixtures / "state_dict.pt", weights_only=True)
    plain = {name: t for name, t in state.items() if name.split(".")[0] not in model.NEW_LAYERS}
    sizes = sizes_of(plain)
    for tower in ("vision", "text"):
        sizes[tower]["heads"] = 1
    (definitions / "published.json").write_text(json.dumps(sizes))
    torch.save(state, tmp_path / "best_model.pth")
    found = refused_checkpoint(tmp_path / "best_model.pth").state_dict()
    assert found.keys() == plain.keys()


@pytest.mark.parametrize("name", ["visual.conv1.weight", "positional_embedding"])
def test_malformed_weights_are_refused_with_file_and_name(definitions, name):
    path = definitions / "other.pt"
    torch.save({**CLIP(VIT).state_dict(), name: torch.tensor(1.0)}, path)
    with pytest.raises(ValueError, match=rf"other\.pt: no CLIP, {name} has the shape"):
        clip.load(path, activation="gelu")


def test_the_file_that_was_read_is_told(definitions, tmp_path, monkeypatch):
    torch.save(CLIP(VIT).state_dict(), definitions / "ViT-B-32.pt")
    hugging_face_model(VIT).network.save_pretrained(tmp_path / "folder")
    monkeypatch.setattr(clip, "find_hub", lambda spec: definitions / "ViT-B-32.pt")
    for name, path in (
        ("ViT-B/32", definitions / "ViT-B-32.pt"),
        ("hf-hub:a/b", definitions / "ViT-B-32.pt"),
        (str(definitions / "ViT-B-32.pt"), definitions / "ViT-B-32.pt"),
        (tmp_path / "folder", tmp_path / "folder" / "model.safetensors"),
    ):
        network, _ = clip.load(name, activation="quickgelu")
        assert network.path == path


def test_a_configuration_beside_another_file_leaves_the_activation_open(definitions, tmp_path):
    torch.save(CLIP(VIT).state_dict(), tmp_path / "RemoteCLIP.pt")
    config = {"model_cfg": open_clip_config(VIT, "gelu")}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"RemoteCLIP\.pt: nothing in it tells the activation"):
        clip.load(tmp_path / "RemoteCLIP.pt")
    network, _ = clip.load(tmp_path / "RemoteCLIP.pt", activation="quickgelu")
    assert network.model_config["activation"] == "quickgelu"


def test_a_contradiction_names_the_configuration(definitions, tmp_path):
    torch.save(CLIP(VIT).state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    config = {"model_cfg": open_clip_config(VIT, "gelu")}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError,
        match=r"model\.bin: its activation is gelu by .*open_clip_config\.json, not quickgelu",
    ):
        clip.load(tmp_path, activation="quickgelu")


# ------------------------------------------------------------------ full size


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-L-14", "RN50"])
def test_full_size_weights_of_open_clip_load(tmp_path, name):
    theirs = randomise(open_clip.create_model(f"{name}-quickgelu", pretrained=None))
    assert differences_of_full_size(theirs, theirs, tmp_path, name) <= TOLERANCE


@pytest.mark.slow
def test_full_size_weights_of_hugging_face_load(tmp_path):
    theirs = hugging_face_model(read_model_config("ViT-B-32"))
    assert differences_of_full_size(theirs, theirs.network, tmp_path, "ViT-B-32") <= TOLERANCE


def differences_of_full_size(theirs, saved, folder, name):
    """The largest difference of unit features, of a library's CLIP and what loads from its file."""
    torch.save(saved.state_dict(), folder / "weights.pt")
    ours, _ = clip.load(folder / "weights.pt", activation="quickgelu")
    assert ours.model_config["name"] == name
    return max(largest_difference(ours, theirs, 224))
