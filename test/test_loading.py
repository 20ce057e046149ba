"""Every source of a CLIP: its features are those of the library whose own class was saved."""

import json
import pickle
import re

import huggingface_hub
import open_clip
import pytest
import torch
from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError
from open_clip.model import CustomTextCLIP
from safetensors.torch import save_file

import clip
from backbones.loading import (
    OPENAI,
    find_hub,
    find_openai,
    is_archive,
    read_source,
    read_weights,
    state_dict_in,
)
from backbones.naming import to_hugging_face
from backbones.towers import CLIP
from clips import (
    MODEL_CONFIGS,
    TOLERANCE,
    VIT,
    hugging_face_model,
    largest_difference,
    open_clip_config,
    open_clip_model,
    randomise,
    same_tensors,
)
from conftest import save_archive

pytestmark = pytest.mark.usefixtures("seeded")
GELU = pytest.mark.parametrize("activation", ["quickgelu", "gelu"])
BOTH = pytest.mark.parametrize("name", MODEL_CONFIGS)


def save(state, path):
    """By safetensors or torch, as the name says."""
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    else:
        torch.save(state, path)


def parity(theirs, path, name="vit", device="cpu", activation=None):
    """Load a file and compare the features; returns the activation."""
    ours, _ = clip.load(path, device, activation=activation)
    image_size = MODEL_CONFIGS[name]["image_size"]
    assert ours.model_config["name"] == name
    assert largest_difference(ours, theirs, image_size, device) <= TOLERANCE
    return ours.model_config["activation"]


# ------------------------------------------------------------------ each naming and file


def test_open_clips_training_checkpoints_of_custom_text_models_load(models):
    theirs = open_clip_model(VIT, kind=CustomTextCLIP)
    optimizer = torch.optim.AdamW(theirs.parameters())
    theirs.encode_text(clip.tokenize("a ship")).sum().backward()
    optimizer.step()
    content = {"epoch": 3, "name": "run", "optimizer": optimizer.state_dict()}
    state = {f"module.{key}": tensor for key, tensor in theirs.state_dict().items()}
    assert "module.text.token_embedding.weight" in state
    torch.save({**content, "state_dict": state}, models / "epoch_3.pt")
    parity(theirs, models / "epoch_3.pt", activation="quickgelu")


