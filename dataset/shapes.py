"""What the synthetic scenes look like: kinds of objects, grounds, their layout and drawing.

Apart from `scenes.py`, which puts them into words, detections and files, to keep both readable in
one sitting. All is drawn from the `rng` given. Lengths in pixels of the scene.
"""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

SIDE = 128  # pixels, both sides of a scene


MAX_OBJECTS = 20


_SMOOTH = 2  # drawn this much larger, then reduced


class Kind(NamedTuple):
    names: tuple  # for sentences, the label in det_json first
    surface: str  # "land", "water" or "any"
    most: int  # objects in a group
    length: tuple  # long side in pixels, smallest and largest
    aspect: float  # short side / long side
    colours: tuple  # of the body; one is drawn per group
    parts: tuple  # (outline in a unit box with x along the long side, colour or None for body)


def _ellipse(rx, ry, cx=0.0, cy=0.0, start=0.0, stop=2 * math.pi):
    angles = np.linspace(start, stop, 17)
    return [(cx + rx * math.cos(a), cy + ry * math.sin(a)) for a in angles]


def _box(x0, y0, x1, y1):
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


_SQUARE = _box(-0.5, -0.5, 0.5, 0.5)


_BLADES = [
    [(0.07 * math.cos(a - 1.5), 0.07 * math.sin(a - 1.5)), (0.5 * math.cos(a), 0.5 * math.sin(a)),
     (0.07 * math.cos(a + 1.5), 0.07 * math.sin(a + 1.5))] for a in (0, 2.094, 4.189)
]  # fmt: skip


_WHITE, _DARK, _GREEN = (240, 240, 240), (55, 55, 60), (70, 130, 60)


KINDS = {
    "airplane": Kind(("airplane", "plane"), "land", 8, (20, 27), 0.95, ((235, 238, 242),), (
        (_ellipse(0.5, 0.075), None), ([(0.12, 0), (-0.16, 0.5), (-0.27, 0.5), (-0.12, 0),
         (-0.27, -0.5), (-0.16, -0.5)], None), ([(-0.33, 0), (-0.44, 0.19), (-0.5, 0.19),
         (-0.46, 0), (-0.5, -0.19), (-0.44, -0.19)], None), (_box(0.3, -0.04, 0.4, 0.04), _DARK))),
    "ship": Kind(("ship", "boat"), "water", 8, (24, 34), 0.3, ((150, 60, 50), (95, 90, 90)), (
        ([(0.5, 0), (0.25, 0.5), (-0.5, 0.4), (-0.5, -0.4), (0.25, -0.5)], None),
        (_box(-0.42, -0.26, -0.18, 0.26), _WHITE), (_box(0.0, -0.2, 0.2, 0.2), (205, 190, 150)))),
    "car": Kind(("car", "vehicle"), "land", 12, (11, 13), 0.52,
        ((200, 40, 40), (40, 70, 170), (245, 215, 60), (245, 245, 245)),
        ((_SQUARE, None), (_box(0.02, -0.38, 0.2, 0.38), _DARK))),
    "storage tank": Kind(("storage tank", "oil tank"), "land", 8, (15, 23), 1.0,
        ((222, 222, 215),), ((_ellipse(0.5, 0.5), None), (_ellipse(0.38, 0.38), (190, 190, 186)),
        (_ellipse(0.07, 0.07, 0.2), _DARK))),
    "building": Kind(("building", "house"), "land", 6, (20, 30), 0.68,
        ((178, 84, 62), (128, 100, 88), (112, 118, 136)), ((_SQUARE, None),
        (_box(-0.5, -0.5, 0.5, 0), (215, 150, 125)), (_box(0.2, 0.15, 0.32, 0.35), _DARK))),
    "tennis court": Kind(("tennis court",), "land", 5, (24, 28), 0.54,
        ((46, 128, 116), (60, 98, 172)), ((_SQUARE, None),
        (_box(-0.4, -0.36, 0.4, 0.36), _WHITE), (_box(-0.35, -0.26, -0.03, 0.26), None),
        (_box(0.03, -0.26, 0.35, 0.26), None))),
    "baseball diamond": Kind(("baseball diamond", "baseball field"), "land", 3, (27, 34), 1.0,
        ((196, 142, 92),), ((_ellipse(1.0, 1.0, -0.5, -0.5, 0, math.pi / 2) + [(-0.5, -0.5)], None),
        (_ellipse(0.93, 0.93, -0.46, -0.46, 0.03, 1.54) + [(-0.1, -0.1)], (92, 158, 72)),
        (_box(-0.36, -0.36, -0.1, -0.1), (120, 172, 90)))),
    "swimming pool": Kind(("swimming pool", "pool"), "land", 6, (15, 20), 0.62,
        ((236, 232, 222),), ((_SQUARE, None), (_ellipse(0.42, 0.4), (50, 190, 225)))),
    "roundabout": Kind(("roundabout", "traffic circle"), "land", 2, (28, 34), 1.0,
        ((88, 88, 92),), ((_ellipse(0.5, 0.5), None), (_ellipse(0.31, 0.31), _WHITE),
        (_ellipse(0.27, 0.27), _GREEN))),
    "windmill": Kind(("windmill", "wind turbine"), "any", 8, (20, 26), 1.0, (_WHITE,),
        tuple((blade, None) for blade in _BLADES) + ((_ellipse(0.1, 0.1), (225, 60, 50)),)),
}  # fmt: skip


