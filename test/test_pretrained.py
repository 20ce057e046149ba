"""Where a CLIP comes from: the hub (an imitation on loopback), files, folders, configurations."""

import json
import os
import pickle
import re
import subprocess
import sys
import time
import zipfile

import pytest
import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import save_file

from backbones.loading import find_hub, read_source, read_weights
from backbones.naming import to_hugging_face
from backbones.towers import CLIP
from conftest import ROOT, save_archive
from test_towers import VIT
from test_weights import answer, serving

COMMIT = {"main": "a" * 40, "v1": "b" * 40, "refs/pr/1": "c" * 40}


class Hub:
    """Answers as huggingface.co does for the repository owner/name; files by revision and path."""

    def __init__(self, *paths):
        self.files = {
            revision: {path: f"{revision} {path}".encode() for path in paths} for revision in COMMIT
        }

    def __call__(self, handler):
        path = handler.path.partition("?")[0].replace("%2F", "/")
        listing = re.fullmatch("/api/models/owner/name/tree/(.+)", path)
        file = re.fullmatch(r"/owner/name/resolve/(main|v1|refs/pr/1|[abc]{40})/(.+)", path)
        if listing and listing[1] in self.files:
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
                for name, content in self.files[listing[1]].items()
            ]
            body = json.dumps(entries).encode()
            answer(handler, body, Content_Type="application/json")
        elif file:
            revision = next(r for r, commit in COMMIT.items() if file[1] in (r, commit))
            self.send(handler, revision, self.files[revision].get(file[2]))
        else:
            answer(handler, b"", 404, X_Error_Code="RepoNotFound")

    def send(self, handler, revision, content):
        headers = {"X_Repo_Commit": COMMIT[revision]}
        if content is None:
            answer(handler, b"", 404, X_Error_Code="EntryNotFound", **headers)
        else:
            answer(handler, content, ETag=f'"{hash(content):x}"', **headers)


