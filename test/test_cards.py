"""Hits as cards of a page: what stands there, escaped, and where boxes and numbers lie."""

import base64
import re

import pytest
from PIL import Image

from gallery import cards

EVIL = "<script>alert('1')</script>\"&\x1b.png"
SAFE = "&lt;script&gt;alert(&#x27;1&#x27;)&lt;/script&gt;&quot;&amp;\\x1b.png"


class Pictures:
    """Stands for a Search: pictures alone."""

    def picture(self, path, window):
        if path == "gone.png":
            raise ValueError("gone.png: no such image")
        return Image.new("RGB", (100, 50))


def hit(path="a.png", boxes=(), **changes):
    """A hit of a tile of 100 x 50 pixels; boxes: (label, box, matters)."""
    found = [{"label": label, "box": box, "matters": matters} for label, box, matters in boxes]
    return {
        "rank": 1,
        "score": 0.5,
        "pixels": 0.3,
        "objects": 0.2,
        "id": path,
        "path": path,
        "window": [0, 0, 100, 50],
        "counts": {},
        "boxes": found,
        "statements": [],
        "lat": None,
        "lon": None,
        "footprint": None,
        **changes,
    }


def shown(*hits, thumbnail="", text="two ships", image=None, wanted_not=None, **changes):
    answer = {
        "query": {"text": text, "image": image, "not": wanted_not},
        "searched": 7,
        "exact": True,
        "pixels_only": [],
        "fits": True,
        "hits": list(hits),
        **changes,
    }
    return cards.results(Pictures(), answer, thumbnail)


def file_of(html, name):
    """The text of a file that a page holds as a link."""
    content = re.search(f'download="{name}" href="data:[^,]*;base64,([^"]*)"', html).group(1)
    return base64.b64decode(content).decode()


def test_texts_and_names_are_escaped():
    box = (EVIL, [50, 25, 10, 10, 0], 0.1)
    statements = [{"statement": EVIL, "evidence": 0.1}]
    one = hit(EVIL, [box], id="a", counts={EVIL: 1}, statements=statements)
    html = shown(one, text=EVIL, image=EVIL, wanted_not=EVIL, pixels_only=[EVIL])
    assert "<script" not in html and "\x1b" not in html
    # Sentence, image, not, pixels only; label of the card, name, count, object, statement.
    assert html.count(SAFE) == 9
    assert "<script" not in cards.mistake(EVIL) and SAFE in cards.mistake(EVIL)


def test_the_tile_of_a_button_is_its_id_as_it_is():
    button = re.search('data-tile="([^"]*)"', shown(hit('a".png'))).group(1)
    assert button == "a&quot;.png"


def test_boxes_that_matter_most_are_numbered_and_drawn_last():
    boxes = [
        ("ship", [50, 25, 20, 10, 0], 0.1),  # corners (40, 20) to (60, 30)
        ("ship", [10, 10, 4, 4, 0], -0.2),
        ("ship", [70, 25, 20, 10, 0], 0.3),
        ("ship", [30, 25, 20, 10, 0], 0.2),
        ("ship", [80, 40, 4, 4, 0], 0.05),  # the fourth
    ]
    html = shown(hit(boxes=boxes))
    assert re.findall('<polygon class="(.*?)"', html) == ["other"] * 2 + ["main"] * 3
    first = re.findall('class="main" points="(.*?)"', html)[0]
    assert first == "60.0,20.0 80.0,20.0 80.0,30.0 60.0,30.0"
    assert re.findall("<text.*?>(.)</text>", html) == ["1", "2", "3"]
    assert [float(x) for x in re.findall('<circle.*?cx="(.*?)"', html)] == [60, 20, 40]
    assert re.findall('class="figure">(−.*?)<', html) == ["−0.300", "−0.200", "−0.100"]


def test_a_number_stays_in_the_tile():
    html = shown(hit(boxes=[("ship", [0, 0, 40, 40, 0], 0.1)]))
    # Its size is 100 / 16 = 6.25 pixels, so its centre is 3.125 from both borders.
    assert 'cx="3.1" cy="3.1" r="3.1"' in html


@pytest.mark.parametrize(
    ("changes", "start", "kind", "width"),
    [
        ({}, "60.0", "objects", "40.0"),  # 0.3 and 0.2 of 0.5
        ({"score": 0.2, "objects": -0.1}, "66.7", "lost", "33.3"),  # 0.2 and 0.1 of 0.3
        ({"score": -0.2, "pixels": -0.1}, "0.0", "objects", "0.0"),
    ],
)
def test_a_bar_has_what_pixels_and_objects_give(changes, start, kind, width):
    html = shown(hit(**changes))
    assert f'class="pixels" width="{start}"' in html
    assert f'class="{kind}" x="{start}" width="{width}"' in html


@pytest.mark.parametrize(
    ("hits", "changes", "note"),
    [
        (1, {"pixels_only": ["runway"]}, "Matched by pixels only, no object has this name: <b>run"),
        (
            1,
            {"fits": False},
            "Perhaps nothing fits: most other queries have a better best tile.",
        ),
        (0, {"searched": 0}, "No tile passes the filter."),
        (0, {}, "No other tile passes the filter."),
        (1, {"searched": 1}, ">1 tile searched;"),
        (1, {"searched": 2100}, ">2,100 tiles searched;"),
    ],
)
def test_what_there_is_to_say_of_an_answer_stands_above_it(hits, changes, note):
    assert note in shown(*[hit()] * hits, **changes)


def test_hits_are_in_the_page_as_files():
    corners = [[8, 48], [9, 48], [9, 47], [8, 47]]
    html = shown(hit("a.png", footprint=corners, lat=47.5, lon=8.5), hit("b.png"))
    lines = file_of(html, "hits.csv").splitlines()
    assert len(lines) == 3 and "a.png" in lines[1] and "b.png" in lines[2]
    assert '"path": "a.png"' in file_of(html, "hits.geojson")
    assert "latitude 47.50000, longitude 8.50000" in html


def test_without_places_there_is_no_geojson_and_without_hits_no_file():
    html = shown(hit())
    assert "no places, so no GeoJSON" in html and "hits.geojson" not in html
    assert "download" not in shown()


def test_a_picture_that_is_gone_is_a_line():
    assert "No picture: gone.png: no such image" in shown(hit("gone.png"))


def test_a_picture_is_made_smaller_and_keeps_its_shape():
    html = cards.picture(Image.new("L", (1000, 500)), 100, 'a "tile"')
    assert 'width="1000" height="500"' in html and 'alt="a &quot;tile&quot;"' in html
    content = base64.b64decode(re.search('base64,([^"]*)', html).group(1))
    assert content.startswith(b"\xff\xd8") and len(content) < 3000
