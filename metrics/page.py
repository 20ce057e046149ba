"""What this project's HTML pages share: frame, style, list of contents, pictures with boxes.

A page is one file that needs no other and no network; its policy forbids every request. All of it
shows without script, and the boxes can be switched. Only keys need the script, a few lines.

Names and sentences come from files of others: on their way into a page they pass `shown` or
`sentence`. What is called `markup` here is HTML already.
"""

import base64
import hashlib
import html
import io
from typing import NamedTuple

from det_formats.drawing import place_labels
from det_formats.geometry import corners_of
from escaping import escaped

QUALITY = 80  # of JPEG files
COLOURS = 8  # of kinds: the classes c0 to c7
CHARACTER = 7  # pixels of a label's width, about
LINE = 17  # and of its height

_STYLE = """
:root { color-scheme: light dark; --ground: #fff; --text: #1c2127; --soft: #59636e;
  --line: #d5dae0; --panel: #f5f6f8; --link: #0b57a8; --good: #17693a; --bad: #a8281e;
  --pixels: #4a7fb5; --objects: #c27d0e }
@media (prefers-color-scheme: dark) {
  :root { --ground: #14171b; --text: #e3e7eb; --soft: #a3adb8; --line: #363d45; --panel: #1d2126;
    --link: #82b7f2; --good: #74c794; --bad: #f2938a; --pixels: #5f97cf; --objects: #dc9a30 } }
* { box-sizing: border-box }
html { scroll-padding: 4rem 0 1rem; background: var(--ground); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; -webkit-text-size-adjust: 100% }
body { margin: 0; overflow-wrap: anywhere }
main { max-width: 78rem; margin: 0 auto; padding: 0 1rem 5rem }
h1, h2, h3, p, ol, ul, pre { margin: 0 }
h1 { font-size: 1.75rem; line-height: 1.25; margin: 1.75rem 0 .5rem }
h2 { font-size: 1.3rem; line-height: 1.3 }
h3 { font-size: 1rem; line-height: 1.4 }
a { color: var(--link) }
pre { overflow-x: auto; padding: .75rem 1rem; background: var(--panel); border-radius: 6px;
  font: 13px/1.5 ui-monospace, monospace; overflow-wrap: normal }
summary { cursor: pointer }
:focus-visible, .stop:focus { outline: 3px solid var(--link); outline-offset: 3px }
.stop:focus { outline-offset: 9px; border-radius: 1px }
.soft { color: var(--soft) }
.small { font-size: .875rem }
.number { font-variant-numeric: tabular-nums }
.bar { position: sticky; top: 0; z-index: 2; background: var(--ground);
  border-bottom: 1px solid var(--line) }
.bar > div { max-width: 78rem; margin: 0 auto; padding: .5rem 1rem; display: flex; gap: 1.5rem;
  align-items: center; position: relative }
.bar label { cursor: pointer }
.bar input { width: 1.05rem; height: 1.05rem; margin: 0 .4rem 0 0; vertical-align: -.15rem }
#keys { margin-left: auto }
#keys div { position: absolute; right: 1rem; top: 100%; padding: .75rem 1rem;
  background: var(--panel); border: 1px solid var(--line); border-radius: 6px }
kbd { font: 13px/1.4 ui-monospace, monospace; padding: 0 .35rem; border: 1px solid var(--line);
  border-radius: 4px; background: var(--ground) }
.contents { margin: 1.5rem 0; padding: .75rem 1rem; background: var(--panel); border-radius: 6px }
.contents h2 { font-size: 1rem }
.contents > ol { padding-left: 1.5rem }
.contents details ol { columns: 24rem; column-gap: 2.5rem; padding-left: 2rem }
.contents li { padding: .1rem 0; break-inside: avoid }
figure { margin: 0; min-width: 0 }
figcaption { margin-top: .35rem }
.picture { position: relative; overflow: hidden; border-radius: 4px; background: var(--panel);
  max-width: 100% }
.picture img { display: block; width: 100%; height: auto }
.picture svg { position: absolute; inset: 0; width: 100%; height: 100%;
  filter: drop-shadow(0 0 1px #000) }
.picture polygon { fill: transparent; stroke: var(--colour); stroke-width: 2;
  vector-effect: non-scaling-stroke }
.picture line { stroke: #fff; stroke-width: 1.5; vector-effect: non-scaling-stroke }
.picture .other { stroke-width: 1.25; stroke-dasharray: 4 3 }
.picture .main { stroke-width: 3 }
.label { position: absolute; padding: 0 4px; border-radius: 3px; background: #14171b; color: #fff;
  font-size: 12px; line-height: 17px; white-space: nowrap; pointer-events: none }
.swatch { display: inline-block; width: .7rem; height: .7rem; margin-right: .3rem;
  border-radius: 2px; background: var(--colour); outline: 1px solid var(--soft) }
.main { --colour: #ffd23f } .other { --colour: #fff }
.c0 { --colour: #ff5964 } .c1 { --colour: #ffd23f } .c2 { --colour: #3ddc84 }
.c3 { --colour: #4cc9f0 } .c4 { --colour: #ff9f43 } .c5 { --colour: #c792ff }
.c6 { --colour: #ff9bd2 } .c7 { --colour: #c6ee5f }
body:has(#boxes:not(:checked)) .marks { display: none }
@media print { .bar { display: none } }
"""

