"""Which results are runs of one method."""

import pytest

from metrics.methods import methods


def result(seed, start_sha256=None, definition=None, **training):
    return {
        "training_options": {"seed": seed, **training},
        "start_sha256": start_sha256,
        "definition": definition,
    }


def own(seed, **more):
    """A run that started from weights of its own seed."""
    return result(seed, clip=f"runs/first-{seed}/plain.pt", **more)


TODAY = {"graph": "exchanged", "fusion": 0.5, "caption_form": ["pir", "see {}"], "epochs": 9}
OLDER = {"graph": "object", "graph_control": "exchanged", "clean": "pir", "template": "see {}"}
OLDER |= {"fusion": "sum", "image_encoder_ratio": [0.5, 0.5], "epochs": 9, "patience": 9}
OLDER |= {"margin": 0.2, "drop_test_captions": False, "save_every": 7, "cache_gb": 4}

SAME = {
    "what changes nothing": [result(0, out="a"), result(1, out="b")],
    "what did nothing": [result(0, train="all"), result(1, train="all", size=None, lora=[8, 16])],
    "what has another name or one value now": [result(0, **TODAY), result(1, **OLDER)],
    "what is no more": [result(0, tensorboard=False, plot=True), result(1)],
    "a start by its digest": [result(0, "a", clip="x.pt"), result(1, "a", clip="copy-1/y.pt")],
    "a start named like a seed": [result(seed, "a", clip="first-0/plain.pt") for seed in (0, 1, 2)],
    "starts of each seed": [own(0, start_sha256="a"), own(1, start_sha256="b")],
    "a run measured twice": [own(0, start_sha256="a")] * 2 + [own(1, start_sha256="b")],
    "starts of each seed, without a digest": [own(0), own(10), own(1, start_sha256="b")],
    "a start without a digest": [result(0, clip="a.pt"), result(1, clip="a.pt")],
    "one has a digest": [result(0, clip="a.pt"), result(1, "a", clip="a.pt")],
    "a seed at a dot, a folder, the end": [
        result(3, clip="a-3/b-3.pt/c-3"),
        result(4, clip="a-4/b-4.pt/c-4"),
    ],
}
VIT_16, VIT_32 = {"patch": 16}, {"patch": 32}
OTHER = {
    "graph": [result(0, graph="object"), result(1, graph="none")],
    "margin": [result(0, margin=0.3), result(1, margin=0.2)],
    "patience": [result(0, epochs=9, patience=8), result(1, epochs=9)],
    "size": [result(0), result(1, image_size=128)],
    "sizes of the model": [result(0, definition=VIT_16), result(1, definition=VIT_32)],
    "LoRA": [result(0, train="lora", lora=[8, 16]), result(1, train="lora", lora=[4, 16])],
    "trained": [result(0, train="all"), result(1, train="lora")],
    "with and without a start": [result(0), result(1, clip="a.pt")],
    "another digest": [result(0, "a", clip="a.pt"), result(1, "b", clip="a.pt")],
    "no training": [result(0, "a"), result(0, "b")],
    "no seed in the path": [result(0, clip="first/20.pt"), result(1, clip="first/21.pt")],
    "another run's seed": [result(0, clip="first-1/plain.pt"), result(1, clip="first-0/plain.pt")],
    "another run's start": [own(0), result(1, clip="second-1/plain.pt")],
    "names": [result(0, clip="ViT-B/0"), result(1, clip="ViT-B/1")],
    "the patch is the seed": [
        result(16, "a", VIT_16, clip="ViT-B-16.pt"),
        result(32, "b", VIT_32, clip="ViT-B-32.pt"),
    ],
    "the patch is the seed, within a name": [
        result(16, "a", clip="RemoteCLIP-ViT-B-16-x.pt"),
        result(32, "b", clip="RemoteCLIP-ViT-B-32-x.pt"),
    ],
}


@pytest.mark.parametrize("results", SAME.values(), ids=SAME)
def test_runs_of_one_method(results):
    for order in (results, results[::-1]):
        assert methods(order, free={"out"}) == [order]


@pytest.mark.parametrize("results", OTHER.values(), ids=OTHER)
def test_runs_of_different_methods(results):
    a, b = results
    assert methods([a, b], free={"out"}) == [[a], [b]]


def test_several_methods_are_told_apart():
    scratch = [result(seed) for seed in range(3)]
    one_start = [result(seed, "a", clip="first-0/plain.pt", lr=1) for seed in range(3)]
    own_starts = [own(seed, start_sha256=str(seed), lr=1) for seed in range(3)]
    mixed = [*scratch, *one_start, *own_starts]
    assert methods(mixed, free=()) == [scratch, one_start, own_starts]
