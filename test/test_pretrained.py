"""Where a CLIP comes from: the hub (an imitation on loopback), files, folders, configurations."""

import json
import pickle
import re
import time
import zipfile

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from conftest import save_archive
from pretrained import find_hub, read_source
from test_towers import VIT
from test_weights import answer, serving
from towers import CLIP
from weights import read_weights, to_hugging_face

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
def cache(tmp_path, monkeypatch):
    """huggingface_hub's cache, an empty folder."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def reach(cache, monkeypatch):
    """Let huggingface_hub ask another URL, and again without waiting: reach(url)."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)

    def reach(url):
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)

    return reach


def found(reach, hub, spec):
    """What the file that a spec leads to holds, and the names of those beside it."""
    with serving(hub) as (url, _):
        reach(url)
        path = find_hub(spec)
    return path.read_text(), {file.name for file in path.parent.iterdir()}


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


def test_configurations_of_the_same_folder_come_along(reach):
    hub = Hub("a/model.safetensors", "a/config.json", "a/open_clip_config.json", "a/other.txt")
    _, beside = found(reach, hub, "hf-hub:owner/name:a/model.safetensors")
    assert beside == {"model.safetensors", "config.json", "open_clip_config.json"}
    _, beside = found(reach, Hub("b/clip.pt", "config.json"), "hf-hub:owner/name:b/clip.pt")
    assert beside == {"clip.pt"}


def test_a_cached_file_needs_no_network(reach):
    spec = "hf-hub:owner/name:clip.pt"
    first, _ = found(reach, Hub("clip.pt", "config.json"), spec)
    with serving(answer) as (url, asked):
        reach(url)
        path = find_hub(spec)
    assert not asked
    assert path.read_text() == first and path.with_name("config.json").is_file()


@pytest.mark.parametrize("spec", ["hf-hub:owner/name", "hf-hub:owner/name:clip.pt"])
def test_without_network_the_error_names_the_spec_and_what_to_do(reach, cache, spec):
    with serving(answer) as (url, _):
        reach(url)
    with pytest.raises(ValueError, match=f"{spec}: .*no network.*download the file"):
        find_hub(spec)


@pytest.mark.parametrize("spec", ["hf-hub:owner/name", "hf-hub:owner/name:clip.pt"])
def test_offline_mode_is_an_error_too(reach, monkeypatch, spec):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=f"{spec}: .*no network"):
        found(reach, Hub("clip.pt"), spec)


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


@pytest.mark.parametrize("content", [{"weights": {}, "epoch": 3}, torch.zeros(3), [1, 2]], ids=type)
def test_what_is_no_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt: expected a state dict"):
        read_source(tmp_path / "other.pt")


def test_names_of_no_clip_are_listed(tmp_path):
    torch.save({"backbone.conv1.weight": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt: no CLIP.*backbone\.conv1\.weight"):
        read_source(tmp_path / "other.pt")


def marked(definition=VIT, mark=0.0):
    """A state dict in Hugging Face's naming and its configuration; mark tells it from others."""
    state, config = to_hugging_face(CLIP(definition).state_dict(), {"name": "vit", **definition})
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


def stated(tmp_path, change=None, name="config.json"):
    """The Source of a file whose configuration beside it has been changed."""
    if name == "config.json":
        state, config = marked()
    else:
        vision, text = ({**VIT[tower]} for tower in ("vision", "text"))
        config = {"embed_dim": 24, "vision_cfg": {**vision, "head_width": 64}, "text_cfg": text}
        state, config = CLIP(VIT).state_dict(), {"model_cfg": config}
        del config["model_cfg"]["vision_cfg"]["heads"]
    if change:
        change(config)
    torch.save(state, tmp_path / "weights.pt")
    (tmp_path / name).write_text(json.dumps(config))
    return read_source(tmp_path / "weights.pt")


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


@pytest.mark.parametrize("name", ["config.json", "open_clip_config.json"])
def test_a_broken_configuration_is_named(tmp_path, name):
    for change in (lambda config: config.clear(), lambda config: config.update(text_config=3)):
        if name == "open_clip_config.json":
            change = dict.clear
        with pytest.raises(ValueError, match=name):
            stated(tmp_path, change, name)
