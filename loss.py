"""Losses that pull an image and its sentence together: bidirectional hinge, and InfoNCE.

The hinge is that of VSE++ (Faghri et al. 2018, https://github.com/fartashf/vsepp, Apache-2.0) as
FG-CROSS published it, InfoNCE that of CLIP (Radford et al. 2021). Both take a mask of positives, so
that a sentence which also fits another image of the batch is not pushed away from it.

Where several processes share a batch, each computes its own rows: the loss of its images among all
texts and of its texts among all images ("local loss" in open_clip). Their mean is the batch's loss.

Sizes in the shapes below: B pairs, b of them own, E the embedding width, C captions of an image
(padded).
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

MARGIN = 0.2  # of the hinge, in cosine: as published, and in VSE++
EPSILON = 1e-6  # the published hinge subtracts it inside every term
MAX_SCALE = 100  # CLIP's bound on the inverse temperature

ALL = slice(None)  # rows of a batch that no other process shares


def positive_mask(image_ids, text_ids, caption_ids):
    """Which texts of a batch fit which images.

    image_ids: (B), text_ids: (B) where equal texts have equal ids, caption_ids: (B, C) the text ids
    of all training captions of each image, padded with -1. Returns (B, B) bool: [i, j] is True
    where text j belongs to image i's id or is one of its captions. It need not be symmetric.
    """
    same_image = image_ids[:, None] == image_ids[None, :]  # (B, B)
    is_caption = caption_ids[:, :, None] == text_ids  # (B, C, B)
    return same_image | is_caption.any(dim=1)


class Direction(NamedTuple):
    """b queries and their scores: images among the texts of the batch, or texts among the images.

    A loss is of both directions.
    """

    scores: torch.Tensor  # (b, B)
    positives: torch.Tensor  # (b, B) bool: what fits a query too, and is no negative
    own: torch.Tensor  # (b) the number of a query's partner


def directions(image_features, text_features, positives, rows=ALL):
    """Both Directions of the pairs in some rows of a batch: (images', texts').

    Features: (B, E) each, of unit length; positives: (B, B), see `positive_mask`.
    """
    own = torch.arange(len(positives), device=positives.device)[rows]  # (b)
    of_images = Direction(image_features[rows] @ text_features.T, positives[rows], own)
    of_texts = Direction(text_features[rows] @ image_features.T, positives.T[rows], own)
    return of_images, of_texts


def hinge_loss(both, margin=MARGIN, max_violation=False):
    """Bidirectional hinge, summed over the batch (VSE++ equations 4 and 5).

    both: the `directions`. Of b rows it is B / b times their sum. max_violation takes each query's
    hardest negative instead of all.
    """
    total = 0
    for direction in both:
        scores = direction.scores
        own_scores = scores.gather(1, direction.own[:, None])  # (b, 1)
        skip = direction.positives.scatter(1, direction.own[:, None], True)
        costs = (margin + scores - own_scores - EPSILON).clamp(min=0).masked_fill(skip, 0)  # (b, B)
        of_query = costs.amax(dim=1) if max_violation else costs.sum(dim=1)  # (b)
        total = total + of_query.sum() * (scores.shape[1] / scores.shape[0])
    return total


def info_nce(both, logit_scale):
    """Symmetric cross-entropy to the partner, mean over the rows (CLIP, figure 3).

    both: the `directions`; logit_scale: learned logarithm of the inverse temperature. Positives
    that are not the partner leave the denominator.
    """
    scale = logit_scale.exp().clamp(max=MAX_SCALE)
    total = 0
    for direction in both:
        other_positives = direction.positives.scatter(1, direction.own[:, None], False)
        scores = scale * direction.scores
        logits = scores.masked_fill(other_positives, float("-inf"))  # (b, B)
        total = total + F.cross_entropy(logits, direction.own)
    return total / 2


def clamp_logit_scale(logit_scale):
    """Pull the parameter back below its bound, in place: beyond it there is no gradient to."""
    with torch.no_grad():
        logit_scale.clamp_(max=math.log(MAX_SCALE) - 1e-4)


def batch_loss(image_features, text_features, logit_scale, positives, options, rows=ALL):
    """The loss that the options choose, of unit embeddings (B, E) and (B, E), in fp32.

    positives: (B, B). rows: a slice, the pairs whose loss this process computes; the mean over all
    processes, each with as many rows of its own, is the loss of the batch.
    """
    both = directions(image_features.float(), text_features.float(), positives, rows)
    if options["loss"] == "infonce":
        return info_nce(both, logit_scale)
    return hinge_loss(both, max_violation=options["loss"] == "hinge-max")
