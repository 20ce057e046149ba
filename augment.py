"""Augmentation: one affine map moves an image's pixels and its detections alike.

Crops, flips and quarter turns are drawn on the CPU, for each image by its own generator; the pixels
are moved for a whole batch on the device. Sizes in the shapes below: B images, n detections.
"""

import math

import numpy as np
import torch.nn.functional as F

import clip

AUGMENTATIONS = ("crop", "flip", "turn")


def draw_affine(rng, augment):
    """A (2, 3) map from output to input coordinates, both in [-1, 1] over the square crop."""
    matrix, shift = np.eye(2), np.zeros(2)
    if "turn" in augment:
        quarter = np.array([[0.0, -1.0], [1.0, 0.0]])
        matrix = np.linalg.matrix_power(quarter, int(rng.integers(4)))
    if "flip" in augment and rng.random() < 0.5:
        matrix = matrix @ np.diag([-1.0, 1.0])
    if "crop" in augment:
        zoom = rng.uniform(0.75, 1)
        matrix, shift = matrix * zoom, rng.uniform(zoom - 1, 1 - zoom, 2)
    return np.concatenate([matrix, shift[:, None]], axis=1)


def move_boxes(slots, boxes, size, affine):
    """Detections as they lie after `affine`: (slots, boxes, size); those moved out are left out."""
    width, height = size
    half = min(width, height) / 2  # the square crop's
    inverse = np.linalg.inv(affine[:, :2])
    zoom = math.sqrt(abs(np.linalg.det(inverse)))
    centres = (boxes[:, :2] - (width / 2, height / 2)) / half
    centres = (centres - affine[:, 2]) @ inverse.T  # (n, 2)
    directions = np.stack([np.cos(boxes[:, 4]), np.sin(boxes[:, 4])], axis=1) @ inverse.T
    if abs(inverse[0, 0]) < abs(inverse[0, 1]):  # an odd number of quarter turns
        width, height = height, width
    moved = boxes.copy()
    moved[:, :2] = centres * half + (width / 2, height / 2)
    moved[:, 2:4] *= zoom
    moved[:, 4] = np.arctan2(directions[:, 1], directions[:, 0])
    inside = ((moved[:, :2] > 0) & (moved[:, :2] < (width, height))).all(axis=1)
    return slots[inside], moved[inside], (width, height)


def augmented(pixels, affine):
    """Apply the maps (B, 2, 3) to uint8 pixels (B, 3, H, W) on their device; normalised float."""
    grid = F.affine_grid(affine, list(pixels.shape), align_corners=False)  # (B, H, W, 2)
    return F.grid_sample(
        clip.normalize(pixels), grid, padding_mode="reflection", align_corners=False
    )
