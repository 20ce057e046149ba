"""Bootstrap intervals against loops and simulated methods, and which results are compared."""

import itertools
import time

import numpy as np
import pytest

from conftest import ROOT
from metrics.intervals import bootstrap, compare, difference, figures, share_difference
from metrics.ranks import DIRECTIONS
from metrics.tables import read_results

RECALLS = ("R@1", "R@5", "R@10")


def table(images=30, captions=5, chance=0.4, seed=0):
    """A table by image of independent hits, its numbers of captions varying around the given."""
    rng = np.random.default_rng(seed)
    counts = np.full(images, captions) + (np.arange(images) % 3 if captions > 1 else 0)
    return {
        "names": [f"{i}.png" for i in range(images)],
        "captions": counts.tolist(),
        "image_to_text": {k: rng.binomial(1, chance, images).tolist() for k in RECALLS},
        "text_to_image": {k: rng.binomial(counts, chance).tolist() for k in RECALLS},
    }


def leaves(named):
    """All values of a {"mR", direction: {recall}}, in one order."""
    return [named["mR"], *(value for d in DIRECTIONS for value in named[d].values())]


def naive_figures(per_image, chosen):
    """mR and the six recalls of a list of images, by loops over them."""
    found = []
    for name in RECALLS:
        hits = sum(per_image["image_to_text"][name][i] for i in chosen)
        found.append(100 * hits / len(chosen))
    captions = sum(per_image["captions"][i] for i in chosen)
    for name in RECALLS:
        hits = sum(per_image["text_to_image"][name][i] for i in chosen)
        found.append(100 * hits / captions)
    return [sum(found) / 6, *found]


def bounds(named):
    """[low, high] of all figures of a difference."""
    return [(found.low, found.high) for found in leaves(named)]


def drawn_runs(runs, level, seed=3, samples=200):
    return np.random.default_rng([seed, level]).integers(runs, size=(samples, runs))


def test_intervals_of_one_run_are_those_of_a_loop_over_draws_of_images():
    own, other = table(), table(seed=1)
    assert leaves(figures([own])) == pytest.approx(naive_figures(own, range(30)))
    rng = np.random.default_rng(3)
    draws = [rng.integers(30, size=30).tolist() for _ in range(200)]
    figures_a = np.array([naive_figures(own, draw) for draw in draws])
    figures_b = np.array([naive_figures(other, draw) for draw in draws])
    expected = np.percentile(figures_a, [2.5, 97.5], axis=0).T
    found = bootstrap([own], samples=200, seed=3)
    np.testing.assert_allclose(leaves(found), expected, atol=1e-9)
    expected = np.percentile(figures_a - figures_b, [2.5, 97.5], axis=0).T
    for same_seeds in (True, False):
        found = difference([own], [other], same_seeds, samples=200, seed=3)
        np.testing.assert_allclose(bounds(found), expected, atol=1e-9)
        values = np.subtract(leaves(figures([own])), leaves(figures([other])))
        np.testing.assert_allclose([d.value for d in leaves(found)], values, atol=1e-9)
    assert bootstrap([own]) == bootstrap([own], samples=2000, seed=0)


def test_intervals_of_one_run_stay_as_they_were():
    results = read_results(ROOT / "results" / "rsicd-graph.json")
    assert any(hit % 1 for hit in results[0]["per_image"]["image_to_text"]["R@1"])  # of ties
    for result in results:
        found, expected = leaves(bootstrap([result["per_image"]])), leaves(result["intervals"])
        np.testing.assert_allclose(found, expected, rtol=1e-12)  # BLAS may sum in another order


