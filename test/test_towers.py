"""CLIP's towers and preprocessing against open_clip."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from open_clip.transform import image_transform
from PIL import Image
from torch.nn.utils import parametrize

import clip
from backbones import lora, preprocess
from backbones.towers import CLIP, Attention, QuickGELU, Transformer, attention
from clips import (
    MODEL_CONFIGS,
    SENTENCES,
    TOLERANCE,
    VIT,
    inputs,
    largest_difference,
    open_clip_model,
    randomise,
)

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.mark.parametrize("name", MODEL_CONFIGS)
def test_features_equal_open_clip(name, device):
    model_config = MODEL_CONFIGS[name]
    theirs = open_clip_model(model_config)
    ours = CLIP(model_config).eval()
    ours.load_state_dict(theirs.state_dict())
    assert largest_difference(ours, theirs, model_config["image_size"], device) <= TOLERANCE


@torch.no_grad()
def test_a_call_gives_the_logits_of_open_clip(device):
    theirs = open_clip_model(VIT).to(device).eval()
    ours = CLIP(VIT).to(device).eval()
    ours.load_state_dict(theirs.state_dict())
    image, text = inputs(VIT["image_size"], device)
    text = text[:2]  # so that rows are not taken for columns
    found = ours(image, text)
    expected = theirs.get_logits(image, text)
    assert found[0].shape == (len(image), 2) and found[1].shape == (2, len(image))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 if device.type == "cpu" else 1e-3)


def test_temperature_starts_where_clip_does():
    assert CLIP(VIT).logit_scale.exp().item() == pytest.approx(1 / 0.07)


def test_what_follows_the_end_token_changes_nothing_and_may_be_cut(device):
    network = randomise(CLIP(VIT)).to(device)
    tokens = clip.tokenize(SENTENCES[:3]).to(device)
    end = tokens.argmax(-1)
    longest = int(end.max()) + 1
    assert longest < 77
    filled = torch.where(torch.arange(77, device=device) > end[:, None], 1234, tokens)
    with torch.no_grad():
        whole = F.normalize(network.encode_text(tokens), dim=-1)
        for other in (tokens[:, :longest], filled):
            difference = whole - F.normalize(network.encode_text(other), dim=-1)
            assert difference.abs().max() <= (1e-6 if device.type == "cpu" else TOLERANCE)


def test_a_text_tower_without_layers_is_the_mean_of_the_words(tiny_model_config):
    tiny_model_config["text"]["layers"] = 0
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


# ------------------------------------------------------------------ preprocess


def assert_preprocessed_as_by_open_clip(image, image_size, reference=None):
    """Each pixel within one step of 255 of open_clip's, of `reference` where given."""
    ours = clip.preprocess(image_size)(image)
    theirs = image_transform(image_size, is_train=False)(reference or image)
    assert ours.shape == theirs.shape == (3, image_size, image_size) and ours.dtype == torch.float32
    step = 1 / 255 / torch.tensor(preprocess.STD)[:, None, None]
    assert ((ours - theirs).abs() <= step).all()
    assert (ours - theirs).abs().mean() < 1e-6


@pytest.mark.parametrize("image_size", [96, 224])
@pytest.mark.parametrize(
    "size", [(301, 173), (173, 301), (7, 5), (1, 1), (225, 224), (1023, 777), (600, 31)], ids=str
)
def test_preprocess_equals_open_clip(size, image_size):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    assert_preprocessed_as_by_open_clip(Image.fromarray(pixels), image_size)


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
    assert_preprocessed_as_by_open_clip(image, 224, reference)


# ------------------------------------------------------------------ how they are computed


def test_first_weights_of_attention_are_those_of_torch():
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(32, 4)
    torch.manual_seed(0)
    ours = Attention(32, 4)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name


@pytest.mark.parametrize("causal", [False, True])
def test_a_stack_at_one_position_is_torchs_whole_one_read_there(causal):
    ours = randomise(Transformer(32, 3, 4, QuickGELU))
    x = torch.randn(5, 9, 32)
    positions = torch.tensor([0, 8, 3, 3, 7])
    mask = torch.full((9, 9), float("-inf")).triu(1) if causal else None
    expected = x
    for block in ours.resblocks:
        attention = torch.nn.MultiheadAttention(32, 4, batch_first=True)
        attention.load_state_dict(block.attn.state_dict())
        y = block.ln_1(expected)
        expected = expected + attention(y, y, y, need_weights=False, attn_mask=mask)[0]
        expected = expected + block.mlp(block.ln_2(expected))
    found = ours(x, positions, causal)
    torch.testing.assert_close(found, expected[torch.arange(5), positions], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("causal", "some_hidden"), [(False, False), (True, False), (False, True)])
def test_attention_in_half_precision_with_gradients_is_that_of_torch(causal, some_hidden):
    seen = None
    if some_hidden:
        seen = torch.arange(6) <= torch.tensor([2, 5])[:, None, None, None]  # (2, 1, 1, 6)
    parts = [torch.randn(2, 3, 6, 8) for _ in range(3)]
    in_full = [part.clone().requires_grad_() for part in parts]
    in_half = [part.bfloat16().requires_grad_() for part in parts]
    expected = F.scaled_dot_product_attention(*in_full, seen, is_causal=causal)
    found = attention(*in_half, causal, seen)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.03)
    expected.square().sum().backward()
    found.float().square().sum().backward()
    for one, other in zip(in_half, in_full, strict=True):
        torch.testing.assert_close(one.grad.float(), other.grad, rtol=0, atol=0.15)


@pytest.mark.parametrize("adapters", [False, True])
def test_recomputed_blocks_have_the_same_gradients(adapters):
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        network = CLIP(VIT).train()
        if adapters:
            lora.adapt(network, rank=4, alpha=8, dropout=0.5)
        for module in network.modules():
            if isinstance(module, Transformer):
                module.recompute = recompute
        image, text = inputs(VIT["image_size"])
        with parametrize.cached():
            loss = (network(image, text)[0] ** 2).mean()
        loss.backward()
        gradients.append({name: p.grad for name, p in network.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
