"""Whether the `state` in a `last.pth` is one that a run can go on from.

First its types, when the file is read; then, when the learner is there, whether it fits: torch
takes moments of other shapes without a word, and its fused optimizer reads beyond their end.
Each function raises a ValueError that names the field; the caller puts the file's name before it.
"""

import random

import numpy as np
import torch

from backbones.checkpoint_content import check_weights, is_finite, require
from backbones.model_configs import is_whole, shown

MOST_THREADS = 4096  # of a CPU: more in a file is damage

# ------------------------------------------------------------------ types


def check_state(state, new_run):
    """Raise ValueError, which names the field, for a `state` that is malformed.

    new_run: the progress of a new run, whose fields and types a saved one has.
    """
    require(isinstance(state, dict), "state", "a dict", state)
    for field in ("optimizer", "schedule", "scaler", "random", "progress"):
        require(isinstance(state.get(field), dict), f"state: {field}", "a dict", state.get(field))
    threads, device = state.get("threads"), state.get("device")
    is_number = is_whole(threads) and 1 <= threads <= MOST_THREADS
    require(is_number, "state: threads", f"a whole number of 1 to {MOST_THREADS}", threads)
    require(isinstance(device, str) and device.isalpha(), "state: device", "a word", device)
    number = state.get("processes", 1)  # runs that began before it was saved have none
    require(is_whole(number) and number >= 1, "state: processes", "a whole number of 1 up", number)
    _check_progress(state["progress"], new_run)
    _check_optimizer(state["optimizer"])
    _check_schedule(state["schedule"])
    for name, value in state["scaler"].items():
        require(is_finite(value), f"state: scaler: {shown(name)}", "a finite number", value)
    _check_random(state["random"])


def _check_progress(progress, new_run):
    for name, usual in new_run.items():
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
        rate = group.get("lr")
        is_rate = isinstance(rate, float) and is_finite(rate)
        require(is_rate, f"{field}: lr", "a finite number", rate)
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
        "python": lambda: random.Random().setstate(python_state(states)),
        "numpy": lambda: np.random.RandomState().set_state(numpy_state(states)),
        "torch": lambda: torch.Generator().set_state(states["torch"]),
    }
    for name, trial in trials.items():
        try:
            trial()
        except Exception:  # each library raises several kinds
            raise ValueError(
                f"field 'state: random: {name}': expected the state of a generator"
            ) from None


# ------------------------------------------------------------------ generators


def python_state(states):
    """What `random.setstate` takes, of saved states."""
    version, numbers, gauss = states["python"]
    return version, tuple(numbers), gauss


def numpy_state(states):
    """What `np.random.set_state` takes, of saved states."""
    kind, keys, *rest = states["numpy"]
    return kind, keys.numpy().astype(np.uint32), *rest


# ------------------------------------------------------------------ a learner


def check_fit(state, learner):
    """Raise ValueError unless optimizer, schedule and scaler of a checked state are a learner's."""
    _check_groups(state["optimizer"]["param_groups"], learner.optimizer)
    _check_moments(state["optimizer"]["state"], learner.optimizer)
    _check_schedule_fits(state["schedule"], learner.schedule)
    names = learner.scaler.state_dict().keys()
    are_equal = not names or not state["scaler"] or state["scaler"].keys() == names
    require(are_equal, "state: scaler", "the fields of a GradScaler", None)


def _check_groups(groups, optimizer):
    """The groups differ from those of a new run in their rate alone."""
    field = "state: optimizer: param_groups"
    expected = optimizer.state_dict()["param_groups"]
    require(len(groups) == len(expected), field, f"{len(expected)} groups", len(groups))
    for group, usual in zip(groups, expected, strict=True):
        for name, value in group.items():
            if name == "lr":
                continue
            # As text: a tensor in it cannot be compared.
            is_equal = name in usual and repr(_as_list(value)) == repr(_as_list(usual[name]))
            require(is_equal, f"{field}: {shown(name)}", "that of the run's options", value)
        missing = usual.keys() - group.keys() - {"decoupled_weight_decay"}  # newer than torch 2.6
        require(not missing, field, f"the fields {sorted(missing)}", None)


def _check_moments(moments, optimizer):
    """Each moment has the shape and type of its parameter."""
    parameters = [one for group in optimizer.param_groups for one in group["params"]]
    for number, own in moments.items():
        field = f"state: optimizer: state: {number}"
        require(0 <= number < len(parameters), field, f"below {len(parameters)}", number)
        parameter = parameters[number]
        shapes = {"step": (), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
        require(own.keys() == shapes.keys(), field, f"the tensors {', '.join(shapes)}", None)
        for name, shape in shapes.items():
            tensor = own[name]
            fits = tensor.shape == shape and tensor.dtype == parameter.dtype
            require(fits, f"{field}: {name}", f"{parameter.dtype} {tuple(shape)}", tensor)


def _check_schedule_fits(saved, schedule):
    """The fields of a schedule are those of a new one; other versions of torch have a few more."""
    usual = schedule.state_dict()
    for name in ("base_lrs", "_last_lr", "lr_lambdas", "last_epoch", "_step_count"):
        field, value = f"state: schedule: {name}", saved.get(name)
        require(type(value) is type(usual[name]), field, type(usual[name]).__name__, value)
        if isinstance(value, list):
            require(len(value) == len(usual[name]), field, f"{len(usual[name])} entries", value)
    require(saved["base_lrs"] == usual["base_lrs"], "state: schedule: base_lrs", "the rates", None)
    are_none = all(one is None for one in saved["lr_lambdas"])
    require(are_none, "state: schedule: lr_lambdas", "no values", None)
    for name in saved:
        # What is loaded becomes an attribute: none may hide another or a method.
        is_field = isinstance(name, str) and (name in usual or not hasattr(schedule, name))
        require(is_field, "state: schedule", "a schedule's fields", name)


def _as_list(value):
    return list(value) if isinstance(value, tuple) else value