@GELU
@BOTH
@pytest.mark.parametrize("file", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
def test_open_clips_folders_load_and_tell_the_activation(
    models, tmp_path, device, name, activation, file
):
    theirs, folder = open_clip_model(MODEL_CONFIGS[name], activation), tmp_path / "folder"
    folder.mkdir()
    save(theirs.state_dict(), folder / file)
    config = {"model_cfg": open_clip_config(MODEL_CONFIGS[name], activation)}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    assert parity(theirs, folder, name, device) == activation
    assert read_source(folder / file).activation == activation


@GELU
@pytest.mark.parametrize("way", ["folder", "file", "bin"])
def test_hugging_faces_models_load_and_tell_the_activation(models, tmp_path, activation, way):
    theirs, folder = hugging_face_model(VIT, activation), tmp_path / "saved"
    theirs.network.save_pretrained(folder)
    if way == "bin":
        (folder / "model.safetensors").unlink()
        state = theirs.network.state_dict()
        for tower in ("vision", "text"):  # as older versions wrote them
            state[f"{tower}_model.embeddings.position_ids"] = torch.arange(3)[None]
        torch.save(state, folder / "pytorch_model.bin")
    path = folder / "model.safetensors" if way == "file" else folder
    assert parity(theirs, path) == activation


class OpenAIs(CLIP):
    """With the sizes that OpenAI's archives hold beside the weights."""

    def __init__(self, model_config):
        super().__init__(model_config)
        self.register_buffer("input_resolution", torch.tensor(model_config["image_size"]))
        self.register_buffer("context_length", torch.tensor(77))
        self.register_buffer("vocab_size", torch.tensor(49408))


@BOTH
@pytest.mark.filterwarnings("error")
def test_torchscript_archives_load_and_are_openais(models, name):
    theirs, path = randomise(OpenAIs(MODEL_CONFIGS[name])), models / "archive.pt"
    save_archive(theirs, MODEL_CONFIGS[name]["image_size"], path)
    assert is_archive(path)
    assert parity(theirs, path, name) == "quickgelu"
    with pytest.raises(ValueError, match=r"archive\.pt: a TorchScript archive, no checkpoint"):
        read_weights(path)


@BOTH
def test_half_precision_becomes_fp32(models, name):
    state = {**randomise(CLIP(MODEL_CONFIGS[name])).half().state_dict(), "attn_mask": torch.ones(1)}
    torch.save({**state, "logit_scale": state["logit_scale"].reshape(1)}, models / "half.pt")
    found = clip.load(models / "half.pt", activation="gelu")[0].state_dict()
    assert torch.float16 not in {tensor.dtype for tensor in found.values()}
    assert same_tensors(
        found, {n: tensor.to(found[n].dtype) for n, tensor in state.items() if n in found}
    )


@pytest.mark.parametrize("file", ["plain.pt", "plain.safetensors", "hugging_face.bin", "model.bin"])
def test_weights_alone_do_not_tell_the_activation(models, tmp_path, file):
    state = CLIP(VIT).state_dict()
    if file == "hugging_face.bin":
        state, _ = to_hugging_face(state, VIT)
    save(state, tmp_path / file)
    for config in ("config.json", "open_clip_config.json"):  # may be that of other weights
        (tmp_path / config).write_text("{}")
    assert read_source(tmp_path / file).activation is None


# ------------------------------------------------------------------ OpenAI's names


@pytest.mark.parametrize("name", OPENAI)
def test_openais_names_are_downloaded_by_open_clip(models, tmp_path, monkeypatch, name):
    def download(where):
        assert where["url"].endswith(name.replace("/", "-").replace("@", "-") + ".pt")
        assert where["quick_gelu"]
        return str(path)

    path = tmp_path / "open_clip_model.safetensors"
    save(CLIP(VIT).state_dict(), path)
    monkeypatch.setattr(open_clip, "download_pretrained", download)
    network, _ = clip.load(name)
    assert network.model_config["activation"] == "quickgelu" and network.path == path


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("ViT-B/32", "ViT-B-32.pt"),
        ("RN50", "RN50.pt"),
        ("ViT-L/14@336px", "ViT-L-14-336px.pt"),
        ("ViT-L/14@336px", "ViT-L-14-336.pt"),
    ],
)
def test_a_file_in_models_is_preferred(models, monkeypatch, name, file):
    monkeypatch.setattr(open_clip, "download_pretrained", None)
    torch.save(CLIP(VIT).state_dict(), models / file)
    network, _ = clip.load(name)
    assert network.model_config == {"name": "vit", **VIT, "activation": "quickgelu"}
    assert network.path == models / file


def test_without_network_the_error_says_where_to_put_the_file(models, monkeypatch):
    def download(where):
        raise OSError("no route to host\nand more")

    monkeypatch.setattr(open_clip, "download_pretrained", download)
    with pytest.raises(ValueError) as error:
        find_openai("ViT-L/14@336px")
    for part in ("ViT-L/14@336px: not", "(no route to host)", "ViT-L-14-336px.pt", str(models)):
        assert part in str(error.value)


# ------------------------------------------------------------------ the Hugging Face hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Files of the repository owner/name by their paths, and what was asked for: (files, asked)."""

    def download(repo_id, filename, revision=None):
        asked.append((repo_id, filename, revision))
        found = files.get(filename, EntryNotFoundError("no such file"))
        if isinstance(found, Exception):
            raise found
        return str(found)

    files, asked = {}, []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return files, asked


@pytest.mark.parametrize("revision", [None, "v1", "refs/pr/1"])
def test_the_hub_is_asked_for_a_path_and_revision(models, hub, revision):
    files, asked = hub
    files["more/clip.pt"] = models / "RemoteCLIP.pt"
    torch.save(CLIP(VIT).state_dict(), models / "RemoteCLIP.pt")
    at = f"@{revision}" if revision else ""
    network, _ = clip.load(f"hf-hub:owner/name{at}:more/clip.pt", activation="gelu")
    assert network.path == models / "RemoteCLIP.pt"
    assert asked == [("owner/name", "more/clip.pt", revision)]  # no configuration: whose is it?


@pytest.mark.parametrize(
    ("file", "config"),
    [
        ("model.safetensors", "config.json"),
        ("open_clip_pytorch_model.bin", "open_clip_config.json"),
    ],
)
def test_the_configuration_of_the_files_library_comes_along(hub, tmp_path, file, config):
    files, asked = hub
    files[f"a/{file}"] = tmp_path / file
    spec = f"hf-hub:owner/name@v1:a/{file}"
    assert find_hub(spec) == tmp_path / file  # a repository need not have a configuration
    expected = [("owner/name", f"a/{file}", "v1"), ("owner/name", f"a/{config}", "v1")]
    assert asked == expected
    files[f"a/{config}"] = tmp_path / config
    assert find_hub(spec) == tmp_path / file and asked == 2 * expected
    files[f"a/{config}"] = LocalEntryNotFoundError("no network")
    with pytest.raises(ValueError, match=re.escape(spec)):  # it may have one
        find_hub(spec)


