"""CLIPs for other image sizes, and exported for the libraries that other people use."""

import ast
import json
import re
from pathlib import Path
from types import SimpleNamespace

import open_clip
import pytest
import torch
from open_clip.model import build_model_from_openai_state_dict, resize_pos_embed
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPModel

import clip
import model
from backbones import export, model_configs
from backbones.lora import adapt
from backbones.towers import CLIP
from det_formats.det_json import read_label_map
from test_clip import (
    GELU,
    HuggingFace,
    definitions,  # noqa: F401  a fixture
    open_clip_config,
    open_clip_model,
)
from test_towers import (
    RESNET,
    TOLERANCE,
    VIT,
    largest_difference,
    randomise,
    seeded_and_in_full_precision,  # noqa: F401  a fixture, for every test here too
)

TEXT = {**VIT["text"], "width": 64, "layers": 2, "heads": 1}
OURS = {  # heads of 64 channels, as OpenAI's loader takes for granted
    "vit": {**VIT, "text": TEXT},
    "resnet": {**RESNET, "text": TEXT},
}
POSITIONS = {"vit": "visual.positional_embedding"}
POSITIONS["resnet"] = "visual.attnpool.positional_embedding"


# ------------------------------------------------------------------ other image sizes


@pytest.mark.parametrize("image_size", [16, 32, 64, 96, 224])
def test_another_image_size_gives_what_open_clip_gives(definitions, capsys, image_size):  # noqa: F811
    path, source = definitions / "weights.pt", open_clip_model("vit")
    torch.save(source.state_dict(), path)
    config = open_clip_config({**VIT, "image_size": image_size}, "quickgelu")
    theirs = open_clip.model.CLIP(**config).eval()
    open_clip.load_checkpoint(theirs, path)
    ours, preprocess = clip.load(path, activation="quickgelu", image_size=image_size)
    assert ours.model_config["image_size"] == image_size
    assert torch.equal(ours.visual.positional_embedding, theirs.visual.positional_embedding)
    assert max(largest_difference(ours, theirs, image_size)) <= TOLERANCE
    [line] = capsys.readouterr().out.splitlines()
    assert (
        f"48 -> {image_size}" in line
        and f"3 x 3 to {image_size // 16} x {image_size // 16}" in line
    )


@pytest.mark.parametrize(("name", "image_size"), [("vit", 80), ("resnet", 64), ("resnet", 160)])
def test_positions_are_interpolated_as_by_open_clip(name, image_size):
    model_config, key = {"vit": VIT, "resnet": RESNET}[name], POSITIONS[name]
    state = CLIP(model_config).state_dict()
    before = {name: tensor.clone() for name, tensor in state.items()}
    found, changed = model_configs.resized(state, model_config, image_size)
    side = image_size // (16 if name == "vit" else 32)
    reference = {"visual.positional_embedding": state[key]}
    visual = SimpleNamespace(grid_size=(side, side))
    resize_pos_embed(reference, SimpleNamespace(visual=visual))
    assert torch.equal(found[key], reference["visual.positional_embedding"])
    assert changed == {**model_config, "image_size": image_size}
    assert all(torch.equal(found[name], before[name]) for name in found if name != key)
    assert all(torch.equal(state[name], before[name]) for name in state)
    network = CLIP(changed).eval()
    network.load_state_dict(found)
    with torch.no_grad():
        assert network.encode_image(torch.zeros(1, 3, image_size, image_size)).isfinite().all()


def test_the_same_image_size_changes_nothing_and_prints_nothing(capsys):
    state = CLIP(VIT).state_dict()
    assert model_configs.resized(state, VIT, 48) == (state, VIT)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("model_config", "patch"), [(VIT, 16), (RESNET, 32)])
