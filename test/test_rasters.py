"""Scenes of any size and kind: read window by window, refused by name, placed on the earth."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from conftest import ROOT, write_image
from dataset.images import files_below, is_image
from gallery import rasters
from gallery.rasters import AS_STORED, Reading, cut_boxes, open_scene, reading_of, tiles_of

# What the tests write is mostly without a place.
pytestmark = pytest.mark.filterwarnings("ignore:Dataset has no geotransform")

STRETCHED = Reading(stretch=(2, 98))
TURNED = Image.Exif()
TURNED[0x0112] = 6  # to be shown turned by a quarter


@pytest.fixture
def rasterio():
    """The library; tests of what needs it skip without."""
    pytest.importorskip("rasterio.warp", reason="large scenes need requirements-geo.txt")
    import rasterio

    return rasterio


@pytest.fixture
def no_rasterio(monkeypatch):
    """rasterio is as if it were not installed."""
    monkeypatch.setitem(sys.modules, "rasterio", None)


@pytest.fixture(params=["with rasterio", "without"])
def has_rasterio(request):
    request.getfixturevalue("rasterio" if request.param == "with rasterio" else "no_rasterio")
    return request.param == "with rasterio"


def write_raster(path, values, **profile):
    """A GeoTIFF of an array (bands, rows, columns)."""
    import rasterio

    count, height, width = values.shape
    shape = {"count": count, "height": height, "width": width, "dtype": values.dtype.name}
    with rasterio.open(path, "w", driver="GTiff", **shape, **profile) as image:
        image.write(values)
    return path


def noise(bands, height, width, dtype="uint8", most=256):
    return np.random.default_rng(0).integers(0, most, (bands, height, width)).astype(dtype)


def whole(path, reading=AS_STORED):
    """The pixels of a whole scene, read without a warning: (height, width, 3)."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with open_scene(path, reading) as scene:
            return np.asarray(scene.read((0, 0, *scene.size)))


