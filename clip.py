"""CLIP for users: load, tokenize, preprocess, export. The interface of OpenAI's `clip` package.

    import clip
    model, preprocess = clip.load("ViT-B/32", device="cpu")  # OpenAI's, downloaded where missing
    model, preprocess = clip.load("models/RemoteCLIP-ViT-B-32.pt", activation="quickgelu")
    features = model.encode_text(clip.tokenize(["six storage tanks beside a road"]))

    python clip.py export --checkpoint models/best_model.pth --out plain.pt  # for other programs

The module shadows the PyPI package of the same name: run from the root of this project.
"""

import argparse
import json
import os
import secrets
import shutil
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from model import MODELS, definition_of, is_checkpoint, load_checkpoint
from pretrained import HUB, check, find_hub, pick_activation, read_source
from simple_tokenizer import SimpleTokenizer
from towers import ACTIVATIONS, CLIP
from weights import OPENAI, find_openai, to_hugging_face

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def available_models():
    """OpenAI's names that `load` takes."""
    return list(OPENAI)


def is_clip_source(name):
    """Whether a string is a name that `load` knows without a path: OpenAI's or `hf-hub:...`."""
    return name in OPENAI or name.startswith(HUB)


def _to_rgb(image):
    return image.convert("RGB")


def resize_and_crop(n_px):
    """Transform of a PIL image: RGB, short side to n_px, bicubic, then the centre square."""
    resize = transforms.Resize(n_px, interpolation=InterpolationMode.BICUBIC)
    return transforms.Compose([_to_rgb, resize, transforms.CenterCrop(n_px)])


def normalize(images):
    """uint8 pixels (..., 3, H, W) to CLIP's normalised float32, on the device they are on."""
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (MEAN, STD))
    return (images.float() / 255 - mean) / std


def preprocess(n_px):
    """CLIP's preprocessing: PIL image to a normalised (3, n_px, n_px) tensor."""
    return transforms.Compose([resize_and_crop(n_px), transforms.PILToTensor(), normalize])


@lru_cache(maxsize=1)
def tokenizer():
    """The tokenizer, built at first use: importing this module reads no file."""
    return SimpleTokenizer()


