"""Where a CLIP comes from: OpenAI's names, the Hugging Face hub, a file or a folder, in any naming.

    source = read_source(find_hub("hf-hub:owner/name:RemoteCLIP-ViT-B-32.pt"))

The libraries that own the weights download and read them. Ours is to recognise the naming and the
activation, and to refuse what is not the CLIP it seems to be.
"""

import json
import re
import warnings
import zipfile
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch

from backbones import model_configs
from backbones.naming import HF_ACTIVATIONS, from_hugging_face, from_open_clip
from backbones.towers import vision_channels

HUB = "hf-hub:"  # what a name on the Hugging Face hub begins with

OPENAI = ("ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336px", "RN50", "RN101")  # all quickgelu

FILES = {  # configuration: the files of weights that its library writes beside it
    "config.json": ("model.safetensors", "pytorch_model.bin"),
    "open_clip_config.json": ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
}


class Source(NamedTuple):
    """A CLIP as somebody saved it."""

    path: Path  # of the file with the weights
    weights: dict  # a state dict in OpenAI's naming, float32
    model_config: dict  # without the activation
    activation: str | None  # "quickgelu" or "gelu"; None where the source does not tell


# ------------------------------------------------------------------ downloads


def find_openai(name):
    """The path of OpenAI's weights of a name in OPENAI.

    A file in `models/` with OpenAI's file name, or open_clip's, is taken as it is; else open_clip
    downloads the weights, once, into its cache. Raises ValueError where that fails.
    """
    file = name.replace("/", "-").replace("@", "-") + ".pt"
    open_clips_name = name.replace("/", "-").replace("@336px", "-336")
    for known in (file, f"{open_clips_name}.pt"):
        path = model_configs.MODELS / known
        if path.is_file():
            return path
    try:
        import open_clip  # slow, and needed here alone

        where = open_clip.get_pretrained_cfg(open_clips_name, "openai")
        return Path(open_clip.download_pretrained(where))
    except Exception as error:  # the hub's, urllib's or open_clip's own, by version
        raise ValueError(
            f"{name}: not downloaded ({_first_line(error)}); get OpenAI's {file} by other means "
            f"and put it into {model_configs.MODELS}"
        ) from None


def find_hub(spec):
    """The local path of a file on the Hugging Face hub, with its configuration beside it, if any.

    spec: `hf-hub:owner/name[@revision]:path/in/repo`. huggingface_hub downloads it into its cache.
    Raises ValueError that names the spec.
    """
    form = re.fullmatch(HUB + r"([^/@:]+/[^/@:]+)(?:@([^:]+))?:(.+)", spec)
    if form is None:
        raise ValueError(
            f"{spec}: expected {HUB}owner/name[@revision]:path/in/repo, the path of its weights"
        )
    repository, revision, path = form.groups()
    try:
        return _download(repository, revision, PurePosixPath(path))
    except Exception as error:  # httpx's, requests' or the hub's own, by version
        raise ValueError(
            f"{spec}: not on the hub, or no network ({_first_line(error)}); check the name, or "
            "download the file by other means and give its path"
        ) from None


def _download(repository, revision, path):
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError

    weights = hf_hub_download(repository, str(path), revision=revision)
    for config in [config for config, files in FILES.items() if path.name in files]:
        try:
            hf_hub_download(repository, str(path.with_name(config)), revision=revision)
        except LocalEntryNotFoundError:  # no network: nobody knows whether there is one
            raise
        except EntryNotFoundError:
            pass
    return Path(weights)


def _first_line(error):
    return (str(error) or type(error).__name__).splitlines()[0]


# ------------------------------------------------------------------ files and folders


