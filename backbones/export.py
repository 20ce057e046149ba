"""A CLIP's weights in the forms that other programs load; `python clip.py export` writes them.

- open_clip: a state dict in OpenAI's naming, `.safetensors` or else torch.save's;
- openai: a TorchScript archive with the same names. The loader of OpenAI's package takes nothing
  else, since it opens a file once and reads it twice; open_clip's `create_model` takes no archives;
- huggingface: a folder that `CLIPModel.from_pretrained` takes.
"""

import json
import warnings

import torch

from backbones.naming import to_hugging_face
from backbones.towers import CLIP, vision_channels
from writing import written_whole

# model configs in models/ that open_clip has by the same name

OPEN_CLIP = ("RN50", "RN101", "ViT-B-16", "ViT-B-32", "ViT-L-14", "ViT-L-14-336", "ViT-H-14")


def check_out(out, naming):
    """ValueError where nothing can be written to a path; makes the folder that it lies in."""
    if naming == "huggingface" and out.exists():
        raise ValueError(f"{out}: exists; name a new folder with --out")
    if out.is_dir():
        raise ValueError(f"{out}: a folder; name a file with --out, as {out / 'clip.pt'}")
    if naming == "openai" and out.suffix == ".safetensors":
        raise ValueError(f"{out}: OpenAI's package reads no .safetensors; name a .pt with --out")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"{out}: its folder cannot be made ({error.strerror}); name another with --out"
        ) from None


def write(weights, model_config, out, naming):
    """Write weights in OpenAI's naming to a path that `check_out` has passed, whole or not at all.

    Raises ValueError where there is no such form of them, OSError where it is not written.
    """
    with written_whole(out) as temporary:
        if naming == "huggingface":
            _save_folder(weights, model_config, temporary)
        elif naming == "openai":
            _save_archive(weights, model_config, temporary)
        elif out.suffix == ".safetensors":
            _save_safetensors(weights, temporary)
        else:
            torch.save(weights, temporary)


def _save_safetensors(weights, path):
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(weights, path, metadata={"format": "pt"})  # which transformers asks for
    except SafetensorError as error:
        raise OSError(str(error)) from None


def _save_folder(weights, model_config, path):
    state, config = to_hugging_face(weights, model_config)
    path.mkdir()
    _save_safetensors(state, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _save_archive(weights, model_config, path):
    """Loaders take its parameters alone: that it was traced with one image and text is no limit."""
    vision, text = model_config["vision"], model_config["text"]
    widths = (vision_channels(vision), text["width"])  # OpenAI's loader derives the heads
    heads_of_64 = widths == (64 * vision["heads"], 64 * text["heads"])
    if model_config["activation"] != "quickgelu" or not heads_of_64:
        raise ValueError(
            f"{model_config['name']}: OpenAI's package has quickgelu and heads of 64 channels only "
            "and would build another network; take --naming open_clip"
        )
    network = CLIP(model_config).eval()
    network.load_state_dict(weights)
    image_size = model_config["image_size"]
    inputs = {
        "encode_image": torch.zeros(1, 3, image_size, image_size),
        "encode_text": torch.zeros(1, text["context_length"], dtype=torch.long),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates TorchScript, OpenAI's loader stays
        archive = torch.jit.trace_module(network, inputs, check_trace=False)
        with open(path, "xb") as file:  # given a path, torch aborts where the disk is full
            torch.jit.save(archive, file)


def how_to_load(out, naming, model_config):
    """Lines of Python, with comments, that load what `write` has written."""
    path, name, activation = repr(str(out)), model_config["name"], model_config["activation"]
    if naming == "huggingface":
        return [f"clip.load({path})  # this project", f"CLIPModel.from_pretrained({path})"]
    if naming == "openai":
        return [
            f"clip.load({path})  # this project",
            f"clip.load({path})  # OpenAI's package, which rounds to half precision",
            f"open_clip.load_openai_model({path})  # rounds too",
        ]
    options = f"pretrained={path}, force_image_size={model_config['image_size']}"
    if activation == "quickgelu":
        options += ", force_quick_gelu=True"
    open_clips = f"open_clip.create_model({name!r}, {options})"
    if name not in OPEN_CLIP:
        open_clips = (
            f"# open_clip: describe the sizes in models/{name}.json to open_clip.add_model_config, "
            f"then create_model(NAME, {options})"
        )
    return [f"clip.load({path}, activation='{activation}')  # this project", open_clips]
