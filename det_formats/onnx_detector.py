"""A detector that was exported to ONNX by the package ultralytics, as YOLOv8, 11 and 26 are.

The file tells what it takes and gives: its metadata have the task (obb: boxes at any angle, or
detect: upright ones), the names of the classes and the size of its images. Nothing of that package
is needed. What its outputs hold, of b images, in pixels of the images as they were put in:

    (b, 4 + classes, anchors)       detect: cx, cy, w, h, a score for each class
    (b, 4 + classes + 1, anchors)   obb: the same, and the angle
    (b, n, 6)                       detect, suppressed already: two corners, score, class
    (b, n, 7)                       obb, suppressed already: cx, cy, w, h, score, class, angle

Scores are in 0 to 1. Angles are ours: radians from the +x axis towards +y, of the side w. There are
at most as many rows as the file was exported for, 300 by default: crowded windows have to be small.

Outputs by anchors are suppressed here, by the IoU. The package itself compares turned boxes by
another measure, of Gaussian distributions; near the threshold the two may keep other boxes.
"""

import ast
from typing import NamedTuple

import numpy as np
from PIL import Image

from det_formats.geometry import suppress
from escaping import escaped

GREY = 114  # of the border around an image, on which these detectors were trained
TASKS = {"obb": 1, "detect": 0}  # and how many numbers follow the scores of the classes
INPUT_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class Letterboxed(NamedTuple):
    """An image as the detector takes it, and the way back."""

    pixels: np.ndarray  # (height, width, 3), 8 bits
    gain: np.ndarray  # (2): how many of its pixels are one of the image, in x and in y
    offset: np.ndarray  # (2): where the image's top left lies in it


class Found(NamedTuple):
    """What was found in an image, n objects."""

    boxes: np.ndarray  # (n, 5): cx, cy, w, h, angle in pixels of the image and radians
    scores: np.ndarray  # (n)
    kinds: np.ndarray  # (n): numbers of classes


class OnnxDetector:
    """names: of the classes, by number; image_size: (width, height) in pixels."""

    def __init__(self, path, device="auto"):
        """Load the file; device: auto, cpu or cuda.

        Raises ValueError where onnxruntime is not installed or has no CUDA, and for a file that it
        cannot read or that holds another kind of model.
        """
        self.path = path
        self._session = _session(path, device)
        metadata = self._session.get_modelmeta().custom_metadata_map
        self.task = metadata.get("task")
        if self.task not in TASKS:
            raise self._wrong(f"expected a model of the task obb or detect, found {self.task}")
        self.names = self._names(metadata)
        taken, *others = self._session.get_inputs()
        if others or taken.type not in INPUT_TYPES or list(taken.shape[1:2]) != [3]:
            raise self._wrong(f"expected an input of RGB images, found {taken.type} {taken.shape}")
        self._type = INPUT_TYPES[taken.type]
        self._input = taken.name
        # Of a dimension that may differ from call to call, the shape has a name or None.
        self._batch = taken.shape[0] if isinstance(taken.shape[0], int) else None
        if all(isinstance(side, int) for side in taken.shape[2:]):
            height, width = taken.shape[2:]
        else:
            height, width = self._image_size(metadata)
        self.image_size = (width, height)

    def _wrong(self, what):
        return ValueError(f"{escaped(self.path)}: {what}; export it by ultralytics, format=onnx")

    def _names(self, metadata):
        names = _literal(metadata.get("names"))
        if not isinstance(names, dict) or not names or list(names) != list(range(len(names))):
            raise self._wrong("expected names of classes 0, 1, 2 ... in its metadata")
        return [str(name) for name in names.values()]

    def _image_size(self, metadata):
        """(height, width) of a model that takes images of any size: those it was exported for."""
        size = _literal(metadata.get("imgsz"))
        if isinstance(size, list) and len(size) == 2 and all(isinstance(n, int) for n in size):
            return size
        raise self._wrong("expected imgsz, [height, width], in its metadata")

    def letterboxed(self, image):
        """A PIL RGB image as the detector takes it: scaled to fit, in the middle of grey."""
        return letterboxed(image, self.image_size)

    def detect(self, images, least_score, most_overlap):
        """Find objects in Letterboxed images; returns a Found of each.

        Objects with a score of least_score or more count. Of an output that is not suppressed
        already, each anchor has its best class, and a box goes that has an IoU above most_overlap
        with a better one of its class. Raises ValueError for outputs that are not as expected.
        """
        found = []
        step = self._batch or max(1, len(images))
        for begin in range(0, len(images), step):
            some = images[begin : begin + step]
            for image, rows in zip(some, self._outputs(some), strict=False):
                one = self._decoded(rows, least_score, most_overlap)
                found.append(one._replace(boxes=_in_image(one.boxes, image)))
        return found

    def _outputs(self, images):
        """The detector's output for Letterboxed images; more than those if it takes more."""
        missing = (self._batch or len(images)) - len(images)
        pixels = np.stack([one.pixels for one in [*images, *[images[-1]] * missing]])
        values = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).astype(self._type) / 255
        try:
            outputs = self._session.run(None, {self._input: values.astype(self._type)})[0]
        except Exception as error:  # onnxruntime has classes of its own, without a common one
            reason = str(error).split("\n")[0]
            raise ValueError(f"{escaped(self.path)}: not run by onnxruntime ({reason})") from None
        if not np.isfinite(outputs).all():
            raise ValueError(f"{escaped(self.path)}: gives numbers that are not finite")
        return outputs.astype(float)

    def _decoded(self, rows, least_score, most_overlap):
        """The Found of an image's output, in pixels of the image as it was put in."""
        extra = TASKS[self.task]
        count = len(self.names)
        if rows.ndim == 2 and rows.shape[1] == 6 + extra:
            found = _of_rows(rows, least_score)
            if not ((found.kinds >= 0) & (found.kinds < count)).all():
                raise self._wrong(f"gives another class than its own, 0 to {count - 1}")
            if self.task == "detect":
                found = found._replace(boxes=_upright(found.boxes))
            return found
        if rows.ndim == 2 and rows.shape[0] == 4 + count + extra:
            return _of_anchors(rows, count, least_score, most_overlap)
        raise self._wrong(
            f"expected an output of {4 + count + extra} numbers for each anchor or rows of "
            f"{6 + extra}, found {list(rows.shape)}"
        )


