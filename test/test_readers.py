"""All readers alike: their contract, and damaged files, which they refuse in words or read."""

import copy
import json
import os
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import detections
from conftest import write_image
from det_formats.convert import READERS
from det_formats.det_json import load_detections
from options import FORMATS_IN

try:
    import rasterio
except ImportError:
    rasterio = None

NAMES = "ship\nplane\nharbor\n"
TASK = """[{"data": {"image": "/data/upload/1/0a1b2c3d-a.png"}, "annotations": [{"result": [
{"type": "rectanglelabels", "original_width": 100, "original_height": 80, "value":
{"x": 10, "y": 12.5, "width": 20, "height": 12.5, "rotation": 30,
"rectanglelabels": ["ship"]}}]}]}]"""
COCO = """{"images": [{"id": 1, "file_name": "a.png", "width": 100, "height": 80}],
"categories": [{"id": 1, "name": "ship"}], "annotations": [{"id": 1, "image_id": 1,
"category_id": 1, "bbox": [10, 10, 20, 10], "iscrowd": 0,
"segmentation": [[10, 10, 30, 10, 30, 20, 10, 20]]}]}"""
VOC = """<annotation><filename>a.png</filename><object><name>ship</name><bndbox><xmin>10</xmin>
<ymin>10</ymin><xmax>30</xmax><ymax>20</ymax></bndbox></object><object><name>ship</name>
<robndbox><cx>20</cx><cy>15</cy><w>20</w><h>10</h><angle>0.5</angle></robndbox></object></annotation>"""
MAP = """{"type": "FeatureCollection", "crs": {"type": "name", "properties":
{"name": "urn:ogc:def:crs:EPSG::32632"}}, "features": [{"type": "Feature", "properties":
{"class": "ship", "score": 0.9}, "geometry": {"type": "Polygon", "coordinates": [[[500010, 5299995],
[500030, 5299995], [500030, 5299985], [500010, 5299985], [500010, 5299995]]]}}]}"""
SAMPLES = {  # of each format: a file's name and its content, of one object or two
    "dota": ("a.txt", "imagesource:x\ngsd:0.1\n10 10 30 10 30 20 10 20 ship 0\n"),
    "yolo-obb": ("a.txt", "0 0.1 0.1 0.3 0.1 0.3 0.2 0.1 0.2 0.9\n"),
    "yolo": ("a.txt", "0 0.2 0.2 0.2 0.1 0.9\n1 0.5 0.5 0.1 0.1 0.8\n"),
    "mmrotate": ("all.json", '{"a.png": [[[20, 15, 20, 10, 0.5, 0.9]], [], []]}'),
    "coco": ("instances.json", COCO),
    "voc": ("a.xml", VOC),
    "vhr10": ("a.txt", "(10,10),(30, 20),1 \n(40,40),(50,60),2 \n"),
    "label-studio": ("tasks.json", TASK),
    "geojson": ("a.geojson", MAP),
}
ODD = (
    *("", " ", "\n", "\0", "\ufeff", "-1", "0", "1e9", "1e999", "nan", "-Infinity", "9" * 400),
    *("null", "true", "{}", "[]", "[[]]", '"x"', "../../x", "/etc/x", "\\", "&x;", "<x>", "\u2028"),
    *("a.png", "Task1_", "1_0", "0x1", "１", "{", "}", "[", "]", "(", ")", ",", '"', "'"),
)


def options_of(form, folder):
    return ["--names", str(folder / "names.txt")] if form in detections.NUMBERED else []


