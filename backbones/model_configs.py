"""Sizes of a CLIP: the model configs in `models/`, and those of given weights."""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F

from backbones.towers import CLIP, RESNET_STRIDE

MODELS = Path(__file__).parent.parent / "models"


# ------------------------------------------------------------------ models/*.json


def model_config_names():
    """Names of the model configs in `models/`."""
    return sorted(path.stem for path in MODELS.glob("*.json"))


def read_model_config(name):
    """The sizes of a model from `models/<name>.json`; see towers.py for the fields."""
    if name not in model_config_names():
        raise ValueError(f"model '{name}': not in {MODELS}; there are {model_config_names()}")
    sizes = json.loads((MODELS / f"{name}.json").read_text(encoding="utf-8"))
    return {"name": name, **sizes}


# ------------------------------------------------------------------ sizes of weights


def model_config_of(weights):
    """The model config of a CLIP's state dict: sizes from its tensors, heads from `models/`.

    No tensor tells the number of heads. It is that of the model configs that agree in all else but
    image size and activation. The name is that of the one with the same image size, if any. Raises
    ValueError where none agrees, or where some agree that differ in heads.
    """
    sizes = sizes_of(weights)
    fitting = []
    for name in model_config_names():
        known = read_model_config(name)
        found = {
            "name": name,
            **sizes,
            "vision": {**sizes["vision"], "heads": known["vision"]["heads"]},
            "text": {**sizes["text"], "heads": known["text"]["heads"]},
        }
        if any(found[part] != known[part] for part in ("embed_dim", "vision", "text")):
            continue
        if known["image_size"] == sizes["image_size"]:
            fitting.insert(0, found)
        else:
            fitting.append(found)
    if not fitting:
        raise ValueError(f"the sizes fit none of {', '.join(model_config_names())}: {sizes}")
    first = fitting[0]
    if any({**other, "name": first["name"]} != first for other in fitting):
        names = ", ".join(found["name"] for found in fitting)
        raise ValueError(f"the sizes fit {names} alike; keep one of them in {MODELS}")
    return first


def sizes_of(weights):
    """The sizes in a model config, heads aside, of a state dict in OpenAI's naming.

    Raises ValueError that names the parameters which are missing or tell no size.
    """
    if "visual.layer1.0.conv1.weight" in weights:
        first_layer = "visual.layer1.0.conv1.weight"
        positions = "visual.attnpool.positional_embedding"
    else:
        first_layer = "visual.conv1.weight"
        positions = "visual.positional_embedding"
    _check_dimensions(weights, first_layer, positions)
    vision_width = len(weights[first_layer])
    if first_layer == "visual.conv1.weight":
        stride = weights[first_layer].shape[-1]
        layers = _count(weights, "visual.transformer.resblocks.")
        vision = {"patch_size": stride, "width": vision_width, "layers": layers}
    else:
        stride = RESNET_STRIDE
        layers = [_count(weights, f"visual.layer{stage}.") for stage in range(1, 5)]
        vision = {"width": vision_width, "layers": layers}
    count = len(weights[positions])
    side = math.isqrt(max(count - 1, 0))
    if side**2 + 1 != count:
        raise ValueError(f"{positions}: {count} positions are no square and one")
    vocab_size, text_width = weights["token_embedding.weight"].shape
    return {
        "embed_dim": weights["text_projection"].shape[1],
        "image_size": side * stride,
        "vision": vision,
        "text": {
            "context_length": len(weights["positional_embedding"]),
            "vocab_size": vocab_size,
            "width": text_width,
            "layers": _count(weights, "transformer.resblocks."),
        },
    }


def _check_dimensions(weights, first_layer, positions):
    dimensions = {
        first_layer: 4,
        positions: 2,
        "positional_embedding": 2,
        "token_embedding.weight": 2,
        "text_projection": 2,
    }
    missing = [name for name in dimensions if name not in weights]
    if missing:
        raise ValueError(f"no CLIP, its parameters lack {', '.join(missing)}")
    for name, expected in dimensions.items():
        if weights[name].ndim != expected:
            shape = tuple(weights[name].shape)
            raise ValueError(f"no CLIP, {name} has the shape {shape}, not {expected} dimensions")


def _count(weights, prefix):
    """How many numbers follow a prefix in the names."""
    return len({name[len(prefix) :].split(".")[0] for name in weights if name.startswith(prefix)})


def check_weights(weights, model_config):
    """ValueError where names and shapes of a state dict are not those of a model config."""
    with torch.device("meta"):  # shapes only, no memory
        expected = CLIP(model_config).state_dict()
    problems = {
        "missing": [name for name in expected if name not in weights],
        "unexpected": [name for name in weights if name not in expected],
        "of another shape": [
            f"{name} {tuple(tensor.shape)} instead of {tuple(expected[name].shape)}"
            for name, tensor in weights.items()
            if name in expected and tensor.shape != expected[name].shape
        ],
    }
    found = [f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names]
    if found:
        raise ValueError(f"not the parameters of {model_config['name']}; {'; '.join(found)}")


# ------------------------------------------------------------------ other image sizes


def check_image_size(model_config, image_size):
    """ValueError for a side in pixels that is no multiple of the patch's (ModifiedResNet: 32)."""
    stride = _stride(model_config)
    if image_size < stride or image_size % stride:
        raise ValueError(
            f"--image-size {image_size}: expected a multiple of {stride}, above 0, for "
            f"{model_config.get('name', 'this model')}"
        )


def _stride(model_config):
    """Pixels of the image, along one side, that a position of the image tower covers."""
    return model_config["vision"].get("patch_size", RESNET_STRIDE)


def resized(weights, model_config, image_size):
    """Weights and model config for images of another size in pixels; the given ones for the same.

    The grid of positional embeddings is interpolated bicubically with antialiasing, as open_clip's
    `resize_pos_embed` does, the one of a ModifiedResNet's pooling too; a line is printed. Raises
    ValueError as `check_image_size` does.
    """
    if image_size == model_config["image_size"]:
        return weights, model_config
    check_image_size(model_config, image_size)
    old = model_config["image_size"] // _stride(model_config)
    new = image_size // _stride(model_config)
    name = "visual.positional_embedding"
    if name not in weights:
        name = "visual.attnpool.positional_embedding"
    first, grid = weights[name][:1], weights[name][1:]  # (1, D), (old * old, D)
    grid = grid.T.unflatten(1, (old, old))[None]  # (1, D, old, old)
    grid = F.interpolate(grid, (new, new), mode="bicubic", antialias=True)
    positions = torch.cat([first, grid[0].flatten(1).T])  # (1 + new * new, D)
    print(
        f"image size {model_config['image_size']} -> {image_size}: positional embeddings "
        f"interpolated from {old} x {old} to {new} x {new}"
    )
    return {**weights, name: positions}, {**model_config, "image_size": image_size}
