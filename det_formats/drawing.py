"""An image's objects and the strongest edges of their graph, drawn over the image.

And a sentence's graph, drawn by itself.
Rectangles are (left, top, right, bottom) in pixels of the picture; N is the number of objects.
"""

import math
import textwrap
from collections import Counter
from functools import cache

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from det_formats.geometry import corners_of
from escaping import escaped

EDGES_EACH = 2  # of an object that are drawn
FAINTEST = 0.05  # weight of an edge that is drawn
SIDE = 1000  # pixels of the picture's longer side, about

_PAD = 2  # pixels between a label's text and its border
_GREY = "#c8c8c8"  # of objects that the model does not see
_COLOURS = ["#e6194b", "#3cb44b", "#ffe119", "#4363d8", "#f58231", "#911eb4", "#42d4f4", "#f032e6"]


def draw_graph(image, graph, scale=None, seen=None):
    """Boxes, labels and edges of a `V_Graph.build_graph` over a PIL image; returns a new image.

    The picture is enlarged by `scale` (default: to about 1000 pixels) so that labels are readable.
    The edges are the `strongest_edges`; an edge is the more opaque the higher its weight. Where a
    label has no room, the number stands alone if it fits.

    seen: the objects that the model sees, as of `V_Graph.seen_objects`. The others are grey and
    thin, with their number alone and no edges, and lines below the picture count them. Without
    `seen` all objects are drawn alike, and the picture has the image's shape.
    """
    scale = scale or max(1, round(SIDE / max(image.size)))
    picture = image.resize((image.width * scale, image.height * scale), Image.BICUBIC)
    pen = ImageDraw.Draw(picture, "RGBA")
    nodes = graph.nodes
    shown = list(nodes) if seen is None else list(seen)
    unseen = sorted(set(nodes) - set(shown))
    drawn = shown + unseen
    corners = _outlines([nodes[i]["box"] for i in drawn], scale)
    outlines = dict(zip(drawn, corners, strict=True))
    kinds = sorted({nodes[i]["label"] for i in nodes})
    colours = {i: _COLOURS[kinds.index(nodes[i]["label"]) % len(_COLOURS)] for i in shown}
    texts = {i: f"{i} {escaped(nodes[i]['label'])}" for i in shown}

    for i in unseen:
        _line(pen, [*outlines[i], outlines[i][0]], _GREY, width=1)
        texts[i] = str(i)
    for i, j, weight in strongest_edges(graph.subgraph(shown)):
        ends = [tuple(scale * length for length in nodes[end]["box"][:2]) for end in (i, j)]
        _line(pen, ends, "#ffffff", width=2, opacity=int(80 + 175 * weight))
    for i in shown:
        _line(pen, [*outlines[i], outlines[i][0]], colours[i], width=2)

    left_out = _draw_labels(pen, picture.size, list(outlines.values()), list(texts.values()))
    if seen is None:
        return picture
    return _with_legend(picture, len(shown), len(unseen), left_out)


def strongest_edges(graph):
    """The edges that are drawn, (i, j, weight) each with i < j: of N objects at most 2 N.

    They are the two strongest of each object, if their weight is 0.05 or more.
    """
    kept = set()
    for i in graph:
        edges = [(-edge["weight"], j) for j, edge in graph[i].items() if edge["weight"] >= FAINTEST]
        for weight, j in sorted(edges)[:EDGES_EACH]:
            kept.add((min(i, j), max(i, j), -weight))
    return sorted(kept)


# ------------------------------------------------------------------ a sheet of images

CELL = 512  # pixels of a cell's side: an image of 256 is enlarged twice
COLUMNS = 4
ROOM = 8  # pixels between cells