def tokenize(texts, context_length=77, truncate=True):
    """Token ids of one text or a list of texts.

    Parameters
    ----------
    texts : str or list of str
    context_length : int
        Columns of the result; CLIP's models use 77.
    truncate : bool
        Cut longer texts, keeping the end token; otherwise a longer text raises ValueError.

    Returns
    -------
    tensor (B, context_length) of int64, zero after the end token
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    encoder = tokenizer()
    result = torch.zeros(len(texts), context_length, dtype=torch.long)
    for i, text in enumerate(texts):
        ids = [encoder.start, *encoder.encode(text), encoder.end]
        if len(ids) > context_length:
            if not truncate:
                raise ValueError(
                    f"text {i} has {len(ids)} tokens, context_length is {context_length}; shorten "
                    f"it or pass truncate=True: '{text[:80]}'"
                )
            ids = [*ids[: context_length - 1], encoder.end]
        result[i, : len(ids)] = torch.tensor(ids)
    return result


# ------------------------------------------------------------------ load


def load(name_or_path, device="cpu", activation=None, image_size=None):
    """A CLIP and its preprocessing, as OpenAI's `clip.load`, from weights in anybody's naming.

    Parameters
    ----------
    name_or_path : str or path
        One of `available_models()`, searched in `models/` and `~/.cache/clip`, else downloaded;
        `hf-hub:owner/name[@revision][:path/in/repo]`; or a file or folder, see `read_source`.
    device : str or torch.device
    activation : "quickgelu", "gelu" or None
        What the towers were trained with; needed where the source does not tell it.
    image_size : int, optional
        Side of the images in pixels; other than the weights', see `resized`.

    Returns
    -------
    (model, preprocess) : the model in eval mode, fp32, with its `definition`, activation included;
        and a transform of a PIL image to a (3, image_size, image_size) tensor

    Raises
    ------
    ValueError that names the source, where it is not found or broken, its sizes fit no definition
        in `models/`, its parameters or its configuration are others, or the activation is open
    """
    name = str(name_or_path)
    if name in OPENAI:
        source = read_source(find_openai(name, MODELS))
        source = source._replace(activation=source.activation or "quickgelu")
    else:
        source = read_source(find_hub(name) if name.startswith(HUB) else name_or_path)
    try:
        definition = definition_of(source.weights)
    except ValueError as error:
        raise ValueError(f"{source.path}: {error}") from None
    check(source, definition)
    definition["activation"] = pick_activation(source, activation)
    weights = source.weights
    if image_size is not None:
        weights, definition = resized(weights, definition, image_size)
    model = CLIP(definition)
    model.load_state_dict(weights)
    model.definition = definition
    return model.to(device).eval(), preprocess(definition["image_size"])


def resized(weights, definition, image_size):
    """Weights and definition for images of another size in pixels; the given ones for the same.

    The grid of positional embeddings is interpolated bicubically with antialiasing, as open_clip's
    `resize_pos_embed` does, the one of a ModifiedResNet's pooling too; a line is printed. Raises
    ValueError for a size that is no multiple of the patch's (ModifiedResNet: 32).
    """
    if image_size == definition["image_size"]:
        return weights, definition
    patch = definition["vision"].get("patch_size", 32)
    if image_size < patch or image_size % patch:
        raise ValueError(
            f"image size {image_size}: expected a multiple of {patch} for these weights"
        )
    old, new = definition["image_size"] // patch, image_size // patch
    name = "visual.positional_embedding"
    name = name if name in weights else "visual.attnpool.positional_embedding"
    first, grid = weights[name][:1], weights[name][1:]  # (1, D), (old * old, D)
    grid = grid.T.unflatten(1, (old, old))[None]  # (1, D, old, old)
    grid = F.interpolate(grid, (new, new), mode="bicubic", antialias=True)
    positions = torch.cat([first, grid[0].flatten(1).T])  # (1 + new * new, D)
    print(
        f"image size {definition['image_size']} -> {image_size}: positional embeddings "
        f"interpolated from {old} x {old} to {new} x {new}"
    )
    return {**weights, name: positions}, {**definition, "image_size": image_size}


# ------------------------------------------------------------------ export


def export(checkpoint, out, naming="openai", activation=None):
    """Write the CLIP in a checkpoint of ours, or in what `load` takes, for other programs.

    naming: "openai", also open_clip's, for one file, `.safetensors` or else torch.save's;
    "huggingface" for a new folder that `CLIPModel.from_pretrained` takes. Adapters are merged, the
    graph branch is left out. Returns the definition, with the activation. Raises ValueError where
    there is no such form of it, OSError where it is not written; then nothing is left.
    """
    weights, definition = _plain(checkpoint, activation)
    out = Path(out)
    if naming == "huggingface" and out.exists():
        raise ValueError(f"{out}: exists; name a new folder with --out")
    temporary = out.with_name(f"{os.getpid()}-{secrets.token_hex(4)}-{out.name}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if naming == "huggingface":
            weights, config = to_hugging_face(weights, definition)
            temporary.mkdir()
            _save(weights, temporary / "model.safetensors")
            text = json.dumps(config, indent=2) + "\n"
            (temporary / "config.json").write_text(text, encoding="utf-8")
        else:
            _save(weights, temporary)
        os.replace(temporary, out)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        reason = str(error).splitlines()[0]
        raise OSError(f"{out}: not written ({reason}); is the disk full?") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if temporary.is_file():
            temporary.unlink()
    return definition


def _plain(checkpoint, activation):
    """Weights and definition of the CLIP in a checkpoint of ours or in what `load` takes."""
    if is_clip_source(str(checkpoint)) or not is_checkpoint(checkpoint):
        model, _ = load(checkpoint, activation=activation)
        definition = model.definition
    else:
        model, content = load_checkpoint(checkpoint)
        definition = {"activation": "quickgelu", **content["definition"]}
        if activation not in (None, definition["activation"]):
            raise ValueError(
                f"{checkpoint}: its activation is {definition['activation']}, not {activation}; "
                "leave out --activation"
            )
    if definition["text"]["layers"] == 0:
        raise ValueError(f"{checkpoint}: no other program has a text tower without layers")
    with torch.device("meta"):  # names only, no memory
        names = CLIP(definition).state_dict()
    weights = model.state_dict()
    return {name: weights[name].contiguous() for name in names}, definition


def _save(weights, path):
    if path.suffix != ".safetensors":
        torch.save(weights, path)
        return
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(weights, path, metadata={"format": "pt"})  # which transformers asks for
    except SafetensorError as error:
        raise OSError(str(error)) from None


def how_to_load(out, naming, definition):
    """Lines that say which calls of which program load an exported CLIP."""
    activation, size = definition["activation"], definition["image_size"]
    lines = [f"clip.load('{out}', activation='{activation}')  # this project"]
    if naming == "huggingface":
        return [f"clip.load('{out}')  # this project", f"CLIPModel.from_pretrained('{out}')"]
    arguments = f"pretrained='{out}', force_image_size={size}"
    if activation == "quickgelu":
        arguments += ", force_quick_gelu=True"
    name = definition["name"]
    if not name.startswith(("ViT-", "RN")):  # those in models/ have open_clip's names
        name = f"a model of the sizes in models/{name}.json"
    lines.append(f"open_clip.create_model('{name}', {arguments})")
    if activation == "quickgelu" and _heads_of_64(definition) and Path(out).suffix == ".pt":
        lines.append(f"clip.load('{out}')  # OpenAI's package, which rounds to half precision")
    return lines


def _heads_of_64(definition):
    """Whether the heads are those that OpenAI's loader derives from the widths."""
    vision, text = definition["vision"], definition["text"]
    width = vision["width"] * (32 if isinstance(vision["layers"], list) else 1)
    return (width, text["width"]) == (64 * vision["heads"], 64 * text["heads"])


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Write a CLIP for other programs.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("export", help="the CLIP part of a checkpoint, adapters merged")
    command.add_argument("--checkpoint", required=True, help="ours, or what clip.load takes")
    command.add_argument("--out", required=True, help="a .pt or .safetensors file, or a folder")
    command.add_argument(
        "--naming",
        choices=("openai", "huggingface"),
        default="openai",
        help="openai: one file, for open_clip too; huggingface: a new folder for transformers",
    )
    command.add_argument("--activation", choices=ACTIVATIONS, help="where weights do not tell it")
    options = parser.parse_args(arguments)
    out, naming = options.out, options.naming
    definition = export(options.checkpoint, out, naming, options.activation)
    print(f"{out}: the CLIP of {options.checkpoint}, activation {definition['activation']}")
    print("\n".join(["load it with", *how_to_load(out, naming, definition)]))


if __name__ == "__main__":
    main()
