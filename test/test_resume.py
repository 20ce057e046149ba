"""Resuming: a run stopped at any moment goes on as if it had not been, or says why it cannot."""

import hashlib
import importlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import model
import train
from backbones import model_configs
from conftest import ROOT, log_of
from dataset.annotations import Record, read_annotations
from det_formats.det_json import read_label_map
from options import FREE, default_options, for_resuming, for_training
from training import resume
from training.step import make_learner

resource = pytest.importorskip("resource")  # limits and forked processes are Unix's
TINY = {
    "embed_dim": 8,
    "image_size": 32,
    "vision": {"patch_size": 16, "width": 8, "layers": 1, "heads": 1},
    "text": {"context_length": 77, "vocab_size": 49408, "width": 8, "layers": 1, "heads": 1},
}
SLOW = pytest.mark.slow
EPOCHS, STEPS = 3, 3  # 14 images in batches of 4
SCORES = (20.0, 30.0, 25.0, 25.0, 25.0)  # on validation, by epoch: the second is the best
TIMES = {"data_seconds", "compute_seconds", "val_seconds"}

# ------------------------------------------------------------------ runs in processes of their own


def child(arguments, output, models, threads, save_seconds, prepare):
    """What such a process does: train.main, its output and errors going to files."""
    for number, suffix in ((1, ".txt"), (2, ".err")):
        file = os.open(output.with_suffix(suffix), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
    multiprocessing.set_start_method(None, force=True)  # the loader's, as in any other process
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(threads)
    model_configs.MODELS = models
    resume.SAVE_SECONDS = save_seconds
    validate = train.validate

    def scored(network, data, options):
        return validate(network, data, options)[0], SCORES[len(log_of(Path(options["out"])))]

    train.validate = scored
    prepare()
    train.main(arguments)


def nothing():
    pass


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Forks processes that have all imported already; and the folder of the tiny model config."""
    models = tmp_path_factory.mktemp("models")
    (models / "tiny.json").write_text(json.dumps(TINY), encoding="utf-8")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_resume"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "test")]))
        patch.setenv("OMP_NUM_THREADS", "1")
        context.Process(target=nothing).start()
    return context, models


def new_run(root):
    """Options of a new run; ten of the training images are its dev split."""
    data = ["--dataset", "mini", "--data-root", str(root), "--dev-images", "10"]
    small = ["--model", "tiny", "--device", "cpu", "--batch-size", "4", "--graph", "object"]
    return [*data, *small, "--epochs", str(EPOCHS), "--lr-new", "0.01"]


@pytest.fixture(scope="module")
def training(server, mini, tmp_path_factory):
    """Starts training into a folder, or goes on there: training(folder, "--workers", "2").

    save_seconds: 0 saves after each step.
    """
    processes, (context, models) = [], server

    def start(folder, *arguments, threads=1, save_seconds=300, prepare=nothing):
        begun = (folder / "last.pth").exists()
        given = ["--out", str(folder), *(["--resume"] if begun else new_run(mini)), *arguments]
        how = given, folder, models, threads, save_seconds, prepare
        process = context.Process(target=child, args=how)
        process.start()
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()


def end(process):
    """Wait for a process; its exit code."""
    process.join(120)
    assert process.exitcode is not None, "does not end"
    return process.exitcode


def printed(folder, suffix=".txt"):
    path = folder.with_suffix(suffix)
    return path.read_text(encoding="utf-8") if path.exists() else ""


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def left(folder):
    """All that a run leaves behind, without times, places and random generators.

    No generator is used after the first weights are drawn, so they may stand anywhere.
    """
    found = {"files": sorted(path.name for path in folder.iterdir())}
    for name in ("last.pth", "best_model.pth"):
        found[name] = torch.load(folder / name, weights_only=True)
        options = found[name]["options"].items()
        found[name]["options"] = {k: v for k, v in options if k not in FREE}
        del found[name]["origin"]
    state = found["last.pth"]["state"]
    state["progress"] = {k: v for k, v in state["progress"].items() if k not in TIMES}
    del state["random"]
    found["log"] = [{k: v for k, v in line.items() if k not in TIMES} for line in log_of(folder)]
    return comparable(found)


def comparable(value):
    """Nested content that == compares to the bit: tensors as a digest, dicts with their order."""
    if torch.is_tensor(value):
        return value.dtype, value.shape, hashlib.sha256(value.numpy().tobytes()).hexdigest()
    if isinstance(value, dict):
        return [(key, comparable(content)) for key, content in value.items()]
    if isinstance(value, list | tuple):
        return type(value), [comparable(content) for content in value]
    return type(value), value


@pytest.fixture(scope="module")
def straight(training, tmp_path_factory):
    """What a run leaves that is not interrupted, and its seconds."""
    folder, begin = tmp_path_factory.mktemp("straight") / "out", time.perf_counter()
    assert end(training(folder)) == 0, printed(folder, ".err")
    return left(folder), time.perf_counter() - begin


@pytest.fixture
def goes_on(training, straight):
    """Resumes a run in a folder to its end, and asserts that it is the straight run."""

    def check(folder, *arguments, **how):
        assert (folder / "last.pth").exists()
        assert end(training(folder, *arguments, **how)) == 0, printed(folder, ".err")
        assert left(folder) == straight[0]

    return check


def signals_itself(number, step, times=1):
    """Let the process get a signal in a step, counted from 1, of the run."""
    train_step, calls = train.train_step, []

    def signalled(*arguments):
        calls.append(1)
        for _ in range(times if len(calls) == step else 0):
            os.kill(os.getpid(), number)
        return train_step(*arguments)

    train.train_step = signalled


@pytest.fixture(scope="module")
def stopped(training, tmp_path_factory):
    """A folder in which a run was stopped after the first step of the second epoch."""
    folder = tmp_path_factory.mktemp("stopped") / "out"
    assert end(training(folder, prepare=partial(signals_itself, signal.SIGTERM, 4))) == 143
    return folder


@pytest.fixture
def again(stopped, tmp_path):
    """A copy of that folder, which may be changed; a run that goes on in it sets the threads."""
    threads = torch.get_num_threads()
    yield Path(shutil.copytree(stopped, tmp_path / "out"))
    torch.set_num_threads(threads)


# ------------------------------------------------------------------ killed


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=SLOW)])
def test_kills_at_random_moments_change_nothing(training, straight, tmp_path, kills):
    """Every step is saved, so that many a kill hits a save."""
    rng, folder, hits = random.Random(0), tmp_path / "out", 0
    while hits < kills:
        process, moment = training(folder, save_seconds=0), rng.uniform(0, straight[1])
        time.sleep(moment)
        process.kill()
        if end(process) == 0:  # it was faster
            assert left(folder) == straight[0]
            shutil.rmtree(folder)
            continue
        assert process.exitcode == -signal.SIGKILL, printed(folder, ".err")
        hits += 1
        print(f"killed after {moment:.3f} s, leaving {list(folder.glob('*.tmp'))}")
    assert end(training(folder)) == 0, printed(folder, ".err")
    assert left(folder) == straight[0]


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def dies_at_call(place, number, before=True):
    """Let the process kill itself at a call of place, "module.function"."""
    owner, name = place.rsplit(".", 1)
    owner, calls = importlib.import_module(owner), []
    function = getattr(owner, name)

    def counted(*arguments, **named):
        calls.append(1)
        if before and len(calls) == number:
            die()
        result = function(*arguments, **named)
        if len(calls) == number:
            die()
        return result

    setattr(owner, name, counted)


def dies_half_way_through_a_file(number):
    """Let the process kill itself when half of the bytes of a checkpoint are written."""
    save, calls = torch.save, []

    def half(content, file):
        save(content, file)
        calls.append(1)
        if len(calls) == number:
            file.truncate(file.tell() // 2)
            die()

    torch.save = half


MOMENTS = {
    "half of the first file written": partial(dies_half_way_through_a_file, 1),
    "half of the third file written": partial(dies_half_way_through_a_file, 3),
    "half of the best written": partial(dies_half_way_through_a_file, 4),
    "before a file gets its name": partial(dies_at_call, "os.replace", 3),
    "a file has its name": partial(dies_at_call, "os.replace", 3, before=False),
    "best written, epoch not logged": partial(dies_at_call, "train.log_line", 1),
    "epoch logged, state not saved": partial(dies_at_call, "training.resume.next_epoch", 2),
}


# In `make test`: a kill in a write, and one where the log is ahead of the state.
@pytest.mark.parametrize(
    "moment",
    [
        pytest.param(name, marks=[] if name.startswith(("half of the third", "epoch")) else SLOW)
        for name in MOMENTS
    ],
)
def test_kills_in_a_save_change_nothing(training, goes_on, tmp_path, moment):
    folder = tmp_path / "out"
    killed = training(folder, save_seconds=0, prepare=MOMENTS[moment])
    assert end(killed) == -signal.SIGKILL
    if (folder / "last.pth").exists():
        resume.read_state(folder / "last.pth")
        goes_on(folder)
    else:
        assert moment == "half of the first file written"
        assert len(list(folder.glob("*.tmp"))) == 1
        training(folder).join()
        goes_on(folder)


# ------------------------------------------------------------------ signals


def test_a_signal_saves_and_the_command_is_printed(training, goes_on, tmp_path):
    folder = tmp_path / "a folder" / "out"
    folder.parent.mkdir()
    stops = partial(signals_itself, signal.SIGTERM, 6)  # in the last step of the second epoch
    assert end(training(folder, prepare=stops)) == 143
    command = f"python train.py --resume --out '{folder}'"
    last = f"stopped and saved in epoch 2; go on with: {command}"
    assert printed(folder).splitlines()[-1] == last
    progress = resume.read_state(folder / "last.pth")["state"]["progress"]
    assert (progress["epoch"], progress["step"]) == (2, 3)
    assert len(log_of(folder)) == progress["log_lines"] == 1
    goes_on(folder)
    assert "resumed in epoch 2 after 3 steps\n" in printed(folder)


@SLOW
@pytest.mark.parametrize("step", range(1, EPOCHS * STEPS + 1))
def test_a_run_goes_on_from_any_step(training, goes_on, tmp_path, step):
    folder = tmp_path / "out"
    stops = partial(signals_itself, signal.SIGTERM, step)
    assert end(training(folder, prepare=stops)) == 143
    goes_on(folder)


def test_the_default_without_a_branch_goes_on_from_a_step(training, tmp_path):
    """As all the others here go on, whose model has a graph branch."""
    stops = partial(signals_itself, signal.SIGTERM, 4)
    for name, prepare, code in (("straight", nothing, 0), ("stopped", stops, 143)):
        assert end(training(tmp_path / name, "--graph", "none", prepare=prepare)) == code
    assert end(training(tmp_path / "stopped")) == 0
    assert left(tmp_path / "stopped") == left(tmp_path / "straight")


@SLOW
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, -15), (signal.SIGINT, 1)])
def test_a_second_signal_ends_at_once(training, goes_on, tmp_path, number, code):
    folder = tmp_path / "out"
    assert end(training(folder, prepare=partial(signals_itself, signal.SIGTERM, 2))) == 143
    before = (folder / "last.pth").read_bytes()
    assert end(training(folder, prepare=partial(signals_itself, number, 1, times=2))) == code
    assert (folder / "last.pth").read_bytes() == before
    goes_on(folder)


def waits_in_a_group(step):
    """Make the process the first of a group, and let it wait in a step until it has a signal."""
    os.setpgrp()
    train_step, calls = train.train_step, []

    def handlers():
        return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def waiting(*arguments):
        calls.append(1)
        if len(calls) == step:
            before = handlers()  # one is taken away by its signal
            print(f"children: {len(multiprocessing.active_children())}", flush=True)
            while handlers() == before:
                time.sleep(0.02)
            time.sleep(0.3)  # until it is known if a child has died of it
        return train_step(*arguments)

    train.train_step = waiting


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=SLOW)]
)
def test_a_signal_to_all_processes_is_as_good(training, goes_on, tmp_path, number, code):
    """As Ctrl-C in a terminal and `timeout` send it: the loader's processes get it too."""
    folder = tmp_path / "out"
    process = training(folder, "--workers", "2", prepare=partial(waits_in_a_group, 2))
    while "children: 2\n" not in printed(folder):
        assert process.is_alive(), printed(folder, ".err")
        time.sleep(0.02)
    os.killpg(process.pid, number)
    assert end(process) == code, printed(folder, ".err")
    goes_on(folder)


# ------------------------------------------------------------------ elsewhere, otherwise


def test_a_run_goes_on_elsewhere_and_stays_finished(training, goes_on, again, mini, tmp_path):
    """Data that have moved and are in other files, other loaders, other threads."""
    moved, detections = tmp_path / "moved", tmp_path / "detections"
    shutil.copytree(mini, moved)
    for path in (moved / "images").iterdir():
        Image.open(path).save(path.with_suffix(".bmp"))
        path.unlink()
    (moved / "det_json").rename(detections)
    places = "--data-root", str(moved), "--det-json", str(detections)
    goes_on(again, *places, "--workers", "2", threads=2)
    before = contents(again)
    goes_on(again)
    assert contents(again) == before


# ------------------------------------------------------------------ a full disk


def files_end_at(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize(
    ("name", "size", "save_seconds"),
    [  # of five million bytes, and of two
        ("last.pth", 3_000_000, 0),
        pytest.param("best_model.pth", 1_000_000, 300, marks=SLOW),
    ],
)
def test_a_full_disk_leaves_the_last_good_files(training, goes_on, again, name, size, save_seconds):
    before = contents(again)
    full = partial(files_end_at, size)
    assert end(training(again, save_seconds=save_seconds, prepare=full)) == 1
    line = printed(again, ".err").splitlines()[-1]
    what = re.escape(f"OSError: {again / name}: not written (")
    assert re.match(rf"{what}.+\); what stood there is whole, is the disk full\?$", line)
    assert contents(again) == before
    goes_on(again)


# ------------------------------------------------------------------ in this process: options


def refused(call, *arguments):
    with pytest.raises(ValueError) as failure:
        call(*arguments)
    return str(failure.value).splitlines()


def resumed(folder, *arguments):
    return train.main(["--resume", "--out", str(folder), *arguments])


def test_only_options_that_alter_nothing_may_be_others():
    saved = for_training(default_options("train"), given={})
    closed = [name for name in saved if name not in FREE]
    assert len(closed) == 24
    with pytest.raises(ValueError) as failure:
        for_resuming(saved, dict.fromkeys(saved, "other"))
    head, *found = str(failure.value).splitlines()
    assert head.startswith("--resume: these options alter the result")
    flags = ["--" + name.replace("_", "-") for name in closed]
    assert [line.split(":")[0].strip() for line in found] == flags
    assert "  --epochs: 20 in the run, other now" in found
    # The same ones may be given again; what is gone is left out, what is new has its default.
    older = {name: value for name, value in saved.items() if name != "max_objects"}
    assert for_resuming({**older, "gone": 1}, {**saved, "lora": list(saved["lora"])}) == saved
    free = {name: "other" for name in FREE}
    assert for_resuming({**saved, "overwrite": True}, free) == {**saved, **free}


def test_options_of_a_folder_that_has_moved(stopped, tmp_path, monkeypatch):
    shutil.copytree(stopped, tmp_path / "moved")
    saved = resume.read_state(stopped / "last.pth")["options"]
    monkeypatch.chdir(tmp_path)
    found, _ = train.parse(
        ["--resume", "--out", "moved", "--workers", "3", "--overwrite", "--seed", "0"]
    )
    changes = {"out": "moved", "workers": 3, "overwrite": True, "resume": True}
    assert found == {**saved, **changes}
    [_, message] = refused(train.parse, ["--resume", "--out", "moved", "--seed", "9"])
    assert message == "  --seed: 0 in the run, 9 now"


# ------------------------------------------------------------------ data


def test_the_digest_tells_images_captions_and_detections_apart():
    def digest(name="a.png", captions=("a ship",), content="1f", class_id=1, x=2.0):
        boxes = [(np.array([class_id]), np.array([[x, 0, 0, 0, 0, 0]]))]
        images = SimpleNamespace(hashes=[content], boxes=boxes)
        return resume.data_digest((images, [Record(name, captions)]))

    others = [digest(name="b.png"), digest(captions=("a boat",)), digest(content="2e")]
    others += [digest(class_id=2), digest(x=2.5)]
    assert digest() == digest() and len({digest(), *others}) == 6


def change_pixel(root, record):
    path = root / "images" / record.name
    pixels = np.array(Image.open(path))
    pixels[5, 5, 0] ^= 1
    Image.fromarray(pixels).save(path)


def take_the_last_image_away(root, record):
    for name in ("train_caps.txt", "train_filename.txt"):  # so that other splits would be drawn
        lines = (root / name).read_text(encoding="utf-8").splitlines(keepends=True)
        (root / name).write_text("".join(lines[: len(lines) * 23 // 24]), encoding="utf-8")


@pytest.mark.parametrize(
    ("split", "change"),
    [
        ("train", change_pixel),
        ("dev", change_pixel),
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


def test_a_new_run_replaces_no_stopped_one_and_leftovers_go(server, again, mini, monkeypatch):
    monkeypatch.setattr(model_configs, "MODELS", server[1])
    new = [*new_run(mini), "--out", str(again), "--seed", "1"]
    before = contents(again)
    assert refused(train.main, new) == [
        f"{again / 'last.pth'}: a run was stopped here in epoch 2 of 3; go on with --resume, "
        "take another --out, or --overwrite to replace it"
    ]
    assert contents(again) == before
    for name in ("last.pth.1-a.tmp", "log.jsonl.1-a.tmp"):
        (again / name).touch()  # of a process that was killed while it saved
    resumed(again)
    assert contents(again).keys() == before.keys()


# ------------------------------------------------------------------ what is put back


def test_generators_scaler_and_threads_are_as_they_were(
    tiny_model, tiny_model_config, tmp_path, device, capsys
):
    options = {**default_options("train"), "lr": 1e-5, "lr_new": 1e-3, "precision": "fp16"}
    options["graph"] = "object"
    learner = make_learner(tiny_model().to(device), options, 9)
    learner.scaler.load_state_dict({**learner.scaler.state_dict(), "scale": 32.0})
    content = {"model": learner.model, "model_config": tiny_model_config, "options": options}
    content |= {"labels": read_label_map().lines, "data_digest": ""}
    resume.save_state(tmp_path / "last.pth", learner, content, resume.NEW_RUN)

    def draws():
        found = [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn()]
        return [*found, torch.rand(1).item(), torch.rand(1, device=device).item()]

    first = draws()
    learner = make_learner(tiny_model().to(device), options, 9)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    state = resume.read_state(tmp_path / "last.pth")["state"]
    elsewhere = {**state, "device": "elsewhere"}
    resume.restore(learner, state)
    assert draws() == first and learner.scaler.get_scale() == 32.0
    resume.use_threads(elsewhere, device)
    assert torch.get_num_threads() == threads + 1
    resume.use_threads(state, device)
    assert torch.get_num_threads() == threads + (device.type == "cuda")
    torch.set_num_threads(threads)
    assert capsys.readouterr().out == ""
    resume.restore(learner, elsewhere)
    said = f"resumed on {device.type}, begun on elsewhere: no longer bit-exact\n"
    assert capsys.readouterr().out == said
