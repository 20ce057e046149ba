"""Tables by hand-made results, files read back, the page parsed as a browser would."""

import base64
import csv
import io
import json
import re
import statistics
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

import metrics.tables as report
from conftest import box, write_detections, write_image
from metrics import page
from metrics.intervals import compare
from training import curves

RECALLS = ("R@1", "R@5", "R@10")


def side(*values, mean_rank=9.0):
    """The figures of a direction, ties apart: three recalls, or one for all."""
    recalls = dict(zip(RECALLS, values if len(values) == 3 else values * 3, strict=True))
    bounds = {"pessimistic": dict(recalls), "optimistic": dict(recalls)}
    return {**recalls, "mean_rank": mean_rank, "median_rank": 5.0, **bounds}


def result(value=50.0, seed=0, dataset="mini", **options):
    """A result whose recalls are the value, and its table by image that of four images."""
    hits = {name: [value / 100] * 4 for name in RECALLS}
    return {
        "dataset": dataset,
        "split": "test",
        "checkpoint": f"{options.get('out', 'models')}/best_model.pth",
        "epoch": 3,
        "origin": "text lists in mini",
        "caption_equivalence": False,
        "data_options": {"graph_control": "own"},
        "training_options": {"seed": seed, "dataset": [dataset], "graph": "object", **options},
        "images": 4,
        "captions": 4,
        "distinct_texts": 3,
        "image_to_text": side(value),
        "text_to_image": side(value),
        "mR": value,
        "mR_pessimistic": value,
        "mR_optimistic": value,
        "intervals": {"mR": [value - 2.04, value + 3.0]},
        "per_image": {
            "names": ["a.png", "b.png", "c.png", "d.png"],
            "captions": [1] * 4,
            "image_to_text": hits,
            "text_to_image": hits,
        },
    }


# ------------------------------------------------------------------ tables


def test_one_result_is_a_table_of_its_figures():
    own = result(40.0)
    own["text_to_image"] = side(10.04, 20.0, 30.06, mean_rank=7.26)
    assert report.table([own]).splitlines() == [
        "mini test: 4 images, 4 captions (3 distinct)",
        "                   R@1    R@5   R@10   mean rank   median",
        "image to text     40.0   40.0   40.0         9.0      5.0",
        "text to image     10.0   20.0   30.1         7.3      5.0",
        "mR 40.0, 95 % interval 38.0 to 43.0",
    ]


@pytest.mark.parametrize(("gap", "shown"), [(0.0, False), (0.09, False), (0.11, True)])
@pytest.mark.parametrize("bound", ["pessimistic", "optimistic"])
def test_bounds_are_printed_where_they_differ_by_a_tenth(bound, gap, shown):
    sign = 1 if bound == "optimistic" else -1
    own = result(50.0)
    own["image_to_text"][bound]["R@5"] += sign * gap
    own[f"mR_{bound}"] += sign * gap
    low, high = sorted([50.0, 50.0 + sign * gap])
    lines = report.detailed(own).splitlines()
    ties = [line for line in lines if "ties" in line]
    assert len(ties) == (2 if shown else 0)
    if shown:
        assert ties[0].strip() == f"ties: R@5 between {low:.1f} and {high:.1f}"
        assert lines[-1].endswith(f"(ties: between {low:.1f} and {high:.1f})")
        several = report.table([own, result()]).splitlines()
        assert several[1].endswith(f"between {low:.1f} and {high:.1f}")
        assert several[2].endswith("]")


def cells(line):
    return re.split(r"  +", line)


