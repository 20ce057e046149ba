"""Losses that pull an image and its sentence together: bidirectional hinge, and InfoNCE.

The hinge is that of VSE++ (Faghri et al. 2018, https://github.com/fartashf/vsepp, Apache-2.0) as
FG-CROSS published it, InfoNCE that of CLIP (Radford et al. 2021). Both take a mask of positives, so
that a sentence which also fits another image of the batch is not pushed away from it.

Sizes in the shapes below: B pairs, E the embedding width, C captions of an image (padded).
"""

import math

import torch
import torch.nn.functional as F

MARGIN = 0.2  # of the hinge, in cosine: as published, and in VSE++
EPSILON = 1e-6  # the published hinge subtracts it inside every term
MAX_SCALE = 100  # CLIP's bound on the inverse temperature


def positive_mask(image_ids, text_ids, caption_ids):
    """Which texts of a batch fit which images.

    image_ids: (B), text_ids: (B) where equal texts have equal ids, caption_ids: (B, C) the text ids
    of all training captions of each image, padded with -1. Returns (B, B) bool: [i, j] is True
    where text j belongs to image i's id or is one of its captions. It need not be symmetric.
    """
    same_image = image_ids[:, None] == image_ids[None, :]  # (B, B)
    is_caption = caption_ids[:, :, None] == text_ids  # (B, C, B)
    return same_image | is_caption.any(dim=1)


def _beside_diagonal(positives):
    return positives & ~torch.eye(len(positives), dtype=torch.bool, device=positives.device)


def hinge_loss(scores, positives, margin=MARGIN, max_violation=False):
    """Bidirectional hinge over a score matrix, summed over the batch (VSE++ equations 4 and 5).

    scores: (B, B), images by texts; positives: (B, B) bool, whose entries are no negatives.
    max_violation takes each row's and each column's hardest negative instead of all.
    """
    own = scores.diag()
    skip = positives | torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    texts = (margin + scores - own[:, None] - EPSILON).clamp(min=0).masked_fill(skip, 0)
    images = (margin + scores - own[None, :] - EPSILON).clamp(min=0).masked_fill(skip, 0)
    if max_violation:
        return texts.amax(dim=1).sum() + images.amax(dim=0).sum()
    return texts.sum() + images.sum()


def info_nce(scores, positives, logit_scale):
    """Symmetric cross-entropy to the diagonal, mean over the batch (CLIP, figure 3).

    scores: (B, B), images by texts; logit_scale: learned logarithm of the inverse temperature.
    Positives beside the diagonal leave the denominator: in their row for the image, in their
    column for the text.
    """
    logits = logit_scale.exp().clamp(max=MAX_SCALE) * scores
    logits = logits.masked_fill(_beside_diagonal(positives), float("-inf"))
    target = torch.arange(len(scores), device=scores.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def clamp_logit_scale(logit_scale):
    """Pull the parameter back below its bound, in place: beyond it there is no gradient to."""
    with torch.no_grad():
        logit_scale.clamp_(max=math.log(MAX_SCALE) - 1e-4)


def batch_loss(image_features, text_features, logit_scale, positives, options):
    """The loss that the options choose, of unit embeddings (B, E) and (B, E), in fp32."""
    scores = image_features.float() @ text_features.float().T  # (B, B)
    if options["loss"] == "infonce":
        return info_nce(scores, positives, logit_scale)
    hardest_only = options["loss"] == "hinge-max"
    return hinge_loss(scores, positives, max_violation=hardest_only)
