"""Answers on the terminal, in spreadsheets and on maps; texts that would be more than texts."""

import csv
import json

import pytest

from gallery.output import geojson, query_name, table_lines, write_csv_rows, write_geojson

SQUARE = [[1, 5], [4, 5], [4, 3], [1, 3]]
RING = [[1, 5], [1, 3], [4, 3], [4, 5], [1, 5]]
EVIL = '<script>alert("1")</script>\n\x1b[2J'


def hit(rank=1, path="a/b.tif", footprint=SQUARE, boxes=(), **others):
    """A hit of a query; score 0.41 of pixels 0.3 and objects 0.11."""
    own = {
        "rank": rank,
        "score": 0.41,
        "pixels": 0.3,
        "objects": 0.11,
        "id": f"{path}#0,256,64,32",
        "path": path,
        "window": [0, 256, 64, 32],
        "counts": {"airplane": 2, "ship": 1},
        "boxes": [
            {"label": label, "box": [9, 9, 4, 2, 0.5], "matters": matters}
            for label, matters in boxes
        ],
        "statements": [],
        "note": None,
        "lat": None if footprint is None else 4.0,
        "lon": None if footprint is None else 2.5,
        "footprint": footprint,
    }
    return {**own, **others}


def answer(*hits, text="two planes", **others):
    query = {"text": text, "image": None, "not": None, "where": None}
    own = {"query": query, "searched": 2100, "pixels_only": [], "fits": True, "exact": True}
    return {**own, "hits": list(hits), **others}


def test_a_query_has_a_name():
    query = {"text": "planes", "image": "a.tif", "not": "snow", "where": "ship = 0"}
    assert query_name(query) == "planes + a.tif without snow where ship = 0"
    assert query_name({"text": None, "image": None, "not": None, "where": None}) == "a vector"


# ------------------------------------------------------------------ terminal


def test_hits_are_lines_with_the_objects_that_matter_most():
    boxes = [("airplane", 0.05), ("storage tank", 0.004), ("ship", -0.01), ("ship", -0.02)]
    lines = table_lines(answer(hit(boxes=boxes), hit(rank=10, path="c.png", score=-0.0625)))
    assert lines == [
        "rank   score  pixels  objects  tile                 what matters",
        "   1   0.410   0.300    0.110  a/b.tif#0,256,64,32  "
        "airplane +0.050, storage tank +0.004, ship -0.010, 1 more",
        "  10  -0.062   0.300    0.110  c.png#0,256,64,32",
        "2,100 tiles searched exactly",
    ]


def test_what_there_is_to_say_of_an_answer_follows():
    given = answer(pixels_only=["runway", "\x1b[2J"], fits=False, exact=False)
    assert table_lines(given) == [
        "no tile found",
        "perhaps nothing fits: most other queries have a better best tile",
        "matched by pixels only: runway, \\x1b[2J",
        "2,100 tiles searched by the vector index, which may miss some",
    ]


def test_names_cannot_move_or_colour_the_terminal():
    [_, line, _] = table_lines(answer(hit(path=EVIL, boxes=[("\x1b[31m", 0.5)])))
    assert '<script>alert("1")</script>\\n\\x1b[2J#0,256,64,32' in line
    assert "\\x1b[31m +0.500" in line and line.isprintable()


# ------------------------------------------------------------------ CSV


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_csv_has_a_row_for_each_hit(tmp_path):
    first = hit(boxes=[("airplane", 0.05), ("ship", -0.01)])
    write_csv_rows(tmp_path / "a.csv", [answer(first), answer(hit(footprint=None), text="ships")])
    whole, other = rows_of(tmp_path / "a.csv")
    assert whole == {
        "query": "two planes",
        "rank": "1",
        "score": "0.41",
        "pixels": "0.3",
        "objects": "0.11",
        "path": "a/b.tif",
        "left": "0",
        "top": "256",
        "width": "64",
        "height": "32",
        "counts": "2 airplane, 1 ship",
        "matters": "airplane +0.050, ship -0.010",
        "lat": "4.0",
        "lon": "2.5",
    }
    assert (other["query"], other["lat"], other["matters"]) == ("ships", "", "")


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("=1+1", "'=1+1"),
        ("+1.tif", "'+1.tif"),
        ("-1.tif", "'-1.tif"),
        ("@SUM(A1)", "'@SUM(A1)"),
        (EVIL, EVIL),
        ('a,"b"\r\nc', 'a,"b"\r\nc'),
        ("\ud800.tif", "\\ud800.tif"),
    ],
)
def test_texts_in_csv_stay_in_their_cell_and_are_no_formula(tmp_path, text, cell):
    write_csv_rows(tmp_path / "a.csv", [answer(hit(path=text), text=text)])
    [row] = rows_of(tmp_path / "a.csv")
    assert (row["path"], row["query"]) == (cell, cell)


# ------------------------------------------------------------------ GeoJSON


def test_geojson_has_footprints_and_what_was_found(tmp_path):
    assert write_geojson(tmp_path / "a.geojson", [answer(hit(), hit(footprint=None))]) == 1
    content = json.loads((tmp_path / "a.geojson").read_text(encoding="ascii"))
    [feature] = content["features"]
    assert content["type"] == "FeatureCollection" and feature["type"] == "Feature"
    assert feature["geometry"] == {"type": "Polygon", "coordinates": [RING]}
    assert feature["properties"] == {
        "rank": 1,
        "score": 0.41,
        "pixels": 0.3,
        "objects": 0.11,
        "path": "a/b.tif",
        "window": [0, 256, 64, 32],
        "query": "two planes",
        "counts": {"airplane": 2, "ship": 1},
    }


def test_a_footprint_across_the_antimeridian_has_two_sides():
    across = [[179, 2], [-179, 2], [-179, 0], [179, 0]]
    collection, without = geojson([answer(hit(footprint=across))])
    [feature] = collection["features"]
    assert without == 0 and feature["geometry"]["type"] == "MultiPolygon"
    [[west], [east]] = feature["geometry"]["coordinates"]
    assert {lon for lon, _ in west} == {179, 180} and {lon for lon, _ in east} == {-180, -179}


@pytest.mark.parametrize("text", [EVIL, "Häfen\u2028", "\ud800.tif"])
def test_texts_in_geojson_are_ascii_and_no_mark_up(tmp_path, text):
    write_geojson(tmp_path / "a.geojson", [answer(hit(path=text, counts={text: 1}), text=text)])
    written = (tmp_path / "a.geojson").read_text(encoding="ascii")
    assert "<" not in written and written.count("\n") == 1
    properties = json.loads(written)["features"][0]["properties"]
    assert (properties["path"], properties["query"], properties["counts"]) == (
        text,
        text,
        {text: 1},
    )


def test_no_hits_are_an_empty_collection():
    assert geojson([answer()]) == ({"type": "FeatureCollection", "features": []}, 0)


@pytest.mark.parametrize(
    ("hits", "problem"),
    [
        ([hit(footprint=None)] * 2, "none of the 2 hits has a footprint: the images have no crs"),
        ([hit(footprint=[[0, 99]] * 4)], "^a/b.tif: footprint: longitude 0.0, latitude 99.0"),
        ([hit(score=float("nan"))], "not JSON compliant"),
    ],
)
def test_what_geojson_cannot_hold_is_refused_and_nothing_written(tmp_path, hits, problem):
    with pytest.raises(ValueError, match=problem):
        write_geojson(tmp_path / "a.geojson", [answer(*hits)])
    assert not list(tmp_path.iterdir())
