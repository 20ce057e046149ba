"""Bootstrap intervals against loops, hand-made cases and simulated test sets."""

import time

import numpy as np
import pytest

from metrics.intervals import averaged, bootstrap, compare, figures, paired
from metrics.ranks import DIRECTIONS

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


def test_intervals_are_those_of_a_loop_over_draws():
    own, other = table(), table(seed=1)
    assert leaves(figures(own)) == pytest.approx(naive_figures(own, range(30)))
    rng = np.random.default_rng(3)
    draws = [rng.integers(30, size=30).tolist() for _ in range(200)]
    figures_a, figures_b = (
        np.array([naive_figures(t, draw) for draw in draws]) for t in (own, other)
    )
    expected = np.percentile(figures_a, [2.5, 97.5], axis=0).T
    found = bootstrap(own, samples=200, seed=3)
    np.testing.assert_allclose(leaves(found), expected, atol=1e-9)
    expected = np.percentile(figures_a - figures_b, [2.5, 97.5], axis=0).T
    found = leaves(paired(own, other, samples=200, seed=3))
    np.testing.assert_allclose([(d.low, d.high) for d in found], expected, atol=1e-9)
    values = np.subtract(leaves(figures(own)), leaves(figures(other)))
    np.testing.assert_allclose([d.value for d in found], values, atol=1e-9)


def test_equal_images_leave_nothing_to_chance():
    own = table()
    own["image_to_text"] = {name: [0.25] * 30 for name in RECALLS}
    own["text_to_image"] = {name: [0.5 * n for n in own["captions"]] for name in RECALLS}
    found = bootstrap(own)
    assert found["mR"] == pytest.approx([37.5, 37.5])
    assert found["image_to_text"]["R@5"] == pytest.approx([25, 25])
    assert found["text_to_image"]["R@10"] == pytest.approx([50, 50])


def test_a_shift_of_every_image_is_certain():
    """Hard images are hard for both: the pairing takes their variance out."""
    own, other = table(), table()
    for name in RECALLS:
        other["image_to_text"][name] = [v - 0.1 for v in own["image_to_text"][name]]
        pairs = zip(own["text_to_image"][name], own["captions"], strict=True)
        other["text_to_image"][name] = [v - 0.1 * n for v, n in pairs]
    for difference in leaves(paired(own, other)):
        assert difference == pytest.approx((10, 10, 10))
    low, high = bootstrap(own)["mR"]
    assert high - low > 5


def test_intervals_cover_the_truth_in_95_of_100_test_sets():
    covered, chance = np.zeros(7), 0.3
    for seed in range(300):
        found = bootstrap(table(100, 5, chance, seed), samples=300, seed=seed)
        covered += [low <= 100 * chance <= high for low, high in leaves(found)]
    # 300 test sets: a standard error of 1.3 points, and small samples cover a little less.
    assert (covered / 300 > 0.90).all() and (covered / 300 < 0.99).all()


def test_two_thousand_draws_of_a_thousand_images_take_well_under_a_second():
    own = table(1000)
    begin = time.process_time()
    first = bootstrap(own)
    assert time.process_time() - begin < 0.8
    assert first == bootstrap(own, seed=0) != bootstrap(own, seed=1)


def test_the_order_of_the_images_does_not_matter():
    a, b = table(seed=0), table(seed=1, chance=0.2)
    order = np.random.default_rng(0).permutation(len(b["names"]))
    turned = {name: [b[name][i] for i in order] for name in ("names", "captions")}
    for side in DIRECTIONS:
        turned[side] = {key: [row[i] for i in order] for key, row in b[side].items()}
    assert turned["names"] != b["names"] and paired(a, turned) == paired(a, b)
    assert averaged([a, turned]) == averaged([a, b])