@pytest.mark.parametrize("image_size", [0, -32, 8, 100])
def test_a_size_that_is_no_multiple_of_the_patch_is_refused(model_config, patch, image_size):
    message = f"--image-size {image_size}: expected a multiple of {patch}, above 0"
    with pytest.raises(ValueError, match=message):
        model_configs.check_image_size(model_config, image_size)
    with pytest.raises(ValueError, match=message):
        model_configs.resized(CLIP(model_config).state_dict(), model_config, image_size)
    model_configs.check_image_size(model_config, 64)


# ------------------------------------------------------------------ export


@pytest.fixture
def checkpoint(tmp_path, definitions, monkeypatch):  # noqa: F811
    """Write a checkpoint of ours: checkpoint("vit", "gelu", lora=True); (path, its CLIP)."""
    for name, model_config in OURS.items():
        (definitions / f"{name}.json").write_text(json.dumps(model_config))

    def write(name="vit", activation="quickgelu", lora=False):
        model_config = {"name": name, **OURS[name], "activation": activation}
        options = {"graph": "object", "fusion": "sum", "image_encoder_ratio": (0.5, 0.5)}
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


NAMES = pytest.mark.parametrize("name", OURS)
DEPRECATED = pytest.mark.filterwarnings("ignore:`torch.jit")  # which OpenAI's loader calls


def run(*arguments):
    clip.main(["export", *map(str, arguments)])


def printed(capsys):
    """The lines of Python that say how to load an export."""
    return capsys.readouterr().out.split("load it with\n")[1].splitlines()


def openais_load(path):
    """A file by the sequence of OpenAI's clip.load, which opens it once; heads by the widths."""
    with open(path, "rb") as file:
        try:
            network, state = torch.jit.load(file, map_location="cpu").eval(), None
        except RuntimeError:
            state = torch.load(file, map_location="cpu")
    return build_model_from_openai_state_dict(state or network.state_dict()).float()


