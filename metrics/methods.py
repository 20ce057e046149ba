"""Which results are runs of one method: such as differ in chance alone, by what is saved with them.

A result is a dict as evaluate.py makes it.
"""

import json
import re

from options import converted


def seeds_of(results):
    """The seeds that results were trained with, in their order."""
    return [result["training_options"].get("seed") for result in results]


def methods(results, free):
    """The results in lists, one a method: results of one method differ in chance alone.

    One method means equal options, equal sizes of the model, and one start. free: names of options
    that change no result. They may differ, as may the seed and options that did nothing, which an
    older run may not have: those without a value, and `lora` where LoRA was not trained.

    The start is what `--clip` names. It is one where the SHA-256 of its file is. Seeds may also
    have starts of their own, as runs/first-0/plain.pt of seed 0 and runs/first-1/plain.pt of seed
    1: these are one where the paths differ in the run's own seed alone, in the form `-<seed>` at
    the end of a name (see `_without_seed`). Older results have no SHA-256 of the start: among
    results of which one has none, the path stands for it.
    """
    found = []
    for group in _grouped(results, [_recipe(result, free) for result in results]):
        found += _by_start(group)
    return found


def _grouped(results, keys):
    """The results in lists of equal keys."""
    groups = {}
    for result, key in zip(results, keys, strict=True):
        groups.setdefault(key, []).append(result)
    return list(groups.values())


def _recipe(result, free):
    """A result's options and sizes as a string, its start aside."""
    options = converted(result["training_options"])
    ignored = {*free, "seed", "clip"}
    if options.get("train") != "lora":
        ignored.add("lora")
    relevant = {}
    for name, value in options.items():
        if name not in ignored and value is not None:
            relevant[name] = value
    with_evidence = bool(result.get("evidence_weight"))  # the weight itself is each run's own
    content = [relevant, result.get("definition"), with_evidence]
    return json.dumps(content, sort_keys=True, default=str)


def _by_start(results):
    """The results in lists of one start, either one for several seeds or one for each."""
    hashed = all(result.get("start_sha256") for result in results)
    found, left = [], []
    for group in _grouped(results, [_start(result, hashed) for result in results]):
        if len(set(seeds_of(group))) > 1:
            found.append(group)
        else:
            left += group
    return found + _grouped(left, [_start_of_own(result, hashed) for result in left])


def _start(result, hashed):
    """The file a result's training started from: its digest where all have one, else its path."""
    return result["start_sha256"] if hashed else result["training_options"].get("clip")


def _start_of_own(result, hashed):
    """What the starts of all seeds have in common, where each has its own; else the `_start`."""
    options = result["training_options"]
    masked = _without_seed(options.get("clip"), options.get("seed"))
    return _start(result, hashed) if masked is None else masked


def _without_seed(path, seed):
    """A start's path with the run's seed left out; None for a path without it.

    It must follow a hyphen, and a slash, a dot or the end must follow it: first-0/plain.pt,
    first-0.pt and first-0 hold the seed 0; ViT-B/0, 20.pt and first-10.pt do not.
    """
    if path is None or seed is None:
        return None
    masked, count = re.subn(rf"-{re.escape(str(seed))}(?=[/\\.]|$)", "-SEED", path)
    return masked if count else None
