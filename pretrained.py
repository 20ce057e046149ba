"""Where a CLIP comes from: a file, a folder or the Hugging Face hub, in anybody's naming.

    source = read_source(find_hub("hf-hub:owner/name:RemoteCLIP-ViT-B-32.pt"))

Beside the weights a source may tell the activation that they were trained with; see `Source`.
"""

import json
import re
import warnings
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch

from towers import ACTIVATIONS, CLIP
from weights import (
    HF_ACTIVATIONS,
    HF_FIELDS,
    OPENAI,
    from_hugging_face,
    from_open_clip,
    read_weights,
    script,
)

HUB = "hf-hub:"  # what a name on the Hugging Face hub begins with


class Source(NamedTuple):
    """A CLIP as somebody saved it."""

    path: Path  # of the file with the weights
    weights: dict  # a state dict in OpenAI's naming, float32
    activation: str | None  # "quickgelu" or "gelu"; None where the source does not tell
    stated: dict  # the definition (see towers.py) by a configuration beside the file, if any


# ------------------------------------------------------------------ the Hugging Face hub


def find_hub(spec):
    """The local path of a file on the Hugging Face hub, with its configurations beside it.

    spec: `hf-hub:owner/name[@revision][:path/in/repo]`; the path may be left out where the
    repository holds one file of weights. huggingface_hub keeps what it downloads in its cache; a
    file there that is named with its path is taken without asking for a newer one. Raises
    ValueError that names the spec.
    """
    form = re.fullmatch(HUB + r"([^/@:]+/[^/@:]+)(?:@([^:]+))?(?::(.+))?", spec)
    if not form:
        raise ValueError(f"{spec}: expected {HUB}owner/name[@revision][:path/in/repo]")
    repository, revision, path = form.groups()
    path = path or _only_file(spec, repository, revision)
    try:
        for name in _CONFIGS:
            _fetch(repository, revision, str(PurePosixPath(path).with_name(name)), optional=True)
        return Path(_fetch(repository, revision, path))
    except Exception as error:  # httpx's, requests' or the hub's own, by version
        raise _not_found(spec, error) from None


def _fetch(repository, revision, path, optional=False):
    """The local path of a file of a repository; None for one that is optional and not there."""
    from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.utils import EntryNotFoundError

    known = try_to_load_from_cache(repository, path, revision=revision)
    if isinstance(known, str):
        return known
    if optional and known is _CACHED_NO_EXIST:
        return None
    try:
        return hf_hub_download(repository, path, revision=revision)
    except EntryNotFoundError:
        if optional:
            return None
        raise


def _not_found(spec, error):
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return ValueError(
        f"{spec}: not on the hub, or no network ({reason}); check the name, or download the file "
        "by other means and give its path"
    )


def _only_file(spec, repository, revision):
    """The path of the one file of weights in a repository."""
    from huggingface_hub import HfApi

    try:
        files = HfApi().list_repo_files(repository, revision=revision)
    except Exception as error:
        raise _not_found(spec, error) from None
    found = sorted(f for f in files if f.endswith((".pt", ".pth", ".bin", ".safetensors")))
    if len(found) != 1:
        listed = ", ".join(found) or "no .pt, .pth, .bin or .safetensors"
        raise ValueError(
            f"{spec}: expected one file of weights, the repository has {listed}; name one: "
            f"{spec}:{found[0] if found else 'PATH'}"
        )
    return found[0]


# ------------------------------------------------------------------ files and folders


def read_source(path):
    """A Source from a file, or from a folder as `save_pretrained` or open_clip writes it.

    Takes TorchScript archives, torch.save's files without code and `.safetensors`; a state dict
    bare or under `state_dict`, names with or without `module.`, in any of the three namings. A
    folder's `.safetensors` is preferred to its `.bin`, as Hugging Face does. A configuration
    beside the file, `config.json` or `open_clip_config.json` by its naming, tells the activation
    and sizes. Raises ValueError that names the file.
    """
    path = Path(path)
    path = _file_in(path) if path.is_dir() else path
    if not path.is_file():
        raise ValueError(
            f"{path}: no such file; expected a file or folder of weights, {HUB}owner/name, or one "
            f"of {', '.join(OPENAI)}"
        )
    state, activation = _read_state(path)
    weights, config = _converted(path, state)
    if activation is not None or not config.is_file():
        return Source(path, weights, activation, {})
    try:
        stated = _CONFIGS[config.name](json.loads(config.read_text(encoding="utf-8")))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{config}: {type(error).__name__}: {error}") from None
    return Source(path, weights, stated.pop("activation"), stated)


def _converted(path, state):
    """Weights in OpenAI's naming, and the path of the configuration that goes with the file's."""
    while state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    if any(name.startswith(("vision_model.", "text_model.")) for name in state):
        return from_hugging_face(state), path.with_name("config.json")
    if any(name.startswith("visual.") for name in state):
        return from_open_clip(state), path.with_name("open_clip_config.json")
    names = ", ".join(list(state)[:8]) or "none"
    raise ValueError(f"{path}: no CLIP of OpenAI, open_clip or Hugging Face; names: {names}")


def _file_in(folder):
    """The file of weights in a folder with a Hugging Face or an open_clip model."""
    stems = (("model", "pytorch_model"), ("open_clip_model", "open_clip_pytorch_model"))
    found = []
    for safe, pickled in stems:
        files = [folder / f"{safe}.safetensors", folder / f"{pickled}.bin"]
        found += [file for file in files if file.is_file()][:1]
    if len(found) == 1:
        return found[0]
    if parts := sorted(folder.glob("*.index.json")):
        raise ValueError(
            f"{parts[0]}: weights in several parts; save them in one: "
            "save_pretrained(FOLDER, max_shard_size='100GB')"
        )
    names = [f"{safe}.safetensors or {pickled}.bin" for safe, pickled in stems]
    listed = " and ".join(file.name for file in found) or "none"
    raise ValueError(f"{folder}: expected one of {', '.join(names)}; found {listed}; name a file")


