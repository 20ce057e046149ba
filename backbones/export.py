"""A CLIP's weights in the forms that other programs load; `python clip.py export` writes them.

- open_clip: a state dict in OpenAI's naming, `.safetensors` or else torch.save's;
- openai: a TorchScript archive with the same names. The loader of OpenAI's package takes nothing
  else, since it opens a file once and reads it twice; open_clip's `create_model` takes no archives;
- huggingface: a folder that `CLIPModel.from_pretrained` takes.
"""

import errno
import json
import os
import secrets
import shutil
import warnings

import torch

from backbones.naming import to_hugging_face
from backbones.towers import CLIP

# definitions in models/ that open_clip has by the same name

OPEN_CLIP = ("RN50", "RN101", "ViT-B-16", "ViT-B-32", "ViT-L-14", "ViT-L-14-336", "ViT-H-14")


# ------------------------------------------------------------------ writing


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
    if naming == "huggingface":
        save, content = _save_folder, to_hugging_face(weights, model_config)
    elif naming == "openai":
        save, content = _save_archive, _traced(weights, model_config)
    else:
        save = _save_safetensors if out.suffix == ".safetensors" else _save_pickle
        content = weights
    temporary = out.with_name(f".{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        save(content, temporary)
        os.replace(temporary, out)
    except (OSError, RuntimeError) as error:
        raise OSError(f"{out}: not written ({_reason(error)})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if temporary.is_file():
            temporary.unlink()


def _reason(error):
    reason = str(error).splitlines()[0]
    # safetensors tells the number in its text alone
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in reason
    return f"{reason}; the disk is full, make room on it" if full else reason


def _save_pickle(weights, path):
    with open(path, "xb") as file:  # given a path, torch says of a full disk: unexpected position
        torch.save(weights, file)


def _save_archive(network, path):
    with open(path, "xb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as below
        torch.jit.save(network, file)


def _save_safetensors(weights, path):
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(weights, path, metadata={"format": "pt"})  # which transformers asks for
    except SafetensorError as error:
        raise OSError(str(error)) from None


def _save_folder(content, path):
    weights, config = content
    path.mkdir()
    _save_safetensors(weights, path / "model.safetensors")
    text = json.dumps(config, indent=2) + "\n"
    (path / "config.json").write_text(text, encoding="utf-8")


# ------------------------------------------------------------------ OpenAI's package


def _traced(weights, model_config):
    """A CLIP as TorchScript, whose code tells the activation.

    Loaders take its parameters alone: what it was traced with stays its only size of a batch, 1.
    """
    if model_config["activation"] != "quickgelu" or not _heads_of_64(model_config):
        raise ValueError(
            f"{model_config['name']}: OpenAI's package has quickgelu and heads of 64 channels only "
            "and would build another network; take --naming open_clip"
        )
    network = CLIP(model_config).eval()
    network.load_state_dict(weights)
    size, length = model_config["image_size"], model_config["text"]["context_length"]
    inputs = {
        "encode_image": torch.zeros(1, 3, size, size),
        "encode_text": torch.zeros(1, length, dtype=torch.long),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates TorchScript, OpenAI's loader stays
        return torch.jit.trace_module(network, inputs, check_trace=False)


def _heads_of_64(model_config):
    """Whether the heads are those that OpenAI's loader derives from the widths."""
    vision, text = model_config["vision"], model_config["text"]
    width = vision["width"] * (32 if isinstance(vision["layers"], list) else 1)
    return (width, text["width"]) == (64 * vision["heads"], 64 * text["heads"])


# ------------------------------------------------------------------ reading it elsewhere


def how_to_load(out, naming, model_config):
    """Lines of Python, with comments, that load what `write` has written."""
    path, activation = repr(str(out)), model_config["activation"]
    if naming == "huggingface":
        return [f"clip.load({path})  # this project", f"CLIPModel.from_pretrained({path})"]
    if naming == "openai":
        return [
            f"clip.load({path})  # this project",
            f"clip.load({path})  # OpenAI's package, which rounds to half precision",
            f"open_clip.load_openai_model({path})  # rounds too",
        ]
    ours = f"clip.load({path}, activation='{activation}')  # this project"
    return [ours, _open_clips_call(path, activation, model_config)]


def _open_clips_call(path, activation, model_config):
    arguments = f"pretrained={path}, force_image_size={model_config['image_size']}"
    if activation == "quickgelu":
        arguments += ", force_quick_gelu=True"
    name = model_config["name"]
    if name in OPEN_CLIP:
        return f"open_clip.create_model({name!r}, {arguments})"
    return (
        f"# open_clip: describe the sizes in models/{name}.json to open_clip.add_model_config, "
        f"then create_model(NAME, {arguments})"
    )