def convert(form, folder, out, *arguments):
    tiles = "maps" if form == "geojson" else "tiles"
    places = ["--images", str(folder / tiles), "--out", str(out), *options_of(form, folder)]
    return detections.main(["convert", form, str(folder / "labels"), *places, *arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images a.png and b.png, both georeferenced too, and an empty folder of labels."""
    root = tmp_path_factory.mktemp("fuzz")
    for name in ("a.png", "b.png"):
        write_image(root / "tiles" / name, (100, 80))
        write_map(root / "maps" / name)
    (root / "names.txt").write_text(NAMES)
    (root / "labels").mkdir()
    return root


def write_map(path):
    """An image of 100 x 80 pixels of half a metre in EPSG:32632, where rasterio is installed."""
    if rasterio is not None:
        path.parent.mkdir(exist_ok=True)
        to_map = rasterio.Affine(0.5, 0, 500000, 0, -0.5, 5300000)
        shape = {"width": 100, "height": 80, "count": 3, "dtype": "uint8"}
        with rasterio.open(
            path.with_suffix(".tif"), "w", crs="EPSG:32632", transform=to_map, **shape
        ):
            pass


def put(folder, name, content):
    """The one file of the folder of labels."""
    for file in (folder / "labels").iterdir():
        file.unlink()
    (folder / "labels" / name).write_bytes(content)


def listing(folder):
    return sorted(
        os.path.join(place, name) for place, _, names in os.walk(folder) for name in names
    )


def test_there_is_a_reader_for_each_format_that_the_options_name():
    assert tuple(READERS) == FORMATS_IN == tuple(SAMPLES)


NEEDED = pytest.mark.skipif(rasterio is None, reason="geojson needs requirements-geo.txt")
FORMS = [*(form for form in SAMPLES if form != "geojson"), pytest.param("geojson", marks=NEEDED)]


@pytest.mark.parametrize("form", FORMS)
def test_a_sound_file_is_read(form, folder, tmp_path):
    name, content = SAMPLES[form]
    put(folder, name, content.encode())
    convert(form, folder, tmp_path / "out")
    found = load_detections(tmp_path / "out" / "a.json")
    assert len(found) == {"yolo": 2, "voc": 2, "vhr10": 2}.get(form, 1)
    for one in found:
        assert one["label"] in ("ship", "airplane")


# ------------------------------------------------------------------ damage


ODD_VALUES = st.one_of(
    st.sampled_from([None, True, -1, 0, 1, 2, 1e9, 10**400, 0.5, "", "x", "a.png", "../x", "ship"]),
    st.sampled_from([[], {}, [[]], [1], [1, 2, 3, 4], [[0, 0], [9, 0], [9, 9]], {"x": 1}]),
    st.floats(),
)


def places_in(values):
    """(container, key) of all that a JSON value holds, at any depth."""
    found = []
    pairs = values.items() if isinstance(values, dict) else enumerate(values)
    for key, value in list(pairs):
        found.append((values, key))
        if isinstance(value, (dict, list)):
            found += places_in(value)
    return found


@st.composite
def damaged(draw, content):
    """A file's content after some damage: parts cut out, doubled, replaced, or noise in all.

    Of JSON half of the files stay JSON, with other values in it.
    """
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=300))
    if content[0] in "[{" and draw(st.booleans()):
        values = json.loads(content)
        for _ in range(draw(st.integers(1, 3))):
            places = places_in(values)
            if places:
                container, key = draw(st.sampled_from(places))
                container[key] = copy.deepcopy(draw(ODD_VALUES))  # it may be damaged next
        return json.dumps(values).encode()
    text = content
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        end = draw(st.integers(start, min(len(text), start + 40)))
        part = draw(
            st.one_of(st.sampled_from(ODD), st.just(text[start:end] * 2), st.text(max_size=8))
        )
        text = text[:start] + part + text[end:]
    return text.encode("utf-8", errors="surrogatepass")


def examples(count):
    """Settings for as many examples a format, the same ones each time."""
    return settings(
        max_examples=count,
        derandomize=True,
        deadline=20_000,  # milliseconds after which an example counts as hanging
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


def hold(form, folder, content):
    """A damaged file is refused by a ValueError, or read; nothing is written but in --out.

    Returns which of the two.
    """
    name, _ = SAMPLES[form]
    put(folder, name, content)
    out = folder / "out"
    before = listing(folder)
    outcome = "refused"
    try:
        counts = convert(form, folder, out, "--overwrite", "--skip-bad")
        if not counts["bad"]:
            outcome = "read"
    except ValueError as error:
        assert str(error)
    assert set(listing(folder)) - set(before) <= {str(out / "a.json"), str(out / "b.json")}
    for file in out.glob("*.json") if out.is_dir() else ():
        load_detections(file)
    return outcome


FAST = 500 // len(SAMPLES) + 1
SLOW = 10_000 // len(SAMPLES) + 1


def hold_all(form, folder, count):
    """`hold` for many damaged files, of which some are read and some are refused."""
    outcomes = Counter()

    @examples(count)
    @given(damaged(SAMPLES[form][1]))
    def each(content):
        outcomes[hold(form, folder, content)] += 1

    each()
    print(f"{form}: {dict(outcomes)}")
    assert outcomes["read"] and outcomes["refused"]


@pytest.mark.parametrize("form", FORMS)
def test_damaged_files_are_refused_in_words_or_read(form, folder):
    hold_all(form, folder, FAST)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_ten_thousand_damaged_files_are_refused_in_words_or_read(form, folder):
    hold_all(form, folder, SLOW)