@pytest.mark.parametrize("same_seeds", [True, False])
def test_intervals_of_several_runs_are_those_of_a_loop_over_draws_of_runs_and_images(same_seeds):
    a = [table(seed=seed) for seed in range(3)]
    b = [table(seed=10 + seed, chance=0.3) for seed in range(3 if same_seeds else 4)]
    means = [np.mean([naive_figures(run, range(30)) for run in runs], axis=0) for runs in (a, b)]
    assert leaves(figures(a)) == pytest.approx(means[0])
    rng = np.random.default_rng(3)
    runs_of_a = drawn_runs(3, level=1)
    runs_of_b = runs_of_a if same_seeds else drawn_runs(4, level=2)
    figures_a, figures_b = [], []
    for own, others in zip(runs_of_a, runs_of_b, strict=True):
        images = rng.integers(30, size=30).tolist()
        figures_a.append(np.mean([naive_figures(a[run], images) for run in own], axis=0))
        figures_b.append(np.mean([naive_figures(b[run], images) for run in others], axis=0))
    expected = np.percentile(figures_a, [2.5, 97.5], axis=0).T
    found = bootstrap(a, samples=200, seed=3)
    np.testing.assert_allclose(leaves(found), expected, atol=1e-9)
    expected = np.percentile(np.subtract(figures_a, figures_b), [2.5, 97.5], axis=0).T
    found = difference(a, b, same_seeds, samples=200, seed=3)
    np.testing.assert_allclose(bounds(found), expected, atol=1e-9)
    values = [found.value for found in leaves(found)]
    np.testing.assert_allclose(values, np.subtract(*means), atol=1e-9)


def test_identical_runs_have_the_interval_of_one():
    own, other = table(), table(seed=1)
    np.testing.assert_allclose(leaves(bootstrap([own] * 4)), leaves(bootstrap([own])), atol=1e-9)
    one = bounds(difference([own], [other], same_seeds=True))
    for same_seeds in (True, False):
        found = bounds(difference([own] * 3, [other] * 3, same_seeds))
        np.testing.assert_allclose(found, one, atol=1e-9)


def constant(chance, images=4):
    """A table of images that are all alike: only runs can make its figures differ."""
    sides = {side: {recall: [chance] * images for recall in RECALLS} for side in DIRECTIONS}
    return {"names": [str(i) for i in range(images)], "captions": [1] * images, **sides}


def test_what_a_seed_does_to_both_methods_cancels_out_where_runs_are_paired():
    a = [constant(chance) for chance in (0.5, 0.6, 0.7)]
    b = [constant(chance) for chance in (0.4, 0.5, 0.6)]
    together = difference(a, b, same_seeds=True)["mR"]
    assert tuple(together) == pytest.approx((10, 10, 10))
    # Of 27 draws of the runs one holds the worst alone, which is more than the 2.5 % left out.
    assert bootstrap(a)["mR"] == pytest.approx([50, 70])
    # Of 27 x 27 the worst against the best are one, so that the bounds lie further in.
    by_themselves = difference(a, b, same_seeds=False)["mR"]
    each = [sum(draw) / 3 for draw in itertools.product((0, 10, 20), repeat=3)]
    differences = [10 + x - y for x in each for y in each]
    low, high = np.percentile(differences, [2.5, 97.5])
    assert (low, high) == pytest.approx((10 - 40 / 3, 10 + 40 / 3))
    assert tuple(by_themselves) == pytest.approx((10, low, high))


def test_intervals_hold_the_chance_of_training():
    """Of a hundred methods' true mR, simulated, nine tenths lie within the interval."""
    rng = np.random.default_rng(0)
    images, runs, truth = 100, 8, 0.5
    within = {"runs and images": 0, "images": 0}
    for _ in range(100):
        chances = np.clip(truth + rng.normal(0, 0.1, size=runs), 0, 1)
        tables = []
        for chance in chances:
            own = constant(0, images)
            for side in DIRECTIONS:
                own[side] = {name: rng.binomial(1, chance, images) for name in RECALLS}
            tables.append(own)
        for level, drawn in (("runs and images", tables), ("images", tables[:1])):
            low, high = bootstrap(drawn, samples=300)["mR"]
            within[level] += low <= 100 * truth <= high
    assert within["runs and images"] >= 85
    assert within["images"] <= 60


@pytest.mark.parametrize("same_seeds", [True, False])
def test_shares_of_queries_differ_as_recalls_of_captions_do(same_seeds):
    own, other = ([table(seed=seed) for seed in seeds] for seeds in ((0, 1), (2, 3)))
    expected = difference(own, other, same_seeds)["text_to_image"]["R@5"]
    image_of_caption = np.repeat(np.arange(30), own[0]["captions"])

    def by_caption(one):
        shares = np.divide(one["text_to_image"]["R@5"], one["captions"])
        return shares[image_of_caption]

    values = [[by_caption(one) for one in runs] for runs in (own, other)]
    assert share_difference(*values, image_of_caption, same_seeds) == pytest.approx(expected)


def test_two_thousand_draws_take_less_than_a_second():
    runs = [table(images=1000, seed=seed) for seed in range(5)]
    begin = time.process_time()
    bootstrap(runs)
    assert time.process_time() - begin < 1


