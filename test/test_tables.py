"""Tables by hand-made results, files read back."""

import csv
import json
import re
import statistics

import pytest

from conftest import ROOT
from metrics import tables
from metrics.intervals import compare

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
    assert tables.table([own]).splitlines() == [
        "mini test: 4 images, 4 captions (3 distinct)",
        "                   R@1    R@5   R@10   mean rank   median",
        "image to text     40.0   40.0   40.0         9.0      5.0",
        "text to image     10.0   20.0   30.1         7.3      5.0",
        "mR 40.0, 95 % interval 38.0 to 43.0 over images only",
    ]


@pytest.mark.parametrize(("gap", "shown"), [(0.09, False), (0.11, True)])
@pytest.mark.parametrize("bound", ["pessimistic", "optimistic"])
def test_bounds_are_printed_where_they_differ_by_a_tenth(bound, gap, shown):
    moved = 50.0 + (gap if bound == "optimistic" else -gap)
    own = result()
    own["image_to_text"][bound]["R@5"] = own[f"mR_{bound}"] = moved
    low, high = sorted([50.0, moved])
    ties = f"between {low:.1f} and {high:.1f}"
    lines = tables.detailed(own).splitlines()
    assert lines.count(f"  ties: R@5 {ties}") == shown
    assert lines[-1].endswith(f"(ties: {ties})") == shown
    assert sum("ties" in line for line in lines) == 2 * shown
    _, first, second, _ = tables.table([own, result()]).splitlines()
    assert first.endswith(ties) == shown and second.endswith("]")


def cells(line):
    return re.split(r"  +", line.strip())


def test_several_results_are_a_line_each_by_data_set():
    results = [result(40.0, dataset="ucm", out="x"), result(20.0, dataset="rsicd", out="x")]
    results += [result(50.0, dataset="ucm", out="much/longer")]
    heads, *lines, last = tables.table(results).splitlines()
    assert last == "intervals: over images only"
    assert cells(heads)[:5] == ["checkpoint", "data set", "split", "images", "to text R@1"]
    assert [cells(line)[:2] + cells(line)[-2:] for line in lines] == [
        ["x/best_model.pth", "ucm", "40.0", "40.0 [38.0, 43.0]"],
        ["much/longer/best_model.pth", "ucm", "50.0", "50.0 [48.0, 53.0]"],
        ["x/best_model.pth", "rsicd", "20.0", "20.0 [18.0, 23.0]"],
    ]
    places = {(line.index(cells(line)[1]), line.index(" test ")) for line in lines}
    assert len(places) == 1  # columns stand below each other
    results[0]["caption_equivalence"] = True
    assert tables.table(results).endswith("\nequal captions counted as one")


def test_seeds_of_one_training_get_a_line_of_mean_and_deviation():
    values = (40.0, 44.0, 45.5)
    seeds = [
        result(v, seed, out=str(seed), workers=int(seed == 1)) for seed, v in enumerate(values)
    ]
    other = result(10.0, 0, fusion="gate")
    *lines, mean, last = tables.table([*seeds, other], free=("out", "workers")).splitlines()
    assert len(lines) == 1 + 4
    assert last == "intervals: of a result over images only, of a mean over seeds and images"
    spread = f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"
    assert spread == "43.2 ± 2.8"
    *found, mean_recall = cells(mean)
    assert found == ["mean ± standard deviation of 3", "mini", "test", "4"] + [spread] * 6
    # All images are alike; of 27 draws of the seeds, the first holds the worst alone.
    assert mean_recall == f"{spread} [40.0, 45.5]"
    *_, mean, _ = tables.table([*seeds, other]).splitlines()  # as if workers mattered
    assert mean.startswith("mean ± standard deviation of 2")
    elsewhere = result(50.0, 1)
    elsewhere["per_image"]["names"][0] = "e.png"
    assert "±" not in tables.table([result(40.0), elsewhere])
    for different in ({"seed": 0}, {"seed": 1, "dataset": "b"}):  # one run twice, two data sets
        assert "±" not in tables.table([result(40.0), result(50.0, **different)])


def test_comparisons_are_lines_for_people():
    a = [result(60.0, 0), result(50.0, 1)]
    b = [result(40.0, 0), result(32.6, 1)]
    assert tables.comparison(compare(a, b)).splitlines() == [
        "mini test, 4 images, 2 and 2 runs: mR 55.0 - 36.3 = +18.7 [+17.4, +20.0]",
        *(
            f"  {name}: " + ", ".join(f"{k} +18.7 [+17.4, +20.0]" for k in RECALLS)
            for name in ("image to text", "text to image")
        ),
        "  intervals: over seeds and images, runs of a seed drawn together",
        "  seed 0, over images only: mR 60.0 - 40.0 = +20.0 [+20.0, +20.0]",
        "  seed 1, over images only: mR 50.0 - 32.6 = +17.4 [+17.4, +17.4]",
    ]


