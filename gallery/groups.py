"""What features alone tell: near-duplicates, images of one set in another, zero-shot classes.

Features are tensors, a row an image; they need not be of length 1. Cosines are computed block by
block, so that no table of all pairs is ever in memory.
"""

import numpy as np
import torch

ROUNDING = 1e-6  # of cosines in float32: a row's with itself may be 0.9999999


# ------------------------------------------------------------------ pairs


def near_duplicates(features, threshold, block=4096):
    """Groups of rows that pairs with a cosine of at least `threshold`, to 1e-6, connect.

    Two rows of a group may be less alike than that, with others in between. A group is a list of
    row numbers, in order; the largest group is the first, of equal ones that with the first row.
    Memory: two tables of block x block numbers, however many pairs there are.
    """
    _check_threshold(threshold)
    components = _Components(len(features))
    for top in range(0, len(features), block):
        rows = _units(features, top, block)
        for left in range(top, len(features), block):
            alike = rows @ _units(features, left, block).T >= threshold - ROUNDING
            _connect(components, alike.cpu().numpy(), top, left)
    return components.groups()


def _connect(components, alike, top, left):
    """Join the components of all pairs of a block; top and left are the numbers of its first rows.

    Each round joins one pair of each row, and one of each column, that still has two components to
    join. Every component with such a pair becomes part of a larger one, so that a few rounds do,
    even if all are alike.
    """
    height, width = alike.shape
    while alike.any():
        of_rows = components.roots(np.arange(top, top + height))
        of_columns = components.roots(np.arange(left, left + width))
        alike &= of_rows[:, None] != of_columns[None, :]
        first_columns = alike.argmax(axis=1)
        for row in np.flatnonzero(alike.any(axis=1)):
            components.join(of_rows[row], of_columns[first_columns[row]])
        first_rows = alike.argmax(axis=0)
        for column in np.flatnonzero(alike.any(axis=0)):
            components.join(of_rows[first_rows[column]], of_columns[column])


class _Components:
    """Rows in groups that can be joined: each row leads to an earlier one of its group, or itself.

    The row that leads to itself, the first of the group, is its root.
    """

    def __init__(self, count):
        self.leads_to = np.arange(count)

    def roots(self, rows):
        """The root of each row."""
        found = self.leads_to[rows]
        while True:
            further = self.leads_to[found]
            if np.array_equal(further, found):
                break
            found = further
        self.leads_to[rows] = found  # a shorter way for the next time
        return found

    def join(self, first, second):
        first = self.root(first)
        second = self.root(second)
        self.leads_to[max(first, second)] = min(first, second)

    def root(self, row):
        while self.leads_to[row] != row:
            self.leads_to[row] = self.leads_to[self.leads_to[row]]
            row = self.leads_to[row]
        return row

    def groups(self):
        members = {}
        for row, root in enumerate(self.roots(np.arange(len(self.leads_to))).tolist()):
            members.setdefault(root, []).append(row)
        groups = [group for group in members.values() if len(group) > 1]
        return sorted(groups, key=lambda group: (-len(group), group[0]))


def matches(features, others, threshold, most=10, block=4096):
    """(pairs, their number): rows of `features` that are like a row of `others`.

    A pair (i, j, cosine) is of row i of `features` and row j of `others`, with a cosine of at least
    `threshold`, to 1e-6; the best first. Each row of `others` keeps its `most` best pairs; the
    number counts all, so that a larger number than that of pairs says that some are left out.
    """
    _check_threshold(threshold)
    pairs = []
    number = 0
    for top in range(0, len(others), block):
        best, places, found = _best_of(features, _units(others, top, block), threshold, most, block)
        number += found
        for row, column in (best >= threshold - ROUNDING).nonzero().tolist():
            cosine = min(round(best[row, column].item(), 6), 1.0)
            pairs.append((places[row, column].item(), top + row, cosine))
    pairs.sort(key=lambda pair: (-pair[2], pair[0], pair[1]))
    return pairs, number


def _best_of(features, rows, threshold, most, block):
    """For each of some rows its best cosines and their row numbers, and how many pairs there are.

    Cosines below the threshold may be among the best of rows that have fewer.
    """
    best = rows.new_full((len(rows), 0), -2.0)
    places = torch.zeros_like(best, dtype=torch.long)
    number = 0
    for left in range(0, len(features), block):
        cosines = rows @ _units(features, left, block).T
        found = int((cosines >= threshold - ROUNDING).sum())
        if not found:
            continue
        number += found
        values, columns = cosines.topk(min(most, cosines.shape[1]))
        best = torch.cat([best, values], dim=1)
        places = torch.cat([places, columns + left], dim=1)
        best, order = best.topk(min(most, best.shape[1]))
        places = places.gather(1, order)
    return best, places, number


def _units(features, first, block):
    """A block of rows as float32 of length 1; a row of zeros, which is like none, stays."""
    rows = torch.as_tensor(features[first : first + block]).float()
    if not rows.isfinite().all():
        raise ValueError(f"features of rows {first} to {first + len(rows) - 1} are not finite")
    return torch.nn.functional.normalize(rows, dim=1)


def _check_threshold(threshold):
    if not 0 < threshold <= 1:
        raise ValueError(f"a threshold is a cosine of more than 0 and at most 1; got {threshold}")


# ------------------------------------------------------------------ classes


def mean_over_prompts(features):
    """One feature of length 1 a class, from (classes, prompts, numbers): the mean of unit ones."""
    units = torch.nn.functional.normalize(features.float(), dim=-1)
    return torch.nn.functional.normalize(units.mean(dim=1), dim=-1)


def zero_shot(features, class_features, block=4096):
    """For each row the number of its best class, the cosine, and by how much it beats the second.

    Three tensors. class_features: a row a class, as of `mean_over_prompts`; two classes at least.
    """
    if len(class_features) < 2:
        raise ValueError(f"two classes or more are to choose from; got {len(class_features)}")
    classes = _units(class_features, 0, len(class_features))
    chosen, scores, margins = [torch.zeros(0, dtype=torch.long)], [torch.zeros(0)], [torch.zeros(0)]
    for first in range(0, len(features), block):
        cosines = _units(features, first, block) @ classes.T
        values, places = cosines.topk(2)
        chosen.append(places[:, 0].cpu())
        scores.append(values[:, 0].cpu())
        margins.append((values[:, 0] - values[:, 1]).cpu())
    return torch.cat(chosen), torch.cat(scores), torch.cat(margins)


def accuracy(names_true, names_predicted):
    """How many names are right: {"right", "of", "accuracy", "classes": {name: the same three}}.

    accuracy is a fraction; classes are those of names_true, in order of the alphabet. Raises
    ValueError without any name, or where the two lists differ in length.
    """
    if not names_true:
        raise ValueError("no names to compare")
    right = {name: 0 for name in sorted(set(names_true))}
    number = dict.fromkeys(right, 0)
    for true, predicted in zip(names_true, names_predicted, strict=True):
        number[true] += 1
        right[true] += true == predicted
    classes = {name: _share(right[name], number[name]) for name in right}
    return {**_share(sum(right.values()), len(names_true)), "classes": classes}


def _share(right, of):
    return {"right": right, "of": of, "accuracy": right / of}
