"""CLIPs exported for the libraries that other people use."""

import json
import re

import open_clip
import pytest
import torch
from open_clip.model import build_model_from_openai_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPModel

import clip
import model
from backbones import model_configs
from backbones.lora import adapt
from backbones.towers import CLIP
from clips import (
    RESNET,
    TOLERANCE,
    VIT,
    HuggingFace,
    largest_difference,
    open_clip_config,
    randomise,
    same_tensors,
)
from det_formats.det_json import read_label_map

pytestmark = pytest.mark.usefixtures("seeded")
TEXT = {**VIT["text"], "width": 64, "layers": 2, "heads": 1}
OURS = {  # heads of 64 channels, as OpenAI's loader takes for granted
    "vit": {**VIT, "text": TEXT},
    "resnet": {**RESNET, "text": TEXT},
}
NAMES = pytest.mark.parametrize("name", OURS)
GELU = pytest.mark.parametrize("activation", ["quickgelu", "gelu"])
DEPRECATED = pytest.mark.filterwarnings("ignore:`torch.jit")  # which OpenAI's loader calls


@pytest.fixture
def checkpoint(tmp_path, models):
    """Write a checkpoint of ours: checkpoint("vit", "gelu", lora=True); (path, its CLIP)."""
    for name, model_config in OURS.items():
        (models / f"{name}.json").write_text(json.dumps(model_config))

    def write(name="vit", activation="quickgelu", lora=False, sizes=None):
        model_config = {"name": name, **(sizes or OURS[name]), "activation": activation}
        options = {"graph": "object", "fusion": 0.5}
        labels = read_label_map().lines
        network = randomise(model.build(model_config, labels, options))
        if lora:
            options |= {"train": "lora", "lora": (2, 4.0, 0.0)}
            adapt(network, 2, 4.0, 0.0)
            for key, parameter in network.named_parameters():
                if key.endswith(".B"):
                    nn.init.normal_(parameter, std=0.1)
        path = tmp_path / "best_model.pth"
        model.save_checkpoint(path, network, model_config, labels, options)
        return path, model.load_checkpoint(path)[0]

    return write


def run(checkpoint, out, *arguments):
    clip.main(["export", "--checkpoint", str(checkpoint), "--out", str(out), *arguments])


def printed(capsys):
    """The lines of Python that say how to load an export."""
    return capsys.readouterr().out.split("load it with\n")[1].splitlines()


# ------------------------------------------------------------------ other programs load it