GROUNDS = {  # phrases, colour, size of the blotches in pixels, their strength
    "grass": (("grass", "a green meadow"), (104, 140, 78), 16, 14),
    "concrete": (("concrete", "grey pavement"), (158, 157, 152), 32, 7),
    "bare land": (("bare land", "brown bare ground"), (154, 124, 94), 16, 14),
    "sand": (("sand", "yellow sand"), (208, 188, 142), 24, 9),
    "forest": (("dark woodland", "ground covered by forest"), (48, 80, 46), 5, 20),
    "farmland": (("striped farmland", "farmland"), (146, 146, 82), 32, 8),
    "snow": (("snow", "snowy ground"), (214, 220, 228), 24, 8),
    "water": (("the water", "the open sea"), (44, 86, 122), 8, 8),
    "shore": (("the shore", "the coast"), (206, 186, 140), 24, 9),
}


ANYWHERE = (0.0, 0.0, 1.0, 1.0)


WINDOWS = {  # intended relation: where the first and the second group go, fractions of the side
    "left": ((0.0, 0.0, 0.4, 1.0), (0.6, 0.0, 1.0, 1.0)),
    "right": ((0.6, 0.0, 1.0, 1.0), (0.0, 0.0, 0.4, 1.0)),
    "above": ((0.0, 0.0, 1.0, 0.4), (0.0, 0.6, 1.0, 1.0)),
    "below": ((0.0, 0.6, 1.0, 1.0), (0.0, 0.0, 1.0, 0.4)),
    "beside": (ANYWHERE, (0.1, 0.1, 0.9, 0.9)),
    "around": (ANYWHERE, (0.3, 0.3, 0.7, 0.7)),
}


# ------------------------------------------------------------------ layout


class Item(NamedTuple):
    """An object as drawn: centre and sides in pixels, angle in radians from +x towards +y."""

    kind: str
    x: float
    y: float
    w: float
    h: float
    angle: float
    group: int


def composition(rng):
    """What twins share: ground, road, groups of (kind, count, arrangement), order of relations."""
    ground = str(rng.choice(list(GROUNDS)))
    surfaces = {"water": {"water", "any"}, "shore": {"land", "water", "any"}}
    allowed = surfaces.get(ground, {"land", "any"})
    kinds = [name for name, kind in KINDS.items() if kind.surface in allowed]
    number = min(len(kinds), int(rng.choice([1, 2, 3], p=[0.1, 0.6, 0.3])))
    groups, room = [], MAX_OBJECTS
    for kind in rng.permutation(kinds)[:number]:
        count = int(rng.integers(1, min(KINDS[kind].most, room, 4 if groups else 12) + 1))
        room -= count
        arrangement = rng.choice(["row", "packed", "scattered"]) if count > 2 else "packed"
        groups.append((str(kind), count, str(arrangement)))
    road = bool(ground not in surfaces and rng.random() < 0.3)
    return ground, road, groups, [str(r) for r in rng.permutation(list(WINDOWS))]


