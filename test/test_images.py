"""Image files: their detections, safe opening."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from dataset import images

# ------------------------------------------------------------------ matching


def _files(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("[]")
    return folder


def test_a_mirrored_path_is_found_before_the_bare_stem(tmp_path):
    _files(tmp_path, "train/a/port.json", "a/port.json", "port.json")
    found = images.match_detections(["train/a/port.tif"], tmp_path)
    assert found == {"train/a/port.tif": tmp_path / "train/a/port.json"}


def test_leading_folders_are_taken_off_down_to_the_stem(tmp_path):
    _files(tmp_path, "a/port.json", "dam.json")
    found = images.match_detections(
        ["train/a/port.tif", "train/a/dam.v2.tif", "x/y/dam.png"], tmp_path
    )
    assert found["train/a/port.tif"] == tmp_path / "a/port.json"
    assert found["x/y/dam.png"] == tmp_path / "dam.json"
    assert found["train/a/dam.v2.tif"] is None


def test_two_images_of_one_stem_and_folder_are_an_error_naming_both(tmp_path):
    _files(tmp_path, "port.json")
    with pytest.raises(ValueError) as error:
        images.match_detections(["port.tif", "port.png"], tmp_path)
    for name in ("port.tif", "port.png", str(tmp_path / "port.json")):
        assert name in str(error.value)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    ("paths", "files", "uncertain"),
    [
        (("a/port", "b/port"), ("port.json",), "port.json"),
        (("a/port", "b/port"), ("a/port.json", "port.json"), "port.json"),
        (("train/a/port", "val/a/port"), ("a/port.json",), "a/port.json"),
    ],
)
def test_a_shortened_path_in_which_two_images_end_is_an_error_naming_both(
    tmp_path, paths, files, uncertain, order
):
    _files(tmp_path, *files)
    with pytest.raises(ValueError) as error:
        images.match_detections([f"{path}.tif" for path in paths][::order], tmp_path)
    for name in (*paths, str(tmp_path / uncertain)):
        assert name in str(error.value)


@pytest.mark.parametrize("image", ["/tiles/1.png", "/a/tiles/1.png"])
def test_a_shortened_path_in_which_two_files_end_is_an_error_naming_both(tmp_path, image):
    _files(tmp_path, "1.json", "a/1.json")
    with pytest.raises(ValueError) as error:
        images.match_detections([image], tmp_path)
    for name in (image, str(tmp_path / "1.json"), "1 and a/1"):
        assert name in str(error.value)


def test_whole_paths_are_matched_by_their_ends(tmp_path):
    _files(tmp_path, "b.json", "north/a.json", "south/a.json")
    names = ["/tiles/b.png", "/tiles/north/a.png", "/tiles/south/a.png"]
    assert images.match_detections(names, tmp_path) == {
        "/tiles/b.png": tmp_path / "b.json",
        "/tiles/north/a.png": tmp_path / "north/a.json",
        "/tiles/south/a.png": tmp_path / "south/a.json",
    }


@pytest.mark.parametrize("order", [1, -1])
def test_an_exact_claim_wins_over_a_stem_claim(tmp_path, order):
    _files(tmp_path, "port.json")
    found = images.match_detections(["port.tif", "a/port.tif"][::order], tmp_path)
    assert found == {"port.tif": tmp_path / "port.json", "a/port.tif": None}


def test_an_image_whose_every_claim_is_anothers_own_has_none(tmp_path):
    _files(tmp_path, "port.json", "a/port.json")
    found = images.match_detections(["port.tif", "a/port.tif", "b/a/port.tif"], tmp_path)
    assert found == {
        "port.tif": tmp_path / "port.json",
        "a/port.tif": tmp_path / "a/port.json",
        "b/a/port.tif": None,
    }


def test_same_stems_in_mirrored_folders_are_told_apart(tmp_path):
    _files(tmp_path, "a/port.json", "b/port.json")
    found = images.match_detections(["a/port.tif", "b/port.jpg"], tmp_path)
    assert found == {
        "a/port.tif": tmp_path / "a/port.json",
        "b/port.jpg": tmp_path / "b/port.json",
    }


def test_an_image_without_a_file_has_none(tmp_path):
    _files(tmp_path, "port.json")
    assert images.match_detections(["dam.tif", "report.tif"], tmp_path) == {
        "dam.tif": None,
        "report.tif": None,
    }
    assert images.match_detections(["port.tif"], tmp_path / "missing") == {"port.tif": None}


# ------------------------------------------------------------------ images


def _error_of(path):
    with pytest.raises(ValueError) as error:
        images.open_image(path)
    return str(error.value)


def test_a_missing_image_is_named(tmp_path):
    path = tmp_path / "missing.png"
    assert _error_of(path).startswith(f"{path}: no such image")


def test_a_truncated_jpeg_is_named(tmp_path):
    path = tmp_path / "cut.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert _error_of(path).startswith(f"{path}: not readable")


@pytest.mark.parametrize("content", [b"", b"no image at all", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_image_is_named(tmp_path, content):
    path = tmp_path / "note.png"
    path.write_bytes(content)
    assert _error_of(path).startswith(f"{path}: not readable")


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_refused(tmp_path, suffix):
    path = tmp_path / f"deep.{suffix}"
    Image.fromarray(np.full((4, 4), 1000, np.uint16)).save(path)
    assert str(path) in _error_of(path) and "8 bits" in _error_of(path)


def _deep_png():
    """A 2 x 2 PNG of 16 bits a colour, which PIL can read but not write."""

    def chunk(name, data):
        body = name + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    pixels = zlib.compress((b"\0" + struct.pack(">6H", *[1000] * 6)) * 2)
    header = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def _deep_tiff():
    """The same as an uncompressed TIFF, as satellite images come."""
    tags = {  # number: (type, count, value); shorts are 3, longs 4
        256: (3, 1, 2), 257: (3, 1, 2), 258: (3, 3, 134), 259: (3, 1, 1), 262: (3, 1, 2),
        273: (4, 1, 140), 277: (3, 1, 3), 278: (3, 1, 2), 279: (4, 1, 24), 284: (3, 1, 1),
    }  # fmt: skip
    directory = struct.pack("<H", len(tags))
    for number, entry in tags.items():
        directory += struct.pack("<HHII", number, *entry)
    head = b"II*\0" + struct.pack("<I", 8) + directory + bytes(4)
    return head + struct.pack("<3H", 16, 16, 16) + struct.pack("<12H", *[1000] * 12)


@pytest.mark.parametrize(
    ("name", "content"), [("a.png", _deep_png()), ("a.tif", _deep_tiff())], ids=["png", "tiff"]
)
def test_sixteen_bits_a_colour_are_refused(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with Image.open(path) as image:  # the file itself is sound
        assert image.convert("RGB").size == (2, 2)
    assert "8 bits" in _error_of(path)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_eight_bit_images_become_rgb(tmp_path, mode):
    path = tmp_path / "image.png"
    Image.new("RGB", (5, 4), (255, 255, 255)).convert(mode).save(path)
    image = images.open_image(path)
    assert image.mode == "RGB" and image.size == (5, 4)
    assert image.getpixel((2, 2)) == (255, 255, 255)


def test_links_in_a_circle_are_followed_once(tmp_path):
    _files(tmp_path, "a/port.png")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "again").symlink_to(tmp_path / "a")
    index = images.index_images(tmp_path)
    assert list(index) == ["port"] and len(index["port"]) == 1
    assert images.find_image("port.tif", index, tmp_path) == index["port"][0]
