"""The page of a search: queries, their hits, why they are hits, and where they lie.

    def picture(path, window):
        left, top, width, height = window
        return Image.open(folder / path).crop((left, top, left + width, top + height))

    write_report("report.html", answers, picture)

An answer is what `search.py query --json` writes, made of plain dicts and lists. A window is (left,
top, width, height) in pixels of an image file; boxes are (cx, cy, w, h, angle) in pixels of the
window and radians.
"""

from functools import cache

from gallery.footprint_map import MAP_STYLE, footprint_map
from metrics.page import Mark, contents, document, jpeg, picture, sentence, shown
from writing import write_text

SIDE = 320  # pixels of the longer side of a hit's picture in the file
WIDE = 360  # and on the page, at most
MOST = 3  # objects of a hit that are emphasised

_STYLE = (
    """
.query > h2 { margin: 3rem 0 .5rem; padding-top: 1.25rem; border-top: 1px solid var(--line) }
.query > h2 .soft { font-weight: normal }
.asked { display: flex; flex-wrap: wrap; gap: 1rem 2rem; justify-content: space-between;
  align-items: flex-start; margin-bottom: 1.5rem }
.asked > div { flex: 1 1 20rem }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .1rem 1rem; margin: 0 }
dt { color: var(--soft) }
dd { margin: 0 }
.note { margin-top: .75rem; padding: .5rem .75rem; border-left: 4px solid var(--objects);
  background: var(--panel); border-radius: 0 6px 6px 0 }
.hits { list-style: none; padding: 0; display: grid; gap: 2rem 1.5rem; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)) }
.hit { max-width: 360px }
.why { margin-top: .5rem }
.hit h3 { margin-top: .6rem; display: flex; gap: .5rem }
.hit .rank { color: var(--soft); font-weight: normal }
.score { display: flex; justify-content: space-between; gap: .5rem; align-items: baseline }
.share { display: block; width: 100%; height: 8px; margin: .15rem 0 .4rem }
.share .whole { fill: var(--line) } .share .pixels, .key-pixels { --colour: var(--pixels) }
.share .objects, .key-objects { --colour: var(--objects) }
.share .pixels, .share .objects { fill: var(--colour) }
.share .lost { fill: var(--ground); stroke: var(--objects) }
.evidence { list-style: none; padding: 0; margin: .15rem 0 .4rem }
.evidence li { display: grid; grid-template-columns: 1.5rem minmax(0, 1fr) max-content; gap: .4rem }
.tag { padding: 0 5px; outline: 1px solid var(--line); justify-self: start; border-radius: 3px;
  background: #14171b; color: #fff; font-size: 12px; line-height: 17px; align-self: center }
.hit summary { color: var(--link) }
.missing { padding: 2rem 1rem; background: var(--panel); border-radius: 4px }
"""
    + MAP_STYLE
)

# The footprint of the hit that has the focus, or that the mouse is over.
_SCRIPT = """
for (const kind of ["focusin", "pointerover"]) addEventListener(kind, (event) => {
  const hit = event.target.closest?.(".hit");
  if (!hit) return;
  for (const other of document.querySelectorAll(".marked")) other.classList.remove("marked");
  document.getElementById("map-" + hit.id)?.classList.add("marked");
});
"""


def report(answers, draw):
    """Answers to queries as one HTML file that needs no other.

    draw: gives the bytes of a JPEG file of (path, window), or raises ValueError, whose words stand
    in the picture's place.
    """
    heads, sections = [], []
    for number, answer in enumerate(answers, start=1):
        identifier = f"query-{number}"
        heads.append((identifier, _head(answer["query"]), ()))
        sections.append(_section(answer, identifier, draw))
    title = "Search report"
    if len(answers) == 1:
        title = " ".join((answers[0]["query"]["text"] or title).split())
    hits = sum(len(answer["hits"]) for answer in answers)
    legend = (
        '<span class="swatch key-pixels"></span>pixels &ensp;'
        '<span class="swatch key-objects"></span>objects'
    )
    body = "\n".join(sections)
    main = (
        f"<h1>Search report</h1><p>{_number_of(len(answers), 'query', 'queries')}, "
        f"{_number_of(hits, 'hit', 'hits')}.</p>"
        f'<p class="soft">A score is the sum of what the pixels and the objects say: {legend}. '
        "Yellow boxes matter most, dashed ones less.</p>"
        f"{contents(heads)}\n{body}"
    )
    return document(title, main, stop="hit", style=_STYLE, script=_SCRIPT)


