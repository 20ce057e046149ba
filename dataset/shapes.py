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


def _symmetric(*upper):
    """An outline from its points above the long axis, mirrored; its first and last lie on it."""
    lower = [(x, -y) for x, y in reversed(upper[1:-1])]
    return [*upper, *lower]


def _blade(angle):
    return [
        (0.07 * math.cos(angle - 1.5), 0.07 * math.sin(angle - 1.5)),
        (0.5 * math.cos(angle), 0.5 * math.sin(angle)),
        (0.07 * math.cos(angle + 1.5), 0.07 * math.sin(angle + 1.5)),
    ]


_WHITE = (240, 240, 240)
_DARK = (55, 55, 60)
_GREEN = (70, 130, 60)


KINDS = {
    "airplane": Kind(
        names=("airplane", "plane"),
        surface="land",
        most=8,
        length=(20, 27),
        aspect=0.95,
        colours=((235, 238, 242),),
        parts=(
            (_ellipse(0.5, 0.075), None),
            (_symmetric((0.12, 0), (-0.16, 0.5), (-0.27, 0.5), (-0.12, 0)), None),
            (_symmetric((-0.33, 0), (-0.44, 0.19), (-0.5, 0.19), (-0.46, 0)), None),
            (_box(0.3, -0.04, 0.4, 0.04), _DARK),
        ),
    ),
    "ship": Kind(
        names=("ship", "boat"),
        surface="water",
        most=8,
        length=(24, 34),
        aspect=0.3,
        colours=((150, 60, 50), (95, 90, 90)),
        parts=(
            ([(0.5, 0), (0.25, 0.5), (-0.5, 0.4), (-0.5, -0.4), (0.25, -0.5)], None),
            (_box(-0.42, -0.26, -0.18, 0.26), _WHITE),
            (_box(0.0, -0.2, 0.2, 0.2), (205, 190, 150)),
        ),
    ),
    "car": Kind(
        names=("car", "vehicle"),
        surface="land",
        most=12,
        length=(11, 13),
        aspect=0.52,
        colours=((200, 40, 40), (40, 70, 170), (245, 215, 60), (245, 245, 245)),
        parts=(
            (_SQUARE, None),
            (_box(0.02, -0.38, 0.2, 0.38), _DARK),
        ),
    ),
    "storage tank": Kind(
        names=("storage tank", "oil tank"),
        surface="land",
        most=8,
        length=(15, 23),
        aspect=1.0,
        colours=((222, 222, 215),),
        parts=(
            (_ellipse(0.5, 0.5), None),
            (_ellipse(0.38, 0.38), (190, 190, 186)),
            (_ellipse(0.07, 0.07, 0.2), _DARK),
        ),
    ),
    "building": Kind(
        names=("building", "house"),
        surface="land",
        most=6,
        length=(20, 30),
        aspect=0.68,
        colours=((178, 84, 62), (128, 100, 88), (112, 118, 136)),
        parts=(
            (_SQUARE, None),
            (_box(-0.5, -0.5, 0.5, 0), (215, 150, 125)),
            (_box(0.2, 0.15, 0.32, 0.35), _DARK),
        ),
    ),
    "tennis court": Kind(
        names=("tennis court",),
        surface="land",
        most=5,
        length=(24, 28),
        aspect=0.54,
        colours=((46, 128, 116), (60, 98, 172)),
        parts=(
            (_SQUARE, None),
            (_box(-0.4, -0.36, 0.4, 0.36), _WHITE),
            (_box(-0.35, -0.26, -0.03, 0.26), None),
            (_box(0.03, -0.26, 0.35, 0.26), None),
        ),
    ),
    "baseball diamond": Kind(
        names=("baseball diamond", "baseball field"),
        surface="land",
        most=3,
        length=(27, 34),
        aspect=1.0,
        colours=((196, 142, 92),),
        parts=(
            (_ellipse(1.0, 1.0, -0.5, -0.5, 0, math.pi / 2) + [(-0.5, -0.5)], None),
            (_ellipse(0.93, 0.93, -0.46, -0.46, 0.03, 1.54) + [(-0.1, -0.1)], (92, 158, 72)),
            (_box(-0.36, -0.36, -0.1, -0.1), (120, 172, 90)),
        ),
    ),
    "swimming pool": Kind(
        names=("swimming pool", "pool"),
        surface="land",
        most=6,
        length=(15, 20),
        aspect=0.62,
        colours=((236, 232, 222),),
        parts=(
            (_SQUARE, None),
            (_ellipse(0.42, 0.4), (50, 190, 225)),
        ),
    ),
    "roundabout": Kind(
        names=("roundabout", "traffic circle"),
        surface="land",
        most=2,
        length=(28, 34),
        aspect=1.0,
        colours=((88, 88, 92),),
        parts=(
            (_ellipse(0.5, 0.5), None),
            (_ellipse(0.31, 0.31), _WHITE),
            (_ellipse(0.27, 0.27), _GREEN),
        ),
    ),
    "windmill": Kind(
        names=("windmill", "wind turbine"),
        surface="any",
        most=8,
        length=(20, 26),
        aspect=1.0,
        colours=(_WHITE,),
        parts=(
            (_blade(0), None),
            (_blade(2.094), None),
            (_blade(4.189), None),
            (_ellipse(0.1, 0.1), (225, 60, 50)),
        ),
    ),
}


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
    groups = []
    room = MAX_OBJECTS
    for kind in rng.permutation(kinds)[:number]:
        most = 4 if groups else 12  # the first group may be large
        count = int(rng.integers(1, min(KINDS[kind].most, room, most) + 1))
        room -= count
        arrangement = rng.choice(["row", "packed", "scattered"]) if count > 2 else "packed"
        groups.append((str(kind), count, str(arrangement)))
    road = bool(ground not in surfaces and rng.random() < 0.3)
    relations = [str(relation) for relation in rng.permutation(list(WINDOWS))]
    return ground, road, groups, relations