def draw_sheet(cells):
    """A picture of many images with their boxes and labels, and a legend of all labels.

    cells: (name, PIL image, its detections) each. A label without room is left out.
    """
    counts = Counter()
    for _, _, detections in cells:
        counts.update(one["label"] for one in detections)
    colours = {label: _COLOURS[i % len(_COLOURS)] for i, label in enumerate(sorted(counts))}
    line = _text_size("x")[1]
    columns = min(COLUMNS, len(cells))
    rows = math.ceil(len(cells) / columns)
    width = columns * (CELL + ROOM) + ROOM
    legend = _legend(counts, colours, width)
    height = rows * (CELL + line + ROOM) + ROOM + legend.height
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    for k, (name, image, detections) in enumerate(cells):
        left = ROOM + k % columns * (CELL + ROOM)
        top = ROOM + k // columns * (CELL + line + ROOM)
        sheet.paste(_with_boxes(image, detections, colours), (left, top + line))
        words = f"{escaped(name)}: {len(detections)}"
        if _text_size(words)[0] > CELL:
            words = f"...{words[-60:]}"
        pen.text((left, top + _PAD), words, fill="black", font=_font())
    sheet.paste(legend, (0, height - legend.height))
    return sheet


def _with_boxes(image, detections, colours):
    """An image fit into a cell, with boxes and labels."""
    scale = CELL / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    picture = image.resize(size, Image.BICUBIC)
    pen = ImageDraw.Draw(picture, "RGBA")
    outlines = _outlines([one["bbox"] for one in detections], scale)
    for outline, one in zip(outlines, detections, strict=True):
        _line(pen, [*outline, outline[0]], colours[one["label"]], width=2)
    texts = [escaped(one["label"]) for one in detections]
    boxes = [_rectangle_around(outline) for outline in outlines]
    places = place_labels(boxes, [_text_size(text) for text in texts], size)
    _write_labels(pen, places, texts)
    return picture


def _legend(counts, colours, width):
    """All labels with their colour and their number, as wide as the sheet."""
    line = _text_size("x")[1]
    places = []  # (label, left, top) of each
    left, top = ROOM, 0
    for label in colours:
        needed = 2 * line + _text_size(f"{escaped(label)}: {counts[label]}")[0]
        if left + needed > width and left > ROOM:
            left, top = ROOM, top + line
        places.append((label, left, top))
        left += needed
    legend = Image.new("RGB", (width, top + line + ROOM), "white")
    pen = ImageDraw.Draw(legend)
    for label, left, top in places:
        pen.rectangle((left, top + 3, left + line - 6, top + line - 3), fill=colours[label])
        words = f"{escaped(label)}: {counts[label]}"
        pen.text((left + line, top + _PAD), words, fill="black", font=_font())
    return legend


# ------------------------------------------------------------------ labels


def place_labels(boxes, labels, size, taken=()):
    """A rectangle for each label in a picture of (width, height), None where no place is free.

    boxes: N rectangles around the objects; labels: (width, height) of their labels; taken:
    rectangles that are labels already. In turn, each label tries the places around the visible
    part of its box: above and below it, flush with its left, at its middle, flush with its right;
    then beside it; then in its middle, if it fits in. It takes the first inside the picture that
    meets no other label and no other box, else the first that meets no other label.
    """
    boxes = np.reshape(boxes, (-1, 4))
    taken = np.reshape(taken, (-1, 4))
    found = []
    for i, (box, label) in enumerate(zip(boxes, labels, strict=True)):
        others = np.delete(boxes, i, axis=0)
        free = [place for place in _places(box, label, size) if not _meets(place, taken)]
        apart = [place for place in free if not _meets(place, others)]
        best = (apart + free + [None])[0]
        if best is not None:
            taken = np.vstack([taken, best])
        found.append(best)
    return found


def _places(box, label, size):
    """The rectangles inside the picture where a label may stand, in order of preference."""
    width, height = label
    left, right = np.clip(box[[0, 2]], 0, size[0]).tolist()
    top, bottom = np.clip(box[[1, 3]], 0, size[1]).tolist()
    if left == right or top == bottom:  # nothing of the box is visible
        return []
    middle_x, middle_y = (left + right - width) / 2, (top + bottom - height) / 2
    columns = (left, middle_x, right - width)
    starts = [(x, y) for y in (top - height, bottom) for x in columns]
    starts += [(right, middle_y), (left - width, middle_y)]
    if width <= right - left and height <= bottom - top:
        starts.append((middle_x, middle_y))
    return [
        (x, y, x + width, y + height)
        for x, y in starts
        if x >= 0 and y >= 0 and x + width <= size[0] and y + height <= size[1]
    ]