def test_several_results_are_a_line_each_by_data_set():
    results = [
        result(value, dataset=dataset, out=out)
        for out, values in (("x", (40.0, 20.0)), ("much/longer", (50.0, 30.0)))
        for dataset, value in zip(("ucm", "rsicd"), values, strict=True)
    ]
    lines = report.table(results).splitlines()
    assert cells(lines[0])[:6] == ["checkpoint", "data set", "split", "images", "to text R@1"] + [
        "to text R@5"
    ]
    assert [cells(line)[:2] + cells(line)[-2:] for line in lines[1:]] == [
        ["x/best_model.pth", "ucm", "40.0", "40.0 [38.0, 43.0]"],
        ["much/longer/best_model.pth", "ucm", "50.0", "50.0 [48.0, 53.0]"],
        ["x/best_model.pth", "rsicd", "20.0", "20.0 [18.0, 23.0]"],
        ["much/longer/best_model.pth", "rsicd", "30.0", "30.0 [28.0, 33.0]"],
    ]
    ends = {line.index(" test ") for line in lines[1:]}
    assert len(ends) == 1  # columns stand below each other


def test_seeds_of_one_training_get_a_line_of_mean_and_deviation():
    values = (40.0, 44.0, 45.5)
    seeds = [result(v, seed, out=str(seed), plot=seed == 1) for seed, v in enumerate(values)]
    other = result(10.0, 0, fusion="gate")
    *_, last = lines = report.table([*seeds, other], free=("out", "plot")).splitlines()
    assert len(lines) == 1 + 4 + 1
    spread = f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"
    assert spread == "43.2 ± 2.8"
    assert cells(last) == ["mean ± standard deviation of 3", "mini", "test", "4"] + [spread] * 7
    *_, last = report.table([*seeds, other]).splitlines()  # as if the plot mattered
    assert last.startswith("mean ± standard deviation of 2")


def test_files_of_one_run_and_plain_clips_are_not_averaged():
    same = [result(40.0), result(50.0)]
    assert "±" not in report.table(same)
    assert "±" not in report.table([result(40.0, dataset="a"), result(40.0, 1, dataset="b")])


def test_comparisons_are_lines_for_people():
    a = [result(60.0, 0), result(50.0, 1)]
    b = [result(40.0, 0), result(32.6, 1)]
    assert report.comparison(compare(a, b)).splitlines() == [
        "mini test, 4 images, 2 and 2 runs: mR 55.0 - 36.3 = +18.7 [+18.7, +18.7]",
        *(
            f"  {name}: " + ", ".join(f"{k} +18.7 [+18.7, +18.7]" for k in RECALLS)
            for name in ("image to text", "text to image")
        ),
        "  seed 0: mR 60.0 - 40.0 = +20.0 [+20.0, +20.0]",
        "  seed 1: mR 50.0 - 32.6 = +17.4 [+17.4, +17.4]",
    ]


# ------------------------------------------------------------------ files


