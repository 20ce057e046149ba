"""Search by an index of vectors: a table of millions of rows without a look at each of them.

The vectors stand in partitions of near ones, each as one bit a dimension (RaBitQ). A query looks
into the partitions nearest to it, takes `refine` times as many rows as it wants by their bits, and
of these the best by their vectors. How many partitions and rows it takes is measured once, against
exact search, for queries of this model: sentences lie far from all images, where no rule of thumb
holds.

Why this kind: product quantisation (IVF_PQ, 64 bytes a vector as here) was not built after ten
minutes for 100,000 x 512, on a busy machine where this kind took 21 seconds; with one bit a
dimension nearly all is found once twenty times as many rows are compared by their vectors.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from escaping import escaped
from gallery import table
from gallery.answers import OTHERS
from gallery.ranking import best
from writing import write_text

LEAST_ROWS = 20_000  # with fewer all rows are searched: that takes some milliseconds
PARTITION_ROWS = 4096  # about; LanceDB itself joins partitions much smaller than this
KIND = "IVF_RQ"
FILE = "approximate.json"

TOP_K = 10  # of the recall
TARGET = 0.95  # recall, of each kind of queries
REFINES = (10, 20, 50, 100)
PROBES = 16  # and REFINE: where nothing is measured; and least for `ranking.CANDIDATES` rows
REFINE = 50


class Parameters(NamedTuple):
    """How the index of vectors is searched, and what was found when that was chosen."""

    kind: str
    rows: int  # of the table, when it was measured
    partitions: int
    probes: int  # partitions that a query looks into; with a filter all
    refine: int  # rows compared by their vectors, for each row that is wanted
    recalls: dict  # {kind of queries: recall@10}; empty where it was not measured


def partitions_for(rows):
    """How many partitions an index of so many vectors gets."""
    return max(1, rows // PARTITION_ROWS)


def ensure(folder, own_table, engine):
    """The Parameters of a table's index of vectors; None where the table is too small for one.

    Makes the index and measures it where that is still to be done, as the index's only writer: see
    `table.writing`. A line tells of each. engine: a ranking.Engine, which encodes sentences.
    """
    rows = own_table.count_rows()
    if rows < LEAST_ROWS:
        print(f"{rows:,} tiles are few: all are searched, exactly")
        return None
    found = _known(folder, own_table)
    if found is None:
        with table.writing(folder):
            own_table.checkout_latest()
            if table.partitions(own_table) is None:
                print(f"index of the vectors of {rows:,} tiles: made once, may take minutes")
                table.create_vector_index(own_table, partitions_for(rows))
            found = _measured(folder, own_table, engine)
    return found


def _known(folder, own_table):
    """The Parameters as far as they need no work; None where they do."""
    number = table.partitions(own_table)
    if number is None:
        return None
    if table.is_remote(folder):
        return _by_rows(own_table, number)
    try:
        text = Path(folder, FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        found = Parameters(**json.loads(text))
    except (TypeError, ValueError):
        raise ValueError(
            f"{escaped(Path(folder, FILE))}: cannot be read; delete it, it is measured anew"
        ) from None
    # When rows have come or gone LanceDB splits and joins partitions: then all is different.
    return found if found.partitions == number else None


def _by_rows(own_table, partitions):
    """Parameters without any measuring."""
    rows = own_table.count_rows()
    return Parameters(KIND, rows, partitions, min(PROBES, partitions), REFINE, recalls={})


# ------------------------------------------------------------------ measure


def _measured(folder, own_table, engine):
    """Parameters with the recall wanted, kept in a file where the index is a local folder."""
    number = table.partitions(own_table)
    if table.is_remote(folder):
        return _by_rows(own_table, number)
    queries = {
        "sentences": torch.stack([one.vector for one in engine.sentences(list(OTHERS))]),
        "midpoints of two tiles": _midpoints(own_table, len(OTHERS)),
    }
    found = choose(own_table, queries)
    write_text(Path(folder, FILE), json.dumps(found._asdict(), indent=1) + "\n")
    shares = [f"{recall:.3f} of {name}" for name, recall in found.recalls.items()]
    print(
        f"recall@{TOP_K} against exact search: {', '.join(shares)}; {found.probes} of "
        f"{found.partitions} partitions, {found.refine} x rows compared exactly"
    )
    return found


def _midpoints(own_table, number):
    """Vectors (number, D) between two tiles each, drawn at random, the same each time.

    Fewer where the table has too few rows for so many.
    """
    rng = np.random.default_rng(0)
    number = min(number, own_table.count_rows() // 2)
    rows = rng.choice(own_table.count_rows(), size=2 * number, replace=False)
    tiles = table.vectors_at(own_table, rows.tolist())
    return F.normalize(tiles[:number] + tiles[number:], dim=1)


def choose(own_table, queries):
    """The cheapest Parameters that find enough; queries: {kind: vectors (Q, D)}.

    First `refine`, with all partitions: what is lost then is lost by the bits. Then `probes`,
    doubled until the recall is `TARGET` for each kind, or all partitions are searched.
    """
    partitions = table.partitions(own_table)
    exact = {name: exact_ids(own_table, vectors, TOP_K) for name, vectors in queries.items()}

    def recalls(probes, refine):
        return {
            name: recall(own_table, vectors, exact[name], probes, refine)
            for name, vectors in queries.items()
        }

    aim = (1 + TARGET) / 2  # of what may be lost, the bits get half, the partitions the rest
    for refine in REFINES:
        if min(recalls(partitions, refine).values()) >= aim:
            break
    probes = 1
    while True:
        found = recalls(probes, refine)
        if min(found.values()) >= TARGET or probes == partitions:
            break
        probes = min(2 * probes, partitions)
    rows = own_table.count_rows()
    return Parameters(KIND, rows, partitions, probes, refine, found)


def exact_ids(own_table, queries, top_k):
    """The ids of the best rows of each query (Q, D), as lists, by a look at all rows once."""
    scores = torch.zeros(len(queries), 0)
    ids = [[] for _ in queries]  # a list for each query
    for batch in table.read_in_batches(own_table, ["id", "vector"]):
        found, rows = best(table.vectors_of(batch["vector"]), queries, None, top_k)
        names = batch["id"].to_pylist()
        both = torch.cat([scores, found], dim=1)
        scores, places = both.topk(min(top_k, both.shape[1]), dim=1)
        for q, own in enumerate(places.tolist()):
            candidates = ids[q] + [names[row] for row in rows[q].tolist()]
            ids[q] = [candidates[place] for place in own]
    return ids


def recall(own_table, queries, exact, probes, refine):
    """Which share of the exact ids of each query the index finds."""
    found = 0
    for vector, expected in zip(queries, exact, strict=True):
        near = table.nearest(
            own_table, vector.numpy(), len(expected), None, ["id"], probes=probes, refine=refine
        )
        found += len(set(near["id"].to_pylist()) & set(expected))
    return found / sum(len(expected) for expected in exact)
