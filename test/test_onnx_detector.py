"""Detectors in ONNX files: against the package that exported them, and by numbers made by hand."""

import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT
from det_formats.onnx_detector import OnnxDetector, letterboxed

pytest.importorskip("onnxruntime", reason="pip install -r requirements-onnx.txt")

FIXTURES = ROOT / "test" / "fixtures"
PREDICTED = json.loads((FIXTURES / "obb.json").read_text())  # by the package itself

# ------------------------------------------------------------------ against the package


def picture(name):
    """sample_1 and sample_4 of 128 x 128 pixels; crop, a part of sample_2 of 96 x 64."""
    if name == "crop":
        return Image.open(ROOT / "test" / "sample_2.png").convert("RGB").crop((10, 20, 106, 84))
    return Image.open(ROOT / "test" / f"{name}.png").convert("RGB")


def found_in(model, name, least_score=0.25):
    """Rows cx, cy, w, h, angle, score, class."""
    detector = OnnxDetector(FIXTURES / f"{model}.onnx", "cpu")
    [found] = detector.detect([detector.letterboxed(picture(name))], least_score, 0.55)
    return np.column_stack([found.boxes, found.scores, found.kinds])


def distances(rows, others):
    """(rows, others, 7): how far the numbers of each two are apart."""
    return np.abs(rows[:, None] - others)


MODELS = pytest.mark.parametrize("model", ["obb", "obb_rows"])


@MODELS
@pytest.mark.parametrize("name", ["sample_1", "sample_4"])
def test_boxes_are_the_package_s_own(model, name):
    expected = np.array(PREDICTED[f"{model} {name}"])
    rows = found_in(model, name)
    assert len(rows) == len(expected) > 20
    for found in (distances(rows, expected), distances(expected, rows)):
        assert found.max(axis=2).min(axis=1).max() < 1e-4  # pixels, radians, score; rounded there


@MODELS
def test_boxes_of_an_image_that_is_enlarged_are_nearly_the_package_s_own(model):
    # Interpolated grey values differ by one, which random weights blow up. Sides differ by 0.2
    # pixels because rounding 85.3 pixels to 85 counts in their direction here.
    expected = np.array(PREDICTED[f"{model} crop"])
    rows = found_in(model, "crop", least_score=0.24)
    near = (distances(expected, rows) < [0.6, 0.6, 0.6, 0.6, 0.02, 0.01, 0.5]).all(axis=2)
    assert near.any(axis=1).all()


@MODELS
def test_another_image_has_other_boxes(model):
    one, other = found_in(model, "sample_1"), found_in(model, "sample_4")
    assert distances(one, other).max(axis=2).min(axis=1).mean() > 5  # pixels


def test_the_file_tells_classes_and_size():
    detector = OnnxDetector(FIXTURES / "obb.onnx")
    assert detector.names == ["ship", "storage-tank", "small-vehicle"]
    assert detector.image_size == (128, 128)
    assert detector.task == "obb"


# ------------------------------------------------------------------ by hand


@pytest.fixture
def stub(monkeypatch, tmp_path):
    """An onnxruntime that gives what it is told: stub(outputs, shape=..., names=...).

    Returns an OnnxDetector, whose images are 20 x 20 pixels, and the list of what it was given.
    """
    given = []

    def make(outputs=(), shape=(1, 3, 20, 20), kind="tensor(float)", device="auto", **metadata):
        class Session:
            def __init__(self, path, settings, providers):
                self.get_providers = lambda: providers

            def get_modelmeta(self):
                usual = {"task": "obb", "names": "{0: 'ship', 1: 'plane'}", "imgsz": "[20, 20]"}
                return SimpleNamespace(custom_metadata_map={**usual, **metadata})

            def get_inputs(self):
                return [SimpleNamespace(name="images", shape=shape, type=kind)]

            def run(self, names, values):
                given.append(values["images"])
                if not len(outputs):
                    raise RuntimeError("out of memory\nat some place")
                count = len(values["images"])
                return [np.repeat(np.array(outputs, np.float32)[None], count, axis=0)]

        runtime = SimpleNamespace(
            InferenceSession=Session,
            SessionOptions=SimpleNamespace,
            get_available_providers=lambda: ["CPUExecutionProvider"],
        )
        monkeypatch.setitem(sys.modules, "onnxruntime", runtime)
        (tmp_path / "yolo.onnx").write_bytes(b"x")
        return OnnxDetector(tmp_path / "yolo.onnx", device), given

    return make


