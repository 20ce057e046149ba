"""CLIP for users: load, tokenize, preprocess, export. The interface of OpenAI's `clip` package.

    import clip
    model, preprocess = clip.load("ViT-B/32", device="cpu")  # OpenAI's, downloaded where missing
    model, preprocess = clip.load("models/RemoteCLIP-ViT-B-32.pt", activation="quickgelu")
    features = model.encode_text(clip.tokenize(["six storage tanks beside a road"]))

    python clip.py export --checkpoint runs/ucm-1/best_model.pth --out plain.pt  # for others

The module shadows the PyPI package of the same name: run from the root of this project.
"""

from options import Parser, add_options


def parse(arguments=None):
    """The options of `clip.py export`."""
    parser = Parser(description="Write a CLIP for other programs.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("export", help="the CLIP part of a checkpoint, adapters merged")
    add_options(command, "export")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    parse()  # --help and mistakes are answered before torch is imported, which takes seconds

import shlex
from pathlib import Path

from backbones.export import check_out, how_to_load, write
from backbones.loading import HUB, OPENAI, find_hub, find_openai, read_source
from backbones.model_configs import resized
from backbones.preprocess import preprocess
from backbones.towers import ACTIVATIONS, CLIP
from model import NEW_LAYERS, is_checkpoint, load_checkpoint
from options import run
from simple_tokenizer import tokenize

__all__ = ["available_models", "export", "load", "preprocess", "tokenize"]


def available_models():
    """OpenAI's names that `load` takes."""
    return list(OPENAI)


def is_clip_source(name):
    """Whether `load` knows a name, a string, without a path: OpenAI's or `hf-hub:...`."""
    return str(name) in OPENAI or str(name).startswith(HUB)


def load(name_or_path, device="cpu", activation=None, image_size=None):
    """A CLIP and its preprocessing, as OpenAI's `clip.load`, from weights in anybody's naming.

    Parameters
    ----------
    name_or_path : str or path
        One of `available_models()`, from `models/` or downloaded by open_clip;
        `hf-hub:owner/name[@revision]:path/in/repo`; or a file or folder, see `read_source`.
    device : str or torch.device
    activation : "quickgelu", "gelu" or None
        What the towers were trained with; needed where the source does not tell it.
    image_size : int, optional
        Side of the images in pixels; other than the weights', see `resized`.

    Returns
    -------
    (model, preprocess) : the model in eval mode, fp32, with its `model_config`, activation
        included, and the `path` of the file that its weights are from; and a transform of a PIL
        image to a (3, image_size, image_size) tensor

    Raises
    ------
    ValueError that names the source, where it is not found or broken, its sizes fit no model config
        in `models/`, its parameters or its configuration are others, or the activation is open; or
        where it is a checkpoint of FG-CROSS
    """
    source = _source(str(name_or_path))
    weights, model_config = source.weights, source.model_config
    activation = agreed_activation(source.path, source.activation, activation)
    model_config = {**model_config, "activation": activation}
    if image_size is not None:
        weights, model_config = resized(weights, model_config, image_size)
    model = CLIP(model_config)
    model.load_state_dict(weights)
    model.model_config = model_config
    model.path = source.path
    return model.to(device).eval(), preprocess(model_config["image_size"])


def _source(name):
    path = name
    if name.startswith(HUB):
        path = find_hub(name)
    elif name in OPENAI:
        path = find_openai(name)
    if is_checkpoint(path):
        raise ValueError(
            f"{path}: an FG-CROSS checkpoint, no plain CLIP; write the CLIP in it by `python "
            f"clip.py export --checkpoint {shlex.quote(str(path))} --out FILE`, then give FILE"
        )
    source = read_source(path)
    if name in OPENAI and source.activation is None:
        source = source._replace(activation="quickgelu")  # of all of OpenAI's
    return source


def agreed_activation(path, told, wanted):
    """The activation of the CLIP in a file; told: what the file says, wanted: what the user says.

    Raises ValueError where both say it and differ, or neither does.
    """
    if wanted not in (None, *ACTIVATIONS):
        raise ValueError(f"activation '{wanted}': expected one of {', '.join(ACTIVATIONS)}")
    if told is None and wanted is None:
        raise ValueError(
            f"{path}: nothing in it tells the activation it was trained with, and the wrong one "
            "gives other features; OpenAI's weights and RemoteCLIP's retrieval script have "
            "quickgelu, open_clip's plain ViT-B-32 and most of LAION's gelu: say which by "
            "--activation quickgelu|gelu, in Python load(..., activation=...)"
        )
    if told and wanted and told != wanted:
        raise ValueError(f"{path}: its activation is {told}, not {wanted}; leave out --activation")
    return told or wanted


def export(checkpoint, out, naming="open_clip", activation=None):
    """Write the CLIP in a checkpoint of ours, or in what `load` takes, for other programs.

    naming: one of export.py's forms. Adapters are merged, the graph branch is left out. Returns
    the model config, with the activation. Raises ValueError where there is no such form of it or no
    such place, OSError where it is not written; then nothing is left.
    """
    out = Path(out)
    check_out(out, naming)
    if is_clip_source(checkpoint) or not is_checkpoint(checkpoint):
        model, _ = load(checkpoint, activation=activation)
        model_config, path = model.model_config, model.path
    else:
        model, content = load_checkpoint(checkpoint)
        model_config, path = content["definition"], checkpoint
        told = model_config.get("activation", "quickgelu")
        model_config = {**model_config, "activation": agreed_activation(path, told, activation)}
    if out.exists() and out.samefile(path):
        raise ValueError(f"{out}: --checkpoint reads this; name another place with --out")
    if model_config["text"]["layers"] == 0:
        raise ValueError(f"{checkpoint}: no other program has a text tower without layers")
    weights = {
        name: tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if name.split(".")[0] not in NEW_LAYERS
    }
    write(weights, model_config, out, naming)
    return model_config


def main(arguments=None):
    options = parse(arguments)
    out, naming = options.out, options.naming
    model_config = export(options.checkpoint, out, naming, options.activation)
    print(f"{out}: the CLIP of {options.checkpoint}, activation {model_config['activation']}")
    print("\n".join(["load it with", *how_to_load(out, naming, model_config)]))


if __name__ == "__main__":
    run(main)