def problem_of(path, reading=AS_STORED):
    """What the error says that a scene ends in, without the path before it."""
    with pytest.raises(ValueError) as failure:
        whole(path, reading)
    message = str(failure.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message.removeprefix(f"{path}: ")


# ------------------------------------------------------------------ photos


@pytest.mark.parametrize(
    ("suffix", "modes"),
    [
        ("jpg", ["L", "RGB", "CMYK"]),
        ("png", ["1", "L", "LA", "P", "RGB", "RGBA"]),
        ("bmp", ["1", "L", "P", "RGB"]),
        ("webp", ["RGB", "RGBA"]),
        ("gif", ["1", "L", "P"]),
        ("tif", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"]),
    ],
)
def test_photos_of_all_kinds_become_rgb(tmp_path, has_rasterio, suffix, modes):
    for mode in modes:
        path = tmp_path / f"{mode}.{suffix}"
        Image.new("RGB", (6, 4), (255, 255, 255)).convert(mode).save(path)
        check_white(path)


def check_white(path):
    with open_scene(path) as scene:
        pixels = scene.read((2, 1, 3, 2))
        assert scene.size == (6, 4) and scene.footprint((0, 0, 6, 4)) is None
    assert pixels.mode == "RGB" and pixels.size == (3, 2)
    assert pixels.getextrema() == ((255, 255),) * 3, path.name


def test_a_palette_becomes_its_colours_in_a_tiff_too(tmp_path, has_rasterio):
    image = Image.fromarray(np.moveaxis(noise(3, 4, 6), 0, -1)).quantize(5)
    image.save(tmp_path / "map.tif")
    assert (whole(tmp_path / "map.tif") == np.asarray(image.convert("RGB"))).all()


def test_pixels_are_taken_as_stored_whatever_exif_says(tmp_path, rasterio):
    for suffix in ("png", "jpg", "tif"):
        path = write_image(tmp_path / f"photo.{suffix}", size=(40, 24))
        with Image.open(path) as image:
            stored = np.asarray(image)
            image.save(path, exif=TURNED)
        with Image.open(path) as image:
            assert ImageOps.exif_transpose(image).size == (24, 40)
        with open_scene(path) as scene:
            assert scene.size == (40, 24)
            assert np.abs(np.asarray(scene.read((0, 0, 40, 24))) - stored.astype(int)).mean() < 9


def test_a_tiff_that_pillow_would_turn_needs_rasterio(tmp_path, no_rasterio):
    write_image(tmp_path / "photo.tif", size=(40, 24))
    with Image.open(tmp_path / "photo.tif") as image:
        image.save(tmp_path / "turned.tif", exif=TURNED)
    assert whole(tmp_path / "photo.tif").shape == (24, 40, 3)
    assert problem_of(tmp_path / "turned.tif") == (
        "orientation 6 in its tags, by which Pillow turns it; rasterio reads more kinds of TIFF "
        "and PNG: pip install -r requirements-geo.txt"
    )


def test_windows_that_are_wholly_transparent_hold_no_data(tmp_path, has_rasterio):
    pixels = np.full((4, 6, 4), 200, np.uint8)
    pixels[:, :3, 3] = 0  # the left half
    for name in ("tile.png", "tile.tif"):
        Image.fromarray(pixels).save(tmp_path / name)
        with open_scene(tmp_path / name) as scene:
            assert scene.read((0, 0, 3, 4)) is None
            assert scene.read((2, 0, 2, 4)).getpixel((1, 0)) == (200, 200, 200)


def test_links_in_a_circle_give_each_scene_once(tmp_path):
    write_image(tmp_path / "a" / "port.png")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    scenes = [path for path in files_below(tmp_path) if is_image(path)]
    assert scenes == ["a/port.png"]
    assert whole(tmp_path / scenes[0]).shape == (40, 40, 3)


# ------------------------------------------------------------------ refused


def make_unusual(folder):
    """Files that are no photos; those of several bands by rasterio."""
    for name in ("photo.png", "photo.tif", "photo.jpg"):
        content = write_image(folder / name).read_bytes()
        (folder / f"cut_{name}").write_bytes(content[: len(content) // 2])
        (folder / f"empty_{name}").touch()
    Image.fromarray(noise(1, 4, 4, "uint16", 4000)[0]).save(folder / "grey.png")
    Image.fromarray(noise(1, 4, 4, "uint16", 4000)[0]).save(folder / "grey.tif")
    Image.fromarray(noise(1, 4, 4, "float32")[0]).save(folder / "height.tif")


def test_unusual_images_are_refused_by_name(tmp_path, has_rasterio):
    make_unusual(tmp_path)
    for name in ("photo.png", "photo.tif", "photo.jpg"):
        problem = problem_of(tmp_path / f"cut_{name}")
        assert problem.startswith("not readable as an image (") and "previous" not in problem
        assert problem_of(tmp_path / f"empty_{name}").startswith("not readable as an image (")
    assert problem_of(tmp_path / "gone.tif") == "no such image"
    os.mkfifo(tmp_path / "pipe.tif")
    assert problem_of(tmp_path / "pipe.tif") == "no regular file"
    for name, bits in (("grey.png", 16), ("grey.tif", 16), ("height.tif", 32)):
        problem = problem_of(tmp_path / name)
        if has_rasterio:
            remedy = "say how to show them, as by --stretch 2 98"
            assert problem == f"1 band of {bits} bits; {remedy}"
        else:
            assert problem.endswith(
                "; rasterio reads more kinds of TIFF and PNG: pip install -r requirements-geo.txt"
            )


@pytest.mark.parametrize(
    ("bands", "dtype", "problem"),
    [
        (1, "int8", "1 band of 8 bits; say how to show them, as by --stretch 2 98"),
        (2, "uint8", "2 bands of 8 bits; say how to show them, as by --bands 1 2 1"),
        (2, "float32", "2 bands of 32 bits; say how to show them, as by --bands 1 2 1 --stretch"),
        (3, "uint16", "3 bands of 16 bits; say how to show them, as by --stretch 2 98"),
        (4, "uint16", "4 bands of 16 bits; say how to show them, as by --bands 4 3 2 --stretch 2"),
        (6, "uint8", "6 bands of 8 bits; say how to show them, as by --bands 4 3 2"),
        (1, "complex64", "complex numbers; write their amplitude as an image"),
    ],
)
def test_bands_that_are_no_colours_are_refused_with_the_options(
    tmp_path, rasterio, bands, dtype, problem
):
    path = write_raster(tmp_path / "scene.tif", noise(bands, 4, 4, dtype, 100))
    assert problem_of(path).startswith(problem)


def test_names_of_colours_do_not_count_among_many_bands(tmp_path, rasterio):
    path = write_raster(tmp_path / "scene.tif", noise(5, 4, 4), photometric="rgb")
    assert problem_of(path).startswith("5 bands of 8 bits; say how to show them, as by --bands 4")


def test_few_bits_in_a_byte_are_no_colours(tmp_path, rasterio):
    path = write_raster(tmp_path / "scene.tif", noise(1, 4, 4, most=16), nbits=4)
    assert problem_of(path).startswith("1 band of 4 bits; say how to show them, as by --stretch")


def test_options_that_do_not_fit_a_file_are_refused(tmp_path, rasterio):
    asked = Reading(bands=(4, 3, 2))
    path = write_image(tmp_path / "photo.jpg")
    assert problem_of(path, asked) == "3 bands of 8 bits; --bands asks for 4"
    Image.new("P", (4, 4)).save(tmp_path / "map.png")
    problem = "a palette; --bands and --stretch are for images without one"
    assert problem_of(tmp_path / "map.png", STRETCHED) == problem
    write_image(tmp_path / "a.ppm").rename(tmp_path / "a.png")
    problem = "no kind of image that --bands and --stretch read"
    assert problem_of(tmp_path / "a.png", STRETCHED) == problem
    assert problem_of(tmp_path / "gone.png", STRETCHED) == "no such image"


def test_options_without_rasterio_are_refused(tmp_path, no_rasterio):
    path = write_image(tmp_path / "photo.jpg")
    remedy = "--bands and --stretch need rasterio: pip install -r requirements-geo.txt"
    assert problem_of(path, STRETCHED) == remedy


@pytest.mark.parametrize("bands", [(4, 3), (4, 3, 2, 1), (0, 1, 2)])
def test_bands_are_three_numbers_from_1(bands):
    with pytest.raises(ValueError, match="^--bands takes three band numbers from 1, as --bands 4"):
        reading_of(bands, None)


@pytest.mark.parametrize("stretch", [(2,), (98, 2), (2, 2), (-1, 98), (2, 101), (2, float("nan"))])
def test_percentiles_are_two_and_rise(stretch):
    with pytest.raises(ValueError, match="^--stretch takes two percentiles, the lower first, as"):
        reading_of(None, stretch)


def test_options_become_a_reading():
    assert reading_of(None, None) == AS_STORED
    assert reading_of([4, 3, 2], [2.0, 98.0]) == ((4, 3, 2), (2.0, 98.0))


def test_an_image_too_large_for_pillow_is_refused_before_it_is_decoded(
    tmp_path, no_rasterio, monkeypatch
):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50 * 40 // 2 - 1)
    for name in ("scene.png", "scene.tif"):
        assert problem_of(write_image(tmp_path / name, size=(50, 40))) == (
            "more than 1,998 pixels, too many for Pillow; rasterio reads them from a tiled "
            "GeoTIFF: pip install -r requirements-geo.txt"
        )


def test_a_large_scene_is_read_in_windows_only(tmp_path, rasterio, monkeypatch):
    path = write_raster(tmp_path / "scene.tif", noise(3, 40, 50))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50 * 40 // 2 - 1)
    problem = "50 x 40 pixels, too many to read at once; cut it, as --tile 256 does"
    assert problem_of(path) == problem
    with open_scene(path) as scene:
        assert scene.read((0, 0, 50, 39)).size == (50, 39)


def test_blocks_that_would_not_fit_the_cache_are_refused(tmp_path, rasterio, monkeypatch):
    path = write_raster(tmp_path / "scene.tif", noise(3, 40, 50), blockysize=40, compress="deflate")
    monkeypatch.setattr(rasters, "CACHE", 3 * 40 * 50 - 1)
    assert problem_of(path) == (
        "blocks of 50 x 40 pixels, too large to decode; write it in tiles, as gdal_translate "
        "-co TILED=YES does"
    )


def test_a_file_that_would_have_others_read_is_not_followed(tmp_path, rasterio):
    write_raster(tmp_path / "secret.tif", noise(3, 4, 4))
    link = "<VRTDataset rasterXSize='4' rasterYSize='4'><VRTRasterBand dataType='Byte' band='1'>"
    link += f"<SimpleSource><SourceFilename>{tmp_path}/secret.tif</SourceFilename></SimpleSource>"
    (tmp_path / "link.tif").write_text(f"{link}</VRTRasterBand></VRTDataset>")
    with rasterio.open(tmp_path / "link.tif") as image:
        assert image.shape == (4, 4)
    for reading in (AS_STORED, STRETCHED):
        assert problem_of(tmp_path / "link.tif", reading).startswith("not readable as an image")


# ------------------------------------------------------------------ windows


def test_windows_are_crops_of_the_whole(tmp_path, has_rasterio):
    Image.fromarray(np.moveaxis(noise(3, 50, 70), 0, -1)).save(tmp_path / "scene.tif")
    pixels = whole(tmp_path / "scene.tif")
    assert (pixels == np.moveaxis(noise(3, 50, 70), 0, -1)).all()
    with open_scene(tmp_path / "scene.tif") as scene:
        tiles = tiles_of(scene.size, side=32, overlap=8)
        assert len(tiles) == 3 * 2
        for left, top, width, height in tiles:
            crop = pixels[top : top + height, left : left + width]
            assert (np.asarray(scene.read((left, top, width, height))) == crop).all()


@pytest.mark.parametrize("window", [(-1, 0, 4, 4), (0, 0, 7, 4), (0, 1, 6, 4), (0, 0, 0, 4)])
def test_a_window_beyond_the_image_is_an_error(tmp_path, has_rasterio, window):
    Image.new("RGB", (6, 4)).save(tmp_path / "scene.tif")
    with open_scene(tmp_path / "scene.tif") as scene:
        with pytest.raises(ValueError, match="not within 6 x 4 pixels"):
            scene.read(window)


def test_tiles_cover_a_scene_row_by_row():
    assert tiles_of((250, 90), side=100, overlap=20) == [
        (0, 0, 100, 90),
        (80, 0, 100, 90),
        (150, 0, 100, 90),
    ]


def test_boxes_are_cut_by_their_centre_and_shifted():
    centres = [(10, 20), (29.9, 39.9), (30, 20), (10, 40), (9.9, 20), (15, 25)]
    boxes = np.array([[x, y, 8, 4, 0.5, 0.9] for x, y in centres])
    labels, cut = cut_boxes(list("abcdef"), boxes, window=(10, 20, 20, 20))
    assert labels == ["a", "b", "f"]
    expected = [[0, 0, 8, 4, 0.5, 0.9], [19.9, 19.9, 8, 4, 0.5, 0.9], [5, 5, 8, 4, 0.5, 0.9]]
    assert np.allclose(cut, expected)
    assert boxes[0, 0] == 10  # the image's own stay
    for empty in ([], np.empty((0, 5))):
        labels, cut = cut_boxes([], empty, window=(0, 0, 9, 9))
        assert labels == [] and len(cut) == 0


# ------------------------------------------------------------------ bands and stretch


def test_bands_are_chosen_by_number(tmp_path, rasterio):
    values = noise(6, 5, 7)
    path = write_raster(tmp_path / "scene.tif", values)
    assert (whole(path, Reading(bands=(4, 3, 2))) == np.moveaxis(values[[3, 2, 1]], 0, -1)).all()
    assert (whole(path, Reading(bands=(5, 5, 5))) == values[4][..., None]).all()


def test_bands_that_the_file_names_are_its_colours(tmp_path, rasterio):
    values = noise(4, 5, 7)
    path = write_raster(tmp_path / "scene.tif", values, photometric="minisblack")
    assert problem_of(path).startswith("4 bands of 8 bits; say how to show them, as by --bands 4 3")
    with rasterio.open(path, "r+") as image:
        colours = rasterio.enums.ColorInterp
        image.colorinterp = (colours.blue, colours.green, colours.red, colours.undefined)
    assert (whole(path) == np.moveaxis(values[[2, 1, 0]], 0, -1)).all()


def test_stretched_values_are_those_of_numpy(tmp_path, rasterio):
    values = noise(3, 30, 40, "uint16", most=4000)
    path = write_raster(tmp_path / "scene.tif", values)
    expected = []
    for band in values.astype(float):
        low, high = np.percentile(band, [2, 98])
        expected.append(np.rint(255 * (np.clip(band, low, high) - low) / (high - low)))
    assert (whole(path, STRETCHED) == np.stack(expected, axis=-1)).all()


def test_a_stretch_by_hand(tmp_path, rasterio):
    """Of 0, 10, ..., 100 the percentiles 10 and 90 are 10 and 90; 20 becomes 255 x 10 / 80 = 32."""
    values = np.arange(0, 101, 10, dtype="int16").reshape(1, 1, 11)
    path = write_raster(tmp_path / "scene.tif", values)
    pixels = whole(path, Reading(stretch=(10, 90)))
    assert pixels[0, :, 0].tolist() == [0, 0, 32, 64, 96, 128, 159, 191, 223, 255, 255]
    assert (pixels == pixels[..., :1]).all()  # one band is grey


def test_percentiles_are_of_the_scene_and_not_of_the_window(tmp_path, rasterio, monkeypatch):
    values = noise(3, 64, 64, "uint16", most=4000)
    values[:, :, 32:] += 20_000
    path = write_raster(tmp_path / "scene.tif", values)
    monkeypatch.setattr(rasters, "SAMPLE", 16)  # every fourth pixel and row
    pixels = whole(path, STRETCHED)
    assert pixels[:, :32].max() < 50 and pixels[:, 32:].min() > 200
    with open_scene(path, STRETCHED) as scene:
        for left, top, width, height in tiles_of(scene.size, side=24, overlap=4):
            crop = pixels[top : top + height, left : left + width]
            assert (np.asarray(scene.read((left, top, width, height))) == crop).all()


@pytest.mark.parametrize(("width", "expected"), [(1024, [0, 255]), (2048, [0])])
def test_the_sample_is_at_most_1024_pixels_along_a_side(tmp_path, rasterio, width, expected):
    """0, 1000, 0, 1000, ...: of 2048 every second is taken, and a band of one value is black."""
    values = np.tile(np.array([0, 1000], dtype="uint16"), width // 2).reshape(1, 1, width)
    path = write_raster(tmp_path / "scene.tif", values)
    assert np.unique(whole(path, Reading(stretch=(0, 100)))).tolist() == expected


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "webp", "tif"])
def test_photos_are_stretched_too(tmp_path, rasterio, suffix):
    """Grey from 100 to 139 becomes 0 to 255."""
    grey = np.tile(np.arange(100, 140, dtype=np.uint8), (40, 1))
    path = tmp_path / f"photo.{suffix}"
    Image.fromarray(grey).convert("RGB").save(path)
    pixels = whole(path, Reading(stretch=(0, 100)))
    assert pixels.shape == (40, 40, 3)
    assert np.abs(pixels[:, 20, 0] - 255 * 20 / 39).max() < 20  # some of these formats are lossy


def test_a_band_of_one_value_is_black(tmp_path, rasterio):
    values = np.full((1, 4, 4), 700, "uint16")
    assert (whole(write_raster(tmp_path / "scene.tif", values), STRETCHED) == 0).all()


# ------------------------------------------------------------------ no data


def test_no_data_is_left_out_of_windows_and_percentiles(tmp_path, rasterio):
    values = noise(3, 20, 40, "float32", most=100)
    values[:, :, :20] = -9999
    plain = whole(write_raster(tmp_path / "right.tif", values[:, :, 20:]), STRETCHED)
    values[:, 0, 20] = -9999
    values[:, 1, 20] = np.nan
    path = write_raster(tmp_path / "scene.tif", values, nodata=-9999)
    with open_scene(path, Reading(stretch=(0, 100))) as scene:
        assert scene.read((0, 0, 20, 20)) is None
        half = np.asarray(scene.read((10, 0, 20, 20)))
    assert (half[:, :10] == 0).all() and (half[:2, 10] == 0).all()
    assert abs(half[:, 10:].mean() - plain[:, :10].mean()) < 10


def test_numbers_that_are_none_hold_no_data(tmp_path, rasterio):
    values = noise(1, 4, 8, "float32", most=100)
    values[:, :, :4] = np.nan
    with open_scene(write_raster(tmp_path / "scene.tif", values), STRETCHED) as scene:
        assert scene.read((0, 0, 4, 4)) is None
        assert scene.read((4, 0, 4, 4)).getextrema()[0] == (0, 255)


def test_a_scene_without_any_data_has_no_window(tmp_path, rasterio):
    path = write_raster(tmp_path / "scene.tif", np.zeros((3, 4, 4), "uint16"), nodata=0)
    with open_scene(path, STRETCHED) as scene:
        assert scene.read((0, 0, 4, 4)) is None


def test_a_band_of_opacity_that_is_shown_masks_nothing(tmp_path, rasterio):
    values = noise(4, 4, 4)
    values[3] = 0  # written without a word on colours, a fourth band counts as opacity
    path = write_raster(tmp_path / "scene.tif", values)
    with open_scene(path) as scene:
        assert scene.read((0, 0, 4, 4)) is None
    pixels = whole(path, Reading(bands=(4, 3, 2)))
    assert (pixels == np.moveaxis(values[[3, 2, 1]], 0, -1)).all()


# ------------------------------------------------------------------ places


def footprint_of(path, window):
    with open_scene(path) as scene:
        return scene.footprint(window)


def test_corners_of_a_turned_image_in_degrees(tmp_path, rasterio):
    """Pixel (1, 2): longitude 10 + 0.1 x 1 + 0.2 x 2 = 10.5, latitude 50 + 0.2 x 1 - 0.1 x 2."""
    to_map = rasterio.Affine(0.1, 0.2, 10, 0.2, -0.1, 50)
    path = write_raster(tmp_path / "a.tif", noise(3, 8, 8), crs="EPSG:4326", transform=to_map)
    corners = footprint_of(path, (1, 2, 3, 4))
    assert np.allclose(corners, [[10.5, 50], [10.8, 50.6], [11.6, 50.2], [11.3, 49.6]], atol=1e-9)


def test_corners_in_metres_become_degrees(tmp_path, rasterio):
    """The quarter from the equator to 45 degrees is 4,984,944.378 m long, 0.9996 of it in UTM."""
    north = 0.9996 * 4_984_944.378
    to_map = rasterio.Affine(1000, 0, 500_000, 0, -north / 4, north)
    path = write_raster(tmp_path / "a.tif", noise(3, 4, 6), crs="EPSG:32632", transform=to_map)
    corners = footprint_of(path, (0, 0, 6, 4))
    assert np.allclose([corners[0], corners[3]], [[9, 45], [9, 0]], atol=1e-7)
    assert corners[1][0] > 9 and corners[2][0] > 9


def test_longitudes_jump_at_the_antimeridian(tmp_path, rasterio):
    """UTM zone 1 is about 177 degrees west; 500 km west of it is east."""
    to_map = rasterio.Affine(100_000, 0, 0, 0, -100_000, 500_000)
    path = write_raster(tmp_path / "a.tif", noise(3, 5, 5), crs="EPSG:32601", transform=to_map)
    corners = footprint_of(path, (0, 0, 5, 5))
    assert 178 < corners[3][0] < 179 and corners[2][0] == pytest.approx(-177)


def test_images_without_a_place_have_no_footprint(tmp_path, rasterio):
    to_map = rasterio.Affine(1, 0, 500_000, 0, -1, 5_300_000)
    point = rasterio.control.GroundControlPoint(row=0, col=0, x=9, y=45)
    local = 'LOCAL_CS["site",UNIT["metre",1]]'
    for number, profile in enumerate(
        (
            {"transform": to_map},
            {"crs": "EPSG:32632"},
            {"crs": local, "transform": to_map},
            {"crs": "EPSG:4326", "gcps": [point] * 3},
            {"crs": "EPSG:4326", "transform": rasterio.Affine(1, 0, 9, 0, 1, 1e9)},
        )
    ):
        path = write_raster(tmp_path / f"{number}.tif", noise(3, 4, 4), **profile)
        assert footprint_of(path, (0, 0, 4, 4)) is None, profile


# ------------------------------------------------------------------ memory

MEASURE = """
import re, sys
from pathlib import Path
import rasterio.warp
from gallery import rasters

def peak():  # of this process; ru_maxrss has its parent's, too
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

path, side = sys.argv[1], int(sys.argv[2])
before = peak()
with rasters.open_scene(path, rasters.Reading(stretch=(2, 98))) as scene:
    for window in rasters.tiles_of(scene.size, side, 0):
        scene.read(window)
print(peak() - before)
"""


def memory_of_reading(path, side):
    """Bytes above the start that a process takes to read all windows of a scene."""
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc: the memory of a process is not measured here")
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEASURE, str(path), str(side)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(process.stdout)


def write_large(path, side, **profile):
    """A scene of three bands, of a block of noise: all over, or on the diagonal if sparse_ok."""
    import rasterio

    is_sparse = profile.get("sparse_ok", False)
    block = noise(3, 16, 16).repeat(32, axis=1).repeat(32, axis=2)
    shape = {"count": 3, "height": side, "width": side, "dtype": "uint8"}
    tiling = {"tiled": True, "blockxsize": 512, "blockysize": 512, "compress": "deflate"}
    with rasterio.open(path, "w", driver="GTiff", **shape, **tiling, zlevel=1, **profile) as image:
        for left, top, width, height in tiles_of((side, side), side=512, overlap=0):
            if left == top or not is_sparse:
                window = rasterio.windows.Window(left, top, width, height)
                image.write(block[:, :height, :width], window=window)
    return path


def test_memory_stays_within_the_bound(tmp_path, rasterio):
    assert rasters.MEMORY == 160 * 2**20
    path = write_large(tmp_path / "scene.tif", side=7680, sparse_ok=True)
    assert memory_of_reading(path, side=1024) < rasters.MEMORY < 3 * 7680**2


@pytest.mark.slow
def test_memory_stays_within_the_bound_on_900_million_pixels(tmp_path, rasterio):
    path = write_large(tmp_path / "scene.tif", side=30_000)
    assert memory_of_reading(path, side=512) < rasters.MEMORY