def _read_state(path):
    """A file's state dict as it is, and the activation where the file itself tells it."""
    code, activation = script(path), None
    if code is not None:
        state, activation = _run_archive(path), "gelu" if "torch.gelu(" in code else "quickgelu"
    elif path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            state = load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: broken, no .safetensors ({error})") from None
    else:
        state = read_weights(path)
        if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
            state = state["state_dict"]
    if not isinstance(state, dict) or not all(map(torch.is_tensor, state.values())):
        holds = ", ".join(map(str, [*state][:8])) if isinstance(state, dict) else type(state)
        raise ValueError(f"{path}: expected a state dict, tensors by name; it holds {holds}")
    return state, activation


def _run_archive(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates TorchScript, OpenAI's files stay
        try:
            return torch.jit.load(path, map_location="cpu").state_dict()
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{path}: a broken TorchScript archive ({reason})") from None


# ------------------------------------------------------------------ configurations


def _stated_by_hugging_face(config):
    stated, activations = {"embed_dim": config.get("projection_dim", 512)}, {}
    for tower, fields in HF_FIELDS.items():
        part = {**config[f"{tower}_config"], **(config.get(f"{tower}_config_dict") or {})}
        stated[tower] = {ours: part.get(*theirs) for ours, theirs in fields.items()}
        activations[tower] = part.get("hidden_act", "quick_gelu")
        if part.get("layer_norm_eps", 1e-5) != 1e-5:
            raise ValueError(f"{tower}_config: layer_norm_eps {part['layer_norm_eps']}, only 1e-5")
    if len(set(activations.values())) > 1 or activations["text"] not in HF_ACTIVATIONS:
        raise ValueError(f"hidden_act {activations}, only quick_gelu or gelu for both towers")
    return {**stated, "activation": HF_ACTIVATIONS[activations["text"]]}


_OPEN_CLIP = {
    "vision": {"patch_size": 16, "width": 768, "layers": 12},
    "text": {"context_length": 77, "vocab_size": 49408, "width": 512, "layers": 12, "heads": 8},
}
_OTHER = {  # what a configuration may say besides: another value makes another network
    "head_width": None,
    "image_size": None,
    "patch_dropout": None,  # in training only
    "output_tokens": None,
    "mlp_ratio": (4,),
    "pool_type": ("tok", "argmax"),
}


def _stated_by_open_clip(config):
    config = config["model_cfg"]
    stated = {"embed_dim": config["embed_dim"]}
    for tower, defaults in _OPEN_CLIP.items():
        part = config[f"{tower}_cfg"]
        for key in part.keys() - defaults.keys():
            if part[key] and key not in _OTHER or _OTHER.get(key) and part[key] not in _OTHER[key]:
                raise ValueError(f"{tower}_cfg: {key} {part[key]} is not in this project's towers")
        stated[tower] = {key: part.get(key, default) for key, default in defaults.items()}
    vision, head_width = stated["vision"], config["vision_cfg"].get("head_width", 64)
    channels = vision["width"]
    if isinstance(vision["layers"], list):
        channels *= 32
        del vision["patch_size"]
    vision["heads"] = channels // head_width
    return {**stated, "activation": "quickgelu" if config.get("quick_gelu") else "gelu"}


_CONFIGS = {"config.json": _stated_by_hugging_face, "open_clip_config.json": _stated_by_open_clip}


# ------------------------------------------------------------------ what is to hold


def check(source, definition):
    """ValueError where names, shapes or the configuration are not those of a definition."""
    with torch.device("meta"):  # shapes only, no memory
        expected = CLIP(definition).state_dict()
    problems = {
        "missing": [name for name in expected if name not in source.weights],
        "unexpected": [name for name in source.weights if name not in expected],
        "of another shape": [
            f"{name} {tuple(tensor.shape)} instead of {tuple(expected[name].shape)}"
            for name, tensor in source.weights.items()
            if name in expected and tensor.shape != expected[name].shape
        ],
        "stated in the configuration beside it": [
            f"{key} {stated} instead of {definition[key]}"
            for key, stated in source.stated.items()
            if stated != definition[key]
        ],
    }
    if any(problems.values()):
        found = "; ".join(f"{kind}: {', '.join(n)}" for kind, n in problems.items() if n)
        raise ValueError(f"{source.path}: not the parameters of {definition['name']}; {found}")


def pick_activation(source, wanted):
    """The activation of a source's towers; wanted: what the user says it is, or None.

    Raises ValueError where both tell it and differ, or neither does.
    """
    if wanted not in (None, *ACTIVATIONS):
        raise ValueError(f"activation '{wanted}': expected one of {', '.join(ACTIVATIONS)}")
    if source.activation is None and wanted is None:
        raise ValueError(
            f"{source.path}: nothing in it tells the activation it was trained with, and the wrong "
            "one gives other features; OpenAI's weights and RemoteCLIP's retrieval script have "
            "quickgelu, open_clip's plain ViT-B-32 and most of LAION's gelu: say which by "
            "--activation quickgelu|gelu, in Python load(..., activation=...)"
        )
    if source.activation and wanted not in (None, source.activation):
        raise ValueError(
            f"{source.path}: its activation is {source.activation}, not {wanted}; leave out "
            "--activation"
        )
    return wanted or source.activation
