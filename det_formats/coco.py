"""COCO: annotations, or a detector's results, one JSON file for all images.

    {"images": [{"id", "file_name"}, ...], "categories": [{"id", "name"}, ...],
     "annotations": [{"image_id", "category_id", "bbox", "segmentation"}, ...]}
    [{"image_id", "category_id", "bbox", "score"}, ...]    of results

bbox is [x, y, w, h] of an upright box in pixels, from its top left corner. Where "segmentation" has
polygons, the smallest rectangle around their points counts; so it does of "poly", the corners that
ultralytics writes of turned boxes. A "score" in annotations is ours.

The images of results are named by "file_name", else by image_id. Their category ids begin at 0 or
at 1, by program and version, so --names has an id and a name in each line: `1 ship`. Results whose
ids are those of an annotation file are read with it, as one file:

    import json; whole = json.load(open("annotations.json"))
    whole["annotations"] = json.load(open("results.json")); json.dump(whole, open("both.json", "w"))
"""

import json
from functools import cache

from det_formats.entries import Detection, Entry, json_of, numbers, points_of
from det_formats.geometry import corners_of

SUFFIX = ".json"
UNLISTED = "missing"
FILE = "instances.json"  # that is written

# ------------------------------------------------------------------ reading


def entries(file, image):
    content = json_of(file)
    if isinstance(content, list):
        return _of_results(content)
    return _of_annotations(content)


def _of_results(results):
    for i, one in enumerate(results):
        if not isinstance(one, dict) or "image_id" not in one:
            raise ValueError(f'result {i}: expected an object with "image_id"')
    for i, one in enumerate(results):
        name = one.get("file_name", one["image_id"])
        yield Entry(str(name), f"result {i}", (one, None))


def _of_annotations(content):
    images = _by_id(content, "images", "file_name")
    categories = _by_id(content, "categories", "name")
    annotations = _objects(content, "annotations")
    names = []
    for i, one in enumerate(annotations):
        try:
            names.append(_meant(one, "image_id", images, '"images"'))
        except ValueError as error:
            raise ValueError(f"annotations {i}: {error}") from None
    for name in images.values():
        yield Entry(name, "images", None)
    for i, (name, one) in enumerate(zip(names, annotations, strict=True)):
        yield Entry(name, f"annotations {i}", (one, categories))


def _objects(content, key):
    """The list of objects by a key of a file."""
    found = content.get(key) if isinstance(content, dict) else None
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise ValueError(f'expected a list of results, or "{key}" as a list of objects')
    return found


def _by_id(content, key, field):
    """{id: text of a field} of a list in a file."""
    found = {}
    for i, one in enumerate(_objects(content, key)):
        number, text = one.get("id"), one.get(field)
        if not _is_id(number) or not isinstance(text, str):
            raise ValueError(f'{key} {i}: expected "id" and "{field}"')
        if number in found:
            raise ValueError(f"{key} {i}: id {number!r:.60} stands twice")
        found[number] = text
    return found


def _is_id(value):
    return isinstance(value, (int, str)) and not isinstance(value, bool)


def _meant(one, field, names, where):
    """The name that the id in a field means."""
    number = one.get(field)
    if not _is_id(number) or number not in names:
        raise ValueError(f"{field} {number!r:.60} is not in {where}")
    return names[number]


def detection(content, size, hints):
    one, categories = content
    if categories is None:
        names = _names_by_id(tuple(hints.names or ()))
        label = _meant(one, "category_id", names, "--names")
        [score] = numbers(one.get("score"))
    else:
        if hints.names:
            raise ValueError('"categories" have the names; leave --names out')
        label = _meant(one, "category_id", categories, '"categories"')
        [score] = numbers(one.get("score", 1.0))
    outlines = one.get("segmentation")
    if "poly" in one:
        return Detection(label=label, score=score, points=points_of(one["poly"]))
    if outlines:
        return Detection(label=label, score=score, points=_points_of(outlines))
    _require_upright(one)
    if "bbox" not in one:
        raise ValueError('neither "segmentation" nor "bbox"')
    x, y, w, h = numbers(one["bbox"], 4)
    return Detection(label=label, score=score, box=(x + w / 2, y + h / 2, w, h, 0.0))


def _require_upright(one):
    """Raise ValueError for a turned box of CVAT, whose bbox is that of the box before its turn."""
    attributes = one.get("attributes")
    turn = attributes.get("rotation", 0) if isinstance(attributes, dict) else 0
    if turn != 0:
        raise ValueError(
            f"attributes: rotation {turn!r:.20}, which bbox leaves out; export the boxes of CVAT "
            "in another format"
        )


@cache
def _names_by_id(lines):
    """{id: name} of the lines of --names."""
    if not lines:
        raise ValueError("results have ids alone; give an id and a name a line by --names FILE")
    found = {}
    for line in lines:
        number, _, name = line.replace("\t", " ").partition(" ")
        if not number.isdecimal() or not name.strip():
            raise ValueError(
                f"--names {line!r:.60}: expected an id and a name, as '1 ship', since ids of "
                "results begin at 0 or at 1"
            )
        if int(number) in found:
            raise ValueError(f"--names has two lines for id {int(number)}")
        found[int(number)] = name.strip()
    return found


def _points_of(outlines):
    """The points of all polygons of an object."""
    if isinstance(outlines, dict):
        raise ValueError(
            "segmentation: RLE, a mask of pixels; expected polygons, or none, so that bbox counts"
        )
    if not isinstance(outlines, list):
        raise ValueError(f"segmentation: expected a list of polygons, found {outlines!r:.60}")
    points = []
    for outline in outlines:
        points += points_of(outline)
    return points


# ------------------------------------------------------------------ writing


def written_together(detections_by_image, sizes, names):
    """The text of a file of all images.

    detections_by_image: {path: detections}; sizes: {path: (width, height)} in pixels; names: of all
    classes, whose ids begin at 1.
    """
    category_ids = {name: number for number, name in enumerate(names, start=1)}
    images, annotations = [], []
    for image_id, path in enumerate(sorted(detections_by_image), start=1):
        width, height = sizes[path]
        images.append({"id": image_id, "file_name": path, "width": width, "height": height})
        for one in detections_by_image[path]:
            ids = {
                "id": len(annotations) + 1,
                "image_id": image_id,
                "category_id": category_ids[one["label"]],
            }
            annotations.append({**ids, **_shape_of(one["bbox"])})
    categories = [{"id": number, "name": name} for name, number in category_ids.items()]
    whole = {"images": images, "categories": categories, "annotations": annotations}
    return json.dumps(whole) + "\n"


def _shape_of(box):
    """The fields of an annotation that say where a box of ours lies."""
    [corners] = corners_of([box])  # (4, 2)
    low, high = corners.min(axis=0), corners.max(axis=0)
    return {
        "bbox": [*low.tolist(), *(high - low).tolist()],
        "segmentation": [corners.flatten().tolist()],
        "area": box[2] * box[3],
        "iscrowd": 0,
        "score": box[5],
    }
