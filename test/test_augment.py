"""Augmentation: pixels and boxes move alike."""

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from backbones import preprocess
from conftest import IMAGE_SIZE, MODEL_CONFIG, SIZES, box, write_detections
from dataset.annotations import Record
from dataset.augment import (
    augmented,
    draw_affine,
    draw_colour,
    draw_hole,
    move_boxes,
    stored_size,
)
from dataset.batches import ImageSet, TrainingSet
from det_formats.det_json import read_label_map
from options import AUGMENTATIONS

LABEL_MAP = read_label_map()


def rendered(boxes, size, scale=16):
    """The boxes filled with white on black, (height, width) in [0, 1], smooth at their rims."""
    picture = Image.new("L", (size[0] * scale, size[1] * scale))
    pen = ImageDraw.Draw(picture)
    for cx, cy, w, h, angle, _ in boxes:
        along = np.array([math.cos(angle), math.sin(angle)]) * w / 2
        across = np.array([-math.sin(angle), math.cos(angle)]) * h / 2
        corners = [
            (cx, cy) + a * along + b * across for a, b in ((1, 1), (1, -1), (-1, -1), (-1, 1))
        ]
        pen.polygon([tuple(scale * corner) for corner in corners], fill=255)
    return picture.reduce(scale)


def as_seen(picture, image_size):
    """What the model sees of a PIL image, as (1, 3, image_size, image_size) uint8."""
    pixels = np.array(preprocess.resize_and_crop(picture, image_size))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def brightness(normalised):
    """Normalised pixels (1, 3, H, W) back to brightness (H, W) in [0, 1]."""
    mean, std = preprocess.MEAN[0], preprocess.STD[0]
    return (normalised[0, 0].numpy() * std + mean).clip(0, 1)


def moved_pixels(picture, affine, image_size):
    pixels = as_seen(picture, stored_size(image_size, ("crop",)))
    maps = torch.from_numpy(affine).float()[None]
    return brightness(augmented(preprocess.normalize(pixels), image_size, maps))


def middle_of(seen):
    """The mean position (x, y) of the brightness of a picture."""
    rows, columns = np.mgrid[: seen.shape[0], : seen.shape[1]]
    return (seen * columns).sum() / seen.sum(), (seen * rows).sum() / seen.sum()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("augment", [("flip",), ("turn",), ("crop",), AUGMENTATIONS])
def test_boxes_move_with_the_pixels(size, augment):
    centre = size[0] / 2 + 9, size[1] / 2 - 6  # well inside, and unlike any mirror image
    boxes = np.array([box(*centre, 17, 6, 0.5)])
    picture = rendered(boxes, size)
    checked = 0
    for seed in range(30):
        affine = draw_affine(np.random.default_rng(seed), augment)
        kept, moved, moved_size = move_boxes(np.array([3]), boxes, size, affine)
        expected = brightness(preprocess.normalize(as_seen(rendered(moved, moved_size), 96)))
        if len(kept) == 0 or max(expected[[0, -1]].max(), expected[:, [0, -1]].max()) > 0:
            continue  # cut off at the rim
        seen = moved_pixels(picture, affine, 96)
        assert np.minimum(seen, expected).sum() / np.maximum(seen, expected).sum() > 0.8
        assert middle_of(seen) == pytest.approx(middle_of(expected), abs=0.4)
        assert kept.tolist() == [3] and moved[0, 5] == boxes[0, 5]
        checked += 1
    assert checked >= 15


def test_flip_turn_and_crop_draw_what_they_say():
    def drawn_maps(augment):
        return [draw_affine(np.random.default_rng(seed), augment) for seed in range(400)]

    identity = np.eye(2, 3)
    assert all((m == identity).all() for m in drawn_maps(()))
    flips = np.array([m[0, 0] for m in drawn_maps(("flip",))])
    assert set(flips) == {1, -1} and abs(flips.mean()) < 0.15
    turns = np.stack(drawn_maps(("turn",)))
    assert np.allclose(turns[:, :, :2] @ turns[:, :, :2].transpose(0, 2, 1), np.eye(2))
    assert np.allclose(np.linalg.det(turns[:, :, :2]), 1) and (turns[:, :, 2] == 0).all()
    angles = np.arctan2(turns[:, 1, 0], turns[:, 0, 0])
    assert np.histogram(angles, 8, (-math.pi, math.pi))[0].min() > 25  # of 50: every direction
    crops = np.stack(drawn_maps(("crop",)))
    zooms, shifts = crops[:, 0, 0], crops[:, :, 2]
    assert zooms.min() < 0.52 and zooms.max() > 0.98 and (zooms >= 0.5).all()
    # The visible part lies within the image, and reaches its rims.
    assert (abs(shifts) <= 1 - zooms[:, None]).all()
    assert (abs(shifts) / (1 - zooms[:, None])).max() > 0.95
    mirrored = [np.linalg.det(m[:, :2]) < 0 for m in drawn_maps(("turn", "flip"))]
    assert 0.4 < np.mean(mirrored) < 0.6


def test_a_square_of_the_mean_colour_is_erased():
    images = torch.ones(2, 3, 20, 20)
    seen = augmented(images, 20, hole=torch.tensor([[0.5, 0.25], [0.0, 1.0]]))
    expected = torch.ones(2, 3, 20, 20)
    expected[0, :, 2:8, 7:13] = 0  # 0.3 of the side, about x 10 and y 5
    expected[1, :, 17:, :3] = 0  # cut off by the rim
    assert torch.equal(seen, expected) and (images == 1).all()
    holes = np.stack([draw_hole(np.random.default_rng(seed)) for seed in range(400)])
    assert ((holes >= 0) & (holes < 1)).all() and abs(holes.mean(axis=0) - 0.5).max() < 0.05


