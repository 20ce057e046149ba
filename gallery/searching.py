"""An index with the model that made it, ready for queries; what search.py and the app ask."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from clip_gcn_image_feature_integration import image_settings, load_model
from dataset.batches import Images
from escaping import escaped
from evidence import of_checkpoint
from gallery import approximate as approximate_search
from gallery import filters, table
from gallery.answers import FITS, Explainer, best_of_others, hits
from gallery.indexing import PRECISIONS, cut_of, digest_of, encode
from gallery.ranking import CANDIDATES, Engine, columns_for, rank, rows_from
from gallery.rasters import open_scene, reading_of
from gallery.reading import File, tiles_of_file


class Filter(NamedTuple):
    """Which tiles a query looks at."""

    where: str | None = None  # as of `filters.condition`
    near: tuple | None = None  # (lat, lon) in degrees
    within: float = 10.0  # kilometres around it
    bbox: tuple | None = None  # (west, south, east, north) in degrees

    def in_words(self):
        """What is asked of tiles, for people: {"where", "near", "bbox"}, None for nothing."""
        near = box = None
        if self.near:
            near = f"{self.near[0]:g} {self.near[1]:g} within {self.within:g} km"
        if self.bbox:
            box = " ".join(f"{degrees:g}" for degrees in self.bbox)
        return {"where": self.where, "near": near, "bbox": box}

    def sql(self, settings):
        """The condition for the table; None for all rows. Of `near` it is a box around."""
        try:
            where = None
            if self.where is not None:
                where = filters.condition(self.where, settings.columns())
        except ValueError as error:
            raise ValueError(f"--where: {error}") from None
        try:
            near = filters.near(*self.near, self.within) if self.near else None
            box = filters.inside(*self.bbox) if self.bbox else None
        except ValueError as error:
            raise ValueError(f"--{'near' if self.near else 'bbox'}: {error}") from None
        return filters.both(where, near, box)


class Search:
    """An index, opened: `answer` queries.

    checkpoint, images: where the model and the images lie now, or None for where they were when
    the index was made. evidence: as of `evidence.of_checkpoint`. Raises ValueError where the model
    is not the one that made the index.
    """

    def __init__(
        self, folder, device, checkpoint=None, activation=None, evidence="auto", images=None
    ):
        self.folder = folder
        self.table, self.settings = table.open_index(folder)
        name = checkpoint or self.settings.checkpoint
        model, content = load_model(name, device, activation)
        table.require_checkpoint(folder, self.settings, name, digest_of(model, content))
        self.images = Path(images or self.settings.images)
        if images and not self.images.is_dir():
            raise ValueError(f"--images {escaped(images)}: no such folder")
        self.device = device
        self.engine = Engine(model, content, of_checkpoint(content, evidence), device)
        precision = PRECISIONS[self.settings.precision]
        self.explainer = Explainer(self.engine, self.picture, precision)
        self._rows = None
        self._best_of_others = None

    @property
    def rows(self):
        """All rows of the index, read once."""
        if self._rows is None:
            arrow = table.read(self.table, columns_for(self.settings))
            self._rows = rows_from(arrow, self.settings)
        return self._rows

    def _take_latest(self):
        """Forget what was read of the index if it has been written since."""
        before = self.table.version
        self.table.checkout_latest()
        if self.table.version != before:
            self._rows = None
            self._best_of_others = None

    def picture(self, path, window):
        """The PIL image of a tile; ValueError where it cannot be read."""
        reading = reading_of(self.settings.bands, self.settings.stretch)
        with open_scene(self.images / path, reading) as scene:
            image = scene.read(window)
        if image is None:
            raise ValueError(f"{escaped(path)}: holds no data there any more")
        return image

    def encode_image(self, path, detections=None):
        """The embedding (D) of an image file, with its file of detections or without."""
        file = File(Path(path), str(path), detections)
        cut = cut_of(self.settings._replace(tile=None), self.engine.checkpoint)
        graphs = Images([], [], [], **image_settings(self.engine.checkpoint))
        precision = PRECISIONS[self.settings.precision]
        reads = tiles_of_file(file, cut)
        found = list(encode(reads, graphs, self.engine.model, self.device, 1, precision))
        end, _ = found[-1]
        if end.problem is not None:
            raise ValueError(end.problem)
        if end.empty:
            raise ValueError(f"{escaped(path)}: holds no data")
        _, vector = found[0]
        return vector

    def vector_of(self, tile_id):
        """The embedding (D) of a tile of the index; ValueError where it has none of this name."""
        try:
            [row] = self.rows.numbers([tile_id])
        except KeyError:
            raise ValueError(f"no tile {escaped(tile_id)} in the index") from None
        return self.rows.vectors[row].numpy()

    # -------------------------------------------------------------- queries

    def answers(self, queries, chosen=None, top_k=10, approximate=False):
        """An answer for each Query, a dict, see gallery/answers.py; chosen: a Filter.

        approximate: by an index of vectors, see gallery/approximate.py. A query without evidence
        gets the tiles nearest to it. With evidence, or where the tiles have to lie in a circle, it
        gets the best of the `CANDIDATES` nearest.
        """
        self._take_latest()
        chosen = chosen or Filter()
        sql = chosen.sql(self.settings)
        if approximate:
            parameters = approximate_search.ensure(self.folder, self.table, self.engine)
            if parameters is not None:
                return [
                    self._approximate(query, chosen, sql, top_k, parameters) for query in queries
                ]
        rows = self._chosen(self.rows, chosen, sql)
        return self._ranked(rows, queries, chosen, top_k, exact=True)

    def hit_of(self, tile_id, query):
        """The one hit, in a list, of a query that looks at one tile alone."""
        only = self.rows.only(self.rows.numbers([tile_id]))
        return self._ranked(only, [query], Filter(), top_k=1, exact=False)[0]["hits"]

    def _ranked(self, rows, queries, chosen, top_k, exact):
        scores, numbers = rank(self.engine, rows, queries, top_k)
        found = zip(queries, scores.tolist(), numbers.tolist(), strict=True)
        return [
            self._answer(rows, query, list(zip(own_scores, own_rows, strict=True)), chosen, exact)
            for query, own_scores, own_rows in found
        ]

    def _answer(self, rows, query, found, chosen, exact):
        share = None
        if exact and chosen == Filter():
            share = self._fit(query, found)
        unknown = []
        if query.text is not None:
            unknown = list(self.engine.sentences([query.text])[0].unknown)
        return {
            "query": {
                "text": query.text,
                "image": query.image,
                "vector": "a given one" if query.vector is not None else None,
                "not": query.without,
                **chosen.in_words(),
            },
            "searched": len(rows),
            "exact": exact,
            "pixels_only": unknown if self.engine.evidence is not None else [],
            "fits": share is None or share >= FITS,
            "fit": share,
            "hits": hits(self.engine, rows, query, found, self.explainer),
        }

    def _fit(self, query, found):
        """The share of other queries whose best score in the whole index is below this one's.

        None for a query that is not a sentence alone, and where nothing is found.
        """
        if [name for name, _ in query.parts()] != ["text"] or not found:
            return None
        if self._best_of_others is None:
            self._best_of_others = best_of_others(self.engine, self.rows)
        return float((self._best_of_others < found[0][0]).float().mean())

    def _chosen(self, rows, chosen, sql):
        """The Rows that a filter leaves."""
        if sql is not None:
            rows = rows.only(rows.numbers(table.ids_where(self.table, sql)))
        return self._around(rows, chosen)

    def _around(self, rows, chosen):
        """The Rows in the circle of a filter, of those in the box around it."""
        if chosen.near is None:
            return rows
        lats, lons = (rows.arrow[name].to_numpy() for name in ("lat", "lon"))
        distances = filters.distance_km(*chosen.near, lats, lons)
        return rows.only(np.flatnonzero(distances <= chosen.within))

    def _approximate(self, query, chosen, sql, top_k, parameters):
        """An answer among the rows that an index of vectors gives."""
        by_vector_alone = not self.engine.evidence_terms(query) and chosen.near is None
        number, probes, refine = top_k, parameters.probes, parameters.refine
        if not by_vector_alone:  # rough neighbours, as their scores will be exact
            number, refine = max(CANDIDATES, top_k * parameters.refine), None
            probes = max(probes, approximate_search.PROBES)
        arrow = table.nearest(
            self.table,
            self.engine.vector(query).numpy(),
            number,
            sql,
            columns_for(self.settings),
            probes=probes,
            refine=refine,
        )
        rows = self._around(rows_from(arrow, self.settings), chosen)
        [answer] = self._ranked(rows, [query], chosen, top_k, exact=False)
        return {**answer, "searched": self.table.count_rows(sql)}
