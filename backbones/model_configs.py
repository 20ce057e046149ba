"""Sizes of a CLIP: the model definitions in `models/`, and those of given weights."""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F


def sizes_of(weights):
    """The sizes in a definition, heads aside, of a state dict in OpenAI's naming.

    Raises ValueError that names the parameters which are missing or tell no size.
    """
    resnet = "visual.layer1.0.conv1.weight" in weights
    first = "visual.layer1.0.conv1.weight" if resnet else "visual.conv1.weight"
    positions = f"visual.{'attnpool.' if resnet else ''}positional_embedding"
    _check_dimensions(weights, first, positions)
    patch, count = 32 if resnet else weights[first].shape[-1], len(weights[positions])
    vision = {"width": len(weights[first])}
    if resnet:
        vision["layers"] = [_count(weights, f"visual.layer{stage}.") for stage in range(1, 5)]
    else:
        layers = _count(weights, "visual.transformer.resblocks.")
        vision = {"patch_size": patch, **vision, "layers": layers}
    side = math.isqrt(max(count - 1, 0))
    if side**2 + 1 != count:
        raise ValueError(f"{positions}: {count} positions are no square and one")
    vocabulary, width = weights["token_embedding.weight"].shape
    return {
        "embed_dim": weights["text_projection"].shape[1],
        "image_size": side * patch,
        "vision": vision,
        "text": {
            "context_length": len(weights["positional_embedding"]),
            "vocab_size": vocabulary,
            "width": width,
            "layers": _count(weights, "transformer.resblocks."),
        },
    }


def _check_dimensions(weights, first, positions):
    needed = {first: 4, positions: 2, "positional_embedding": 2, "token_embedding.weight": 2}
    needed["text_projection"] = 2
    if missing := [name for name in needed if name not in weights]:
        raise ValueError(f"no CLIP, its parameters lack {', '.join(missing)}")
    for name, dimensions in needed.items():
        if weights[name].ndim != dimensions:
            shape = tuple(weights[name].shape)
            raise ValueError(f"no CLIP, {name} has the shape {shape}, not {dimensions} dimensions")


def _count(weights, prefix):
    """How many numbers follow a prefix in the names."""
    return len({name[len(prefix) :].split(".")[0] for name in weights if name.startswith(prefix)})


def check_image_size(model_config, image_size):
    """ValueError for a side in pixels that is no multiple of the patch's (ModifiedResNet: 32)."""
    patch = model_config["vision"].get("patch_size", 32)
    if image_size < patch or image_size % patch:
        raise ValueError(
            f"--image-size {image_size}: expected a multiple of {patch}, above 0, for "
            f"{model_config.get('name', 'this model')}"
        )


def resized(weights, model_config, image_size):
    """Weights and definition for images of another size in pixels; the given ones for the same.

    The grid of positional embeddings is interpolated bicubically with antialiasing, as open_clip's
    `resize_pos_embed` does, the one of a ModifiedResNet's pooling too; a line is printed. Raises
    ValueError as `check_image_size` does.
    """
    if image_size == model_config["image_size"]:
        return weights, model_config
    check_image_size(model_config, image_size)
    patch = model_config["vision"].get("patch_size", 32)
    old, new = model_config["image_size"] // patch, image_size // patch
    name = "visual.positional_embedding"
    name = name if name in weights else "visual.attnpool.positional_embedding"
    first, grid = weights[name][:1], weights[name][1:]  # (1, D), (old * old, D)
    grid = grid.T.unflatten(1, (old, old))[None]  # (1, D, old, old)
    grid = F.interpolate(grid, (new, new), mode="bicubic", antialias=True)
    positions = torch.cat([first, grid[0].flatten(1).T])  # (1 + new * new, D)
    print(
        f"image size {model_config['image_size']} -> {image_size}: positional embeddings "
        f"interpolated from {old} x {old} to {new} x {new}"
    )
    return {**weights, name: positions}, {**model_config, "image_size": image_size}


MODELS = Path(__file__).parent.parent / "models"

# fmt: on


def model_config_names():
    """Names of the model definitions in `models/`."""
    return sorted(path.stem for path in MODELS.glob("*.json"))


def read_model_config(name):
    """The sizes of a model from `models/<name>.json`; see towers.py for the fields."""
    if name not in model_config_names():
        raise ValueError(f"model '{name}': not in {MODELS}; there are {model_config_names()}")
    sizes = json.loads((MODELS / f"{name}.json").read_text(encoding="utf-8"))
    return {"name": name, **sizes}


def model_config_of(weights):
    """The definition of a CLIP's state dict: sizes from its tensors, heads from `models/`.

    Heads are those of the definitions that agree in all else but image size and activation; it has
    the name of the one of that image size, if any. Raises ValueError where none agrees, or some
    that differ in heads.
    """
    sizes, fitting = sizes_of(weights), []
    for known in map(read_model_config, model_config_names()):
        heads = {tower: {"heads": known[tower]["heads"]} for tower in ("vision", "text")}
        found = {**sizes, **{tower: {**sizes[tower], **heads[tower]} for tower in heads}}
        same = ("embed_dim", "vision", "text")
        if all(known[key] == found[key] for key in same):
            fitting.append({"name": known["name"], **found})
            if known["image_size"] == sizes["image_size"]:
                fitting.insert(0, fitting.pop())
    names = [model_config["name"] for model_config in fitting]
    if not fitting:
        raise ValueError(f"the sizes fit none of {', '.join(model_config_names())}: {sizes}")
    if any({**other, "name": names[0]} != fitting[0] for other in fitting):
        raise ValueError(f"the sizes fit {', '.join(names)} alike; keep one of them in {MODELS}")
    return fitting[0]
