"""The page of evaluate.py, parsed as a browser would."""

import io

import numpy as np
from PIL import Image

from conftest import box, write_detections, write_image
from metrics.page import jpeg
from metrics.result_page import LARGE, SMALL, Drawn, page, write_page
from test_page import EVIL, Page, assert_needs_no_other, images_of
from test_tables import query, result


def chosen_queries():
    """Queries of both directions, with hostile captions."""
    pictures = [
        {"image": 2, "score": 0.75, "own": False},
        {"image": 0, "score": 0.5, "own": True},
        {"image": 1, "score": 0.25, "own": False},
    ]
    captions = [
        {"caption": "a plane", "times": 3, "score": 0.7, "own": False},
        {"caption": EVIL, "times": 1, "score": 0.6, "own": True},
    ]
    return {
        ("text_to_image", "worst"): [query("text_to_image", 0, EVIL, pictures)],
        ("text_to_image", "best"): [],
        ("image_to_text", "best"): [query("image_to_text", 3, EVIL, captions, pessimistic=2)],
    }


def draw(number, side):
    detections = [{"label": label, "bbox": box(20, 15)} for label in ("ship", EVIL, "ship")]
    return Drawn(f"{number} {side}".encode(), (40, 30), detections if number == 2 else [])


def test_the_page_shows_queries_with_their_items():
    text = page(
        {**result(), "dataset": "<i>", "images": 4, "captions": 1050}, chosen_queries(), draw
    )
    assert_needs_no_other(text)
    parsed = Page(text)
    assert EVIL not in text and not parsed.all("i")
    assert parsed.texts("title")[0] == "<i> test"
    assert "mR 50.0, 95 % interval 48.0 to 53.0" in parsed.texts("pre")[0]
    assert "models/best_model.pth, trained on mini, epoch 3, graph object." in text
    assert parsed.texts("p", "said") == [EVIL, f"best own caption: {EVIL}"]
    heads = ["text to image: the 1 worst", "text to image: the 0 best", "image to text: the 1 best"]
    assert parsed.texts("h2") == ["Contents", *heads]
    ranks = [
        "rank 2.333 of 4 images, ties: 2 to 3, score 0.250",
        "rank 2.333 of 1,050 captions, score 0.250",
    ]
    assert parsed.texts("h3") == ranks
    legend = f"1 × {EVIL}2 × ship"
    captions = ["a.png", f"1. 0.750 c.png{legend}", "2. 0.500 owna.png", "3. 0.250 b.png", "d.png"]
    assert parsed.texts("figcaption") == captions
    assert parsed.texts("li", "own") == ["2. 0.500 owna.png", f"0.600own{EVIL}"]
    assert parsed.texts("li", "other")[-1] == "0.700a plane (3 times)"
    # A large picture of the query's image, small ones of its items.
    expected = [(0, LARGE), (2, SMALL), (0, SMALL), (1, SMALL), (3, LARGE)]
    assert images_of(parsed) == [f"{number} {side}".encode() for number, side in expected]
    # Boxes of a label and its swatch have one colour.
    kinds = [attributes["class"] for _, attributes, _ in parsed.all("polygon")]
    assert kinds == ["c1", "c0", "c1"]
    assert [a["class"] for _, a, _ in parsed.all("span", "swatch")] == ["swatch c0", "swatch c1"]


def test_the_list_of_contents_leads_to_every_query():
    parsed = Page(page(result(), chosen_queries(), draw))
    contents, *_ = parsed.all("nav")
    assert f"rank 2.333: {EVIL}" in contents[2] and "rank 2.333: d.png" in contents[2]
    targets = {a["href"] for _, a, _ in parsed.all("a")}
    queries = [a["id"] for _, a, _ in parsed.all("article", "stop")]
    assert queries == ["text-to-image-worst-1", "image-to-text-best-1"]
    assert {f"#{identifier}" for identifier in queries} <= targets


def test_large_pictures_have_labels_and_edges_small_ones_boxes_alone(tmp_path):
    files = [write_image(tmp_path / f"{i}.png", (448, 336), value=60 * i) for i in range(4)]
    boxes = [box(100, 100, 40, 40), box(300, 200, 40, 40)]
    detections = [write_detections(tmp_path / "0.json", boxes), None, None, None]
    items = [{"image": i, "score": 0.1, "own": i == 0} for i in (3, 0)]
    chosen = {("text_to_image", "worst"): [query("text_to_image", 0, "x", items)]}
    write_page(tmp_path / "p.html", result(), chosen, files, detections)
    parsed = Page((tmp_path / "p.html").read_text(encoding="utf-8"))
    assert parsed.texts("span", "label") == ["ship", "ship"]
    assert len(parsed.all("polygon")) == 4 and len(parsed.all("line")) == 0  # too far apart
    for content, number, side in zip(
        images_of(parsed), (0, 3, 0), (LARGE, SMALL, SMALL), strict=True
    ):
        with Image.open(files[number]) as image:
            assert content == jpeg(image, side)
        with Image.open(io.BytesIO(content)) as image:
            # Nothing is drawn into the picture itself.
            assert max(image.size) == side and np.ptp(np.asarray(image)) == 0
