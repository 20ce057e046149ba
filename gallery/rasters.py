"""Scenes for the index: images of any size, read window by window, and where on earth they lie.

A window is (left, top, width, height) in pixels of the image as the file stores them. An
orientation in EXIF is not applied, as detections are in stored pixels.

    a TIFF, a PNG of 16 bits    by rasterio, where it is installed: a window's blocks alone are read
    all other images, and       by Pillow, whole: the pixels stay in memory while the scene is open
    without rasterio these too
    with --bands or --stretch   by rasterio, and not without it

Memory, above what Python and the libraries take: a scene read by rasterio takes `MEMORY` bytes at
most, whatever its size, for windows of up to a million pixels. Pillow takes 8 bytes a pixel, 13
with transparency; an image above twice `PIL.Image.MAX_IMAGE_PIXELS`, 179 million, is refused.

A scene in strips, not tiles, is decoded once while a row of windows, with all its bands, is smaller
than `CACHE`: 30,000 pixels x 256 rows of three bands of 8 bits are 23 MB. Where the row is larger,
its strips are decoded again for each window.
"""

import os
import warnings
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from PIL import Image

from dataset.images import open_image, windows
from escaping import escaped

CACHE = 64 * 2**20  # bytes of decoded blocks that GDAL keeps; it would take 5% of the memory
MEMORY = 160 * 2**20  # bytes: the cache, the block being decoded, and what a window becomes
SAMPLE = 1024  # pixels along the longer side of the sample that percentiles are taken of
GET_RASTERIO = "pip install -r requirements-geo.txt"
DEGREES = "EPSG:4326"  # rasterio gives longitude first
ROUNDING = 1e-6  # degrees by which a corner at a pole may be beyond it

# GDAL tries no other driver: it has some, as VRT, whose files make it read other files.
_DRIVERS = {  # by the first bytes of a file; "+": BigTIFF
    b"II*\0": "GTiff",
    b"MM\0*": "GTiff",
    b"II+\0": "GTiff",
    b"MM\0+": "GTiff",
    b"\x89PNG": "PNG",
    b"\xff\xd8": "JPEG",
    b"BM": "BMP",
    b"GIF8": "GIF",
    b"RIFF": "WEBP",
}
_MOST_PIXELS_A_BYTE = 4096  # deflate takes a byte for a thousand equal ones
_ORIENTATION = 0x0112  # a tag of EXIF and of TIFF


class Reading(NamedTuple):
    """How the pixels of scenes become colours of 8 bits."""

    bands: tuple | None = None  # three band numbers, from 1, for red, green and blue
    stretch: tuple | None = None  # (low, high) percentiles of a scene, that become 0 and 255


AS_STORED = Reading()


def reading_of(bands, stretch):
    """The Reading of the options --bands and --stretch, or None each; ValueError if it is none."""
    if bands is not None and (len(bands) != 3 or min(bands) < 1):
        raise ValueError("--bands takes three band numbers from 1, as --bands 4 3 2")
    if stretch is not None and not (len(stretch) == 2 and 0 <= stretch[0] < stretch[1] <= 100):
        raise ValueError("--stretch takes two percentiles, the lower first, as --stretch 2 98")
    return Reading(
        bands=None if bands is None else tuple(bands),
        stretch=None if stretch is None else tuple(stretch),
    )


