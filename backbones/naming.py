"""Names of a CLIP's parameters in other libraries.

Inside this project they have OpenAI's names (https://github.com/openai/CLIP). open_clip
(https://github.com/mlfoundations/open_clip) has the same, with its text tower below `text.` in some
models. Hugging Face's `CLIPModel` (https://github.com/huggingface/transformers) has names of its
own, keeps queries, keys and values apart, and projections transposed.
"""

import torch

from backbones.towers import is_resnet

HF_ACTIVATIONS = {"quick_gelu": "quickgelu", "gelu": "gelu"}  # Hugging Face's name: ours

_NAMES = (  # parts of OpenAI's names, and of Hugging Face's; longer ones before what they contain
    ("visual.conv1.", "vision_model.embeddings.patch_embedding."),
    ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("visual.ln_pre.", "vision_model.pre_layrnorm."),
    ("visual.transformer.resblocks.", "vision_model.encoder.layers."),
    ("visual.ln_post.", "vision_model.post_layernorm."),
    ("visual.proj", "visual_projection.weight"),
    ("token_embedding.", "text_model.embeddings.token_embedding."),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("transformer.resblocks.", "text_model.encoder.layers."),
    ("ln_final.", "text_model.final_layer_norm."),
    ("text_projection", "text_projection.weight"),
    (".ln_1.", ".layer_norm1."),
    (".ln_2.", ".layer_norm2."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
    (".attn.", ".self_attn."),
)

_TRANSPOSED = {"visual_projection.weight", "text_projection.weight"}  # Hugging Face's

_NO_WEIGHTS = {"input_resolution", "context_length", "vocab_size", "attn_mask"}


def from_open_clip(state):
    """A state dict in open_clip's or OpenAI's naming, in OpenAI's and float32.

    Sizes and the attention mask, which some files list beside the weights, are left out.
    """
    renamed = {name.removeprefix("text."): tensor for name, tensor in state.items()}
    return _in_float32({n: tensor for n, tensor in renamed.items() if n not in _NO_WEIGHTS})


def from_hugging_face(state):
    """A state dict in the naming of Hugging Face's CLIPModel, in OpenAI's and float32.

    Names that no CLIPModel has stay. Raises ValueError where queries, keys and values do not go
    together.
    """
    result = {}
    for name, tensor in state.items():
        if name.endswith(".position_ids"):  # counts from 0, in files of older versions
            continue
        if name in _TRANSPOSED and tensor.ndim == 2:
            tensor = tensor.T
        for ours, theirs in _NAMES:
            name = name.replace(theirs, ours)
        result[name] = tensor
    for query in [name for name in result if ".attn.q_proj." in name]:
        names = [query.replace(".q_proj.", f".{letter}_proj.") for letter in "qkv"]
        if not all(name in result for name in names):
            continue  # what is missing is reported with all other names
        tensors = [result.pop(name) for name in names]
        shapes = {tuple(tensor.shape) for tensor in tensors}
        if len(shapes) > 1 or () in shapes:
            raise ValueError(f"{', '.join(names)}: of the shapes {sorted(shapes)}")
        result[query.replace(".q_proj.", ".in_proj_")] = torch.cat(tensors)  # (3 D, D) or (3 D,)
    return _in_float32(result)


def _in_float32(state):
    """The tensors in float32, counts as they are, the temperature as a scalar."""
    state = {n: t.float() if t.is_floating_point() else t for n, t in state.items()}
    if "logit_scale" in state and state["logit_scale"].numel() == 1:
        state["logit_scale"] = state["logit_scale"].reshape(())
    return state


def to_hugging_face(state, model_config):
    """State dict and configuration, as dicts, of a Hugging Face CLIPModel.

    state: in OpenAI's naming; model_config: see towers.py. Raises ValueError for a ModifiedResNet,
    which Hugging Face does not have.
    """
    if is_resnet(model_config["vision"]):
        raise ValueError(f"{model_config['name']}: Hugging Face's CLIPModel has no ModifiedResNet")
    separate = {}
    for name, tensor in state.items():
        if ".attn.in_proj_" in name:
            for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                separate[name.replace(".in_proj_", f".{letter}_proj.")] = third.clone()
        else:
            separate[name] = tensor
    result = {}
    for name, tensor in separate.items():
        for ours, theirs in _NAMES:
            name = name.replace(ours, theirs)
        result[name] = (tensor.T if name in _TRANSPOSED else tensor).contiguous()
    return result, _hugging_face_config(model_config)


def _hugging_face_config(model_config):
    vision, text = model_config["vision"], model_config["text"]
    hf_activations = {ours: theirs for theirs, ours in HF_ACTIVATIONS.items()}
    width = model_config["embed_dim"]
    config = {"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": width}
    for name, tower in (("vision_config", vision), ("text_config", text)):
        config[name] = {
            "hidden_size": tower["width"],
            "num_hidden_layers": tower["layers"],
            "num_attention_heads": tower["heads"],
            "intermediate_size": 4 * tower["width"],
            "hidden_act": hf_activations[model_config.get("activation", "quickgelu")],
            "layer_norm_eps": 1e-5,
            "projection_dim": width,
        }
    config["vision_config"]["image_size"] = model_config["image_size"]
    config["vision_config"]["patch_size"] = vision["patch_size"]
    config["text_config"]["max_position_embeddings"] = text["context_length"]
    config["text_config"]["vocab_size"] = text["vocab_size"]
    config["text_config"]["bos_token_id"] = text["vocab_size"] - 2  # the last two tokens are
    config["text_config"]["eos_token_id"] = text["vocab_size"] - 1  # start and end
    return config