@GELU
@NAMES
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_open_clip_loads_an_export(checkpoint, tmp_path, capsys, name, activation, suffix):
    path, ours = checkpoint(name, activation)
    out = tmp_path / "new" / f"plain{suffix}"
    run("--checkpoint", path, "--out", out)
    text = capsys.readouterr().out
    config = open_clip_config(OURS[name], "gelu")
    (tmp_path / f"exported-{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / f"exported-{name}.json")
    theirs = open_clip.create_model(
        f"exported-{name}", pretrained=str(out), force_quick_gelu=activation == "quickgelu"
    ).eval()
    assert max(largest_difference(ours, theirs, OURS[name]["image_size"])) <= TOLERANCE
    assert f"{out}: the CLIP of {path}, activation {activation}" in text
    assert ("force_quick_gelu=True" in text) == (activation == "quickgelu")
    assert [file.name for file in out.parent.iterdir()] == [out.name]


@NAMES
@DEPRECATED
def test_openais_loader_takes_an_archive_and_rounds_it(checkpoint, tmp_path, capsys, name):
    path, ours = checkpoint(name)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(parameter.half())
    content = torch.load(path, weights_only=True)
    torch.save({**content, "weights": ours.state_dict()}, path)
    out = tmp_path / "new" / "plain.pt"
    run("--checkpoint", path, "--out", out, "--naming", "openai")
    lines = printed(capsys)
    assert [file.name for file in out.parent.iterdir()] == [out.name]
    assert f"clip.load('{out}')  # OpenAI's package, which rounds to half precision" in lines
    size = OURS[name]["image_size"]
    assert max(largest_difference(ours, openais_load(out), size)) <= TOLERANCE
    [call] = [line for line in lines if line.startswith("open_clip.load_openai_model(")]
    theirs = eval(call).float()
    assert max(largest_difference(ours, theirs, size)) <= TOLERANCE


@NAMES
@pytest.mark.filterwarnings("error")
def test_an_archive_loads_here_and_tells_the_activation(checkpoint, tmp_path, capsys, name):
    path, ours = checkpoint(name)
    run("--checkpoint", path, "--out", tmp_path / "plain.pt", "--naming", "openai")
    network, _ = eval(printed(capsys)[0])
    assert network.model_config == {"name": name, **OURS[name], "activation": "quickgelu"}
    assert network.path == tmp_path / "plain.pt"
    state = ours.state_dict()
    assert all(torch.equal(t, state[key]) for key, t in network.state_dict().items())


@DEPRECATED
def test_an_archive_has_the_layers_of_a_clip_alone_adapters_merged(checkpoint, tmp_path):
    path, ours = checkpoint("vit", lora=True)
    run("--checkpoint", path, "--out", tmp_path / "plain.pt", "--naming", "openai")
    found = torch.jit.load(tmp_path / "plain.pt").state_dict()
    assert found.keys() == CLIP(OURS["vit"]).state_dict().keys()
    assert all(torch.equal(tensor, ours.state_dict()[key]) for key, tensor in found.items())


@pytest.mark.parametrize(
    ("model_config", "activation"), [({**VIT, "text": TEXT}, "gelu"), (VIT, "quickgelu")]
)
def test_what_openais_loader_would_build_wrong_is_refused(
    checkpoint, tmp_path, monkeypatch, model_config, activation
):
    monkeypatch.setitem(OURS, "vit", model_config)  # VIT has heads of 16 channels
    path, _ = checkpoint("vit", activation)
    with pytest.raises(ValueError, match="vit: OpenAI's package has quickgelu and heads of 64.*"):
        run("--checkpoint", path, "--out", tmp_path / "plain.pt", "--naming", "openai")
    assert not (tmp_path / "plain.pt").exists()


def test_definitions_of_open_clips_names_have_its_sizes():
    assert set(export.OPEN_CLIP) <= set(model_configs.model_config_names())
    for name in export.OPEN_CLIP:
        theirs, ours = open_clip.get_model_config(name), model_configs.read_model_config(name)
        expected = open_clip_config(ours, "gelu")
        for tower in ("vision_cfg", "text_cfg"):
            expected[tower] = {"head_width": 64, "patch_size": None, **expected[tower]}
            found = {"head_width": 64, "patch_size": None, **theirs[tower]}
            assert found == expected[tower]
        assert theirs["embed_dim"] == ours["embed_dim"]


@pytest.mark.parametrize("naming", export.NAMINGS)
@pytest.mark.parametrize("known", [False, True])
def test_what_is_printed_is_python(checkpoint, tmp_path, capsys, monkeypatch, naming, known):
    if known:
        monkeypatch.setattr(export, "OPEN_CLIP", ("vit",))
    path, _ = checkpoint("vit")
    out = tmp_path / "it's" / "plain.pt"
    run("--checkpoint", path, "--out", out, "--naming", naming)
    lines = printed(capsys)
    for line in lines:
        for node in ast.walk(ast.parse(line)):
            if isinstance(node, ast.Constant) and "plain" in str(node.value):
                assert node.value == str(out)
    assert eval(lines[0])[0].model_config["name"] == "vit"
    assert any(line.startswith("#") for line in lines) == (naming == "open_clip" and not known)


@GELU
def test_transformers_loads_an_export(checkpoint, tmp_path, capsys, activation):
    path, ours = checkpoint("vit", activation)
    out = tmp_path / "new" / "folder"
    run("--checkpoint", path, "--out", out, "--naming", "huggingface")
    assert {file.name for file in out.iterdir()} == {"config.json", "model.safetensors"}
    assert [file.name for file in out.parent.iterdir()] == ["folder"]
    network, problems = CLIPModel.from_pretrained(out, output_loading_info=True)
    assert not any(problems.values())
    theirs = HuggingFace(network)
    assert max(largest_difference(ours, theirs, 48)) <= TOLERANCE
    again, _ = clip.load(out)
    assert again.model_config == {"name": "vit", **OURS["vit"], "activation": activation}
    assert all(torch.equal(t, ours.state_dict()[key]) for key, t in again.state_dict().items())
    assert f"clip.load('{out}')" in capsys.readouterr().out


@NAMES
def test_an_export_loads_here_with_the_printed_call(checkpoint, tmp_path, capsys, name):
    path, ours = checkpoint(name, "gelu")
    run("--checkpoint", path, "--out", tmp_path / "plain.pt")
    network, _ = eval(printed(capsys)[0])
    state = ours.state_dict()
    assert network.state_dict().keys() == CLIP(OURS[name]).state_dict().keys()
    assert all(torch.equal(t, state[key]) for key, t in network.state_dict().items())


def test_adapters_are_merged(checkpoint, tmp_path):
    path, ours = checkpoint(lora=True)
    run("--checkpoint", path, "--out", tmp_path / "plain.safetensors")
    state = load_file(tmp_path / "plain.safetensors")
    assert state.keys() == CLIP(OURS["vit"]).state_dict().keys()
    assert all(torch.equal(tensor, ours.state_dict()[key]) for key, tensor in state.items())
    saved = torch.load(path, weights_only=True)["weights"]
    name = "transformer.resblocks.0.attn.in_proj_weight"
    assert name not in saved and name in state


def test_what_clip_load_takes_is_exported_too(checkpoint, tmp_path, capsys):
    path, ours = checkpoint()
    torch.save(open_clip_state(ours), tmp_path / "foreign.pt")
    with pytest.raises(ValueError, match=r"--activation quickgelu\|gelu"):
        run("--checkpoint", tmp_path / "foreign.pt", "--out", tmp_path / "plain.pt")
    arguments = ("--checkpoint", tmp_path / "foreign.pt", "--out", tmp_path / "plain.pt")
    run(*arguments, "--activation", "quickgelu")
    state = torch.load(tmp_path / "plain.pt", weights_only=True)
    assert all(torch.equal(tensor, ours.state_dict()[key]) for key, tensor in state.items())


def open_clip_state(network):
    """Its CLIP's state dict as of a CustomTextCLIP."""
    names = CLIP(OURS["vit"]).state_dict()
    state = {name: network.state_dict()[name] for name in names}
    return open_clip.model.convert_to_custom_text_state_dict(state)


def test_an_activation_that_contradicts_the_checkpoint_is_refused(checkpoint, tmp_path):
    path, _ = checkpoint()
    with pytest.raises(ValueError, match=r"best_model\.pth: its activation is quickgelu, not gelu"):
        run("--checkpoint", path, "--out", tmp_path / "plain.pt", "--activation", "gelu")


def test_what_no_other_program_has_is_refused(checkpoint, tmp_path, monkeypatch):
    path, _ = checkpoint("resnet")
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="no ModifiedResNet"):
        run("--checkpoint", path, "--out", out, "--naming", "huggingface")
    monkeypatch.setitem(OURS, "vit", {**VIT, "text": {**TEXT, "layers": 0}})
    path, _ = checkpoint("vit")
    with pytest.raises(ValueError, match="text tower without layers"):
        run("--checkpoint", path, "--out", out)
    assert not out.exists()