@pytest.mark.parametrize("error", [EntryNotFoundError("none"), OSError("a\nb"), RuntimeError()])
def test_what_the_hub_does_not_give_is_named_with_the_remedy(hub, error):
    hub[0]["clip.pt"] = error
    with pytest.raises(ValueError, match="^hf-hub:owner/name:clip.pt: .*give its path$"):
        find_hub("hf-hub:owner/name:clip.pt")


@pytest.mark.parametrize(
    "spec",
    ["hf-hub:", "hf-hub:name:a", "hf-hub:a/b/c:a", "hf-hub:a/b@:a", "a/b:a", "hf-hub:a/b@v1"],
)
def test_a_spec_of_another_form_is_refused(hub, spec):
    with pytest.raises(ValueError, match=rf"{spec}: expected hf-hub:owner/name\[@revision\]:path"):
        find_hub(spec)
    assert not hub[1]


# ------------------------------------------------------------------ files and folders


class Code:
    def __reduce__(self):
        return eval, ("print('code has run')",)


def test_a_pickle_with_code_is_refused_with_the_reason_and_does_not_run(tmp_path, capsys):
    torch.save({"state_dict": {"visual.proj": torch.zeros(1)}, "args": Code()}, tmp_path / "zip.pt")
    (tmp_path / "plain.bin").write_bytes(pickle.dumps({"a": Code()}, protocol=2))
    for path in (tmp_path / "zip.pt", tmp_path / "plain.bin"):
        with pytest.raises(ValueError, match=f"{re.escape(str(path))}: .*run code") as error:
            read_source(path)
        assert "eval" in str(error.value) and ".safetensors" in str(error.value)
    assert "code has run" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["broken.pt", "broken.safetensors"])
@pytest.mark.parametrize("content", [b"", b"hello world", b"PK\x03\x04 broken"], ids=str)
def test_a_broken_file_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path / name))}: broken"):
        read_source(tmp_path / name)


@pytest.mark.parametrize("prefix", ["", "module.", "module.module."])
@pytest.mark.parametrize("under", [False, True])
def test_a_state_dict_is_found_bare_or_under_its_name_and_without_prefixes(prefix, under):
    content = {f"{prefix}a": torch.ones(1), f"{prefix}b.module.c": torch.zeros(1)}
    found = state_dict_in({"epoch": 3, "state_dict": content} if under else content)
    assert found == {"a": torch.ones(1), "b.module.c": torch.zeros(1)}


@pytest.mark.parametrize(
    "content",
    [None, 3, [1], torch.zeros(1), {3: torch.zeros(1)}, {"a": 3}, {"a": {}}, {"state_dict": 3}],
    ids=str,
)
def test_what_is_no_state_dict_is_refused(tmp_path, content):
    assert state_dict_in(content) is None
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt: expected a state dict"):
        read_source(tmp_path / "other.pt")


TEXT_BLOCK = "text_model.encoder.layers.1"


@pytest.mark.parametrize(
    ("naming", "name", "tensor", "message"),
    [
        ("openai", "visual.conv1.weight", None, "lack visual.conv1.weight"),
        ("openai", "visual.extra", torch.zeros(1), "unexpected: visual.extra"),
        ("hf", "vision_model.extra.weight", torch.zeros(1), "unexpected: vision_model.extra"),
        ("hf", f"{TEXT_BLOCK}.mlp.fc1.bias", None, r"missing: .*resblocks\.1\.mlp\.c_fc\.bias"),
        ("hf", f"{TEXT_BLOCK}.self_attn.k_proj.bias", None, "unexpected: .*attn.q_proj.bias"),
        ("hf", f"{TEXT_BLOCK}.self_attn.k_proj.bias", torch.ones(3), "attn.k_proj.bias.* shapes"),
    ],
)
def test_what_is_no_clip_of_a_known_size_is_named(models, naming, name, tensor, message):
    state = CLIP(VIT).state_dict()
    if naming == "hf":
        state, _ = to_hugging_face(state, VIT)
    if tensor is None:
        del state[name]
    else:
        state[name] = tensor
    torch.save(state, models / "other.pt")
    with pytest.raises(ValueError, match=rf"other\.pt: .*{message}"):
        read_source(models / "other.pt")


