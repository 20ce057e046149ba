"""Resuming: a run stopped at any moment goes on as if it had not been, or says why it cannot."""

import hashlib
import importlib
import json
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

import train
from backbones import model_configs
from conftest import ROOT, log_of
from options import FREE
from training import resume

resource = pytest.importorskip("resource")  # limits and forked processes are Unix's
TINY = {
    "embed_dim": 8,
    "image_size": 32,
    "vision": {"patch_size": 16, "width": 8, "layers": 1, "heads": 1},
    "text": {"context_length": 77, "vocab_size": 49408, "width": 8, "layers": 1, "heads": 1},
}
SLOW = pytest.mark.slow
EPOCHS, STEPS = 3, 3  # 24 images in batches of 8
SCORES = (20.0, 30.0, 25.0, 25.0, 25.0)  # on validation, by epoch: the second is the best
TIMES = {"data_seconds", "compute_seconds", "val_seconds"}

# ------------------------------------------------------------------ runs in processes of their own


def child(arguments, output, models, threads, prepare):
    """What such a process does: train.main, its output and errors going to files."""
    for number, suffix in ((1, ".txt"), (2, ".err")):
        file = os.open(output.with_suffix(suffix), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
    multiprocessing.set_start_method(None, force=True)  # the loader's, as in any other process
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(threads)
    model_configs.MODELS = models
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
    """Forks processes that have all imported already; and the folder of the tiny definition."""
    models = tmp_path_factory.mktemp("models")
    (models / "tiny.json").write_text(json.dumps(TINY), encoding="utf-8")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_resume"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "test")]))
        patch.setenv("OMP_NUM_THREADS", "1")
        context.Process(target=nothing).start()
    return context, models


@pytest.fixture(scope="module")
def training(server, mini, tmp_path_factory):
    """Starts training into a folder, or goes on there: training(folder, "--workers", "2")."""
    processes, (context, models) = [], server
    data = ["--dataset", "mini", "--data-root", str(mini), "--model", "tiny", "--device", "cpu"]
    new = [*data, "--batch-size", "8", "--epochs", str(EPOCHS), "--lr-new", "0.01"]

    def start(folder, *arguments, threads=1, prepare=nothing, anew=False):
        again = not anew and (folder / "last.pth").exists()
        given = ["--out", str(folder), *(["--resume"] if again else new), *arguments]
        how = given, folder, models, threads, prepare
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


# ------------------------------------------------------------------ killed


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=SLOW)])
def test_kills_at_random_moments_change_nothing(training, straight, tmp_path, kills):
    """Every step is saved, so that many a kill hits a save."""
    rng, folder, hits = random.Random(0), tmp_path / "out", 0
    while hits < kills:
        process, moment = training(folder, "--save-every", "1"), rng.uniform(0, straight[1])
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
    assert end(training(folder, "--save-every", "1", prepare=MOMENTS[moment])) == -signal.SIGKILL
    if (folder / "last.pth").exists():
        resume.read_state(folder / "last.pth")
        goes_on(folder)
    else:
        assert moment == "half of the first file written"
        assert len(list(folder.glob("*.tmp"))) == 1
        training(folder).join()
        goes_on(folder)


# ------------------------------------------------------------------ signals


def signals_itself(number, step, times=1):
    """Let the process get a signal in a step, counted from 1, of the run."""
    train_step, calls = train.train_step, []

    def signalled(*arguments):
        calls.append(1)
        for _ in range(times if len(calls) == step else 0):
            os.kill(os.getpid(), number)
        return train_step(*arguments)

    train.train_step = signalled


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


@SLOW
def test_a_run_may_be_stopped_after_every_step(training, goes_on, tmp_path):
    folder, stops = tmp_path / "out", partial(signals_itself, signal.SIGTERM, 1)
    for _ in range(5):
        assert end(training(folder, prepare=stops)) == 143
    goes_on(folder)


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


@pytest.fixture(scope="module")
def stopped(training, tmp_path_factory):
    """A folder in which a run was stopped in the second epoch."""
    folder = tmp_path_factory.mktemp("stopped") / "out"
    assert end(training(folder, prepare=partial(signals_itself, signal.SIGTERM, 4))) == 143
    return folder


@pytest.fixture
def again(stopped, tmp_path):
    """A copy of that folder, which may be changed."""
    return Path(shutil.copytree(stopped, tmp_path / "out"))


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


@SLOW
def test_the_printed_command_is_the_one_to_run(training, straight, tmp_path):
    """Its scores on validation are real, unlike SCORES; the last weights are the same."""
    folder = tmp_path / "it's out"
    assert end(training(folder, prepare=partial(signals_itself, signal.SIGTERM, 4))) == 143
    command = shlex.split(printed(folder).split("go on with: ")[1])
    assert command[0] == "python"
    subprocess.run([sys.executable, *command[1:]], cwd=ROOT, check=True, capture_output=True)
    assert dict(left(folder))["last.pth"][1] == dict(straight[0])["last.pth"][1]


# ------------------------------------------------------------------ a full disk


def files_end_at(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize(
    ("name", "size", "every"),
    [  # of five million bytes, and of two
        ("last.pth", 3_000_000, "1"),
        pytest.param("best_model.pth", 1_000_000, "0", marks=SLOW),
    ],
)
def test_a_full_disk_leaves_the_last_good_files(training, goes_on, again, name, size, every):
    before = contents(again)
    full = partial(files_end_at, size)
    assert end(training(again, "--save-every", every, prepare=full)) == 1
    line = printed(again, ".err").splitlines()[-1]
    what = re.escape(f"OSError: {again / name}: not written (")
    assert re.match(rf"{what}.+\); what stood there is whole, is the disk full\?$", line)
    assert contents(again) == before
    goes_on(again)