def test_the_order_of_the_images_does_not_matter():
    a, b = table(seed=0), table(seed=1, chance=0.2)
    order = np.random.default_rng(0).permutation(len(b["names"]))
    turned = {name: [b[name][i] for i in order] for name in ("names", "captions")}
    for side in DIRECTIONS:
        turned[side] = {key: [row[i] for i in order] for key, row in b[side].items()}
    assert turned["names"] != b["names"]
    assert difference([a], [turned], True) == difference([a], [b], True)
    assert figures([a, turned]) == figures([a, b]) and bootstrap([a, turned]) == bootstrap([a, b])


def test_other_images_are_an_error_that_names_the_first():
    own, other, recounted, short = table(), table(), table(), table()
    other["names"][4] = "x.png"
    recounted["captions"][2] += 1
    with pytest.raises(ValueError, match=r"the images differ, first at 4\.png"):
        difference([own], [other], same_seeds=True)
    with pytest.raises(ValueError, match="first at the end"):
        difference([own], [table(31)], same_seeds=True)
    with pytest.raises(ValueError, match=r"numbers of captions differ, first at 2\.png"):
        bootstrap([own, own, recounted])
    short["text_to_image"]["R@5"].pop()
    with pytest.raises(ValueError, match=r"one length, found \[29, 30\]"):
        bootstrap([short])


# ------------------------------------------------------------------ two files


def result(seed, dataset="ucm", split="test", equivalence=False, training=(), **changes):
    return {
        "dataset": dataset,
        "split": split,
        "caption_equivalence": equivalence,
        "training_options": {"seed": seed, **dict(training)},
        "per_image": table(**{"seed": seed, **changes}),
    }


def test_files_are_compared_by_the_mean_of_their_runs():
    a, b = [result(0), result(1)], [result(1, chance=0.2), result(0, chance=0.2)]
    [found] = compare(a, b)
    assert (found.dataset, found.split, found.images, found.runs) == ("ucm", "test", 30, (2, 2))
    for own, results in zip(found.figures, (a, b), strict=True):
        assert own == figures([result["per_image"] for result in results])
    in_order_of_seeds = (
        [table(seed=s) for s in (0, 1)],
        [table(seed=s, chance=0.2) for s in (0, 1)],
    )
    assert found.difference == difference(*in_order_of_seeds, same_seeds=True)
    assert list(found.pairs) == [0, 1]
    for seed, pair in found.pairs.items():
        own, other = [table(seed=seed)], [table(seed=seed, chance=0.2)]
        expected = difference(own, other, same_seeds=True)["mR"]
        assert pair == (figures(own)["mR"], figures(other)["mR"], expected)


@pytest.mark.parametrize(
    ("seeds_a", "seeds_b"), [([0, 1], [0, 2]), ([0, 1], [0]), ([0], [0, 1]), ([0, 0], [0, 0])]
)
def test_runs_are_drawn_by_themselves_where_files_have_other_seeds(seeds_a, seeds_b):
    a, b = [result(seed) for seed in seeds_a], [result(seed, chance=0.2) for seed in seeds_b]
    [found] = compare(a, b)
    tables = [[own["per_image"] for own in results] for results in (a, b)]
    assert found.pairs == {} and found.runs == (len(a), len(b))
    assert found.difference == difference(*tables, same_seeds=False)


def test_one_run_each_has_no_pairs():
    [found] = compare([result(0)], [result(0)])
    assert found.pairs == {} and leaves(found.difference) == 7 * [(0, 0, 0)]


def test_what_only_one_file_holds_is_left_out():
    a, b = [result(0), result(0, dataset="rsicd")], [result(0), result(0, split="val")]
    assert [(found.dataset, found.split) for found in compare(a, b)] == [("ucm", "test")]
    for own, other, message in (
        (a[1:], b[:1], "no data set and split in both: rsicd test and ucm test"),
        (b[:1], [result(0, images=29)], "ucm test: the images"),
        (b[:1], [result(0, equivalence=True)], "ucm test: one with --caption-equivalence"),
        ([a[0], result(1, training={"graph": "none"})], b, "ucm test: a file holds runs that"),
        (b[:1], [a[0], result(1, training={"graph": "none"})], "ucm test: a file holds runs that"),
    ):
        with pytest.raises(ValueError, match=message):
            compare(own, other)
