"""CLIP's towers and preprocessing against open_clip, and loading of weights."""

import json
import re

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.model import CLIP as Reference
from open_clip.transform import image_transform
from PIL import Image
from torch import nn

import clip
import model
from model import read_definition
from towers import CLIP

TOLERANCE = 1e-5  # of unit features in fp32
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 48, "layers": 3, "heads": 3}
VIT = {
    "embed_dim": 24,
    "image_size": 48,
    "vision": {"patch_size": 16, "width": 128, "layers": 3, "heads": 2},
    "text": TEXT,
}
RESNET = {
    "embed_dim": 24,
    "image_size": 96,
    "vision": {"width": 16, "layers": [2, 1, 2, 1], "heads": 8},
    "text": TEXT,
}
SENTENCES = [
    "six storage tanks",
    "",
    "There are two tennis courts and a baseball field on grey pavement .",
    "many words " * 50,
]


@pytest.fixture(autouse=True)
def seeded_and_in_full_precision(monkeypatch):
    """The same weights each time, and convolutions in fp32 on CUDA, too, where TF32 is default."""
    torch.manual_seed(0)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def randomise(network):
    """Move every vector and every BatchNorm statistic away from where it starts."""
    for name, parameter in network.named_parameters():
        if parameter.ndim < 2 and name != "logit_scale":
            nn.init.normal_(parameter, 1.0 if name.endswith("weight") else 0.0, 0.1)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):  # torch's default lets the signal die away in a ResNet
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return network.eval()


def reference(definition):
    """open_clip's CLIP of the same sizes, its head width derived from our number of heads."""
    vision, text = definition["vision"], definition["text"]
    channels = vision["width"] * (32 if isinstance(vision["layers"], list) else 1)
    vision_cfg = {
        "image_size": definition["image_size"],
        "head_width": channels // vision["heads"],
        **{name: value for name, value in vision.items() if name != "heads"},
    }
    return Reference(definition["embed_dim"], vision_cfg, text, quick_gelu=True)


def inputs(image_size, device="cpu", images=3):
    generator = torch.Generator().manual_seed(1)
    patches = torch.randn(images, 3, 4, 4, generator=generator)
    noise = torch.randn(images, 3, image_size, image_size, generator=generator)
    pixels = F.interpolate(patches, image_size) + 0.3 * noise
    return pixels.to(device), clip.tokenize(SENTENCES).to(device)


@torch.no_grad()
def largest_difference(ours, theirs, image_size, device="cpu"):
    """Largest absolute difference of unit image and text features, as a pair."""
    pixels, tokens = inputs(image_size, device)
    ours, theirs = ours.to(device), theirs.to(device)
    pairs = (
        (ours.encode_image(pixels), theirs.encode_image(pixels)),
        (ours.encode_text(tokens), theirs.encode_text(tokens)),
    )
    for a, b in pairs:
        assert a.shape == b.shape and a.dtype == b.dtype == torch.float32
        # A difference means nothing where all features are alike.
        assert (F.normalize(a, dim=-1)[0] - F.normalize(a, dim=-1)[1]).abs().max() > 1e-2
    return [(F.normalize(a, dim=-1) - F.normalize(b, dim=-1)).abs().max().item() for a, b in pairs]


def shapes(network):
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def heads(network):
    """Numbers of attention heads, layer by layer."""
    found = {}
    for name, module in network.named_modules():
        number = getattr(module, "num_heads", getattr(module, "heads", None))
        if number is not None:
            found[name] = number
    return found


# ------------------------------------------------------------------ features


@pytest.mark.parametrize("definition", [VIT, RESNET], ids=["ViT", "ResNet"])
def test_features_equal_open_clip(definition, device):
    ours, theirs = randomise(CLIP(definition)), reference(definition).eval()
    theirs.load_state_dict(ours.state_dict())
    assert heads(ours) == heads(theirs)
    assert max(largest_difference(ours, theirs, definition["image_size"], device)) <= TOLERANCE


