"""One HTML page with a result's worst and best queries, and the objects drawn in."""

import base64
import html
import io
from functools import cache

from dataset import images
from det_formats.det_json import load_detections
from det_formats.drawing import draw_graph
from metrics.ranks import direction_name
from metrics.tables import detailed
from V_Graph import build_graph
from writing import write_text

LARGE = 448  # pixels of the longer side of a query's picture
SMALL = 192  # and of the pictures of its items

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
    width, height = image.size
    image = image.resize([max(1, round(scale * width)), max(1, round(scale * height))])
    found = load_detections(detections) if detections else []
    for entry in found:
        entry["bbox"][:4] = [scale * length for length in entry["bbox"][:4]]
    drawn = draw_graph(image, build_graph(found, image.size), scale=1)
    drawn.thumbnail((side, side))
    file = io.BytesIO()
    drawn.save(file, "JPEG", quality=75)
    return file.getvalue()


def _figure(jpeg, name, note="", own=False):
    """A picture with its name below it; note stands before the name."""
    kind = "own" if own else "other"
    name = html.escape(name)
    data = base64.b64encode(jpeg).decode()
    return (
        f'<figure class="{kind}"><img alt="{name}" src="data:image/jpeg;base64,{data}">'
        f"<figcaption>{note}{name}</figcaption></figure>"
    )


def _score(item):
    """An item's score as it stands before its name."""
    return f"{item['score']:.3f} {'own ' if item['own'] else ''}"


def _pictures(items, names, draw):
    """The top images of a text."""
    figures = []
    for place, item in enumerate(items, start=1):
        image = item["image"]
        note = f"{place}. {_score(item)}"
        figures.append(_figure(draw(image, SMALL), names[image], note, item["own"]))
    return f'<div class="items">{"".join(figures)}</div>'


def _captions(items):
    """The top captions of an image."""
    lines = []
    for item in items:
        kind = "own" if item["own"] else "other"
        times = f" ({item['times']} times)" if item["times"] > 1 else ""
        lines.append(f'<li class="{kind}">{_score(item)}{html.escape(item["caption"])}{times}</li>')
    return f'<ol class="items">{"".join(lines)}</ol>'


def _article(query, names, draw):
    """A query with its picture, its caption and its top items."""
    ties = ""
    if query["optimistic"] < query["pessimistic"]:
        ties = f", ties: {query['optimistic']} to {query['pessimistic']}"
    caption = html.escape(query["caption"])
    if query["direction"] == "text_to_image":
        items = _pictures(query["items"], names, draw)
    else:
        caption = f"best own caption: {caption}"
        items = _captions(query["items"])
    return (
        f"<article><h3>rank {query['rank']:.4g}{ties}, score {query['score']:.3f}</h3>"
        f'<div class="query">{_figure(draw(query["number"], LARGE), query["image"])}'
        f'<div class="text"><p>{caption}</p>{items}</div></div></article>'
    )


def _about(result):
    """What was measured, in words."""
    trained = " ".join(result["training_options"]["dataset"] or ["nothing here, a plain CLIP"])
    graph = result["training_options"]["graph"]
    return (
        f"{result['checkpoint']}, trained on {trained}, epoch {result['epoch']}, "
        f"graph {graph}. Split: {result['origin']}. "
        "The boxes are the images' own detections."
    )


def page(result, chosen, draw):
    """A result and some of its queries as one HTML file that needs no other, and no script.

    chosen: {(direction, "worst" or "best"): queries}, each a dict as of `queries.query_rows` with
    `items` of `queries.top_items`. draw: gives the JPEG bytes of (number of the image, side).
    """
    names = result["per_image"]["names"]
    title = html.escape(f"{result['dataset']} {result['split']}")
    about = html.escape(_about(result))
    figures = html.escape(detailed(result))
    parts = [f"<h1>{title}</h1><p>{about}</p><pre>{figures}</pre>"]
    for (direction, kind), queries in chosen.items():
        parts.append(f"<h2>{direction_name(direction)}: the {len(queries)} {kind}</h2>")
        for query in queries:
            parts.append(_article(query, names, draw))
    body = "\n".join(parts)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def write_page(path, result, chosen, files, detections):
    """Write `page`, its pictures drawn from image files and their detection files or None."""

    @cache  # an image is among the items of many queries
    def draw(image, side):
        return picture(files[image], detections[image], side)

    write_text(path, page(result, chosen, draw))
