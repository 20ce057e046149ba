"""CLIP's towers and preprocessing against open_clip."""

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
from backbones import preprocess
from backbones.model_configs import read_model_config
from backbones.towers import CLIP

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


def reference(model_config):
    """open_clip's CLIP of the same sizes, its head width derived from our number of heads."""
    vision, text = model_config["vision"], model_config["text"]
    channels = vision["width"] * (32 if isinstance(vision["layers"], list) else 1)
    vision_cfg = {
        "image_size": model_config["image_size"],
        "head_width": channels // vision["heads"],
        **{name: value for name, value in vision.items() if name != "heads"},
    }
    return Reference(model_config["embed_dim"], vision_cfg, text, quick_gelu=True)


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


@pytest.mark.parametrize("model_config", [VIT, RESNET], ids=["ViT", "ResNet"])
def test_features_equal_open_clip(model_config, device):
    ours, theirs = randomise(CLIP(model_config)), reference(model_config).eval()
    theirs.load_state_dict(ours.state_dict())
    assert heads(ours) == heads(theirs)
    assert max(largest_difference(ours, theirs, model_config["image_size"], device)) <= TOLERANCE


@pytest.mark.parametrize("model_config", [VIT, RESNET], ids=["ViT", "ResNet"])
def test_open_clip_state_dicts_load(model_config):
    theirs = randomise(reference(model_config))
    ours = CLIP(model_config).eval()
    ours.load_state_dict(theirs.state_dict())
    assert shapes(ours) == shapes(theirs)
    assert max(largest_difference(ours, theirs, model_config["image_size"])) <= TOLERANCE


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
    ours = CLIP(read_model_config(name)).eval()
    ours.load_state_dict(theirs.state_dict())
    assert max(largest_difference(ours, theirs, 224)) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-L-14-336", "ViT-H-14", "RN50", "RN101"]
)
def test_definitions_have_the_shapes_and_heads_of_open_clip(name):
    config = open_clip.get_model_config(f"{name}-quickgelu")
    with torch.device("meta"):
        ours, theirs = CLIP(read_model_config(name)), Reference(**config)
    assert shapes(ours) == shapes(theirs)
    assert heads(ours) == heads(theirs)
    size = theirs.visual.image_size
    assert read_model_config(name)["image_size"] == (size[0] if isinstance(size, tuple) else size)


# ------------------------------------------------------------------ preprocess


@pytest.mark.parametrize("image_size", [96, 224])
@pytest.mark.parametrize(
    "size", [(301, 173), (173, 301), (7, 5), (1, 1), (225, 224), (1023, 777), (600, 31)], ids=str
)
def test_preprocess_equals_open_clip(size, image_size):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    ours, theirs = (
        clip.preprocess(image_size)(image),
        image_transform(image_size, is_train=False)(image),
    )
    assert ours.shape == theirs.shape == (3, image_size, image_size) and ours.dtype == torch.float32
    step = 1 / 255 / torch.tensor(preprocess.STD)[:, None, None]
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
    ours, theirs = (
        clip.preprocess(224)(image),
        image_transform(224, is_train=False)(reference),
    )
    step = 1 / 255 / torch.tensor(preprocess.STD)[:, None, None]
    assert ((ours - theirs).abs() <= step).all()
    assert (ours - theirs).abs().mean() < 1e-6


def test_mean_and_deviation_are_clips():
    assert preprocess.MEAN == open_clip.OPENAI_DATASET_MEAN
    assert preprocess.STD == open_clip.OPENAI_DATASET_STD


def test_black_and_white_are_normalised(device):
    pixels = torch.stack([torch.zeros(3, 2, 2), torch.full((3, 2, 2), 255)]).byte().to(device)
    black, white = preprocess.normalize(pixels).cpu()
    mean, deviation = torch.tensor(preprocess.MEAN), torch.tensor(preprocess.STD)
    torch.testing.assert_close(black[:, 0, 0], -mean / deviation)
    torch.testing.assert_close(white[:, 0, 0], (1 - mean) / deviation)


def test_a_text_tower_without_layers_is_the_mean_of_the_words(tiny_model_config):
    tiny_model_config["text"]["layers"] = 0
    torch.manual_seed(0)
    model = CLIP(tiny_model_config).eval()
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
