"""Pascal VOC, DIOR, DIOR-R and roLabelImg: XML, an image a file."""

import math

import pytest

import detections
from conftest import write_image
from det_formats.det_json import load_detections

UPRIGHT = "<bndbox><xmin>10</xmin><ymin>20</ymin><xmax>40</xmax><ymax>60</ymax></bndbox>"


def convert(tmp_path, content, *options):
    """{image stem: its detections} of an XML file of the image a, beside which there is b."""
    for name in ("a.png", "b.png"):
        write_image(tmp_path / "images" / name, size=(100, 80))
    (tmp_path / "xml").mkdir(exist_ok=True)
    encoded = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "xml" / "a.xml").write_bytes(encoded)
    out = tmp_path / "out"
    folders = ["--images", str(tmp_path / "images"), "--out", str(out), "--overwrite"]
    detections.main(["convert", "voc", str(tmp_path / "xml"), *folders, *options])
    return {path.stem: load_detections(path) for path in out.glob("*.json")}


def annotation(*objects, before=""):
    """The text of a file; each object: what stands in it beside the name ship."""
    inner = "".join(f"<object><name> ship </name>{one}</object>" for one in objects)
    return f"{before}<annotation><filename>b.png</filename>{inner}</annotation>"


def element(name, values):
    """<name> with a child a value."""
    children = "".join(f"<{key}>{value}</{key}>" for key, value in values.items())
    return f"<{name}>{children}</{name}>"


def test_edges_are_taken_as_they_stand(tmp_path):
    part = f"<difficult>1</difficult><part><name>mast</name>{UPRIGHT}</part>"
    swapped = element("bndbox", {"ymax": 9.5, "xmax": 4, "ymin": 2, "xmin": 0})
    found = convert(tmp_path, annotation(part + UPRIGHT, swapped))
    # ((10 + 40) / 2, (20 + 60) / 2, 40 - 10, 60 - 20), and the other likewise
    assert found == {
        "a": [
            {"label": "ship", "bbox": [25.0, 40.0, 30.0, 40.0, 0.0, 1.0]},
            {"label": "ship", "bbox": [2.0, 5.75, 4.0, 7.5, 0.0, 1.0]},
        ]
    }


@pytest.mark.parametrize("beside", ["", UPRIGHT])
def test_rolabelimg_has_a_box_in_radians(tmp_path, beside):
    rotated = element("robndbox", {"cx": 50, "cy": 40, "w": 20.5, "h": 10, "angle": 2.632232})
    [one] = convert(tmp_path, annotation(beside + rotated))["a"]
    assert one["bbox"] == [50.0, 40.0, 20.5, 10.0, 2.632232, 1.0]


def test_dior_r_has_corners(tmp_path):
    # From (18, 26) the first side is (-3, 4), of length 5, the second (-8, -6), of length 10.
    corners = {
        **{"x_left_top": 18, "y_left_top": 26, "x_right_top": 15, "y_right_top": 30},
        **{"x_left_bottom": 10, "y_left_bottom": 20, "x_right_bottom": 7, "y_right_bottom": 24},
    }
    [one] = convert(tmp_path, annotation(element("robndbox", corners)))["a"]
    assert one["bbox"] == pytest.approx([12.5, 25, 5, 10, math.atan2(4, -3), 1])


def test_an_annotation_without_objects_is_an_image_without(tmp_path):
    assert convert(tmp_path, annotation()) == {"a": []}
    assert convert(tmp_path, annotation(), "--unlisted", "empty") == {"a": [], "b": []}


def test_other_encodings_are_read(tmp_path):
    text = annotation(UPRIGHT, before='<?xml version="1.0" encoding="latin-1"?>')
    [one] = convert(tmp_path, text.replace("ship", "Häfen").encode("latin-1"))["a"]
    assert one["label"] == "Häfen"


@pytest.mark.parametrize(
    ("inner", "problem"),
    [
        ("", "no <bndbox> in <object>"),
        (UPRIGHT.replace("xmax", "width"), "no <xmax> in <bndbox>"),
        (UPRIGHT.replace("40", "nan"), "expected a number below 1e9 in size, found 'nan'"),
        (UPRIGHT.replace("40", ""), "expected a number below 1e9 in size, found None"),
        (UPRIGHT.replace("40", "4"), r"bbox w, h: expected .* found \[-6.0, 40.0\]"),
        ("<robndbox><cx>1</cx></robndbox>" + UPRIGHT, "no <cy> in <robndbox>"),
        ("<robndbox><x_left_top>1</x_left_top></robndbox>", "no <y_left_top> in <robndbox>"),
    ],
)
def test_an_object_that_is_no_box_is_refused_alone(tmp_path, inner, problem):
    content = annotation(UPRIGHT, inner)
    with pytest.raises(ValueError, match=rf"a\.xml: object 2: {problem}"):
        convert(tmp_path, content)
    assert len(convert(tmp_path, content, "--skip-bad")["a"]) == 1


def test_an_object_needs_a_name(tmp_path):
    for name, problem in (("<name> </name>", "no text in <name>"), ("", "no <name> in <object>")):
        content = annotation(UPRIGHT).replace("<name> ship </name>", name)
        with pytest.raises(ValueError, match=rf"a\.xml: object 1: {problem}"):
            convert(tmp_path, content)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "expected XML in UTF-8: no element found"),
        ("ship 1 2 3 4", "expected XML in UTF-8: syntax error"),
        (annotation(UPRIGHT)[:-9], "expected XML in UTF-8: "),
        (annotation().encode("utf-16")[:-1], "expected XML in UTF-8: "),
        (annotation(before='<?xml version="1.0" encoding="klingon"?>'), "expected XML in UTF-8: "),
        (annotation(before='<?xml version="1.0" encoding="utf-7"?>'), "expected XML in UTF-8: "),
        (annotation("&lol;"), "expected XML in UTF-8: undefined entity"),
        ("<html></html>", "expected <annotation>, found <html>"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path, content, problem):
    with pytest.raises(ValueError, match=rf"a\.xml: {problem}"):
        convert(tmp_path, content)


LAUGHS = "".join(f'<!ENTITY l{i + 1} "{f"&l{i};" * 10}">' for i in range(9))


@pytest.mark.parametrize(
    ("doctype", "inner", "entity"),
    [
        (f'[<!ENTITY l0 "ha">{LAUGHS}]', "&l9;", "l0"),  # a billion
        ("[<!ENTITY own SYSTEM 'file:///etc/hostname'>]", "&own;", "own"),
        ("[<!ENTITY % more SYSTEM 'http://localhost/more.dtd'> %more;]", "", "more"),
        ("SYSTEM 'http://localhost/annotation.dtd'", "&own;", "own"),  # declared elsewhere
    ],
    ids=["billion laughs", "file", "parameter", "elsewhere"],
)
def test_entities_are_refused_before_they_unfold(tmp_path, doctype, inner, entity):
    content = annotation(inner + UPRIGHT, before=f"<!DOCTYPE annotation {doctype}>")
    with pytest.raises(ValueError, match=rf"a\.xml: .*: entity '{entity}', which annotations"):
        convert(tmp_path, content)


def test_a_doctype_without_entities_is_read(tmp_path):
    before = "<!DOCTYPE annotation SYSTEM 'http://localhost/annotation.dtd'>"
    assert len(convert(tmp_path, annotation(UPRIGHT, before=before))["a"]) == 1