class Canvas:
    """Holds what has been placed, and says whether an item still fits."""

    def __init__(self, ground, road, rng):
        self.ground = ground
        self.road = road
        self.items = []
        self.discs = np.empty((0, 3))  # x, y and radius: the room that is taken
        self.line_angle = rng.uniform(0, 2 * math.pi)
        self.line_offset = rng.uniform(-0.2, 0.2) * SIDE

    def distance(self, x, y):
        """Pixels from the line that is the shore (water where positive) or the road's middle."""
        along_x = (x - SIDE / 2) * math.cos(self.line_angle)
        along_y = (y - SIDE / 2) * math.sin(self.line_angle)
        return along_x + along_y - self.line_offset

    def place(self, item):
        """Add an item unless it would leave the image or its surface, or meet road or neighbour.

        For this an item is as many discs along its long side as cover it.
        """
        radius = 0.6 * item.h
        if not (radius < item.x < SIDE - radius and radius < item.y < SIDE - radius):
            return
        number = math.ceil(item.w / item.h)
        along = (np.arange(number) - (number - 1) / 2) * item.w / number
        x = item.x + along * math.cos(item.angle)
        y = item.y + along * math.sin(item.angle)
        ends = (x[0], x[-1], y[0], y[-1])
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
        discs = np.stack([x, y, np.full(number, radius)], axis=1)  # (number, 3)
        # New ones, not longer ones: `_place_group` goes back to those before.
        self.items = [*self.items, item]
        self.discs = np.concatenate([self.discs, discs])


def _propose(rng, count, arrangement, window, w, h, near):
    """Centres (count, 2) and angles (count) for a group; whether they fit is seen later."""
    angle = rng.uniform(-math.pi, math.pi)
    low = np.array(window[:2]) * SIDE
    high = np.array(window[2:]) * SIDE
    start = rng.uniform(low, high)
    angles = angle + rng.normal(0, 0.05, count)
    if near:
        if len(near) == 1:  # a ring around it
            turns = np.arange(count) / count
        else:  # each beside one of them
            turns = rng.uniform(0, 1, count)
        bearings = angle + 2 * math.pi * turns
        hosts = [near[i % len(near)] for i in range(count)]
        centres = np.array([(host.x, host.y) for host in hosts])  # (count, 2)
        reach = np.array([0.6 * (host.w + w) + 2 for host in hosts])  # (count)
        directions = np.stack([np.cos(bearings), np.sin(bearings)], axis=1)  # (count, 2)
        return centres + reach[:, None] * directions, angles
    if arrangement == "row":
        step = np.array([-math.sin(angle), math.cos(angle)]) * (1.3 * h + 3)
        return start + np.arange(count)[:, None] * step, angles
    if arrangement == "packed":
        spread = 0.6 * math.sqrt(w * h * count)
        return start + rng.normal(0, spread, (count, 2)), angles
    centres = rng.uniform(low, high, (count, 2))
    return centres, rng.uniform(-math.pi, math.pi, count)