@GELU
@NAMES
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_open_clip_loads_an_export(checkpoint, tmp_path, capsys, name, activation, suffix):
    path, ours = checkpoint(name, activation)
    out = tmp_path / "new" / f"plain{suffix}"
    run(path, out)
    text = capsys.readouterr().out
    config = open_clip_config(OURS[name], "gelu")
    (tmp_path / f"exported-{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / f"exported-{name}.json")
    theirs = open_clip.create_model(
        f"exported-{name}", pretrained=str(out), force_quick_gelu=activation == "quickgelu"
    ).eval()
    assert largest_difference(ours, theirs, OURS[name]["image_size"]) <= TOLERANCE
    assert f"{out}: the CLIP of {path}, activation {activation}" in text
    assert ("force_quick_gelu=True" in text) == (activation == "quickgelu")
    assert [file.name for file in out.parent.iterdir()] == [out.name]


def openais_load(path):
    """A file by the sequence of OpenAI's clip.load, which opens it once; heads by the widths."""
    with open(path, "rb") as file:
        try:
            network, state = torch.jit.load(file, map_location="cpu").eval(), None
        except RuntimeError:
            state = torch.load(file, map_location="cpu")
    return build_model_from_openai_state_dict(state or network.state_dict()).float()


@NAMES
@DEPRECATED
def test_openais_loader_takes_an_archive_and_rounds_it(checkpoint, tmp_path, capsys, name):
    path, ours = checkpoint(name)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(parameter.half())
    content = torch.load(path, weights_only=True)
    torch.save({**content, "weights": ours.state_dict()}, path)
    out = tmp_path / "it's" / "plain.pt"
    run(path, out, "--naming", "openai")
    here, package, open_clips = printed(capsys)
    assert [file.name for file in out.parent.iterdir()] == [out.name]
    assert package == f"clip.load({str(out)!r})  # OpenAI's package, which rounds to half precision"
    size = OURS[name]["image_size"]
    assert largest_difference(ours, openais_load(out), size) <= TOLERANCE
    assert largest_difference(ours, eval(open_clips).float(), size) <= TOLERANCE
    network, _ = eval(here)
    assert network.model_config == {"name": name, **OURS[name], "activation": "quickgelu"}
    assert same_tensors(network.state_dict(), ours.state_dict())


@GELU
def test_transformers_loads_an_export(checkpoint, tmp_path, capsys, activation):
    path, ours = checkpoint("vit", activation)
    out = tmp_path / "it's" / "folder"
    run(path, out, "--naming", "huggingface")
    assert {file.name for file in out.iterdir()} == {"config.json", "model.safetensors"}
    assert [file.name for file in out.parent.iterdir()] == ["folder"]
    network, problems = CLIPModel.from_pretrained(out, output_loading_info=True)
    assert not any(problems.values())
    assert largest_difference(ours, HuggingFace(network), 48) <= TOLERANCE
    again, _ = eval(printed(capsys)[0])
    assert again.model_config == {"name": "vit", **OURS["vit"], "activation": activation}
    assert same_tensors(again.state_dict(), ours.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-L-14", "RN50"])
def test_a_full_size_export_loads_by_the_printed_call_of_open_clip(tmp_path, capsys, name):
    model_config = {**model_configs.read_model_config(name), "activation": "quickgelu"}
    path = tmp_path / "weights.pt"
    torch.save(randomise(CLIP(model_config)).state_dict(), path)
    run(path, tmp_path / "it's.pt", "--activation", "quickgelu")
    call = re.search(r"open_clip\.create_model\(.+\)", capsys.readouterr().out)[0]
    theirs, (ours, _) = eval(call).eval(), clip.load(path, activation="quickgelu")
    assert largest_difference(ours, theirs, 224) <= TOLERANCE


# ------------------------------------------------------------------ what is in it


def test_it_is_the_clip_alone_adapters_merged(checkpoint, tmp_path):
    path, ours = checkpoint("vit", lora=True)
    saved = torch.load(path, weights_only=True)["weights"]
    name = "transformer.resblocks.0.attn.in_proj_weight"
    assert name not in saved
    run(path, tmp_path / "plain.safetensors")
    found = load_file(tmp_path / "plain.safetensors")
    assert found.keys() == CLIP(OURS["vit"]).state_dict().keys()
    assert same_tensors(found, ours.state_dict())


def test_what_clip_load_takes_is_exported_too_with_its_activation(checkpoint, tmp_path):
    path, ours = checkpoint()
    with pytest.raises(ValueError, match=r"best_model\.pth: its activation is quickgelu"):
        run(path, tmp_path / "plain.pt", "--activation", "gelu")
    names = CLIP(OURS["vit"]).state_dict()
    state = {name: ours.state_dict()[name] for name in names}
    foreign = tmp_path / "foreign.pt"
    torch.save(open_clip.model.convert_to_custom_text_state_dict(state), foreign)
    with pytest.raises(ValueError, match=r"--activation quickgelu\|gelu"):
        run(foreign, tmp_path / "plain.pt")
    run(foreign, tmp_path / "plain.pt", "--activation", "quickgelu")
    found = torch.load(tmp_path / "plain.pt", weights_only=True)
    assert found.keys() == names.keys() and same_tensors(found, state)


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("name", "activation", "sizes", "naming", "message"),
    [
        ("vit", "gelu", None, "openai", "OpenAI's package has quickgelu and heads of 64"),
        ("vit", "quickgelu", VIT, "openai", "heads of 64"),  # those of its texts have 16 channels
        ("resnet", "quickgelu", None, "huggingface", "no ModifiedResNet"),
        ("vit", "gelu", {**VIT, "text": {**TEXT, "layers": 0}}, "open_clip", "without layers"),
    ],
)
def test_what_the_other_program_lacks_is_refused(
    checkpoint, tmp_path, name, activation, sizes, naming, message
):
    path, _ = checkpoint(name, activation, sizes=sizes)
    (tmp_path / "new").mkdir()
    with pytest.raises(ValueError, match=message):
        run(path, tmp_path / "new" / "plain.pt", "--naming", naming)
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize(
    ("out", "naming", "message"),
    [
        (".", "open_clip", r"a folder; name a file with --out, as clip\.pt"),
        ("folder", "openai", r"a folder; name a file with --out, as folder.clip\.pt"),
        ("folder", "huggingface", "folder: exists; name a new folder with --out"),
        ("plain.safetensors", "openai", "OpenAI's package reads no .safetensors"),
        ("file/sub/plain.pt", "open_clip", r"plain\.pt: its folder cannot be made .*--out"),
    ],
)
def test_a_place_that_cannot_be_is_refused_before_any_work(
    tmp_path, monkeypatch, out, naming, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=message):
        run("no checkpoint.pth", out, "--naming", naming)


def test_what_is_read_is_not_written_over(checkpoint, tmp_path, monkeypatch):
    path, _ = checkpoint()
    run(path, tmp_path / "folder", "--naming", "huggingface")
    (tmp_path / "link.pth").symlink_to(path)
    monkeypatch.chdir(tmp_path)
    weights = tmp_path / "folder" / "model.safetensors"
    before = path.read_bytes(), weights.read_bytes()
    for source, out in ((path, path), (path, path.name), (path, "link.pth"), ("folder", weights)):
        with pytest.raises(ValueError, match="--checkpoint reads this; name another place"):
            run(source, out)
    assert (path.read_bytes(), weights.read_bytes()) == before
    assert (tmp_path / "link.pth").is_symlink()


@pytest.mark.parametrize(
    ("out", "naming"),
    [
        ("plain.pt", "open_clip"),
        ("plain.safetensors", "open_clip"),
        ("plain.pt", "openai"),
        ("folder", "huggingface"),
    ],
)
def test_where_the_disk_is_full_the_old_file_stays(checkpoint, tmp_path, out, naming):
    resource = pytest.importorskip("resource")  # no file may grow beyond a limit
    path, _ = checkpoint()
    (tmp_path / "new").mkdir()
    if naming != "huggingface":
        (tmp_path / "new" / out).write_text("old")
    before = {file.name: file.read_text() for file in (tmp_path / "new").iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=f"{out}: not written .*disk"):
            run(path, tmp_path / "new" / out, "--naming", naming)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {file.name: file.read_text() for file in (tmp_path / "new").iterdir()} == before
