"""GeoJSON (RFC 7946), a file an image, as QGIS and ogr2ogr write it: outlines in map coordinates.

A FeatureCollection, of which each feature is an object:

    geometry      a Polygon, or a MultiPolygon of one; its outer ring counts, holes do not
    properties    the label: of class, label, category the first that is there;
                  a score, if any: of score, confidence the first that is there

Points are x, y in the coordinates that the member "crs" names, an older form that both programs
still write. Without it they are longitude and latitude in degrees. The image is georeferenced: its
transform leads from them to pixels.
"""

import warnings
from functools import lru_cache

from det_formats.entries import Detection, Entry, json_of, member, numbers, points_of

SUFFIX = ".geojson"
UNLISTED = "missing"
LABELS = ("class", "label", "category")
SCORES = ("score", "confidence")
DEGREES = "EPSG:4326"  # x, y are longitude, latitude: rasterio keeps this order


def entries(file, image):
    collection = json_of(file)
    if not isinstance(collection, dict) or collection.get("type") != "FeatureCollection":
        raise ValueError("expected a FeatureCollection")
    crs = _crs_of(collection)
    yield Entry(image, "features", None)
    for number, feature in enumerate(member(collection, "features", list), start=1):
        yield Entry(image, f"feature {number}", (feature, crs))


def detection(content, georeference, hints):
    feature, crs = content
    properties = member(feature, "properties", dict)
    label = _first_of(LABELS, properties, default=None)
    if not isinstance(label, str):
        raise ValueError(f"expected a property {', '.join(LABELS)}, a text, found {label!r:.60}")
    [score] = numbers(_first_of(SCORES, properties, default=1.0))
    ring = _outer_ring(member(feature, "geometry", dict))
    return Detection(label=label, score=score, points=_in_pixels(ring, crs, georeference))


@lru_cache(maxsize=1)  # the objects of an image come one after another
def georeference(path):
    """(crs, transform from its coordinates to pixels) of an image; ValueError without them."""
    rasterio = _rasterio()
    try:
        with warnings.catch_warnings():  # the error below says the same, and what to do
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            with rasterio.open(path) as image:
                crs, to_map = image.crs, image.transform
    except rasterio.errors.RasterioIOError as error:
        raise ValueError(f"rasterio cannot read the image ({error})") from None
    if crs is None or to_map.is_identity or to_map.is_degenerate:
        raise ValueError("the image has no crs or no transform; take the georeferenced one")
    return crs, ~to_map


def _rasterio():
    try:
        import rasterio.warp
    except ImportError:
        remedy = "pip install -r requirements-geo.txt"
        raise ValueError(f"geojson needs rasterio: {remedy}") from None
    return rasterio


def _crs_of(collection):
    """The crs that a collection names; by the standard where it names none."""
    name = DEGREES
    if "crs" in collection:
        crs = member(collection, "crs", dict)
        name = member(member(crs, "properties", dict), "name", str)
    rasterio = _rasterio()
    try:
        return rasterio.crs.CRS.from_user_input(name)
    except rasterio.errors.CRSError as error:
        raise ValueError(f"crs {name!r:.60}: not known to rasterio ({error})") from None


def _first_of(keys, properties, default):
    for key in keys:
        if key in properties:
            return properties[key]
    return default


def _outer_ring(geometry):
    """(x, y) of the corners of an outline, the first not repeated at the end."""
    kind = geometry.get("type")
    if kind not in ("Polygon", "MultiPolygon"):
        raise ValueError(f"expected a Polygon, found {kind!r:.60}")
    rings = member(geometry, "coordinates", list)
    if kind == "MultiPolygon":
        if len(rings) != 1:
            raise ValueError(f"expected one polygon, found {len(rings)}; make each a feature")
        [rings] = rings
    ring = rings[0] if isinstance(rings, list) and rings else None
    if not isinstance(ring, list) or len(ring) < 4 or ring[0] != ring[-1]:
        raise ValueError("expected a ring of four points or more, of which the last is the first")
    points = []
    for point in ring[:-1]:
        place = point[:2] if isinstance(point, list) else point  # without a height
        points.append(tuple(numbers(place, count=2)))
    return points


def _in_pixels(points, crs, georeference):
    image_crs, to_pixels = georeference
    xs, ys = zip(*points, strict=True)
    if crs.is_geographic and (max(map(abs, xs)) > 180 or max(map(abs, ys)) > 90):
        raise ValueError(f"{points[0]}: no degrees; name the crs of these numbers in the file")
    try:
        xs, ys = _rasterio().warp.transform(crs, image_crs, xs, ys)
    except Exception as error:  # GDAL's have no public class in common
        raise ValueError(f"{points[0]}: no place in the crs of the image ({error})") from None
    a, b, c, d, e, f = to_pixels[:6]
    flat = []
    for x, y in zip(xs, ys, strict=True):
        flat += [a * x + b * y + c, d * x + e * y + f]
    return points_of(flat)