def test_boxes_outside_are_left_out():
    boxes = np.array([box(20, 20), box(50, 50), box(60, 5)])
    zoomed = np.array([[0.75, 0, -0.25], [0, 0.75, -0.25]])  # shows 0 ... 48 of 64
    class_ids, moved, size = move_boxes(np.array([1, 2, 3]), boxes, (64, 64), zoomed)
    assert class_ids.tolist() == [1] and size == (64, 64)
    assert moved[0] == pytest.approx(box(20 / 0.75, 20 / 0.75, 10 / 0.75, 5 / 0.75))
    none, no_boxes, _ = move_boxes(class_ids[:0], boxes[:0], (64, 64), zoomed)
    assert len(none) == 0 and no_boxes.shape == (0, 6)
    boxes = np.array([box(5, 24)])  # stays, though the model sees columns 16 ... 64 of 80
    class_ids, moved, size = move_boxes(np.array([1]), boxes, (80, 48), np.eye(2, 3))
    assert class_ids.tolist() == [1] and size == (80, 48) and moved[0] == pytest.approx(boxes[0])


def test_quarter_turns_exchange_width_and_height():
    boxes = np.array([box(70, 10, angle=0.25)])
    turn = np.array([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0]])
    _, moved, size = move_boxes(np.array([1]), boxes, (80, 48), turn)
    assert size == (48, 80)
    # Output (x, y) shows input (-y, x): the box at (30, -14) from the middle comes to (-14, -30).
    assert moved[0] == pytest.approx(box(24 - 14, 40 - 30, angle=0.25 - math.pi / 2))
    _, back, size = move_boxes(np.array([1]), moved, size, -turn)
    assert size == (80, 48) and back[0] == pytest.approx(boxes[0])


def noise(device, size=IMAGE_SIZE):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (3, 3, size, size), generator=generator, dtype=torch.uint8)
    return preprocess.normalize(pixels.to(device))


def test_each_image_has_its_own_map(device):
    pixels = noise(device)
    assert torch.equal(augmented(pixels, IMAGE_SIZE), pixels)
    mirror = torch.tensor([[-1.0, 0, 0], [0, 1, 0]])
    maps = torch.stack([torch.eye(2, 3), mirror, torch.eye(2, 3)]).to(device)
    expected = pixels.clone()
    expected[1] = expected[1].flip(-1)
    torch.testing.assert_close(augmented(pixels, IMAGE_SIZE, maps), expected, rtol=0, atol=1e-5)


def test_cropped_images_come_from_larger_ones(device):
    stored = stored_size(96, ("crop", "flip"))
    assert stored == 128 and stored_size(96, ("flip", "turn", "colour")) == 96
    maps = torch.eye(2, 3, device=device).expand(3, 2, 3) * 0.75
    found = augmented(noise(device, stored), 96, maps)
    # Three quarters of 128 are 96: at this zoom every pixel is one of the stored.
    expected = noise(device, stored)[..., 16:112, 16:112]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_colours_scale_and_shift_the_channels_of_each_image(device):
    pixels = noise(device)
    colour = np.stack([draw_colour(np.random.default_rng(seed)) for seed in range(3)])
    found = augmented(pixels, IMAGE_SIZE, colour=torch.from_numpy(colour).float().to(device))
    for i in range(3):
        for channel in range(3):
            gain, offset = colour[i, :, channel]
            expected = gain * pixels[i, channel] + offset
            torch.testing.assert_close(found[i, channel], expected, rtol=0, atol=1e-5)
    many = np.stack([draw_colour(np.random.default_rng(seed)) for seed in range(500)])
    gains, offsets = many[:, 0], many[:, 1]
    assert 0.72 <= gains.min() < 0.8 and 1.25 < gains.max() <= 1.375
    assert -0.3 <= offsets.min() < -0.29 and 0.29 < offsets.max() <= 0.3
    assert np.mean(gains.std(axis=1)) < 0.5 * np.std(gains.mean(axis=1))  # mostly light, not tint


def test_training_items_hold_the_moved_boxes(tmp_path):
    centre, size = (36, 30), stored_size(64, AUGMENTATIONS)
    rendered([box(*centre, 4, 4)], (64, 64)).convert("RGB").save(tmp_path / "a.png")
    file = write_detections(tmp_path / "a.json", [box(*centre, 4, 4)])
    data = TrainingSet(
        ImageSet(
            [tmp_path / "a.png"], [file], image_size=size, label_map=LABEL_MAP, max_objects=20
        ),
        [Record("a", ("a ship",))],
        model_config={**MODEL_CONFIG, "image_size": 64},
        augment=AUGMENTATIONS,
        drop_graphs=0.0,
        seed=0,
    )
    for epoch in range(20):
        item = data[epoch, 0]
        pixels = preprocess.normalize(item["image"])[None]
        seen = brightness(augmented(pixels, data.image_size, item["affine"][None]))
        nodes = item["nodes"][0, len(LABEL_MAP) :][:2].numpy()
        assert item["mask"].sum() == 1
        assert middle_of(seen) == pytest.approx(32 * (nodes + 1) - 0.5, abs=0.4)