def _place_group(rng, canvas, g, group, window, near):
    """Best of twelve tries to place a whole group; a row is kept only in one piece."""
    kind, count, arrangement = group
    w = rng.uniform(*KINDS[kind].length)
    h = w * KINDS[kind].aspect
    before = (canvas.items, canvas.discs)
    best = before
    wanted = len(canvas.items) + count
    rounds = 1 if arrangement == "row" else 3
    for attempt in range(12):
        canvas.items, canvas.discs = before
        if attempt == 8:  # no room where it was wanted
            window = ANYWHERE
            near = []
        for _ in range(rounds):
            missing = wanted - len(canvas.items)
            if not missing:
                continue
            points, angles = _propose(rng, missing, arrangement, window, w, h, near)
            for (x, y), angle in zip(points, angles, strict=True):
                canvas.place(Item(kind, float(x), float(y), w, h, float(angle), g))
        if len(canvas.items) > len(best[0]):
            best = (canvas.items, canvas.discs)
        if len(canvas.items) == wanted:
            break
    canvas.items, canvas.discs = best


def layout(rng, composition, relation):
    """A canvas with the groups placed as the intended relation wants, as far as they fit."""
    ground, road, groups, _ = composition
    canvas = Canvas(ground, road, rng)
    hosted = relation in ("beside", "around") and len(groups) > 1
    order = [1, 0, 2] if hosted else [0, 1, 2]  # hosts before those that lie at them
    for g in order:
        if g >= len(groups):
            continue
        window = WINDOWS[relation][g] if g < 2 else ANYWHERE
        hosts = []
        if hosted and g == 0:
            hosts = [item for item in canvas.items if item.group == 1]
        if relation == "around":
            hosts = hosts[:1]
        _place_group(rng, canvas, g, groups[g], window, hosts)
    return canvas


# ------------------------------------------------------------------ drawing


def _outline(points, item, shift=0.0):
    """Unit-box points to pixels of the enlarged drawing."""
    cos = math.cos(item.angle)
    sin = math.sin(item.angle)
    outline = []
    for px, py in points:
        x = item.x + shift + px * item.w * cos - py * item.h * sin
        y = item.y + shift + px * item.w * sin + py * item.h * cos
        outline.append((_SMOOTH * x, _SMOOTH * y))
    return outline


def _texture(ground, rng):
    """(SIDE, SIDE, 3) uint8: the ground's colour with soft blotches, furrows on farmland."""
    _, colour, size, strength = GROUNDS[ground]
    coarse = rng.normal(0, 1, (SIDE // size + 2,) * 2).astype(np.float32)
    blotches = Image.fromarray(coarse).resize((SIDE, SIDE), Image.BICUBIC)
    shade = strength * np.asarray(blotches) + rng.uniform(-8, 8)
    if ground == "farmland":
        angle = rng.uniform(0, math.pi)
        period = rng.uniform(7, 11)
        y, x = np.mgrid[:SIDE, :SIDE]
        across = x * math.cos(angle) + y * math.sin(angle)
        shade = shade + 14 * np.sign(np.sin(across / period * 6))
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
    bodies = []
    for item in items:
        colours = KINDS[item.kind].colours
        bodies.append(colours[int(rng.integers(len(colours)))])
    for item in items:
        for points, colour in KINDS[item.kind].parts:
            if colour is None:
                pen.polygon(_outline(points, item, 1.8), fill=(0, 0, 0, 110))
    for item, body in zip(items, bodies, strict=True):
        for points, colour in KINDS[item.kind].parts:
            pen.polygon(_outline(points, item), fill=colour or body)
    pixels = np.asarray(image.reduce(_SMOOTH)).astype(np.float32)
    light = rng.uniform(0.85, 1.12)
    pixels = pixels * light + rng.normal(0, 5, pixels.shape)
    return np.clip(pixels, 0, 255).astype(np.uint8)
