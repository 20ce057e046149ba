"""Sizes of a CLIP: the model configs in `models/`, and those of given weights."""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F

from backbones.towers import (
    ACTIVATIONS,
    CLIP,
    RESNET_STRIDE,
    vision_channels,
    without_numbers,
)

MODELS = Path(__file__).parent.parent / "models"


# ------------------------------------------------------------------ models/*.json


def model_config_names():
    """Names of the model configs in `models/`."""
    return sorted(path.stem for path in MODELS.glob("*.json"))


def read_model_config(name):
    """The sizes of a model from `models/<name>.json`; see towers.py for the fields."""
    if name not in model_config_names():
        raise ValueError(f"model '{name}': not in {MODELS}; there are {model_config_names()}")
    path = MODELS / f"{name}.json"
    try:
        sizes = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON in UTF-8: {error}") from None
    try:
        check_model_config(sizes)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; models/README.md tells the fields") from None
    return {"name": name, **sizes}


# ------------------------------------------------------------------ types and bounds

LARGEST = 2**20  # of a width, a side or a vocabulary
MOST_LAYERS = 1000


def shown(value):
    """What was found in a field, in a few words on one line."""
    if isinstance(value, (str, float)) or value is None:
        return f"{value!r:.60}"
    if isinstance(value, int) and abs(value) < 10**18:
        return repr(value)
    return f"a value of type {type(value).__name__}"


def is_whole(value):
    """Whether a value is a whole number; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_model_config(model_config):
    """Raise ValueError for a model config with fields or values that make no model."""
    if not isinstance(model_config, dict):
        raise ValueError(f"expected a model config, a dict, found {shown(model_config)}")
    for part in ("vision", "text"):
        if not isinstance(model_config.get(part), dict):
            found = shown(model_config.get(part))
            raise ValueError(f"{part}: expected a dict of sizes, found {found}")
    vision, text = model_config["vision"], model_config["text"]
    for field in ("embed_dim", "image_size"):
        _check_size(field, model_config.get(field))
    for field in ("context_length", "vocab_size", "width", "heads"):
        _check_size(f"text: {field}", text.get(field))
    for field in ("width", "heads"):
        _check_size(f"vision: {field}", vision.get(field))
    _check_layers("text: layers", text.get("layers"))
    known = {"width", "layers", "heads"}
    if isinstance(vision.get("layers"), list):
        if len(vision["layers"]) != 4 or vision["width"] % 2:
            raise ValueError("vision: expected four numbers of layers and an even width")
        for blocks in vision["layers"]:
            _check_layers("vision: layers", blocks, least=1)
    else:
        _check_layers("vision: layers", vision.get("layers"), least=1)
        _check_size("vision: patch_size", vision.get("patch_size"))
        known.add("patch_size")
    if vision.keys() != known:
        raise ValueError(f"vision: expected {', '.join(sorted(known))} and no more")
    if model_config["image_size"] < _stride(model_config):
        raise ValueError(f"image_size: expected {_stride(model_config)} or more")
    for field, width, heads in (
        ("vision", vision_channels(vision), vision["heads"]),
        ("text", text["width"], text["heads"]),
    ):
        if width % heads:
            raise ValueError(f"{field}: a width of {width} cannot be shared by {heads} heads")
    activation = model_config.get("activation", "quickgelu")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(
            f"activation: expected one of {', '.join(ACTIVATIONS)}, found {shown(activation)}"
        )


def _check_size(field, value):
    if not is_whole(value) or not 1 <= value <= LARGEST:
        raise ValueError(
            f"{field}: expected a whole number of 1 to {LARGEST}, found {shown(value)}"
        )


def _check_layers(field, value, least=0):
    if not is_whole(value) or not least <= value <= MOST_LAYERS:
        raise ValueError(
            f"{field}: expected a whole number of {least} to {MOST_LAYERS}, found {shown(value)}"
        )


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
    with without_numbers():
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
