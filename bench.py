"""Measure how fast this project is, beside what one would use without it.

    python bench.py                                   # every row of the table
    python bench.py --row search-exact index          # some of them
    python bench.py --json bench.json --device cuda

The sides of a row run in one process, one after another, again and again: what else the machine
does meets all of them. Before that each row asserts that its sides compute the same. A ratio says
how many times faster ours is; its median, least and largest value over the repetitions are given,
and the medians of the seconds.
"""

from options import answer_early

if __name__ == "__main__":
    answer_early("bench", __doc__)  # before torch is imported, which takes seconds

import importlib.util
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import model
from backbones.model_configs import read_model_config
from backbones.preprocess import pixels_of, resize_and_crop
from clip_gcn_image_feature_integration import (
    encode_batch,
    full_precision,
    image_settings,
    pick_device,
    plain_options,
)
from dataset.batches import Images
from det_formats.det_json import LABELS, read_label_map
from escaping import escaped
from gallery import approximate, ranking, table
from gallery.indexing import PRECISIONS, pick_precision, plan, update
from options import parse_options, run
from writing import write_text

WIDTH = 512  # D, of an embedding
TOP_K = 10


class Result(NamedTuple):
    """What one comparison found."""

    name: str  # what was measured, at which size
    seconds: dict  # {side: median of its repetitions}; the first side is ours
    ratios: dict  # {other side: (median, least, largest) of its seconds / ours}
    notes: dict  # further figures, by what they are


def compared(name, sides, repetitions, notes=None):
    """The Result of sides, {name: function}, that take turns after one round of warm-up.

    The first side is ours.
    """
    seconds = {side: [] for side in sides}
    for repetition in range(repetitions + 1):
        for side, function in sides.items():
            begin = time.perf_counter()
            function()
            if repetition > 0:
                seconds[side].append(time.perf_counter() - begin)
    ours, *others = (np.array(seconds[side]) for side in sides)
    ratios = {}
    for side, other in zip(list(sides)[1:], others, strict=True):
        ratio = other / ours
        ratios[side] = (float(np.median(ratio)), float(ratio.min()), float(ratio.max()))
    medians = {side: float(np.median(values)) for side, values in seconds.items()}
    return Result(name, medians, ratios, notes or {})


def require_equal(condition, what):
    """End a row whose sides do not compute the same: their times mean nothing then."""
    if not condition:
        raise RuntimeError(f"bench: {what} are not the same on all sides")


# ------------------------------------------------------------------ vectors like real features


class World:
    """Draws features as of one model: clusters of images, and sentences elsewhere.

    An image's vector is the sum of the direction that all images share, its cluster's and its own,
    with shares of 0.40, 0.35 and 0.25 of the squared length: the mean cosine of two images is 0.4,
    within a cluster 0.75. A sentence's shares are 0.5 of the direction that all sentences share,
    0.2 of a cluster's and 0.3 of its own: its cosine with the best of many images is about 0.35,
    with most of them about 0. Clusters and what is a vector's own fill the dimensions unequally,
    by 1 / (1 + i / 16), and are turned at random.
    """

    def __init__(self, clusters, width, seed=0):
        self.random = torch.Generator().manual_seed(seed)
        scale = (1 + torch.arange(width) / 16) ** -0.5
        turn = torch.linalg.qr(self._normal(width, width))[0]
        self.spread = (scale / scale.norm())[:, None] * turn  # (D, D)
        self.of_images = F.normalize(self._normal(width), dim=0)
        self.of_sentences = F.normalize(self._normal(width), dim=0)
        self.centres = self._normal(clusters, width) @ self.spread

    def _normal(self, *shape):
        return torch.randn(shape, generator=self.random)

    def _drawn(self, number, common, shares):
        """Vectors (number, D) of unit length; shares: of what is common, a cluster's and own."""
        clusters = torch.randint(len(self.centres), (number,), generator=self.random)
        own = self._normal(number, len(common)) @ self.spread
        first, second, third = (share**0.5 for share in shares)
        return F.normalize(first * common + second * self.centres[clusters] + third * own, dim=1)

    def images(self, number):
        """Vectors (number, D) of images."""
        return self._drawn(number, self.of_images, (0.40, 0.35, 0.25))

    def sentences(self, number):
        """Vectors (number, D) of sentences."""
        return self._drawn(number, self.of_sentences, (0.5, 0.2, 0.3))

    def midpoints(self, images, number):
        """Vectors (number, D) between two of the images (R, D) each."""
        pairs = torch.randint(len(images), (2, number), generator=self.random)
        return F.normalize(images[pairs[0]] + images[pairs[1]], dim=1)


