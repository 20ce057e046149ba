"""Row of bench.py: indexing a folder end to end."""

import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import model
from backbones.model_configs import read_model_config
from backbones.preprocess import pixels_of, resize_and_crop
from benchmarks.frame import compared, require_equal
from benchmarks.search import bytes_below, index_settings
from clip_gcn_image_feature_integration import (
    encode_batch,
    full_precision,
    image_settings,
    plain_options,
)
from dataset.batches import Images
from det_formats.det_json import LABELS, read_label_map
from gallery import table
from gallery.indexing import PRECISIONS, pick_precision, plan, update


def index(device, small):
    """Indexing a folder of JPEG files end to end against the encoder alone on decoded images.

    A ratio of 1 means that reading files and writing the table cost nothing. fp32 where the
    machine does not compute in bf16 itself.
    """
    sizes = {"small": 24} if small else {"ViT-B-32": 512, "small": 4096}
    repetitions = 1 if small else 3
    results = []
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        images = Path(folder, "images")
        write_photos(images, max(sizes.values()))
        for name, number in sizes.items():
            results.append(_index_model(name, number, images, folder, device, repetitions))
    return results


def _index_model(name, number, images, folder, device, repetitions, batch_size=64):
    """The Result of one model over the first images of a folder."""
    network, checkpoint = random_model(read_model_config(name), device)
    precision = pick_precision(None, device)
    width = network.text_projection.shape[1]
    settings = index_settings(width, checkpoint["labels"], precision, images)
    todo = plan(images, None, {})
    todo = todo._replace(todo=todo.todo[:number])
    batches = _decoded(todo, checkpoint, batch_size)
    folders = iter(range(1000))

    def end_to_end():
        own_table = table.create(Path(folder, f"{name}-{next(folders)}"), settings)
        threads = os.cpu_count() or 1
        done = update(own_table, settings, todo, network, checkpoint, device, batch_size, threads)
        require_equal(done.files == number and not done.problems, "the files that were read")
        return own_table

    @torch.no_grad()
    def encoder_alone():
        network.eval()
        with full_precision():
            parts = [
                encode_batch(network, batch, device, PRECISIONS[precision])["fused"]
                for batch in batches
            ]
        return torch.cat(parts)

    own_table = end_to_end()
    found = table.read(own_table, ["id", "vector"])
    same_order = found["id"].to_pylist() == [file.name for file in todo.todo]
    vectors = table.vectors_of(found["vector"])
    same = same_order and torch.allclose(vectors, encoder_alone(), atol=1e-5)
    require_equal(same, "the vectors")
    place = Path(own_table.uri)
    result = compared(
        f"{name}, {number} JPEG of 256 pixels, {precision}",
        {"end to end": end_to_end, "the encoder alone": encoder_alone},
        repetitions,
        warm_up=False,
    )
    seconds = result.seconds["end to end"]
    notes = {
        "tiles a second": number / seconds,
        "seconds a tile": seconds / number,
        "bytes a row": bytes_below(place) / number,
    }
    return result._replace(notes=notes)


def random_model(model_config, device):
    """(model, checkpoint) of a model config with random weights and without graph."""
    torch.manual_seed(0)
    checkpoint = plain_checkpoint(model_config)
    network = model.build(model_config, checkpoint["labels"], checkpoint["options"])
    return network.to(device).eval(), checkpoint


def plain_checkpoint(model_config):
    """What a checkpoint holds of a model without graph, weights aside."""
    labels = list(read_label_map(LABELS).lines)
    return {"definition": model_config, "labels": labels, "options": plain_options()}


def _decoded(todo, checkpoint, batch_size):
    """The batches of the images of a Plan, as `encode_batch` takes them."""
    graphs = Images([], [], [], **image_settings(checkpoint))
    size = checkpoint["definition"]["image_size"]
    batches = []
    for start in range(0, len(todo.todo), batch_size):
        files = todo.todo[start : start + batch_size]
        pixels, sizes = [], []
        for file in files:
            with Image.open(file.path) as image:
                pixels.append(pixels_of(resize_and_crop(image, size)))
                sizes.append(image.size)
        none = (np.zeros(0, dtype=int), np.zeros((0, 6)))
        batch = graphs.graphs([none] * len(files), sizes)
        batch["image"] = torch.from_numpy(np.stack(pixels))
        batches.append(batch)
    return batches


def write_photos(folder, number):
    """JPEG files of 256 pixels a side, smooth with some noise, about 15 KB each."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(number):
        coarse = random.integers(0, 256, (24, 24, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((256, 256), Image.BICUBIC), dtype=int)
        noise = random.integers(-8, 9, smooth.shape)
        pixels = (smooth + noise).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:05d}.jpg", quality=90)