def _meets(rectangle, others):
    """Whether a rectangle shares an area with any of others, (n, 4)."""
    left, top, right, bottom = rectangle
    beside = (others[:, 2] <= left) | (others[:, 0] >= right)
    above_or_below = (others[:, 3] <= top) | (others[:, 1] >= bottom)
    return not (beside | above_or_below).all()


def _draw_labels(pen, size, outlines, texts):
    """Draw the objects' texts in a picture, in order; returns how many have no room.

    A text starts with the object's number, which stands alone where the text has no room.
    """
    boxes = [_rectangle_around(corners) for corners in outlines]
    places = place_labels(boxes, [_text_size(text) for text in texts], size)
    left_out = [k for k, place in enumerate(places) if place is None]
    numbers = [texts[k].split()[0] for k in left_out]
    taken = [place for place in places if place is not None]
    boxes_left = [boxes[k] for k in left_out]
    numbers_places = place_labels(boxes_left, [_text_size(text) for text in numbers], size, taken)
    for k, number, place in zip(left_out, numbers, numbers_places, strict=True):
        texts[k], places[k] = number, place
    _write_labels(pen, places, texts)
    return len(left_out)


def _write_labels(pen, places, texts):
    """Write each text into its rectangle, if it has one."""
    for place, text in zip(places, texts, strict=True):
        if place is not None:
            left, top, right, bottom = place
            pen.rectangle((left, top, right - 1, bottom - 1), fill=(0, 0, 0, 150))
            pen.text((left + _PAD, top + _PAD), text, fill="white", font=_font())


@cache
def _font():
    return ImageFont.load_default(13)


def _text_size(text):
    """(width, height) of a label in pixels; all labels are of one height."""
    font = _font()
    ascent, descent = font.getmetrics()
    return math.ceil(font.getlength(text)) + 2 * _PAD, ascent + descent + 2 * _PAD


# ------------------------------------------------------------------ outlines, legend


def _outlines(boxes, scale):
    """The four corners (x, y) of each rotated box, enlarged, in the order of its outline."""
    corners = scale * corners_of(np.reshape(boxes, (-1, 6)))  # (n, 4, 2)
    return [[tuple(corner) for corner in outline] for outline in corners.tolist()]


