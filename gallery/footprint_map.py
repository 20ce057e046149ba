"""A small map of hits, drawn without any map service: footprints, degrees and a scale bar.

Footprints are corners (longitude, latitude) in degrees of WGS84. East to west is shortened by the
cosine of the middle latitude, so that shapes look right where the map is small.
"""

import math

from det_formats.drawing import place_labels
from metrics.page import CHARACTER, LINE, shown

WIDTH = 340  # pixels of the map, which fits on a phone
HEIGHTS = (140, 240)  # the least and the most
LEFT, BOTTOM, EDGE = 62, 44, 8  # pixels around the frame
KILOMETRES = 111.32  # of a degree of latitude
SMALL = 6  # pixels: a smaller footprint is a dot

MAP_STYLE = """
.map { flex: none; width: 340px; max-width: 100%; height: auto; background: var(--panel);
  border-radius: 6px }
.map text { font-size: 11.5px; fill: var(--soft) }
.map .frame { fill: var(--ground); stroke: var(--line) }
.map .grid { stroke: var(--line) } .map .scale { stroke: var(--soft); stroke-width: 2 }
.map polygon, .map circle { fill: var(--pixels); fill-opacity: .3; stroke: var(--pixels);
  stroke-width: 1.5 }
.map circle { fill-opacity: 1 }
.map a text { fill: var(--text); font-weight: 600; font-size: 12px; paint-order: stroke;
  stroke: var(--ground); stroke-width: 3px }
.map a:is(.marked, :hover) :is(polygon, circle) { fill: var(--objects); fill-opacity: .4;
  stroke: var(--objects); stroke-width: 3 }
"""


def footprint_map(hits, identifier):
    """The hits' footprints as SVG markup; empty where none has one.

    identifier: of the query. A footprint leads to the hit of the id "IDENTIFIER-hit-RANK", and its
    own id is that with "map-" before it.
    """
    placed = [hit for hit in hits if hit["footprint"]]
    if not placed:
        return ""
    frame = _Frame(_unwrapped([hit["footprint"] for hit in placed]))
    shapes = []
    for hit, outline, number in zip(placed, frame.outlines, frame.numbers(placed), strict=True):
        shapes.append(_shape(hit, outline, number, f"{identifier}-hit-{hit['rank']}"))
    # The first hit is drawn last: it is never covered.
    body = "".join([*frame.grid(), *reversed(shapes), frame.scale_bar()])
    count = f"{len(placed)} of {len(hits)} hits"
    return (
        f'<svg class="map" width="{WIDTH}" height="{frame.height + BOTTOM + EDGE:.0f}"'
        f' viewBox="0 0 {WIDTH} {frame.height + BOTTOM + EDGE:.0f}" role="group"'
        f' aria-label="Map of the footprints of {count}">{body}</svg>'
    )


def _unwrapped(footprints):
    """Footprints whose longitudes do not jump where 180 degrees east meet 180 degrees west."""
    longitudes = [corner[0] for footprint in footprints for corner in footprint]
    turned = [longitude % 360 for longitude in longitudes]
    if max(turned) - min(turned) >= max(longitudes) - min(longitudes):
        return footprints
    return [[(corner[0] % 360, corner[1]) for corner in footprint] for footprint in footprints]


def _shape(hit, outline, number, identifier):
    """A footprint with its hit's number, as a link to the hit."""
    xs, ys = [x for x, _ in outline], [y for _, y in outline]
    if max(max(xs) - min(xs), max(ys) - min(ys)) < SMALL:
        x, y = (min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2
        shape = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{SMALL / 2}"/>'
    else:
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in outline)
        shape = f'<polygon points="{points}"/>'
    text = ""
    if number is not None:
        x, y = (number[0] + number[2]) / 2, number[3] - 4
        text = f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{hit["rank"]}</text>'
    return (
        # The keys go from hit to hit, so the map takes no place in the order of the tab key.
        f'<a id="map-{identifier}" href="#{identifier}" tabindex="-1">'
        f"<title>{hit['rank']}: {shown(hit['path'])}</title>{shape}{text}</a>"
    )


