"""CLIP's preparation of images: resize, crop, normalise.

By Pillow alone, which is what torchvision calls: without that package scripts start two seconds
sooner. The tests compare with open_clip.
"""

from functools import partial

import numpy as np
import torch
from PIL import Image

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of red, green and blue, from 0 to 1
STD = (0.26862954, 0.26130258, 0.27577711)


def resize_and_crop(image, image_size):
    """A PIL image as RGB, its short side resized to image_size (bicubic), the centre square cut."""
    image = image.convert("RGB")
    short = min(image.size)
    width, height = (int(image_size * side / short) for side in image.size)
    if image.size != (width, height):
        image = image.resize((width, height), Image.BICUBIC)
    left = round((width - image_size) / 2)
    top = round((height - image_size) / 2)
    return image.crop((left, top, left + image_size, top + image_size))


def pixels_of(image):
    """A PIL RGB image as a uint8 array (3, H, W), contiguous."""
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))  # (3, H, W)


def normalize(images):
    """uint8 pixels (..., 3, H, W) to CLIP's normalised float32, on the device they are on."""
    mean = torch.tensor(MEAN, device=images.device).view(3, 1, 1)
    std = torch.tensor(STD, device=images.device).view(3, 1, 1)
    return (images.float() / 255 - mean) / std


def _preprocessed(image, image_size):
    return normalize(torch.from_numpy(pixels_of(resize_and_crop(image, image_size))))


def preprocess(image_size):
    """CLIP's preprocessing: PIL image to a normalised (3, image_size, image_size) tensor."""
    return partial(_preprocessed, image_size=image_size)