# ------------------------------------------------------------------ search


def best_by_torch(vectors, queries):
    """(scores, rows) of the best of each query by one product and one selection."""
    return (queries @ vectors.T).topk(TOP_K, dim=1)


def with_faiss(vectors):
    """{name: function of queries} of faiss's exact search; none where it is not installed.

    It has two ways: of its own, and by BLAS, which it takes from so many queries on as its
    threshold says. The default of the threshold has changed between versions, so here are both.
    """
    if importlib.util.find_spec("faiss") is None:
        print("faiss is not installed: pip install faiss-cpu", file=sys.stderr)
        return {}
    import faiss

    flat = faiss.IndexFlatIP(vectors.shape[1])
    flat.add(vectors.numpy())

    def search(queries, threshold):
        faiss.cvar.distance_compute_blas_threshold = threshold
        scores, rows = flat.search(queries.numpy(), TOP_K)
        return torch.from_numpy(scores), torch.from_numpy(rows)

    return {
        "faiss IndexFlatIP": lambda queries: search(queries, 2**30),
        "faiss IndexFlatIP by BLAS": lambda queries: search(queries, 1),
    }


def require_same_best(ours, other, what):
    """Assert that two (scores, rows) name the same best rows, up to rows whose scores are equal."""
    close = torch.allclose(ours[0], other[0], atol=1e-5)
    same = float((ours[1] == other[1]).float().mean())
    require_equal(close and same > 0.99, what)


def exact_sides(vectors):
    """{name: function of queries} of the ways to search exactly, ours first."""
    return {
        "exact search": lambda queries: ranking.best(vectors, queries, None, TOP_K),
        **with_faiss(vectors),
        "torch product and topk": lambda queries: best_by_torch(vectors, queries),
    }


