"""Rows of bench.py: object graphs, images to batches, epochs on frozen towers."""

import contextlib
import copy
import json
import math
import multiprocessing
import os
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from backbones.model_configs import read_model_config
from backbones.preprocess import pixels_of
from benchmarks.frame import compared, require_equal
from benchmarks.indexing import write_photos
from clip_gcn_image_feature_integration import full_precision
from dataset.annotations import Record
from dataset.batches import GRAPH, ImageSet, TrainingSet
from dataset.stream import ImageStream
from det_formats.det_json import read_label_map
from model import build
from options import default_options, for_training
from training.inputs import TrainingData, with_features
from training.step import freeze, make_learner, set_training_mode, train_step
from V_Graph import EDGE_DECAY, GEOMETRY, batch_from_boxes

BATCH = 64  # images

OBJECTS = 20  # of each image, and as many as a graph holds

WORKERS = 2  # processes, on both sides

SIDE = 224  # pixels of an image in a batch


def settings_of(label_map, image_size=SIDE):
    """The arguments of `batches.Images` that all rows have in common."""
    return {"image_size": image_size, "label_map": label_map, "max_objects": OBJECTS}


@contextlib.contextmanager
def cache_in(folder):
    """Let caches be written into a folder that goes with the benchmark."""
    before = os.environ.get("FGCROSS_CACHE")
    os.environ["FGCROSS_CACHE"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["FGCROSS_CACHE"]
        else:
            os.environ["FGCROSS_CACHE"] = before


# ------------------------------------------------------------------ graphs


def graphs(device, small):
    """Object graphs in batches against loops over objects and pairs.

    First of detections in memory; then of a set whose graphs are kept, against reading the files.
    The set has read and made them before, once for all epochs, which does not count.
    """
    number = 2 * BATCH if small else 16 * BATCH
    repetitions = 1 if small else 5
    label_map = read_label_map()
    size = (256, 256)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        files = _write_detections(Path(folder), number, label_map, size)
        picture = Path(folder, "black.png")
        Image.new("RGB", size).save(picture)
        settings = settings_of(label_map, image_size=32)
        images = ImageSet([picture] * number, files, **settings)
        portions = np.arange(number).reshape(-1, BATCH)

        def ours():
            for portion in portions:
                boxes = [images.boxes[i] for i in portion]
                yield batch_from_boxes(boxes, [size] * BATCH, OBJECTS, len(label_map))

        def kept():
            for portion in portions:
                yield images.graphs_of(portion)

        lists = [(class_ids.tolist(), boxes.tolist()) for class_ids, boxes in images.boxes]

        def loops():
            for portion in portions:
                found = [plain_graph(*lists[i], size, len(label_map)) for i in portion]
                yield [np.stack(parts) for parts in zip(*found, strict=True)]

        def files_and_loops():
            for portion in portions:
                read = [_read_plainly(files[i], label_map) for i in portion]
                found = [plain_graph(*own, size, len(label_map)) for own in read]
                yield [np.stack(parts) for parts in zip(*found, strict=True)]

        for made, found, plain, read in zip(
            ours(), kept(), loops(), files_and_loops(), strict=True
        ):
            for place, name in enumerate(GRAPH):
                same = np.array_equal(getattr(made, name), found[name])
                same = same and np.allclose(made[place], plain[place], rtol=0, atol=1e-6)
                same = same and np.array_equal(plain[place], read[place])
                require_equal(same, f"the {name}")
        size_of_row = f"{number} graphs of {OBJECTS} objects in batches of {BATCH}"
        return [
            compared(
                f"{size_of_row}, from detections in memory",
                {"batch_from_boxes": partial(drained, ours), "loops": partial(drained, loops)},
                repetitions,
            ),
            compared(
                f"{size_of_row}, kept by an ImageSet",
                {
                    "graphs_of": partial(drained, kept),
                    "files and loops": partial(drained, files_and_loops),
                },
                repetitions,
            ),
        ]


def drained(make):
    """How many batches a generator function makes, each let go."""
    return sum(1 for _ in make())


def _write_detections(folder, number, label_map, size):
    """Files of random detections."""
    random = np.random.default_rng(0)
    names = [line.split(",")[0] for line in label_map.lines]
    low = (0, 0, 5, 5, -math.pi / 2, 0.2)
    high = (*size, 60, 60, math.pi / 2, 1)
    files = []
    for i in range(number):
        boxes = random.uniform(low, high, (OBJECTS, 6)).tolist()
        labels = random.choice(names, OBJECTS).tolist()
        content = []
        for label, box in zip(labels, boxes, strict=True):
            content.append({"label": label, "bbox": box})
        files.append(folder / f"{i}.json")
        files[-1].write_text(json.dumps(content), encoding="utf-8")
    return files


def _read_plainly(file, label_map):
    """(class ids, boxes) of a detection file, as lists and without any check."""
    with open(file, encoding="utf-8") as opened:
        content = json.load(opened)
    class_ids = [label_map.class_id(entry["label"]) for entry in content]
    return class_ids, [entry["bbox"] for entry in content]


def plain_graph(class_ids, boxes, size, label_count):
    """`V_Graph.arrays_from_boxes` by loops over objects and pairs: nodes, adjacency and mask."""
    width, height = size
    diagonal = math.hypot(width, height)

    def certainty(i):
        cx, cy, w, h, _, score = boxes[i]
        return -score, -w * h, cx, cy

    order = sorted(range(len(boxes)), key=certainty)[:OBJECTS]
    nodes = [[0.0] * (label_count + GEOMETRY) for _ in range(OBJECTS)]
    adjacency = [[0.0] * OBJECTS for _ in range(OBJECTS)]
    mask = [False] * OBJECTS
    for place, i in enumerate(order):
        cx, cy, w, h, angle, score = boxes[i]
        elongation = (w - h) / (w + h)
        row = nodes[place]
        row[class_ids[i]] = 1.0
        row[label_count:] = [
            2 * cx / width - 1,
            2 * cy / height - 1,
            math.log10(w * h / (width * height)) / 2 + 1,
            elongation * math.cos(2 * angle),
            elongation * math.sin(2 * angle),
            abs(elongation),
            score,
        ]
        mask[place] = True
        for other in range(place):
            x, y, *_ = boxes[order[other]]
            distance = math.hypot(cx - x, cy - y) / diagonal
            weight = math.exp(-distance / EDGE_DECAY)
            adjacency[place][other] = weight
            adjacency[other][place] = weight
    return (
        np.array(nodes, dtype=np.float32),
        np.array(adjacency, dtype=np.float32),
        np.array(mask),
    )


# ------------------------------------------------------------------ images to batches


def batches(device, small):
    """JPEG files to uint8 batches (B, 3, 224, 224) against bare Pillow in two processes.

    First by a stream with two loader processes, as infer.py reads more than a few images;
    then from the cache on the disk, by one process. Starting processes counts on all sides.
    """
    number = 2 * BATCH if small else 16 * BATCH
    repetitions = 1 if small else 5
    settings = settings_of(read_label_map())
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, cache_in(Path(folder, "cache")):
        write_photos(Path(folder, "images"), number)
        paths = sorted(Path(folder, "images").iterdir())
        images = ImageSet(paths, [None] * number, ram_gib=0, **settings)
        none = [(np.zeros(0, dtype=int), np.zeros((0, 6)))] * number
        stream = ImageStream(paths, none, range(number), edges=True, published=False, **settings)

        def streamed():
            for batch in stream.batches(BATCH, WORKERS):
                yield batch.tensors["image"]

        def cached():
            for batch in images.batches(BATCH):
                yield batch["image"]

        def plain():
            portions = [paths[first : first + BATCH] for first in range(0, number, BATCH)]
            with multiprocessing.Pool(WORKERS) as pool:
                for batch in pool.imap(_decoded_plainly, portions):
                    yield torch.from_numpy(batch)

        for one, other, bare in zip(streamed(), cached(), plain(), strict=True):
            require_equal(torch.equal(one, bare) and torch.equal(other, bare), "the pixels")
        size_of_row = f"{number} JPEG of 256 pixels, batches of {BATCH}"
        pillow = f"Pillow, {WORKERS} processes"
        return [
            compared(
                f"{size_of_row}, {WORKERS} loader processes",
                {"ImageStream": partial(drained, streamed), pillow: partial(drained, plain)},
                repetitions,
            ),
            compared(
                f"{size_of_row}, from the cache by one process",
                {"ImageSet": partial(drained, cached), pillow: partial(drained, plain)},
                repetitions,
            ),
        ]


def _decoded_plainly(paths):
    """Image files as uint8 (B, 3, 224, 224)."""
    batch = []
    for path in paths:
        with Image.open(path) as image:
            resized = image.convert("RGB").resize((SIDE, SIDE), Image.BICUBIC)
        batch.append(pixels_of(resized))
    return np.stack(batch)


# ------------------------------------------------------------------ epochs on frozen towers


def graph_epoch(device, small):
    """An epoch of --train graph on kept features against the same with the towers in each step.

    An epoch is its steps, without validation. The features are computed before, once for all
    epochs, and do not count. Sentences have eight tokens at most.
    """
    name, number, batch_size = ("small", 16, 8) if small else ("ViT-B-32", 64, 32)
    repetitions = 1 if small else 3
    label_map = read_label_map()
    changes = {"train": "graph", "graph": "object", "batch_size": batch_size, "precision": "fp32"}
    options = for_training({**default_options("train"), **changes}, given={})
    torch.manual_seed(0)
    model_config = read_model_config(name)
    model = build(model_config, label_map.lines, options).to(device)
    freeze(model, options["train"])
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, cache_in(Path(folder, "cache")):
        write_photos(Path(folder, "images"), number)
        files = _write_detections(Path(folder), number, label_map, size=(256, 256))
        paths = sorted(Path(folder, "images").iterdir())
        with_towers = _training_set(paths, files, model_config, label_map)
        on_features = _training_set(paths, files, model_config, label_map)
        data = TrainingData([], on_features, [], [], {}, "")
        with_features(data, model, model_config, torch.device(device), options)

        def epoch(train_set, learner):
            found = []
            with full_precision():  # as the features were computed
                for batch in train_set.batches(1, batch_size):
                    found.append(train_step(learner, train_set, batch, options, "the benchmark"))
            return found

        set_training_mode(model, options)
        start = copy.deepcopy(model)
        learner = make_learner(model, options, steps=1000)
        expected = epoch(with_towers, make_learner(start, options, steps=1000))
        same = np.allclose(epoch(on_features, learner), expected, rtol=0, atol=1e-5)
        require_equal(same, "the losses")
        return [
            compared(
                f"{name}, fp32, {number} pairs in batches of {batch_size}",
                {
                    "on features": partial(epoch, on_features, learner),
                    "towers in each step": partial(epoch, with_towers, learner),
                },
                repetitions,
            )
        ]


def _training_set(paths, files, model_config, label_map):
    """Photos with detections and a sentence each."""
    images = ImageSet(paths, files, **settings_of(label_map, model_config["image_size"]))
    records = [Record(path.name, [f"a photo of {i} ships"]) for i, path in enumerate(paths)]
    return TrainingSet(
        images, records, model_config=model_config, augment=[], drop_graphs=0.0, seed=0
    )