def test_result_files_are_json_with_lists_on_one_line(tmp_path):
    results = [result(), {**result(1.0), "left_out": None, "empty": {}, "none": [], "é": 'a"b'}]
    report.write_results(tmp_path / "r.json", "python evaluate.py --json r.json", results)
    text = (tmp_path / "r.json").read_text(encoding="utf-8")
    expected = {"command": "python evaluate.py --json r.json", "results": results}
    assert json.loads(text) == expected
    lines = text.splitlines()
    assert '    "names": ["a.png", "b.png", "c.png", "d.png"],' in lines
    assert lines.count('   "mR": 50.0,') == 1
    assert report.read_results(tmp_path / "r.json") == results


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"results": []}', '{"results": [{"mR": 1}]}', '{"mR": 3}']
)
def test_other_files_are_errors_that_name_them(tmp_path, content):
    (tmp_path / "old.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"old\.json: not a result file; .*evaluate\.py --json"):
        report.read_results(tmp_path / "old.json")


def query(direction, number, caption, items, **changes):
    """A query as of `ranks.query_rows`."""
    return {
        "direction": direction,
        "query": 0,
        "number": number,
        "image": f"{'abcd'[number]}.png",
        "caption": caption,
        "rank": 7 / 3,
        "optimistic": 2,
        "pessimistic": 3,
        "score": 0.25,
        "competitor": None,
        "competitor_score": None,
        "items": items,
        **changes,
    }


def test_ranks_are_a_table_of_queries(tmp_path):
    rows = [query("image_to_text", 1, 'a "ship", two', [], checkpoint="é", dataset="ucm")]
    rows += [query("text_to_image", 0, "x", [], competitor="c.png", competitor_score=0.1234567)]
    report.write_ranks(tmp_path / "r.csv", rows)
    with open(tmp_path / "r.csv", newline="", encoding="utf-8") as file:
        head, first, second = csv.reader(file)
    assert head == ["direction", "image", "caption", "rank", "optimistic", "pessimistic"] + [
        "score",
        "competitor",
        "competitor_score",
    ]
    assert first == ["image_to_text", "b.png", 'a "ship", two', "2.333333", "2", "3", "0.25"] + [
        "",
        "",
    ]
    assert second[-2:] == ["c.png", "0.123457"]
    report.write_ranks(tmp_path / "s.csv", rows[:1], ["checkpoint", "dataset"])
    with open(tmp_path / "s.csv", newline="", encoding="utf-8") as file:
        assert next(csv.DictReader(file))["checkpoint"] == "é"


def test_learning_curves_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    lines = [{"epoch": e, "loss": 1 / e, "val_mR": 10.0 * e} for e in (1, 2, 3)]
    curves.plot_log(lines, tmp_path / "new" / "curve.png")
    with Image.open(tmp_path / "new" / "curve.png") as image:
        pixels = np.asarray(image.convert("RGB"))
        assert image.format == "PNG"
    coloured = np.ptp(pixels.astype(int), axis=2).max(axis=1) > 60  # rows with a curve in them
    half = len(pixels) // 2
    assert coloured[:half].any() and coloured[half:].any()
    curves.plot_log(lines[:1], tmp_path / "one.png")
    with pytest.raises(ValueError, match="no epoch"):
        curves.plot_log([], tmp_path / "none.png")


def test_missing_matplotlib_is_an_error_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"curve\.png.*pip install matplotlib"):
        curves.plot_log([{"epoch": 1, "loss": 1.0, "val_mR": 1.0}], tmp_path / "curve.png")


# ------------------------------------------------------------------ the page

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


@pytest.fixture
def shown():
    """A page of one query in each direction, parsed, with its text."""
    pictures = [
        {"image": 2, "score": 0.75, "own": False},
        {"image": 0, "score": 0.5, "own": True},
        {"image": 1, "score": 0.25, "own": False},
    ]
    captions = [
        {"caption": "a plane", "rows": 3, "score": 0.7, "own": False},
        {"caption": EVIL, "rows": 1, "score": 0.6, "own": True},
    ]
    chosen = {
        ("text_to_image", "worst"): [query("text_to_image", 0, EVIL, pictures)],
        ("text_to_image", "best"): [],
        ("image_to_text", "best"): [query("image_to_text", 3, EVIL, captions, pessimistic=2)],
    }

    def draw(number, side):
        file = io.BytesIO()
        Image.new("RGB", (side, 10 + number), "red").save(file, "JPEG")
        return file.getvalue()

    text = page.page({**result(), "dataset": "<i>"}, chosen, draw)
    return Page(text), text


def test_the_page_is_one_file_without_scripts_or_links(shown):
    page, text = shown
    assert not {"script", "link", "a", "iframe", "i"} & {e[0] for e in page.elements}
    assert "http" not in text and "@import" not in text and "url(" not in text
    assert all(e[1]["src"].startswith("data:image/jpeg;base64,") for e in page.all("img"))
    assert EVIL not in text and EVIL in page.all("body")[0][2]
    assert page.all("title")[0][2] == "<i> test"


