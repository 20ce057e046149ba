"""Results for people: tables, result files, ranks as CSV, a page of queries, learning curves.

A result is a dict as evaluate.py makes it: figures in percent, their intervals, what they were
measured on. What is here takes plain data; only functions that read, write and draw touch files.
"""

import csv
import json
from pathlib import Path
from statistics import mean, stdev

from metrics.intervals import method

DIRECTIONS = {"image_to_text": "image to text", "text_to_image": "text to image"}


_WIDE = 0.1  # points by which ties have to move a figure to be mentioned


def recalls_of(side):
    """The names of the recalls in one direction's figures: R@1, R@5, R@10."""
    return [key for key in side if key.startswith("R@")]


# ------------------------------------------------------------------ tables


def table(results, free=("out",)):
    """One result in detail, several as in `summary`."""
    return detailed(results[0]) if len(results) == 1 else summary(results, free)


def _ties(low, value, high):
    """The bounds that ties leave open, in words, where they are wide."""
    return f"between {low:.1f} and {high:.1f}" if max(high - value, value - low) >= _WIDE else ""


def _ties_of_mean(result):
    return _ties(result["mR_pessimistic"], result["mR"], result["mR_optimistic"])


def detailed(result):
    """All figures of a result, with bounds where ties leave 0.1 point or more open."""
    recalls = recalls_of(result["image_to_text"])
    heads = "".join(f"{name:>7s}" for name in recalls)
    equal = ", equal captions counted as one" if result["caption_equivalence"] else ""
    lines = [
        f"{result['dataset']} {result['split']}: {result['images']} images, {result['captions']} "
        f"captions ({result['distinct_texts']} distinct){equal}",
        f"{'':15s}{heads}{'mean rank':>12s}{'median':>9s}",
    ]
    for key, name in DIRECTIONS.items():
        side = result[key]
        values = "".join(f"{side[recall]:7.1f}" for recall in recalls)
        lines.append(f"{name:15s}{values}{side['mean_rank']:12.1f}{side['median_rank']:9.1f}")
        for recall in recalls:
            bounds = side["pessimistic"][recall], side[recall], side["optimistic"][recall]
            lines += [f"  ties: {recall} {ties}" for ties in [_ties(*bounds)] if ties]
    ties, (low, high) = _ties_of_mean(result), result["intervals"]["mR"]
    ties = f" (ties: {ties})" if ties else ""
    lines.append(f"mR {result['mR']:.1f}, 95 % interval {low:.1f} to {high:.1f}{ties}")
    return "\n".join(lines)


def _figures(result):
    sides = [result[direction] for direction in DIRECTIONS]
    return [*(side[name] for side in sides for name in recalls_of(side)), result["mR"]]


def _row(result):
    *recalls, total = [f"{value:.1f}" for value in _figures(result)]
    low, high = result["intervals"]["mR"]
    total = f"{total} [{low:.1f}, {high:.1f}]"
    place = [result["checkpoint"], result["dataset"], result["split"], str(result["images"])]
    return [*place, *recalls, total, _ties_of_mean(result)]


def _seeds(results, free):
    """Those of the results whose training differs in seed alone, in lists of two and more."""
    groups = {}
    for result in results:
        groups.setdefault(method(result, free), []).append(result)
    # Equal seeds are two files of one run, or plain CLIPs, which have no options of their own.
    return [
        group
        for group in groups.values()
        if 1 < len(group) == len({result["training_options"].get("seed") for result in group})
    ]


def _mean_row(group):
    columns = zip(*map(_figures, group), strict=True)
    cells = [f"{mean(column):.1f} ± {stdev(column):.1f}" for column in columns]
    first, name = group[0], f"mean ± standard deviation of {len(group)}"
    return [name, first["dataset"], first["split"], str(first["images"]), *cells, ""]


def summary(results, free=("out",)):
    """A line a result, by data set; and mean and sample deviation of those that differ in seed.

    free: training options that may differ too, since they change no result.
    """
    recalls = recalls_of(results[0]["image_to_text"])
    heads = [f"{name} {recall}" for name in ("to text", "to image") for recall in recalls]
    rows = [["checkpoint", "data set", "split", "images", *heads, "mR [95 % interval]", "ties: mR"]]
    note = ["equal captions counted as one"] if results[0]["caption_equivalence"] else []
    for place in dict.fromkeys((result["dataset"], result["split"]) for result in results):
        own = [result for result in results if (result["dataset"], result["split"]) == place]
        rows += [*map(_row, own), *map(_mean_row, _seeds(own, free))]
    return "\n".join([*_aligned(rows), *note])


def _aligned(rows):
    """Rows of strings as lines; the first two columns are words, the others figures."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _difference(difference):
    return f"{difference.value:+.1f} [{difference.low:+.1f}, {difference.high:+.1f}]"


def comparison(comparisons):
    """What `intervals.compare` found, in lines: differences in points with 95 % intervals."""
    lines = []
    for found in comparisons:
        a, b = (figures["mR"] for figures in found.figures)
        lines.append(
            f"{found.dataset} {found.split}, {found.images} images, {found.runs[0]} and "
            f"{found.runs[1]} runs: mR {a:.1f} - {b:.1f} = {_difference(found.difference['mR'])}"
        )
        for key, name in DIRECTIONS.items():
            cells = [f"{k} {_difference(value)}" for k, value in found.difference[key].items()]
            lines.append(f"  {name}: {', '.join(cells)}")
        for seed, (a, b, difference) in found.pairs.items():
            lines.append(f"  seed {seed}: mR {a:.1f} - {b:.1f} = {_difference(difference)}")
    return "\n".join(lines)


# ------------------------------------------------------------------ files


def _json(value, indent=""):
    """JSON with a line an entry, but lists of numbers or strings on one line."""
    nested = isinstance(value, list) and any(isinstance(entry, (dict, list)) for entry in value)
    if not value or not (nested or isinstance(value, dict)):
        return json.dumps(value)
    deeper = indent + " "
    if isinstance(value, dict):
        entries = [f"{json.dumps(key)}: {_json(entry, deeper)}" for key, entry in value.items()]
    else:
        entries = [_json(entry, deeper) for entry in value]
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    return f"{opening}\n" + ",\n".join(deeper + entry for entry in entries) + f"\n{indent}{closing}"


def write_results(path, command, results):
    """Write {"command", "results"} as JSON."""
    text = _json({"command": command, "results": results})
    Path(path).write_text(text + "\n", encoding="utf-8")


def read_results(path):
    """The results in a file of `write_results`; ValueError that names a file that is none."""
    remedy = "write result files with evaluate.py --json"
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"))["results"]
        if results and all(result["per_image"]["names"] for result in results):
            return results
    except OSError as error:
        raise ValueError(f"{path}: not readable ({error.strerror}); {remedy}") from None
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"{path}: not a result file; {remedy}")


def write_ranks(path, rows, columns=()):
    """Write `ranks.query_rows` as CSV, after the further columns that the rows have."""
    columns = [*columns, "direction", "image", "caption", "rank", "optimistic", "pessimistic"]
    columns += ["score", "competitor", "competitor_score"]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        for row in rows:
            short = {key: round(v, 6) if isinstance(v, float) else v for key, v in row.items()}
            writer.writerow(short)
