"""Image files: find them and their detections, open them safely, tell them by their content."""

import hashlib
import os
import struct
from collections import defaultdict
from pathlib import Path, PurePosixPath

from PIL import Image, TiffImagePlugin

from det_formats.det_json import load_detections
from det_formats.foreign import SHOWN, foreign_format_of_file
from escaping import escaped
from writing import written_whole

SUFFIXES = {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp", ".gif"}


MOST_SHRUNK = 4  # times, without a warning: an object of 16 pixels is one of 4 then


LONGEST = 2  # times as long as wide, without a warning: the crop to a square takes half away


_EIGHT_BIT = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}


def is_image(path):
    """Whether a path ends like an image file."""
    return Path(path).suffix.lower() in SUFFIXES


def check_picture_name(path, flag="--draw"):
    """Raise ValueError where `save_picture` cannot write to a path of this suffix."""
    if not is_image(path):
        raise ValueError(
            f"{flag} {escaped(path)}: the suffix is of no image format; end it in .png"
        )


def save_picture(picture, path):
    """Write a PIL image to a file, whole or not at all, in the format of its suffix."""
    with written_whole(path) as temporary:
        picture.save(temporary, format=Image.registered_extensions()[Path(path).suffix.lower()])


def files_below(root):
    """Relative paths, with `/`, of all files below a folder, in a fixed order.

    Links to folders are followed, and each folder is looked at once: by its first path. Raises
    OSError for a folder that cannot be listed.
    """
    paths = []
    seen = set()
    for folder, folders, files in os.walk(root, onerror=_raise, followlinks=True):
        real_folder = os.path.realpath(folder)
        if real_folder in seen:  # a link to a folder above it, or to one beside it
            folders.clear()
            continue
        seen.add(real_folder)
        folders.sort()
        below = Path(folder).relative_to(root)
        for name in sorted(files):
            paths.append((below / name).as_posix())
    return paths


def _raise(error):
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):  # there is none then
        raise error


def index_images(root):
    """Image files below a folder: {stem: [relative paths]}."""
    index = defaultdict(list)
    for path in files_below(root):
        if is_image(path):
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
    wanted = without_suffix(name).parts or ("",)  # of "" and ".", which fit none
    fits = []
    for path in index.get(wanted[-1], []):
        parts = PurePosixPath(path).with_suffix("").parts
        if parts[-len(wanted) :] == wanted:
            fits.append(path)
    if len(fits) > 1:
        raise ValueError(
            f"{escaped(root)}: '{escaped(name)}' fits {escaped(fits[0])} and {escaped(fits[1])}; "
            "name it with its folder"
        )
    if not fits:
        raise ValueError(f"{escaped(root)}: no image '{escaped(name)}' below it")
    return fits[0]


def match_detections(images, folder):
    """Find each image's detection file: {image path: Path or None}.

    images: all images of the data set, paths with `/`; folder: its `*.json` files, any depth. Paths
    are compared without extension. An image `a/b.tif` has the file `a/b.json`. Failing that,
    leading folders are taken off the image's path, and the longest remaining path that is a file
    counts, down to the bare stem; but not a file that is another image's whole path. An example:

        images              files               found
        train/sea/1.tif     sea/1.json          sea/1.json, after "train/" is taken off
        train/2.tif         2.json              2.json, after "train/" is taken off
        3.tif               3.json              3.json
        train/3.tif                             None: 3.json is the file of 3.tif

    Raises ValueError, so that no image gets another's graph, where two images without extension
    are the same path and have a file, and where a shortened path is not certain: two images, or two
    files, end in it.
    """
    folder = Path(folder)
    paths = files_below(folder)
    files = {path.removesuffix(".json") for path in paths if path.endswith(".json")}
    stems = {image: PurePosixPath(image).with_suffix("").as_posix() for image in images}
    _require_one_image_per_file(stems, files, folder)
    whole_paths = files & set(stems.values())
    images_ending_in = _by_tail(stems.values())
    files_ending_in = _by_tail(files)
    found = {}
    for image, stem in stems.items():
        tail = _longest_tail(stem, files, whole_paths)
        if tail is None:
            found[image] = None
            continue
        if tail != stem:
            _require_certain(image, folder / f"{tail}.json", images_ending_in[tail])
            _require_certain(image, folder / f"{tail}.json", files_ending_in[tail])
        found[image] = folder / f"{tail}.json"
    return found


