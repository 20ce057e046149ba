"""What may change before a run is resumed, what is refused, and what is put back."""

import json
import os
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import model
import train
from backbones import model_configs
from conftest import log_of
from dataset.annotations import read_annotations
from options import FREE, OPTIONS
from training import resume
from training.step import make_learner

CLOSED = [row for row in OPTIONS if "train" in row.scripts and row.name not in FREE]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Arguments of a run with a tiny model; ten of its training images are its dev split."""
    folder = tmp_path_factory.mktemp("models")
    towers = {"width": 16, "layers": 1, "heads": 1}
    model_config = {
        "embed_dim": 16,
        "image_size": 32,
        "vision": {"patch_size": 16, **towers},
        "text": {"context_length": 77, "vocab_size": 49408, **towers},
    }
    (folder / "tiny.json").write_text(json.dumps(model_config), encoding="utf-8")
    fixed = ["--model", "tiny", "--device", "cpu", "--batch-size", "7", "--epochs", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_configs, "MODELS", folder)
        yield [*fixed, "--dataset", "mini", "--dev-images", "10"]


@pytest.fixture(scope="module")
def stopped(small, mini, tmp_path_factory):
    """A folder in which a run was stopped after the first step of the second epoch."""
    folder, calls, train_step = tmp_path_factory.mktemp("stopped") / "out", [], train.train_step

    def stopped_step(*arguments):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(*arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "train_step", stopped_step)
        train.main([*small, "--data-root", str(mini), "--out", str(folder)])
    return folder


@pytest.fixture
def again(stopped, tmp_path):
    """A copy of that folder, which may be changed."""
    return Path(shutil.copytree(stopped, tmp_path / "out"))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refused(call, *arguments):
    with pytest.raises(ValueError) as failure:
        call(*arguments)
    return str(failure.value).splitlines()


def resumed(folder, *arguments):
    return train.main(["--resume", "--out", str(folder), *arguments])


# ------------------------------------------------------------------ options

OTHERS = (
    "--dataset other --clean pir --template {} --dev-images 9 --graph-control exchanged "
    "--augment flip --drop-graphs 0.9 --drop-test-captions --model other --clip other "
    "--image-size 64 --graph none --fusion gate --image-encoder-ratio 1 0 --labels other "
    "--max-objects 9 --loss hinge --margin 0.9 --train image --lora 9 9 0 --epochs 9 --lr 9 "
    "--lr-new 9 --weight-decay 9 --precision bf16 --patience 9 --seed 9 --batch-size 9 "
    "--activation gelu"
)
FREE_ONES = (
    "--workers 3 --device auto --save-every 7 --cache-gb 0.5 --cache-dir c --data-root r "
    "--det-json d --annotations txt --plot"
)


def options_of(folder):
    return resume.read_state(folder / "last.pth")["options"]


def parse(folder, *arguments):
    return train.parse(["--resume", "--out", str(folder), *arguments])[0]


def test_other_options_are_refused_with_all_differences(stopped):
    head, *found = refused(parse, stopped, *OTHERS.split())
    assert head.startswith("--resume: these options alter the result")
    assert [line.split(":")[0].strip() for line in found] == [row.flag for row in CLOSED]
    assert "  --epochs: 2 in the run, 9 now" in found
    assert refused(parse, stopped, "--seed", "9")[1:] == ["  --seed: 0 in the run, 9 now"]


def test_the_same_options_and_free_ones_may_be_given(stopped):
    saved = options_of(stopped)
    same = []
    for row in CLOSED:
        value = saved[row.name]
        if row.settings.get("action") != "store_true" and value is not None:
            values = value if isinstance(value, list | tuple) else [value]
            same += [row.flag, *map(str, values)]
    assert len(same) > 30
    free = {"workers": 3, "device": "auto", "save_every": 7, "cache_gb": 0.5, "cache_dir": "c"}
    free |= {"data_root": ["r"], "det_json": ["d"], "annotations": ["txt"], "plot": True}
    assert {*free, "out", "resume"} == FREE
    found = parse(stopped, *same, *FREE_ONES.split())
    assert found == {**saved, **free, "resume": True}


def test_a_folder_may_have_moved_and_curves_are_of_this_call(stopped, tmp_path, monkeypatch):
    shutil.copytree(stopped, tmp_path / "models")
    content = torch.load(stopped / "last.pth", weights_only=True)
    content["options"]["plot"] = True
    torch.save(content, tmp_path / "models" / "last.pth")
    monkeypatch.chdir(tmp_path)
    assert train.parse(["--resume"])[0] == {**options_of(stopped), "out": "models", "resume": True}


# ------------------------------------------------------------------ data


def change_pixel(root, record):
    path = root / "images" / record.name
    pixels = np.array(Image.open(path))
    pixels[5, 5, 0] ^= 1
    Image.fromarray(pixels).save(path)


def change_box(root, record):
    path = (root / "det_json" / record.name).with_suffix(".json")
    found = json.loads(path.read_text(encoding="utf-8"))
    found[0]["bbox"][0] += 0.5
    path.write_text(json.dumps(found), encoding="utf-8")


def change_caption(root, record):
    path = root / "train_caps.txt"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(record.captions[1], "something else", 1), encoding="utf-8")


def put_it_among_the_test_images(root, record):
    name = read_annotations(root).splits["test"][2].name
    shutil.copy(root / "images" / record.name, root / "images" / name)


def take_the_last_image_away(root, record):
    for name in ("train_caps.txt", "train_filename.txt"):  # so that other splits would be drawn
        lines = (root / name).read_text(encoding="utf-8").splitlines(keepends=True)
        (root / name).write_text("".join(lines[: len(lines) * 23 // 24]), encoding="utf-8")


@pytest.mark.parametrize(
    ("split", "change"),
    [
        ("train", change_pixel),
        ("dev", change_box),
        ("train", change_caption),
        ("train", put_it_among_the_test_images),
        ("train", take_the_last_image_away),
    ],
)
def test_changed_data_are_refused_and_nothing_written(again, mini, tmp_path, split, change):
    root, before = Path(shutil.copytree(mini, tmp_path / "changed")), contents(again)
    drawn = json.loads((again / "split.json").read_text(encoding="utf-8"))["mini"]
    records = {record.name: record for record in read_annotations(root).splits["train"]}
    change(root, records[drawn[split][2]])
    [message] = refused(resumed, again, "--data-root", str(root))
    assert f"captions or detections have changed since {again}/last.pth was saved" in message
    assert contents(again) == before


# ------------------------------------------------------------------ the folder


def test_without_a_state_there_is_nothing_to_resume(again):
    path = again / "last.pth"
    saved = torch.load(path, weights_only=True)
    torch.save({**saved, "version": model.VERSION - 1}, path)
    assert "from another version" in refused(resumed, again)[0]
    (again / "best_model.pth").replace(path)
    assert refused(resumed, again) == [f"{path}: not a last.pth of train.py; take another --out"]
    path.write_bytes(path.read_bytes()[:1000])
    assert refused(resumed, again)[0].startswith(f"{path}: broken")
    path.unlink()
    assert refused(resumed, again) == [f"--resume: no {path}; name the run's folder with --out"]


def test_a_log_that_is_not_the_runs_is_refused(again):
    log = again / "log.jsonl"
    log.write_text("", encoding="utf-8")
    before = contents(again)
    assert str(log) in refused(resumed, again)[0]
    assert contents(again) == before
    log.unlink()
    assert str(log) in refused(resumed, again)[0]


def test_a_new_run_replaces_a_finished_one_only(small, again, mini, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    new = [*small, "--data-root", str(mini), "--out", str(again), "--seed", "1"]
    before = contents(again)
    assert refused(train.main, new) == [
        f"{again / 'last.pth'}: a run was stopped here in epoch 2 of 2; go on with --resume, "
        "delete it, or take another --out"
    ]
    assert contents(again) == before
    for name in ("last.pth.1-a.tmp", "log.jsonl.1-a.tmp"):
        (again / name).touch()  # of a process that was killed while it saved
    resumed(again)
    assert contents(again).keys() == before.keys()
    monkeypatch.setattr(train, "train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        train.main(new)
    # Nothing is left that could be taken for the new run's.
    assert {path.name for path in again.iterdir()} == {"log.jsonl", "split.json"}
    assert log_of(again) == []


# ------------------------------------------------------------------ what is put back


def test_another_device_is_said_to_differ(again, capsys):
    saved = torch.load(again / "last.pth", weights_only=True)
    saved["state"].update(device="cuda", threads=2)
    torch.save(saved, again / "last.pth")
    threads = torch.get_num_threads()
    resumed(again)
    line = "resumed on cpu, begun on cuda: no longer bit-exact\n"
    assert capsys.readouterr().out.count(line) == 1 and len(log_of(again)) == 2
    state = resume.read_state(again / "last.pth")["state"]
    assert (state["device"], state["threads"]) == ("cpu", threads)


def test_generators_scaler_and_threads_are_as_they_were(tiny_model, tmp_path, device):
    options = {"clip": None, "lr": 1e-5, "lr_new": 1e-3, "weight_decay": 0, "precision": "fp16"}
    how, progress = {"model_config": {}, "labels": [], "options": {}}, {"epoch": 1, "log_lines": 0}
    learner, threads = make_learner(tiny_model().to(device), options, 9), torch.get_num_threads()
    learner.scaler.load_state_dict({**learner.scaler.state_dict(), "scale": 32.0})
    resume.save_state(tmp_path / "last.pth", learner, {**how, "model": learner.model}, progress)

    def draws():
        found = [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn()]
        return [*found, torch.rand(1).item(), torch.rand(1, device=device).item()]

    first, learner = draws(), make_learner(tiny_model().to(device), options, 9)
    torch.set_num_threads(threads + 1)
    state = resume.read_state(tmp_path / "last.pth")["state"]
    resume.restore(learner, state)
    assert draws() == first and learner.scaler.get_scale() == 32.0
    resume.use_threads(state, device)
    assert torch.get_num_threads() == threads + (device.type == "cuda")
    torch.set_num_threads(threads)
