"""Answers to queries for the terminal, for spreadsheets and for maps.

An answer is a dict of plain values, as `search.py query --json` writes it. All texts are escaped as
their place needs: control characters on a terminal, formulas in CSV, `<` in GeoJSON.
"""

import json

from escaping import escaped
from gallery.footprints import rings
from metrics.tables import write_csv
from writing import write_text

SHOWN = 3  # objects of a hit that a line on the terminal names
COLUMNS = (
    "query",
    "rank",
    "score",
    "pixels",
    "objects",
    "path",
    "left",
    "top",
    "width",
    "height",
    "counts",
    "matters",
    "lat",
    "lon",
)


def query_name(query):
    """A query in one line: its sentence or image, and what is taken off."""
    parts = [query[key] for key in ("text", "image") if query.get(key)]
    name = " + ".join(parts) or "a vector"
    if query.get("not"):
        name += f" without {query['not']}"
    for key, word in (("where", "where"), ("near", "near"), ("bbox", "in the box")):
        if query.get(key):
            name += f" {word} {query[key]}"
    return name


# ------------------------------------------------------------------ terminal


def table_lines(answer):
    """The hits of an answer as lines: rank, score, its shares, tile, the objects that matter most.

    What there is to say of the whole answer follows.
    """
    lines = []
    if answer["hits"]:
        rows = [["rank", "score", "pixels", "objects", "tile", "what matters"]]
        rows += [_row(hit) for hit in answer["hits"]]
        lines += _aligned(rows)
        noted = [hit for hit in answer["hits"] if hit["note"]]
        lines += [f"of {escaped(hit['id'])} {escaped(hit['note'])}" for hit in noted]
    else:
        lines.append("no tile found")
    if not answer["fits"]:
        lines.append("perhaps nothing fits: most other queries have a better best tile")
    if answer["pixels_only"]:
        words = ", ".join(escaped(word) for word in answer["pixels_only"])
        lines.append(f"matched by pixels only: {words}")
    exact = "exactly" if answer["exact"] else "by the vector index, which may miss some"
    lines.append(f"{answer['searched']:,} tiles searched {exact}")
    return lines


def _row(hit):
    shares = [f"{hit[key]:.3f}" for key in ("score", "pixels", "objects")]
    return [str(hit["rank"]), *shares, escaped(hit["id"]), escaped(_matters(hit))]


def _matters(hit):
    parts = [f"{box['label']} {box['matters']:+.3f}" for box in hit["boxes"][:SHOWN]]
    more = len(hit["boxes"]) - SHOWN
    if more > 0:
        parts.append(f"{more} more")
    return ", ".join(parts)


def _aligned(rows):
    """Rows of strings as lines; figures to the right, the last two columns, words, to the left."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        figures = [cell.rjust(width) for cell, width in zip(row[:-2], widths[:-2], strict=True)]
        words = [row[-2].ljust(widths[-2]), row[-1]]
        lines.append("  ".join([*figures, *words]).rstrip())
    return lines


# ------------------------------------------------------------------ CSV


def write_csv_rows(path, answers):
    """Write all hits as CSV, a row a hit; window in pixels, lat and lon in degrees.

    counts and matters are texts: "2 airplane, 1 ship" and "airplane +0.050, ship -0.010".
    """
    rows = []
    for answer in answers:
        name = query_name(answer["query"])
        for hit in answer["hits"]:
            rows.append(_csv_row(name, hit))
    write_csv(path, COLUMNS, rows)


def _csv_row(name, hit):
    left, top, width, height = hit["window"]
    counts = [f"{count} {label}" for label, count in hit["counts"].items()]
    matters = [f"{box['label']} {box['matters']:+.3f}" for box in hit["boxes"]]
    return {
        "query": _encodable(name),
        "rank": hit["rank"],
        "score": hit["score"],
        "pixels": hit["pixels"],
        "objects": hit["objects"],
        "path": _encodable(hit["path"]),
        "left": left,
        "top": top,
        "width": width,
        "height": height,
        "counts": _encodable(", ".join(counts)),
        "matters": _encodable(", ".join(matters)),
        "lat": hit["lat"],
        "lon": hit["lon"],
    }


def _encodable(text):
    """A text that UTF-8 can hold: a lone surrogate, of a name that is no text, is escaped."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


# ------------------------------------------------------------------ GeoJSON


def geojson(answers):
    """(FeatureCollection of RFC 7946, number of hits without a footprint, which are not in it).

    Degrees WGS84. A footprint across the antimeridian is a MultiPolygon of its two sides. Raises
    ValueError where there are hits but no footprint, and for a footprint that is none.
    """
    features = []
    without = 0
    for answer in answers:
        name = query_name(answer["query"])
        for hit in answer["hits"]:
            if hit["footprint"] is None:
                without += 1
            else:
                features.append(_feature(name, hit))
    if without and not features:
        raise ValueError(f"none of the {without} hits has a footprint: the images have no crs")
    return {"type": "FeatureCollection", "features": features}, without


def _feature(name, hit):
    try:
        outlines = rings(hit["footprint"])
    except ValueError as error:
        raise ValueError(f"{escaped(hit['path'])}: footprint: {error}") from None
    if len(outlines) == 1:
        geometry = {"type": "Polygon", "coordinates": outlines}
    else:
        geometry = {"type": "MultiPolygon", "coordinates": [[outline] for outline in outlines]}
    properties = {
        "rank": hit["rank"],
        "score": hit["score"],
        "pixels": hit["pixels"],
        "objects": hit["objects"],
        "path": hit["path"],
        "window": hit["window"],
        "query": name,
        "counts": hit["counts"],
    }
    return {"type": "Feature", "geometry": geometry, "properties": properties}


def write_geojson(path, answers):
    """Write `geojson` in ASCII; returns the number of hits without a footprint.

    `<` is escaped too, so that the text can stand in a page. Raises ValueError for a number that is
    not finite, which JSON cannot hold.
    """
    collection, without = geojson(answers)
    text = json.dumps(collection, allow_nan=False).replace("<", "\\u003c")
    write_text(path, text + "\n")
    return without