def read_source(path):
    """A Source from a file, or from a folder as `save_pretrained` or open_clip writes it.

    Takes OpenAI's TorchScript archives, torch.save's files without code and `.safetensors`; a state
    dict bare or under `state_dict`, names with or without `module.`, in any of the three namings. A
    folder's `.safetensors` is preferred to its `.bin`, as Hugging Face does. The configuration
    beside a file is believed where the file has its library's own name, see FILES: beside another
    it may be that of other weights. Raises ValueError that names the file.
    """
    path = Path(path)
    if path.is_dir():
        path = _file_in(path)
    if not path.is_file():
        raise ValueError(
            f"{path}: no such file; expected a file or folder of weights, {HUB}owner/name:path, or "
            f"one of {', '.join(OPENAI)}"
        )
    state = _read_state(path)
    try:
        if any(name.startswith(("vision_model.", "text_model.")) for name in state):
            weights, config = from_hugging_face(state), path.with_name("config.json")
        else:
            weights, config = from_open_clip(state), path.with_name("open_clip_config.json")
        model_config = model_configs.model_config_of(weights)
        model_configs.check_weights(weights, model_config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if is_archive(path):  # OpenAI's, which has no other activation
        return Source(path, weights, model_config, "quickgelu")
    if path.name not in FILES[config.name] or not config.is_file():
        return Source(path, weights, model_config, None)
    return Source(path, weights, model_config, _activation_by(config, model_config))


def _file_in(folder):
    """The file of weights in a folder with a Hugging Face or an open_clip model."""
    found = []
    for names in FILES.values():
        files = [folder / name for name in names if (folder / name).is_file()]
        found += files[:1]
    if len(found) == 1:
        return found[0]
    expected = ", ".join(" or ".join(names) for names in FILES.values())
    listed = " and ".join(file.name for file in found or folder.glob("*.index.json")) or "none"
    raise ValueError(
        f"{folder}: expected one of {expected}; found {listed}; name a file, or save weights that "
        "are in several parts in one: save_pretrained(FOLDER, max_shard_size='100GB')"
    )


def _read_state(path):
    """A file's state dict in its own naming."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if is_archive(path):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch deprecates TorchScript, OpenAI's files stay
                content = torch.jit.load(path, map_location="cpu").state_dict()
        elif path.suffix == ".safetensors":
            content = load_file(path)
        else:
            content = read_weights(path)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise ValueError(f"{path}: broken ({_first_line(error)})") from None
    state = state_dict_in(content)
    if state is None:
        raise ValueError(f"{path}: expected a state dict, tensors by name, and nothing else")
    return state


def read_weights(path, mapped=False):
    """torch.load without code, on the CPU; raises ValueError that names the file.

    mapped: leave the tensors on the disk until they are used, where the file's format allows it.
    """
    if is_archive(path):
        raise ValueError(f"{path}: a TorchScript archive, no checkpoint; clip.load reads it")
    mapped = mapped and zipfile.is_zipfile(path)  # torch's older format cannot
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch raises EOFError, KeyError, RuntimeError, UnpicklingError ...
        reason = f"broken, or more than tensors and numbers ({type(error).__name__})"
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            reason = f"reading it would run code from the file ({code[1]}), which is refused; ask "
            reason += "for a plain state dict or a .safetensors file"
        raise ValueError(f"{path}: {reason}") from None


def is_archive(path):
    """Whether a file is a TorchScript archive; no other format of torch's has a folder of code."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any("/code/" in name for name in archive.namelist())
    except Exception:  # of a damaged one zipfile raises UnicodeDecodeError, NotImplementedError ...
        return False


def state_dict_in(content):
    """The state dict in what a file holds: bare or under `state_dict`; None for anything else.

    `module.`, which DataParallel puts before every name, is left out.
    """
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        return None
    if not all(isinstance(n, str) and torch.is_tensor(t) for n, t in content.items()):
        return None
    while content and all(name.startswith("module.") for name in content):
        content = {name.removeprefix("module."): tensor for name, tensor in content.items()}
    return content


# ------------------------------------------------------------------ configurations


def _activation_by(config, model_config):
    """The activation that the configuration beside some weights states.

    Raises ValueError where it states another network, in heads or what else no tensor tells.
    """
    stated_by = {"config.json": _by_hugging_face, "open_clip_config.json": _by_open_clip}
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
        return stated_by[config.name](content, model_config)
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{config}: {type(error).__name__}: {error}") from None


def _by_hugging_face(config, model_config):
    activations = []
    for tower, default_heads in (("vision", 12), ("text", 8)):
        older = config.get(f"{tower}_config_dict") or {}  # which older versions wrote beside
        section = {**config[f"{tower}_config"], **older}
        stated = section.get("num_attention_heads", default_heads)
        heads = model_config[tower]["heads"]
        if stated != heads:
            raise ValueError(f"{tower}_config: num_attention_heads {stated} instead of {heads}")
        epsilon = section.get("layer_norm_eps", 1e-5)
        if epsilon != 1e-5:
            raise ValueError(f"{tower}_config: layer_norm_eps {epsilon} instead of 1e-5")
        activations.append(section.get("hidden_act", "quick_gelu"))
    for theirs, ours in HF_ACTIVATIONS.items():
        if activations == [theirs, theirs]:
            return ours
    raise ValueError(f"hidden_act {activations}, only quick_gelu or gelu for both towers")


_ANY = {"image_size", "patch_dropout", "output_tokens"}  # another value gives the same features


def _by_open_clip(config, model_config):
    config = config["model_cfg"]
    vision, text = model_config["vision"], model_config["text"]
    head_width = vision_channels(vision) // vision["heads"]
    vision = {**vision, "head_width": head_width, "mlp_ratio": 4, "pool_type": "tok"}
    text = {**text, "mlp_ratio": 4, "pool_type": "argmax"}
    stated_vision = {"head_width": 64, **config["vision_cfg"]}
    stated_text = {"heads": 8, **config["text_cfg"]}
    for stated, tower in ((stated_vision, vision), (stated_text, text)):
        for field, value in stated.items():
            expected = tower.get(field)  # None: this project's towers have no such thing
            if value != expected and (value or expected) and field not in _ANY:
                raise ValueError(f"{field} {value} instead of {expected}")
    return "quickgelu" if config.get("quick_gelu") else "gelu"
