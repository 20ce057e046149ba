"""Model configs: those of models/, those of given weights, and other image sizes."""

import json
from types import SimpleNamespace

import open_clip
import pytest
import torch
from open_clip.model import resize_pos_embed

from backbones.export import OPEN_CLIP
from backbones.model_configs import (
    check_image_size,
    check_weights,
    model_config_names,
    model_config_of,
    read_model_config,
    resized,
    sizes_of,
)
from backbones.towers import CLIP
from clips import MODEL_CONFIGS, RESNET, VIT, open_clip_config, same_tensors

pytestmark = pytest.mark.usefixtures("seeded")
BOTH = pytest.mark.parametrize("name", MODEL_CONFIGS)
POSITIONS = {
    "vit": "visual.positional_embedding",
    "resnet": "visual.attnpool.positional_embedding",
}


# ------------------------------------------------------------------ sizes


def test_model_configs_of_open_clips_names_have_its_sizes():
    assert set(OPEN_CLIP) <= set(model_config_names())
    for name in OPEN_CLIP:
        theirs, ours = open_clip.get_model_config(name), read_model_config(name)
        expected = open_clip_config(ours, "gelu")
        for tower in ("vision_cfg", "text_cfg"):
            left_out = {"head_width": 64, "patch_size": None}
            assert {**left_out, **theirs[tower]} == {**left_out, **expected[tower]}
        assert theirs["embed_dim"] == ours["embed_dim"]


def test_weights_of_every_model_config_tell_it():
    for name in model_config_names():
        model_config = read_model_config(name)
        with torch.device("meta"):
            state = CLIP(model_config).state_dict()
        found = model_config_of(state)
        expected = {k: v for k, v in model_config.items() if k != "activation"}
        assert found == expected
        # Files that hold it are compared by their bytes.
        assert json.dumps(found) == json.dumps(expected)


def test_sizes_that_no_model_config_has_are_refused_and_listed(models):
    state = {**CLIP(VIT).state_dict(), "positional_embedding": torch.zeros(50, 48)}
    with pytest.raises(ValueError) as error:
        model_config_of(state)
    for part in ("resnet, vit", "'context_length': 50", "'patch_size': 16"):
        assert part in str(error.value)


def test_sizes_that_fit_several_model_configs(models):
    state = CLIP(VIT).state_dict()
    larger = {**VIT, "image_size": 96, "activation": "gelu"}
    (models / "larger.json").write_text(json.dumps(larger))
    assert model_config_of(state) == {"name": "vit", **VIT}
    assert model_config_of(resized(state, VIT, 96)[0])["name"] == "larger"
    assert model_config_of(resized(state, VIT, 32)[0])["image_size"] == 32  # no such model config
    twin = {**VIT, "vision": {**VIT["vision"], "heads": 4}}  # no shape tells the heads
    (models / "twin.json").write_text(json.dumps(twin))
    with pytest.raises(ValueError, match="the sizes fit vit, twin, larger alike"):
        model_config_of(state)


def test_sizes_name_every_parameter_that_is_missing():
    state = CLIP(VIT).state_dict()
    missing = ("visual.conv1.weight", "token_embedding.weight", "text_projection")
    for name in missing:
        del state[name]
    with pytest.raises(ValueError) as error:
        sizes_of(state)
    assert all(name in str(error.value) for name in missing)


@BOTH
def test_sizes_refuse_positions_that_are_no_square(name):
    state, positions = CLIP(MODEL_CONFIGS[name]).state_dict(), POSITIONS[name]
    for changed in (state[positions][:-1], state[positions][:0]):
        with pytest.raises(ValueError, match=f"{positions}: {len(changed)} positions"):
            sizes_of({**state, positions: changed})


@BOTH
def test_sizes_name_a_parameter_of_another_number_of_dimensions(name):
    state = CLIP(MODEL_CONFIGS[name]).state_dict()
    first = {"vit": "visual.conv1.weight", "resnet": "visual.layer1.0.conv1.weight"}[name]
    others = ("positional_embedding", "token_embedding.weight", "text_projection")
    for parameter in (first, POSITIONS[name], *others):
        for shape in ((), (3,)):
            with pytest.raises(ValueError, match=f"{parameter} has the shape"):
                sizes_of({**state, parameter: torch.zeros(shape)})


def test_missing_and_unexpected_names_and_shapes_are_all_listed():
    state = CLIP(VIT).state_dict()
    check_weights(state, VIT)
    missing = ("logit_scale", "visual.transformer.resblocks.1.ln_1.bias", "ln_final.weight")
    for name in missing:
        del state[name]
    state |= {"visual.extra": torch.zeros(1), "visual.ln_pre.bias": torch.zeros(7)}
    with pytest.raises(ValueError) as error:
        check_weights(state, {"name": "vit", **VIT})
    message = str(error.value)
    assert all(name in message.split("missing: ")[1].split(";")[0] for name in missing)
    assert "unexpected: visual.extra;" in message
    assert "visual.ln_pre.bias (7,) instead of (128,)" in message


# ------------------------------------------------------------------ other image sizes


@pytest.mark.parametrize(
    ("name", "image_size"), [("vit", 16), ("vit", 80), ("resnet", 64), ("resnet", 160)]
)
def test_positions_are_interpolated_as_by_open_clip(name, image_size, capsys):
    model_config, key = MODEL_CONFIGS[name], POSITIONS[name]
    state = CLIP(model_config).state_dict()
    before = {name: tensor.clone() for name, tensor in state.items()}
    found, changed = resized(state, model_config, image_size)
    stride = 16 if name == "vit" else 32
    side, old_side = image_size // stride, model_config["image_size"] // stride
    reference = {"visual.positional_embedding": state[key]}
    visual = SimpleNamespace(grid_size=(side, side))
    resize_pos_embed(reference, SimpleNamespace(visual=visual))
    assert torch.equal(found[key], reference["visual.positional_embedding"])
    assert changed == {**model_config, "image_size": image_size}
    assert same_tensors({n: t for n, t in found.items() if n != key}, before)
    assert same_tensors(state, before)
    check_weights(found, changed)
    [line] = capsys.readouterr().out.splitlines()
    assert f"{model_config['image_size']} -> {image_size}" in line
    assert f"{old_side} x {old_side} to {side} x {side}" in line


@pytest.mark.parametrize(("model_config", "stride"), [(VIT, 16), (RESNET, 32)])
@pytest.mark.parametrize("image_size", [0, -32, 8, 100])
def test_a_size_that_is_no_multiple_of_the_patch_is_refused(model_config, stride, image_size):
    message = f"--image-size {image_size}: expected a multiple of {stride}, above 0"
    with pytest.raises(ValueError, match=message):
        check_image_size(model_config, image_size)
    with pytest.raises(ValueError, match="--image-size"):
        resized(CLIP(model_config).state_dict(), model_config, image_size)
    check_image_size(model_config, 64)
