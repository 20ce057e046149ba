"""The page of `evaluate.py --html`: a result's worst and best queries, with the objects drawn in.

write_page("r.html", result, worst_and_best(rows), files, detections)
"""

from collections import Counter
from functools import cache
from typing import NamedTuple

from dataset import images
from det_formats.det_json import load_detections
from det_formats.drawing import strongest_edges
from metrics.page import COLOURS, Mark, contents, document, jpeg, picture, sentence, shown
from metrics.ranks import direction_name
from metrics.tables import detailed
from V_Graph import build_graph
from writing import write_text

LARGE = 448  # pixels of the longer side of a query's picture
SMALL = 192  # and of the pictures of its items

_STYLE = """
section > h2 { margin: 3rem 0 0 }
.query { border-top: 1px solid var(--line); padding: 1.25rem 0 1.75rem; margin-top: 1.25rem;
  display: grid; grid-template-columns: minmax(0, 448px) minmax(0, 1fr); gap: .75rem 2rem;
  align-items: start }
.query > h3 { grid-column: 1 / -1 }
.said { margin-bottom: 1rem; font-size: 1.0625rem }
.pictures { list-style: none; padding: 0; display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(7.5rem, 1fr)) }
.captions { padding: 0; list-style: none }
.captions li { display: grid; grid-template-columns: 3.5rem 2.75rem minmax(0, 1fr); gap: .5rem;
  padding: .3rem 0; border-top: 1px solid var(--line) }
.legend { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: 0 .9rem }
.own .mine { color: var(--good); font-weight: 600 }
.own .picture { outline: 3px solid var(--good); outline-offset: 2px }
@media (max-width: 50rem) { .query { grid-template-columns: minmax(0, 1fr) }
  .pictures { grid-template-columns: repeat(auto-fill, minmax(6rem, 1fr)) } }
"""


class Drawn(NamedTuple):
    """An image as the page shows it."""

    jpeg: bytes
    size: tuple  # (width, height) in pixels of the image file
    detections: list  # as of `load_detections`


# ------------------------------------------------------------------ pictures


def _kinds(detections):
    """{label: class of its colour} of an image, by which boxes and legend belong together."""
    labels = sorted({found["label"] for found in detections})
    return {label: f"c{place % COLOURS}" for place, label in enumerate(labels)}


def _marks(detections, labelled):
    kinds = _kinds(detections)
    marks = []
    for found in detections:
        label = found["label"]
        marks.append(Mark(found["bbox"], label, kinds[label], label if labelled else ""))
    return marks


def _lines(drawn):
    """The strongest edges of an image's graph, the more opaque the higher their weight."""
    graph = build_graph(drawn.detections, drawn.size)
    lines = []
    for i, j, weight in strongest_edges(graph):
        ends = [*graph.nodes[i]["box"][:2], *graph.nodes[j]["box"][:2]]
        lines.append((*ends, 0.3 + 0.7 * weight))
    return lines


def _legend(detections):
    """Colours, labels and how many there are; it goes with the boxes."""
    kinds = _kinds(detections)
    counts = Counter(found["label"] for found in detections)
    words = [
        f'<li><span class="swatch {kinds[label]}"></span>{counts[label]} × {shown(label)}</li>'
        for label in kinds
    ]
    return f'<ul class="legend marks soft">{"".join(words)}</ul>' if words else ""


def _figure(drawn, name, side, note=""):
    """A picture with its note and its name below it; a large one with labels and edges."""
    is_large = side == LARGE
    marks = _marks(drawn.detections, labelled=is_large)
    lines = _lines(drawn) if is_large else ()
    return (
        f"<figure>{picture(drawn.jpeg, drawn.size, name, side, marks, lines)}"
        f'<figcaption class="small">{note}<div>{shown(name)}</div>'
        f"{_legend(drawn.detections)}</figcaption></figure>"
    )


# ------------------------------------------------------------------ queries


def _score(item):
    """An item's score as it stands before its name, and whether it is one of the query's own."""
    return f'{item["score"]:.3f} <span class="mine">{"own" if item["own"] else ""}</span>'


def _class(item):
    return "own" if item["own"] else "other"


def _pictures(items, names, draw):
    """The top images of a text."""
    figures = []
    for place, item in enumerate(items, start=1):
        number = item["image"]
        note = f'<div class="number">{place}. {_score(item)}</div>'
        figure = _figure(draw(number, SMALL), names[number], SMALL, note)
        figures.append(f'<li class="{_class(item)}">{figure}</li>')
    return f'<ol class="pictures">{"".join(figures)}</ol>'


