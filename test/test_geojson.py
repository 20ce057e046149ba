"""GeoJSON over georeferenced images: from map coordinates to pixels, what is refused."""

import json
import sys

import numpy as np
import pytest

import detections
from conftest import write_image
from det_formats import geojson

rasterio = pytest.importorskip("rasterio", reason="geojson needs requirements-geo.txt")
warp = pytest.importorskip("rasterio.warp")

UTM = "urn:ogc:def:crs:EPSG::32632"  # as QGIS and ogr2ogr name EPSG:32632
CRS84 = "urn:ogc:def:crs:OGC:1.3:CRS84"
# x = 500000 + column / 2, y = 5300000 - row / 2: half a metre a pixel, north up.
NORTH_UP = rasterio.Affine(0.5, 0, 500000, 0, -0.5, 5300000)
PIXELS = [(20, 10), (60, 10), (60, 30), (20, 30)]
ON_THE_MAP = [(500010, 5299995), (500030, 5299995), (500030, 5299985), (500010, 5299985)]


def write_tiff(path, to_map=NORTH_UP, crs="EPSG:32632"):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = {"width": 100, "height": 80, "count": 3, "dtype": "uint8"}
    with rasterio.open(path, "w", driver="GTiff", crs=crs, transform=to_map, **shape) as image:
        image.write(np.zeros((3, 80, 100), dtype=np.uint8))
    return path


def ring(points):
    return [list(point) for point in [*points, points[0]]]


def polygon(points):
    return {"type": "Polygon", "coordinates": [ring(points)]}


def feature(geometry, **properties):
    properties = properties or {"class": "ship"}
    return {"type": "Feature", "properties": properties, "geometry": geometry}


def collection(*features, crs=UTM):
    content = {"type": "FeatureCollection", "features": list(features)}
    if crs is not None:
        content["crs"] = {"type": "name", "properties": {"name": crs}}
    return content


def read(tmp_path, content, image):
    """The detections in a file of this content, in an image's pixels."""
    file = tmp_path / "a.geojson"
    file.write_text(json.dumps(content), encoding="utf-8")
    first, *rest = geojson.entries(file, "a")
    assert first == ("a", "features", None)
    georeference = geojson.georeference(image)
    return [geojson.detection(entry.content, georeference, None) for entry in rest]


# ------------------------------------------------------------------ pixels


def test_map_coordinates_of_the_images_own_crs_become_pixels(tmp_path):
    image = write_tiff(tmp_path / "a.tif")
    [ship] = read(tmp_path, collection(feature(polygon(ON_THE_MAP))), image)
    # (500010 - 500000) / 0.5 = 20, (5300000 - 5299995) / 0.5 = 10, and so on
    assert np.array(ship.points) == pytest.approx(np.array(PIXELS), abs=1e-6)
    assert ship.label == "ship" and ship.score == 1 and ship.box is None


def test_a_turned_image_turns_the_outlines(tmp_path):
    # x = 500000 + 0.4 column + 0.3 row, y = 5300000 + 0.3 column - 0.4 row
    turned = rasterio.Affine(0.4, 0.3, 500000, 0.3, -0.4, 5300000)
    image = write_tiff(tmp_path / "a.tif", to_map=turned)
    corners = [
        (500011, 5300002),  # of (20, 10): 8 + 3, 6 - 4
        (500027, 5300014),  # of (60, 10): 24 + 3, 18 - 4
        (500033, 5300006),  # of (60, 30): 24 + 9, 18 - 12
        (500017, 5299994),  # of (20, 30): 8 + 9, 6 - 12
    ]
    [ship] = read(tmp_path, collection(feature(polygon(corners))), image)
    assert np.array(ship.points) == pytest.approx(np.array(PIXELS), abs=1e-6)


@pytest.mark.parametrize("crs", [None, CRS84, "urn:ogc:def:crs:EPSG::4326"])
def test_longitude_and_latitude_become_pixels(tmp_path, crs):
    image = write_tiff(tmp_path / "a.tif")
    eastings, northings = zip(*ON_THE_MAP, strict=True)
    degrees = zip(*warp.transform("EPSG:32632", "EPSG:4326", eastings, northings), strict=True)
    [ship] = read(tmp_path, collection(feature(polygon(list(degrees))), crs=crs), image)
    assert np.array(ship.points) == pytest.approx(np.array(PIXELS), abs=1e-3)


def test_longitude_comes_before_latitude(tmp_path):
    # The middle of UTM's zone 32 is 9 degrees east, where x is 500000: column 0.
    image = write_tiff(tmp_path / "a.tif")
    triangle = [(9, 47.85), (9, 47.8501), (9.0001, 47.85)]
    [ship] = read(tmp_path, collection(feature(polygon(triangle)), crs=None), image)
    assert [x for x, _ in ship.points[:2]] == pytest.approx([0, 0], abs=1e-6)
    assert ship.points[0][1] > ship.points[1][1]  # the second lies further north
    assert ship.points[2][0] > 0


def test_a_multipolygon_of_one_is_read_without_its_holes_and_heights(tmp_path):
    heights = [[x, y, 412.0] for x, y in ring(ON_THE_MAP)]
    geometry = {"type": "MultiPolygon", "coordinates": [[heights, ring(ON_THE_MAP[:3])]]}
    [ship] = read(tmp_path, collection(feature(geometry)), write_tiff(tmp_path / "a.tif"))
    assert np.array(ship.points) == pytest.approx(np.array(PIXELS), abs=1e-6)


