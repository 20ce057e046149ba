"""Results for people: tables, result files, ranks as CSV.

A result is a dict as evaluate.py makes it: figures in percent, their intervals, what they were
measured on. What is here takes plain data; only functions that read and write touch files.
"""

import csv
import json
from pathlib import Path
from statistics import mean, stdev

from metrics.intervals import bootstrap, by_place
from metrics.methods import methods, seeds_of
from metrics.ranks import DIRECTIONS, direction_name
from metrics.result_content import checked_results
from writing import write_text, written_whole

WIDE = 0.1  # points by which ties have to move a figure to be mentioned


def recalls_of(side):
    """The names of the recalls in one direction's figures: R@1, R@5, R@10."""
    return [key for key in side if key.startswith("R@")]


# ------------------------------------------------------------------ tables


def table(results, free=("out",)):
    """One result in detail, several as in `summary`."""
    if len(results) == 1:
        return detailed(results[0])
    return summary(results, free)


def _ties(pessimistic, value, optimistic):
    """The bounds that ties leave open, in words; empty where they are narrow."""
    if max(optimistic - value, value - pessimistic) < WIDE:
        return ""
    return f"between {pessimistic:.1f} and {optimistic:.1f}"


def _ties_of_mean(result):
    return _ties(result["mR_pessimistic"], result["mR"], result["mR_optimistic"])


def detailed(result):
    """All figures of a result, with bounds where ties leave 0.1 point or more open."""
    recalls = recalls_of(result["image_to_text"])
    equal = ", equal captions counted as one" if result["caption_equivalence"] else ""
    heads = "".join(f"{recall:>7s}" for recall in recalls)
    lines = [
        f"{result['dataset']} {result['split']}: {result['images']} images, {result['captions']} "
        f"captions ({result['distinct_texts']} distinct){equal}",
        f"{'':15s}{heads}{'mean rank':>12s}{'median':>9s}",
    ]
    for direction in DIRECTIONS:
        side = result[direction]
        values = "".join(f"{side[recall]:7.1f}" for recall in recalls)
        lines.append(
            f"{direction_name(direction):15s}{values}"
            f"{side['mean_rank']:12.1f}{side['median_rank']:9.1f}"
        )
        for recall in recalls:
            ties = _ties(side["pessimistic"][recall], side[recall], side["optimistic"][recall])
            if ties:
                lines.append(f"  ties: {recall} {ties}")
    low, high = result["intervals"]["mR"]
    ties = _ties_of_mean(result)
    ties = f" (ties: {ties})" if ties else ""
    interval = f"95 % interval {low:.1f} to {high:.1f} over images only"
    lines.append(f"mR {result['mR']:.1f}, {interval}{ties}")
    return "\n".join(lines)


def summary(results, free=("out",)):
    """A line a result, by data set; and mean and sample deviation of those that differ in seed.

    The interval of a result is over images, that of a mean over seeds and images. free: training
    options that may differ too, since they change no result.
    """
    recalls = recalls_of(results[0]["image_to_text"])
    heads = [f"{side} {recall}" for side in ("to text", "to image") for recall in recalls]
    rows = [["checkpoint", "data set", "split", "images", *heads, "mR [95 % interval]", "ties: mR"]]
    intervals = "intervals: over images only"
    for own in by_place(results).values():
        for result in own:
            rows.append(_row(result))
        for group in _groups_of_seeds(own, free):
            rows.append(_mean_row(group))
            intervals = "intervals: of a result over images only, of a mean over seeds and images"
    lines = [*_aligned(rows), intervals]
    if results[0]["caption_equivalence"]:
        lines.append("equal captions counted as one")
    return "\n".join(lines)


def _figures(result):
    """The recalls of both directions, then mR."""
    figures = []
    for direction in DIRECTIONS:
        side = result[direction]
        figures += [side[recall] for recall in recalls_of(side)]
    return [*figures, result["mR"]]


def _row(result):
    cells = [f"{value:.1f}" for value in _figures(result)]
    low, high = result["intervals"]["mR"]
    cells[-1] += f" [{low:.1f}, {high:.1f}]"
    place = [result["checkpoint"], result["dataset"], result["split"], str(result["images"])]
    return [*place, *cells, _ties_of_mean(result)]


def _mean_row(group):
    cells = []
    for column in zip(*[_figures(result) for result in group], strict=True):
        cells.append(f"{mean(column):.1f} ± {stdev(column):.1f}")
    low, high = bootstrap([result["per_image"] for result in group])["mR"]
    cells[-1] += f" [{low:.1f}, {high:.1f}]"
    name = f"mean ± standard deviation of {len(group)}"
    first = group[0]
    return [name, first["dataset"], first["split"], str(first["images"]), *cells, ""]