@pytest.fixture
def reach(tmp_path, monkeypatch):
    """Find a spec on a server, without waiting before it is asked again: reach(spec, url)."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    return lambda spec, url: find_hub(spec, url, tmp_path / "hub")


def found(reach, hub, spec):
    """What the file that a spec leads to holds, and the names of those beside it."""
    with serving(hub) as (url, _):
        path = reach(spec, url)
    return path.read_text(), {file.name for file in path.parent.iterdir()}


def nobody():
    """The URL of a server that answers no more."""
    with serving(answer) as (url, _):
        return url


# ------------------------------------------------------------------ the hub


def test_the_one_file_of_weights_is_found(reach):
    hub = Hub("README.md", "weights/clip.safetensors", "vocab.json")
    assert found(reach, hub, "hf-hub:owner/name")[0] == "main weights/clip.safetensors"


@pytest.mark.parametrize("revision", COMMIT)
def test_a_revision_is_taken(reach, revision):
    hub = Hub("clip.pt")
    assert found(reach, hub, f"hf-hub:owner/name@{revision}")[0] == f"{revision} clip.pt"
    assert found(reach, hub, f"hf-hub:owner/name@{revision}:clip.pt")[0] == f"{revision} clip.pt"


def test_a_path_picks_one_of_several_files(reach):
    hub = Hub("RemoteCLIP-RN50.pt", "more/RemoteCLIP-ViT-B-32.pt")
    spec = "hf-hub:owner/name:more/RemoteCLIP-ViT-B-32.pt"
    assert found(reach, hub, spec)[0] == "main more/RemoteCLIP-ViT-B-32.pt"


def test_several_files_without_a_path_are_listed(reach):
    files = ["RemoteCLIP-RN50.pt", "b/x.pth", "pytorch_model.bin", "z.safetensors"]
    with pytest.raises(ValueError) as error:
        found(reach, Hub("README.md", *files), "hf-hub:owner/name")
    message = str(error.value)
    assert all(file in message for file in files) and "README" not in message
    assert "hf-hub:owner/name:RemoteCLIP-RN50.pt" in message


def test_a_repository_without_weights_is_an_error(reach):
    with pytest.raises(ValueError, match=r"hf-hub:owner/name: .*no \.pt"):
        found(reach, Hub("README.md"), "hf-hub:owner/name")


CONFIGS = ("config.json", "open_clip_config.json")


@pytest.mark.parametrize(
    ("file", "config"),
    [
        ("model.safetensors", "config.json"),
        ("pytorch_model.bin", "config.json"),
        ("open_clip_model.safetensors", "open_clip_config.json"),
        ("open_clip_pytorch_model.bin", "open_clip_config.json"),
    ],
)
def test_the_configuration_of_the_files_library_comes_along(reach, file, config):
    files = [f"a/{name}" for name in (file, *CONFIGS, "other.txt")]
    _, beside = found(reach, Hub(*files), f"hf-hub:owner/name:a/{file}")
    assert beside == {file, config}


def test_a_file_of_another_name_comes_without_configurations(reach):
    hub = Hub("a/clip.pt", *(f"a/{name}" for name in CONFIGS), *CONFIGS)
    assert found(reach, hub, "hf-hub:owner/name:a/clip.pt")[1] == {"clip.pt"}


def test_a_repository_need_not_have_a_configuration(reach):
    hub = Hub("a/model.safetensors", "config.json")
    assert found(reach, hub, "hf-hub:owner/name:a/model.safetensors")[1] == {"model.safetensors"}


@pytest.mark.parametrize("files", [("model.safetensors", "config.json"), ("model.safetensors",)])
def test_a_cached_file_needs_no_network(reach, files, capsys):
    spec = "hf-hub:owner/name:model.safetensors"
    first, beside = found(reach, Hub(*files), spec)
    with serving(answer) as (url, asked):
        path = reach(spec, url)
    assert not asked
    assert path.read_text() == first and beside == set(files)
    assert capsys.readouterr().out == ""


def test_a_configuration_that_cannot_be_asked_for_is_reported(reach, tmp_path, capsys):
    with serving(Hub("model.safetensors", "config.json")) as (url, _):
        hf_hub_download("owner/name", "model.safetensors", cache_dir=tmp_path / "hub", endpoint=url)
    path = reach("hf-hub:owner/name:model.safetensors", nobody())
    assert path.read_text() == "main model.safetensors"
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("hf-hub:owner/name: config.json beside it could not be asked for (")


def test_new_weights_do_not_come_without_their_configuration(reach):
    hub = Hub("model.safetensors", "config.json")

    def respond(handler):
        if handler.path.endswith("config.json"):
            answer(handler, b"", 503)
        else:
            hub(handler)

    spec = "hf-hub:owner/name:model.safetensors"
    with pytest.raises(ValueError, match=f"{spec}: not on the hub, or no network"):
        found(reach, respond, spec)


@pytest.mark.parametrize("spec", ["hf-hub:owner/name", "hf-hub:owner/name:clip.pt"])
def test_without_network_the_error_names_the_spec_and_what_to_do(reach, spec):
    with pytest.raises(ValueError, match=f"{spec}: .*no network.*download the file"):
        reach(spec, nobody())


def test_offline_mode_is_an_error_too(tmp_path):
    code = """
from backbones.loading import find_hub
for spec in ("hf-hub:owner/name", "hf-hub:owner/name:clip.pt"):
    try:
        find_hub(spec)
    except ValueError as error:
        print(error)