def detect(detector, size=(40, 20), count=1, least_score=0.25):
    """The Found of the first of grey images of a size."""
    image = detector.letterboxed(Image.new("RGB", size))
    found = detector.detect([image] * count, least_score, 0.55)
    assert len(found) == count
    return found[0]


# An image of 40 x 20 pixels is 20 x 10 in the input, below 5 rows of border: the object at (8, 7)
# of the input, 6 x 4 pixels, is at (16, 4) of the image, 12 x 8 pixels.
BY_ANCHORS = [[8, 9], [7, 7], [6, 2], [4, 2], [0.1, 0.2], [0.9, 0.1]]  # of two anchors
LAYOUTS = {
    "obb": ("obb", [*BY_ANCHORS, [0.5, 0]], 0.5),
    "obb-rows": ("obb", [[8, 7, 6, 4, 0.9, 1, 0.5], [0] * 7], 0.5),
    "upright": ("detect", BY_ANCHORS, 0.0),
    "upright-rows": ("detect", [[5, 5, 11, 9, 0.9, 1], [0] * 6], 0.0),
}


@pytest.mark.parametrize(("task", "outputs", "angle"), LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("least_score", [0.25, 0.9])
def test_four_layouts_give_the_same_object(stub, task, outputs, angle, least_score):
    detector, _ = stub(outputs, task=task)
    found = detect(detector, least_score=np.float32(least_score))
    np.testing.assert_allclose(found.boxes, [[16, 4, 12, 8, angle]], atol=1e-6)
    np.testing.assert_allclose(found.scores, [0.9], atol=1e-6)
    assert found.kinds.tolist() == [1]


@pytest.mark.parametrize("layout", ["obb-rows", "upright-rows"])
def test_rows_of_zeros_are_no_objects(stub, layout):
    task, outputs, _ = LAYOUTS[layout]
    assert len(detect(stub(outputs, task=task)[0], least_score=0).scores) == 1


def test_boxes_by_anchors_are_suppressed_by_class(stub):
    # Squares of 10 pixels. The second shares 80 of 120 with the first and goes. The third shares 60
    # of 140 with the first and stays. The fourth lies on the first and is of another class.
    outputs = [
        [5, 7, 9, 5],
        [10] * 4,
        [10] * 4,
        [10] * 4,
        [0.9, 0.8, 0.7, 0.1],
        [0.1, 0.1, 0.1, 0.5],
        [0] * 4,
    ]
    found = detect(stub(outputs)[0], size=(20, 20))
    assert found.boxes[:, 0].tolist() == [5, 9, 5]
    assert found.kinds.tolist() == [0, 0, 1]


def test_a_side_is_scaled_in_its_own_direction(stub):
    # 30 x 10 pixels become 20 x 7, by 2/3 and 0.7, below 6 rows of border.
    outputs = [[9, 9.5, 6, 4, 0.9, 0, math.pi / 2]]
    found = detect(stub(outputs)[0], size=(30, 10))
    expected = [[9 * 1.5, 3.5 / 0.7, 6 / 0.7, 4 * 1.5, math.pi / 2]]
    np.testing.assert_allclose(found.boxes, expected, atol=1e-5)


# ------------------------------------------------------------------ images in


@pytest.mark.parametrize(("kind", "dtype"), [("tensor(float)", "f4"), ("tensor(float16)", "f2")])
def test_the_detector_is_given_red_green_blue_in_0_to_1_amid_grey(stub, kind, dtype):
    detector, given = stub(LAYOUTS["obb-rows"][1], kind=kind)
    image = Image.new("RGB", (40, 20), (255, 51, 0))
    detector.detect([detector.letterboxed(image)], 0.25, 0.5)
    [values] = given
    assert values.shape == (1, 3, 20, 20) and values.dtype == dtype
    np.testing.assert_allclose(values[0, :, 5:15].max(axis=(1, 2)), [1, 0.2, 0], atol=1e-3)
    np.testing.assert_allclose(values[0, :, 5:15].min(axis=(1, 2)), [1, 0.2, 0], atol=1e-3)
    np.testing.assert_allclose(values[0, :, :5], 114 / 255, atol=1e-3)
    np.testing.assert_allclose(values[0, :, 15:], 114 / 255, atol=1e-3)


def test_an_image_of_the_detector_s_size_is_taken_as_it_is():
    image = picture("sample_1")
    assert (letterboxed(image, image.size).pixels == np.asarray(image)).all()


def test_shrinking_takes_four_pixels_each():
    # To a quarter: of 0, 8, 16, 24 ... the middle of each four lies between 8 and 16.
    row = np.tile(np.array([0, 8, 16, 24], np.uint8), 4)
    image = Image.fromarray(np.tile(row[:, None], (1, 16))).convert("RGB")
    assert np.unique(letterboxed(image, (4, 4)).pixels).tolist() == [12]


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ((1, 3, 20, 20), [1, 1, 1]),
        ((2, 3, 20, 20), [2, 2]),
        (("batch", 3, "height", "width"), [3]),
        ((None, 3, None, None), [3]),
    ],
    ids=str,
)
def test_images_go_in_as_many_at_once_as_the_file_takes(stub, shape, sizes):
    detector, given = stub(LAYOUTS["obb-rows"][1], shape=shape)
    assert len(detect(detector, count=3).scores) == 1
    assert [len(values) for values in given] == sizes
    assert detector.image_size == (20, 20)