def _groups_of_seeds(results, free):
    """Results of one method on the same images with several seeds, in lists."""
    found = []
    for group in methods(results, free):
        # Equal seeds are two files of one run, or plain CLIPs, which have no options of their own.
        seeds_differ = len(set(seeds_of(group))) == len(group)
        if len(group) > 1 and seeds_differ and _have_the_same_images(group):
            found.append(group)
    return found


def _have_the_same_images(results):
    tables = [result["per_image"] for result in results]
    images = {tuple(sorted(zip(own["names"], own["captions"], strict=True))) for own in tables}
    return len(images) == 1


def _aligned(rows):
    """Rows of strings as lines; the first two columns are words, the others figures."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = []
        for place, (cell, width) in enumerate(zip(row, widths, strict=True)):
            cells.append(cell.ljust(width) if place < 2 else cell.rjust(width))
        lines.append("  ".join(cells).rstrip())
    return lines


def comparison(comparisons):
    """What `intervals.compare` found, in lines: differences in points with 95 % intervals.

    A line says what the intervals are over.
    """
    lines = []
    for found in comparisons:
        figures_a, figures_b = found.figures
        runs_a, runs_b = found.runs
        lines.append(
            f"{found.dataset} {found.split}, {found.images} images, {runs_a} and {runs_b} runs: "
            + _mean_recalls(figures_a["mR"], figures_b["mR"], found.difference["mR"])
        )
        for direction in DIRECTIONS:
            cells = [
                f"{recall} {_difference(difference)}"
                for recall, difference in found.difference[direction].items()
            ]
            lines.append(f"  {direction_name(direction)}: {', '.join(cells)}")
        lines.append(f"  intervals: {_drawn(found)}")
        for seed, (a, b, difference) in found.pairs.items():
            lines.append(f"  seed {seed}, over images only: {_mean_recalls(a, b, difference)}")
    return "\n".join(lines)


def _drawn(found):
    """What the intervals of a `Comparison` are over, in words."""
    if found.runs == (1, 1):
        return "over images only; the chance of training is not in them, which takes several seeds"
    if found.pairs:
        return "over seeds and images, runs of a seed drawn together"
    if 1 in found.runs:
        single = "first" if found.runs[0] == 1 else "second"
        return f"over seeds and images, but images only for the {single} file, which has one run"
    return "over seeds and images, the seeds of each file drawn by themselves"


def _mean_recalls(a, b, difference):
    return f"mR {a:.1f} - {b:.1f} = {_difference(difference)}"


def _difference(difference):
    return f"{difference.value:+.1f} [{difference.low:+.1f}, {difference.high:+.1f}]"


# ------------------------------------------------------------------ files


def _json(value, indent=""):
    """JSON with a line an entry, but lists of numbers or strings on one line.

    The lists by image have thousands of entries; Python's `indent` gives each a line of its own.
    """
    nested = isinstance(value, list) and any(isinstance(entry, (dict, list)) for entry in value)
    if isinstance(value, dict) and value:
        entries = [f"{json.dumps(key)}: {_json(value[key], indent + ' ')}" for key in value]
        opening, closing = "{", "}"
    elif nested:
        entries = [_json(entry, indent + " ") for entry in value]
        opening, closing = "[", "]"
    else:
        return json.dumps(value)
    lines = ",\n".join(f"{indent} {entry}" for entry in entries)
    return f"{opening}\n{lines}\n{indent}{closing}"


def write_results(path, command, results):
    """Write {"command", "results"} as JSON."""
    text = _json({"command": command, "results": results})
    write_text(path, text + "\n")


def read_results(path):
    """The results in a file of `write_results`; ValueError that names a file that is none."""
    remedy = "write result files with evaluate.py --json"
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: not readable ({error.strerror}); {remedy}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a result file; no JSON ({error}); {remedy}") from None
    try:
        return checked_results(content)
    except ValueError as error:
        raise ValueError(f"{path}: not a result file; {error}; {remedy}") from None


def write_ranks(path, rows, further=()):
    """Write `queries.query_rows` as CSV; first the `further` columns that the rows have."""
    columns = [
        *further,
        "direction",
        "image",
        "caption",
        "rank",
        "optimistic",
        "pessimistic",
        "score",
        "competitor",
        "competitor_score",
    ]
    write_csv(path, columns, rows)


def write_csv(path, columns, rows):
    """Write rows, dicts that have these columns, as CSV.

    Fractions have six digits. A text that a spreadsheet would take for a formula gets an apostrophe
    before it.
    """
    with (
        written_whole(path) as temporary,
        open(temporary, "w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(columns)
        for row in rows:
            writer.writerow([_cell(row[column]) for column in columns])


FORMULAS = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet's formula may begin with


def _cell(value):
    """A value as it stands in a CSV file; numbers stay numbers."""
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, str) and value.startswith(FORMULAS):
        return f"'{value}"
    return value
