"""The hits of an answer as cards: HTML for the page of `search.py serve`.

An answer is as of gallery/answers.py. All texts are escaped; pictures and downloads are data in the
page, so that no file has to be given out.
"""

import base64
import tempfile
from html import escape
from pathlib import Path

from det_formats.geometry import corners_of
from gallery import output
from gallery.report import bar, main_objects, reach, written
from metrics.page import jpeg, shown

SIDE = 480  # pixels of the longer side of a hit's picture, at most
SMALL = 96  # and of the picture that was looked for

STYLE = """
.results { --main: #ffd43b; --pixels: #3987e5; --objects: #d9730d; --soft: #565c66;
  --line: #d8dbe0; --panel: #f3f4f6; --ink: #14171b; color: var(--ink);
  font-size: 1rem; line-height: 1.45 }
.dark .results { --pixels: #5b9df0; --objects: #f08c3a; --soft: #a9b0bb; --line: #3a4049;
  --panel: #23272e; --ink: #eceff3 }
.results p, .results h2, .results h3, .results ol { margin: 0; padding: 0 }
.results .soft { color: var(--soft) }
.results .small { font-size: .875rem }
.results .head { display: flex; flex-wrap: wrap; gap: .5rem 2rem; align-items: end;
  justify-content: space-between; margin: .5rem 0 1rem }
.results h2 { font-size: 1.375rem; line-height: 1.3; font-weight: 600; overflow-wrap: anywhere;
  outline: none; scroll-margin-top: 1rem }
.results h2 .soft { font-weight: 400 }
.results h2 img { display: inline-block; height: 3rem; width: auto; vertical-align: middle;
  border-radius: 4px; margin: 0 .4rem }
.results a { color: inherit; text-decoration: underline; text-underline-offset: 3px;
  display: inline-block; padding: .25rem .3rem }
.results .note { margin: 0 0 1rem; padding: .6rem .9rem; border-left: 4px solid var(--objects);
  background: var(--panel); border-radius: 0 6px 6px 0; overflow-wrap: anywhere }
.results .hits { list-style: none; display: grid; gap: 2rem 1.25rem; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr)) }
.results .hit { display: flex; flex-direction: column; gap: .3rem }
.results .picture { position: relative; background: var(--panel); border-radius: 6px;
  overflow: hidden }
.results .picture img { display: block; width: 100%; height: auto; margin: 0 }
.results .picture svg { position: absolute; inset: 0; width: 100%; height: 100% }
.results polygon { fill: none; stroke: var(--main); stroke-width: 1.5;
  vector-effect: non-scaling-stroke }
.results .main { stroke-width: 2.5; filter: drop-shadow(0 0 1px #000) }
.results .other { stroke-dasharray: 4 3; opacity: .9; filter: drop-shadow(0 0 1px #000) }
.results .number { fill: #14171b; font-weight: 700; text-anchor: middle;
  dominant-baseline: central }
.results .badge { fill: var(--main) }
.no-boxes .results .picture svg { display: none }
.results .missing { padding: 2rem 1rem; background: var(--panel); border-radius: 6px;
  overflow-wrap: anywhere }
.results h3 { display: flex; gap: .5rem; font-size: 1rem; font-weight: 600; line-height: 1.4 }
.results h3 .path { flex: 1; min-width: 0; overflow-wrap: anywhere }
.results h3 .rank { color: var(--soft); font-weight: 400 }
.results .figure, .results .rank { font-variant-numeric: tabular-nums; white-space: nowrap }
.results .share { display: block; width: 100%; height: 8px; border-radius: 2px }
.results .share .whole { fill: var(--line) }
.results .share .pixels { fill: var(--pixels) }
.results .share .objects { fill: var(--objects) }
.results .share .lost { fill: none; stroke: var(--objects); stroke-width: 2;
  vector-effect: non-scaling-stroke }
.results .like { font: inherit; font-size: .9375rem; color: inherit; background: var(--panel);
  border: 1px solid var(--line); border-radius: 6px; padding: .4rem .75rem; cursor: pointer;
  align-self: start; min-height: 2.5rem }
.results .like:hover { border-color: var(--soft) }
.results .like:focus-visible, .results summary:focus-visible, .results a:focus-visible
  { outline: 3px solid var(--pixels); outline-offset: 2px }
.results .actions { display: flex; flex-wrap: wrap; gap: .25rem .75rem; align-items: start }
.results details { flex: 1 1 5rem }
.results details[open] { flex-basis: 100% }
.results summary { cursor: pointer; padding: .5rem .2rem; min-height: 2.5rem; width: fit-content }
.results dl, .results .why { display: grid; grid-template-columns: minmax(0, 1fr) max-content;
  gap: .15rem .75rem; margin: .2rem 0 .8rem; font-size: .9375rem }
.results dt, .results dd { margin: 0 }
.results .why-head { color: var(--soft); font-size: .875rem }
.results .swatch { display: inline-block; width: .7em; height: .7em; border-radius: 2px;
  margin-right: .4em }
.results .tag { display: inline-block; min-width: 1.4em; text-align: center; border-radius: 3px;
  background: var(--main); color: #14171b; font-weight: 700; font-size: .8125rem;
  margin-right: .4em }
"""