"""
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=offline, capture_output=True, text=True
    )
    lines = process.stdout.splitlines()
    for spec, line in zip(("hf-hub:owner/name", "hf-hub:owner/name:clip.pt"), lines, strict=True):
        assert re.match(f"{spec}: .*no network", line)


@pytest.mark.parametrize("spec", ["hf-hub:owner/nobody", "hf-hub:owner/name:nothing.pt"])
def test_what_is_not_there_is_named(reach, spec):
    with pytest.raises(ValueError, match=f"{spec}: not on the hub"):
        found(reach, Hub("clip.pt"), spec)


@pytest.mark.parametrize("spec", ["hf-hub:", "hf-hub:name", "hf-hub:a/b/c", "hf-hub:a/b@", "a/b"])
def test_a_spec_of_another_form_is_refused(spec):
    with pytest.raises(ValueError, match=f"{re.escape(spec)}: expected hf-hub:owner/name"):
        find_hub(spec)


# ------------------------------------------------------------------ files and folders


class Code:
    def __reduce__(self):
        return eval, ("print('code has run')",)


def test_a_pickle_with_code_is_refused_with_the_reason_and_does_not_run(tmp_path, capsys):
    for name, content in (("zip.pt", None), ("plain.bin", pickle.dumps({"a": Code()}, protocol=2))):
        path = tmp_path / name
        if content is None:
            torch.save({"state_dict": {"visual.proj": torch.zeros(1)}, "args": Code()}, path)
        else:
            path.write_bytes(content)
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


def test_a_broken_archive_is_named(tmp_path):
    save_archive(CLIP(VIT), 48, tmp_path / "whole.pt")
    path = tmp_path / "archive.pt"
    with zipfile.ZipFile(tmp_path / "whole.pt") as whole, zipfile.ZipFile(path, "w") as archive:
        for name in whole.namelist():
            archive.writestr(name, whole.read(name).replace(b"def ", b"fed "))
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: a broken TorchScript"):
        read_source(path)


def test_an_archive_is_no_checkpoint_but_clip_load_reads_it(tmp_path):
    path = tmp_path / "archive.pt"
    save_archive(CLIP(VIT), 48, path)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: a TorchScript") as error:
        read_weights(path)
    assert "clip.load" in str(error.value) and "torch.save" not in str(error.value)
    assert read_source(path).activation == "quickgelu"


def test_an_archive_tells_the_activation_by_its_code(tmp_path):
    save_archive(CLIP({**VIT, "activation": "gelu"}), 48, tmp_path / "archive.pt")
    assert read_source(tmp_path / "archive.pt").activation == "gelu"


CONTENT = [{"weights": {}, "epoch": 3}, torch.zeros(3), [1, 2], {3: torch.zeros(1)}]


@pytest.mark.parametrize("content", CONTENT, ids=str)
def test_what_is_no_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt: expected a state dict"):
        read_source(tmp_path / "other.pt")


def test_names_of_no_clip_are_listed(tmp_path):
    torch.save({"backbone.conv1.weight": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt: no CLIP.*backbone\.conv1\.weight"):
        read_source(tmp_path / "other.pt")


def test_a_file_whose_tensors_do_not_go_together_is_named(tmp_path):
    state, _ = marked()
    state["text_model.encoder.layers.0.self_attn.k_proj.bias"] = torch.tensor(1.0)
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt: .*resblocks\.0\.attn\.k_proj\.bias"):
        read_source(tmp_path / "other.pt")


def marked(model_config=VIT, mark=0.0):
    """A state dict in Hugging Face's naming and its configuration; mark tells it from others."""
    state, config = to_hugging_face(
        CLIP(model_config).state_dict(), {"name": "vit", **model_config}
    )
    return {**state, "logit_scale": torch.tensor(mark)}, config


def test_a_folders_safetensors_are_preferred_to_its_bin(tmp_path):
    torch.save(marked(mark=1.0)[0], tmp_path / "pytorch_model.bin")
    assert read_source(tmp_path).weights["logit_scale"] == 1
    save_file(marked(mark=2.0)[0], tmp_path / "model.safetensors")
    assert read_source(tmp_path).weights["logit_scale"] == 2


def test_a_folder_of_two_namings_or_none_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"model\.safetensors or .*found none"):
        read_source(tmp_path)
    for name in ("pytorch_model.bin", "open_clip_pytorch_model.bin"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=r"found pytorch_model\.bin and open_clip.*name a file"):
        read_source(tmp_path)


def test_weights_in_parts_are_an_error_with_the_remedy(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="in several parts.*max_shard_size"):
        read_source(tmp_path)


def test_a_missing_file_is_named_with_what_may_stand_there(tmp_path):
    with pytest.raises(ValueError, match=r"missing\.pt: no such file.*hf-hub:.*ViT-B/32"):
        read_source(tmp_path / "missing.pt")


# ------------------------------------------------------------------ configurations


FILES = {"config.json": "pytorch_model.bin", "open_clip_config.json": "open_clip_pytorch_model.bin"}


def stated(tmp_path, change=None, name="config.json", file=None):
    """The Source of a file whose configuration beside it has been changed."""
    if name == "config.json":
        state, config = marked()
    else:
        vision, text = ({**VIT[tower]} for tower in ("vision", "text"))
        config = {"embed_dim": 24, "vision_cfg": {**vision, "head_width": 64}, "text_cfg": text}
        state, config = CLIP(VIT).state_dict(), {"model_cfg": config}
        del config["model_cfg"]["vision_cfg"]["heads"]
    if change:
        config = change(config) or config
    path = tmp_path / (file or FILES[name])
    torch.save(state, path)
    (tmp_path / name).write_text(json.dumps(config))
    return read_source(path)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("file", ["clip.pt", "best_model.pth", "model.bin", "other"])
