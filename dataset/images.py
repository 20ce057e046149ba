"""Image files: find them and their detections, open them safely, draw object graphs over them."""

import hashlib
import os
from collections import defaultdict
from pathlib import Path, PurePosixPath

from PIL import Image

SUFFIXES = {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp", ".gif"}


_EIGHT_BIT = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}


def is_image(path):
    """Whether a path ends like an image file."""
    return Path(path).suffix.lower() in SUFFIXES


def index_images(root):
    """Image files below a folder, links followed, each folder once: {stem: [relative paths]}."""
    index, seen = defaultdict(list), set()
    for folder, folders, files in os.walk(root, followlinks=True):
        if os.path.realpath(folder) in seen:  # a link to a folder above it, or to one beside it
            folders.clear()
            continue
        seen.add(os.path.realpath(folder))
        for name in sorted(files):
            if is_image(name):
                path = (Path(folder) / name).relative_to(root).as_posix()
                index[PurePosixPath(path).stem].append(path)
    return index


def without_suffix(name):
    """An annotation's name without extension, folders kept: by it images are told apart."""
    path = PurePosixPath(name.replace("\\", "/"))
    return path.with_suffix("") if is_image(name) else path


def find_image(name, index, root):
    """Relative path of the file that an annotation's name means.

    A bare name is found by its stem, a name with folders by its path, extensions aside. Raises
    ValueError where none fits, and where two do, naming both.
    """
    tail = without_suffix(name).parts
    fits = [
        path
        for path in index.get(tail[-1], [])
        if PurePosixPath(path).with_suffix("").parts[-len(tail) :] == tail
    ]
    if len(fits) > 1:
        raise ValueError(f"{root}: '{name}' fits {fits[0]} and {fits[1]}; name it with its folder")
    if not fits:
        raise ValueError(f"{root}: no image '{name}' below it")
    return fits[0]


def match_detections(images, folder):
    """Find each image's detection file: {image path: Path or None}.

    images: all images of the data set, paths with `/`. `a/b.tif` has `a/b.json`; failing that, the
    longest remaining path counts, down to the bare stem, after taking off leading folders, if one
    image and one file alone end in it. Raises ValueError where they do not, so that no image gets
    another's graph.
    """
    folder = Path(folder)
    files = {p.relative_to(folder).as_posix()[:-5] for p in sorted(folder.rglob("*.json"))}
    stems = {image: PurePosixPath(image).with_suffix("").as_posix() for image in images}
    owners = {}
    for image, stem in stems.items():
        if owners.setdefault(stem, image) != image and stem in files:
            raise ValueError(f"{folder / stem}.json fits {owners[stem]} and {image}; rename one")
    exact = files & set(owners)
    images_by_tail, files_by_tail = _by_tail(stems.values()), _by_tail(files)
    found = {}
    for image, stem in stems.items():
        fits = (t for t in _tails(stem) if t in files and (t == stem or t not in exact))
        tail = next(fits, None)
        found[image] = None if tail is None else folder / f"{tail}.json"
        for claims in (images_by_tail, files_by_tail):
            if tail not in (None, stem) and len(claims[tail]) > 1:
                raise ValueError(
                    f"{folder / tail}.json for {image} is not certain, as {claims[tail][0]} and "
                    f"{claims[tail][1]} end alike; put detections into folders like the images'"
                )
    return found


def _tails(path):
    """A path, then what is left of it without its first folder, its first two, ..."""
    parts = path.split("/")
    return ["/".join(parts[i:]) for i in range(len(parts))]


def _by_tail(paths):
    claims = defaultdict(list)
    for path in sorted(paths):
        for tail in _tails(path):
            claims[tail].append(path)
    return claims


def open_image(path):
    """Read an image file whole, as PIL RGB.

    Raises ValueError that names the file where it is missing, broken, cut short, or not of eight
    bits a channel (a conversion would have to guess the range).
    """
    try:
        with Image.open(path) as image:
            # PIL reads 16 bits a colour as RGB and keeps the upper eight.
            if image.mode not in _EIGHT_BIT or ";16" in str(image.tile):
                raise ValueError(f"{path}: mode {image.mode}; convert it to 8 bits a channel")
            return image.convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such image") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not readable as an image ({error})") from None


def jpeg_fault(content):
    """What is wrong with the end of a JPEG file's bytes; None for others and where all is well."""
    if not content.startswith(b"\xff\xd8") or content.endswith(b"\xff\xd9"):
        return None
    end, last_scan = content.rfind(b"\xff\xd9"), content.rfind(b"\xff\xda")
    if end <= last_scan:  # pixels follow, among which this marker never stands by chance
        return "no end-of-image marker"
    return f"{len(content) - end - 2} bytes after the end-of-image marker"


def content_hash(image):
    """A digest of a PIL image's size and pixels: equal for the same picture in another file."""
    return hashlib.blake2b(repr(image.size).encode() + image.tobytes(), digest_size=16).hexdigest()
