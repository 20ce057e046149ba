"""Where a CLIP comes from: a file, a folder or the Hugging Face hub, in anybody's naming.

    source = read_source(find_hub("hf-hub:owner/name:RemoteCLIP-ViT-B-32.pt"))

Beside the weights a source may tell the activation that they were trained with; see `Source`.
"""

import hashlib
import http.client
import json
import os
import re
import secrets
import struct
import urllib.request
import warnings
import zipfile
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch
from tqdm import tqdm

from backbones.naming import HF_ACTIVATIONS, HF_FIELDS, from_hugging_face, from_open_clip
from backbones.towers import CLIP

HUB = "hf-hub:"  # what a name on the Hugging Face hub begins with


FILES = {  # configuration: the files of weights that its library writes beside it
    "config.json": ("model.safetensors", "pytorch_model.bin"),
    "open_clip_config.json": ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
}


class Source(NamedTuple):
    """A CLIP as somebody saved it."""

    path: Path  # of the file with the weights
    weights: dict  # a state dict in OpenAI's naming, float32
    activation: str | None  # "quickgelu" or "gelu"; None where the source does not tell
    stated: dict  # the definition (see towers.py) by a configuration beside the file, if any
    config: Path | None = None  # that configuration


# ------------------------------------------------------------------ the Hugging Face hub


def find_hub(spec, endpoint=None, cache_dir=None):
    """The local path of a file on the Hugging Face hub, with its configuration beside it.

    spec: `hf-hub:owner/name[@revision][:path/in/repo]`; the path may be left out where the
    repository holds one file of weights. huggingface_hub keeps what it downloads in its cache; a
    file there that is named with its path is taken without asking for a newer one. endpoint and
    cache_dir: others than huggingface_hub's own. Raises ValueError that names the spec.
    """
    form = re.fullmatch(HUB + r"([^/@:]+/[^/@:]+)(?:@([^:]+))?(?::(.+))?", spec)
    if not form:
        raise ValueError(f"{spec}: expected {HUB}owner/name[@revision][:path/in/repo]")
    repository, revision, path = form.groups()
    where = {"repo_id": repository, "revision": revision, "cache_dir": cache_dir}
    path = path or _only_file(spec, repository, revision, endpoint)
    try:
        found, cached = _fetch(path, endpoint, where)
        for config in (config for config, files in FILES.items() if found.name in files):
            config = str(PurePosixPath(path).with_name(config))
            _fetch_config(config, endpoint, where, cached)
        return found
    except Exception as error:  # httpx's, requests' or the hub's own, by version
        raise _not_found(spec, error) from None


def _fetch(path, endpoint, where):
    """The local path of a file of a repository, and whether it was there before."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    known = try_to_load_from_cache(filename=path, **where)
    if isinstance(known, str):
        return Path(known), True
    return Path(hf_hub_download(filename=path, endpoint=endpoint, **where)), False


def _fetch_config(path, endpoint, where, cached):
    """Put a file that a repository may have into the cache; cached: its weights were there."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError

    if try_to_load_from_cache(filename=path, **where) is not None:  # or known not to be there
        return
    try:
        hf_hub_download(filename=path, endpoint=endpoint, **where)
    except LocalEntryNotFoundError as error:  # no network
        if not cached:
            raise
        print(f"{HUB}{where['repo_id']}: {path} beside it could not be asked for ({_first(error)})")
    except EntryNotFoundError:
        pass


def _not_found(spec, error):
    return ValueError(
        f"{spec}: not on the hub, or no network ({_first(error)}); check the name, or download the "
        "file by other means and give its path"
    )


def _first(error):
    return (str(error) or type(error).__name__).splitlines()[0]


def _only_file(spec, repository, revision, endpoint):
    """The path of the one file of weights in a repository."""
    from huggingface_hub import HfApi

    try:
        files = HfApi(endpoint=endpoint).list_repo_files(repository, revision=revision)
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
    folder's `.safetensors` is preferred to its `.bin`, as Hugging Face does. The configuration
    beside a file tells the activation and sizes where the file has its library's own name, see
    FILES: beside another it may be that of other weights. Raises ValueError that names the file.
    """
    path = Path(path)
    path = _file_in(path) if path.is_dir() else path
    if not path.is_file():
        raise ValueError(
            f"{path}: no such file; expected a file or folder of weights, {HUB}owner/name, or one "
            f"of {', '.join(OPENAI)}"
        )
    state, activation = _read_state(path)
    try:
        weights, name = _converted(state)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    config = path.with_name(name)
    if activation is not None or path.name not in FILES[name] or not config.is_file():
        return Source(path, weights, activation, {})
    try:
        stated = _CONFIGS[name](json.loads(config.read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"{config}: {type(error).__name__}: {error}") from None
    return Source(path, weights, stated.pop("activation"), stated, config)


def _converted(state):
    """Weights in OpenAI's naming, and the name of the configuration that goes with theirs."""
    if any(name.startswith(("vision_model.", "text_model.")) for name in state):
        return from_hugging_face(state), "config.json"
    if any(name.startswith("visual.") for name in state):
        return from_open_clip(state), "open_clip_config.json"
    names = ", ".join(list(state)[:8]) or "none"
    raise ValueError(f"no CLIP of OpenAI, open_clip or Hugging Face; names: {names}")