# ------------------------------------------------------------------ the file


def _session(path, device):
    """The onnxruntime session of a file."""
    try:
        import onnxruntime
    except ImportError as error:
        raise ValueError(
            f"a detector needs onnxruntime: pip install -r requirements-onnx.txt ({error})"
        ) from None
    available = onnxruntime.get_available_providers()
    if device == "cuda" and "CUDAExecutionProvider" not in available:
        raise ValueError(
            "--device cuda: this onnxruntime has no CUDA; pip install onnxruntime-gpu in its place"
        )
    wanted = ["CPUExecutionProvider"]
    if device != "cpu" and "CUDAExecutionProvider" in available:
        wanted.insert(0, "CUDAExecutionProvider")
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3  # errors alone: it warns of devices that are not there
    try:
        with open(path, "rb") as file:
            file.read(1)  # an OSError says better what is wrong with a path
        session = onnxruntime.InferenceSession(str(path), settings, providers=wanted)
    except OSError as error:
        raise ValueError(f"{escaped(path)}: not readable ({error.strerror})") from None
    except Exception as error:  # onnxruntime has classes of its own, without a common one
        reason = str(error).split("\n")[0]
        raise ValueError(f"{escaped(path)}: no ONNX file that can be read ({reason})") from None
    if device == "cuda" and session.get_providers()[0] != wanted[0]:
        raise ValueError("--device cuda: onnxruntime cannot start CUDA; see its requirements")
    return session


def _literal(text):
    """The value of a Python literal in the metadata; None for what is none."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError):
        return None


# ------------------------------------------------------------------ images in


def letterboxed(image, size):
    """A PIL RGB image of any size as a Letterboxed one of (width, height) pixels.

    It is interpolated from four pixels each, in shrinking too, as in the training of these
    detectors; Pillow's own `resize` would blur.
    """
    gain = min(size[0] / image.width, size[1] / image.height)
    inner = (max(1, round(image.width * gain)), max(1, round(image.height * gain)))
    gains = np.array([inner[0] / image.width, inner[1] / image.height])
    if inner != image.size:
        back = (1 / gains[0], 0, 0, 0, 1 / gains[1], 0)
        image = image.transform(
            inner, Image.Transform.AFFINE, back, resample=Image.Resampling.BILINEAR
        )
    left = (size[0] - inner[0]) // 2
    top = (size[1] - inner[1]) // 2
    pixels = np.full((size[1], size[0], 3), GREY, dtype=np.uint8)
    pixels[top : top + inner[1], left : left + inner[0]] = np.asarray(image)
    return Letterboxed(pixels, gains, np.array([left, top]))


def _in_image(boxes, image):
    """Boxes (n, 5) in the pixels of a Letterboxed image, in those of the image itself."""
    cos, sin = np.cos(boxes[:, 4]), np.sin(boxes[:, 4])
    across, down = 1 / image.gain
    result = boxes.copy()
    result[:, :2] = (boxes[:, :2] - image.offset) / image.gain
    # The gains differ by what rounding to whole pixels did, so a side counts in its direction.
    result[:, 2] *= np.hypot(cos * across, sin * down)
    result[:, 3] *= np.hypot(sin * across, cos * down)
    return result


# ------------------------------------------------------------------ outputs


def _of_rows(rows, least_score):
    """The Found of rows (n, 6 or 7): four numbers of a box, score, class, and the angle if any."""
    rows = rows[(rows[:, 4] >= least_score) & (rows[:, 4] > 0)]  # rows of zeros fill up
    angles = rows[:, 6:] if rows.shape[1] == 7 else np.zeros((len(rows), 1))
    boxes = np.concatenate([rows[:, :4], angles], axis=1)
    return Found(boxes, rows[:, 4], rows[:, 5].astype(int))


def _upright(boxes):
    """Boxes (n, 5) of two corners each, left, top, right, bottom, and an angle of 0."""
    left_top, right_bottom = boxes[:, :2], boxes[:, 2:4]
    centres = (left_top + right_bottom) / 2
    return np.concatenate([centres, right_bottom - left_top, boxes[:, 4:]], axis=1)


def _of_anchors(rows, count, least_score, most_overlap):
    """The Found of an output (4 + count [+ 1], anchors): box, scores of classes, angle if any."""
    scores = rows[4 : 4 + count].max(axis=0)
    likely = np.flatnonzero(scores >= least_score)
    kinds = rows[4 : 4 + count, likely].argmax(axis=0)
    angles = rows[4 + count :, likely] if len(rows) > 4 + count else np.zeros((1, len(likely)))
    boxes = np.concatenate([rows[:4, likely], angles]).T  # (n, 5)
    scores = scores[likely]
    kept = suppress(boxes, scores, kinds, most_overlap)
    return Found(boxes[kept], scores[kept], kinds[kept])