def test_other_images_are_an_error_that_names_the_first():
    own, other, recounted, short = table(), table(), table(), table()
    other["names"][4] = "x.png"
    recounted["captions"][2] += 1
    with pytest.raises(ValueError, match=r"the images differ, first at 4\.png"):
        paired(own, other)
    with pytest.raises(ValueError, match="first at the end"):
        paired(own, table(31))
    with pytest.raises(ValueError, match=r"numbers of captions differ, first at 2\.png"):
        averaged([own, own, recounted])
    short["text_to_image"]["R@5"].pop()
    with pytest.raises(ValueError, match=r"one length, found \[29, 30\]"):
        bootstrap(short)


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
        each = [leaves(figures(r["per_image"])) for r in results]
        assert leaves(own) == pytest.approx(np.mean(each, axis=0))
    value = found.figures[0]["mR"] - found.figures[1]["mR"]
    assert found.difference["mR"].low < value < found.difference["mR"].high
    assert found.difference["mR"].value == pytest.approx(value)
    assert sorted(found.pairs) == [0, 1]
    for seed, (first, second, difference) in found.pairs.items():
        tables = table(seed=seed), table(seed=seed, chance=0.2)
        assert (first, second) == tuple(figures(own)["mR"] for own in tables)
        assert difference == paired(*tables)["mR"]


@pytest.mark.parametrize(
    ("a", "b"),
    [([0], [0]), ([0, 1], [0, 2]), ([0, 1], [0]), ([0, 0], [0, 0])],
    ids=["one", "other seeds", "other number", "a seed twice"],
)
def test_runs_are_paired_where_both_files_have_the_same_several_seeds(a, b):
    assert compare([result(s) for s in a], [result(s) for s in b])[0].pairs == {}


def test_what_only_one_file_holds_is_left_out():
    a, b = [result(0), result(0, dataset="rsicd")], [result(0), result(0, split="val")]
    assert [(found.dataset, found.split) for found in compare(a, b)] == [("ucm", "test")]
    with pytest.raises(ValueError, match="no data set and split in both: rsicd test and ucm test"):
        compare(a[1:], b[:1])


def test_other_images_or_another_protocol_are_errors_that_name_the_data_set():
    with pytest.raises(ValueError, match="ucm test: the images"):
        compare([result(0)], [result(0, images=29)])
    with pytest.raises(ValueError, match="ucm test: one with --caption-equivalence"):
        compare([result(0)], [result(0, equivalence=True)])


SAME = {
    "what changes nothing": ({"out": "a"}, {"out": "b"}),
    "starts of each seed": ({"clip": "runs/first-0/plain.pt"}, {"clip": "runs/first-1/plain.pt"}),
    "one start": ({"clip": "a.pt"}, {"clip": "a.pt"}),
    "what did nothing": ({"train": "all"}, {"image_size": None, "train": "all", "lora": [8, 16]}),
    "what is no more": ({"tensorboard": False}, {}),
}
OTHER = {
    "graph": ({"graph": "object"}, {"graph": "none"}),
    "size": ({}, {"image_size": 128}),
    "LoRA": ({"train": "lora", "lora": [8, 16]}, {"train": "lora", "lora": [4, 16]}),
    "trained": ({"train": "all"}, {"train": "lora"}),
    "10 and 11 hold no seed": ({"clip": "first-0/10.pt"}, {"clip": "first-1/11.pt"}),
    "another run's seed": ({"clip": "first-1/plain.pt"}, {"clip": "first-0/plain.pt"}),
    "another start": ({"clip": "first-0/plain.pt"}, {"clip": "second-1/plain.pt"}),
    "names": ({"clip": "ViT-B/0"}, {"clip": "ViT-B/1"}),
}


@pytest.mark.parametrize("training", SAME.values(), ids=SAME)
def test_runs_of_one_method_are_averaged(training):
    a = [result(seed, training=own) for seed, own in enumerate(training)]
    assert compare(a, [result(0)], free={"out"})[0].runs == (2, 1)
    assert compare([result(0)], a, free={"out"})[0].runs == (1, 2)


@pytest.mark.parametrize("training", OTHER.values(), ids=OTHER)
def test_a_file_of_different_methods_is_refused(training):
    a = [result(seed, training=own) for seed, own in enumerate(training)]
    for files in ((a, [result(0)]), ([result(0)], a)):
        with pytest.raises(ValueError, match="ucm test: a file holds runs that differ"):
            compare(*files, free={"out"})
