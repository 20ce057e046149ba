"""One HTML page with a result's worst and best queries, and the objects drawn in."""

import base64
import html
import io
from functools import lru_cache
from pathlib import Path

from dataset import images
from det_formats.det_json import load_detections
from metrics.tables import DIRECTIONS, detailed
from V_Graph import build_graph, draw_graph

LARGE, SMALL = 448, 192  # pixels of the longer side of the page's pictures

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
    drawn = draw_graph(image, build_graph(found, image.size), scale=1)
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