def _line(pen, points, colour, width, opacity=255):
    """A line with a faint dark rim, to be seen on any ground. opacity: 0 to 255."""
    pen.line(points, fill=(0, 0, 0, opacity // 3), width=width + 2, joint="curve")
    pen.line(points, fill=(*ImageColor.getrgb(colour), opacity), width=width, joint="curve")


def _rectangle_around(corners):
    x, y = zip(*corners, strict=True)
    return min(x), min(y), max(x), max(y)


def _with_legend(picture, seen, unseen, left_out):
    """The picture with lines below it that tell what is drawn; as wide as they are, at least."""
    lines = [f"{seen} of {seen + unseen} objects fit into the graph"]
    if unseen:
        lines[0] += f"; {unseen} do not (grey, number alone, no edges)"
    lines.append(
        f"lines: the {EDGES_EACH} strongest edges of each of these, of weight {FAINTEST} or more"
    )
    if left_out:
        lines.append(f"labels without room: {left_out} (number alone, or nothing)")
    sizes = [_text_size(line) for line in lines]
    width = max(picture.width, *(width for width, _ in sizes))
    height = sum(height for _, height in sizes)
    whole = Image.new("RGB", (width, picture.height + height), "black")
    whole.paste(picture)
    pen = ImageDraw.Draw(whole)
    y = picture.height
    for line, (_, height) in zip(lines, sizes, strict=True):
        pen.text((_PAD, y + _PAD), line, fill="white", font=_font())
        y += height
    return whole


# ------------------------------------------------------------------ sentences


def draw_text_graph(graph, label_map):
    """The nodes and edges of a `T_Graph.build_text_graph` as a new image, with its sentence.

    Nodes stand on an ellipse, the first one at the left. The words of an edge stand nearer to the
    node that it starts from.
    """
    lines = textwrap.wrap(escaped(graph.graph["sentence"])[:600], 70) or [""]
    if graph.graph["unknown"]:
        unknown = escaped(", ".join(graph.graph["unknown"]))[:600]
        lines += textwrap.wrap(f"in no label: {unknown}", 70)
    texts = {i: _node_lines(i, node, label_map) for i, node in graph.nodes(data=True)}
    sizes = [_text_size(line) for line in lines]
    for text in texts.values():
        sizes += [_text_size(line) for line in text]
    line_height = sizes[0][1]
    top = line_height * len(lines)
    # Wide enough for two nodes side by side with an edge between, and a line of text.
    width = max([SIDE // 2 + 20, *(2 * text_width + 150 for text_width, _ in sizes[len(lines) :])])
    width = max(width, *(text_width for text_width, _ in sizes[: len(lines)]))
    height = max(140, 75 * len(graph)) if len(graph) > 2 else 140
    picture = Image.new("RGB", (width, top + height), "white")
    pen = ImageDraw.Draw(picture)
    for k, line in enumerate(lines):
        pen.text((_PAD, k * line_height + _PAD), line, fill="black", font=_font())

    boxes = {}
    for k, (i, text) in enumerate(texts.items()):
        text_width = max(_text_size(line)[0] for line in text) + 2 * _PAD
        reach = (width - text_width) / 2 - 8 if len(texts) > 1 else 0
        bearing = math.pi * (1 + 2 * k / len(texts))
        x = width / 2 + reach * math.cos(bearing)
        y = top + height / 2 + (height / 2 - 2 * line_height) * math.sin(bearing)
        half = text_width / 2, len(text) * line_height / 2
        boxes[i] = (x - half[0], y - half[1], x + half[0], y + half[1])
    for i, j, relation in graph.edges(data="relation"):
        _arrow(pen, boxes[i], boxes[j], relation)
    for i, (left, y, right, bottom) in boxes.items():
        colour = _COLOURS[graph.nodes[i]["kinds"][0] % len(_COLOURS)]
        pen.rectangle((left, y, right, bottom), fill="white", outline=colour, width=2)
        for k, line in enumerate(texts[i]):
            place = (left + 2 * _PAD, y + k * line_height + _PAD)
            pen.text(place, line, fill="black", font=_font())
    return picture


def _node_lines(i, node, label_map):
    """A node as lines of text: its words, its kinds, its count, what else is said of it."""
    count = "" if node["count"] is None else f"{node['count']} "
    said = list(node["attributes"]) + ([node["place"]] if node["place"] else [])
    lines = [f"{i} {escaped(node['words'])}", escaped(" or ".join(label_map.names(node["kinds"])))]
    lines.append(f"{count}{node['count_form'].replace('_', ' ')}")
    if said:
        lines.append(escaped(", ".join(said)))
    return [line if len(line) < 40 else f"{line[:37]}..." for line in lines]


def _arrow(pen, box, other, words):
    """An arrow from one rectangle to another, with words on it."""
    (x0, y0), (x1, y1) = _towards(box, other), _towards(other, box)
    pen.line((x0, y0, x1, y1), fill="black", width=2)
    bearing = math.atan2(y1 - y0, x1 - x0)
    for side in (-0.4, 0.4):
        barb = (x1 - 11 * math.cos(bearing + side), y1 - 11 * math.sin(bearing + side))
        pen.line((x1, y1, *barb), fill="black", width=2)
    width, height = _text_size(words)
    left, top = 0.6 * x0 + 0.4 * x1 - width / 2, 0.6 * y0 + 0.4 * y1 - height / 2
    pen.rectangle((left, top, left + width, top + height), fill="white")
    pen.text((left + _PAD, top + _PAD), words, fill="black", font=_font())


def _towards(box, other):
    """The point where the line between the middles of two rectangles leaves the first."""
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    step_x, step_y = (other[0] + other[2]) / 2 - x, (other[1] + other[3]) / 2 - y
    reach = [
        abs(half / step) for half, step in ((box[2] - x, step_x), (box[3] - y, step_y)) if step
    ]
    fraction = min(reach, default=0)
    return x + fraction * step_x, y + fraction * step_y