_SCRIPT = """
const stops = [...document.querySelectorAll(".stop")];
const bar = document.querySelector(".bar");
const boxes = document.getElementById("boxes");
const keys = document.getElementById("keys");
function move(step) {
  const here = stops.indexOf(document.activeElement.closest(".stop"));
  const inView = (stop) => stop.getBoundingClientRect().bottom > bar.offsetHeight;
  const next = here < 0 ? stops.findIndex(inView) : here + step;
  const stop = stops[Math.max(0, Math.min(next, stops.length - 1))];
  if (!stop) return;
  stop.focus({ preventScroll: true });
  const place = stop.getBoundingClientRect();
  if (place.top < bar.offsetHeight || place.bottom > innerHeight) stop.scrollIntoView();
}
const actions = {
  b: () => boxes.click(),
  "?": () => { keys.open = !keys.open; },
  Escape: () => { keys.open = false; },
  j: () => move(1), ArrowRight: () => move(1),
  k: () => move(-1), ArrowLeft: () => move(-1),
};
addEventListener("keydown", (event) => {
  const scrolls = event.target.closest?.("pre") && event.key.startsWith("Arrow");
  if (event.ctrlKey || event.altKey || event.metaKey || scrolls) return;
  if (!Object.hasOwn(actions, event.key)) return;
  event.preventDefault();
  actions[event.key]();
});
"""

_BAR = """<header class="bar"><div><a href="#contents">Contents</a>
<label><input type="checkbox" id="boxes" checked autocomplete="off">Boxes</label>
<details id="keys"><summary>Keys</summary><div>
<p><kbd>j</kbd> or <kbd>→</kbd> next {stop}</p>
<p><kbd>k</kbd> or <kbd>←</kbd> the one before</p>
<p><kbd>b</kbd> boxes on and off</p>
<p><kbd>?</kbd> these lines</p></div></details></div></header>"""


# ------------------------------------------------------------------ text


def shown(name):
    """A name as markup: nothing in it is HTML, and what does not print is escaped as `\\n`."""
    return html.escape(escaped(name))


def sentence(words):
    """A sentence as markup: as `shown`, but white space of any kind is one space."""
    return shown(" ".join(words.split()))


# ------------------------------------------------------------------ the frame


def document(title, main, stop, style="", script=""):
    """A whole page as a string.

    title: a name; main: markup, in which elements of the class `stop` are what the keys go to,
    and that has `contents`; stop: what one of them is called, as "hit"; style and script: what
    the page adds to those that all pages share.
    """
    script = _SCRIPT + script
    # Only this script runs, whatever else should get into the page.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        '<link rel="icon" href="data:,">\n'  # or a browser asks the server for one
        f"<title>{shown(title)}</title><style>{_STYLE}{style}</style></head>\n"
        f"<body>{_BAR.format(stop=stop)}\n<main>\n{main}\n</main>\n"
        f"<script>{script}</script></body></html>\n"
    )


