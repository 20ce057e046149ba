"""What a checkpoint holds is checked before anything is built of it.

A damaged or forged file may state a vocabulary of a thousand million words, or a list where a
number belongs. The checks go from the outside in: types of the fields, then the tensors, then the
sizes that the model config states against those of the tensors. So nothing is built that is larger
than what the file really holds. Each function raises a ValueError that names the field; the caller
puts the file's name before it.
"""

import torch

from backbones.model_configs import check_model_config, is_whole, shown, sizes_of
from options import OPTIONS, gate_or_number, number

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64)

LISTED = 3  # names that an error lists

# ------------------------------------------------------------------ values


def is_finite(value):
    """Whether a value is a number that is neither infinite nor NaN, nor too large for a float."""
    is_number = is_whole(value) or isinstance(value, float)
    return is_number and abs(value) <= 1e300


def require(is_right, field, expected, value):
    """Raise the ValueError of a field unless it is right."""
    if not is_right:
        raise ValueError(f"field '{field}': expected {expected}, found {shown(value)}")


# ------------------------------------------------------------------ the fields


def check_fields(checkpoint):
    """Check weights, model config, labels and options of a checkpoint, which are there."""
    check_weights(checkpoint["weights"])
    try:
        check_model_config(checkpoint["definition"])
    except ValueError as error:
        raise ValueError(f"field 'definition': {error}") from None
    check_labels(checkpoint["labels"])
    check_options(checkpoint["options"])
    check_sizes(checkpoint["weights"], checkpoint["definition"])


def check_weights(weights, field="weights"):
    """A dict of tensors by name, each as large as its file says, and finite."""
    require(isinstance(weights, dict), field, "a dict of tensors", weights)
    for name, tensor in weights.items():
        place = f"{field}: {shown(name)}"
        require(isinstance(name, str), place, "a name", name)
        require(torch.is_tensor(tensor), place, "a tensor", tensor)
        check_tensor(tensor, place)


def check_tensor(tensor, field):
    """A dense tensor of a usual type, of which the file holds every number, and finite."""
    is_plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not is_plain or tensor.dtype not in DTYPES:
        raise ValueError(
            f"field '{field}': expected a dense tensor of floats or int64, found {tensor.dtype}, "
            f"{tensor.layout}, on {tensor.device.type}"
        )
    # A tensor that repeats its numbers by a stride of 0 may state any size.
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(f"field '{field}': the file holds fewer numbers than its shape says")
    if not _all_finite(tensor):
        raise ValueError(f"field '{field}': some numbers are not finite; take another checkpoint")


def _all_finite(tensor):
    """Whether no number of a tensor is infinite or NaN, in a quarter of the time of `isfinite`."""
    if tensor.numel() == 0:
        return True
    extremes = torch.stack(torch.aminmax(tensor))  # NaN if any is
    return bool(torch.isfinite(extremes).all())


def check_labels(labels):
    """The lines of a label map."""
    are_strings = isinstance(labels, list) and all(isinstance(line, str) for line in labels)
    require(are_strings, "labels", "a list of strings", labels)


def check_options(options):
    """Options of train.py, `options.converted`: their types and choices. Others do not count.

    Those of the model are checked for their bounds too, and have to be there.
    """
    require(isinstance(options, dict), "options", "a dict", options)
    needed = ["graph", "fusion"]
    if options.get("train") == "lora":
        needed.append("lora")
    for name in needed:
        require(name in options, f"options: {name}", "a value", None)
    for row in OPTIONS:
        if "train" in row.scripts and row.name in options:
            _check_option(row, options[row.name])
    has_gate = options["graph"] != "published" or options["fusion"] != "gate"
    require(has_gate, "options: fusion", "a number for the published branch", options["fusion"])


def _check_option(row, value):
    field = f"options: {row.name}"
    settings = row.settings
    if settings.get("action") == "store_true":
        require(isinstance(value, bool), field, "True or False", value)
        return
    if value is None:
        # Only the model's have a default that is needed.
        require(row.group != "model" or settings.get("default") is None, field, "a value", value)
        return
    values = [value]
    if "nargs" in settings:
        count = settings["nargs"]
        require(isinstance(value, (list, tuple)), field, "a list", value)
        values = list(value)
        if isinstance(count, int):
            require(len(values) == count, field, f"{count} numbers", value)
    for one in values:
        _check_one(row, field, one)


def _check_one(row, field, value):
    kind = row.settings.get("type")
    if "choices" in row.settings:
        choices = row.settings["choices"]
        is_choice = isinstance(value, str) and value in choices
        require(is_choice, field, f"one of {', '.join(choices)}", value)
    elif kind is int:
        require(is_whole(value), field, "a whole number", value)
    elif kind is number:
        require(is_finite(value), field, "a finite number", value)
    elif kind is gate_or_number:
        is_share = is_finite(value) and 0 <= value <= 1  # 0: an older run could leave the graph out
        require(value == "gate" or is_share, field, "gate or a number of 0 to 1", value)
    else:
        require(isinstance(value, str), field, "a string", value)
    if row.group == "model" and kind in (int, number):
        is_inside = row.least <= value <= row.most and value > row.above
        require(is_inside, field, f"{row.least} or more", value)


# ------------------------------------------------------------------ sizes


def check_sizes(weights, model_config):
    """The sizes that a model config states are those of the tensors; heads no tensor tells."""
    try:
        found = sizes_of(weights)
    except ValueError as error:
        raise ValueError(f"field 'weights': {error}") from None
    for part, size in found.items():
        stated = model_config[part]
        if part in ("vision", "text"):
            for name, value in size.items():
                _check_size(f"{part}: {name}", stated.get(name), value)
        else:
            _check_size(part, stated, size)


def _check_size(field, stated, found):
    if stated != found:
        raise ValueError(
            f"weights and model config do not fit: {field} is {shown(stated)}, but {found} by the "
            "weights"
        )


def check_fit(weights, expected):
    """Names, shapes and kinds of weights are those of a model's state dict, on any device."""
    problems = [f"{name!r:.60} is missing" for name in expected if name not in weights]
    problems += [f"{name!r:.60} is unexpected" for name in weights if name not in expected]
    for name, tensor in weights.items():
        if name not in expected:
            continue
        shape, needed = tuple(tensor.shape), tuple(expected[name].shape)
        if shape != needed:
            problems.append(f"{name} has the shape {shape} instead of {needed}")
        elif tensor.is_floating_point() != expected[name].is_floating_point():
            problems.append(f"{name} is of {tensor.dtype} instead of {expected[name].dtype}")
    if problems:
        more = f" and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        listed = "; ".join(problems[:LISTED])
        raise ValueError(f"weights and model config do not fit: {listed}{more}")