def test_a_configuration_beside_a_file_of_another_name_is_not_believed(tmp_path, name, file):
    other = FILES["open_clip_config.json" if name == "config.json" else "config.json"]
    source = stated(tmp_path, name=name, file=other if file == "other" else file)
    assert (source.activation, source.stated, source.config) == (None, {}, None)


@pytest.mark.parametrize("name", ["config.json", "open_clip_config.json"])
def test_a_configuration_tells_sizes_with_heads(tmp_path, name):
    source = stated(tmp_path, name=name)
    assert source.stated == {key: VIT[key] for key in ("embed_dim", "vision", "text")}
    assert source.activation == ("quickgelu" if name == "config.json" else "gelu")


def test_hugging_faces_configuration_tells_the_activation(tmp_path):
    def change(config):
        for tower in ("vision_config", "text_config"):
            config[tower]["hidden_act"] = "gelu"

    assert stated(tmp_path, change).activation == "gelu"


def test_what_hugging_face_leaves_out_is_its_default(tmp_path):
    def change(config):
        config["text_config"], config["vision_config"] = {}, {"hidden_size": 8}
        config["text_config_dict"] = {"hidden_size": 640}

    source = stated(tmp_path, change)
    assert source.activation == "quickgelu"
    vision = {"patch_size": 32, "width": 8, "layers": 12, "heads": 12}
    text = {"context_length": 77, "vocab_size": 49408, "width": 640, "layers": 12, "heads": 8}
    assert source.stated == {"embed_dim": 24, "vision": vision, "text": text}


@pytest.mark.parametrize(
    ("field", "value"),
    [("hidden_act", "gelu"), ("hidden_act", "relu"), ("layer_norm_eps", 1e-6)],
)
def test_what_this_projects_towers_cannot_do_is_refused(tmp_path, field, value):
    with pytest.raises(ValueError, match=rf"config\.json: .*{field}.*{value}"):
        stated(tmp_path, lambda config: config["text_config"].update({field: value}))


def test_open_clips_configuration_tells_the_activation(tmp_path):
    def change(config):
        config["model_cfg"]["quick_gelu"] = True

    assert stated(tmp_path, change, "open_clip_config.json").activation == "quickgelu"


@pytest.mark.parametrize(
    ("tower", "field", "value"),
    [("text", "no_causal_mask", True), ("vision", "pool_type", "avg"), ("text", "mlp_ratio", 2)],
)
def test_open_clips_other_networks_are_refused(tmp_path, tower, field, value):
    def change(config):
        config["model_cfg"][f"{tower}_cfg"][field] = value

    with pytest.raises(ValueError, match=f"open_clip_config.json: .*{tower}_cfg: {field} {value}"):
        stated(tmp_path, change, "open_clip_config.json")


def without(*path):
    """A change that takes a field out of a configuration."""

    def change(config):
        for name in path[:-1]:
            config = config[name]
        del config[path[-1]]

    return change


@pytest.mark.parametrize(
    ("name", "change", "field"),
    [
        ("config.json", without("vision_config"), "vision_config is missing"),
        ("config.json", without("text_config"), "text_config is missing"),
        ("config.json", lambda c: c.update(text_config=3), "text_config is no object"),
        ("config.json", lambda c: c.update(text_config_dict=[1]), "text_config_dict is no object"),
        ("config.json", lambda c: [c], "vision_config is missing"),
        ("config.json", lambda c: c["text_config"].update(hidden_act=[]), "hidden_act"),
        ("open_clip_config.json", without("model_cfg"), "model_cfg is missing"),
        ("open_clip_config.json", without("model_cfg", "embed_dim"), "embed_dim is missing"),
        ("open_clip_config.json", without("model_cfg", "vision_cfg"), "vision_cfg is missing"),
        ("open_clip_config.json", without("model_cfg", "text_cfg"), "text_cfg is missing"),
        (
            "open_clip_config.json",
            lambda c: c["model_cfg"]["vision_cfg"].update(head_width=0),
            "vision_cfg: head_width 0",
        ),
        (
            "open_clip_config.json",
            lambda c: c["model_cfg"]["vision_cfg"].update(width="wide"),
            "vision_cfg: width wide",
        ),
    ],
)
def test_a_field_that_a_configuration_lacks_is_named_with_the_file(tmp_path, name, change, field):
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path / name))}: .*{field}"):
        stated(tmp_path, change, name)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe{}"], ids=str)
def test_a_broken_configuration_is_named(tmp_path, name, content):
    stated(tmp_path, name=name)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / name))):
        read_source(tmp_path / FILES[name])
