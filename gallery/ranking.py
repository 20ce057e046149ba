"""Queries over an index: sentences, images and vectors to the tiles that fit best, and why.

The score of a tile is linear: the cosine with the query's vector, plus the weighted object evidence
of its sentence (see evidence.py). Sizes in the shapes below: R rows, Q queries, D of an embedding.
"""

from typing import NamedTuple

import numpy as np
import torch

from clip_gcn_image_feature_integration import encode_texts
from dataset.annotations import prepared_sentences
from dataset.statements import statements_of
from det_formats.det_json import LabelMap
from evidence import kind_names
from gallery import table
from gallery.objects import Objects, bins_of
from T_Graph import build_text_graph

WITHOUT = 0.5  # of the score that a sentence gets, taken off for one that is not wanted
CANDIDATES = 1000  # of an approximate search, which are scored exactly
BLOCK = 65536  # rows multiplied at once
QUERIES = 100  # ranked at once: each takes a number a row

COLUMNS = (
    "id", "path", "left", "top", "width", "height", "lat", "lon", "footprint", "detections",
    "labels", "boxes",
)  # fmt: skip


class Query(NamedTuple):
    """What is looked for. The parts that are given are added by their weights, which sum to 1."""

    text: str | None = None
    image: str | None = None  # the name of an image, for people
    image_vector: np.ndarray | None = None  # its embedding (D)
    vector: np.ndarray | None = None  # any embedding (D)
    weights: tuple | None = None  # of those given, in this order; default equal
    without: str | None = None  # a sentence that shall not fit

    def parts(self):
        """[("text", "image" or "vector", its weight)] of what is given."""
        names = ("text", "image_vector", "vector")
        given = [name for name in names if getattr(self, name) is not None]
        if not given:
            raise ValueError("a query needs a sentence, an image or a vector")
        weights = self.weights or (1.0,) * len(given)
        if len(weights) != len(given) or min(weights) < 0 or not sum(weights):
            raise ValueError(f"--weights: expected {len(given)} numbers of 0 or more, not all 0")
        return [(name, w / sum(weights)) for name, w in zip(given, weights, strict=True)]


class Rows:
    """Rows of an index in memory.

    arrow: an Arrow table with COLUMNS; vectors: (R, D); objects: the Objects of these tiles.
    """

    def __init__(self, arrow, vectors, objects):
        self.arrow = arrow
        self.vectors = vectors
        self.objects = objects
        self._number_of = None  # {id: row}, once it is needed

    def __len__(self):
        return len(self.arrow)

    def numbers(self, ids):
        """The rows of ids, ascending; KeyError for one that is not there."""
        if self._number_of is None:
            self._number_of = {one: i for i, one in enumerate(self.arrow["id"].to_pylist())}
        return np.array(sorted(self._number_of[one] for one in ids), dtype=np.int64)

    def only(self, numbers):
        """Some of the Rows, in this order; numbers: an array."""
        vectors = self.vectors[torch.from_numpy(numbers)]
        return Rows(self.arrow.take(numbers), vectors, self.objects.only(numbers))

    def window(self, row):
        """(left, top, width, height) of a tile in pixels."""
        return tuple(self.arrow[n][row].as_py() for n in ("left", "top", "width", "height"))


def rows_from(arrow, settings):
    """Rows from an Arrow table with the `columns_for` them."""
    kinds = table.kind_columns(settings.labels)
    counts = np.zeros((len(arrow), len(kinds)), dtype=np.int32)  # (R, K)
    for k, name in enumerate(kinds):
        counts[:, k] = arrow[name].to_numpy()
    objects = Objects(
        class_ids=_lists(arrow["labels"]),
        boxes=[one.reshape(-1, 6) for one in _lists(arrow["boxes"])],
        sizes=np.stack([arrow["width"].to_numpy(), arrow["height"].to_numpy()], axis=1),  # (R, 2)
        bins=bins_of(counts),
        has_file=arrow["detections"].to_numpy(zero_copy_only=False) != "",
    )
    vectors = table.vectors_of(arrow["vector"])
    return Rows(arrow.select(COLUMNS), vectors, objects)


