"""The protocol by hand-ranked examples and oracles."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dataset.annotations import normal_form, read_annotations
from metrics.protocol import measure, retrieval_metrics
from metrics.ranks import retrieval


def test_hand_ranked_example():
    # Captions 0 and 1 belong to image 0, and so on; each row has the ranks beside it.
    scores = np.array(
        [
            [0.9, 0.1, 0.8, 0.2, 0.3, 0.4],  # caption 0 is first
            [0.7, 0.6, 0.5, 0.4, 0.3, 0.1],  # caption 2 is third
            [0.6, 0.5, 0.4, 0.3, 0.1, 0.2],  # caption 5 is fifth
        ]
    )
    # Ranks of the own image for captions 0 ... 5: 1 3 2 1 3 2.
    found = measure(retrieval(scores, [0, 0, 1, 1, 2, 2]), ks=(1, 2, 3))
    third, two_thirds = 100 / 3, 200 / 3
    image_to_text, text_to_image = found["image_to_text"], found["text_to_image"]
    assert [image_to_text[f"R@{k}"] for k in (1, 2, 3)] == pytest.approx([third, third, two_thirds])
    assert [text_to_image[f"R@{k}"] for k in (1, 2, 3)] == pytest.approx([third, two_thirds, 100])
    assert (image_to_text["mean_rank"], image_to_text["median_rank"]) == (3, 3)
    assert (text_to_image["mean_rank"], text_to_image["median_rank"]) == (2, 2)
    assert found["mR"] == pytest.approx(np.mean([third] * 3 + [two_thirds] * 2 + [100]))
    assert found["mR"] == found["mR_pessimistic"] == found["mR_optimistic"]


def test_caption_set_oracle_on_ucm(real_data):
    """1 where a text is among an image's captions."""
    records = read_annotations(real_data / "UCM").splits["test"]
    captions = [caption for record in records for caption in record.captions]
    owners = [i for i, record in enumerate(records) for _ in record.captions]
    scores = [[float(text in record.captions) for text in captions] for record in records]
    found = measure(retrieval(scores, owners))
    bounds = found["mR_pessimistic"], found["mR"], found["mR_optimistic"]
    assert [round(value, 1) for value in bounds] == [38.7, 70.4, 100.0]
    groups = [normal_form(text) for text in captions]
    equivalent = measure(retrieval(scores, owners, group_of_text=groups))
    assert equivalent["mR"] == equivalent["mR_pessimistic"] == 100


# ------------------------------------------------------------------ features


def test_a_caption_of_two_images_ties_them_and_fits_both_where_asked_for():
    """Two images with a caption each of their own and one, at 45 degrees, in common."""
    images = torch.eye(2)
    common = F.normalize(torch.ones(2), dim=0)
    features = images, torch.stack([images[0], common, images[1], common]), [0, 0, 1, 1]
    found = retrieval_metrics(*features, ks=(1,))
    side = found["text_to_image"]
    assert (side["pessimistic"]["R@1"], side["R@1"], side["optimistic"]["R@1"]) == (50, 75, 100)
    assert side["mean_rank"] == 1.25
    assert found["image_to_text"]["R@1"] == 100
    assert (found["images"], found["captions"], found["distinct_texts"]) == (2, 4, 3)
    texts = ["a ship", "Two ships ", "a plane", "two ships"]
    found = retrieval_metrics(*features, captions=texts, ks=(1,))
    assert found["mR"] == found["mR_pessimistic"] == 100


def tied_features(images=30, texts=90, width=8, seed=0):
    """Unit features of which some are equal to the bit; every image has a text."""
    generator = torch.Generator().manual_seed(seed)
    image = F.normalize(torch.randn(images, width, generator=generator), dim=-1)
    text = F.normalize(torch.randn(texts, width, generator=generator), dim=-1)
    image[5:9], text[10:40] = image[0], text[40:70]
    return image, text, np.arange(texts) % images


def test_the_order_of_images_and_texts_changes_nothing():
    image, text, owners = tied_features()
    expected = retrieval_metrics(image, text, owners)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        rows, columns = rng.permutation(len(image)), rng.permutation(len(text))
        place = np.argsort(rows)
        found = retrieval_metrics(image[rows], text[columns], place[owners[columns]])
        assert found == expected


def test_identical_captions_tie_exactly():
    image = F.normalize(torch.randn(12, 512, generator=torch.Generator().manual_seed(0)), dim=-1)
    text = image[:1].repeat(60, 1)  # every caption the same, on products that round
    side = retrieval_metrics(image, text, np.repeat(np.arange(12), 5))["image_to_text"]
    # Five of sixty tied texts are relevant: the first stands at 61 / 6 on average.
    assert side["mean_rank"] == pytest.approx(61 / 6)
    assert (side["pessimistic"]["R@10"], side["optimistic"]["R@1"]) == (0, 100)
    assert side["R@1"] == pytest.approx(100 * 5 / 60)


def test_scores_are_not_rounded_to_the_precision_of_the_features():
    small = 2.0**-13  # whose square float32 loses beside 1
    image = torch.tensor([[1, small], [0, 1]])
    text = torch.tensor([[1, small], [1, 0]])
    found = retrieval_metrics(image, text, [0, 1], ks=(1,))
    assert found["image_to_text"]["mean_rank"] == 1.5  # first and second, no tie


def test_a_k_beyond_the_gallery_is_an_error():
    with pytest.raises(ValueError, match=r"R@31 text_to_image.*30"):
        retrieval_metrics(*tied_features(), ks=(1, 31))
    with pytest.raises(ValueError, match=r"R@91 image_to_text.*90"):
        retrieval_metrics(*tied_features(), ks=(91,))


def test_nan_and_an_image_without_caption_are_errors():
    for which in (0, 1):
        features = tied_features()
        features[which][3, 2] = math.nan
        with pytest.raises(ValueError, match="NaN"):
            retrieval_metrics(*features)
    image, text, owners = tied_features()
    with pytest.raises(ValueError, match=r"1 images have no caption, the first: 4"):
        retrieval_metrics(image, text, np.where(owners == 4, 5, owners))
