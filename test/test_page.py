"""What pages share: text that stays text, a frame without requests, boxes where they are."""

import base64
import hashlib
import io
import math
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from metrics.page import Mark, contents, document, jpeg, picture, sentence, shown

VOID = {"meta", "link", "img", "input", "br"}
EVIL = "<script>alert(\"x\")</script> & 'ships'"


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

    def handle_startendtag(self, tag, attributes):
        self.elements.append([tag, dict(attributes), ""])

    def handle_data(self, data):
        for element in self.open:
            element[2] += data

    def all(self, tag, kind=None):
        """The elements of a tag, and of a class where one is given."""
        found = [element for element in self.elements if element[0] == tag]
        return [e for e in found if kind is None or kind in e[1].get("class", "").split()]

    def texts(self, tag, kind=None):
        return [text for _, _, text in self.all(tag, kind)]

    def identifiers(self):
        return [attributes["id"] for _, attributes, _ in self.elements if "id" in attributes]


def images_of(parsed):
    """The bytes of a page's pictures."""
    sources = [attributes["src"] for _, attributes, _ in parsed.all("img")]
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    return [base64.b64decode(source.partition(",")[2], validate=True) for source in sources]


def assert_needs_no_other(text):
    """A page names no other file, and has the one script that its policy allows."""
    assert not re.search(r"https?:|@import|url\(|<iframe|<base", text)
    parsed = Page(text)
    [script] = parsed.texts("script")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    [policy] = [a["content"] for _, a, _ in parsed.all("meta") if "http-equiv" in a]
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert f"script-src 'sha256-{digest}';" in policy
    targets = [a["href"] for _, a, _ in parsed.all("a")]
    assert {target.removeprefix("#") for target in targets} <= set(parsed.identifiers())
    assert len(set(parsed.identifiers())) == len(parsed.identifiers())


# ------------------------------------------------------------------ text


@pytest.mark.parametrize(
    ("name", "markup"),
    [
        ("<script>", "&lt;script&gt;"),
        ("</script>", "&lt;/script&gt;"),
        ("a&b \"c\" 'd'", "a&amp;b &quot;c&quot; &#x27;d&#x27;"),
        ("a\nb\x1b.png", r"a\nb\x1b.png"),
        ("a\udcff", r"a\udcff"),  # of a file name that is not UTF-8
        ("gpj.\u202ea", r"gpj.\u202ea"),  # would be read from right to left
        ("船 é", "船 é"),
    ],
)
def test_names_are_text(name, markup):
    assert shown(name) == markup


def test_white_space_of_sentences_is_one_space():
    assert sentence(" two\u00a0planes\n\tbeside <b> ") == "two planes beside &lt;b&gt;"


# ------------------------------------------------------------------ the frame


def test_a_page_needs_no_other_and_knows_phones_and_the_dark():
    links = [("one", "first <b>&</b>", [("two", "second")]), ("three", "third", ())]
    main = f'<h1 id="one">x</h1><p id="two"></p><p id="three"></p>{contents(links)}'
    text = document(EVIL, main, stop="hit", style=".a { top: 0 }", script="let a = 1;")
    assert_needs_no_other(text)
    parsed = Page(text)
    assert EVIL not in text and parsed.texts("title") == [EVIL]
    assert parsed.all("html")[0][1]["lang"] == "en"
    named = {a["name"]: a["content"] for _, a, _ in parsed.all("meta") if "name" in a}
    assert named["viewport"].startswith("width=device-width")
    assert named["color-scheme"] == "light dark"
    [style] = parsed.texts("style")
    assert ":root { color-scheme: light dark" in style and style.endswith(".a { top: 0 }")
    assert parsed.texts("script")[0].endswith("let a = 1;")
    [folded] = parsed.texts("details")[1:]  # after the keys
    assert folded == "first &second" and "next hit" in parsed.texts("details")[0]


# ------------------------------------------------------------------ pictures


@pytest.mark.parametrize(
    ("size", "small"), [((640, 320), (320, 160)), ((20, 60), (20, 60)), ((1000, 1), (320, 1))]
)
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L"])
def test_pictures_are_made_smaller_never_larger(size, small, mode):
    image = Image.new(mode, size)
    with Image.open(io.BytesIO(jpeg(image, 320))) as found:
        assert found.size == small and found.format == "JPEG"
    assert image.size == size


def test_boxes_are_outlines_in_pixels_of_the_image():
    # From 5 to 35 and from 5 to 25; then a square with a diagonal of 20, standing on its corner.
    marks = [
        Mark((20, 15, 30, 20, 0, 0.9), "ship", "c0"),
        Mark((50, 50, 200**0.5, 200**0.5, math.pi / 4), EVIL, "main"),
    ]
    text = picture(b"x", (100, 80), EVIL, 50, marks, [(20, 15, 50, 50, 0.5)])
    parsed = Page(text)
    [(_, image, _)] = parsed.all("img")
    assert (image["alt"], image["width"], image["height"]) == (EVIL, "100", "80")
    assert images_of(parsed) == [b"x"]
    assert parsed.all("div", "picture")[0][1]["style"] == "width: 50px"
    assert 'viewBox="0 0 100 80"' in text
    first, second = parsed.all("polygon")
    assert first[1] == {"class": "c0", "points": "5.0,5.0 35.0,5.0 35.0,25.0 5.0,25.0"}
    assert second[1]["points"] == "50.0,40.0 60.0,50.0 50.0,60.0 40.0,50.0"
    assert parsed.texts("title") == ["ship", EVIL]
    assert '<line x1="20.0" y1="15.0" x2="50.0" y2="50.0" opacity="0.50"/>' in text


def test_a_label_stands_above_its_box_in_the_size_of_the_page():
    # Shown twice as large: the box's corner is at (40, 60), the label 17 pixels above it.
    mark = Mark((50, 40, 60, 20, 0), "ship", "c0", label="<1>")
    text = picture(b"", (100, 80), "a", 200, [mark])
    [(_, attributes, words)] = Page(text).all("span", "label")
    assert words == "<1>"
    # 40 of 200 pixels; 60 - 17 = 43 of 160.
    assert attributes["style"] == "left: 20.0%; top: 26.9%"


def test_a_picture_without_objects_has_nothing_over_it():
    assert "svg" not in picture(b"", (4, 4), "a", 4)
