"""Hinge and InfoNCE against published values, open_clip and loops; the mask of positives."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss

from loss import EPSILON, MAX_SCALE, batch_loss, hinge_loss, info_nce, positive_mask

PUBLISHED = Path(__file__).parent / "fixtures" / "published" / "outputs.npz"
SIZE = 7
INFO_NCE = {"loss": "infonce", "margin": 0.2}
HINGES = {"hinge": False, "hinge-max": True}


def random_scores(size=SIZE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(size, size, generator=generator) * 2 - 1


def random_mask(size=SIZE, seed=1):
    """An asymmetric mask with some, but not all, entries beside the diagonal."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(size, size, generator=generator) < 0.3
    mask |= torch.eye(size, dtype=torch.bool)
    assert (mask != mask.T).any()
    return mask


def unit_features(count=SIZE, width=16, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    pair = torch.randn(2, count, width, generator=generator)
    return F.normalize(pair, dim=-1).to(device)


def eye(size=SIZE, device="cpu"):
    return torch.eye(size, dtype=torch.bool, device=device)


def gradient(function, scores):
    scores = scores.clone().requires_grad_()
    function(scores).backward()
    return scores.grad


def naive_hinge(scores, mask, margin, max_violation):
    """Sum, or maximum, over each image's texts and over each text's images."""
    size, total = len(scores), 0.0
    for i in range(size):
        negatives = [j for j in range(size) if j != i and not mask[i][j]]
        texts = [max(0.0, margin + scores[i][j] - scores[i][i] - EPSILON) for j in negatives]
        negatives = [j for j in range(size) if j != i and not mask[j][i]]
        others = [max(0.0, margin + scores[j][i] - scores[i][i] - EPSILON) for j in negatives]
        for costs in (texts, others):
            total += max(costs, default=0.0) if max_violation else sum(costs)
    return total


def naive_info_nce(scores, mask, scale):
    size, total = len(scores), 0.0
    for i in range(size):
        own = math.exp(scale * scores[i][i])
        texts = sum(
            math.exp(scale * scores[i][j]) for j in range(size) if j != i and not mask[i][j]
        )
        images = sum(
            math.exp(scale * scores[j][i]) for j in range(size) if j != i and not mask[j][i]
        )
        total -= math.log(own / (own + texts)) + math.log(own / (own + images))
    return total / (2 * size)


# ------------------------------------------------------------------ published values and oracles


@pytest.mark.parametrize(("name", "max_violation"), [("triplet_sum", False), ("triplet_max", True)])
def test_hinge_equals_the_published_value(device, name, max_violation):
    published = np.load(PUBLISHED)
    scores = torch.from_numpy(published["scores"]).to(device)
    found = hinge_loss(scores, eye(len(scores), device), max_violation=max_violation)
    assert found.item() == pytest.approx(float(published[name]), rel=1e-6)


@pytest.mark.parametrize("scale", [1 / 0.07, 3.0, 100.0])
def test_info_nce_equals_open_clip(device, scale):
    image, text = unit_features(device=device)
    expected = ClipLoss()(image, text, torch.tensor(scale, device=device))
    log_scale = torch.tensor(math.log(scale), device=device)
    found = info_nce(image @ text.T, eye(device=device), log_scale)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("max_violation", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_masked_hinge_equals_a_double_loop(max_violation, seed):
    scores, mask = random_scores(seed=seed), random_mask(seed=seed + 10)
    expected = naive_hinge(scores.tolist(), mask.tolist(), 0.3, max_violation)
    found = hinge_loss(scores, mask, 0.3, max_violation)
    assert found.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_masked_info_nce_equals_a_double_loop(seed):
    scores, mask = random_scores(seed=seed), random_mask(seed=seed + 10)
    expected = naive_info_nce(scores.tolist(), mask.tolist(), 5.0)
    found = info_nce(scores, mask, torch.tensor(math.log(5.0)))
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_the_diagonal_is_positive_even_where_the_mask_omits_it():
    scores, mask = random_scores(), random_mask()
    bare = mask & ~eye()
    scale = torch.tensor(1.0)
    assert torch.equal(info_nce(scores, bare, scale), info_nce(scores, mask, scale))
    assert torch.equal(hinge_loss(scores, bare), hinge_loss(scores, mask))


# ------------------------------------------------------------------ other positives


def test_positives_leave_the_denominator_by_row_for_images_and_by_column_for_texts():
    # exp(scores): 4 2 1 / 1 3 5 / 2 2 6. Text 1 also fits image 0.
    scores = torch.tensor([[4.0, 2.0, 1.0], [1.0, 3.0, 5.0], [2.0, 2.0, 6.0]]).log()
    mask = eye(3)
    mask[0, 1] = True
    rows = [4 / (4 + 1), 3 / (1 + 3 + 5), 6 / (2 + 2 + 6)]
    columns = [4 / (4 + 1 + 2), 3 / (3 + 2), 6 / (1 + 5 + 6)]
    expected = -sum(math.log(share) for share in rows + columns) / 6
    found = info_nce(scores, mask, torch.tensor(0.0))
    assert found.item() == pytest.approx(expected, rel=1e-6)


def test_positives_leave_the_hinge_by_row_for_images_and_by_column_for_texts():
    scores = torch.tensor([[0.5, 0.6, 0.0], [0.1, 0.5, 0.4], [0.0, 0.2, 0.5]])
    mask = eye(3)
    mask[0, 1] = True
    # The margin of 0.2 is violated by [0, 1], which does not count, and by [1, 2] in both ways.
    assert hinge_loss(scores, mask, 0.2).item() == pytest.approx(0.2, abs=1e-5)
    assert hinge_loss(scores, eye(3), 0.2).item() == pytest.approx(0.8, abs=1e-5)


@pytest.mark.parametrize("loss", ["infonce", "hinge", "hinge-max"])
def test_a_false_negative_gets_no_gradient(loss):
    scores, mask = random_scores(), random_mask()
    scores[mask & ~eye()] = 0.99  # the strongest of all, so that it would be pushed hardest

    def masked(s):
        if loss == "infonce":
            return info_nce(s, mask, torch.tensor(2.0))
        return hinge_loss(s, mask, 0.2, HINGES[loss])

    found = gradient(masked, scores)
    assert (found[mask & ~eye()] == 0).all()
    assert (found[~mask] >= 0).all() and found[~mask].max() > 0
    assert (found.diag() <= 0).all() and found.diag().min() < 0


def test_without_the_mask_a_false_negative_is_pushed_away():
    scores, mask = random_scores(), random_mask()
    scores[mask & ~eye()] = 0.99
    found = gradient(lambda s: info_nce(s, eye(), torch.tensor(2.0)), scores)
    assert (found[mask & ~eye()] > 0).all()


def test_a_batch_of_positives_only_has_no_loss():
    scores, mask = random_scores(), torch.ones(SIZE, SIZE, dtype=torch.bool)
    assert info_nce(scores, mask, torch.tensor(2.0)).item() == 0
    assert hinge_loss(scores, mask).item() == hinge_loss(scores, mask, 0.2, True).item() == 0


# ------------------------------------------------------------------ the mask


def mask_of(images, texts, captions):
    return positive_mask(torch.tensor(images), torch.tensor(texts), torch.tensor(captions)).tolist()


def test_texts_of_the_same_image_are_positives():
    captions = [[0, -1], [1, -1], [2, -1]]
    assert mask_of([7, 8, 7], [0, 1, 2], captions) == [
        [True, False, True],
        [False, True, False],
        [True, False, True],
    ]


def test_any_training_caption_of_an_image_is_a_positive_in_one_direction():
    # Image 0 also has text 1 among its captions, but image 1 does not have text 0.
    captions = [[0, 1, 5], [1, 6, -1], [2, -1, -1]]
    assert mask_of([0, 1, 2], [0, 1, 2], captions) == [
        [True, True, False],
        [False, True, False],
        [False, False, True],
    ]


def test_equal_texts_of_two_images_are_positives_both_ways():
    assert mask_of([0, 1], [4, 4], [[4, 3], [2, 4]]) == [[True, True], [True, True]]


def test_padding_matches_nothing():
    padded = mask_of([0, 1, 2], [0, 1, 2], [[0, -1, -1], [1, -1, -1], [2, -1, -1]])
    assert padded == eye(3).tolist()


def test_positive_mask_runs_where_its_inputs_are(device):
    arguments = ([0, 1], [0, 1], [[0, 1], [1, -1]])
    found = positive_mask(*(torch.tensor(value, device=device) for value in arguments))
    assert found.device.type == device.type
    assert found.tolist() == [[True, True], [False, True]]


# ------------------------------------------------------------------ temperature


def test_logit_scale_is_bounded():
    scores = random_scores()
    bound = info_nce(scores, eye(), torch.tensor(math.log(MAX_SCALE)))
    beyond = info_nce(scores, eye(), torch.tensor(math.log(10 * MAX_SCALE)))
    assert beyond.item() == pytest.approx(bound.item(), rel=1e-5)
    assert bound.item() == pytest.approx(
        naive_info_nce(scores.double().tolist(), eye().tolist(), 100.0), rel=1e-5
    )


def test_logit_scale_learns_below_the_bound():
    # The pairs fit: a sharper distribution is better.
    scores = torch.eye(3).requires_grad_()
    scale = torch.tensor(math.log(5.0), requires_grad=True)
    info_nce(scores, eye(3), scale).backward()
    step = 1e-3
    with torch.no_grad():
        above, below = (info_nce(scores, eye(3), scale + s) for s in (step, -step))
    assert scale.grad.item() == pytest.approx((above - below).item() / (2 * step), rel=1e-2)
    assert scale.grad.item() < 0


# ------------------------------------------------------------------ the options' choice


@pytest.mark.parametrize("loss", ["infonce", "hinge", "hinge-max"])
def test_batch_loss_follows_the_options(device, loss):
    image, text = unit_features(device=device)
    mask, scale = random_mask().to(device), torch.tensor(1.5, device=device)
    found = batch_loss(image, text, scale, mask, {"loss": loss, "margin": 0.4})
    scores = (image @ text.T).tolist()
    if loss == "infonce":
        expected = naive_info_nce(scores, mask.tolist(), math.exp(1.5))
    else:
        expected = naive_hinge(scores, mask.tolist(), 0.4, HINGES[loss])
    assert found.device.type == device.type
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_batch_loss_is_computed_in_fp32_of_half_precision_features(device):
    image, text = (part.bfloat16() for part in unit_features(device=device))
    found = batch_loss(image, text, torch.tensor(1.5, device=device), eye(device=device), INFO_NCE)
    scores = (image.double() @ text.double().T).tolist()
    expected = naive_info_nce(scores, eye().tolist(), math.exp(1.5))
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected, rel=1e-5)
