"""Hinge and InfoNCE against published values, open_clip and loops; the mask of positives."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss

from loss import (
    EPSILON,
    MAX_SCALE,
    Direction,
    batch_loss,
    clamp_logit_scale,
    hinge_loss,
    info_nce,
    positive_mask,
)

PUBLISHED = Path(__file__).parent / "fixtures" / "published" / "outputs.npz"
SIZE = 7
LOSSES = ("infonce", "hinge", "hinge-max")


def random_scores(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(SIZE, SIZE, generator=generator) * 2 - 1


def random_mask(seed=1):
    """An asymmetric mask with some, but not all, entries beside the diagonal."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(SIZE, SIZE, generator=generator) < 0.3
    mask |= eye()
    assert (mask != mask.T).any()
    return mask


def unit_features(seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    pair = torch.randn(2, SIZE, 16, generator=generator)
    return F.normalize(pair, dim=-1).to(device)


def eye(size=SIZE, device="cpu"):
    return torch.eye(size, dtype=torch.bool, device=device)


def both(scores, mask):
    """The directions of a whole batch, of a matrix of scores, images by texts."""
    own = torch.arange(len(scores), device=scores.device)
    return Direction(scores, mask, own), Direction(scores.T, mask.T, own)


def naive_hinge(scores, mask, margin, max_violation):
    """Sum, or maximum, over each image's texts and over each text's images."""
    size, total = len(scores), 0.0
    for i in range(size):
        negatives = [j for j in range(size) if j != i and not mask[i][j]]
        texts = [max(0.0, margin + scores[i][j] - scores[i][i] - EPSILON) for j in negatives]
        negatives = [j for j in range(size) if j != i and not mask[j][i]]
        images = [max(0.0, margin + scores[j][i] - scores[i][i] - EPSILON) for j in negatives]
        for costs in (texts, images):
            total += max(costs, default=0.0) if max_violation else sum(costs)
    return total


def naive_info_nce(scores, mask, scale):
    size, total = len(scores), 0.0
    for i in range(size):
        own = math.exp(scale * scores[i][i])
        negatives = [j for j in range(size) if j != i and not mask[i][j]]
        texts = sum(math.exp(scale * scores[i][j]) for j in negatives)
        negatives = [j for j in range(size) if j != i and not mask[j][i]]
        images = sum(math.exp(scale * scores[j][i]) for j in negatives)
        total -= math.log(own / (own + texts)) + math.log(own / (own + images))
    return total / (2 * size)


# ------------------------------------------------------------------ published values and oracles


@pytest.mark.parametrize(("name", "max_violation"), [("triplet_sum", False), ("triplet_max", True)])
def test_hinge_equals_the_published_value(device, name, max_violation):
    published = np.load(PUBLISHED)
    scores = torch.from_numpy(published["scores"]).to(device)
    found = hinge_loss(both(scores, eye(len(scores), device)), max_violation=max_violation)
    assert found.item() == pytest.approx(float(published[name]), rel=1e-6)


@pytest.mark.parametrize("scale", [1 / 0.07, 3.0, 100.0])
def test_info_nce_equals_open_clip(device, scale):
    image, text = unit_features(device=device)
    expected = ClipLoss()(image, text, torch.tensor(scale, device=device))
    log_scale = torch.tensor(math.log(scale), device=device)
    found = info_nce(both(image @ text.T, eye(device=device)), log_scale)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("seed", range(3))
def test_masked_losses_of_the_options_equal_double_loops(device, loss, seed):
    image, text = unit_features(seed, device)
    mask, scale = random_mask(seed + 10), torch.tensor(1.5, device=device)
    found = batch_loss(image, text, scale, mask.to(device), {"loss": loss})
    scores, mask = (image @ text.T).tolist(), mask.tolist()
    if loss == "infonce":
        expected = naive_info_nce(scores, mask, math.exp(1.5))
    else:
        expected = naive_hinge(scores, mask, 0.2, max_violation=loss == "hinge-max")
    assert found.device.type == device.type
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_batch_loss_is_computed_in_fp32_of_half_precision_features(device):
    image, text = (part.bfloat16() for part in unit_features(device=device))
    scale = torch.tensor(1.5, device=device)
    found = batch_loss(image, text, scale, eye(device=device), {"loss": "infonce"})
    scores = (image.double() @ text.double().T).tolist()
    assert found.dtype == torch.float32
    expected = naive_info_nce(scores, eye().tolist(), math.exp(1.5))
    assert found.item() == pytest.approx(expected, rel=1e-5)


# ------------------------------------------------------------------ other positives


def test_the_diagonal_is_positive_even_where_the_mask_omits_it():
    scores, mask, scale = random_scores(), random_mask(), torch.tensor(1.0)
    bare = mask & ~eye()
    assert torch.equal(info_nce(both(scores, bare), scale), info_nce(both(scores, mask), scale))
    assert torch.equal(hinge_loss(both(scores, bare)), hinge_loss(both(scores, mask)))


def test_positives_leave_the_denominator_by_row_for_images_and_by_column_for_texts():
    # exp(scores): 4 2 1 / 1 3 5 / 2 2 6. Text 1 also fits image 0.
    scores = torch.tensor([[4.0, 2.0, 1.0], [1.0, 3.0, 5.0], [2.0, 2.0, 6.0]]).log()
    mask = eye(3)
    mask[0, 1] = True
    rows = [4 / (4 + 1), 3 / (1 + 3 + 5), 6 / (2 + 2 + 6)]
    columns = [4 / (4 + 1 + 2), 3 / (3 + 2), 6 / (1 + 5 + 6)]
    expected = -sum(math.log(share) for share in rows + columns) / 6
    found = info_nce(both(scores, mask), torch.tensor(0.0))
    assert found.item() == pytest.approx(expected, rel=1e-6)


def test_a_batch_of_positives_only_has_no_loss():
    scores, mask = random_scores(), torch.ones(SIZE, SIZE, dtype=torch.bool)
    assert info_nce(both(scores, mask), torch.tensor(2.0)).item() == 0
    assert hinge_loss(both(scores, mask)).item() == 0
    assert hinge_loss(both(scores, mask), max_violation=True).item() == 0


# ------------------------------------------------------------------ the mask


@pytest.mark.parametrize(
    ("images", "texts", "captions", "expected"),
    [
        # Texts of the same image.
        ([7, 8, 7], [0, 1, 2], [[0, -1], [1, -1], [2, -1]], ["101", "010", "101"]),
        # Image 0 also has text 1 among its captions, but image 1 does not have text 0.
        ([0, 1, 2], [0, 1, 2], [[0, 1, 5], [1, 6, -1], [2, -1, -1]], ["110", "010", "001"]),
        # Two images have equal texts.
        ([0, 1], [4, 4], [[4, 3], [2, 4]], ["11", "11"]),
        # Padding matches nothing.
        ([0, 1, 2], [0, 1, 2], [[0, -1, -1], [1, -1, -1], [2, -1, -1]], ["100", "010", "001"]),
    ],
)
def test_texts_that_fit_an_image_are_positives(device, images, texts, captions, expected):
    arguments = (torch.tensor(value, device=device) for value in (images, texts, captions))
    found = positive_mask(*arguments)
    assert found.device.type == device.type
    assert found.tolist() == [[digit == "1" for digit in row] for row in expected]


# ------------------------------------------------------------------ temperature


def test_logit_scale_is_bounded():
    scores = random_scores()
    bound = naive_info_nce(scores.double().tolist(), eye().tolist(), 100.0)
    for factor in (1, 10):
        found = info_nce(both(scores, eye()), torch.tensor(math.log(factor * MAX_SCALE)))
        assert found.item() == pytest.approx(bound, rel=1e-5)


def test_logit_scale_learns_below_the_bound_and_is_pulled_back_there():
    # The pairs fit: a sharper distribution is better.
    scale = torch.tensor(math.log(5.0), requires_grad=True)
    info_nce(both(torch.eye(3), eye(3)), scale).backward()
    step = 1e-3
    with torch.no_grad():
        above, below = (info_nce(both(torch.eye(3), eye(3)), scale + s) for s in (step, -step))
    assert scale.grad.item() == pytest.approx((above - below).item() / (2 * step), rel=1e-2)
    assert scale.grad.item() < 0
    beyond = torch.tensor(9.0, requires_grad=True)
    clamp_logit_scale(beyond)
    assert math.log(MAX_SCALE) - 1e-3 < beyond.item() < math.log(MAX_SCALE)
    info_nce(both(0.01 * torch.eye(3), eye(3)), beyond).backward()
    assert beyond.grad != 0
