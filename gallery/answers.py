"""What a query found, in plain dicts, lists and numbers: for JSON, tables, pages and maps.

An answer says where in a tile to look and why: the share of the score that comes from pixels and
from objects, what the score would lose without each object, and what speaks for the sentence.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from backbones import preprocess
from clip_gcn_image_feature_integration import image_settings
from dataset.batches import Images
from det_formats.measures import find
from gallery.objects import Objects, bins_of
from gallery.ranking import Query, rank
from metrics.likelihood import reasons

# Other queries, of many kinds. A query whose best score is below that of nearly all of these fits
# nothing, perhaps: a hint, since what an index holds decides how good their best scores are.
OTHERS = (
    "an airplane on a runway", "several boats in a harbor", "a dense residential area",
    "rows of houses along a street", "a green forest", "a wide river", "a bridge over water",
    "a baseball field", "a tennis court", "a football field with a running track",
    "storage tanks", "a parking lot full of cars", "a beach and the sea", "a desert",
    "farmland in rectangles", "a golf course", "an intersection of two roads",
    "an overpass with cars", "a railway station", "a lake between trees", "a large stadium",
    "a school with playgrounds", "industrial buildings", "a church", "a swimming pool",
    "a round square in a city", "bare land", "snow on mountains", "mobile homes", "a viaduct",
    "a pond in a park", "a commercial centre", "an airport terminal", "a meadow", "a freeway",
)  # fmt: skip
FITS = 0.15  # of OTHERS that have a lower best score


class Explained(NamedTuple):
    """Why a tile has its score for a query."""

    pixels: float  # the score if the tile had no objects, and no evidence
    matters: list  # what the score loses without each object
    note: str | None  # why less is known


class Explainer:
    """Takes a tile's objects away and looks what becomes of its score.

    picture: gives the PIL image of (path, window) for a model whose embedding depends on objects.
    """

    def __init__(self, engine, picture, precision=torch.float32):
        self.engine = engine
        self.picture = picture
        self.precision = precision
        self.graphs = Images([], [], [], **image_settings(engine.checkpoint))

    def explain(self, query, rows, row, score):
        """The Explained of a row for a Query that gives it this score."""
        class_ids = rows.objects.class_ids[row]
        boxes = rows.objects.boxes[row].astype(float)
        variants = [np.arange(len(class_ids)), np.arange(0)]  # all, none, and each left out
        for left_out in range(len(class_ids)):
            variants.append(np.delete(variants[0], left_out))
        window = rows.window(row)
        note = None
        try:
            cosines = self._cosines(query, rows, row, class_ids, boxes, variants)
        except ValueError as error:
            note = f"only the evidence of its objects is known: {error}"
            cosines = self._of_index(query, rows, row, len(variants))
        sizes = np.repeat(np.array([window[2:]]), len(variants), axis=0)
        has_file = np.repeat(rows.objects.has_file[row], len(variants))
        evidence = self._evidence(query, class_ids, boxes, variants, sizes, has_file)
        scores = cosines + evidence
        losses = (scores[0] - scores[2:]).tolist()
        # The index has the vector itself, which may be of another batch and less precise.
        pixels = float(score - (scores[0] - cosines[1]))
        return Explained(pixels, losses, note)

    def _of_index(self, query, rows, row, variants):
        """The product of the query's vector with the tile's in the index, so many times."""
        return np.full(variants, float(rows.vectors[row] @ self.engine.vector(query)))

    def _cosines(self, query, rows, row, class_ids, boxes, variants):
        """The product of the query's vector with the tile's, for each variant of its objects."""
        vector = self.engine.vector(query)
        if self.engine.model.graph == "none":
            return self._of_index(query, rows, row, len(variants))
        path = rows.arrow["path"][row].as_py()
        image = self.picture(path, rows.window(row))
        features = self._image_features(image)  # (1, D)
        kept_boxes = [(class_ids[kept].astype(int), boxes[kept]) for kept in variants]
        graphs = self.graphs.graphs(kept_boxes, sizes=[image.size] * len(variants))
        batch = {name: values.to(self.engine.device) for name, values in graphs.items()}
        with torch.no_grad():
            repeated = features.expand(len(variants), -1)
            fused = self.engine.model.branches(repeated, **batch)[2].cpu()
        return (F.normalize(fused, dim=-1) @ vector).numpy()

    @torch.no_grad()
    def _image_features(self, image):
        size = self.engine.checkpoint["definition"]["image_size"]
        pixels = preprocess.preprocess(size)(image)[None].to(self.engine.device)
        precise = self.precision == torch.float32
        with torch.autocast(pixels.device.type, self.precision, enabled=not precise):
            return self.engine.model.encode_image(pixels).float()

    def _evidence(self, query, class_ids, boxes, variants, sizes, has_file):
        """The weighted evidence of each variant."""
        labels = len(self.engine.label_map)
        own_ids = [class_ids[kept] for kept in variants]
        counts = np.stack([np.bincount(ids, minlength=labels) for ids in own_ids])
        own_boxes = [boxes[kept] for kept in variants]
        objects = Objects(own_ids, own_boxes, sizes, bins_of(counts), has_file)
        found = self.engine.evidence_of(query, objects)
        return np.zeros(len(variants)) if found is None else found


# ------------------------------------------------------------------ answers


def hits(engine, rows, query, found, explainer):
    """What was found, best first, as dicts; found: (score, row) pairs."""
    return [
        _hit(engine, rows, query, place, score, row, explainer)
        for place, (score, row) in enumerate(found, start=1)
    ]


def _hit(engine, rows, query, place, score, row, explainer):
    arrow = rows.arrow
    class_ids, boxes = rows.objects.class_ids[row], rows.objects.boxes[row]
    explained = explainer.explain(query, rows, row, score)
    objects = []
    counts = {}
    for kind, box, matters in zip(class_ids, boxes.tolist(), explained.matters, strict=True):
        label = engine.kinds[kind]
        counts[label] = counts.get(label, 0) + 1
        objects.append({"label": label, "box": box[:5], "matters": matters})
    objects.sort(key=lambda one: -abs(one["matters"]))
    footprint = arrow["footprint"][row].as_py()
    if footprint is not None:
        footprint = [footprint[i : i + 2] for i in range(0, 8, 2)]
    return {
        "rank": place,
        "score": score,
        "pixels": explained.pixels,
        "objects": score - explained.pixels,
        "id": arrow["id"][row].as_py(),
        "path": arrow["path"][row].as_py(),
        "window": list(rows.window(row)),
        "note": explained.note,
        "detected": bool(rows.objects.has_file[row]),
        "counts": counts,
        "boxes": objects,
        "statements": _statements(engine, rows, query, row),
        "lat": arrow["lat"][row].as_py(),
        "lon": arrow["lon"][row].as_py(),
        "footprint": footprint,
    }


def _statements(engine, rows, query, row):
    """What each statement of the query's sentences adds, the strongest first."""
    if not rows.objects.has_file[row]:
        return []
    objects = rows.objects
    size = rows.window(row)[2:]
    one = find(objects.class_ids[row], objects.boxes[row].astype(float), size, len(engine.kinds))
    lines = []
    for sentence, weight in engine.evidence_terms(query):
        for reason in reasons(engine.evidence.tables, one, sentence.statements, engine.kinds):
            wanted = "" if weight >= 0 else "not wanted: "
            lines.append(
                {"statement": wanted + reason.statement, "evidence": weight * reason.evidence}
            )
    return sorted(lines, key=lambda line: -abs(line["evidence"]))


def best_of_others(engine, rows):
    """The best score that each of OTHERS has among Rows, (others)."""
    scores, _ = rank(engine, rows, [Query(text=text) for text in OTHERS], top_k=1)
    return scores.flatten()
