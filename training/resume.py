"""What a stopped training run needs to go on exactly where it was.

`last.pth` is a checkpoint (see model.py) with a `state` beside the weights: optimizer, schedule,
scaler, random generators, threads, processes, and how far the run had come. All else that is random
is drawn by (seed, epoch, image), so epoch and step are the sampler's position.
"""

import hashlib
import json
import random
import signal
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

import processes
from backbones.checkpoint_content import require
from backbones.loading import read_weights
from model import FIELDS, checked, is_this_version, save_checkpoint
from training.saved_state import check_fit, check_state, numpy_state, python_state
from writing import write_text

SAVE_SECONDS = 300  # of training between two saves of last.pth within an epoch

NEW_EPOCH = {  # progress within an epoch
    "step": 0,  # batches of the epoch that are done
    "loss": 0.0,  # their sum
    "data_seconds": 0.0,  # waited for batches
    "compute_seconds": 0.0,
}
NEW_RUN = {
    "epoch": 1,  # counted from 1: the one that runs or comes next
    **NEW_EPOCH,
    "best_score": -1.0,
    "best_epoch": 0,
    "log_lines": 0,  # epochs that stand in the log
}

# ------------------------------------------------------------------ how far a run has come


def next_epoch(progress):
    """Count an epoch as logged."""
    progress.update(NEW_EPOCH)
    progress["epoch"] += 1
    progress["log_lines"] += 1


def begin(out):
    """(progress, no log lines) of a new run.

    The state and the log of an earlier one go; its model stays until this run has one.
    """
    if processes.is_first():
        (out / "last.pth").unlink(missing_ok=True)
        (out / "log.jsonl").write_text("", encoding="utf-8")
    return dict(NEW_RUN), []


def go_on(learner, checkpoint, digest, out):
    """(progress, log lines) of a stopped run; the learner is put back as it was saved.

    digest: `data_digest` of today's data. Raises ValueError where it is another than the run's, or
    where the log is not the run's.
    """
    if digest != checkpoint["data_digest"]:
        raise ValueError(
            f"--resume: images, captions or detections have changed since {out}/last.pth was "
            "saved; put them back as they were, or start a new run in another --out"
        )
    state = checkpoint["state"]
    try:
        check_fit(state, learner)
    except ValueError as error:
        raise ValueError(f"{out}/last.pth: {error}; start a new run in another --out") from None
    restore(learner, state)
    progress = state["progress"]
    print(f"resumed in epoch {progress['epoch']} after {progress['step']} steps")
    return progress, cut_log(out / "log.jsonl", progress["log_lines"])


# ------------------------------------------------------------------ the state in last.pth


def random_states(device):
    """The states of all generators, of types that load without unpickling code."""
    kind, keys, *rest = np.random.get_state()
    states = {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def set_random_states(states, device):
    """Put the generators back; CUDA's where they are saved and there are as many devices."""
    random.setstate(python_state(states))
    np.random.set_state(numpy_state(states))
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and len(states.get("cuda", ())) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
        if processes.several():  # all draw what the first one does, which has saved
            torch.cuda.set_rng_state(states["cuda"][0], device)


def save_state(path, learner, checkpoint, progress):
    """Write `last.pth`. checkpoint: the arguments of `save_checkpoint`, path and state aside."""
    device = learner.model.logit_scale.device
    state = {
        "optimizer": learner.optimizer.state_dict(),
        "schedule": learner.schedule.state_dict(),
        "scaler": learner.scaler.state_dict(),
        "random": random_states(device),
        "threads": torch.get_num_threads(),
        "device": device.type,
        "processes": processes.world(),
        "progress": dict(progress),
    }
    save_checkpoint(path, **checkpoint, epoch=progress["log_lines"], state=state)


def read_state(path):
    """The checkpoint of a stopped run; ValueError where there is none to go on from."""
    if not Path(path).is_file():
        raise ValueError(f"--resume: no {path}; name the run's folder with --out")
    checkpoint = read_weights(path)
    needed = FIELDS | {"state"}
    if not isinstance(checkpoint, dict) or not needed <= checkpoint.keys():
        raise ValueError(f"{path}: not a last.pth of train.py; take another --out")
    if not is_this_version(checkpoint):
        raise ValueError(f"{path}: from another version of this code; take another --out")
    try:
        checkpoint, _ = checked(checkpoint)
        require(isinstance(checkpoint.get("data_digest"), str), "data_digest", "a string", None)
        check_state(checkpoint["state"], NEW_RUN)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; take another --out") from None
    return checkpoint


def restore(learner, state):
    """Put optimizer, schedule, scaler and generators back as they were saved.

    On another device or with another number of processes the run goes on too, and a line says that
    it is no longer bit-exact.
    """
    device = learner.model.logit_scale.device
    learner.optimizer.load_state_dict(state["optimizer"])
    learner.schedule.load_state_dict(state["schedule"])
    if state["scaler"]:
        learner.scaler.load_state_dict(state["scaler"])
    set_random_states(state["random"], device)
    if device.type != state["device"]:
        print(f"resumed on {device.type}, begun on {state['device']}: no longer bit-exact")
    before = processes_of(state)
    if processes.world() != before:
        print(f"resumed by {processes.world()} processes, saved by {before}: no longer bit-exact")


def use_threads(state, device):
    """Compute with as many threads as before, on which a CPU's last bits depend.

    Another number of processes has other last bits anyway, and may need other threads.
    """
    if device.type == state["device"] == "cpu" and processes.world() == processes_of(state):
        torch.set_num_threads(state["threads"])


def processes_of(state):
    """How many processes the run had; one where the state is older than the field."""
    return state.get("processes", 1)


# ------------------------------------------------------------------ data, log, signals


def data_digest(*parts):
    """A digest of what is trained and validated on. parts: (ImageSet, records) of each."""
    digest = hashlib.blake2b(digest_size=16)
    for images, records in parts:
        captions = [[record.name, record.captions] for record in records]
        digest.update(json.dumps([captions, images.hashes]).encode())
        for class_ids, boxes in images.boxes:
            digest.update(class_ids.tobytes() + boxes.tobytes())
    return digest.hexdigest()


def cut_log(path, lines):
    """Keep a log's first lines, and return them as dicts.

    What came after the saved state is trained and written again. Raises ValueError where lines are
    missing or damaged.
    """
    content = path.read_bytes() if path.is_file() else b""
    kept = content.splitlines(keepends=True)[:lines]
    if len(kept) < lines:
        raise ValueError(f"--resume: {path} has {len(kept)} lines, but {lines} epochs are done")
    try:
        found = [json.loads(line) for line in kept]
        text = b"".join(kept).decode()
    except ValueError as error:
        raise ValueError(
            f"--resume: {path} is damaged ({error}); begin anew with --overwrite"
        ) from None
    if processes.is_first():
        write_text(path, text)
    return found


@contextmanager
def signals_noted():
    """SIGTERM and Ctrl-C only note their number in the list this yields: the run can save first.

    A second one of the same kind ends the process at once.
    """
    noted = []
    before = {}

    def note(number, _):
        noted.append(number)
        signal.signal(number, before[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, note)
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
