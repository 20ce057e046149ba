"""Label Studio's export as JSON, a list of tasks: rectangles and polygons that people drew.

    task         "data" names the image; "annotations" hold a "result" each, a list of regions
    rectangle    x, y, width, height in percent of the image, rotation in degrees
    polygon      points, (x, y) each in percent of the image

A rectangle is turned clockwise, as seen, around its upper left corner, which stays at (x, y).

The image is the file at the end of the address in "data". Two addresses are special.
/data/local-files/?d=folder/name.png keeps its folder: give the folder above as that of the images.
Of /data/upload/1/8b3f2c1a-name.png the digits are taken off, which Label Studio has put there.

A task whose annotation is empty is an image without objects. One without annotations, or with
skipped ones alone, was not looked at. "predictions", a model's, are not read.
"""

import math
import re
from pathlib import PurePosixPath
from urllib.parse import unquote

from det_formats.entries import Detection, Entry, json_of, member, numbers, points_of

SUFFIX = ".json"
UNLISTED = "missing"
RECTANGLE, POLYGON = "rectanglelabels", "polygonlabels"
PICTURES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp", ".gif")
LOCAL, UPLOAD = "/data/local-files/?d=", "/data/upload/"
UPLOAD_PREFIX = re.compile("[0-9a-f]{8}-")


def entries(file, image):
    tasks = json_of(file)
    if not isinstance(tasks, list):
        raise ValueError("expected a list of tasks: export as JSON")
    # All tasks come first: a file that ends in an error is not read by half.
    tasks = [_task(task, f"task {number}") for number, task in enumerate(tasks, start=1)]
    first_of = {}  # image without suffix: its first task
    for place, name, results in tasks:
        if not results:
            continue
        first = first_of.setdefault(PurePosixPath(name).with_suffix(""), place)
        if first != place:
            yield Entry(name, place, ValueError(f"the image of {first}, too; delete one of them"))
        elif len(results) > 1:
            fault = f"{len(results)} annotations; delete all but one in Label Studio"
            yield Entry(name, place, ValueError(fault))
        else:
            yield Entry(name, place, None)
            for number, region in enumerate(results[0], start=1):
                yield Entry(name, f"{place}: region {number}", region)


def detection(content, size, hints):
    if isinstance(content, ValueError):
        raise content
    kind = content.get("type") if isinstance(content, dict) else None
    if kind not in (RECTANGLE, POLYGON):
        raise ValueError(f"expected the type {RECTANGLE} or {POLYGON}, found {kind!r:.60}")
    _require_same_image(content, size)
    value = member(content, "value", dict)
    labels = member(value, kind, list)
    if len(labels) != 1 or not isinstance(labels[0], str):
        raise ValueError(f"expected one label, found {labels!r:.60}")
    if kind == RECTANGLE:
        return Detection(label=labels[0], box=_rectangle(value, size))
    return Detection(label=labels[0], points=_polygon(value, size))


def _task(task, place):
    """(place, name of the image, results of the annotations that were not skipped)."""
    try:
        name = _image_of(member(task, "data", dict))
        results = []
        for annotation in member(task, "annotations", list):
            result = member(annotation, "result", list)
            if annotation.get("was_cancelled") is not True:
                results.append(result)
    except ValueError as error:
        raise ValueError(f"{place}: {error}; export as JSON, not as JSON-MIN") from None
    return place, name, results


def _image_of(data):
    """The name of a task's image, of the one value in its data that ends like an image file."""
    values = [value for value in data.values() if isinstance(value, str)]
    # What follows a question mark signs an address of a cloud's storage; LOCAL has its name there.
    values = [value if LOCAL in value else value.partition("?")[0] for value in values]
    addresses = [value for value in values if value.lower().endswith(PICTURES)]
    if len(addresses) != 1:
        raise ValueError(f"expected the address of one image in 'data', found {len(addresses)}")
    [address] = addresses
    if LOCAL in address:
        return unquote(address.partition(LOCAL)[2])
    name = unquote(address.rpartition("/")[2])
    if UPLOAD in address and UPLOAD_PREFIX.match(name):
        return name[9:]
    return name


def _require_same_image(region, size):
    """Raise ValueError where a region was drawn on an image of another size, or on a turned one."""
    width, height = size
    drawn = [region.get("original_width", width), region.get("original_height", height)]
    if drawn != [width, height]:
        raise ValueError(f"drawn on another image, of {drawn!r:.60} pixels, not {[width, height]}")
    turned = region.get("image_rotation", 0)
    if turned != 0:
        raise ValueError(f"image_rotation {turned!r:.20}: turn the image back in Label Studio")


def _rectangle(value, size):
    x, y, width, height = numbers([value.get(key) for key in ("x", "y", "width", "height")])
    [degrees] = numbers(value.get("rotation", 0))
    left, top = x / 100 * size[0], y / 100 * size[1]
    w, h = width / 100 * size[0], height / 100 * size[1]
    angle = math.radians(degrees)
    cos, sin = math.cos(angle), math.sin(angle)
    cx = left + cos * w / 2 - sin * h / 2
    cy = top + sin * w / 2 + cos * h / 2
    return (cx, cy, w, h, angle)


def _polygon(value, size):
    flat = []
    for point in member(value, "points", list):
        x, y = numbers(point, count=2)
        flat += [x / 100 * size[0], y / 100 * size[1]]
    return points_of(flat)
