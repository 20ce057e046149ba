"""Bootstrap intervals against loops, and which runs are compared."""

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
    figures_a = np.array([naive_figures(own, draw) for draw in draws])
    figures_b = np.array([naive_figures(other, draw) for draw in draws])
    expected = np.percentile(figures_a, [2.5, 97.5], axis=0).T
    found = bootstrap(own, samples=200, seed=3)
    np.testing.assert_allclose(leaves(found), expected, atol=1e-9)
    expected = np.percentile(figures_a - figures_b, [2.5, 97.5], axis=0).T
    found = leaves(paired(own, other, samples=200, seed=3))
    np.testing.assert_allclose([(d.low, d.high) for d in found], expected, atol=1e-9)
    values = np.subtract(leaves(figures(own)), leaves(figures(other)))
    np.testing.assert_allclose([d.value for d in found], values, atol=1e-9)
    assert bootstrap(own) == bootstrap(own, samples=2000, seed=0)


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
    means = []
    for own, results in zip(found.figures, (a, b), strict=True):
        each = [leaves(figures(r["per_image"])) for r in results]
        assert leaves(own) == pytest.approx(np.mean(each, axis=0))
        means.append(averaged([r["per_image"] for r in results]))
    assert found.difference == paired(*means)
    assert sorted(found.pairs) == [0, 1]
    for seed, pair in found.pairs.items():
        own, other = table(seed=seed), table(seed=seed, chance=0.2)
        assert pair == (figures(own)["mR"], figures(other)["mR"], paired(own, other)["mR"])


def test_runs_are_paired_where_both_files_have_the_same_several_seeds():
    # One run, other seeds, another number of runs, a seed twice.
    for a, b in (([0], [0]), ([0, 1], [0, 2]), ([0, 1], [0]), ([0, 0], [0, 0])):
        assert compare([result(s) for s in a], [result(s) for s in b])[0].pairs == {}


def test_what_only_one_file_holds_is_left_out():
    a, b = [result(0), result(0, dataset="rsicd")], [result(0), result(0, split="val")]
    assert [(found.dataset, found.split) for found in compare(a, b)] == [("ucm", "test")]
    for own, other, message in (
        (a[1:], b[:1], "no data set and split in both: rsicd test and ucm test"),
        (b[:1], [result(0, images=29)], "ucm test: the images"),
        (b[:1], [result(0, equivalence=True)], "ucm test: one with --caption-equivalence"),
    ):
        with pytest.raises(ValueError, match=message):
            compare(own, other)


SAME = {
    "what changes nothing": ({"out": "a"}, {"out": "b"}),
    "starts of each seed": ({"clip": "runs/first-0/plain.pt"}, {"clip": "runs/first-1/plain.pt"}),
    "what did nothing": ({"train": "all"}, {"image_size": None, "train": "all", "lora": [8, 16]}),
    "what is no more": ({"tensorboard": False}, {}),
}
OTHER = {
    "graph": ({"graph": "object"}, {"graph": "none"}),
    "size": ({}, {"image_size": 128}),
    "LoRA": ({"train": "lora", "lora": [8, 16]}, {"train": "lora", "lora": [4, 16]}),
    "20 and 21 hold no seed": ({"clip": "first/20.pt"}, {"clip": "first/21.pt"}),
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
