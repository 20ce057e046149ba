"""The page of a search, parsed as a browser would."""

import io
import re

import numpy as np
import pytest
from PIL import Image

from gallery.footprint_map import footprint_map
from gallery.report import SIDE, report, write_report
from test_page import EVIL, Page, assert_needs_no_other, images_of


def hit(rank=1, **changes):
    """A hit with one box, as it stands in an answer."""
    return {
        "rank": rank,
        "score": 0.5,
        "pixels": 0.3,
        "objects": 0.2,
        "path": f"{rank}.tif",
        "window": [0, 0, 100, 80],
        "counts": {"ship": 1},
        "boxes": [{"label": "ship", "box": [20, 15, 30, 20, 0], "matters": 0.05}],
        "statements": [],
        "lat": None,
        "lon": None,
        "footprint": None,
        **changes,
    }


def answer(hits=(), text="two ships", **changes):
    query = {"text": text, "image": None, "not": None, "where": None}
    query |= {name: changes.pop(name) for name in [*changes] if name in ("image", "not", "where")}
    return {
        "query": query,
        "searched": 2100,
        "pixels_only": [],
        "fits": True,
        "exact": True,
        "hits": list(hits),
        **changes,
    }


def draw(path, window):
    return f"{path} {window}".encode(errors="replace")


def square(longitude, latitude, side):
    """A footprint by its upper left corner."""
    right, below = longitude + side, latitude - side
    return [[longitude, latitude], [right, latitude], [right, below], [longitude, below]]


# ------------------------------------------------------------------ queries


def test_a_report_shows_what_was_asked_and_searched():
    asked = answer([hit()], where="ship >= 2", pixels_only=["runway", "fog"])
    other = answer(
        [], text=None, image="a/b.png", searched=1, exact=False, fits=False, **{"not": "sea"}
    )
    text = report([asked, other], draw)
    assert_needs_no_other(text)
    parsed = Page(text)
    assert parsed.texts("title")[0] == "Search report" and "2 queries, 1 hit." in text
    assert parsed.texts("h2") == ["Contents", "two ships", "like a/b.png"]
    assert [a["href"] for _, a, _ in parsed.all("a")][1:3] == ["#query-1", "#query-2"]
    terms, words = parsed.texts("dt"), parsed.texts("dd")
    assert list(zip(terms, words, strict=True)) == [
        ("searched", "2,100 tiles, all compared"),
        ("where", "ship >= 2"),
        ("searched", "1 tile, by the approximate index"),
        ("not", "sea"),
    ]
    notes = [
        "matched by pixels only: runway, fog",
        "Perhaps nothing fits: most other queries have a better best tile.",
    ]
    assert parsed.texts("p", "note") == notes


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"searched": 0, "fits": False}, "No tile passes the filters."),
        (
            {"fits": False, "hits": [hit()]},
            "Perhaps nothing fits: most other queries have a better best tile.",
        ),
    ],
)
def test_a_query_without_a_fit_says_so(changes, note):
    assert Page(report([answer(**changes)], draw)).texts("p", "note") == [note]


def test_the_page_of_one_query_has_its_name():
    assert Page(report([answer()], draw)).texts("title")[0] == "two ships"
    assert Page(report([], draw)).texts("title")[0] == "Search report"


# ------------------------------------------------------------------ hits


def test_a_hit_shows_where_and_why():
    boxes = [
        {"label": label, "box": [20, 15, 30, 20, 0], "matters": matters}
        for label, matters in [("a", 0.01), ("b", 0.04), ("c", -0.02), ("d", 0.03), ("e", 0.02)]
    ]
    statements = [
        {"statement": "2 ship", "evidence": 0.0625},
        {"statement": "ship near harbor", "evidence": -0.04},
        {"statement": "1 bridge", "evidence": 0},
    ]
    shown = hit(
        window=[512, 256, 100, 80],
        counts={"ship": 2, "storage tank": 1},
        boxes=boxes,
        statements=statements,
        lat=-33.5,
        lon=151.25,
    )
    text = report([answer([shown])], draw)
    parsed = Page(text)
    assert images_of(parsed) == [b"1.tif (512, 256, 100, 80)"]
    assert parsed.texts("h3") == ["11.tif"]
    assert parsed.texts("p", "score") == ["0.5000.300 pixels + 0.200 objects"]
    small = parsed.texts("p", "small")
    assert "2 × ship, 1 × storage tank" in small
    assert "33.5000° S 151.2500° E100 × 80 pixels at 512, 256" in small
    # Three matter most; the others are drawn below them.
    first, *rest = parsed.texts("ol", "evidence"), *parsed.texts("ul", "evidence")
    assert first == ["1b−0.0402d−0.0303e−0.020"]
    assert rest == ["2 ship+0.062", "ship near harbor−0.040", "1 bridge+0.000"]
    kinds = [attributes["class"] for _, attributes, _ in parsed.all("polygon")]
    assert kinds == ["other", "other", "main", "main", "main"]
    assert parsed.texts("span", "label")[:1] == ["1"]


def test_objects_that_do_not_matter_are_not_emphasised():
    box = {"label": "ship", "box": [20, 15, 30, 20, 0], "matters": 0}
    parsed = Page(report([answer([hit(boxes=[box])])], draw))
    assert [a["class"] for _, a, _ in parsed.all("polygon")] == ["other"]
    assert not parsed.all("ol", "evidence") and not parsed.all("span", "label")