def _require_one_image_per_file(stems, files, folder):
    """Raise ValueError where two images, as port.tif and port.png, have one whole path."""
    first_of = {}
    for image, stem in stems.items():
        first = first_of.setdefault(stem, image)
        if first != image and stem in files:
            raise ValueError(
                f"{escaped(folder / stem)}.json fits {escaped(first)} and {escaped(image)}; "
                "rename one"
            )


def _longest_tail(stem, files, whole_paths):
    """The longest tail of an image's path that is a file and not another image's own; or None."""
    for tail in _tails(stem):
        is_own = tail == stem
        if tail in files and (is_own or tail not in whole_paths):
            return tail
    return None


def _require_certain(image, file, candidates):
    """Raise ValueError where several paths end in the shortened path that a file was found by."""
    if len(candidates) > 1:
        first, second = escaped(candidates[0]), escaped(candidates[1])
        raise ValueError(
            f"{escaped(file)} for {escaped(image)} is not certain, as {first} and {second} end "
            "alike; put detections into folders like the images'"
        )


def _tails(path):
    """A path, then what is left of it without its first folder, its first two, ..."""
    parts = path.split("/")
    return ["/".join(parts[i:]) for i in range(len(parts))]


def _by_tail(paths):
    """For every tail the paths that end in it, sorted: {"1": ["a/1", "b/1"], "a/1": ["a/1"]}."""
    found = defaultdict(list)
    for path in sorted(paths):
        for tail in _tails(path):
            found[tail].append(path)
    return found


# ------------------------------------------------------------------ folders of detections


def require_detection_folder(path, option="--det-json"):
    """Raise ValueError where an option names no folder; a file of others is called by name."""
    if Path(path).is_dir():
        return
    shown = escaped(path)
    if not Path(path).is_file():
        raise ValueError(f"{shown}: no such folder; check {option}")
    foreign = foreign_format_of_file(path)
    if foreign:
        raise ValueError(f"{shown}: this is {foreign}; {SHOWN}")
    raise ValueError(f"{shown}: a file; {option} takes the folder of the detection files")


def have_objects(files):
    """Whether a detection file among these (None for an image without) holds an object."""
    return any(file is not None and load_detections(file) for file in files)


def no_objects(names, files, folder):
    """The line that says why none of the images has an object from its folder of detections.

    names: paths of the images as the folder mirrors them; files: their detection files, or None.
    """
    with_file = sum(file is not None for file in files)
    if with_file:
        return (
            f"{escaped(folder)}: {with_file} of {len(names)} images have a detection file there, "
            f"all of them empty lists; {_OTHER_FOLDER}"
        )
    looked_for = [f"{without_suffix(name)}.json" for name in names[:3]]
    return (
        f"{escaped(folder)}: none of {len(names)} images has a detection file there; looked for "
        f"{_listed(looked_for, len(names))}; {_content_of(Path(folder))}; {_OTHER_FOLDER}"
    )


_OTHER_FOLDER = "name the folder of these images' detections by --det-json, or leave it out"


def _content_of(folder):
    """What lies in a folder of detections, in words: three names, and whose format it is."""
    names = files_below(folder)
    if not names:
        return "the folder is empty"
    content = f"the folder holds {_listed(names[:3], len(names))}"
    for name in names[:20]:  # a list of classes or a note may lie before the first
        foreign = foreign_format_of_file(folder / name)
        if foreign:
            return f"{content}; {escaped(PurePosixPath(name).name)} is {foreign}; {SHOWN}"
    return content


def _listed(names, count):
    """The first names of `count`, in words."""
    more = ", ..." if count > len(names) else ""
    return ", ".join(escaped(name) for name in names) + more


# ------------------------------------------------------------------ pictures


def open_image(path):
    """Read an image file whole, as PIL RGB.

    Raises ValueError that names the file where it is missing, no regular file (a pipe would wait
    for ever), broken, cut short, not of eight bits a channel (a conversion would have to guess the
    range), or of more bands than a photo. Of four bands of eight bits the first three are taken.
    """
    shown = escaped(path)
    if not os.path.exists(path):
        raise ValueError(f"{shown}: no such image")
    if not os.path.isfile(path):
        raise ValueError(f"{shown}: no regular file")
    bands = _unusual_bands(path)
    if bands is not None:
        raise ValueError(f"{shown}: {bands}; {_AS_RGB}")
    try:
        with Image.open(path) as image:
            mode = image.mode
            # PIL reads 16 bits a colour as RGB and keeps the upper eight.
            has_eight_bits = mode in _EIGHT_BIT and ";16" not in str(image.tile)
            pixels = image.convert("RGB") if has_eight_bits else None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # PIL has ValueErrors of its own, as for too much compressed text in a PNG.
        raise ValueError(f"{shown}: not readable as an image ({error})") from None
    if pixels is None:
        raise ValueError(f"{shown}: mode {mode}; {_AS_RGB}")
    return pixels


