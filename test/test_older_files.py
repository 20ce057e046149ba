"""Files that an earlier version wrote: checkpoints, runs to go on from, results."""

import gzip
import shutil

import numpy as np
import pytest
import torch

import train
from clip_gcn_image_feature_integration import encode_images, encode_texts, load_images
from conftest import ROOT, log_of
from metrics.intervals import compare
from metrics.tables import read_results
from model import load_checkpoint
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
    assert "tensorboard" in resume.read_state(folder / "last.pth")["options"]  # gone since then
    train.main(["--resume", "--out", str(folder), "--data-root", str(mini)])
    assert "resumed in epoch 2 after 2 steps\n" in capsys.readouterr().out
    straight = resume.read_state(older_run("finished") / "last.pth")
    found = resume.read_state(folder / "last.pth")
    assert "tensorboard" not in found["options"]
    assert found["weights"].keys() == straight["weights"].keys()
    for key, tensor in straight["weights"].items():
        torch.testing.assert_close(found["weights"][key], tensor, rtol=0, atol=1e-5, msg=key)
    for line, expected in zip(log_of(folder), log_of(older_run("finished")), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert line["val"] == expected["val"]


def test_a_result_file_compares_with_itself_to_nothing():
    results = read_results(OLDER / "result.json")
    [comparison] = compare(results, results)
    assert (comparison.dataset, comparison.split, comparison.images) == ("mini", "test", 12)
    assert tuple(comparison.difference["mR"]) == (0, 0, 0)
    for figures in comparison.figures:
        assert figures["mR"] == pytest.approx(results[0]["mR"])
