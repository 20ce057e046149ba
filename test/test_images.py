"""Image files: found by their names, matched with their detections, opened safely."""

import io
import os
import struct

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from dataset import images


def make_files(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return images.index_images(folder)


# ------------------------------------------------------------------ images of names


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("81.tif", "imgs/81.jpg"),  # by its stem, in any folder and format
        ("82.tif", "imgs/82.PNG"),
        ("port/1.tif", "imgs/port/1.jpg"),  # by its path
        ("airport\\1.tif", "imgs/airport/1.jpg"),
        ("tile_1.5", "tile_1.5.jpg"),  # dots in stems are kept
        ("tile_1.6.tif", "tile_1.6.jpg"),
        ("notes.txt", None),
        ("2.tif", None),
        ("port/8.tif", None),
        ("", None),
        (".", None),
        ("1.tif", "imgs/airport/1.jpg and imgs/port/1.jpg"),
    ],
)
def test_a_name_means_one_image_or_is_an_error(tmp_path, name, expected):
    files = ("imgs/81.jpg", "imgs/82.PNG", "imgs/8.jpg", "imgs/notes.txt", "tile_1.5.jpg")
    index = make_files(tmp_path, *files, "tile_1.6.jpg", "imgs/airport/1.jpg", "imgs/port/1.jpg")
    if expected is not None and " and " not in expected:
        assert images.find_image(name, index, tmp_path) == expected
        return
    with pytest.raises(ValueError) as failure:
        images.find_image(name, index, tmp_path)
    message = str(failure.value)
    assert f"'{name}'" in message and str(tmp_path) in message
    if expected is not None:  # two images fit
        assert all(path in message for path in expected.split(" and "))


def test_links_in_a_circle_are_followed_once(tmp_path):
    make_files(tmp_path, "a/port.png")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "again").symlink_to(tmp_path / "a")
    index = images.index_images(tmp_path)
    assert list(index) == ["port"] and len(index["port"]) == 1
    assert images.find_image("port.tif", index, tmp_path) == index["port"][0]


# ------------------------------------------------------------------ detections of images


MATCHES = {  # detection files, then each image's
    "a mirrored path before the bare stem": (
        ("train/a/port", "a/port", "port"),
        {"train/a/port.tif": "train/a/port"},
    ),
    "leading folders are taken off down to the stem": (
        ("a/port", "dam"),
        {"train/a/port.tif": "a/port", "x/y/dam.png": "dam", "train/a/dam.v2.tif": None},
    ),
    "whole paths by their ends": (
        ("b", "north/a", "south/a"),
        {
            "/tiles/b.png": "b",
            "/tiles/north/a.png": "north/a",
            "/tiles/south/a.png": "south/a",
        },
    ),
    "none where every claim is another's own": (
        ("port", "a/port"),
        {"port.tif": "port", "a/port.tif": "a/port", "b/a/port.tif": None},
    ),
    "no file": (("port",), {"dam.tif": None, "report.tif": None}),
    "no folder": ((), {"port.tif": None}),
    "two of one path without a file": (("dam",), {"port.tif": None, "port.png": None}),
}


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(("files", "expected"), MATCHES.values(), ids=MATCHES)
def test_detections_are_matched_by_the_longest_path(tmp_path, files, expected, order):
    folder = tmp_path / "det_json"
    make_files(folder, *(f"{file}.json" for file in files))
    found = images.match_detections(list(expected)[::order], folder)
    assert found == {
        image: None if file is None else folder / f"{file}.json" for image, file in expected.items()
    }


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    ("names", "files", "named"),
    [
        # one whole path
        (("port.tif", "port.png"), ("port.json",), ("port.json fits", "port.tif", "port.png")),
        # two images end in a shortened path
        (("a/port.tif", "b/port.tif"), ("port.json",), ("port.json", "a/port", "b/port")),
        (("a/port.tif", "b/port.tif"), ("a/port.json", "port.json"), ("b/port", "a/port")),
        (("train/a/port.tif", "val/a/port.tif"), ("a/port.json",), ("train/a/port", "val/a/port")),
        # two files do
        (("/tiles/1.png",), ("1.json", "a/1.json"), ("/tiles/1.png", "1 and a/1")),
    ],
)
def test_an_uncertain_match_is_an_error_naming_both(tmp_path, names, files, named, order):
    make_files(tmp_path, *files)
    with pytest.raises(ValueError) as failure:
        images.match_detections(names[::order], tmp_path)
    assert str(tmp_path) in str(failure.value)
    assert all(name in str(failure.value) for name in named)


# ------------------------------------------------------------------ opening


def tiff(bands, bits):
    """A black 2 x 2 TIFF of three bands or more, as PIL cannot write it."""
    end = 134 + 2 * bands  # of the list of bits, where the pixels begin
    size = 4 * bands * bits // 8
    tags = {  # number: (type, count, value); shorts are 3, longs 4
        256: (3, 1, 2), 257: (3, 1, 2), 258: (3, bands, 134), 259: (3, 1, 1), 262: (3, 1, 2),
        273: (4, 1, end), 277: (3, 1, bands), 278: (3, 1, 2), 279: (4, 1, size), 284: (3, 1, 1),
    }  # fmt: skip
    directory = struct.pack("<H", len(tags))
    for number, entry in tags.items():
        directory += struct.pack("<HHII", number, *entry)
    head = b"II*\0" + struct.pack("<I", 8) + directory + bytes(4)
    return head + struct.pack(f"<{bands}H", *[bits] * bands) + bytes(size)