def _file_in(folder):
    """The file of weights in a folder with a Hugging Face or an open_clip model."""
    found = []
    for names in FILES.values():
        found += [folder / name for name in names if (folder / name).is_file()][:1]
    if len(found) == 1:
        return found[0]
    if parts := sorted(folder.glob("*.index.json")):
        raise ValueError(
            f"{parts[0]}: weights in several parts; save them in one: "
            "save_pretrained(FOLDER, max_shard_size='100GB')"
        )
    expected = ", ".join(" or ".join(names) for names in FILES.values())
    listed = " and ".join(file.name for file in found) or "none"
    raise ValueError(f"{folder}: expected one of {expected}; found {listed}; name a file")


def _read_state(path):
    """A file's state dict in its own naming, and the activation where the file itself tells it."""
    archive, activation = script(path), None
    if archive is not None:
        content, activation = _run_archive(path), activation_of_script(*archive)
    elif path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            content = load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: broken, no .safetensors ({error})") from None
    else:
        content = read_weights(path)
    state = state_dict_in(content)
    if state is None:
        holds = ", ".join(map(str, [*content][:8])) if isinstance(content, dict) else type(content)
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


def _object(config, name, default=None):
    """A field of a configuration that holds fields itself."""
    value = config.get(name) if isinstance(config, dict) else None
    value = default if value is None else value
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {'missing' if value is None else 'no object of fields'}")
    return value


def _stated_by_hugging_face(config):
    stated, activations = {}, []
    for tower, fields in HF_FIELDS.items():
        name = f"{tower}_config"
        part = {**_object(config, name), **_object(config, f"{name}_dict", {})}
        stated[tower] = {ours: part.get(*theirs) for ours, theirs in fields.items()}
        activations.append(part.get("hidden_act", "quick_gelu"))
        if part.get("layer_norm_eps", 1e-5) != 1e-5:
            raise ValueError(f"{name}: layer_norm_eps {part['layer_norm_eps']}, only 1e-5")
    for known, ours in HF_ACTIVATIONS.items():
        if activations == [known, known]:
            width = config.get("projection_dim", 512)
            return {"embed_dim": width, **stated, "activation": ours}
    raise ValueError(f"hidden_act {activations}, only quick_gelu or gelu for both towers")


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
    config = _object(config, "model_cfg")
    if "embed_dim" not in config:
        raise ValueError("model_cfg: embed_dim is missing")
    stated = {"embed_dim": config["embed_dim"]}
    for tower, defaults in _OPEN_CLIP.items():
        part = _object(config, f"{tower}_cfg")
        for key in part.keys() - defaults.keys():
            if part[key] and key not in _OTHER or _OTHER.get(key) and part[key] not in _OTHER[key]:
                raise ValueError(f"{tower}_cfg: {key} {part[key]} is not in this project's towers")
        stated[tower] = {key: part.get(key, default) for key, default in defaults.items()}
    vision, head_width = stated["vision"], config["vision_cfg"].get("head_width", 64)
    for name, value in (("width", vision["width"]), ("head_width", head_width)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"vision_cfg: {name} {value}, expected a whole number above 0")
    channels = vision["width"]
    if isinstance(vision["layers"], list):
        channels *= 32
        del vision["patch_size"]
    vision["heads"] = channels // head_width
    return {**stated, "activation": "quickgelu" if config.get("quick_gelu") else "gelu"}


_CONFIGS = {"config.json": _stated_by_hugging_face, "open_clip_config.json": _stated_by_open_clip}


# ------------------------------------------------------------------ what is to hold


def check(source, model_config):
    """ValueError where names, shapes or the configuration are not those of a definition."""
    with torch.device("meta"):  # shapes only, no memory
        expected = CLIP(model_config).state_dict()
    problems = {
        "missing": [name for name in expected if name not in source.weights],
        "unexpected": [name for name in source.weights if name not in expected],
        "of another shape": [
            f"{name} {tuple(tensor.shape)} instead of {tuple(expected[name].shape)}"
            for name, tensor in source.weights.items()
            if name in expected and tensor.shape != expected[name].shape
        ],
        f"stated in {source.config}": [
            f"{key} {stated} instead of {model_config[key]}"
            for key, stated in source.stated.items()
            if stated != model_config[key]
        ],
    }
    if any(problems.values()):
        found = "; ".join(f"{kind}: {', '.join(n)}" for kind, n in problems.items() if n)
        raise ValueError(f"{source.path}: not the parameters of {model_config['name']}; {found}")


