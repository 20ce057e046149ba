"""The page parsed as a browser would, its pictures by their pixels."""

import base64
import io
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from conftest import box, write_detections, write_image
from metrics.page import LARGE, SMALL, page, picture, write_page
from test_tables import query, result

VOID = {"meta", "img"}


class Page(HTMLParser):
    """The elements of a page: (tag, attributes, text) of each; fails on tags out of balance."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements = [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append([tag, dict(attributes), ""])
        if tag not in VOID:
            self.open.append(self.elements[-1])

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for element in self.open:
            element[2] += data

    def all(self, tag, kind=None):
        return [e for e in self.elements if e[0] == tag and kind in (None, e[1].get("class"))]


EVIL = "<script>alert(\"x\")</script> & 'ships'"


def images_of(parsed):
    """The bytes of a page's pictures."""
    sources = [attributes["src"] for _, attributes, _ in parsed.all("img")]
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    return [base64.b64decode(source.partition(",")[2], validate=True) for source in sources]


def test_the_page_shows_queries_with_their_items_and_needs_no_other_file():
    pictures = [
        {"image": 2, "score": 0.75, "own": False},
        {"image": 0, "score": 0.5, "own": True},
        {"image": 1, "score": 0.25, "own": False},
    ]
    captions = [
        {"caption": "a plane", "times": 3, "score": 0.7, "own": False},
        {"caption": EVIL, "times": 1, "score": 0.6, "own": True},
    ]
    chosen = {
        ("text_to_image", "worst"): [query("text_to_image", 0, EVIL, pictures)],
        ("text_to_image", "best"): [],
        ("image_to_text", "best"): [query("image_to_text", 3, EVIL, captions, pessimistic=2)],
    }

    def draw(number, side):
        return f"{number} {side}".encode()

    text = page({**result(), "dataset": "<i>"}, chosen, draw)
    parsed = Page(text)
    assert not {"script", "link", "a", "iframe", "i"} & {e[0] for e in parsed.elements}
    assert "http" not in text and "@import" not in text and "url(" not in text
    assert EVIL not in text
    assert parsed.all("title")[0][2] == "<i> test"
    assert "mR 50.0, 95 % interval 48.0 to 53.0" in parsed.all("pre")[0][2]
    about, *captions = [e[2] for e in parsed.all("p")]
    assert "models/best_model.pth, trained on mini, epoch 3, graph object." in about
    assert captions == [EVIL, f"best own caption: {EVIL}"]
    heads = ["text to image: the 1 worst", "text to image: the 0 best", "image to text: the 1 best"]
    assert [e[2] for e in parsed.all("h2")] == heads
    ranks = ["rank 2.333, ties: 2 to 3, score 0.250", "rank 2.333, score 0.250"]
    assert [e[2] for e in parsed.all("h3")] == ranks
    assert [e[2] for e in parsed.all("figure", "own")] == ["2. 0.500 own a.png"]
    others = [e[2] for e in parsed.all("figure", "other")]
    assert others == ["a.png", "1. 0.750 c.png", "3. 0.250 b.png", "d.png"]
    assert [e[2] for e in parsed.all("li", "own")] == [f"0.600 own {EVIL}"]
    assert [e[2] for e in parsed.all("li", "other")] == ["0.700 a plane (3 times)"]
    # A large picture of the query's image, small ones of its items.
    expected = [(0, LARGE), (2, SMALL), (0, SMALL), (1, SMALL), (3, LARGE)]
    assert images_of(parsed) == [f"{number} {side}".encode() for number, side in expected]


@pytest.mark.parametrize("size", [(300, 200), (20, 60), (1000, 1)])
def test_pictures_have_a_limited_size(tmp_path, size):
    path = write_image(tmp_path / "a.png", size)
    for side in (LARGE, SMALL):
        with Image.open(io.BytesIO(picture(path, None, side))) as image:
            assert max(image.size) == side and image.format == "JPEG"
            shorter = max(1, side * min(size) / max(size))
            assert min(image.size) == pytest.approx(shorter, abs=1)
            assert image.size.index(side) == size.index(max(size))


def test_objects_are_drawn_where_they_are(tmp_path):
    path = write_image(tmp_path / "a.png", (100, 50), value=90)
    file = write_detections(tmp_path / "a.json", [box(20, 15, 30, 20)], label="ship")

    def drawn(detections):
        with Image.open(io.BytesIO(picture(path, detections, LARGE))) as image:
            return np.asarray(image).astype(int)

    changed = np.abs(drawn(file) - drawn(None)).max(axis=2) > 60
    rows, columns = np.nonzero(changed)
    scale = LARGE / 100
    # The box reaches from 5 to 35 and from 5 to 25; its label stands above its left side.
    ends = (columns.min(), columns.max(), rows.max())
    assert ends == pytest.approx((5 * scale, 35 * scale, 25 * scale), abs=4)
    above, top = changed[: round(5 * scale) - 2], changed[round(5 * scale) - 1 :][:4]
    assert above[:, :80].any() and not above[:, 100:].any()
    assert top[:, 30:150].any(axis=0).all()


def test_pictures_on_the_page_are_the_images_with_their_own_detections(tmp_path):
    files = [write_image(tmp_path / f"{i}.png", (40, 30), value=60 * i) for i in range(4)]
    detections = [write_detections(tmp_path / "0.json", [box(20, 15)]), None, None, None]
    items = [{"image": i, "score": 0.1, "own": i == 0} for i in (3, 0)]
    chosen = {("text_to_image", "worst"): [query("text_to_image", 0, "x", items)]}
    write_page(tmp_path / "p.html", result(), chosen, files, detections)
    shown = Page((tmp_path / "p.html").read_text(encoding="utf-8"))
    expected = [(0, LARGE), (3, SMALL), (0, SMALL)]
    assert images_of(shown) == [picture(files[i], detections[i], side) for i, side in expected]