# ------------------------------------------------------------------ an answer


def results(searcher, answer, thumbnail):
    """An answer as HTML; thumbnail: of the image that was looked for, HTML or ""."""
    query = answer["query"]
    parts = []
    if query["text"]:
        parts.append(f"“{shown(query['text'])}”")
    if query["image"]:
        parts.append(f'<span class="soft">like</span> {thumbnail}{shown(query["image"])}')
    if query["not"]:
        parts.append(f'<span class="soft">not</span> “{shown(query["not"])}”')
    searched = answer["searched"]
    tiles = f"{searched:,} tile{'' if searched == 1 else 's'} searched"
    legend = ""
    if answer["hits"]:
        legend = f"; scores are {_swatch('pixels')} and {_swatch('objects')}"
    notes = "".join(f'<p class="note">{note}</p>' for note in _notes(answer))
    best = max([reach(hit) for hit in answer["hits"]], default=0)
    cards = "\n".join(_card(searcher, hit, best) for hit in answer["hits"])
    return (
        f'<section class="results"><div class="head"><div><h2 tabindex="-1">{" ".join(parts)}</h2>'
        f'<p class="soft" role="status">{tiles}{legend}</p></div>{_downloads(answer)}</div>{notes}'
        f'<ol class="hits">{cards}</ol></section>'
    )


def mistake(text):
    """HTML of a mistake."""
    return f'<section class="results"><p class="note" role="alert">{shown(text)}</p></section>'


def _notes(answer):
    """What a reader has to know before the hits, as HTML."""
    notes = []
    if answer["pixels_only"]:
        words = shown(", ".join(answer["pixels_only"]))
        notes.append(f"Matched by pixels only, no object has this name: <b>{words}</b>")
    if answer["searched"] == 0:
        notes.append("No tile passes the filter.")
    elif not answer["hits"]:
        notes.append("No other tile passes the filter.")
    elif not answer["fits"]:
        notes.append("Perhaps nothing fits: most other queries have a better best tile.")
    return notes


def _downloads(answer):
    """Links that hold the hits as files."""
    if not answer["hits"]:
        return ""
    links = [_link("hits.csv", "text/csv", "CSV", output.write_csv_rows, answer)]
    if any(hit["footprint"] for hit in answer["hits"]):
        name, kind = "hits.geojson", "application/geo+json"
        links.append(_link(name, kind, "GeoJSON", output.write_geojson, answer))
    else:
        links.append('<span class="soft small">no places, so no GeoJSON</span>')
    return f'<p class="downloads"><span class="soft">Download</span> {" ".join(links)}</p>'


