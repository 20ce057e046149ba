"""Rows of bench.py: exact and approximate search over vectors like real features."""

import importlib.util
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.frame import compared, require_equal
from gallery import approximate, ranking, table

WIDTH = 512  # D, of an embedding
TOP_K = 10

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
        bytes_of_rows = bytes_below(folder)
        begin = time.perf_counter()
        table.create_vector_index(own_table, approximate.partitions_for(number))
        built = time.perf_counter() - begin
        bytes_of_index = bytes_below(folder) - bytes_of_rows
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

    own_table = table.create(folder, index_settings(width, labels=[]))
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


def index_settings(width, labels, precision="fp32", images="images"):
    """The `table.Settings` of an index of whole images."""
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


def bytes_below(folder):
    """The size of all files in a folder."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