class Canvas:
    """Holds what has been placed, and says whether an item still fits."""

    def __init__(self, ground, road, rng):
        self.ground, self.road, self.items, self.discs = ground, road, [], np.empty((0, 3))
        self.line = rng.uniform(0, 2 * math.pi), rng.uniform(-0.2, 0.2) * SIDE

    def distance(self, x, y):
        """Pixels from the line that is the shore (water where positive) or the road's middle."""
        angle, offset = self.line
        return (x - SIDE / 2) * math.cos(angle) + (y - SIDE / 2) * math.sin(angle) - offset

    def place(self, item):
        """Add an item unless it would leave the image or its surface, or meet road or neighbour.

        For this an item is as many discs along its long side as cover it.
        """
        radius = 0.6 * item.h
        if not (radius < item.x < SIDE - radius and radius < item.y < SIDE - radius):
            return
        number = math.ceil(item.w / item.h)
        along = (np.arange(number) - (number - 1) / 2) * item.w / number
        x, y = item.x + along * math.cos(item.angle), item.y + along * math.sin(item.angle)
        ends = x[0], x[-1], y[0], y[-1]
        if min(ends) < radius or max(ends) > SIDE - radius:
            return
        if self.road and abs(self.distance(x, y)).min() < radius + 6:
            return
        surface = KINDS[item.kind].surface
        if self.ground == "shore" and surface != "any":
            inside = self.distance(x, y) if surface == "water" else -self.distance(x, y)
            if inside.min() < radius:
                return
        gaps = np.hypot(x[:, None] - self.discs[:, 0], y[:, None] - self.discs[:, 1])
        if (gaps < radius + self.discs[:, 2] + 1.5).any():
            return
        self.items = [*self.items, item]
        self.discs = np.concatenate([self.discs, np.stack([x, y, np.full(number, radius)], axis=1)])


def _propose(rng, count, arrangement, window, w, h, near):
    """Centres (count, 2) and angles (count) for a group; whether they fit is seen later."""
    angle = rng.uniform(-math.pi, math.pi)
    low, high = np.array(window[:2]) * SIDE, np.array(window[2:]) * SIDE
    start, angles = rng.uniform(low, high), angle + rng.normal(0, 0.05, count)
    if near:  # a ring around one, or each beside one of several
        turns = np.arange(count) / count if len(near) == 1 else rng.uniform(0, 1, count)
        bearings = angle + 2 * math.pi * turns
        hosts = [near[i % len(near)] for i in range(count)]
        reach = np.array([0.6 * (host.w + w) + 2 for host in hosts])[:, None]
        steps = reach * np.stack([np.cos(bearings), np.sin(bearings)], axis=1)
        return np.array([(host.x, host.y) for host in hosts]) + steps, angles
    if arrangement == "row":
        step = np.array([-math.sin(angle), math.cos(angle)]) * (1.3 * h + 3)
        return start + np.arange(count)[:, None] * step, angles
    if arrangement == "packed":
        return start + rng.normal(0, 0.6 * math.sqrt(w * h * count), (count, 2)), angles
    return rng.uniform(low, high, (count, 2)), rng.uniform(-math.pi, math.pi, count)


def _place_group(rng, canvas, g, group, window, near):
    """Best of twelve tries to place a whole group; a row is kept only in one piece."""
    kind, count, arrangement = group
    w = rng.uniform(*KINDS[kind].length)
    h = w * KINDS[kind].aspect
    before = best = canvas.items, canvas.discs
    for attempt in range(12):
        canvas.items, canvas.discs = before
        if attempt == 8:  # no room where it was wanted
            window, near = ANYWHERE, []
        for _ in range(1 if arrangement == "row" else 3):
            missing = count - len(canvas.items) + len(before[0])
            if missing:
                points, angles = _propose(rng, missing, arrangement, window, w, h, near)
                for (x, y), angle in zip(points, angles, strict=True):
                    canvas.place(Item(kind, float(x), float(y), w, h, float(angle), g))
        if len(canvas.items) > len(best[0]):
            best = canvas.items, canvas.discs
        if len(canvas.items) == len(before[0]) + count:
            break
    canvas.items, canvas.discs = best