def test_a_folder_that_exists_is_not_replaced(checkpoint, tmp_path):
    path, _ = checkpoint()
    with pytest.raises(ValueError, match="exists; name a new folder with --out"):
        run("--checkpoint", path, "--out", tmp_path, "--naming", "huggingface")


@pytest.fixture
def idle(monkeypatch):
    """No checkpoint is read."""
    monkeypatch.setattr(clip, "_plain", None)


@pytest.mark.parametrize("naming", ["open_clip", "openai"])
def test_a_folder_is_refused_as_a_file_before_any_work(tmp_path, monkeypatch, idle, naming):
    monkeypatch.chdir(tmp_path)
    for out in (".", "", tmp_path):
        with pytest.raises(ValueError, match=r"a folder; name a file with --out, as .*clip\.pt"):
            run("--checkpoint", "best_model.pth", "--out", out, "--naming", naming)


@pytest.mark.parametrize("naming", export.NAMINGS)
def test_a_folder_that_cannot_be_made_is_refused_before_any_work(tmp_path, idle, naming):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "sub" / "plain.pt"
    with pytest.raises(ValueError, match=r"plain\.pt: its folder cannot be made .*--out"):
        run("--checkpoint", "best_model.pth", "--out", out, "--naming", naming)


def test_openais_package_is_given_no_safetensors(tmp_path, idle):
    out = tmp_path / "plain.safetensors"
    with pytest.raises(ValueError, match="OpenAI's package reads no .safetensors"):
        run("--checkpoint", "best_model.pth", "--out", out, "--naming", "openai")