@pytest.mark.parametrize("definition", [VIT, RESNET], ids=["ViT", "ResNet"])
def test_open_clip_state_dicts_load(definition):
    theirs = randomise(reference(definition))
    ours = CLIP(definition).eval()
    ours.load_state_dict(theirs.state_dict())
    assert shapes(ours) == shapes(theirs)
    assert max(largest_difference(ours, theirs, definition["image_size"])) <= TOLERANCE


def test_batchnorm_statistics_matter_in_the_comparison():
    ours = randomise(CLIP(RESNET))
    pixels, _ = inputs(96)
    with torch.no_grad():
        before = F.normalize(ours.encode_image(pixels), dim=-1)
        for module in ours.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
        after = F.normalize(ours.encode_image(pixels), dim=-1)
    assert (before - after).abs().max() > 1e-2


def test_temperature_starts_where_clip_does():
    assert CLIP(VIT).logit_scale.exp().item() == pytest.approx(1 / 0.07)


def test_cutting_texts_after_the_longest_changes_nothing(device):
    network = randomise(CLIP(VIT)).to(device)
    tokens = clip.tokenize(SENTENCES[:3]).to(device)
    longest = int(tokens.argmax(-1).max()) + 1
    assert longest < 77
    with torch.no_grad():
        whole = F.normalize(network.encode_text(tokens), dim=-1)
        cut = F.normalize(network.encode_text(tokens[:, :longest]), dim=-1)
    assert (whole - cut).abs().max() <= (1e-6 if device.type == "cpu" else TOLERANCE)


def test_what_follows_the_end_token_changes_nothing():
    network = randomise(CLIP(VIT))
    tokens = clip.tokenize("six planes")
    filled = tokens.clone()
    filled[:, int(tokens.argmax(-1)) + 1 :] = 1234
    with torch.no_grad():
        clean = F.normalize(network.encode_text(tokens), dim=-1)
        dirty = F.normalize(network.encode_text(filled), dim=-1)
    assert (clean - dirty).abs().max() <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViT-B-32", "RN50"])
def test_full_size_features_equal_open_clip(name):
    theirs = randomise(open_clip.create_model(f"{name}-quickgelu", pretrained=None))
    ours = CLIP(read_definition(name)).eval()
    ours.load_state_dict(theirs.state_dict())
    assert max(largest_difference(ours, theirs, 224)) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-L-14-336", "ViT-H-14", "RN50", "RN101"]
)
def test_definitions_have_the_shapes_and_heads_of_open_clip(name):
    config = open_clip.get_model_config(f"{name}-quickgelu")
    with torch.device("meta"):
        ours, theirs = CLIP(read_definition(name)), Reference(**config)
    assert shapes(ours) == shapes(theirs)
    assert heads(ours) == heads(theirs)
    size = theirs.visual.image_size
    assert read_definition(name)["image_size"] == (size[0] if isinstance(size, tuple) else size)


# ------------------------------------------------------------------ load


@pytest.fixture
def definitions(tmp_path, monkeypatch):
    """Two definitions of their own as models/; returns that folder."""
    for name, definition in (("vit", VIT), ("resnet", RESNET)):
        (tmp_path / f"{name}.json").write_text(json.dumps(definition))
    monkeypatch.setattr(model, "MODELS", tmp_path)
    monkeypatch.setattr(clip, "MODELS", tmp_path)
    return tmp_path


@pytest.mark.parametrize(("name", "definition"), [("vit", VIT), ("resnet", RESNET)])
def test_load_reads_a_plain_state_dict_in_openai_naming(definitions, device, name, definition):
    theirs = randomise(reference(definition))
    path = definitions / "weights.pt"
    torch.save(theirs.state_dict(), path)
    ours, preprocess = clip.load(str(path), device=device)
    assert not ours.training and next(ours.parameters()).device.type == device.type
    assert ours.definition == {"name": name, **definition}
    size = definition["image_size"]
    assert preprocess(Image.new("RGB", (70, 50))).shape == (3, size, size)
    assert max(largest_difference(ours, theirs, size, device)) <= TOLERANCE