def contents(groups):
    """The list of contents as markup.

    groups: (identifier, markup, entries) each, entries: a list of (identifier, markup), folded up.
    Identifiers are those of elements of the page.
    """
    lines = []
    for identifier, words, entries in groups:
        line = _link(identifier, words)
        if entries:
            links = [f"<li>{_link(*entry)}</li>" for entry in entries]
            line = f"<details><summary>{line}</summary><ol>{''.join(links)}</ol></details>"
        lines.append(f"<li>{line}</li>")
    return (
        '<nav class="contents" id="contents" aria-label="Contents"><h2>Contents</h2>'
        f"<ol>{''.join(lines)}</ol></nav>"
    )


def _link(identifier, words):
    return f'<a href="#{identifier}">{words}</a>'


# ------------------------------------------------------------------ pictures


class Mark(NamedTuple):
    """An object on a picture."""

    box: tuple  # (cx, cy, w, h, angle) and what may follow; pixels of the image, radians
    name: str  # seen when the mouse is over it
    kind: str  # class of the style: "main", "other", or "c0" to "c7"
    label: str = ""  # written beside it; left out where it has no room


def jpeg(image, side):
    """A PIL image as the bytes of a JPEG file, its longer side of at most `side` pixels."""
    small = image.convert("RGB")
    small.thumbnail((side, side))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def picture(content, size, alt, side, marks=(), lines=()):
    """A picture with marks over it, as markup.

    content: bytes of a JPEG file of any size; size: (width, height) of the image in the pixels
    that marks and lines are in; alt: its name; side: pixels of the longer side on the page, less on
    a narrow screen. lines: (x, y, x, y, opacity) each.
    """
    width, height = size
    scale = side / max(size)
    data = base64.b64encode(content).decode()
    return (
        f'<div class="picture" style="width: {width * scale:.0f}px">'
        f'<img alt="{shown(alt)}" width="{width}" height="{height}"'
        f' src="data:image/jpeg;base64,{data}">'
        f"{_overlay(size, marks, lines, scale) if marks else ''}</div>"
    )


def _overlay(size, marks, lines, scale):
    """Marks and lines as SVG in the image's pixels, and labels in the page's."""
    width, height = size
    outlines = corners_of([mark.box[:5] for mark in marks])  # (n, 4, 2)
    shapes = []
    for x0, y0, x1, y1, opacity in lines:
        shapes.append(
            f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}"'
            f' opacity="{opacity:.2f}"/>'
        )
    for mark, outline in zip(marks, outlines, strict=True):
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in outline)
        shapes.append(
            f'<polygon class="{mark.kind}" points="{points}"><title>{shown(mark.name)}</title>'
            "</polygon>"
        )
    labels = "".join(_labels(size, marks, outlines, scale))
    return (
        f'<div class="marks" aria-hidden="true"><svg viewBox="0 0 {width} {height}"'
        f' preserveAspectRatio="none">{"".join(shapes)}</svg>{labels}</div>'
    )


def _labels(size, marks, outlines, scale):
    """Labels as markup, placed for a picture of full width."""
    width, height = (length * scale for length in size)
    rectangles, sizes, texts = [], [], []
    for mark, outline in zip(marks, outlines, strict=True):
        if mark.label:
            corners = outline * scale
            rectangles.append([*corners.min(axis=0), *corners.max(axis=0)])
            sizes.append((CHARACTER * len(mark.label) + 8, LINE))
            texts.append(mark.label)
    for place, text in zip(place_labels(rectangles, sizes, (width, height)), texts, strict=True):
        if place is not None:
            left, top = 100 * place[0] / width, 100 * place[1] / height
            style = f"left: {left:.1f}%; top: {top:.1f}%"
            yield f'<span class="label" style="{style}">{shown(text)}</span>'
