"""Augmentation: one affine map moves an image's pixels and its detections alike.

Crops, flips, turns, holes and colours are drawn on the CPU, for each image by its own generator;
the pixels are changed for a whole batch on the device. Shapes: B images, n detections.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

SMALLEST_CROP = 0.5  # of the image's side


HOLE = 0.3  # side of what is erased, of the image's


ENLARGED = 4 / 3  # images to be cropped are kept this much larger than the model's input: sharper


def stored_size(image_size, augment):
    """Side of the square in which training images are kept for a model that sees image_size."""
    return round(image_size * ENLARGED) if "crop" in augment else image_size


def draw_affine(rng, augment):
    """A (2, 3) map from output to input coordinates, both in [-1, 1] over the square crop."""
    matrix = np.eye(2)
    shift = np.zeros(2)
    if "turn" in augment:  # by any angle: seen from above, no direction is the upright one
        angle = rng.uniform(0, 2 * math.pi)
        cos = math.cos(angle)
        sin = math.sin(angle)
        matrix = np.array([[cos, -sin], [sin, cos]])
    if "flip" in augment and rng.random() < 0.5:
        matrix = matrix @ np.diag([-1.0, 1.0])
    if "crop" in augment:
        zoom = rng.uniform(SMALLEST_CROP, 1)
        matrix = matrix * zoom
        shift = rng.uniform(zoom - 1, 1 - zoom, 2)
    return np.concatenate([matrix, shift[:, None]], axis=1)  # (2, 3)


def move_boxes(class_ids, boxes, size, affine):
    """Detections as they lie after `affine`, without those moved out: (class ids, boxes, size).

    class_ids (n), boxes (n, 6) in pixels of an image of this size (width, height); affine (2, 3).
    """
    width, height = size
    half = min(width, height) / 2  # the square crop's
    inverse = np.linalg.inv(affine[:, :2])
    zoom = math.sqrt(abs(np.linalg.det(inverse)))
    centres = (boxes[:, :2] - (width / 2, height / 2)) / half
    centres = (centres - affine[:, 2]) @ inverse.T  # (n, 2)
    directions = np.stack([np.cos(boxes[:, 4]), np.sin(boxes[:, 4])], axis=1)
    directions = directions @ inverse.T  # (n, 2)
    if abs(inverse[0, 0]) < abs(inverse[0, 1]):  # nearer to lying on its side
        width, height = height, width
    moved = boxes.copy()
    moved[:, :2] = centres * half + (width / 2, height / 2)
    moved[:, 2:4] *= zoom
    moved[:, 4] = np.arctan2(directions[:, 1], directions[:, 0])
    inside = ((moved[:, :2] > 0) & (moved[:, :2] < (width, height))).all(axis=1)
    return class_ids[inside], moved[inside], (width, height)


def draw_colour(rng):
    """Gain and offset (2, 3) of the normalised channels: light and haze differ between images."""
    gain = rng.uniform(0.8, 1.25) * rng.uniform(0.9, 1.1, 3)
    offset = rng.uniform(-0.3, 0.3, 3)
    return np.stack([gain, offset])  # (2, 3)


def draw_hole(rng):
    """Centre (2) of the square that is erased, x and y in fractions of the image."""
    return rng.uniform(0, 1, 2)


def _erased(images, hole):
    """Images with a square about each hole (B, 2) set to the mean colour, 0."""
    side = images.shape[-1]
    places = (torch.arange(side, device=images.device) + 0.5) / side
    inside = (places - hole[..., None]).abs() < HOLE / 2  # (B, 2, side)
    columns = inside[:, 0, None, None, :]  # (B, 1, 1, side)
    rows = inside[:, 1, None, :, None]  # (B, 1, side, 1)
    return images.masked_fill(rows & columns, 0)


def augmented(images, image_size, affine=None, colour=None, hole=None):
    """Normalised images (B, 3, H, W) to (B, 3, image_size, image_size), changed as far as asked to.

    affine: maps (B, 2, 3); colour: gains and offsets (B, 2, 3); hole: centres (B, 2). Without maps
    H and W are image_size.
    """
    if affine is not None:
        grid = F.affine_grid(affine, [len(images), 3, image_size, image_size], align_corners=False)
        images = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    if colour is not None:
        gain = colour[:, 0, :, None, None]  # (B, 3, 1, 1)
        offset = colour[:, 1, :, None, None]  # (B, 3, 1, 1)
        images = images * gain + offset
    if hole is not None:
        images = _erased(images, hole)
    return images
