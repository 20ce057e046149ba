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
from training import resume
from training.step import make_learner


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


# ------------------------------------------------------------------ options


def other_value(action, saved):
    """An option with another value, as it is given on the command line."""
    flag, value = action.option_strings[0], saved[action.dest]
    if action.nargs == 0:
        return [flag]
    if action.choices:
        return [flag, next(c for c in action.choices if value not in (c, [c]))]
    if action.type in (int, float):
        return [flag, *(["9"] if action.nargs is None else ["9"] * action.nargs)]
    return [flag, "other"]


def options_of(folder):
    return resume.read_state(folder / "last.pth")["options"]


def closed():
    """The options that are not free, as argparse knows them."""
    actions = [a for a in train.make_parser()._actions if a.dest not in {"help", *resume.FREE}]
    assert {a.dest for a in actions} | resume.FREE == set(train.parse([])[0])
    return actions


def parse(folder, *arguments):
    return train.parse(["--resume", "--out", str(folder), *arguments])[0]


def refused(call, *arguments):
    with pytest.raises(ValueError) as failure:
        call(*arguments)
    return str(failure.value).splitlines()


def test_other_options_are_refused_with_all_differences(stopped):
    before, saved, lines, every = contents(stopped), options_of(stopped), [], []
    for action in closed():
        given = other_value(action, saved)
        head, *found = refused(parse, stopped, *given)
        assert head.startswith("--resume: these options alter the result")
        assert len(found) == 1 and found[0].startswith(
            f"  {action.option_strings[0]}: {saved[action.dest]} in the run, "
        )
        lines, every = lines + found, every + given
    assert len(lines) > 20 and refused(parse, stopped, *every)[1:] == lines
    assert contents(stopped) == before


def test_the_same_options_may_be_given_again(stopped):
    saved, given = options_of(stopped), []
    for action in closed():
        value = saved[action.dest]
        if action.nargs != 0 and value is not None:
            values = value if isinstance(value, list | tuple) else [value]
            given += [action.option_strings[0], *map(str, values)]
    assert len(given) > 30
    assert parse(stopped, *given) == {**saved, "resume": True}


def test_options_that_alter_nothing_may_be_others(stopped):
    given = {"workers": 3, "device": "auto", "save_every": 7, "cache_gb": 0.5, "cache_dir": "c"}
    given |= {"data_root": ["r"], "det_json": ["d"], "annotations": ["txt"]}
    given |= {"tensorboard": True, "plot": True}
    arguments = []
    for name, value in given.items():
        values = [] if value is True else value if isinstance(value, list) else [value]
        arguments += [f"--{name.replace('_', '-')}", *map(str, values)]
    assert set(given) | {"out", "resume"} == resume.FREE
    assert parse(stopped, *arguments) == {**options_of(stopped), **given, "resume": True}


def test_curves_are_drawn_where_this_call_asks_for_them(again):
    content = torch.load(again / "last.pth", weights_only=True)
    content["options"] |= {"plot": True, "tensorboard": True}
    torch.save(content, again / "last.pth")
    options = parse(again, "--plot")
    assert options["plot"] and not options["tensorboard"]


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


def change_a_test_image_into_it(root, record):
    name = read_annotations(root).splits["test"][2].name
    shutil.copy(root / "images" / record.name, root / "images" / name)


@pytest.mark.parametrize(
    ("split", "change"),
    [
        *((split, c) for split in ("train", "dev") for c in (change_pixel, change_box)),
        *((split, change_caption) for split in ("train", "dev")),
        ("train", change_a_test_image_into_it),
    ],
)
def test_changed_data_are_refused_and_nothing_written(again, mini, tmp_path, split, change):
    root, before = Path(shutil.copytree(mini, tmp_path / "changed")), contents(again)
    drawn = json.loads((again / "split.json").read_text(encoding="utf-8"))["mini"]
    records = {record.name: record for record in read_annotations(root).splits["train"]}
    change(root, records[drawn[split][2]])
    arguments = ["--resume", "--out", str(again), "--data-root", str(root)]
    [message] = refused(train.main, arguments)
    assert message == (
        f"--resume: images, captions or detections have changed since {again}/last.pth was saved; "
        "put them back as they were, or start a new run in another --out"
    )
    assert contents(again) == before


def test_a_split_that_would_be_drawn_otherwise_is_not_written(again, mini, tmp_path):
    root, before = Path(shutil.copytree(mini, tmp_path / "changed")), contents(again)
    for name in ("train_caps.txt", "train_filename.txt"):  # without the last image
        lines = (root / name).read_text(encoding="utf-8").splitlines(keepends=True)
        (root / name).write_text("".join(lines[: len(lines) * 23 // 24]), encoding="utf-8")
    [message] = refused(train.main, ["--resume", "--out", str(again), "--data-root", str(root)])
    assert "captions or detections have changed since" in message
    assert contents(again) == before


# ------------------------------------------------------------------ the folder


def test_without_a_state_there_is_nothing_to_resume(again):
    arguments, path = ["--resume", "--out", str(again)], again / "last.pth"
    (again / "best_model.pth").replace(path)
    assert refused(train.main, arguments) == [
        f"{path}: not a last.pth of train.py; take another --out"
    ]
    path.write_bytes(path.read_bytes()[:1000])
    assert refused(train.main, arguments)[0].startswith(f"{path}: broken")
    path.unlink()
    [message] = refused(train.main, arguments)
    assert message == f"--resume: no {path}; name the run's folder with --out"


def test_a_folder_may_have_moved(stopped, tmp_path, monkeypatch):
    shutil.copytree(stopped, tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    assert train.parse(["--resume"])[0] == {**options_of(stopped), "out": "models", "resume": True}


def test_a_state_of_another_version_is_refused(again):
    path = again / "last.pth"
    torch.save({**torch.load(path, weights_only=True), "version": model.VERSION - 1}, path)
    assert "version" in refused(train.main, ["--resume", "--out", str(again)])[0]


@pytest.mark.parametrize("lines", [None, 0])
def test_a_log_that_is_not_the_runs_is_refused(again, lines):
    log = again / "log.jsonl"
    assert len(log_of(again)) == 1
    log.unlink() if lines is None else log.write_text("", encoding="utf-8")
    before = contents(again)
    assert str(log) in refused(train.main, ["--resume", "--out", str(again)])[0]
    assert contents(again) == before


def test_a_new_run_replaces_a_finished_one_only(small, again, mini, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    new, before = (
        [*small, "--data-root", str(mini), "--out", str(again), "--seed", "1"],
        contents(again),
    )
    [message] = refused(train.main, new)
    assert message == (
        f"{again / 'last.pth'}: a run was stopped here in epoch 2 of 2; go on with --resume, "
        "delete it, or take another --out"
    )
    assert contents(again) == before
    train.main(["--resume", "--out", str(again)])
    monkeypatch.setattr(train, "train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        train.main(new)
    # Nothing is left that could be taken for the new run's.
    assert {path.name for path in again.iterdir()} == {"log.jsonl", "split.json"}
    assert log_of(again) == []


@pytest.mark.parametrize(
    ("option", "value"), [("--epochs", "0"), ("--seed", "-1"), ("--dev-images", "-3")]
)
def test_numbers_without_sense_are_refused(option, value):
    [message] = refused(train.parse, [option, value])
    assert message.startswith(f"{option} {value}: expected")


# ------------------------------------------------------------------ what is put back


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