def write_report(path, answers, picture):
    """Write `report`; picture: gives the PIL image of (path, window), a tile."""

    @cache  # a tile may be a hit of many queries
    def draw(name, window):
        return jpeg(picture(name, window), SIDE)

    write_text(path, report(answers, draw))


# ------------------------------------------------------------------ queries


def _number_of(number, one, many):
    return f"{number:,} {one if number == 1 else many}"


def _head(query):
    """What was asked, as markup: a sentence, an image, or both."""
    parts = []
    if query["text"]:
        parts.append(sentence(query["text"]))
    if query["image"]:
        parts.append(f'<span class="soft">like</span> {shown(query["image"])}')
    return " ".join(parts) or "a vector"


def _section(answer, identifier, draw):
    """A query and its hits."""
    hits = answer["hits"]
    notes = "".join(f'<p class="note">{note}</p>' for note in _notes(answer))
    best = max([reach(hit) for hit in hits], default=0)
    items = []
    for hit in hits:
        card = _hit(hit, f"{identifier}-hit-{hit['rank']}", best, draw)
        items.append(f"<li>{card}</li>")
    cards = "\n".join(items)
    return (
        f'<section class="query" id="{identifier}"><h2>{_head(answer["query"])}</h2>'
        f'<div class="asked"><div><dl>{_facts(answer)}</dl>{notes}</div>'
        f'{footprint_map(hits, identifier)}</div>\n<ol class="hits">{cards}</ol></section>'
    )


def _facts(answer):
    """What was searched and by which filters, as rows of a list."""
    searched = _number_of(answer["searched"], "tile", "tiles")
    if answer["searched"] > 0:
        searched += ", all compared" if answer["exact"] else ", by the approximate index"
    rows = [("searched", searched)]
    for name, value in answer["query"].items():
        if name not in ("text", "image") and value not in (None, [], ""):
            words = " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            rows.append((shown(name.replace("_", " ")), sentence(words)))
    return "".join(f"<dt>{name}</dt><dd>{words}</dd>" for name, words in rows)


def _notes(answer):
    """What a reader has to know before the hits."""
    notes = []
    if answer["pixels_only"]:
        notes.append(f"matched by pixels only: {sentence(', '.join(answer['pixels_only']))}")
    if answer["searched"] == 0:
        notes.append("No tile passes the filters.")
    elif not answer["fits"]:
        notes.append("Perhaps nothing fits: most other queries have a better best tile.")
    return notes


# ------------------------------------------------------------------ hits


def written(value, sign=""):
    """A number as people write it; sign: "+" for one that positive numbers have too."""
    return f"{value:{sign}.3f}".replace("-", "−")


def main_objects(hit):
    """The objects that are emphasised: those that the score loses most without, if any."""
    mattering = [found for found in hit["boxes"] if found["matters"] > 0]
    return sorted(mattering, key=lambda found: -found["matters"])[:MOST]