@pytest.mark.parametrize(
    ("properties", "label", "score"),
    [
        ({"category": "c", "label": "b", "class": "a"}, "a", 1),
        ({"category": "c", "label": "b", "score": 0.25, "confidence": 0.5}, "b", 0.25),
        ({"category": "c", "fid": 7, "confidence": 0.5}, "c", 0.5),
    ],
)
def test_label_and_score_are_the_first_property_that_is_there(tmp_path, properties, label, score):
    content = collection(feature(polygon(ON_THE_MAP), **properties))
    [one] = read(tmp_path, content, write_tiff(tmp_path / "a.tif"))
    assert (one.label, one.score) == (label, score)


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (feature(None), "expected 'geometry', an object, found None"),
        (feature({"type": "Point", "coordinates": [1, 2]}), "expected a Polygon, found 'Point'"),
        (feature({"type": "MultiPolygon", "coordinates": [[], []]}), "one polygon, found 2; make"),
        (feature({"type": "Polygon", "coordinates": []}), "expected a ring of four points or more"),
        (feature({"type": "Polygon", "coordinates": [ON_THE_MAP]}), "the last is the first"),
        (feature(polygon(ON_THE_MAP[:2])), "expected a ring of four points or more"),
        (feature(polygon([("east", 2), (3, 4), (5, 6)])), "expected a number .* found 'east'"),
        (feature(polygon([(1,), (2,), (3,)])), "expected 2 numbers, found 1"),
        (feature(polygon(ON_THE_MAP), kind="ship"), "expected a property class, label, category"),
        (feature(polygon(ON_THE_MAP), **{"class": 3}), "a text, found 3"),
        (feature(polygon(ON_THE_MAP), label="a", score=None), "expected a number .* found None"),
        ({"type": "Feature"}, "expected 'properties', an object, found None"),
    ],
)
def test_other_features_are_refused(tmp_path, own, message):
    image = write_tiff(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=message):
        read(tmp_path, collection(own), image)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "expected a FeatureCollection"),
        ({"type": "Feature"}, "expected a FeatureCollection"),
        ({"type": "FeatureCollection"}, "expected 'features', a list"),
        ({**collection(), "crs": None}, "expected 'crs', an object, found None"),
        (collection(crs="my grid"), "crs 'my grid': not known to rasterio"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    file = tmp_path / "a.geojson"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        list(geojson.entries(file, "a"))


@pytest.mark.parametrize(
    ("crs", "points", "message"),
    [
        (None, ON_THE_MAP, "no degrees; name the crs of these numbers in the file"),
        (None, [(9, 91), (10, 91), (10, 92)], "no degrees"),
        ("EPSG:3035", [(1e8, 1e8), (2e8, 1e8), (2e8, 2e8)], "no place in the crs of the image"),
    ],
)
def test_points_that_have_no_pixel_are_refused(tmp_path, crs, points, message):
    image = write_tiff(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=message):
        read(tmp_path, collection(feature(polygon(points)), crs=crs), image)


def test_an_image_that_is_not_georeferenced_is_refused(tmp_path):
    plain = write_image(tmp_path / "a.png")
    no_crs = write_tiff(tmp_path / "b.tif", crs=None)
    for image in (plain, no_crs):
        with pytest.raises(ValueError, match="no crs or no transform; take the georeferenced one"):
            geojson.georeference(image)
    (tmp_path / "c.tif").write_bytes(b"none")
    with pytest.raises(ValueError, match="rasterio cannot read the image"):
        geojson.georeference(tmp_path / "c.tif")


def test_without_rasterio_the_message_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rasterio", None)
    monkeypatch.setitem(sys.modules, "rasterio.warp", None)
    file = tmp_path / "a.geojson"
    file.write_text(json.dumps(collection()))
    remedy = "^geojson needs rasterio: pip install -r requirements-geo.txt$"
    with pytest.raises(ValueError, match=remedy):
        list(geojson.entries(file, "a"))


# ------------------------------------------------------------------ the command


def test_a_folder_of_geojson_becomes_boxes(tmp_path):
    for name in "abc":
        write_tiff(tmp_path / "images" / f"{name}.tif")
    (tmp_path / "maps").mkdir()
    content = collection(feature(polygon(ON_THE_MAP), label="boat", score=0.5))
    (tmp_path / "maps" / "a.geojson").write_text(json.dumps(content))
    (tmp_path / "maps" / "b.geojson").write_text(json.dumps(collection()))
    images, out = str(tmp_path / "images"), tmp_path / "out"
    maps = str(tmp_path / "maps")
    detections.main(["convert", "geojson", maps, "--images", images, "--out", str(out)])
    written = {file.stem: json.loads(file.read_text()) for file in out.iterdir()}
    assert sorted(written) == ["a", "b"] and written["b"] == []
    [ship] = written["a"]
    assert ship["label"] == "ship"
    # columns 20 to 60, rows 10 to 30
    assert ship["bbox"] == pytest.approx([40, 20, 40, 20, 0, 0.5], abs=1e-6)