def size_of(path):
    """(width, height) of an image file in pixels, by its head alone; ValueError as `open_image`."""
    if not os.path.isfile(path):
        raise ValueError(f"{escaped(path)}: no such image")
    most = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None  # nothing is decoded here, so a scene may be large
    try:
        with Image.open(path) as image:
            return image.size
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{escaped(path)}: not readable as an image ({error})") from None
    finally:
        Image.MAX_IMAGE_PIXELS = most


def fault_of(path):
    """What is wrong with an image file, in words; None where `open_image` reads it."""
    try:
        open_image(path)
    except ValueError as error:
        return str(error)
    return None


_AS_RGB = "choose three bands and stretch them to 8 bits, as gdal_translate -b -scale -ot Byte does"


def _unusual_bands(path):
    """The bands of a TIFF file in words, where they are not a photo's; None for all other files.

    PIL takes the first three of some, and refuses others without a reason.
    """
    try:
        with open(path, "rb") as file:
            directory = TiffImagePlugin.ImageFileDirectory_v2(file.read(8))
            file.seek(directory.next)
            directory.load(file)
            bits = directory.get(TiffImagePlugin.BITSPERSAMPLE, (1,))
            bands = directory.get(TiffImagePlugin.SAMPLESPERPIXEL, 1)
    except (OSError, SyntaxError, ValueError, TypeError, struct.error):
        return None
    if bands <= 4 and max(bits) <= 8:
        return None
    return f"{bands} band{'s' if bands > 1 else ''} of {max(bits)} bits"


def windows(size, side, overlap):
    """Windows that cover an image: a list of (left, top, right, bottom) in pixels, row by row.

    size: (width, height) of the image; side: of the windows, which are squares, or less where the
    image is smaller; overlap: the least that two neighbours share. The last window of a row and of
    a column ends at the image's border and shares more. Raises ValueError where a window would not
    get on: for an overlap of the whole side or more.
    """
    if not 0 <= overlap < side:
        raise ValueError(f"windows of {side} pixels cannot overlap by {overlap}")
    width, height = size
    found = []
    for top in _starts(height, side, overlap):
        for left in _starts(width, side, overlap):
            found.append((left, top, min(left + side, width), min(top + side, height)))
    return found


def _starts(length, side, overlap):
    """Where windows begin along one side of an image."""
    last = max(0, length - side)
    return [*range(0, last, side - overlap), last]


def losses(sizes, image_size):
    """What images lose on the way to image_size pixels a side: a list of lines, empty if nothing.

    sizes: {path: (width, height) in pixels}, None for an image that cannot be read.
    """
    shrunk = []  # (times, path) of large images
    cropped = []  # (times, path) of long ones
    for path, size in sizes.items():
        if size is not None:
            short, long = sorted(size)
            if short > MOST_SHRUNK * image_size:
                shrunk.append((short / image_size, path))
            if long > LONGEST * short:
                cropped.append((long / short, path))
    lines = []
    if shrunk:
        times, path = max(shrunk, key=lambda pair: pair[0])
        lines.append(
            f"{len(shrunk)} of {len(sizes)} images are shrunk more than {MOST_SHRUNK} times to "
            f"{image_size} pixels, {escaped(path)} {times:.0f} times: small objects vanish; cut "
            "large images into tiles"
        )
    if cropped:
        times, path = max(cropped, key=lambda pair: pair[0])
        lines.append(
            f"{len(cropped)} of {len(sizes)} images are more than {LONGEST} times as long as wide, "
            f"{escaped(path)} {times:.1f} times: only the square in the middle is seen"
        )
    return lines


def jpeg_fault(content):
    """What is wrong with the end of a JPEG file's bytes; None for others and where all is well."""
    if not content.startswith(b"\xff\xd8") or content.endswith(b"\xff\xd9"):
        return None
    end = content.rfind(b"\xff\xd9")
    last_scan = content.rfind(b"\xff\xda")
    if end <= last_scan:  # pixels follow, among which this marker never stands by chance
        return "no end-of-image marker"
    return f"{len(content) - end - 2} bytes after the end-of-image marker"


def content_hash(image):
    """A digest of a PIL image's size and pixels: equal for the same picture in another file."""
    content = repr(image.size).encode() + image.tobytes()
    return hashlib.blake2b(content, digest_size=16).hexdigest()