def encoded(array, suffix):
    file = io.BytesIO()
    Image.fromarray(array).save(file, suffix)
    return file.getvalue()


NOISE = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
REFUSED = {
    "missing.png": (None, "no such image"),
    "note.png": (b"no image at all", "not readable"),
    "cut.jpg": (encoded(NOISE, "jpeg")[:9000], "not readable"),
    "grey.png": (
        encoded(np.full((4, 4), 1000, np.uint16), "png"),
        "mode I;16; choose three bands and stretch them to 8 bits",
    ),
    "float.tif": (encoded(np.ones((4, 4), np.float32), "tiff"), "1 band of 32 bits; choose"),
    "colour.tif": (tiff(bands=3, bits=16), "3 bands of 16 bits; choose"),
    "bands.tif": (tiff(bands=6, bits=8), "6 bands of 8 bits; choose"),
}


@pytest.mark.parametrize(("name", "content", "problem"), [(n, *v) for n, v in REFUSED.items()])
def test_what_cannot_be_read_as_it_is_is_an_error(tmp_path, name, content, problem):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    if "mode" in problem or "16 bits" in problem:
        Image.open(path).convert("RGB")  # the file itself is sound, and PIL would guess
    with pytest.raises(ValueError) as failure:
        images.open_image(path)
    assert str(failure.value).startswith(f"{path}: {problem}")


def test_a_pipe_is_not_opened_and_a_text_bomb_names_its_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ValueError, match="pipe.png: no regular file"):
        images.open_image(tmp_path / "pipe.png")
    notes = PngImagePlugin.PngInfo()
    notes.add_text("note", "0" * 10**7, zip=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "bomb.png", pnginfo=notes)
    with pytest.raises(ValueError, match="bomb.png: not readable as an image"):
        images.open_image(tmp_path / "bomb.png")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_eight_bit_images_become_rgb(tmp_path, mode):
    path = tmp_path / "image.png"
    Image.new("RGB", (5, 4), (255, 255, 255)).convert(mode).save(path)
    image = images.open_image(path)
    assert image.mode == "RGB" and image.size == (5, 4)
    assert image.getpixel((2, 2)) == (255, 255, 255)


def test_four_bands_of_eight_bits_are_colours_and_one_more(tmp_path):
    (tmp_path / "four.tif").write_bytes(tiff(bands=4, bits=8))
    assert images.open_image(tmp_path / "four.tif").mode == "RGB"


def test_what_large_and_long_images_lose_is_said():
    assert images.losses({"a": (512, 300), "b": None}, 128) == []
    large, long = images.losses({"a": (512, 513), "b": (600, 6000), "c": (5000, 4000)}, 128)
    assert large.startswith("2 of 3 images are shrunk more than 4 times to 128 pixels, c 31 times")
    assert long.startswith("1 of 3 images are more than 2 times as long as wide, b 10.0 times")


def test_linked_folders_are_followed_once(tmp_path):
    make_files(tmp_path, "tiles/a.json", "elsewhere/b.json")
    (tmp_path / "tiles" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "tiles" / "loop").symlink_to(tmp_path / "tiles")
    (tmp_path / "tiles" / "twin").symlink_to(tmp_path / "elsewhere")
    assert images.files_below(tmp_path / "tiles") == ["a.json", "link/b.json"]
    found = images.match_detections(["a.png", "link/b.png"], tmp_path / "tiles")
    assert found["link/b.png"] == tmp_path / "tiles" / "link" / "b.json"


def test_content_is_size_and_pixels():
    wide = Image.new("RGB", (8, 2))
    assert images.content_hash(wide) == images.content_hash(Image.new("RGB", (8, 2)))
    assert images.content_hash(wide) != images.content_hash(Image.new("RGB", (4, 4)))
    assert images.content_hash(wide) != images.content_hash(Image.new("RGB", (8, 2), (0, 0, 1)))


# ------------------------------------------------------------------ windows


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((100, 60), [(0, 0, 100, 60)]),
        ((40, 30), [(0, 0, 40, 30)]),
        ((180, 50), [(0, 0, 100, 50), (80, 0, 180, 50)]),
        ((181, 50), [(0, 0, 100, 50), (80, 0, 180, 50), (81, 0, 181, 50)]),
        ((101, 130), [(0, 0, 100, 100), (1, 0, 101, 100), (0, 30, 100, 130), (1, 30, 101, 130)]),
    ],
    ids=str,
)
def test_windows_of_100_pixels_share_20_and_end_at_the_border(size, expected):
    assert images.windows(size, side=100, overlap=20) == expected


@pytest.mark.parametrize("overlap", [-1, 100, 101])
def test_windows_that_would_not_get_on_are_refused(overlap):
    with pytest.raises(ValueError, match=f"100 pixels cannot overlap by {overlap}"):
        images.windows((300, 300), side=100, overlap=overlap)