@pytest.mark.parametrize(
    ("seeds_a", "seeds_b", "said"),
    [
        ([0], [0], "over images only; the chance of training is not in them"),
        ([0], [0, 1], "over seeds and images, but images only for the first file"),
        ([0, 1], [0], "over seeds and images, but images only for the second file"),
        ([0, 1], [2, 3, 4], "over seeds and images, the seeds of each file drawn by themselves"),
    ],
)
def test_a_comparison_says_what_its_intervals_are_over(seeds_a, seeds_b, said):
    a, b = [[result(50.0, seed) for seed in seeds] for seeds in (seeds_a, seeds_b)]
    *_, last = tables.comparison(compare(a, b)).splitlines()
    assert last.startswith(f"  intervals: {said}")


# ------------------------------------------------------------------ files


def test_result_files_are_written_as_those_in_results(tmp_path):
    files = sorted((ROOT / "results").glob("*.json"))
    assert files
    for path in files:
        command = json.loads(path.read_text(encoding="utf-8"))["command"]
        tables.write_results(tmp_path / "r.json", command, tables.read_results(path))
        assert (tmp_path / "r.json").read_bytes() == path.read_bytes()
    odd = [{**result(), "empty": {}, "none": [], "é": 'a"b'}]
    tables.write_results(tmp_path / "r.json", "", odd)
    assert tables.read_results(tmp_path / "r.json") == odd


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"results": []}', '{"results": [{"mR": 1}]}', '{"mR": 3}']
)
def test_other_files_are_errors_that_name_them(tmp_path, content):
    (tmp_path / "old.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"old\.json: not a result file; .*evaluate\.py --json"):
        tables.read_results(tmp_path / "old.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("captions", [1, 1, 1]),
        ("captions", [1, 1, 1, 0]),
        ("names", ["a", "b", "c", 4]),
        ("image_to_text", {"R@1": [0, 0, 0, 1.5]}),
        ("text_to_image", {"R@1": [0, 0, 0, float("nan")]}),
        ("text_to_image", {"R@1": [0, 0, -1, 0]}),
        ("text_to_image", {"R@1": [0, 0, 0, 1]}),  # not the recalls of the other direction
    ],
)
def test_a_table_by_image_that_cannot_be_is_refused(tmp_path, field, value):
    own = result()
    own["per_image"][field] = value
    tables.write_results(tmp_path / "r.json", "", [result(), own])
    with pytest.raises(ValueError, match=r"r\.json: .*result 1: field 'per_image"):
        tables.read_results(tmp_path / "r.json")


def query(direction, number, caption, items=(), **changes):
    """A query as of `queries.query_rows`."""
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
    rows = [
        query("image_to_text", 1, 'a "ship", two', checkpoint="é", dataset="ucm"),
        query("text_to_image", 0, "x", competitor="c.png", competitor_score=0.1234567),
    ]

    def written(*arguments):
        tables.write_ranks(tmp_path / "r.csv", *arguments)
        with open(tmp_path / "r.csv", newline="", encoding="utf-8") as file:
            return list(csv.reader(file))

    head = ["direction", "image", "caption", "rank", "optimistic", "pessimistic", "score"]
    head += ["competitor", "competitor_score"]
    first = ["image_to_text", "b.png", 'a "ship", two', "2.333333", "2", "3", "0.25", "", ""]
    second = ["text_to_image", "a.png", "x", "2.333333", "2", "3", "0.25", "c.png", "0.123457"]
    assert written(rows) == [head, first, second]
    further = ["checkpoint", "dataset"]
    assert written(rows[:1], further) == [[*further, *head], ["é", "ucm", *first]]


def test_texts_that_spreadsheets_would_compute_are_harmless_and_numbers_stay(tmp_path):
    formulas = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"]
    others = ["a = b", " =1", "", -1, -0.12345678, None]
    columns = [str(place) for place in range(12)]
    row = dict(zip(columns, [*formulas, *others], strict=True))
    tables.write_csv(tmp_path / "r.csv", columns, [row])
    with open(tmp_path / "r.csv", newline="", encoding="utf-8") as file:
        head, cells = csv.reader(file)
    harmless = ["'=1+1", "'+1", "'-1", "'@SUM(A1)", "'\t=1", "'\r=1"]
    assert (head, cells) == (columns, [*harmless, "a = b", " =1", "", "-1", "-0.123457", ""])
    tables.write_ranks(tmp_path / "r.csv", [query("text_to_image", 0, "=1+1")])
    assert ",'=1+1," in (tmp_path / "r.csv").read_text(encoding="utf-8")
