"""CLIP for users: load, tokenize, preprocess. The interface of OpenAI's `clip` package.

    import clip
    model, preprocess = clip.load("models/ViT-B-32.pt", device="cpu")
    features = model.encode_text(clip.tokenize(["six storage tanks beside a road"]))

The module shadows the PyPI package of the same name: run from the root of this project.
"""

from functools import lru_cache
from pathlib import Path

import torch
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from model import MODELS, definition_names, read_definition, read_weights
from simple_tokenizer import SimpleTokenizer
from towers import CLIP

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
_SIZES = {"input_resolution", "context_length", "vocab_size"}  # in OpenAI's archives, no weights
_OPENAI_NAMES = {
    "ViT-B/32": "ViT-B-32",
    "ViT-B/16": "ViT-B-16",
    "ViT-L/14": "ViT-L-14",
    "ViT-L/14@336px": "ViT-L-14-336",
    "RN50": "RN50",
    "RN101": "RN101",
}


def available_models():
    """OpenAI's names that `load` takes, each for the weights `models/<name>.pt`."""
    return list(_OPENAI_NAMES)


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


def _definitions_of(weights):
    """The definitions in `models/` whose shapes are those of a state dict."""
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    matches = []
    for definition in map(read_definition, definition_names()):
        with torch.device("meta"):  # shapes only, no memory
            expected = CLIP(definition).state_dict()
        if shapes == {key: tuple(tensor.shape) for key, tensor in expected.items()}:
            matches.append(definition)
    return matches


def load(name_or_path, device="cpu"):
    """A CLIP and its preprocessing, as OpenAI's `clip.load`.

    Parameters
    ----------
    name_or_path : str
        One of `available_models()` (weights expected at `models/<name>.pt`), or the path of a state
        dict in OpenAI's naming whose shapes match a definition in `models/`. The towers use
        QuickGELU, as OpenAI's weights need; weights trained with GELU give wrong features.
    device : str or torch.device

    Returns
    -------
    (model, preprocess) : the model in eval mode, fp32, with its `definition`; and a transform of a
        PIL image to a (3, image_size, image_size) tensor

    Raises
    ------
    ValueError where there is no such file, or its shapes fit no definition
    """
    name = _OPENAI_NAMES.get(str(name_or_path))
    path = MODELS / f"{name}.pt" if name else Path(name_or_path)
    if not path.is_file():
        raise ValueError(
            f"{name_or_path}: no weights at {path}; put OpenAI's state dict there, or name a "
            f"file. Known names: {', '.join(available_models())}"
        )
    weights = read_weights(path)
    if not isinstance(weights, dict) or not all(torch.is_tensor(t) for t in weights.values()):
        raise ValueError(f"{path}: expected a plain state dict, a dict of tensors")
    weights = {name: tensor for name, tensor in weights.items() if name not in _SIZES}
    matches = _definitions_of(weights)
    if len(matches) > 1:
        names = ", ".join(definition["name"] for definition in matches)
        raise ValueError(f"{path}: the shapes fit {names} alike; keep one of them in {MODELS}")
    if not matches:
        shapes = "\n".join(f"  {key} {tuple(tensor.shape)}" for key, tensor in weights.items())
        raise ValueError(
            f"{path}: the shapes fit none of {', '.join(definition_names())} "
            f"in OpenAI's naming:\n{shapes}"
        )
    definition = matches[0]
    model = CLIP(definition)
    model.load_state_dict(weights)
    model.definition = definition
    return model.float().to(device).eval(), preprocess(definition["image_size"])
