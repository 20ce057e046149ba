"""Pascal VOC and its relatives, an XML file an image: <annotation> with an <object> each.

    <bndbox>      xmin, ymin, xmax, ymax             VOC, DIOR
    <robndbox>    cx, cy, w, h, angle                roLabelImg; radians of the side w, as in ours
    <robndbox>    x_left_top, y_left_top, ...        DIOR-R, four corners

All in pixels. VOC itself counts pixels from 1 and includes the last; others count from 0. So xmin
to xmax are taken as they stand, as edges: none is off by more than a pixel. An object's <robndbox>
counts before its <bndbox>. The image is told by the XML file's own name, since <filename> is often
another's. <difficult> does not count.
"""

from pathlib import Path
from xml.etree.ElementTree import TreeBuilder
from xml.parsers import expat

from det_formats.entries import Detection, Entry, numbers

SUFFIX = ".xml"
UNLISTED = "missing"

EDGES = ("xmin", "ymin", "xmax", "ymax")
BOX = ("cx", "cy", "w", "h", "angle")
CORNERS = ("left_top", "right_top", "right_bottom", "left_bottom")


def entries(file, image):
    root = _root_of(Path(file).read_bytes())
    if root.tag != "annotation":
        raise ValueError(f"expected <annotation>, found <{root.tag:.60}>")
    yield Entry(image, "annotation", None)
    for number, element in enumerate(root.findall("object"), start=1):
        yield Entry(image, f"object {number}", element)


def _root_of(content):
    """The root element of a document's bytes."""
    builder = TreeBuilder()
    parser = expat.ParserCreate()
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    # A few entities in one another unfold to gigabytes, and others read files of this machine.
    parser.EntityDeclHandler = _refuse_entity
    parser.SkippedEntityHandler = _refuse_entity
    try:
        parser.Parse(content, True)
    except (expat.ExpatError, LookupError, ValueError) as error:  # of encodings the last two
        raise ValueError(f"expected XML in UTF-8: {error}") from None
    return builder.close()


def _refuse_entity(name, *rest):
    raise ValueError(f"entity '{name:.60}', which annotations do without; remove the DOCTYPE")


def detection(content, size, hints):
    label = (_child(content, "name").text or "").strip()
    if not label:
        raise ValueError("no text in <name>")
    rotated = content.find("robndbox")
    if rotated is None:
        xmin, ymin, xmax, ymax = _numbers_in(_child(content, "bndbox"), EDGES)
        box = ((xmin + xmax) / 2, (ymin + ymax) / 2, xmax - xmin, ymax - ymin, 0.0)
        return Detection(label=label, box=box)
    if rotated.find("x_left_top") is None:
        return Detection(label=label, box=tuple(_numbers_in(rotated, BOX)))
    points = [_numbers_in(rotated, (f"x_{corner}", f"y_{corner}")) for corner in CORNERS]
    return Detection(label=label, points=points)


def _numbers_in(element, names):
    """The numbers in an element's children of these names."""
    found = []
    for name in names:
        found += numbers(_child(element, name).text)
    return found


def _child(element, name):
    child = element.find(name)
    if child is None:
        raise ValueError(f"no <{name}> in <{element.tag}>")
    return child
