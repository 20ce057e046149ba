"""Weights of other projects: their files, their names of parameters, OpenAI's download.

Inside this project a CLIP's parameters have OpenAI's names (https://github.com/openai/CLIP).
open_clip (https://github.com/mlfoundations/open_clip) has the same, with its text tower below
`text.` in some models. Hugging Face's `CLIPModel` (https://github.com/huggingface/transformers) has
names of its own, keeps queries, keys and values apart, and projections transposed.
"""

import hashlib
import http.client
import os
import re
import secrets
import struct
import urllib.request
import zipfile
from pathlib import Path

import torch
from tqdm import tqdm

OPENAI_URL = "https://openaipublic.azureedge.net/clip/models"
OPENAI = {  # name: SHA-256 of its file, which is part of the URL
    "ViT-B/32": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    "ViT-B/16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    "ViT-L/14": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    "ViT-L/14@336px": "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
    "RN50": "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762",
    "RN101": "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599",
}
# ------------------------------------------------------------------ files


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


# ------------------------------------------------------------------ OpenAI's download


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


# ------------------------------------------------------------------ names of parameters

# Field of a definition: (field of the library's configuration, its default, which files leave out)
HF_FIELDS = {
    "vision": {
        "patch_size": ("patch_size", 32),
        "width": ("hidden_size", 768),
        "layers": ("num_hidden_layers", 12),
        "heads": ("num_attention_heads", 12),
    },
    "text": {
        "context_length": ("max_position_embeddings", 77),
        "vocab_size": ("vocab_size", 49408),
        "width": ("hidden_size", 512),
        "layers": ("num_hidden_layers", 12),
        "heads": ("num_attention_heads", 8),
    },
}
HF_ACTIVATIONS = {"quick_gelu": "quickgelu", "gelu": "gelu"}  # Hugging Face's name: ours
_NAMES = (  # OpenAI's, Hugging Face's
    ("visual.conv1", "vision_model.embeddings.patch_embedding"),
    ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("visual.ln_pre", "vision_model.pre_layrnorm"),
    ("visual.transformer.resblocks", "vision_model.encoder.layers"),
    ("visual.ln_post", "vision_model.post_layernorm"),
    ("visual.proj", "visual_projection.weight"),
    ("token_embedding", "text_model.embeddings.token_embedding"),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("transformer.resblocks", "text_model.encoder.layers"),
    ("ln_final", "text_model.final_layer_norm"),
    ("text_projection", "text_projection.weight"),
)
_IN_BLOCK = (
    ("ln_1", "layer_norm1"),
    ("ln_2", "layer_norm2"),
    ("mlp.c_fc", "mlp.fc1"),
    ("mlp.c_proj", "mlp.fc2"),
    ("attn", "self_attn"),
)
_TRANSPOSED = {"visual_projection.weight", "text_projection.weight"}
_NO_WEIGHTS = {"input_resolution", "context_length", "vocab_size", "attn_mask"}


def _renamed(name, back=False):
    """A parameter's name, from Hugging Face's to OpenAI's or back; unknown ones as they are."""
    name = _exchanged(name, _NAMES, back)
    block = re.fullmatch(r"(.+\.(?:resblocks|layers)\.\d+\.)(.+)", name)
    return block[1] + _exchanged(block[2], _IN_BLOCK, back) if block else name


def _exchanged(name, pairs, back):
    for ours, theirs in pairs:
        old, new = (ours, theirs) if back else (theirs, ours)
        if name == old or name.startswith(f"{old}."):
            return new + name[len(old) :]
    return name


def _full(state):
    """The tensors in float32, the temperature as a scalar."""
    state = {n: t.float() if t.is_floating_point() else t for n, t in state.items()}
    if state.get("logit_scale", torch.empty(0)).numel() == 1:
        state["logit_scale"] = state["logit_scale"].reshape(())
    return state


def from_open_clip(state):
    """A state dict in open_clip's or OpenAI's naming, in OpenAI's and float32.

    Sizes and the attention mask, which some files list beside the weights, are left out.
    """
    renamed = {name.removeprefix("text."): tensor for name, tensor in state.items()}
    return _full({name: tensor for name, tensor in renamed.items() if name not in _NO_WEIGHTS})


def from_hugging_face(state):
    """A state dict in the naming of Hugging Face's CLIPModel, in OpenAI's and float32.

    Names that no CLIPModel has stay as they are. Raises ValueError where queries, keys and values
    do not go together.
    """
    result = {}
    for name, tensor in state.items():
        if not name.endswith(".position_ids"):  # counts from 0, in files of older versions
            turn = name in _TRANSPOSED and tensor.ndim == 2
            result[_renamed(name)] = tensor.T if turn else tensor
    for name in [name for name in result if ".attn.q_proj." in name]:
        parts = [name.replace(".q_proj.", f".{part}_proj.") for part in "qkv"]
        if all(part in result for part in parts):
            tensors = [result.pop(part) for part in parts]
            shapes = {tuple(tensor.shape) for tensor in tensors}
            if len(shapes) > 1 or () in shapes:
                raise ValueError(f"{', '.join(parts)}: of the shapes {sorted(shapes)}")
            result[name.replace(".q_proj.", ".in_proj_")] = torch.cat(tensors)
    return _full(result)


def to_hugging_face(state, definition):
    """State dict and configuration, as dicts, of a Hugging Face CLIPModel.

    state: in OpenAI's naming; definition: see towers.py. Raises ValueError for a ModifiedResNet,
    which Hugging Face does not have.
    """
    if isinstance(definition["vision"]["layers"], list):
        raise ValueError(f"{definition['name']}: Hugging Face's CLIPModel has no ModifiedResNet")
    result = {}
    for name, tensor in state.items():
        if ".attn.in_proj_" in name:
            for part, third in zip("qkv", tensor.chunk(3), strict=True):
                split = _renamed(name.replace(".in_proj_", f".{part}_proj."), back=True)
                result[split] = third.clone()
        else:
            new = _renamed(name, back=True)
            result[new] = (tensor.T if new in _TRANSPOSED else tensor).contiguous()
    return result, _hugging_face_config(definition)


def _hugging_face_config(definition):
    width = definition["embed_dim"]
    config = {"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": width}
    activation = definition.get("activation", "quickgelu")
    for tower, fields in HF_FIELDS.items():
        part = {theirs: definition[tower][ours] for ours, (theirs, _) in fields.items()}
        config[f"{tower}_config"] = {
            **part,
            "intermediate_size": 4 * part["hidden_size"],
            "hidden_act": next(k for k, ours in HF_ACTIVATIONS.items() if ours == activation),
            "layer_norm_eps": 1e-5,
            "projection_dim": width,
        }
    config["vision_config"]["image_size"] = definition["image_size"]
    start = definition["text"]["vocab_size"] - 2  # the last two tokens are start and end
    config["text_config"] |= {"bos_token_id": start, "eos_token_id": start + 1}
    return config