@contextmanager
def open_scene(path, reading=AS_STORED):
    """Gives the scene of an image file, which can be read until the block ends.

    A scene has `size`, (width, height) in pixels, and the methods `read` and `footprint`. It
    belongs to the thread that opened it: rasterio's data sets are not safe in several.

    Colours without --bands: those that the file names red, green and blue, where it has four bands
    at most; else its one grey band, or its three. A palette becomes its colours. Other bands, and
    other than 8 bits without --stretch, are refused.

    --stretch: the percentiles are of the whole scene, never of a window. Each band's are taken
    once, when the scene is opened, of a sample: pixels at even distances, `SAMPLE` at most along
    the longer side, without those that hold no data. Where a scene has overviews the sample is
    from these. Values are scaled so that the lower percentile becomes 0 and the higher 255, clipped
    and rounded.

    Raises ValueError, here or in `read`, that names the file and says what to do: as of
    `open_image`, and where --bands or --stretch would have to say how to show it. A file that is
    cut short may open, and raise in `read`.
    """
    head = _head_of(path)
    driver = _driver_of(head)
    by_choice = reading != AS_STORED
    is_raster = driver == "GTiff" or (driver == "PNG" and head[24:] == b"\x10")
    if driver is None or not (is_raster or by_choice):
        scene = Photo(path, may_be_transparent=driver != "JPEG")
        if by_choice:
            raise ValueError(f"{escaped(path)}: no kind of image that --bands and --stretch read")
        yield scene
        return
    rasterio = _rasterio()
    if rasterio is None:
        if by_choice:
            raise ValueError(
                f"{escaped(path)}: --bands and --stretch need rasterio: {GET_RASTERIO}"
            )
        yield _raster_by_pillow(path)
        return
    with _opened(rasterio, path, driver) as image:
        yield Raster(rasterio, path, image, reading)


def _head_of(path):
    """The first 25 bytes of a file: the last is a PNG's bits; none of what cannot be read."""
    if not os.path.isfile(path):
        return b""
    try:
        with open(path, "rb") as file:
            return file.read(25)
    except OSError:  # open_image says so
        return b""


def _driver_of(head):
    for start, driver in _DRIVERS.items():
        if head.startswith(start):
            return driver
    return None


def _rasterio():
    """The library, or None where it is not installed."""
    try:
        import rasterio.warp
        import rasterio.windows
    except ImportError:
        return None
    return rasterio


def _require_inside(window, size):
    left, top, width, height = window
    is_inside = left >= 0 and top >= 0 and left + width <= size[0] and top + height <= size[1]
    if not is_inside or min(width, height) < 1:
        raise ValueError(f"window {tuple(window)}: not within {size[0]} x {size[1]} pixels")


# ------------------------------------------------------------------ by Pillow


class Photo:
    """A scene that is read whole; as of `open_scene`."""

    def __init__(self, path, may_be_transparent=True):
        self._pixels = _opened_by_pillow(path)
        self._alpha = _alpha_of(path) if may_be_transparent else None
        self.size = self._pixels.size

    def read(self, window):
        """The pixels of a window as a PIL RGB image; None where all are wholly transparent."""
        _require_inside(window, self.size)
        left, top, width, height = window
        box = (left, top, left + width, top + height)
        if self._alpha is not None and self._alpha.crop(box).getbbox() is None:
            return None
        if (width, height) == self.size:
            return self._pixels
        return self._pixels.crop(box)

    def footprint(self, window):
        """None: Pillow does not read where on the earth an image lies."""
        return None


def _opened_by_pillow(path):
    try:
        return open_image(path)
    except ValueError as error:
        if isinstance(error.__context__, Image.DecompressionBombError):
            raise ValueError(
                f"{escaped(path)}: more than {_most_pixels():,} pixels, too many for Pillow; "
                f"rasterio reads them from a tiled GeoTIFF: {GET_RASTERIO}"
            ) from None
        raise


def _most_pixels():
    """How many Pillow decodes at once; above half of it, it warns."""
    return np.inf if Image.MAX_IMAGE_PIXELS is None else 2 * Image.MAX_IMAGE_PIXELS


def _alpha_of(path):
    """The opacity of an image that `open_image` reads, in PIL's mode L; None where it has none."""
    with Image.open(path) as image:
        if not image.has_transparency_data:
            return None
        return image.convert("RGBA").getchannel("A")


