"""What a result file holds is checked before anything is computed from it.

The checks cover the fields that a comparison reads: what a result was measured on, what its model
was trained with, and its table by image. Each ValueError names the result, by its number in the
file, and the field; the caller puts the file's name before it.
"""

import re

from metrics.ranks import DIRECTIONS

MOST_CAPTIONS = 10**6  # of an image
ROUNDING = 1e-6  # by which a sum of chances may be larger than it should


def checked_results(content):
    """The results in a file's content; ValueError that names the field which is wrong."""
    results = content.get("results") if isinstance(content, dict) else None
    if not isinstance(results, list) or not results:
        raise ValueError("field 'results': expected a list of results")
    for number, result in enumerate(results):
        try:
            _check_result(result)
        except ValueError as error:
            raise ValueError(f"result {number}: {error}") from None
    return results


def _require(is_right, field, expected):
    if not is_right:
        raise ValueError(f"field '{field}': expected {expected}")


def _check_result(result):
    _require(isinstance(result, dict), "results", "objects")
    for field in ("dataset", "split"):
        _require(isinstance(result.get(field), str), field, "a string")
    _require(
        isinstance(result.get("caption_equivalence"), bool), "caption_equivalence", "a boolean"
    )
    _check_training(result)
    _check_table(result.get("per_image"))


def _check_training(result):
    """What tells runs of one method: options with seed and start, sizes."""
    options = result.get("training_options")
    _require(isinstance(options, dict), "training_options", "an object")
    seed = options.get("seed")
    is_seed = isinstance(seed, int) and not isinstance(seed, bool) and abs(seed) < 2**64
    _require(seed is None or is_seed, "training_options: seed", "a whole number")
    for field, value in (
        ("training_options: clip", options.get("clip")),
        ("start_sha256", result.get("start_sha256")),
    ):
        _require(value is None or isinstance(value, str), field, "a string or null")
    model_config = result.get("definition")
    is_object = isinstance(model_config, dict)
    _require(model_config is None or is_object, "definition", "an object or null")


def _check_table(table):
    """The table by image: lists of one length, of chances and sums of chances."""
    _require(isinstance(table, dict), "per_image", "an object")
    names, captions = table.get("names"), table.get("captions")
    are_names = isinstance(names, list) and all(isinstance(name, str) for name in names)
    _require(are_names and names, "per_image: names", "a list of strings")
    are_counts = isinstance(captions, list) and all(_is_count(count) for count in captions)
    _require(are_counts, "per_image: captions", f"whole numbers of 1 to {MOST_CAPTIONS}")
    _require(len(captions) == len(names), "per_image: captions", f"{len(names)}, one an image")
    for direction in DIRECTIONS:
        # A hit of an image counts once, those of its captions once each.
        most = [1] * len(names) if direction == "image_to_text" else captions
        _check_hits(table.get(direction), f"per_image: {direction}", most)
    recalls = [list(table[direction]) for direction in DIRECTIONS]
    _require(recalls[0] == recalls[1], "per_image", "the same recalls in both directions")


def _check_hits(recalls, field, most):
    _require(isinstance(recalls, dict) and recalls, field, "an object with recalls")
    for name, hits in recalls.items():
        _require(re.fullmatch(r"R@[1-9][0-9]{0,8}", name), field, "names like R@5")
        is_list = isinstance(hits, list) and len(hits) == len(most)
        _require(is_list, f"{field}: {name}", f"{len(most)} numbers, one an image")
        for value, bound in zip(hits, most, strict=True):
            is_inside = _is_number(value) and 0 <= value <= bound + ROUNDING
            _require(is_inside, f"{field}: {name}", "numbers of 0 to 1, or to the captions")


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value):
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST_CAPTIONS