def test_the_checkpoint_is_not_written_over(checkpoint, tmp_path, monkeypatch):
    path, _ = checkpoint()
    before = path.read_bytes()
    (tmp_path / "link.pth").symlink_to(path)
    monkeypatch.chdir(tmp_path)
    for out in (path, path.name, "link.pth"):
        with pytest.raises(ValueError, match="--checkpoint reads this; name another place"):
            run("--checkpoint", path, "--out", out)
    assert path.read_bytes() == before and (tmp_path / "link.pth").is_symlink()


def test_the_weights_of_a_folder_are_not_written_over(checkpoint, tmp_path):
    path, folder = checkpoint()[0], tmp_path / "folder"
    run("--checkpoint", path, "--out", folder, "--naming", "huggingface")
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="--checkpoint reads this; name another place"):
        run("--checkpoint", folder, "--out", folder / "model.safetensors")
    assert (folder / "model.safetensors").read_bytes() == before


OUTS = pytest.mark.parametrize(
    ("out", "naming"),
    [
        ("plain.pt", "open_clip"),
        ("plain.safetensors", "open_clip"),
        ("plain.pt", "openai"),
        ("folder", "huggingface"),
    ],
)


@OUTS
def test_nothing_is_left_where_writing_fails(checkpoint, tmp_path, monkeypatch, out, naming):
    path, _ = checkpoint()
    folder = tmp_path / "new"

    def fail(number, reason):
        def replace(*_):
            raise OSError(number, reason)

        monkeypatch.setattr(export.os, "replace", replace)
        with pytest.raises(OSError, match=f"{out}: not written .*{reason}") as error:
            run("--checkpoint", path, "--out", folder / out, "--naming", naming)
        assert not list(folder.iterdir())
        return str(error.value)

    assert "the disk is full" in fail(28, "No space left on device")
    assert "disk" not in fail(13, "Permission denied")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a full device")
@OUTS
def test_a_full_disk_is_told_while_writing(checkpoint, tmp_path, monkeypatch, out, naming):
    def save_file(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    path, _ = checkpoint()
    monkeypatch.setattr(export, "open", lambda *_: open("/dev/full", "wb"), raising=False)
    monkeypatch.setattr("safetensors.torch.save_file", save_file)
    with pytest.raises(OSError, match=f"{out}: not written .*the disk is full"):
        run("--checkpoint", path, "--out", tmp_path / "new" / out, "--naming", naming)
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize("arguments", [[], ["export"], ["import"], ["export", "--no-such-option"]])
def test_a_wrong_command_line_is_a_usage_error(capsys, arguments):
    with pytest.raises(SystemExit) as end:
        clip.main(arguments)
    assert end.value.code == 2 and "usage:" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViT-B-32", "RN50"])
def test_a_full_size_export_loads_by_the_printed_call_of_open_clip(tmp_path, capsys, name):
    model_config = {**model_configs.read_model_config(name), "activation": "quickgelu"}
    path = tmp_path / "weights.pt"
    torch.save(randomise(CLIP(model_config)).state_dict(), path)
    out = tmp_path / "plain.pt"
    run("--checkpoint", path, "--out", out, "--activation", "quickgelu")
    call = re.search(r"open_clip\.create_model\(.+\)", capsys.readouterr().out)[0]
    theirs, (ours, _) = eval(call).eval(), clip.load(path, activation="quickgelu")
    assert max(largest_difference(ours, theirs, 224)) <= TOLERANCE