def test_a_folders_safetensors_are_preferred_to_its_bin(models, tmp_path):
    state, config = to_hugging_face(CLIP(VIT).state_dict(), VIT)
    (tmp_path / "config.json").write_text(json.dumps(config))
    for mark, name in ((1.0, "pytorch_model.bin"), (2.0, "model.safetensors")):
        save({**state, "logit_scale": torch.tensor(mark)}, tmp_path / name)
        found = read_source(tmp_path)
        assert found.weights["logit_scale"] == mark and found.path == tmp_path / name


def test_a_folder_of_no_weights_or_several_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"expected one of model\.safetensors or .*found none"):
        read_source(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="index.json; .*max_shard_size"):
        read_source(tmp_path)
    for name in ("pytorch_model.bin", "open_clip_pytorch_model.bin"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=r"found pytorch_model\.bin and open_clip_pytorch"):
        read_source(tmp_path)


# ------------------------------------------------------------------ configurations


def put(config, path, value):
    """Set a field of a configuration, or take it out for None."""
    *sections, field = path.split(".")
    for section in sections:
        config = config[section]
    if value is None:
        del config[field]
    else:
        config[field] = value


HUGGING_FACE = [
    ({}, "quickgelu"),
    ({"vision_config.hidden_act": "gelu", "text_config.hidden_act": "gelu"}, "gelu"),
    ({"vision_config.hidden_act": None, "text_config.hidden_act": None}, "quickgelu"),
    ({"text_config.hidden_act": "gelu"}, "hidden_act .*'gelu'"),
    ({"vision_config.hidden_act": "relu", "text_config.hidden_act": "relu"}, "hidden_act .*relu"),
    ({"text_config.layer_norm_eps": 1e-6}, "text_config: layer_norm_eps 1e-06"),
    ({"vision_config.num_attention_heads": 4}, "vision_config: num_attention_heads 4 instead of 2"),
    ({"vision_config.num_attention_heads": None}, "heads 12 instead of 2"),
    ({"text_config_dict": {"num_attention_heads": 4}}, "num_attention_heads 4 instead of 3"),
    ({"vision_config": None}, "'vision_config'"),
]
OPEN_CLIP = [
    ({}, "gelu"),
    ({"model_cfg.quick_gelu": True}, "quickgelu"),
    ({"model_cfg.quick_gelu": None, "model_cfg.vision_cfg.head_width": None}, "gelu"),
    ({"model_cfg.vision_cfg.image_size": 224, "model_cfg.vision_cfg.patch_dropout": 0.5}, "gelu"),
    ({"model_cfg.text_cfg.pool_type": "argmax", "model_cfg.text_cfg.mlp_ratio": 4.0}, "gelu"),
    ({"model_cfg.vision_cfg.head_width": 32}, "head_width 32 instead of 64"),
    ({"model_cfg.text_cfg.heads": None}, "heads 8 instead of 3"),
    ({"model_cfg.vision_cfg.layers": 5}, "layers 5 instead of 3"),
    ({"model_cfg.text_cfg.no_causal_mask": True}, "no_causal_mask True"),
    ({"model_cfg.vision_cfg.pool_type": "avg"}, "pool_type avg"),
    ({"model_cfg.text_cfg.mlp_ratio": 2}, "mlp_ratio 2"),
    ({"model_cfg.vision_cfg": 3}, "TypeError"),
]


@pytest.mark.parametrize(
    ("name", "change", "found"),
    [("config.json", *case) for case in HUGGING_FACE]
    + [("open_clip_config.json", *case) for case in OPEN_CLIP],
    ids=str,
)
def test_a_configuration_tells_the_activation_or_another_network(
    models, tmp_path, name, change, found
):
    state = CLIP(VIT).state_dict()
    config = {"model_cfg": open_clip_config(VIT, "gelu")}
    path = tmp_path / "open_clip_pytorch_model.bin"
    if name == "config.json":
        state, config = to_hugging_face(state, VIT)
        path = tmp_path / "pytorch_model.bin"
    for field, value in change.items():
        put(config, field, value)
    torch.save(state, path)
    (tmp_path / name).write_text(json.dumps(config))
    if found in ("gelu", "quickgelu"):
        assert read_source(path).activation == found
        return
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path / name))}: .*{found}"):
        read_source(path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe{}", b"[1]", b"3"], ids=str)
def test_a_broken_configuration_is_named(models, tmp_path, content):
    torch.save(CLIP(VIT).state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    (tmp_path / "open_clip_config.json").write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "open_clip_config.json"))):
        read_source(tmp_path)
