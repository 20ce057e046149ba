"""Weights of other projects: their files, their names of parameters, OpenAI's download.

Inside this project a CLIP's parameters have OpenAI's names (https://github.com/openai/CLIP).
open_clip (https://github.com/mlfoundations/open_clip) has the same, with its text tower below
`text.` in some models. Hugging Face's `CLIPModel` (https://github.com/huggingface/transformers) has
names of its own, keeps queries, keys and values apart, and projections transposed.
"""

import re

import torch

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


def to_hugging_face(state, model_config):
    """State dict and configuration, as dicts, of a Hugging Face CLIPModel.

    state: in OpenAI's naming; definition: see towers.py. Raises ValueError for a ModifiedResNet,
    which Hugging Face does not have.
    """
    if isinstance(model_config["vision"]["layers"], list):
        raise ValueError(f"{model_config['name']}: Hugging Face's CLIPModel has no ModifiedResNet")
    result = {}
    for name, tensor in state.items():
        if ".attn.in_proj_" in name:
            for part, third in zip("qkv", tensor.chunk(3), strict=True):
                split = _renamed(name.replace(".in_proj_", f".{part}_proj."), back=True)
                result[split] = third.clone()
        else:
            new = _renamed(name, back=True)
            result[new] = (tensor.T if new in _TRANSPOSED else tensor).contiguous()
    return result, _hugging_face_config(model_config)


def _hugging_face_config(model_config):
    width = model_config["embed_dim"]
    config = {"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": width}
    activation = model_config.get("activation", "quickgelu")
    for tower, fields in HF_FIELDS.items():
        part = {theirs: model_config[tower][ours] for ours, (theirs, _) in fields.items()}
        config[f"{tower}_config"] = {
            **part,
            "intermediate_size": 4 * part["hidden_size"],
            "hidden_act": next(k for k, ours in HF_ACTIVATIONS.items() if ours == activation),
            "layer_norm_eps": 1e-5,
            "projection_dim": width,
        }
    config["vision_config"]["image_size"] = model_config["image_size"]
    start = model_config["text"]["vocab_size"] - 2  # the last two tokens are start and end
    config["text_config"] |= {"bos_token_id": start, "eos_token_id": start + 1}
    return config
