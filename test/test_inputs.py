"""What a run reads; frozen towers, encoded once; adapters; and that both stop and go on exactly."""

import os
import re
import shutil
import signal

import pytest
import torch
import torch.nn.functional as F

import clip
import evaluate
import train
from backbones import preprocess
from backbones.lora import is_adapted
from conftest import RESNET, changed, is_new, log_of, weights_of
from dataset.annotations import read_annotations
from det_formats.det_json import read_label_map
from model import load_checkpoint
from train import parse
from training import inputs
from training.inputs import cached, find_data, read_data, tower_keys, with_features
from training.step import start_model


def files(cache_folder):
    return sorted(os.listdir(cache_folder))


@pytest.fixture
def read(mini, tiny_model_config, cache_folder):
    """Reads data for training: read("--train", "graph"); (TrainingData, options)."""

    def do(*arguments, root=mini):
        given = ["--dataset", "mini", "--data-root", str(root), "--batch-size", "8"]
        options = parse([*given, "--graph", "object", *arguments])[0]
        data_sets = find_data(options)
        return read_data(data_sets, options, tiny_model_config, read_label_map()), options

    return do


# ------------------------------------------------------------------ what is read


def test_only_training_images_to_be_cropped_are_kept_larger(read):
    for augment, size in ((["crop", "colour"], 43), (["flip"], 32)):
        data = read("--augment", *augment, "--drop-graphs", "0.5", "--seed", "7")[0]
        assert data.train_set.image_set.image_size == size
        assert [images.image_size for images in data.val_sets] == [32]
        assert (data.train_set.drop_graphs, data.train_set.seed) == (0.5, 7)
        assert data.train_set.augment == augment


def test_data_that_cannot_be_trained_on_are_one_error(read, mini, tmp_path):
    root = tmp_path / "broken"
    shutil.copytree(mini, root)
    splits = read_annotations(root).splits
    gone, broken = splits["train"][3].name, splits["val"][5].name
    (root / "images" / gone).unlink()
    (root / "images" / broken).write_bytes(b"broken")
    with pytest.raises(ValueError, match="^2 images are missing or unreadable") as failure:
        read(root=root)
    assert gone in str(failure.value) and broken in str(failure.value)
    shutil.copytree(mini, tmp_path / "same")
    for name in ("filename", "caps"):
        shutil.copy(tmp_path / "same" / f"train_{name}.txt", tmp_path / "same" / f"test_{name}.txt")
    with pytest.raises(ValueError, match="no training image"):
        read(root=tmp_path / "same")


# ------------------------------------------------------------------ frozen towers


@pytest.fixture
def data(read, tiny_model, tiny_model_config):
    """Data of training on frozen towers, without features, with what `with_features` needs."""
    found, options = read("--train", "graph")
    return found, tiny_model(), tiny_model_config, torch.device("cpu"), options


def test_features_are_those_of_the_towers(data):
    images, network = data[0].train_set.image_set, data[1]
    pixels = preprocess.normalize(torch.stack([images.pixels[i] for i in range(24)]))
    found = with_features(*data)
    train_set = found.train_set
    with torch.no_grad():
        expected = network.encode_image(pixels)
        texts = F.normalize(network.encode_text(clip.tokenize(train_set.captions)), dim=-1)
    torch.testing.assert_close(images.features, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(train_set.text_features, texts, rtol=0, atol=1e-5)
    [val_images], [val_texts] = found.val_sets, found.val_texts
    assert val_images.features.shape == (12, 32) and val_texts.shape == (60, 32)
    for batch in train_set.batches(1, 8):
        assert "image" not in batch
        for row, i in enumerate(batch["index"]):
            assert torch.equal(batch["image_features"][row], images.features[i])
            own = train_set.text_features[train_set.first[i] : train_set.first[i + 1]]
            assert (own == batch["text_features"][row]).all(dim=1).any()


def test_features_are_computed_once_and_read_after(data, cache_folder, monkeypatch):
    first = with_features(*data)
    assert len(files(cache_folder)) == 4  # images and texts of train and val

    def never(*_, **__):
        raise AssertionError("encoded again")

    monkeypatch.setattr(inputs, "encode_images", never)
    monkeypatch.setattr(inputs, "encode_texts", never)
    again = with_features(*data)
    assert torch.equal(again.val_texts[0], first.val_texts[0])
    with torch.no_grad():
        data[1].visual.proj.mul_(2)
    with pytest.raises(AssertionError, match="encoded again"):
        with_features(*data)


def test_keys_tell_the_towers_apart(tiny_model, tiny_model_config):
    network = tiny_model()
    visual, text = tower_keys(network, tiny_model_config)
    with torch.no_grad():
        network.gcn1.bias.add_(1)
        network.logit_scale.add_(1)
        assert tower_keys(network, tiny_model_config) == (visual, text)
        network.ln_final.bias.add_(1)
        assert tower_keys(network, tiny_model_config)[0] == visual
        assert tower_keys(network, tiny_model_config)[1] != text
    gelu = tower_keys(tiny_model(), {**tiny_model_config, "activation": "gelu"})
    assert not {visual, text} & set(gelu)


@pytest.mark.parametrize("change", ["captions", "pixels", "size"])
def test_other_captions_pixels_or_sizes_are_other_files(data, cache_folder, change):
    with_features(*data)
    before, read = files(cache_folder), data[0]
    if change == "captions":
        read.train_set.captions[0] += " indeed"
    elif change == "pixels":
        read.train_set.image_set.hashes[0] = "another image"
    else:
        read.train_set.image_set.image_size += 1
    with_features(*data)
    assert len(set(files(cache_folder)) - set(before)) == 1


def test_a_broken_file_is_made_anew_and_said(tmp_path, capsys):
    path, features = tmp_path / "some.safetensors", torch.randn(3, 4)
    assert torch.equal(cached(path, lambda: features), features)
    whole = path.read_bytes()
    for content in (b"", b"no features", whole[:-4]):
        path.write_bytes(content)
        assert torch.equal(cached(path, lambda: features), features)
        said = rf"{re.escape(str(path))}: not readable .* rebuilt\n"
        assert re.fullmatch(said, capsys.readouterr().out)
        assert torch.equal(cached(path, None), features) and os.listdir(tmp_path) == [path.name]
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="not written .*FGCROSS_CACHE"):
        cached(tmp_path / "file" / "some.safetensors", lambda: torch.zeros(1))