def _raster_by_pillow(path):
    """The Photo of a TIFF, or of a PNG of 16 bits; the error says what reads more of them."""
    more = f"rasterio reads more kinds of TIFF and PNG: {GET_RASTERIO}"
    try:
        scene = Photo(path)
    except ValueError as error:
        if GET_RASTERIO in str(error):
            raise
        raise ValueError(f"{error}; {more}") from None
    with Image.open(path) as image:
        orientation = image.getexif().get(_ORIENTATION, 1)
    if orientation != 1:
        raise ValueError(
            f"{escaped(path)}: orientation {orientation} in its tags, by which Pillow turns "
            f"it; {more}"
        )
    return scene


# ------------------------------------------------------------------ by rasterio


@contextmanager
def _opened(rasterio, path, driver):
    """rasterio's data set of an image file; ValueError where it opens none."""
    absolute = os.path.abspath(path)  # "zip:a.tif" would be an address
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with _limited(rasterio):
            try:
                image = rasterio.open(absolute, driver=driver)
            except rasterio.errors.RasterioIOError as error:
                raise _not_readable(path, error) from None
    with image:
        yield image


def _limited(rasterio):
    """GDAL's limit of its cache while it reads.

    It is set for each call: it holds for the whole process, and the end of a rasterio.Env in
    another thread lifts it.
    """
    return rasterio.Env(GDAL_CACHEMAX=CACHE)


def _not_readable(path, error):
    reason = str(error.__cause__ or error).splitlines()[0]
    return ValueError(f"{escaped(path)}: not readable as an image ({escaped(reason)})")


class Raster:
    """A scene of which windows are read; as of `open_scene`."""

    def __init__(self, rasterio, path, image, reading):
        self._rasterio = rasterio
        self._path = path
        self._image = image
        self._bands = _bands_of(path, image, reading)
        _refuse_large_blocks(path, image)
        _refuse_nearly_nothing(path, image)
        self._palette = _palette_of(image) if _has_palette(image) else None
        self._has_masks = _have_masks(rasterio, image, self._bands)
        self.size = (image.width, image.height)
        self._stretches = None  # one a band
        if reading.stretch is not None:
            self._stretches = self._stretches_between(reading.stretch)

    def read(self, window):
        """The pixels of a window as a PIL RGB image; None where none holds data.

        A pixel without data is black: of the file's no-data value in a band, masked, wholly
        transparent, or no number. Raises ValueError as of `open_scene`, and for a window of more
        pixels than Pillow decodes at once.
        """
        _require_inside(window, self.size)
        left, top, width, height = window
        if width * height > _most_pixels():
            raise ValueError(
                f"{escaped(self._path)}: {width} x {height} pixels, too many to read at once; cut "
                "it, as --tile 256 does"
            )
        values, hold_data = self._values(
            (height, width), window=self._rasterio.windows.Window(left, top, width, height)
        )
        if not hold_data.any():
            return None
        if self._palette is not None:
            colours = self._palette[:, values[0]]
        elif self._stretches == []:
            raise ValueError(f"{escaped(self._path)}: the sample for --stretch holds no data")
        elif self._stretches is not None:
            pairs = zip(self._stretches, values, strict=True)
            colours = np.stack([stretch(band) for stretch, band in pairs])
        else:
            colours = values
        colours = np.where(hold_data, colours, np.uint8(0))
        three = np.broadcast_to(colours, (3, height, width))  # one band becomes grey
        return Image.fromarray(np.ascontiguousarray(np.moveaxis(three, 0, -1)))

    def footprint(self, window):
        """Where a window's corners lie: four [longitude, latitude] in degrees of WGS84.

        From the upper left one clockwise, as transformed: across the antimeridian longitudes jump.
        None where the file names no coordinate system or no transform (ground control points do not
        count), and where a corner has no place on the earth.
        """
        crs, to_map = self._image.crs, self._image.transform
        if crs is None or to_map.is_identity or to_map.is_degenerate:
            return None
        left, top, width, height = window
        right, bottom = left + width, top + height
        a, b, c, d, e, f = to_map[:6]
        xs = []
        ys = []
        for x, y in ((left, top), (right, top), (right, bottom), (left, bottom)):
            xs.append(a * x + b * y + c)
            ys.append(d * x + e * y + f)
        try:
            longitudes, latitudes = self._rasterio.warp.transform(crs, DEGREES, xs, ys)
        except Exception:  # GDAL's have no public class in common
            return None
        on_earth = np.isfinite(longitudes).all() and np.abs(latitudes).max() < 90 + ROUNDING
        if not on_earth:
            return None
        latitudes = np.clip(latitudes, -90, 90).tolist()
        return [list(corner) for corner in zip(longitudes, latitudes, strict=True)]

    def _values(self, shape, window=None):
        """(values, whether each holds data) of a window or of the whole scene.

        Both (bands, rows, columns); shape: (rows, columns), fewer than there are for a sample.
        """
        asked = {"indexes": self._bands, "window": window, "out_shape": (len(self._bands), *shape)}
        try:
            with _limited(self._rasterio):
                values = self._image.read(**asked)
                if self._has_masks:
                    hold_data = self._image.read_masks(**asked) > 0
                else:
                    hold_data = np.ones(values.shape, dtype=bool)
        except self._rasterio.errors.RasterioIOError as error:
            raise _not_readable(self._path, error) from None
        if values.dtype.kind == "f":
            hold_data &= np.isfinite(values)
        return values, hold_data

    def _stretches_between(self, percentiles):
        """A _Stretch for each band, between two percentiles; none if the sample has no data."""
        width, height = self.size
        times = max(1, max(width, height) / SAMPLE)
        shape = (max(1, int(height / times)), max(1, int(width / times)))
        sample, hold_data = self._values(shape)
        stretches = []
        for values, have in zip(sample, hold_data, strict=True):
            found = values[have].astype(float)
            if not len(found):  # perhaps the whole scene holds none
                return []
            stretches.append(_Stretch(*np.percentile(found, percentiles), values.dtype))
        return stretches