def _lists(column):
    """A column of lists as a list of arrays."""
    found = []
    for chunk in column.chunks:
        values = chunk.values.to_numpy()
        offsets = chunk.offsets.to_numpy()
        found += [values[a:b] for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
    return found


def columns_for(settings):
    """The columns that `rows_from` needs."""
    return [*COLUMNS, *table.kind_columns(settings.labels), "vector"]


# ------------------------------------------------------------------ scores


def best(vectors, queries, added, top_k):
    """The best rows of each query: (scores (Q, k), rows (Q, k)), best first.

    vectors: (R, D); queries: (Q, D); added: (Q, R) to be added to the products, or None. Equal
    scores stand in the order of the rows, where the cut allows.
    """
    k = min(top_k, len(vectors))
    all_scores, all_rows = [], []
    for start in range(0, len(vectors), BLOCK):
        block = vectors[start : start + BLOCK]
        scores = queries @ block.T  # (Q, block)
        if added is not None:
            scores += added[:, start : start + BLOCK]
        found = scores.topk(min(k, len(block)), dim=1)
        all_scores.append(found.values)
        all_rows.append(found.indices + start)
    if not all_scores:
        return torch.zeros(len(queries), 0), torch.zeros(len(queries), 0, dtype=torch.long)
    scores, rows = torch.cat(all_scores, dim=1), torch.cat(all_rows, dim=1)
    order = rows.argsort(dim=1)  # then by score, stable: equal ones stay in the order of rows
    scores, rows = scores.gather(1, order), rows.gather(1, order)
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
    return scores.gather(1, order), rows.gather(1, order)


class Sentence(NamedTuple):
    """A sentence as the model and the evidence take it."""

    text: str
    vector: torch.Tensor  # (D), of unit length
    statements: object  # its Statements
    unknown: tuple  # words for things that no label knows


class Engine:
    """A model that queries: sentences to vectors and to statements.

    model, checkpoint: as of `load_model`; evidence: an evidence.Evidence or None.
    """

    def __init__(self, model, checkpoint, evidence, device):
        self.model = model
        self.checkpoint = checkpoint
        self.evidence = evidence
        self.device = device
        self.label_map = LabelMap(checkpoint["labels"])
        self.kinds = kind_names(self.label_map)
        self._known = {}

    def sentences(self, texts):
        """The Sentence of each text; ValueError where cleaning leaves no word."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            captions = prepared_sentences(new, self.checkpoint["options"]["caption_form"])
            vectors = encode_texts(self.model, captions, self.device)
            for text, vector in zip(new, vectors, strict=True):
                graph = build_text_graph(text, self.label_map)
                statements = statements_of(graph)
                self._known[text] = Sentence(text, vector, statements, graph.graph["unknown"])
        return [self._known[text] for text in texts]

    def vector(self, query):
        """The vector (D) whose product with a tile's is the query's score, but for evidence."""
        total = 0
        for name, weight in query.parts():
            if name == "text":
                part = self.sentences([query.text])[0].vector
            else:
                part = torch.from_numpy(np.asarray(getattr(query, name), dtype=np.float32))
                part = part / part.norm()
            total = total + weight * part
        if query.without is not None:
            total = total - WITHOUT * self.sentences([query.without])[0].vector
        return total

    def evidence_terms(self, query):
        """[(Sentence, weight)] whose evidence counts for a query."""
        if self.evidence is None:
            return []
        terms = []
        for name, weight in query.parts():
            if name == "text":
                terms.append((self.sentences([query.text])[0], weight * self.evidence.weight))
        if query.without is not None:
            sentence = self.sentences([query.without])[0]
            terms.append((sentence, -WITHOUT * self.evidence.weight))
        return terms

    def evidence_of(self, query, objects):
        """The weighted evidence (R) of Objects for a query; None where there is none."""
        terms = self.evidence_terms(query)
        if not terms:
            return None
        total = np.zeros(len(objects.bins), dtype=np.float32)
        for sentence, weight in terms:
            total += weight * objects.evidence(self.evidence.tables, sentence.statements)
        return total


def rank(engine, rows, queries, top_k):
    """The best rows of each Query among Rows: (scores (Q, k), rows (Q, k)), best first."""
    given = [text for query in queries for text in (query.text, query.without)]
    engine.sentences([text for text in given if text is not None])  # all in few batches
    parts = [
        _rank_some(engine, rows, queries[start : start + QUERIES], top_k)
        for start in range(0, len(queries), QUERIES)
    ]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def _rank_some(engine, rows, queries, top_k):
    vectors = torch.stack([engine.vector(query) for query in queries])  # (Q, D)
    found = [engine.evidence_of(query, rows.objects) for query in queries]
    added = None
    if any(one is not None for one in found):
        zeros = np.zeros(len(rows), dtype=np.float32)
        added = torch.from_numpy(np.stack([zeros if one is None else one for one in found]))
    return best(rows.vectors, vectors, added, top_k)