def _captions(items):
    """The top captions of an image."""
    lines = []
    for item in items:
        times = f' <span class="soft">({item["times"]} times)</span>' if item["times"] > 1 else ""
        lines.append(
            f'<li class="{_class(item)}"><span class="number">{item["score"]:.3f}</span>'
            f'<span class="mine">{"own" if item["own"] else ""}</span>'
            f"<span>{sentence(item['caption'])}{times}</span></li>"
        )
    return f'<ol class="captions">{"".join(lines)}</ol>'


def _rank(query, result):
    """Where a query's best relevant item stands, of how many."""
    of_images = query["direction"] == "text_to_image"
    number = result["images"] if of_images else result["captions"]
    return f"rank {query['rank']:.4g} of {number:,} {'images' if of_images else 'captions'}"


def _article(query, identifier, result, draw):
    """A query with its picture, its caption and its top items."""
    names = result["per_image"]["names"]
    ties = ""
    if query["optimistic"] < query["pessimistic"]:
        ties = f", ties: {query['optimistic']} to {query['pessimistic']}"
    caption = sentence(query["caption"])
    if query["direction"] == "text_to_image":
        items = _pictures(query["items"], names, draw)
    else:
        caption = f'<span class="soft">best own caption:</span> {caption}'
        items = _captions(query["items"])
    return (
        f'<article class="query stop" id="{identifier}" tabindex="0"'
        f' aria-labelledby="{identifier}-head">'
        f'<h3 id="{identifier}-head">{_rank(query, result)}{ties}, score {query["score"]:.3f}</h3>'
        f"{_figure(draw(query['number'], LARGE), query['image'], LARGE)}"
        f'<div><p class="said">{caption}</p>{items}</div></article>'
    )


def _entry(query):
    """A query's line in the list of contents."""
    is_text = query["direction"] == "text_to_image"
    words = sentence(query["caption"]) if is_text else shown(query["image"])
    return f"rank {query['rank']:.4g}: {words}"


# ------------------------------------------------------------------ the page


def _about(result):
    """What was measured, in words."""
    trained = " ".join(result["training_options"]["dataset"] or ["nothing here, a plain CLIP"])
    graph = result["training_options"]["graph"]
    lines = "the lines their graph's strongest edges"
    if graph != "object":
        lines += ", which this model does not see"
    return (
        f"{result['checkpoint']}, trained on {trained}, epoch {result['epoch']}, "
        f"graph {graph}. Split: {result['origin']}. "
        f"The boxes are the images' own detections, {lines}."
    )


def page(result, chosen, draw):
    """A result and some of its queries as one HTML file that needs no other.

    chosen: {(direction, "worst" or "best"): queries}, each a dict as of `queries.query_rows` with
    `items` of `queries.top_items`. draw: gives what is `Drawn` of (number of the image, side).
    """
    title = f"{result['dataset']} {result['split']}"
    groups, sections = [], []
    for (direction, kind), queries in chosen.items():
        head = f"{direction_name(direction)}: the {len(queries)} {kind}"
        group = f"{direction}-{kind}".replace("_", "-")
        entries, articles = [], []
        for place, query in enumerate(queries, start=1):
            identifier = f"{group}-{place}"
            entries.append((identifier, _entry(query)))
            articles.append(_article(query, identifier, result, draw))
        groups.append((group, head, entries))
        body = "\n".join(articles)
        sections.append(f'<section id="{group}"><h2>{head}</h2>\n{body}</section>')
    body = "\n".join(sections)
    main = (
        f'<h1>{shown(title)}</h1><p class="soft">{shown(_about(result))}</p>'
        f'{contents(groups)}<pre tabindex="0">{_figures(result)}</pre>\n{body}'
    )
    return document(title, main, stop="query", style=_STYLE)


def _figures(result):
    """The result's figures; their lines stay lines."""
    return "\n".join(shown(line) for line in detailed(result).split("\n"))


def write_page(path, result, chosen, files, detections):
    """Write `page`, its pictures drawn from image files and their detection files or None."""

    @cache  # an image is among the items of many queries
    def draw(number, side):
        image = images.open_image(files[number])
        found = load_detections(detections[number]) if detections[number] else []
        return Drawn(jpeg(image, side), image.size, found)

    write_text(path, page(result, chosen, draw))