def _bands_of(path, image, reading):
    """Numbers of the bands that are read, one or three; ValueError where an option is missing."""
    shown = escaped(path)
    if reading.bands is not None and max(reading.bands) > image.count:
        raise ValueError(
            f"{shown}: {_bands_in_words(image)}; --bands asks for {max(reading.bands)}"
        )
    if reading != AS_STORED and _has_palette(image):
        raise ValueError(f"{shown}: a palette; --bands and --stretch are for images without one")
    if image.dtypes[0].startswith("complex"):
        raise ValueError(f"{shown}: complex numbers; write their amplitude as an image")
    bands = _colours_of(image) if reading.bands is None else list(reading.bands)
    are_colours = _has_palette(image) or (image.dtypes[0] == "uint8" and _bits_of(image) == 8)
    missing = []
    if bands is None:
        missing.append("--bands 4 3 2" if image.count > 3 else "--bands 1 2 1")
    if reading.stretch is None and not are_colours:
        missing.append("--stretch 2 98")
    if missing:
        raise ValueError(
            f"{shown}: {_bands_in_words(image)}; say how to show them, as by {' '.join(missing)}"
        )
    return bands


def _colours_of(image):
    """Numbers of the bands that are the image's colours, one or three; None where not certain."""
    names = [colour.name for colour in image.colorinterp]
    if len(names) <= 4 and {"red", "green", "blue"} <= set(names):
        return [names.index(name) + 1 for name in ("red", "green", "blue")]
    bands = [number for number, name in enumerate(names, start=1) if name != "alpha"]
    return bands if len(bands) in (1, 3) else None


def _has_palette(image):
    return image.colorinterp[0].name == "palette"


def _palette_of(image):
    """The colours of a palette's indices: (3, indices)."""
    palette = np.zeros((3, 2 ** (8 * np.dtype(image.dtypes[0]).itemsize)), dtype=np.uint8)
    for index, colour in image.colormap(1).items():
        palette[:, index] = colour[:3]
    return palette