def layout(rng, composition, relation):
    """A canvas with the groups placed as the intended relation wants, as far as they fit."""
    ground, road, groups, _ = composition
    canvas = Canvas(ground, road, rng)
    hosted = relation in ("beside", "around") and len(groups) > 1
    for g in [1, 0, 2] if hosted else [0, 1, 2]:
        if g < len(groups):
            window = WINDOWS[relation][g] if g < 2 else ANYWHERE
            hosts = [item for item in canvas.items if item.group == 1] if hosted and g == 0 else []
            if relation == "around":
                hosts = hosts[:1]
            _place_group(rng, canvas, g, groups[g], window, hosts)
    return canvas


# ------------------------------------------------------------------ drawing


def _outline(points, item, shift=0.0):
    """Unit-box points to pixels of the enlarged drawing."""
    cos, sin = math.cos(item.angle), math.sin(item.angle)
    return [
        (
            _SMOOTH * (item.x + shift + px * item.w * cos - py * item.h * sin),
            _SMOOTH * (item.y + shift + px * item.w * sin + py * item.h * cos),
        )
        for px, py in points
    ]


def _texture(ground, rng):
    """(SIDE, SIDE, 3) uint8: the ground's colour with soft blotches, furrows on farmland."""
    _, colour, size, strength = GROUNDS[ground]
    coarse = rng.normal(0, 1, (SIDE // size + 2,) * 2).astype(np.float32)
    blotches = Image.fromarray(coarse).resize((SIDE, SIDE), Image.BICUBIC)
    shade = strength * np.asarray(blotches) + rng.uniform(-8, 8)
    if ground == "farmland":
        angle, period = rng.uniform(0, math.pi), rng.uniform(7, 11)
        y, x = np.mgrid[:SIDE, :SIDE]
        shade = shade + 14 * np.sign(
            np.sin((x * math.cos(angle) + y * math.sin(angle)) / period * 6)
        )
    return np.clip(np.array(colour) + shade[..., None], 0, 255).astype(np.uint8)


def draw(items, ground, road, distance, rng):
    """A scene as (SIDE, SIDE, 3) uint8: ground, shore or road, then items with their shadows.

    distance: (SIDE, SIDE) signed distance in pixels from the shore (water where positive) or from
    the road's middle line.
    """
    pixels = _texture(ground, rng)
    if ground == "shore":
        sea = _texture("water", rng)
        pixels = np.where((distance > 0)[..., None], sea, pixels)
        pixels[abs(distance) < 1.5] = (235, 238, 232)
    if road:
        pixels[abs(distance) < 5] = (92, 92, 96)
        pixels[abs(distance) < 0.7] = (225, 225, 215)
    image = Image.fromarray(pixels).resize((SIDE * _SMOOTH,) * 2, Image.BILINEAR)
    pen = ImageDraw.Draw(image, "RGBA")
    colours = [KINDS[i.kind].colours[int(rng.integers(len(KINDS[i.kind].colours)))] for i in items]
    for item in items:
        for points, colour in KINDS[item.kind].parts:
            if colour is None:
                pen.polygon(_outline(points, item, 1.8), fill=(0, 0, 0, 110))
    for item, body in zip(items, colours, strict=True):
        for points, colour in KINDS[item.kind].parts:
            pen.polygon(_outline(points, item), fill=colour or body)
    pixels = np.asarray(image.reduce(_SMOOTH)).astype(np.float32)
    pixels = pixels * rng.uniform(0.85, 1.12) + rng.normal(0, 5, pixels.shape)
    return np.clip(pixels, 0, 255).astype(np.uint8)
