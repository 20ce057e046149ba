"""A run's folder: a new one for each, one process at a time, nothing of the user's replaced."""

import json
import multiprocessing
import os
import shutil
import signal
import time

import pytest
import torch

import evaluate
import infer
import train
from conftest import log_of
from training import run_folder


@pytest.fixture
def begun(run, tmp_path):
    """The folder of a finished run of one epoch."""
    return run("--epochs", "1")


# ------------------------------------------------------------------ which folder


def test_each_run_gets_a_new_folder_and_scripts_take_the_latest(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run_folder.Path(__file__).parent, tmp_path / "test", dirs_exist_ok=True)
    run(out=None)
    run("--seed", "1", out=None)
    first, second = tmp_path / "runs" / "mini-1", tmp_path / "runs" / "mini-2"
    assert {path.name for path in first.iterdir()} == {"best_model.pth", "last.pth", "log.jsonl"}
    os.utime(first / "best_model.pth", (1, 1))
    capsys.readouterr()
    evaluate.main([])
    infer.main([])
    printed = capsys.readouterr().out
    assert printed.count("checkpoint of the latest run: runs/mini-2/best_model.pth") == 2
    os.utime(second / "last.pth", (1, 1))
    assert run_folder.choose({"out": None, "resume": True}) == run_folder.Path("runs/mini-1")


def test_without_a_run_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="runs/: no run with a model; train one first"):
        evaluate.main([])
    with pytest.raises(ValueError, match="--resume: no run in runs/"):
        train.main(["--resume"])


def test_a_run_that_fails_before_it_trains_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="needs --data-root"):
        train.main(["--dataset", "ucm"])
    assert not list((tmp_path / "runs").iterdir())


# ------------------------------------------------------------------ what stands there already


def test_a_finished_run_is_replaced_on_request_only(run, begun):
    before = (begun / "best_model.pth").read_bytes()
    with pytest.raises(ValueError, match="a run was finished here; .*--overwrite"):
        run("--seed", "1", overwrite=False)
    assert (begun / "best_model.pth").read_bytes() == before
    run("--seed", "1")
    assert (begun / "best_model.pth").read_bytes() != before and len(log_of(begun)) == 1


def test_the_old_model_stays_until_there_is_a_new_one(run, begun, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    before = (begun / "best_model.pth").read_bytes()
    monkeypatch.setattr(train, "train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert (begun / "best_model.pth").read_bytes() == before
    assert not (begun / "last.pth").exists() and log_of(begun) == []


def test_a_model_that_no_run_wrote_is_not_replaced(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "best_model.pth").write_bytes(b"downloaded")
    with pytest.raises(ValueError, match="a model whose run is not in this folder"):
        run(overwrite=False)
    assert (tmp_path / "out" / "best_model.pth").read_bytes() == b"downloaded"


# ------------------------------------------------------------------ one process


def hold(folder, ready):
    with run_folder.locked(folder):
        ready.set()
        time.sleep(60)


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of a folder: (folder, process)."""
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=hold, args=(tmp_path / "held", ready))
    process.start()
    assert ready.wait(20)
    yield tmp_path / "held", process
    process.kill()
    process.join()


def test_a_second_process_is_told_who_holds_the_folder(holder):
    folder, process = holder
    found = json.loads((folder / "run.lock").read_text(encoding="utf-8"))
    assert found["pid"] == process.pid
    with pytest.raises(ValueError, match=f"process {process.pid} on .* trains in this folder"):
        with run_folder.locked(folder):
            pass
    assert json.loads((folder / "run.lock").read_text(encoding="utf-8")) == found


def test_a_dead_processs_lock_is_taken_over(holder):
    folder, process = holder
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert (folder / "run.lock").exists()
    with run_folder.locked(folder):
        found = json.loads((folder / "run.lock").read_text(encoding="utf-8"))
        assert found["pid"] == os.getpid()
    assert not folder.exists()  # nothing was written into it


@pytest.mark.parametrize("again", [False, True])
def test_a_folder_that_disappears_ends_the_run_with_an_error(run, tmp_path, monkeypatch, again):
    step = train.train_step

    def removing(*arguments):
        shutil.rmtree(tmp_path / "out")
        if again:
            (tmp_path / "out").mkdir()
        monkeypatch.setattr(train, "train_step", step)
        return step(*arguments)

    monkeypatch.setattr(train, "train_step", removing)
    with pytest.raises(OSError, match="out: removed or replaced while this process wrote into it"):
        run()
    assert not (tmp_path / "out" / "best_model.pth").exists()


# ------------------------------------------------------------------ figures first


def test_figures_are_printed_before_a_file_fails(begun, mini, tmp_path, capsys):
    capsys.readouterr()
    arguments = ["--checkpoint", str(begun / "best_model.pth"), "--device", "cpu"]
    full = "/dev/full"  # a device that takes nothing
    with pytest.raises(OSError, match=f"{full}: not written"):
        evaluate.main([*arguments, "--ranks", full, "--json", str(tmp_path / "a.json")])
    printed = capsys.readouterr().out
    assert "mR" in printed and f"written to {tmp_path / 'a.json'}" in printed
    assert torch.isfinite(
        torch.tensor(json.loads((tmp_path / "a.json").read_text())["results"][0]["mR"])
    )