def _bits_of(image):
    """Bits of a value; a tag says so where they are fewer than its type has."""
    in_type = 8 * np.dtype(image.dtypes[0]).itemsize
    return int(image.tags(1, ns="IMAGE_STRUCTURE").get("NBITS", in_type))


def _bands_in_words(image):
    return f"{image.count} band{'s' if image.count > 1 else ''} of {_bits_of(image)} bits"


def _refuse_large_blocks(path, image):
    """Raise ValueError where a block, which is decoded whole, is larger than the cache."""
    rows, columns = image.block_shapes[0]
    is_by_pixel = image.tags(ns="IMAGE_STRUCTURE").get("INTERLEAVE") == "PIXEL"
    together = image.count if is_by_pixel else 1
    size = rows * columns * together * np.dtype(image.dtypes[0]).itemsize
    if size > CACHE:
        raise ValueError(
            f"{escaped(path)}: blocks of {columns} x {rows} pixels, too large to decode; write it "
            "in tiles, as gdal_translate -co TILED=YES does"
        )


def _refuse_nearly_nothing(path, image):
    """Raise ValueError for a file that claims far more pixels than its bytes can hold."""
    pixels = image.width * image.height
    if pixels > _MOST_PIXELS_A_BYTE * os.path.getsize(path) and pixels > _most_pixels():
        raise ValueError(
            f"{escaped(path)}: {image.width} x {image.height} pixels in a file of "
            f"{os.path.getsize(path)} bytes: sparse or damaged"
        )


def _have_masks(rasterio, image, bands):
    """Whether pixels of these bands may hold no data.

    They all do in a band that no mask is for: in one of opacity that --bands shows as a colour, as
    near infrared often is by mistake of the writer.
    """
    no_mask = rasterio.enums.MaskFlags.all_valid
    return not any(no_mask in image.mask_flag_enums[band - 1] for band in bands)


class _Stretch:
    """Makes the values of a band 8 bits: low and less become 0, high and more 255."""

    def __init__(self, low, high, dtype):
        self._low = low
        self._times = 255 / (high - low or 1.0)  # a band of one value is black
        self._unsigned = None
        if dtype.kind in "iu" and dtype.itemsize <= 2:  # few values: looked up, ten times as fast
            self._unsigned = np.dtype(f"u{dtype.itemsize}")
            all_values = np.arange(2 ** (8 * dtype.itemsize), dtype=self._unsigned)
            self._colours = self._scaled(all_values.view(dtype))

    def __call__(self, values):
        if self._unsigned is None:
            return self._scaled(values)
        return self._colours[values.view(self._unsigned)]

    def _scaled(self, values):
        scaled = (values.astype(float) - self._low) * self._times
        return np.rint(np.nan_to_num(scaled).clip(0, 255)).astype(np.uint8)


# ------------------------------------------------------------------ windows


def tiles_of(size, side, overlap):
    """Windows that cover a scene row by row; as `dataset.images.windows`, in our form."""
    tiles = []
    for left, top, right, bottom in windows(size, side, overlap):
        tiles.append((left, top, right - left, bottom - top))
    return tiles


def cut_boxes(labels, boxes, window):
    """(labels, boxes) of the objects whose centre lies in a window, in its pixels.

    labels: a list of n; boxes: (n, 5) or (n, 6), centre first, in pixels of the image. A centre on
    the left or upper border is inside, on the right or lower one outside. So an object lies in each
    of the windows that overlap on it, and in none if its centre is outside of the image.
    """
    boxes = np.asarray(boxes, dtype=float)
    if len(boxes) == 0:
        return [], boxes
    left, top, width, height = window
    shifted = boxes.copy()
    shifted[:, :2] -= (left, top)
    xs, ys = shifted[:, 0], shifted[:, 1]
    inside = np.flatnonzero((xs >= 0) & (xs < width) & (ys >= 0) & (ys < height))
    return [labels[i] for i in inside], shifted[inside]
