"""Row of bench.py: recalls of many images among many captions, from their features.

    python -m benchmarks.recall 100000 500000    # once: seconds, recalls and peak memory

Features are drawn: an image's is a random direction, a caption's is that of its image with noise
six times as long, so that about half of the images are found.
"""

from options import answer_early

if __name__ == "__main__":
    answer_early("recall", __doc__)  # before torch is imported, which takes seconds

import importlib.util
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.frame import compared, require_equal
from metrics.protocol import from_features, measure, retrieval_metrics
from metrics.ranks import DIRECTIONS, KS, direction_name
from options import parse_options, run

WIDTH = 512  # D, of an embedding
NOISE = 6.0  # of a caption, times its image's length
TOP_K = max(KS)
SHARE = 10  # one query in so many is asked by itself
STEP = 1000  # vectors drawn at once, so that drawing takes no more memory than they do


class Features(NamedTuple):
    """Features of a split, of unit length."""

    images: torch.Tensor  # (I, D)
    texts: torch.Tensor  # (T, D)
    image_of_text: torch.Tensor  # (T,)


def drawn_features(images, texts, width):
    """`Features` of so many images and captions; image i has the captions i, i + I, i + 2 I ..."""
    random = torch.Generator().manual_seed(0)
    features = Features(
        images=torch.empty(images, width),
        texts=torch.empty(texts, width),
        image_of_text=torch.arange(texts) % images,
    )
    for part in features.images.split(STEP):
        part.copy_(F.normalize(torch.randn(part.shape, generator=random), dim=1))
    for part, owners in zip(
        features.texts.split(STEP), features.image_of_text.split(STEP), strict=True
    ):
        noise = F.normalize(torch.randn(part.shape, generator=random), dim=1)
        part.copy_(F.normalize(features.images[owners] + NOISE * noise, dim=1))
    return features


# ------------------------------------------------------------------ the other sides


def best_by_query(queries, gallery):
    """The best items (Q, TOP_K) of each query, one product and one selection after another."""
    best = [(gallery @ query).topk(TOP_K).indices for query in queries]
    return torch.stack(best)


def best_at_once(features):
    """The best captions of all images and images of all captions, by one whole product."""
    scores = features.images @ features.texts.T  # (I, T)
    return scores.topk(TOP_K, dim=1).indices, scores.T.contiguous().topk(TOP_K, dim=1).indices


def recalls_of_best(owns):
    """Recalls in percent, by k, where owns (Q, TOP_K) says which of the best are the query's."""
    return [100 * float(owns[:, :k].any(dim=1).double().mean()) for k in KS]


def recalls_of_ranks(ranks, queries):
    """The same of `metrics.ranks.Ranks`, of some queries alone."""
    return [100 * float(ranks.recall(k)[1][queries].mean()) for k in KS]


def require_same_recalls(features, best_texts, best_images, step):
    """Assert that the best of one query in `step` give the recalls that their ranks give."""
    found = from_features(*features).ranks()
    of_images = features.image_of_text[best_texts]  # (images, TOP_K)
    own_images = torch.arange(0, len(features.images), step)[:, None]
    own_texts = features.image_of_text[::step, None]
    owns = of_images == own_images, best_images == own_texts
    for direction, ranks, own in zip(DIRECTIONS, found, owns, strict=True):
        ours = recalls_of_ranks(ranks, slice(None, None, step))
        # Near ties may fall otherwise in float32.
        close = np.allclose(ours, recalls_of_best(own), atol=0.2)
        require_equal(close, f"recalls {direction}")


def open_clip_seconds(features):
    """{what: seconds} of open_clip's own metric code and ours, one caption an image, once.

    It takes no more captions than images. Where open_clip's training package is missing: {}.
    """
    if importlib.util.find_spec("open_clip_train") is None:
        print("open_clip_train is missing: pip install 'open_clip_torch>=3'", file=sys.stderr)
        return {}
    from open_clip_train.train import get_clip_metrics

    images = len(features.images)
    first = Features(features.images, features.texts[:images], features.image_of_text[:images])
    begin = time.perf_counter()
    theirs = get_clip_metrics(first.images, first.texts, logit_scale=1.0)
    middle = time.perf_counter()
    ours = retrieval_metrics(*first)
    end = time.perf_counter()
    for direction in DIRECTIONS:
        for k in KS:
            close = abs(100 * theirs[f"{direction}_R@{k}"] - ours[direction][f"R@{k}"]) <= 0.2
            require_equal(close, f"open_clip's recalls {direction}")
    return {"open_clip": middle - begin, "ours": end - middle}


# ------------------------------------------------------------------ memory


def resident_bytes(which):
    """Memory of this process: now by "VmRSS", at its peak by "VmHWM"; None but on Linux."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith(which):
                return 1024 * int(line.split()[1])
    return None


def measured_once(images, texts, width=WIDTH):
    """(the figures of `measure`, seconds, bytes at the peak above the loaded features or None)."""
    features = drawn_features(images, texts, width)
    loaded = resident_bytes("VmRSS")
    begin = time.perf_counter()
    found = measure(from_features(*features))
    seconds = time.perf_counter() - begin
    # The peak may be from drawing the features: then this is more than it took, never less.
    above = None if loaded is None else resident_bytes("VmHWM") - loaded
    return found, seconds, above


def peak_of_a_fresh_process(images, texts, width):
    """The bytes of `measured_once` in a process that has freed nothing that could be used again."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        _, _, above = pool.submit(measured_once, images, texts, width).result()
    return above


# ------------------------------------------------------------------ the row


def recall(device, small):
    """Recalls of both directions against a product and a selection for each query; on the CPU."""
    images, texts, width, repetitions = (200, 600, 32, 2) if small else (10_000, 50_000, WIDTH, 3)
    features = drawn_features(images, texts, width)
    some = Features(features.images[::SHARE], features.texts[::SHARE], None)

    def by_query():
        return (
            best_by_query(some.images, features.texts),
            best_by_query(some.texts, features.images),
        )

    require_same_recalls(features, *by_query(), step=SHARE)
    begin = time.perf_counter()
    at_once = best_at_once(features)
    whole = time.perf_counter() - begin
    require_same_recalls(features, *at_once, step=1)
    notes = {"seconds of one whole product and topk": whole}
    for what, seconds in open_clip_seconds(features).items():
        notes[f"seconds, {images:,} x {images:,}, {what}"] = seconds
    above = peak_of_a_fresh_process(images, texts, width)
    if above is not None:
        notes["MB at the peak above the features"] = above / 1e6
    name = f"{images:,} x {texts:,} x {width}; by query: {SHARE} x the time of a tenth of them"
    sides = {"recalls from features": lambda: retrieval_metrics(*features), "by query": by_query}
    return [compared(name, sides, repetitions, notes, shares={"by query": 1 / SHARE})]


def main(arguments=None):
    options = parse_options("recall", __doc__, arguments)
    if options.texts < options.images:
        raise ValueError(f"texts {options.texts}: expected one for each image or more")
    found, seconds, above = measured_once(options.images, options.texts)
    print(f"{options.images:,} images x {options.texts:,} texts x {WIDTH}: {seconds:.1f} s")
    for direction in DIRECTIONS:
        recalls = [f"R@{k} {found[direction][f'R@{k}']:.2f}" for k in KS]
        print(f"{direction_name(direction)}: {', '.join(recalls)}")
    if above is not None:
        print(f"peak memory above the loaded features: {above / 1e6:.0f} MB")
    return found


if __name__ == "__main__":
    run(main)