def test_an_image_size_may_be_no_square(stub):
    assert stub(shape=(1, 3, 96, 160))[0].image_size == (160, 96)
    assert stub(shape=("b", 3, "h", "w"), imgsz="[96, 160]")[0].image_size == (160, 96)


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "segment"}, "expected a model of the task obb or detect, found segment; export"),
        ({"names": "[ship]"}, "expected names of classes 0, 1, 2 ... in its metadata"),
        ({"names": "{0: 'ship', 2: 'plane'}"}, "expected names of classes"),
        ({"names": "{}"}, "expected names of classes"),
        ({"names": "{0: 'ship', 'b': 'plane'}"}, "expected names of classes"),
        ({"names": "{" * 9999}, "expected names of classes"),
        ({"shape": (1, 4, 20, 20)}, "expected an input of RGB images, found tensor.float. .1, 4,"),
        ({"kind": "tensor(uint8)"}, "expected an input of RGB images, found tensor.uint8"),
        ({"shape": (1, 3, "h", "w"), "imgsz": "640"}, "expected imgsz, .height, width., in its"),
        ({"device": "cuda"}, "--device cuda: this onnxruntime has no CUDA; pip install onnxrun"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_kind_of_file_is_refused(stub, settings, message):
    with pytest.raises(ValueError, match=message):
        stub(**settings)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ([[0] * 9] * 8, r"expected an output of 7 numbers .* or rows of 7, found \[8, 9\]; export"),
        ([0] * 7, r"found \[7\]"),
        ([[8, 7, 6, 4, 0.9, 2, 0]], "gives another class than its own, 0 to 1; export"),
        ([[math.nan] * 7], "gives numbers that are not finite"),
        ([], r"yolo.onnx: not run by onnxruntime \(out of memory\)"),
    ],
    ids=["anchors", "flat", "class", "nan", "failed"],
)
def test_outputs_that_cannot_be_read_are_refused(stub, outputs, message):
    with pytest.raises(ValueError, match=message):
        detect(stub(outputs)[0])


def test_what_is_no_onnx_file_is_refused(tmp_path):
    path = tmp_path / "a.onnx"
    with pytest.raises(ValueError, match=r"a.onnx: not readable \(No such file"):
        OnnxDetector(path)
    path.write_bytes(b"PK\3\4")
    with pytest.raises(ValueError, match="a.onnx: no ONNX file that can be read") as error:
        OnnxDetector(path)
    assert "\n" not in str(error.value)


def test_without_onnxruntime_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(
        ValueError, match="a detector needs onnxruntime: pip install -r requirements-onnx"
    ):
        OnnxDetector(FIXTURES / "obb.onnx")