def test_the_page_shows_the_figures_and_what_was_measured(shown):
    page, _ = shown
    assert "mR 50.0, 95 % interval 48.0 to 53.0" in page.all("pre")[0][2]
    about = page.all("p")[0][2]
    assert "models/best_model.pth, trained on mini, epoch 3, graph object (own)" in about
    assert [e[2] for e in page.all("h2")] == [
        "text to image: the 1 worst",
        "text to image: the 0 best",
        "image to text: the 1 best",
    ]
    assert [e[2] for e in page.all("h3")] == [
        "rank 2.333, ties: 2 to 3, score 0.250",
        "rank 2.333, score 0.250",
    ]


def test_the_page_marks_what_is_the_querys_own(shown):
    page, _ = shown
    assert [e[2] for e in page.all("figure", "own")] == ["2. 0.500 own a.png"]
    others = [e[2] for e in page.all("figure", "other")]
    assert others == ["a.png", "1. 0.750 c.png", "3. 0.250 b.png", "d.png"]
    assert [e[2] for e in page.all("li", "own")] == [f"0.600 own {EVIL}"]
    assert [e[2] for e in page.all("li", "other")] == ["0.700 a plane (3 times)"]


def test_the_page_holds_the_pictures_it_was_given(shown):
    parsed, _ = shown
    sizes = []
    for _, attributes, _ in parsed.all("img"):
        data = base64.b64decode(attributes["src"].partition(",")[2], validate=True)
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            sizes.append(image.size)
    # The height tells the image: a large one of the query's image, small ones of its items.
    large, small = page.LARGE, page.SMALL
    assert sizes == [(large, 10), (small, 12), (small, 10), (small, 11), (large, 13)]


@pytest.mark.parametrize("size", [(300, 200), (20, 60), (1000, 1)])
def test_pictures_have_a_limited_size(tmp_path, size):
    path = write_image(tmp_path / "a.png", size)
    for side in (page.LARGE, page.SMALL):
        with Image.open(io.BytesIO(page.picture(path, None, side))) as image:
            assert max(image.size) == side and image.format == "JPEG"
            assert image.size[0] / image.size[1] == pytest.approx(size[0] / size[1], rel=0.02) or (
                min(image.size) == 1
            )


def test_objects_are_drawn_where_they_are(tmp_path):
    path = write_image(tmp_path / "a.png", (100, 50), value=90)
    file = write_detections(tmp_path / "a.json", [box(20, 15, 30, 20)], label="ship")

    def drawn(detections):
        with Image.open(io.BytesIO(page.picture(path, detections, page.LARGE))) as image:
            return np.asarray(image).astype(int)

    changed = np.abs(drawn(file) - drawn(None)).max(axis=2) > 60
    rows, columns = np.nonzero(changed)
    scale = page.LARGE / 100
    # The box reaches from 5 to 35 and from 5 to 25; its label starts at the centre.
    assert columns.min() == pytest.approx(5 * scale, abs=4)
    assert (rows.min(), rows.max()) == pytest.approx((5 * scale, 25 * scale), abs=4)
    assert changed[round(5 * scale) - 1 : round(5 * scale) + 3, 30:150].any(axis=0).all()
    assert not changed[:, round(40 * scale) + 60 :].any()


def test_pictures_on_the_page_are_the_images_with_their_own_detections(tmp_path):
    files = [write_image(tmp_path / f"{i}.png", (40, 30), value=60 * i) for i in range(4)]
    detections = [write_detections(tmp_path / "0.json", [box(20, 15)]), None, None, None]
    items = [{"image": i, "score": 0.1, "own": i == 0} for i in (3, 0)]
    chosen = {("text_to_image", "worst"): [query("text_to_image", 0, "x", items)]}
    page.write_page(tmp_path / "p.html", result(), chosen, files, detections)
    images = Page((tmp_path / "p.html").read_text(encoding="utf-8")).all("img")
    expected = [(0, page.LARGE), (3, page.SMALL), (0, page.SMALL)]
    for (_, attributes, _), (i, side) in zip(images, expected, strict=True):
        data = base64.b64decode(attributes["src"].partition(",")[2])
        assert data == page.picture(files[i], detections[i], side)