@pytest.mark.parametrize(
    ("shares", "bars"),
    [
        # The best hit reaches 0.5, so 0.1 is 20 percent.
        ((0.3, 0.1), [("pixels", None, "60.0"), ("objects", "60.0", "20.0")]),
        ((0.3, -0.1), [("pixels", None, "40.0"), ("lost", "40.0", "20.0")]),
        ((-0.1, 0.3), [("pixels", None, "0.0"), ("objects", "0.0", "40.0")]),
        ((-0.1, -0.1), [("pixels", None, "0.0"), ("objects", "0.0", "0.0")]),
    ],
)
def test_bars_show_the_shares_of_pixels_and_objects(shares, bars):
    pixels, objects = shares
    second = hit(2, score=pixels + objects, pixels=pixels, objects=objects)
    parsed = Page(report([answer([hit(), second])], draw))
    rectangles = [attributes for _, attributes, _ in parsed.all("rect")]
    assert [rectangle["class"] for rectangle in rectangles[:3]] == ["whole", "pixels", "objects"]
    found = [(part["class"], part.get("x"), part["width"]) for part in rectangles[4:]]
    assert found == bars


def test_names_in_an_answer_are_text():
    evil = f"{EVIL}\n\udcff"
    shown = hit(
        path=evil,
        counts={evil: 1},
        boxes=[{"label": evil, "box": [20, 15, 30, 20, 0], "matters": 1}],
        statements=[{"statement": evil, "evidence": 1}],
        footprint=square(1, 1, 1),
    )
    asked = answer([shown], text=evil, image=evil, where=evil, pixels_only=[evil], **{"not": evil})
    text = report([asked], draw)
    assert_needs_no_other(text)
    assert EVIL not in text
    text.encode()  # no surrogate is left
    parsed = Page(text)
    assert parsed.texts("h3") == [rf"1{EVIL}\n\udcff"]
    assert parsed.all("img")[0][1]["alt"] == rf"hit 1: {EVIL}\n\udcff"
    assert parsed.texts("dd")[1:] == [rf"{EVIL} \udcff"] * 2


def test_a_tile_that_is_not_readable_is_named_in_its_place():
    def refuse(path, window):
        raise ValueError(f"{path}: no such image {EVIL}")

    parsed = Page(report([answer([hit()])], refuse))
    assert parsed.texts("p", "missing") == [f"No picture: 1.tif: no such image {EVIL}"]
    assert parsed.texts("p", "score")


def test_tiles_are_asked_for_once_and_shown_small(tmp_path):
    asked = []

    def picture(path, window):
        asked.append((path, window))
        return Image.new("RGBA", (640, 512), "red")

    write_report(tmp_path / "new" / "r.html", [answer([hit()]), answer([hit()])], picture)
    assert asked == [("1.tif", (0, 0, 100, 80))]
    text = (tmp_path / "new" / "r.html").read_text(encoding="utf-8")
    first, second = images_of(Page(text))
    assert first == second
    with Image.open(io.BytesIO(first)) as image:
        assert image.size == (SIDE, 256)
        assert np.abs(np.asarray(image).astype(int) - (254, 0, 0)).max() <= 2


# ------------------------------------------------------------------ the map


def outlines(text):
    """The polygons of a map, the first hit's last, as arrays (4, 2)."""
    points = re.findall(r'<polygon points="([^"]*)"', text)
    return [np.array([p.split(",") for p in one.split()], dtype=float) for one in points]


def test_a_map_shows_footprints_in_proportion():
    # At 60 degrees north a degree of longitude is half as long as one of latitude.
    hits = [hit(1, footprint=square(10, 60.5, 1)), hit(2), hit(3, footprint=square(11, 60.5, 1))]
    text = footprint_map(hits, "query-1")
    third, first = outlines(text)
    width, height = np.ptp(first, axis=0)
    assert height == pytest.approx(2 * width, rel=1e-2)
    assert third[0].tolist() == first[1].tolist()  # they share a side
    assert first[0, 1] < first[3, 1]  # north is up
    parsed = Page(text)
    links = [(a["id"], a["href"]) for _, a, _ in parsed.all("a")]
    assert links[1] == ("map-query-1-hit-1", "#query-1-hit-1")
    assert parsed.all("svg")[0][1]["aria-label"] == "Map of the footprints of 2 of 3 hits"
    assert parsed.texts("title") == ["3: 3.tif", "1: 1.tif"]
    words = parsed.texts("text")
    assert {"1", "3", "60.0° N", "10° E", "11° E", "12° E"} <= set(words)


def test_the_scale_bar_is_a_round_distance():
    [outline] = outlines(footprint_map([hit(footprint=square(0, 0.005, 0.01))], "q"))
    text = footprint_map([hit(footprint=square(0, 0.005, 0.01))], "q")
    # The footprint is 0.01 degrees wide: 1113.2 m.
    length = float(re.search(r'class="scale" d="M62 [\d.]+v6M62 [\d.]+h([\d.]+)', text)[1])
    metres = int(re.search(r">(\d+) m</text>", text)[1])
    assert metres in (100, 200, 500)
    assert length / np.ptp(outline[:, 0]) == pytest.approx(metres / 1113.2, rel=1e-2)


def test_small_footprints_are_dots_and_the_date_line_is_no_jump():
    hits = [hit(1, footprint=square(179.5, 0, 0.01)), hit(2, footprint=square(-179.5, 0, 0.01))]
    text = footprint_map(hits, "q")
    second, first = [float(x) for x in re.findall(r'<circle cx="([\d.]+)"', text)]
    assert 100 < second - first < 300
    assert "179.6° W" in text or "179.5° W" in text


def test_one_point_is_a_map_and_none_is_none():
    assert "<circle" in footprint_map([hit(footprint=square(5, 5, 0))], "q")
    assert footprint_map([hit()], "q") == ""