def search_exact(device, small):
    """Exact search, as of a query without objects, over vectors in memory; on the CPU."""
    number, width, repetitions = (2_000, 64, 2) if small else (200_000, WIDTH, 20)
    world = World(clusters=number // 500, width=width)
    vectors = world.images(number)
    functions = exact_sides(vectors)
    results = []
    for batch in (1, 100):
        queries = world.sentences(batch)
        expected = best_by_torch(vectors, queries)
        for name, function in functions.items():
            require_same_best(function(queries), expected, f"the best rows by {name}")
        sides = {
            name: lambda function=function, queries=queries: function(queries)
            for name, function in functions.items()
        }
        results.append(compared(f"{number:,} x {width}, batch {batch}", sides, repetitions))
    return results


def search_ann(device, small):
    """Search by the index of vectors (--ann) against exact search, one query at a time."""
    number, width, repetitions = (9_000, 32, 2) if small else (1_000_000, WIDTH, 20)
    world = World(clusters=number // 500, width=width)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        begin = time.perf_counter()
        own_table, vectors = _written_table(folder, world, number, width)
        written = time.perf_counter() - begin
        bytes_of_rows = _bytes_below(folder)
        begin = time.perf_counter()
        table.create_vector_index(own_table, approximate.partitions_for(number))
        built = time.perf_counter() - begin
        bytes_of_index = _bytes_below(folder) - bytes_of_rows
        begin = time.perf_counter()
        held_out = {
            "sentences": world.sentences(35),
            "midpoints": world.midpoints(vectors, 35),
        }
        parameters = approximate.choose(own_table, held_out)
        chosen = time.perf_counter() - begin
        recalls = {}
        for kind, queries in (
            ("sentences", world.sentences(100)),
            ("midpoints", world.midpoints(vectors, 100)),
        ):
            exact = best_by_torch(vectors, queries)[1].tolist()
            names = [[str(row) for row in rows] for rows in exact]
            probes, refine = parameters.probes, parameters.refine
            recalls[kind] = approximate.recall(own_table, queries, names, probes, refine)
            require_equal(recalls[kind] >= 0.9, f"nine in ten of the best rows for {kind}")
        notes = {
            "recall@10, other queries": recalls,
            "partitions": parameters.partitions,
            "probes": parameters.probes,
            "refine": parameters.refine,
            "seconds to write the table": written,
            "seconds to build the index": built,
            "seconds to choose probes and refine": chosen,
            "bytes a row, table": bytes_of_rows / number,
            "bytes a row, index": bytes_of_index / number,
        }
        name = f"{number:,} x {width}, batch 1"
        sides = _ann_sides(own_table, vectors, world, parameters)
        return [compared(name, sides, repetitions, notes)]


def _ann_sides(own_table, vectors, world, parameters):
    """The sides of search_ann: each call is another sentence, the same for all sides."""
    queries = world.sentences(100)

    def near(query):
        return table.nearest(
            own_table,
            query[0].numpy(),
            TOP_K,
            None,
            ["id"],
            probes=parameters.probes,
            refine=parameters.refine,
        )

    def in_turn(function):
        rounds = iter(range(len(queries)))

        def one():
            place = next(rounds)
            return function(queries[place : place + 1])

        return one

    functions = {"by the index of vectors": near, **exact_sides(vectors)}
    return {name: in_turn(function) for name, function in functions.items()}


def _written_table(folder, world, number, width):
    """A table of an index with vectors of images, and the vectors (R, D); the row is the id."""
    import pyarrow as pa

    own_table = table.create(folder, _settings(width, labels=[]))
    vectors = torch.empty(number, width)
    for start in range(0, number, 50_000):
        rows = range(start, min(start + 50_000, number))
        part = world.images(len(rows))
        vectors[start : rows.stop] = part
        columns = []
        for field in own_table.schema:
            if field.name == "id":
                columns.append(pa.array([str(row) for row in rows]))
            elif field.name == "vector":
                values = pa.array(part.numpy().ravel())
                columns.append(pa.FixedSizeListArray.from_arrays(values, width))
            else:
                columns.append(pa.nulls(len(rows), field.type))
        table.put(own_table, pa.Table.from_arrays(columns, schema=own_table.schema), [])
    return own_table, vectors


def _settings(width, labels, precision="fp32", images="images"):
    return table.Settings(
        images=str(images),
        checkpoint="random",
        digest="0",
        labels=labels,
        width=width,
        precision=precision,
        tile=None,
        overlap=None,
        bands=None,
        stretch=None,
    )


def _bytes_below(folder):
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


# ------------------------------------------------------------------ index


def index(device, small):
    """Indexing a folder of JPEG files end to end against the encoder alone on decoded images.

    A ratio of 1 means that reading files and writing the table cost nothing. fp32 where the
    machine does not compute in bf16 itself.
    """
    sizes = {"small": 24} if small else {"ViT-B-32": 1024, "small": 4096}
    repetitions = 1 if small else 3
    results = []
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        images = Path(folder, "images")
        _write_photos(images, max(sizes.values()))
        for name, number in sizes.items():
            results.append(_index_model(name, number, images, folder, device, repetitions))
    return results


def _index_model(name, number, images, folder, device, repetitions, batch_size=64):
    """The Result of one model over the first images of a folder."""
    network, checkpoint = _random_model(name, device)
    precision = pick_precision(None, device)
    width = network.text_projection.shape[1]
    settings = _settings(width, checkpoint["labels"], precision, images)
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
    )
    seconds = result.seconds["end to end"]
    notes = {
        "tiles a second": number / seconds,
        "seconds a tile": seconds / number,
        "bytes a row": _bytes_below(place) / number,
    }
    return result._replace(notes=notes)


def _random_model(name, device):
    """(model, checkpoint) of a model config with random weights and without graph."""
    torch.manual_seed(0)
    model_config = read_model_config(name)
    labels = list(read_label_map(LABELS).lines)
    checkpoint = {"definition": model_config, "labels": labels, "options": plain_options()}
    network = model.build(model_config, labels, checkpoint["options"]).to(device).eval()
    return network, checkpoint


def _decoded(todo, checkpoint, batch_size):
    """The batches of the images of a Plan, as `encode_batch` takes them."""
    graphs = Images([], [], [], **image_settings(checkpoint))
    size = checkpoint["definition"]["image_size"]
    batches = []
    for start in range(0, len(todo.todo), batch_size):
        files = todo.todo[start : start + batch_size]
        pixels, arrays = [], []
        for file in files:
            with Image.open(file.path) as image:
                pixels.append(pixels_of(resize_and_crop(image, size)))
                none = np.zeros((0, 6))
                arrays.append(graphs.graph(np.zeros(0, dtype=int), none, image.size))
        batch = {"image": torch.from_numpy(np.stack(pixels))}
        for name in ("nodes", "adjacency", "mask"):
            batch[name] = torch.from_numpy(np.stack([getattr(one, name) for one in arrays]))
        batches.append(batch)
    return batches


def _write_photos(folder, number):
    """JPEG files of 256 pixels a side, smooth with some noise, about 15 KB each."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(number):
        coarse = random.integers(0, 256, (24, 24, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((256, 256), Image.BICUBIC), dtype=int)
        noise = random.integers(-8, 9, smooth.shape)
        pixels = (smooth + noise).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:05d}.jpg", quality=90)


# ------------------------------------------------------------------ the command

ROWS = {
    "search-exact": search_exact,
    "search-ann": search_ann,
    "index": index,
}


def lines_of(row, result):
    """A Result as lines for people."""
    ours = next(iter(result.seconds))
    lines = [f"{row}: {result.name}"]
    for side, seconds in result.seconds.items():
        line = f"  {side:28} {1000 * seconds:10.2f} ms"
        if side != ours:
            line += "   ours is {:.2f} x as fast ({:.2f} to {:.2f})".format(*result.ratios[side])
        lines.append(line)
    for what, value in result.notes.items():
        shown = value if isinstance(value, dict) else {"": value}
        parts = [f"{name} {number:.4g}".strip() for name, number in shown.items()]
        lines.append(f"  {what}: {', '.join(parts)}")
    return lines


def machine(device):
    """What the figures were measured on."""
    processor = platform.processor() or platform.machine()
    if torch.device(device).type == "cuda":
        processor = torch.cuda.get_device_name(device)
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def main(arguments=None):
    options = parse_options("bench", __doc__, arguments)
    unknown = sorted(set(options.row or ()) - set(ROWS))
    if unknown:
        raise ValueError(f"--row {escaped(' '.join(unknown))}: expected some of {', '.join(ROWS)}")
    device = pick_device(options.device)
    content = {"command": "bench.py", "machine": machine(device), "options": vars(options)}
    content["rows"] = {}
    for name in options.row or ROWS:
        results = ROWS[name](device, options.small)
        for result in results:
            print("\n".join(lines_of(name, result)), flush=True)
        content["rows"][name] = [result._asdict() for result in results]
    if options.json:
        write_text(options.json, json.dumps(content, indent=1) + "\n")
    return content


if __name__ == "__main__":
    run(main)
