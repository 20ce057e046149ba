"""The objects of many tiles, and how much they speak for a sentence: object evidence at once.

The same numbers as `metrics.likelihood.scores`, which looks at each image on its own. Here counts
are looked up for all rows together, and places, arrangements and relations only where a tile has
the kinds that are spoken of. Sizes in the shapes below: R rows, K labels.
"""

import numpy as np

from dataset.statements import UNMENTIONED
from det_formats.measures import COUNT_BINS, place_cell, relation_bins, shape_cell
from metrics.likelihood import rounded_weight


def bins_of(counts):
    """The bin of each count, as `measures.count_bin`."""
    return np.searchsorted(COUNT_BINS, counts, side="right").astype(np.int8)


class Objects:
    """Boxes of R tiles.

    class_ids, boxes: for each tile (n) and (n, 6), in pixels of it; sizes: (R, 2) in pixels;
    bins: (R, K) `bins_of` how many there are of each kind; has_file: (R) whether a tile has a
    detection file, without which it has no evidence.
    """

    def __init__(self, class_ids, boxes, sizes, bins, has_file):
        self.class_ids = class_ids
        self.boxes = boxes
        self.sizes = sizes
        self.bins = bins
        self.has_file = has_file
        self._unmentioned = None  # (R) what it says if no kind is mentioned, of the last tables

    def only(self, rows):
        """The Objects of some tiles."""
        return Objects(
            [self.class_ids[row] for row in rows],
            [self.boxes[row] for row in rows],
            self.sizes[rows],
            self.bins[rows],
            self.has_file[rows],
        )

    def of_kind(self, row, kind):
        """The boxes (n, 6) of one kind in a tile."""
        return self.boxes[row][self.class_ids[row] == kind].astype(float)

    def evidence(self, tables, statements):
        """Evidence (R), float32, of all tiles for the Statements of one sentence."""
        result = np.zeros(len(self.bins), dtype=np.float32)
        if not statements.counts:
            return result  # what has a place or a relation is counted too
        result += self._of_unmentioned(tables)
        for kind, statement, weight in statements.counts:
            ratios = tables.counts[kind, statement] - tables.counts[kind, UNMENTIONED]  # by bin
            result += rounded_weight(weight) * ratios[self.bins[:, kind]]
        for kind, place, weight in statements.places:
            for row in np.flatnonzero(self.bins[:, kind]):
                cell = place_cell(self.of_kind(row, kind), self.sizes[row])
                result[row] += rounded_weight(weight) * tables.places[place, cell]
        for kind, arrangement, weight in statements.arrangements:
            for row in np.flatnonzero(self.bins[:, kind]):
                cell = shape_cell(self.of_kind(row, kind), self.sizes[row])
                result[row] += rounded_weight(weight) * tables.arrangements[arrangement, cell]
        for kind, other, relation, weight in statements.relations:
            for row in np.flatnonzero(self.bins[:, kind] * self.bins[:, other]):
                own, others = self.of_kind(row, kind), self.of_kind(row, other)
                cell = relation_bins(own, others, self.sizes[row])[relation]
                result[row] += rounded_weight(weight) * tables.relations[relation, cell]
        return result * self.has_file

    def _of_unmentioned(self, tables):
        """(R) the evidence of a sentence that mentions kinds, but none of these."""
        if self._unmentioned is None or self._unmentioned[0] is not tables:
            total = np.zeros(len(self.bins), dtype=np.float32)
            for kind in range(self.bins.shape[1]):
                total += tables.counts[kind, UNMENTIONED][self.bins[:, kind]]
            self._unmentioned = tables, total
        return self._unmentioned[1]
