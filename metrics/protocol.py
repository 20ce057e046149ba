"""The field's protocol: from features or ranks to the figures of a result.

Image to text: best rank of any of the image's captions. Text to image: rank of its image. R@K is
the share of queries with a rank of at most K, mR the mean of the six. Ranks are expectations under
random order of the tied, see ranks.py.

Sizes in the shapes below: I images, T texts (captions, each as often as it was written), D the
embedding width.
"""

import math

import numpy as np

from dataset.annotations import normal_form
from metrics.ranks import DIRECTIONS, KS, Retrieval
from metrics.scores import feature_scores


def from_features(image_features, text_features, image_of_text, captions=None, evidence=None):
    """The `ranks.Retrieval` of features (I, D) and (T, D), scored by their products in float64.

    image_of_text: (T,). evidence: a function that gives what is added to the scores, see
    `feature_scores`. With `captions`, the T strings, identical ones (stripped, case folded) count
    as the same caption. Scores of equal features are equal to the bit: ties are exact, and neither
    batch size nor the order of images and texts matters. Raises ValueError on NaN, of evidence
    when it is asked for, and for an image
    without caption.
    """
    scores, distinct_of_text = feature_scores(image_features, text_features, evidence)
    group_of_text = None
    if captions is not None:
        group_of_text = [normal_form(caption) for caption in captions]
    return Retrieval(scores, image_of_text, distinct_of_text, group_of_text)


def measure(found, ks=KS):
    """`measure_ranks` of a Retrieval, with the numbers of images and texts."""
    images, distinct_texts = found.scores.shape
    image_to_text, text_to_image = found.ranks()
    return {
        "images": images,
        "captions": len(found.image_of_text),
        "distinct_texts": distinct_texts,
        **measure_ranks(image_to_text, text_to_image, ks),
    }


def retrieval_metrics(image_features, text_features, image_of_text, captions=None, ks=KS):
    """The protocol on features, which are given as to `from_features`: the dict of `measure`.

    Raises ValueError on NaN, on an image without caption, and on a k beyond the gallery.
    """
    return measure(from_features(image_features, text_features, image_of_text, captions), ks)


def _mean(values):
    """Exactly rounded, so that the order of the values does not matter."""
    return math.fsum(values) / len(values)


def measure_ranks(image_to_text, text_to_image, ks=KS):
    """Recalls in percent with bounds, mR, mean and median of the expected ranks, as a dict.

    image_to_text, text_to_image: `ranks.Ranks` of the images and of the texts. Raises ValueError
    for a k beyond the gallery.
    """
    images, texts = len(image_to_text.better), len(text_to_image.better)
    for direction, gallery in zip(DIRECTIONS, (texts, images), strict=True):
        if max(ks) > gallery:
            raise ValueError(f"R@{max(ks)} {direction}: the gallery has only {gallery} items")
    sides = [_one_direction(image_to_text, ks), _one_direction(text_to_image, ks)]
    result = dict(zip(DIRECTIONS, sides, strict=True))
    result["mR"] = _mean([side[f"R@{k}"] for side in sides for k in ks])
    for bound in ("pessimistic", "optimistic"):
        result[f"mR_{bound}"] = _mean([side[bound][f"R@{k}"] for side in sides for k in ks])
    return result


def _one_direction(ranks, ks):
    """The figures of queries in one direction."""
    recalls, pessimistic, optimistic = {}, {}, {}
    for k in ks:
        worst, expected, best = ranks.recall(k)
        recalls[f"R@{k}"] = 100 * _mean(expected)
        pessimistic[f"R@{k}"] = 100 * _mean(worst)
        optimistic[f"R@{k}"] = 100 * _mean(best)
    return {
        **recalls,
        "mean_rank": _mean(ranks.expected()),
        "median_rank": float(np.median(ranks.expected())),
        "pessimistic": pessimistic,
        "optimistic": optimistic,
    }