def _link(name, kind, words, write, answer):
    """A link to what `write` writes of an answer."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        write(path, [answer])
        content = path.read_bytes()
    return f'<a download="{name}" href="{_data(kind, content)}">{words}</a>'


def _data(kind, content):
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


# ------------------------------------------------------------------ a hit


def _card(searcher, hit, best):
    """A hit: its picture, its score, what one can do with it."""
    path = shown(hit["path"])
    counts = ", ".join(f"{count} × {shown(label)}" for label, count in hit["counts"].items())
    return (
        f'<li><article class="hit" aria-label="{hit["rank"]}: {path}">{_picture(searcher, hit)}'
        f'<h3><span class="rank">{hit["rank"]}</span><span class="path">{path}</span>'
        f'<span class="figure">{written(hit["score"])}</span></h3>{bar(hit, best)}'
        f'<p class="soft small">{counts or "no objects"}</p><div class="actions">'
        f'<button type="button" class="like" data-tile="{escape(hit["id"])}">More like this'
        f"</button><details><summary>Why</summary>{_why(hit)}</details></div></article></li>"
    )


def _picture(searcher, hit):
    """The picture of a hit with its boxes, those that matter most drawn last and numbered."""
    window = tuple(hit["window"])
    try:
        image = searcher.picture(hit["path"], window)
    except ValueError as error:
        return f'<p class="missing small">No picture: {shown(error)}</p>'
    main = main_objects(hit)
    drawn = [_outline(found, "other") for found in hit["boxes"] if found not in main]
    drawn += [_outline(found, "main") for found in main]
    size = max(window[2:]) / 16  # of a number, in pixels of the window
    for number, found in enumerate(main, start=1):
        drawn.append(_badge(number, found["box"], window[2:], size))
    width, height = window[2:]
    words = f"tile {hit['rank']}"
    return (
        f'<div class="picture">{picture(image, SIDE, words)}'
        f'<svg viewBox="0 0 {width} {height}" aria-hidden="true">{"".join(drawn)}</svg></div>'
    )


def picture(image, side, words):
    """HTML of a PIL image, made smaller; words say what it is."""
    data = _data("image/jpeg", jpeg(image, side))
    width, height = image.size
    return f'<img src="{data}" alt="{shown(words)}" width="{width}" height="{height}">'


def _outline(found, kind):
    [corners] = corners_of([found["box"]])
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners.tolist())
    return f'<polygon class="{kind}" points="{points}"/>'


def _badge(number, box, tile_size, size):
    """A number at the upper end of a box, wholly in the tile."""
    [corners] = corners_of([box])
    x, y = min(corners.tolist(), key=lambda corner: corner[1])
    x = min(max(x, size / 2), tile_size[0] - size / 2)
    y = min(max(y, size / 2), tile_size[1] - size / 2)
    letters = 0.75 * size
    return (
        f'<circle class="badge" cx="{x:.1f}" cy="{y:.1f}" r="{size / 2:.1f}"/>'
        f'<text class="number" x="{x:.1f}" y="{y:.1f}" font-size="{letters:.1f}">{number}</text>'
    )


def _why(hit):
    """Where the score comes from, the objects that matter, what speaks for the sentence."""
    shares = []
    for name in ("pixels", "objects"):
        shares.append((_swatch(name), written(hit[name], "+")))
    parts = [_lines("The score is the sum of", shares)]
    main = main_objects(hit)
    lines = []
    for number, found in enumerate(main, start=1):
        words = f'<span class="tag">{number}</span>{shown(found["label"])}'
        lines.append((words, written(-found["matters"], "+")))
    if lines:
        parts.append(_lines("Without an object the score changes by", lines))
    statements = []
    for found in hit["statements"]:
        statements.append((shown(found["statement"]), written(found["evidence"], "+")))
    if statements:
        parts.append(_lines("What the objects say for and against it", statements))
    left, top, width, height = hit["window"]
    place = f"{width} × {height} pixels at {left}, {top}"
    if hit["lat"] is not None:
        place += f"<br>latitude {hit['lat']:.5f}, longitude {hit['lon']:.5f}"
    return f'{"".join(parts)}<p class="soft small">{place}</p>'


def _swatch(name):
    return f'<span class="swatch" style="background: var(--{name})"></span>{name}'


def _lines(head, lines):
    """A list of (HTML, figure) pairs under a line."""
    rows = "".join(f'<dt>{words}</dt><dd class="figure">{value}</dd>' for words, value in lines)
    return f'<p class="why-head">{head}</p><dl>{rows}</dl>'