def test_load_turns_half_precision_into_fp32(definitions):
    path = definitions / "half.pt"
    weights = randomise(CLIP(VIT)).half().state_dict()
    torch.save(weights, path)
    ours, _ = clip.load(path)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, weights[name].float())


@pytest.mark.parametrize("name", clip.available_models())
def test_load_looks_for_openai_names_in_models(definitions, name):
    file = name.replace("/", "-").replace("@336px", "-336") + ".pt"
    with pytest.raises(ValueError, match=re.escape(str(definitions / file))):
        clip.load(name)
    torch.save(CLIP(VIT).state_dict(), definitions / file)
    assert clip.load(name)[0].definition == {"name": "vit", **VIT}


def test_available_models_are_those_with_definitions():
    assert {"ViT-B/32", "ViT-L/14@336px", "RN50"} <= set(clip.available_models())
    assert set(clip._OPENAI_NAMES.values()) <= set(model.definition_names())


def test_load_refuses_other_shapes_and_lists_them(definitions):
    weights = CLIP(VIT).state_dict()
    weights["positional_embedding"] = torch.zeros(50, 48)
    path = definitions / "other.pt"
    torch.save(weights, path)
    with pytest.raises(ValueError) as error:
        clip.load(path)
    message = str(error.value)
    assert str(path) in message and "positional_embedding (50, 48)" in message
    for name in ("resnet", "vit", *weights):
        assert name in message


def test_load_refuses_shapes_that_fit_two_definitions_and_names_both(definitions):
    twin = {**VIT, "vision": {**VIT["vision"], "heads": 4}}  # no shape tells the heads
    (definitions / "twin.json").write_text(json.dumps(twin))
    path = definitions / "weights.pt"
    torch.save(CLIP(VIT).state_dict(), path)
    with pytest.raises(ValueError, match="twin, vit") as error:
        clip.load(path)
    assert str(path) in str(error.value) and "resnet" not in str(error.value)
    torch.save(CLIP(RESNET).state_dict(), path)
    assert clip.load(path)[0].definition["name"] == "resnet"


def test_load_refuses_missing_and_additional_names(definitions):
    weights = CLIP(VIT).state_dict()
    path = definitions / "other.pt"
    for changed in (
        {name: tensor for name, tensor in weights.items() if name != "logit_scale"},
        {**weights, "visual.extra": torch.zeros(1)},
    ):
        torch.save(changed, path)
        with pytest.raises(ValueError, match=re.escape(str(path))):
            clip.load(path)


def test_load_passes_over_the_sizes_in_openai_archives(definitions):
    path = definitions / "openai.pt"
    weights = CLIP(VIT).state_dict()
    sizes = {"input_resolution": 48, "context_length": 77, "vocab_size": 49408}
    torch.save({**weights, **{name: torch.tensor(n) for name, n in sizes.items()}}, path)
    found = clip.load(path)[0].state_dict()
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)


def test_load_names_a_missing_file(tmp_path):
    path = tmp_path / "missing.pt"
    with pytest.raises(ValueError, match=re.escape(str(path))):
        clip.load(str(path))


@pytest.mark.parametrize("content", [{"weights": {}, "epoch": 3}, torch.zeros(3), [1, 2]], ids=type)
def test_load_refuses_what_is_no_state_dict(tmp_path, content):
    path = tmp_path / "other.pt"
    torch.save(content, path)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        clip.load(path)