OPENAI_URL = "https://openaipublic.azureedge.net/clip/models"


OPENAI = {  # name: SHA-256 of its file, which is part of the URL
    "ViT-B/32": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    "ViT-B/16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    "ViT-L/14": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    "ViT-L/14@336px": "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
    "RN50": "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762",
    "RN101": "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599",
}


def read_weights(path, mapped=False):
    """torch.load without code, on the CPU; raises ValueError that names the file.

    mapped: leave the tensors on the disk until they are used, where the file's format allows it.
    """
    if script(path) is not None:
        raise ValueError(
            f"{path}: a TorchScript archive, no checkpoint; clip.load and --clip read it"
        )
    mapped = mapped and zipfile.is_zipfile(path)  # torch's older format cannot
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch raises EOFError, KeyError, RuntimeError, UnpicklingError ...
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            raise ValueError(
                f"{path}: reading it would run code from the file ({code[1]}), which is refused; "
                "ask for a plain state dict or a .safetensors file"
            ) from None
        kind = type(error).__name__
        raise ValueError(f"{path}: broken, or more than tensors and numbers ({kind})") from None


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


def script(path):
    """Code and small constants, bytes each, of a TorchScript archive; None for any other file."""
    try:
        with zipfile.ZipFile(path) as archive:
            files = {file.filename: file.file_size for file in archive.infolist()}
            code = [name for name in files if "/code/" in name]
            small = [name for name in files if "/constants/" in name and files[name] <= 8]
            if not code:
                return None
            text = b"".join(archive.read(name) for name in code if name.endswith(".py"))
            return text.decode(errors="replace"), [archive.read(name) for name in small]
    except (OSError, zipfile.BadZipFile):
        return None


def activation_of_script(code, constants):
    """ "quickgelu" or "gelu" by what `script` returns; None where it is neither or both of them."""
    # a traced 1.702 * x keeps its number among the constants, a scripted one in the code
    numbers = [struct.unpack(_NUMBERS[len(c)], c)[0] for c in constants if len(c) in _NUMBERS]
    quick = re.search(r"(?<![\d.])1\.702(?!\d)", code) or any(
        abs(number - 1.702) < 1e-3 for number in numbers
    )
    calls, approximate = "torch.gelu(" in code, re.search("approximate=.tanh", code)
    if quick and not calls:
        return "quickgelu"
    return "gelu" if calls and not quick and not approximate else None


_NUMBERS = {8: "<d", 4: "<f", 2: "<e"}  # bytes: double, single or half precision


def find_openai(name, folder, base_url=OPENAI_URL):
    """The path of OpenAI's weights of a name in OPENAI, downloaded where they are nowhere yet.

    Looks into `folder`, where any file of that name is taken as it is, then into the cache of
    OpenAI's own package, `~/.cache/clip`, where files are believed by their SHA-256 only; downloads
    go there. Raises ValueError with URL, digest and folders where that fails, leaving nothing.
    """
    file, digest = re.sub("[/@]", "-", name) + ".pt", OPENAI[name]
    for known in (file, file.replace("336px", "336")):
        if (Path(folder) / known).is_file():
            return Path(folder) / known
    path = Path(os.path.expanduser("~/.cache/clip")) / file
    if path.is_file():
        if _sha256(path) == digest:
            return path
        print(f"{path}: not OpenAI's file, its SHA-256 is another; downloaded again")
    url = f"{base_url}/{digest}/{file}"
    try:
        _download(url, digest, path)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ValueError(
            f"{name}: {url} not downloaded ({error or type(error).__name__}); get the file "
            f"with SHA-256 {digest} by other means and put it as {file} into {folder} or "
            f"{path.parent}"
        ) from None
    return path


def _sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _download(url, digest, path):
    """Put a file at `path` once all of it has arrived and has the right SHA-256."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=30) as response, open(temporary, "xb") as file:
            total = response.length  # None where the server does not say
            with tqdm(desc=path.name, total=total, unit="B", unit_scale=True) as bar:
                while block := response.read(2**16):
                    file.write(block)
                    bar.update(len(block))
        size = temporary.stat().st_size
        if total not in (None, size):
            raise ValueError(f"it ended after {size} of {total} bytes")
        if (found := _sha256(temporary)) != digest:
            raise ValueError(f"what came has the SHA-256 {found}")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