def _hit(hit, identifier, best, draw):
    """A hit with its picture, its score, its objects and what speaks for it."""
    left, top, width, height = hit["window"]
    counts = ", ".join(f"{number} × {shown(name)}" for name, number in hit["counts"].items())
    place = f"{width} × {height} pixels at {left}, {top}"
    if hit["lat"] is not None and hit["lon"] is not None:
        place = f"{_degrees(hit['lat'], 'N', 'S')} {_degrees(hit['lon'], 'E', 'W')}<br>{place}"
    return (
        f'<article class="hit stop" id="{identifier}" tabindex="0"'
        f' aria-labelledby="{identifier}-head">{_picture(hit, draw)}'
        f'<h3 id="{identifier}-head"><span class="rank number">{hit["rank"]}</span>'
        f"<span>{shown(hit['path'])}</span></h3>{_score(hit, best)}"
        f'<p class="small">{counts or "no objects"}</p><p class="small soft">{place}</p>'
        f"{_objects(hit)}{_statements(hit)}</article>"
    )


def _degrees(value, positive, negative):
    return f"{abs(value):.4f}° {positive if value >= 0 else negative}"


def _picture(hit, draw):
    """The hit's picture with its boxes, those that matter most numbered and drawn last."""
    window = tuple(hit["window"])
    try:
        content = draw(hit["path"], window)
    except ValueError as error:
        return f'<p class="missing small">No picture: {shown(error)}</p>'
    first = main_objects(hit)
    marks = []
    for found in hit["boxes"]:
        if not any(found is one for one in first):
            marks.append(Mark(found["box"], found["label"], "other"))
    for number, found in enumerate(first, start=1):
        marks.append(Mark(found["box"], f"{number} {found['label']}", "main", str(number)))
    return picture(content, window[2:], f"hit {hit['rank']}: {hit['path']}", WIDE, marks)


def reach(hit):
    """How far a hit's bar reaches to the right: the score, or its pixels where objects lower it."""
    return max(hit["score"], hit["pixels"], 0)


def _score(hit, best):
    """The score with its shares in figures and as a bar, the best hit's bar being the longest."""
    objects = written(hit["objects"], "+").replace("+", "+ ").replace("−", "− ")
    return (
        f'<p class="score number"><b>{written(hit["score"])}</b>'
        f'<span class="small soft">{written(hit["pixels"])} pixels {objects} objects</span></p>'
        f"{bar(hit, best)}"
    )


def bar(hit, best):
    """Pixels, then what objects add; what they take away is hollow."""
    unit = 100 / best if best > 0 else 0
    pixels, score = max(hit["pixels"], 0) * unit, max(hit["score"], 0) * unit
    parts = ['<rect class="whole" width="100" height="8"/>']
    parts.append(f'<rect class="pixels" width="{min(pixels, score):.1f}" height="8"/>')
    kind = "objects" if score >= pixels else "lost"
    start, width = min(pixels, score), abs(score - pixels)
    parts.append(f'<rect class="{kind}" x="{start:.1f}" width="{width:.1f}" height="8"/>')
    return (
        '<svg class="share" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">'
        f"{''.join(parts)}</svg>"
    )


def _objects(hit):
    """The objects that matter most, numbered as on the picture."""
    lines = [
        f'<li><span class="tag number">{number}</span>{shown(found["label"])}'
        f'<span class="number">{written(-found["matters"], "+")}</span></li>'
        for number, found in enumerate(main_objects(hit), start=1)
    ]
    if not lines:
        return ""
    return (
        '<p class="why small soft">Without an object the score changes by</p>'
        f'<ol class="evidence small">{"".join(lines)}</ol>'
    )


def _statements(hit):
    """What the sentence states, for and against the hit, folded up."""
    groups = {"For": [], "Against": [], "Neither": []}
    for found in hit["statements"]:
        evidence = found["evidence"]
        side = "Neither"
        if evidence != 0:
            side = "For" if evidence > 0 else "Against"
        groups[side].append(
            f"<li><span></span>{sentence(found['statement'])}"
            f'<span class="number">{written(evidence, "+")}</span></li>'
        )
    parts = []
    for side, lines in groups.items():
        if lines:
            parts.append(
                f'<p class="small soft">{side}</p><ul class="evidence small">{"".join(lines)}</ul>'
            )
    if not parts:
        return ""
    return f'<details class="small"><summary>For and against</summary>{"".join(parts)}</details>'
