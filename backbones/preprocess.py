"""CLIP's preparation of images: resize, crop, normalise."""

import torch
from torchvision import transforms
from torchvision.transforms import InterpolationMode

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of red, green and blue, from 0 to 1
STD = (0.26862954, 0.26130258, 0.27577711)


def _to_rgb(image):
    return image.convert("RGB")


def resize_and_crop(image_size):
    """Transform of a PIL image: RGB, short side to image_size, bicubic, then the centre square."""
    resize = transforms.Resize(image_size, interpolation=InterpolationMode.BICUBIC)
    return transforms.Compose([_to_rgb, resize, transforms.CenterCrop(image_size)])


def normalize(images):
    """uint8 pixels (..., 3, H, W) to CLIP's normalised float32, on the device they are on."""
    mean = torch.tensor(MEAN, device=images.device).view(3, 1, 1)
    std = torch.tensor(STD, device=images.device).view(3, 1, 1)
    return (images.float() / 255 - mean) / std


def preprocess(image_size):
    """CLIP's preprocessing: PIL image to a normalised (3, image_size, image_size) tensor."""
    return transforms.Compose([resize_and_crop(image_size), transforms.PILToTensor(), normalize])