@pytest.mark.parametrize("content", [b"", b"hello world", b"PK\x03\x04 broken"], ids=str)
def test_load_names_a_file_that_is_not_of_torch_and_the_kind_of_error(tmp_path, content):
    path = tmp_path / "broken.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}: broken.*\(\w+Error\)$"):
        clip.load(path)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_load_tells_how_to_convert_a_torchscript_archive(definitions, monkeypatch):
    class Archive(nn.Module):  # OpenAI distributes its weights so
        def __init__(self, weights):
            super().__init__()
            for name, tensor in weights.items():
                if "." not in name:
                    self.register_buffer(name, tensor)
            for name, child in CLIP(VIT).named_children():
                self.add_module(name, child)

        def forward(self, x):
            return x

    network, path = CLIP(VIT), definitions / "archive.pt"
    archive = Archive(network.state_dict())
    archive.load_state_dict(network.state_dict())
    torch.jit.save(torch.jit.trace(archive, torch.zeros(1), check_trace=False), path)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: a TorchScript") as error:
        clip.load(path)
    monkeypatch.chdir(definitions)
    exec(re.search(r"torch\.save\(.+\)", str(error.value))[0])
    found = clip.load("weights.pt")[0].state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in network.state_dict().items())


# ------------------------------------------------------------------ preprocess


@pytest.mark.parametrize("n_px", [96, 224])
@pytest.mark.parametrize(
    "size", [(301, 173), (173, 301), (7, 5), (1, 1), (225, 224), (1023, 777), (600, 31)], ids=str
)
def test_preprocess_equals_open_clip(size, n_px):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    ours, theirs = clip.preprocess(n_px)(image), image_transform(n_px, is_train=False)(image)
    assert ours.shape == theirs.shape == (3, n_px, n_px) and ours.dtype == torch.float32
    step = 1 / 255 / torch.tensor(clip.STD)[:, None, None]
    assert ((ours - theirs).abs() <= step).all()
    assert (ours - theirs).abs().mean() < 1e-6


@pytest.mark.parametrize("size", [(301, 173), (224, 224), (7, 5)], ids=str)
@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_preprocess_converts_to_rgb_first_and_then_equals_open_clip(mode, size):
    channels = {"L": 1, "P": 3}.get(mode, 4)
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], channels), dtype=np.uint8)
    if mode == "P":
        image = Image.fromarray(pixels).quantize(64)
    else:
        image = Image.frombytes(mode, size, pixels.tobytes())
    # open_clip converts last: palettes are resized by nearest neighbour, alpha is weighed in.
    reference = image if mode == "L" else image.convert("RGB")
    ours, theirs = clip.preprocess(224)(image), image_transform(224, is_train=False)(reference)
    step = 1 / 255 / torch.tensor(clip.STD)[:, None, None]
    assert ((ours - theirs).abs() <= step).all()
    assert (ours - theirs).abs().mean() < 1e-6


def test_mean_and_deviation_are_clips():
    assert clip.MEAN == open_clip.OPENAI_DATASET_MEAN
    assert clip.STD == open_clip.OPENAI_DATASET_STD


def test_black_and_white_are_normalised(device):
    pixels = torch.stack([torch.zeros(3, 2, 2), torch.full((3, 2, 2), 255)]).byte().to(device)
    black, white = clip.normalize(pixels).cpu()
    mean, deviation = torch.tensor(clip.MEAN), torch.tensor(clip.STD)
    torch.testing.assert_close(black[:, 0, 0], -mean / deviation)
    torch.testing.assert_close(white[:, 0, 0], (1 - mean) / deviation)


def test_a_text_tower_without_layers_is_the_mean_of_the_words(tiny_definition):
    tiny_definition["text"]["layers"] = 0
    torch.manual_seed(0)
    model = CLIP(tiny_definition).eval()
    tokens = clip.tokenize(["ships in a harbor", "", "harbor a in ships", "!"])
    features = model.encode_text(tokens)
    words = model.token_embedding(tokens[0, 1:5]).mean(dim=0)
    expected = model.ln_final(words) @ model.text_projection
    assert torch.allclose(features[0], expected, atol=1e-6)
    assert torch.allclose(features[0], features[2], atol=1e-6)  # their order does not matter
    assert torch.allclose(features[1], model.ln_final.bias @ model.text_projection, atol=1e-6)
    only = model.ln_final(model.token_embedding.weight[tokens[3, 1]]) @ model.text_projection
    assert torch.allclose(features[3], only, atol=1e-6)  # a word of id 0 is no padding
    assert torch.allclose(model.encode_text(tokens[:, :6]), features, atol=1e-6)