@pytest.mark.parametrize("vision", [None, RESNET], ids=["vit", "resnet"])
def test_features_train_and_validate_as_frozen_towers(run, started, monkeypatch, vision):
    given = "--train", "graph", "--epochs", "3", "--drop-graphs", "0"
    folder = run(*given, vision=vision, out="features")
    found = weights_of(folder)
    checkpoint = ["--checkpoint", str(folder / "last.pth"), "--split", "val", "--device", "cpu"]
    [result] = evaluate.main([*checkpoint, "--batch-size", "8"])
    assert result["mR"] == pytest.approx(log_of(folder)[-1]["val_mR"], abs=1e-6)
    monkeypatch.setattr(train, "with_features", lambda data, *_: data)
    expected = weights_of(run(*given, vision=vision, out="towers"))
    assert any(is_new(name) for name in changed(started, found))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=2e-4, msg=name)


def test_augmented_images_have_no_features(read, data):
    with pytest.raises(ValueError, match="--train graph takes images as they are"):
        read("--train", "graph", "--augment", "flip")
    data[-1]["augment"] = ["crop"]  # of a run that an earlier version began
    with pytest.raises(ValueError, match="--resume: .* --augment crop.*start it anew"):
        with_features(*data)


# ------------------------------------------------------------------ adapters

ACTIVATION = "--activation", "quickgelu"
LORA = "--train", "lora", "--lora", "2", "4", "0.1", "--lr", "0.01"


def test_adapters_have_a_rate_of_their_own():
    for given, rate in (("all", 1e-5), ("lora", 2e-4)):
        arguments = ["--clip", "ViT-B/32", "--train", given]
        assert parse(arguments)[0]["lr"] == rate
        assert parse([*arguments, "--lr", "1e-3"])[0]["lr"] == 1e-3


def test_adapters_and_new_layers_train_alone_and_are_merged(run, started, pretrained):
    folder = run(*LORA, "--clip", str(pretrained[0]), *ACTIVATION)
    found = torch.load(folder / "last.pth", weights_only=True)["weights"]
    moved = changed(started, found)
    assert any(".0.A" in name for name in moved) and any(".0.B" in name for name in moved)
    assert all(".0." in name or is_new(name) or name == "logit_scale" for name in moved)

    network, saved = load_checkpoint(folder / "last.pth")  # as a plain model
    adapted, *_ = start_model(saved["options"], saved["labels"])
    adapted.load_state_dict(saved["weights"])
    assert is_adapted(adapted) and not is_adapted(network)
    text = clip.tokenize(["a ship", "two planes near a road"])
    with torch.no_grad():
        for encode, given in (("encode_image", torch.randn(4, 3, 32, 32)), ("encode_text", text)):
            expected = getattr(adapted.eval(), encode)(given)
            torch.testing.assert_close(getattr(network, encode)(given), expected)


# ------------------------------------------------------------------ stop and go on


@pytest.mark.parametrize("given", [LORA, ("--train", "graph")], ids=str)
def test_a_stopped_run_goes_on_exactly_with_the_threads_it_had(
    run, cache_folder, pretrained, tmp_path, monkeypatch, given
):
    start = "--clip", str(pretrained[0]), *ACTIVATION
    arguments = *given, *start, "--epochs", "3", "--graph", "object"
    straight = torch.load(run(*arguments, out="straight") / "last.pth", weights_only=True)
    validate = train.validate

    def stop(*options):
        os.kill(os.getpid(), signal.SIGTERM)
        return validate(*options)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "validate", stop)
        run(*arguments, out="stopped")
    shutil.rmtree(cache_folder, ignore_errors=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads % 2 + 1)
    train.main(["--resume", "--out", str(tmp_path / "stopped")])
    assert torch.get_num_threads() == threads
    found = torch.load(tmp_path / "stopped" / "last.pth", weights_only=True)
    assert found["epoch"] == straight["epoch"] == 3
    assert not changed(straight["weights"], found["weights"])
