"""What a stopped training run needs to go on exactly where it was.

`last.pth` is a checkpoint (see model.py) with a `state` beside the weights: optimizer, schedule,
scaler, random generators, threads, and how far the run had come. All else that is random is drawn
by (seed, epoch, image), so epoch and step are the sampler's position.
"""

import hashlib
import json
import random
import signal
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from backbones.checkpoint_content import check_weights, is_finite, require
from backbones.loading import read_weights
from backbones.model_configs import is_whole, shown
from model import FIELDS, check_content, is_this_version, save_checkpoint
from writing import written_whole

MOST_THREADS = 4096  # of a CPU: more in a file is damage

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


def goes_on(progress, options):
    """Whether epochs and patience are left."""
    idle = progress["epoch"] - 1 - progress["best_epoch"]
    return progress["epoch"] <= options["epochs"] and idle < options["patience"]


def next_epoch(progress):
    """Count an epoch as logged."""
    progress.update(NEW_EPOCH)
    progress["epoch"] += 1
    progress["log_lines"] += 1


def begin(out):
    """(progress, no log lines) of a new run.

    The state and the log of an earlier one go; its model stays until this run has one.
    """
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


def _python_state(states):
    version, numbers, gauss = states["python"]
    return version, tuple(numbers), gauss


def _numpy_state(states):
    kind, keys, *rest = states["numpy"]
    return kind, keys.numpy().astype(np.uint32), *rest


def set_random_states(states, device):
    """Put the generators back; CUDA's where they are saved and there are as many devices."""
    random.setstate(_python_state(states))
    np.random.set_state(_numpy_state(states))
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and len(states.get("cuda", ())) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


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
        check_content(checkpoint)
        require(isinstance(checkpoint.get("data_digest"), str), "data_digest", "a string", None)
        check_state(checkpoint["state"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}; take another --out") from None
    return checkpoint


def check_state(state):
    """Raise ValueError, which names the field, for a `state` that `restore` could not put back."""
    require(isinstance(state, dict), "state", "a dict", state)
    for field in ("optimizer", "schedule", "scaler", "random", "progress"):
        require(isinstance(state.get(field), dict), f"state: {field}", "a dict", state.get(field))
    threads, device = state.get("threads"), state.get("device")
    is_number = is_whole(threads) and 1 <= threads <= MOST_THREADS
    require(is_number, "state: threads", f"a whole number of 1 to {MOST_THREADS}", threads)
    require(isinstance(device, str), "state: device", "a string", device)
    _check_progress(state["progress"])
    _check_optimizer(state["optimizer"])
    _check_schedule(state["schedule"])
    for name, value in state["scaler"].items():
        require(is_finite(value), f"state: scaler: {shown(name)}", "a finite number", value)
    _check_random(state["random"])


def _check_progress(progress):
    for name, usual in NEW_RUN.items():
        value = progress.get(name)
        field = f"state: progress: {name}"
        if isinstance(usual, int):
            require(is_whole(value) and value >= 0, field, "a whole number of 0 or more", value)
        else:
            require(is_finite(value), field, "a finite number", value)


def _check_optimizer(content):
    groups, moments = content.get("param_groups"), content.get("state")
    field = "state: optimizer"
    are_dicts = isinstance(groups, list) and all(isinstance(group, dict) for group in groups)
    require(are_dicts, f"{field}: param_groups", "a list of dicts", groups)
    for group in groups:
        parameters = group.get("params")
        are_numbers = isinstance(parameters, list) and all(is_whole(one) for one in parameters)
        require(are_numbers, f"{field}: params", "a list of whole numbers", parameters)
        for name in ("lr", "weight_decay"):
            require(is_finite(group.get(name)), f"{field}: {name}", "a number", group.get(name))
    require(isinstance(moments, dict), f"{field}: state", "a dict", moments)
    for number, own in moments.items():
        require(is_whole(number), f"{field}: state", "the number of a parameter", number)
        check_weights(own, f"{field}: state: {number}")


def _check_schedule(schedule):
    for name in ("base_lrs", "_last_lr"):
        rates = schedule.get(name)
        are_rates = isinstance(rates, list) and all(is_finite(rate) for rate in rates)
        require(are_rates, f"state: schedule: {name}", "a list of numbers", rates)
    step = schedule.get("last_epoch")
    require(is_whole(step), "state: schedule: last_epoch", "a whole number", step)


def _check_random(states):
    """Put the states of the CPU's generators into generators that are thrown away."""
    trials = {
        "python": lambda: random.Random().setstate(_python_state(states)),
        "numpy": lambda: np.random.RandomState().set_state(_numpy_state(states)),
        "torch": lambda: torch.Generator().set_state(states["torch"]),
    }
    for name, trial in trials.items():
        try:
            trial()
        except Exception:  # each library raises several kinds
            raise ValueError(
                f"field 'state: random: {name}': expected the state of a generator"
            ) from None


def restore(learner, state):
    """Put optimizer, schedule, scaler and generators back as they were saved.

    On another device the run goes on too, and a line says that it is no longer bit-exact.
    """
    device = learner.model.logit_scale.device
    learner.optimizer.load_state_dict(state["optimizer"])
    learner.schedule.load_state_dict(state["schedule"])
    if state["scaler"]:
        learner.scaler.load_state_dict(state["scaler"])
    set_random_states(state["random"], device)
    if device.type != state["device"]:
        print(f"resumed on {device.type}, begun on {state['device']}: no longer bit-exact")


def use_threads(state, device):
    """Compute with as many threads as before, on which a CPU's last bits depend."""
    if device.type == state["device"] == "cpu":
        torch.set_num_threads(state["threads"])


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
    missing.
    """
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    kept = text.splitlines(keepends=True)[:lines]
    if len(kept) < lines:
        raise ValueError(f"--resume: {path} has {len(kept)} lines, but {lines} epochs are done")
    with written_whole(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")
    return [json.loads(line) for line in kept]


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