class _Frame:
    """The part of the earth that a map shows, and where degrees lie on it."""

    def __init__(self, footprints):
        longitudes = [corner[0] for footprint in footprints for corner in footprint]
        latitudes = [corner[1] for footprint in footprints for corner in footprint]
        middle = (min(latitudes) + max(latitudes)) / 2
        self._shortened = max(0.05, math.cos(math.radians(middle)))
        self.width = WIDTH - LEFT - EDGE
        # Degrees of latitude that the frame's sides span, with room around the footprints.
        wide = 1.25 * self._shortened * (max(longitudes) - min(longitudes))
        high = 1.25 * (max(latitudes) - min(latitudes))
        wide, high = max(wide, 1e-5), max(high, 1e-5)
        self.height = min(max(self.width * high / wide, HEIGHTS[0]), HEIGHTS[1])
        self._unit = min(self.width / wide, self.height / high)  # pixels of a degree of latitude
        self._west = (min(longitudes) + max(longitudes)) / 2 - self._degrees_wide() / 2
        self._south = middle - self._degrees_high() / 2
        self.outlines = [[self._place(*corner) for corner in one] for one in footprints]

    def _degrees_wide(self):
        return self.width / (self._unit * self._shortened)

    def _degrees_high(self):
        return self.height / self._unit

    def _place(self, longitude, latitude):
        """Degrees as (x, y) in pixels of the map."""
        x = LEFT + (longitude - self._west) * self._unit * self._shortened
        y = EDGE + self.height - (latitude - self._south) * self._unit
        return x, y

    def numbers(self, hits):
        """A rectangle for each hit's number, None where there is no room."""
        boxes, sizes = [], []
        for hit, outline in zip(hits, self.outlines, strict=True):
            xs, ys = [x for x, _ in outline], [y for _, y in outline]
            boxes.append((min(xs) - 4, min(ys) - 4, max(xs) + 4, max(ys) + 4))
            sizes.append((CHARACTER * len(str(hit["rank"])) + 4, LINE - 2))
        return place_labels(boxes, sizes, (WIDTH - EDGE, EDGE + self.height))

    def grid(self):
        """The frame, and lines of round degrees with their names at its border."""
        parts = [
            f'<rect class="frame" x="{LEFT}" y="{EDGE}" width="{self.width}"'
            f' height="{self.height:.1f}"/>'
        ]
        for longitude, name in _round_degrees(self._west, self._degrees_wide(), "E", "W", most=3):
            x, _ = self._place(longitude, self._south)
            y = EDGE + self.height
            parts.append(f'<path class="grid" d="M{x:.1f} {EDGE}V{y:.1f}"/>')
            # A name near the right border ends there.
            middle = min(x, WIDTH - EDGE / 2 - 3.4 * len(name))
            parts.append(
                f'<text x="{middle:.1f}" y="{y + 14:.1f}" text-anchor="middle">{name}</text>'
            )
        for latitude, name in _round_degrees(self._south, self._degrees_high(), "N", "S", most=5):
            _, y = self._place(self._west, latitude)
            parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - EDGE}"/>')
            parts.append(f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{name}</text>')
        return parts

    def scale_bar(self):
        """A round distance, at most a third of the frame's width."""
        kilometres = _round_below(self.width / 3 / self._unit * KILOMETRES)
        length = kilometres / KILOMETRES * self._unit
        words = f"{kilometres:,.0f} km" if kilometres >= 1 else f"{1000 * kilometres:.3g} m"
        y = EDGE + self.height + 31
        return (
            f'<path class="scale" d="M{LEFT} {y - 3:.1f}v6M{LEFT} {y:.1f}h{length:.1f}'
            f'm0 -3v6"/><text x="{LEFT + length + 7:.1f}" y="{y + 4:.1f}">{words}</text>'
        )


def _round_below(value):
    """The largest of 1, 2 and 5 times a power of ten that is not above a positive value."""
    power = 10.0 ** math.floor(math.log10(value))
    return max(times * power for times in (1, 2, 5) if times * power <= value)


def _round_degrees(start, span, positive, negative, most):
    """Round degrees between start and start + span: (degrees, their name) each.

    Their steps are 1, 2 or 5 times a power of ten, and at least the span divided by `most`.
    """
    power = 10.0 ** math.floor(math.log10(span / most))
    step = min(times * power for times in (1, 2, 5, 10) if times * power >= span / most)
    decimals = max(0, math.ceil(-math.log10(step) - 1e-9))
    found = []
    for number in range(math.ceil(start / step), math.floor((start + span) / step) + 1):
        degrees = number * step
        turned = (degrees + 180) % 360 - 180
        side = positive if turned >= 0 else negative
        found.append((degrees, f"{abs(turned):.{decimals}f}° {side}"))
    return found
