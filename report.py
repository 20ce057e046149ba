"""Results for people: tables, result files, ranks as CSV, a page of queries, learning curves.

A result is a dict as evaluate.py makes it: figures in percent, their intervals, what they were
measured on. What is here takes plain data; only functions that read, write and draw touch files.
"""

import base64
import csv
import html
import io
import json
from functools import lru_cache
from pathlib import Path
from statistics import mean, stdev

import images
from intervals import method
from V_Graph import build_graph, load_detections

DIRECTIONS = {"image_to_text": "image to text", "text_to_image": "text to image"}
LARGE, SMALL = 448, 192  # pixels of the longer side of the page's pictures
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


def plot_log(lines, path):
    """Draw loss and validation mR by epoch to a PNG file.

    lines: dicts of a log.jsonl, with epoch, loss and val_mR. Raises ValueError where there is no
    line, and where matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure  # large, and needed by this function alone
    except ImportError:
        raise ValueError(f"{path}: drawing needs matplotlib: pip install matplotlib") from None
    if not lines:
        raise ValueError(f"{path}: nothing to draw, the log has no epoch yet")
    figure = Figure(figsize=(7, 5), layout="constrained")
    epochs = [line["epoch"] for line in lines]
    names = {"loss": "loss", "val_mR": "validation mR"}
    for axes, key in zip(figure.subplots(2, sharex=True), names, strict=True):
        axes.plot(epochs, [line[key] for line in lines], marker=".")
        axes.set(xlabel="epoch", ylabel=names[key])
        axes.grid(alpha=0.3)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=120)


# ------------------------------------------------------------------ the page

_STYLE = """
body { font: 15px/1.4 sans-serif; margin: 2em; color-scheme: light dark }
article { border-top: 1px solid gray; padding: 1em 0 }
.query, div.items { display: flex; flex-wrap: wrap; gap: 1em; align-items: flex-start }
.text { flex: 1; min-width: 20em }
figure { margin: 0; border: 3px solid transparent }
.items figure, .items img { width: 150px }
figcaption { font-size: 12px; overflow-wrap: anywhere }
.own { border-color: green; font-weight: bold }
"""


def picture(path, detections, side):
    """An image file with its detections' graph drawn over it, as JPEG bytes.

    The longer side has `side` pixels. detections: a file, or None for none.
    """
    image = images.open_image(path)
    scale = LARGE / max(image.size)
    image = image.resize([max(1, round(scale * length)) for length in image.size])
    found = load_detections(detections) if detections else []
    for entry in found:
        entry["bbox"][:4] = [scale * length for length in entry["bbox"][:4]]
    drawn = images.draw_graph(image, build_graph(found, image.size), scale=1)
    drawn.thumbnail((side, side))
    file = io.BytesIO()
    drawn.save(file, "JPEG", quality=75)
    return file.getvalue()


def _figure(jpeg, name, note="", own=False):
    name, data = html.escape(name), base64.b64encode(jpeg).decode()
    return (
        f'<figure class="{"own" if own else "other"}"><img alt="{name}" '
        f'src="data:image/jpeg;base64,{data}"><figcaption>{note}{name}</figcaption></figure>'
    )


def _items(query, names, draw):
    """The top items of a query: pictures, or a list of captions."""
    parts = []
    for place, item in enumerate(query["items"], start=1):
        score = f"{item['score']:.3f} {'own ' if item['own'] else ''}"
        if "image" in item:
            jpeg, name = draw(item["image"], SMALL), names[item["image"]]
            parts.append(_figure(jpeg, name, f"{place}. {score}", item["own"]))
        else:
            times = f" ({item['rows']} times)" if item["rows"] > 1 else ""
            kind = "own" if item["own"] else "other"
            parts.append(f'<li class="{kind}">{score}{html.escape(item["caption"])}{times}</li>')
    tag = "div" if query["direction"] == "text_to_image" else "ol"
    return f'<{tag} class="items">{"".join(parts)}</{tag}>'


def _article(query, names, draw):
    ties = query["optimistic"] < query["pessimistic"]
    between = f", ties: {query['optimistic']} to {query['pessimistic']}" if ties else ""
    asked = "" if query["direction"] == "text_to_image" else "best own caption: "
    text = f"<p>{asked}{html.escape(query['caption'])}</p>{_items(query, names, draw)}"
    return (
        f"<article><h3>rank {query['rank']:.4g}{between}, score {query['score']:.3f}</h3>"
        f'<div class="query">{_figure(draw(query["number"], LARGE), query["image"])}'
        f'<div class="text">{text}</div></div></article>'
    )


def page(result, chosen, draw):
    """A result and some of its queries as one HTML file that needs no other, and no script.

    chosen: {(direction, "worst" or "best"): queries}, each a dict as of `ranks.query_rows` with
    `items` of `ranks.top_items`. draw: gives the JPEG bytes of (number of the image, side).
    """
    names = result["per_image"]["names"]
    title = html.escape(f"{result['dataset']} {result['split']}")
    trained = " ".join(result["training_options"]["dataset"] or ["nothing here, a plain CLIP"])
    about = f"{result['checkpoint']}, trained on {trained}, epoch {result['epoch']}"
    graphs = result["training_options"]["graph"], result["data_options"]["graph_control"]
    about += f", graph {graphs[0]} ({graphs[1]}). Split: {result['origin']}. "
    about += "The boxes are the images' own detections."
    figures = html.escape(detailed(result))
    parts = [f"<h1>{title}</h1><p>{html.escape(about)}</p><pre>{figures}</pre>"]
    for (direction, kind), queries in chosen.items():
        parts.append(f"<h2>{DIRECTIONS[direction]}: the {len(queries)} {kind}</h2>")
        parts += [_article(query, names, draw) for query in queries]
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def write_page(path, result, chosen, files, detections):
    """Write `page`, its pictures drawn from image files and their detection files or None."""
    draw = lru_cache(maxsize=None)(lambda i, side: picture(files[i], detections[i], side))
    Path(path).write_text(page(result, chosen, draw), encoding="utf-8")
