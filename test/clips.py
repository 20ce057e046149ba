"""Small CLIPs of ours and of other libraries, with random weights, and how far apart they are."""

import open_clip
import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPConfig, CLIPModel

import clip
from backbones.towers import vision_channels

TOLERANCE = 1e-5  # of unit features in fp32
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 48, "layers": 3, "heads": 3}
VIT = {
    "embed_dim": 24,
    "image_size": 48,
    "vision": {"patch_size": 16, "width": 128, "layers": 3, "heads": 2},
    "text": TEXT,
}
RESNET = {
    "embed_dim": 24,
    "image_size": 96,
    "vision": {"width": 16, "layers": [2, 1, 2, 1], "heads": 8},
    "text": TEXT,
}
MODEL_CONFIGS = {"vit": VIT, "resnet": RESNET}
SENTENCES = [
    "six storage tanks",
    "",
    "There are two tennis courts and a baseball field on grey pavement .",
    "many words " * 50,
]


def randomise(network):
    """Move every vector and every BatchNorm statistic away from where it starts."""
    for name, parameter in network.named_parameters():
        if parameter.ndim < 2 and name != "logit_scale":
            nn.init.normal_(parameter, 1.0 if name.endswith("weight") else 0.0, 0.1)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):  # torch's default lets the signal die away in a ResNet
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return network.eval()


# ------------------------------------------------------------------ other libraries


def open_clip_config(model_config, activation):
    """A model config as open_clip's, the width of heads from their number."""
    vision = {"image_size": model_config["image_size"], **model_config["vision"]}
    vision["head_width"] = vision_channels(vision) // vision.pop("heads")
    return {
        "embed_dim": model_config["embed_dim"],
        "quick_gelu": activation == "quickgelu",
        "vision_cfg": vision,
        "text_cfg": dict(model_config["text"]),
    }


def open_clip_model(model_config, activation="quickgelu", kind=open_clip.model.CLIP):
    return randomise(kind(**open_clip_config(model_config, activation)))


class HuggingFace(nn.Module):
    """transformers' CLIPModel with the methods of a CLIP."""

    def __init__(self, network):
        super().__init__()
        self.network = network.eval()

    def encode_image(self, pixels):
        found = self.network.get_image_features(pixel_values=pixels)
        return getattr(found, "pooler_output", found)  # a tensor before version 5

    def encode_text(self, tokens):
        found = self.network.get_text_features(input_ids=tokens)
        return getattr(found, "pooler_output", found)


def hugging_face_model(model_config, activation="quickgelu"):
    """A CLIPModel of its own random weights, far from where they start."""
    config = {}
    for tower in ("vision", "text"):
        width = model_config[tower]["width"]
        config[f"{tower}_config"] = {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": model_config[tower]["layers"],
            "num_attention_heads": model_config[tower]["heads"],
            "hidden_act": {"quickgelu": "quick_gelu", "gelu": "gelu"}[activation],
        }
    config["vision_config"]["image_size"] = model_config["image_size"]
    config["vision_config"]["patch_size"] = model_config["vision"]["patch_size"]
    network = randomise(CLIPModel(CLIPConfig(projection_dim=model_config["embed_dim"], **config)))
    for parameter in network.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return HuggingFace(network)


# ------------------------------------------------------------------ comparisons


def inputs(image_size, device="cpu"):
    generator = torch.Generator().manual_seed(1)
    patches = torch.randn(3, 3, 4, 4, generator=generator)
    noise = torch.randn(3, 3, image_size, image_size, generator=generator)
    pixels = F.interpolate(patches, image_size) + 0.3 * noise
    return pixels.to(device), clip.tokenize(SENTENCES).to(device)


@torch.no_grad()
def largest_difference(ours, theirs, image_size, device="cpu"):
    """Largest absolute difference of unit features, of images or texts."""
    pixels, tokens = inputs(image_size, device)
    ours, theirs = ours.to(device), theirs.to(device)
    differences = []
    for a, b in (
        (ours.encode_image(pixels), theirs.encode_image(pixels)),
        (ours.encode_text(tokens), theirs.encode_text(tokens)),
    ):
        assert a.shape == b.shape and a.dtype == b.dtype == torch.float32
        a, b = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
        # A difference means nothing where all features are alike.
        assert (a[0] - a[1]).abs().max() > 1e-2
        differences.append((a - b).abs().max().item())
    return max(differences)


def same_tensors(found, expected):
    """Whether a state dict has the tensors of another, which may hold more."""
    return all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
