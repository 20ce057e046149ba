"""Files that an earlier version wrote: checkpoints, runs to go on from, results."""

import gzip
import shutil

import numpy as np
import pytest
import torch

import evaluate
import train
from clip_gcn_image_feature_integration import encode_images, encode_texts, load_images
from conftest import ROOT, log_of
from metrics.intervals import compare
from metrics.tables import read_results
from model import load_checkpoint
from options import converted, default_options
from training import resume

OLDER = ROOT / "test" / "fixtures" / "c1a5ef9"


def unpack(name, path):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.decompress((OLDER / f"{name}.gz").read_bytes()))
    return path


@pytest.fixture
def older_run(tmp_path):
    """The folder of a run as it was left: older_run("stopped")."""

    def restore(kind):
        folder = tmp_path / kind
        unpack(f"{kind}_last.pth", folder / "last.pth")
        shutil.copy(OLDER / f"{kind}_log.jsonl", folder / "log.jsonl")
        return folder

    return restore


@pytest.fixture
def same_threads():
    """A resumed run takes the number of threads that it had."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("kind", "features"), [("finished", "straight"), ("lora", "lora")])
def test_checkpoints_give_the_features_that_they_gave(tmp_path, kind, features):
    name = f"{kind}_best_model.pth"
    network, checkpoint = load_checkpoint(unpack(name, tmp_path / name))
    paths = [ROOT / "test" / f"sample_{i}.png" for i in range(1, 6)]
    images = load_images(paths, [path.name for path in paths], str(ROOT / "det_json"), checkpoint)
    device = torch.device("cpu")
    expected = np.load(OLDER / "features.npz")
    fused = encode_images(network, images, device)["fused"]
    texts = encode_texts(network, ["There are two tennis courts", "a plane"], device)
    np.testing.assert_allclose(fused, expected[f"{features}_image"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(texts, expected[f"{features}_text"], rtol=0, atol=1e-6)


def test_a_stopped_run_goes_on_as_if_it_had_not_been(older_run, mini, capsys, same_threads):
    folder = older_run("stopped")
    older = torch.load(folder / "last.pth", weights_only=True)["options"]
    assert {"tensorboard", "graph_control", "patience", "clean"} <= older.keys()  # gone since then
    train.main(["--resume", "--out", str(folder), "--data-root", str(mini)])
    assert "resumed in epoch 2 after 2 steps\n" in capsys.readouterr().out
    straight = resume.read_state(older_run("finished") / "last.pth")
    found = resume.read_state(folder / "last.pth")
    assert found["options"].keys() == default_options("train").keys()
    assert found["weights"].keys() == straight["weights"].keys()
    for key, tensor in straight["weights"].items():
        torch.testing.assert_close(found["weights"][key], tensor, rtol=0, atol=1e-5, msg=key)
    for line, expected in zip(log_of(folder), log_of(older_run("finished")), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert line["val"] == expected["val"]


def test_a_run_with_another_margin_does_not_go_on(older_run, mini):
    path = older_run("stopped") / "last.pth"
    content = torch.load(path, weights_only=True)
    for loss, margin in (("hinge", 0.3), ("infonce", 0.3), ("hinge", 0.2)):
        content["options"].update(loss=loss, margin=margin)
        torch.save(content, path)
        if (loss, margin) == ("hinge", 0.3):
            with pytest.raises(
                ValueError, match=r"^--resume: .*--margin 0\.3, which is 0\.2 .*--out$"
            ):
                train.parse(["--resume", "--out", str(path.parent)])
        else:
            assert train.parse(["--resume", "--out", str(path.parent)])[0]["loss"] == loss


def test_an_older_checkpoint_is_measured_as_before(save_tiny, mini):
    data = ["--dataset", "mini", "--data-root", str(mini)]
    how = ["--graph", "exchanged", "--fusion", "0.75", "--caption-form", "pir", "a photo: {}"]
    path = save_tiny("tiny.pth", *data, *how)
    content = torch.load(path, weights_only=True)
    del content["options"]["caption_form"]
    content["options"] |= {"graph": "object", "graph_control": "exchanged"}
    content["options"] |= {"fusion": "sum", "image_encoder_ratio": (0.25, 0.75)}
    content["options"] |= {"clean": "pir", "template": "a photo: {}", "margin": 0.3}
    torch.save(content, path.with_name("older.pth"))
    new, older = (
        evaluate.main(["--checkpoint", str(path.with_name(name)), "--device", "cpu"])[0]
        for name in ("tiny.pth", "older.pth")
    )
    assert older["per_image"] == new["per_image"] and older["origin"] == new["origin"]
    assert older["training_options"] == {**new["training_options"], "margin": 0.3}


@pytest.mark.parametrize(
    ("older", "today"),
    [
        ({"graph": "published", "graph_control": "own"}, {"graph": "published"}),
        ({"graph": "object", "graph_control": "no-edges"}, {"graph": "no-edges"}),
        ({"graph": "none", "graph_control": "exchanged"}, {"graph": "none"}),
        ({"clean": "none", "template": None}, {"caption_form": None}),
        ({"clean": "none", "template": "a {}"}, {"caption_form": ["a {}"]}),
        ({"clean": "pir"}, {"caption_form": ["pir"]}),
        ({"fusion": "sum", "image_encoder_ratio": (0.5, 0.5)}, {"fusion": 0.5}),
        ({"fusion": "sum", "image_encoder_ratio": [1.0, 3.0]}, {"fusion": 0.75}),
        ({"fusion": "sum", "image_encoder_ratio": (1.0, 0.0)}, {"fusion": 0.0}),
        ({"fusion": "gate", "image_encoder_ratio": (0.5, 0.5)}, {"fusion": "gate"}),
        ({"margin": 0.2, "drop_test_captions": False, "save_every": 5, "plot": True}, {}),
        ({"drop_test_captions": True}, {"drop_test_captions": True}),  # another method
        ({"epochs": 9, "patience": 9}, {"epochs": 9}),
        ({"epochs": 9, "patience": 8}, {"epochs": 9, "patience": 8}),
    ],
)
def test_older_options_have_todays_names(older, today):
    assert converted(older) == converted(today) == today


@pytest.mark.parametrize(
    "older",
    [
        {"graph": "published", "graph_control": "exchanged"},
        {"graph": "object", "graph_control": 3},
        {"clean": "lower", "template": None},
        {"clean": "pir", "template": 3},
        {"fusion": "sum", "image_encoder_ratio": (0, 0)},
        {"fusion": "sum", "image_encoder_ratio": (0.5, float("nan"))},
        {"fusion": "sum"},
    ],
)
def test_older_options_without_a_meaning_are_named(older):
    with pytest.raises(ValueError, match="^field 'options: "):
        converted(older)


def test_a_result_file_compares_with_itself_to_nothing():
    results = read_results(OLDER / "result.json")
    [comparison] = compare(results, results)
    assert (comparison.dataset, comparison.split, comparison.images) == ("mini", "test", 12)
    assert tuple(comparison.difference["mR"]) == (0, 0, 0)
    for figures in comparison.figures:
        assert figures["mR"] == pytest.approx(results[0]["mR"])
