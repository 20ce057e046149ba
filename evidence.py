"""Object evidence: how much an image's detections speak for the graph of a sentence.

    python evidence.py --checkpoint ViT-B/32 --dataset ucm --data-root DIR --out clip-ucm.pth

The score of an image and a sentence is the cosine of their embeddings + weight x evidence. Evidence
is a log-likelihood ratio, log P(detections | sentence) - log P(detections), summed over what the
sentence states: how many of a kind there are, where they lie, how they are arranged, and how two
kinds lie to each other. What is detected is put into a few bins, so that all is looked up in small
tables, which are estimated on training images and their sentences. Statements count as independent
(naive Bayes). train.py fits the tables at its end; this command does so for a CLIP, or for the
output of another detector. What a model was trained on it needs not have seen.

Sizes in the shapes below: I images, T sentences, K labels, S statements of a count, C bins.
"""

from options import answer_early

if __name__ == "__main__":
    answer_early("evidence", __doc__)  # before torch is imported, which takes seconds

import itertools
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from backbones.checkpoint_content import check_weights, is_finite, require
from clip_gcn_image_feature_integration import encode_split, load_model, pick_device
from det_formats.det_json import LabelMap
from det_formats.measures import (
    COUNT_BINS,
    PLACE_CELLS,
    RELATION_BINS,
    RELATION_CELLS,
    RELATIONS,
    SHAPE_CELLS,
    find,
)
from metrics.protocol import from_features, measure
from model import save_checkpoint
from options import default_options, parse_options, run
from progress import Progress
from T_Graph import build_text_graph
from writing import written_whole

# ------------------------------------------------------------------ what a sentence states

COUNTS = ("0", "1", "2", "3", "4", "5-6", "7-9", "10+", "at least 2", "at least 3", "many", "some")
PLACES = (
    "middle", "left", "right", "top", "bottom", "edge", "corner",
    "top left corner", "top right corner", "bottom left corner", "bottom right corner",
)  # fmt: skip
ARRANGEMENTS = ("in a row", "in rows", "neatly arranged", "packed together", "scattered")
UNMENTIONED = len(COUNTS)  # the statement that a sentence makes of a kind by leaving it out

_LARGEST_EXACT = ((4, None), (6, "5-6"), (9, "7-9"), (math.inf, "10+"))


def count_statement(count, form):
    """Which of COUNTS a node of a sentence's graph states, as an index."""
    if form == "exact":
        for largest, name in _LARGEST_EXACT:
            if count <= largest:
                return COUNTS.index(name or str(count))
    if form == "at_least":
        return COUNTS.index("at least 2" if count <= 2 else "at least 3")
    return COUNTS.index("many" if form == "many" else "some")


class Statements(NamedTuple):
    """What a sentence states, in class ids and indices, each with a weight in (0, 1].

    The weight of a word that stands for n kinds is 1 / n for each.
    """

    counts: list  # (kind, index in COUNTS, weight)
    places: list  # (kind, index in PLACES, weight)
    arrangements: list  # (kind, index in ARRANGEMENTS, weight)
    relations: list  # (kind, other kind, index in RELATIONS, weight)


def statements_of(graph):
    """The Statements of a `T_Graph.build_text_graph`."""
    mentions = defaultdict(list)  # kind: (count, form, weight) of its nodes
    places = []
    arrangements = []
    for _, node in graph.nodes(data=True):
        weight = 1 / len(node["kinds"])
        place = f"{node['corner']} corner" if node["corner"] else node["place"]
        for kind in node["kinds"]:
            mentions[kind].append((node["count"], node["count_form"], weight))
            if place in PLACES:
                places.append((kind, PLACES.index(place), weight))
            for attribute in node["attributes"]:
                if attribute in ARRANGEMENTS:
                    arrangements.append((kind, ARRANGEMENTS.index(attribute), weight))
    counts = [(kind, *_total(found)) for kind, found in sorted(mentions.items())]
    relations = []
    for i, j, edge in graph.edges(data=True):
        kinds, others = graph.nodes[i]["kinds"], graph.nodes[j]["kinds"]
        for kind, other in itertools.product(kinds, others):
            if kind != other:  # which of one kind's objects are meant is not known
                relation = RELATIONS.index(edge["relation"])
                relations.append((kind, other, relation, 1 / (len(kinds) * len(others))))
    return Statements(counts, places, arrangements, relations)


def _total(mentions):
    """(statement, weight) of all nodes of a kind together: two planes and a plane are three."""
    weight = max(weight for _, _, weight in mentions)
    if any(count is None for count, _, _ in mentions):
        forms = {form for _, form, _ in mentions}
        return count_statement(None, "many" if "many" in forms else "unknown"), weight
    total = sum(count for count, _, _ in mentions)
    exact = all(form == "exact" for _, form, _ in mentions)
    return count_statement(total, "exact" if exact else "at_least"), weight


# ------------------------------------------------------------------ tables

STEP = 1 / 1024  # tables hold multiples of it and weights multiples of 1 / 64: sums are exact then,
VOTE = 1 / 64  # in float32 too and in any order, so that equal images and sentences tie exactly
LARGEST = 6.0  # of an entry: one statement alone decides nothing

OWN = 8  # mentions of a kind that count as much as the prior that all kinds share
SHARED = 2  # mentions of all kinds together that count as much as no difference at all


class Tables(NamedTuple):
    """Log-likelihood ratios, float32, of what is detected given a statement against none."""

    counts: np.ndarray  # (K, S + 1, C): by kind, statement (the last: not mentioned) and bin
    shared: np.ndarray  # (S + 1, C): what all kinds share, for one of which nothing is known
    places: np.ndarray  # (places, PLACE_CELLS)
    arrangements: np.ndarray  # (arrangements, SHAPE_CELLS)
    relations: np.ndarray  # (R, RELATION_CELLS)


def fit(found, statements, labels):
    """Tables from training images: what is Found in each, or None, and its sentences' Statements.

    found: (I); statements: (I) lists; labels: K. An image without detections does not count. Each
    image counts once, however many sentences it has.
    """
    bins = len(COUNT_BINS) + 1
    counts = np.zeros((labels, UNMENTIONED + 1, bins))
    all_counts = np.zeros((labels, bins))
    tallies = {
        "places": np.zeros((len(PLACES), PLACE_CELLS)),
        "arrangements": np.zeros((len(ARRANGEMENTS), SHAPE_CELLS)),
        "relations": np.zeros((len(RELATIONS), RELATION_CELLS)),
    }
    overall = {name: np.zeros_like(tally) for name, tally in tallies.items()}
    kinds = np.arange(labels)
    for one, sentences in zip(found, statements, strict=True):
        if one is None or not sentences:
            continue
        all_counts[kinds, one.counts] += 1
        _tally_all(overall, one)
        for sentence in sentences:
            share = 1 / len(sentences)
            mentioned = np.zeros(labels)
            for kind, statement, weight in sentence.counts:
                counts[kind, statement, one.counts[kind]] += share * weight
                mentioned[kind] = weight
            if sentence.counts:
                counts[kinds, UNMENTIONED, one.counts] += share * (1 - mentioned)
            _tally(tallies, one, sentence, share)
    ratios = {name: _ratios(tally, overall[name]) for name, tally in tallies.items()}
    own, shared = _count_ratios(counts, all_counts)
    return Tables(own, shared, **ratios)


def _tally(tallies, one, sentence, share):
    """Add what is found of what a sentence states of places, arrangements and relations."""
    for kind, place, weight in sentence.places:
        if kind in one.places:
            tallies["places"][place, one.places[kind]] += share * weight
    for kind, arrangement, weight in sentence.arrangements:
        if kind in one.shapes:
            tallies["arrangements"][arrangement, one.shapes[kind]] += share * weight
    for kind, other, relation, weight in sentence.relations:
        if (kind, other) in one.pairs:
            cell = one.pairs[kind, other][relation]
            tallies["relations"][relation, cell] += share * weight


def _tally_all(overall, one):
    """Add what is found of all kinds and pairs, whatever is said of them."""
    for cell in one.places.values():
        overall["places"][:, cell] += 1
    for cell in one.shapes.values():
        overall["arrangements"][:, cell] += 1
    for cells in one.pairs.values():
        overall["relations"][np.arange(len(RELATIONS)), cells] += 1


def _ratios(tally, overall):
    """Log-likelihood ratios of tallies (statements, cells) against those of all."""
    cells = tally.shape[1]
    usual = (overall + 1 / cells) / (overall.sum(axis=1, keepdims=True) + 1)
    stated = (tally + OWN * usual) / (tally.sum(axis=1, keepdims=True) + OWN)
    return _rounded(np.log(stated / usual))


def _count_ratios(counts, all_counts):
    """The ratios (K, S + 1, C) of counts, each kind's drawn to those (S + 1, C) that all share."""
    shared_usual = (all_counts.sum(axis=0) + 1) / (all_counts.sum() + all_counts.shape[1])  # (C)
    images = all_counts.sum(axis=1, keepdims=True)
    usual = (all_counts + shared_usual) / (images + 1)  # (K, C)
    mentions = counts.sum(axis=-1)  # (K, S + 1)
    expected = np.einsum("ks,kc->sc", mentions, usual)  # if statements said nothing
    shared = _shared_ratios(counts.sum(axis=0), expected, shared_usual)
    prior = usual[:, None] * np.exp(shared)  # (K, S + 1, C)
    prior /= prior.sum(axis=-1, keepdims=True)
    stated = (counts + OWN * prior) / (mentions[..., None] + OWN)
    return _rounded(np.log(stated / usual[:, None])), _rounded(shared)


# The numbers that a vague statement leaves open, of which it is the mean where nobody makes it.
_OPEN = {
    "at least 2": COUNTS[2:8],
    "at least 3": COUNTS[3:8],
    "many": COUNTS[5:8],
    "some": COUNTS[1:8],
}


def _shared_ratios(found, expected, usual):
    """Ratios (S + 1, C) of tallies of all kinds together against those expected; usual: (C)."""
    weak = SHARED * usual
    ratios = np.log((found + weak) / (expected + weak))
    for name, numbers in _OPEN.items():
        row = COUNTS.index(name)
        mean = np.exp([ratios[COUNTS.index(number)] for number in numbers]).mean(axis=0)  # (C)
        ratios[row] = np.log((found[row] + weak * mean) / (expected[row] + weak))
    return ratios


def _rounded(ratios):
    return (np.round(ratios.clip(-LARGEST, LARGEST) / STEP) * STEP).astype(np.float32)


# ------------------------------------------------------------------ scores


def scores(tables, found, statements):
    """Evidence (I, T), float32, of what is Found in images, or None, for sentences' Statements.

    0 for an image without detections and for a sentence that states nothing of a known kind.
    """
    result = np.zeros((len(found), len(statements)), dtype=np.float32)
    images = [i for i, one in enumerate(found) if one is not None]
    if not images or not statements:
        return result
    weights = _weights(statements, labels=len(tables.counts))  # (T, U)
    used = np.flatnonzero(weights.any(axis=0))
    looked_up = _looked_up(tables, [found[i] for i in images])  # (images, U)
    result[images] = looked_up[:, used] @ weights[:, used].T
    _add_relations(result, tables, found, statements)
    return result


def _widths():
    """How many columns a kind has for counts, places and arrangements."""
    return UNMENTIONED + 1, len(PLACES), len(ARRANGEMENTS)


def _weights(statements, labels):
    """How often sentences state what a kind can be said to be, (T, U)."""
    counts, places, arrangements = (
        np.zeros((len(statements), labels, width), dtype=np.float32) for width in _widths()
    )
    for t, sentence in enumerate(statements):
        if sentence.counts:
            counts[t, :, UNMENTIONED] = 1
        for kind, statement, weight in sentence.counts:
            counts[t, kind, statement] += _vote(weight)
            counts[t, kind, UNMENTIONED] -= _vote(weight)
        for kind, place, weight in sentence.places:
            places[t, kind, place] += _vote(weight)
        for kind, arrangement, weight in sentence.arrangements:
            arrangements[t, kind, arrangement] += _vote(weight)
    parts = [part.reshape(len(statements), -1) for part in (counts, places, arrangements)]
    return np.concatenate(parts, axis=1)  # (T, U)


def _vote(weight):
    return round(weight / VOTE) * VOTE


def _looked_up(tables, found):
    """What the tables say of images for every statement that can be made of a kind, (I, U)."""
    labels = len(tables.counts)
    bins = np.stack([one.counts for one in found])  # (I, K)
    counts = tables.counts[np.arange(labels), :, bins]  # (I, K, S + 1)
    places = np.zeros((len(found), labels, len(PLACES)), dtype=np.float32)
    shapes = np.zeros((len(found), labels, len(ARRANGEMENTS)), dtype=np.float32)
    for i, one in enumerate(found):
        for kind, cell in one.places.items():
            places[i, kind] = tables.places[:, cell]
        for kind, cell in one.shapes.items():
            shapes[i, kind] = tables.arrangements[:, cell]
    parts = [part.reshape(len(found), -1) for part in (counts, places, shapes)]
    return np.concatenate(parts, axis=1)  # (I, U)


def _add_relations(result, tables, found, statements):
    """Add the evidence of relations: a small product for each pair of kinds that is spoken of."""
    images_of = defaultdict(list)  # pair of kinds: (image, ratios by relation)
    for i, one in enumerate(found):
        for pair, cells in (one.pairs if one is not None else {}).items():
            images_of[pair].append((i, tables.relations[np.arange(len(RELATIONS)), cells]))
    sentences_of = defaultdict(dict)  # pair of kinds: {sentence: weights by relation}
    for t, sentence in enumerate(statements):
        for kind, other, relation, weight in sentence.relations:
            row = sentences_of[kind, other].setdefault(t, np.zeros(len(RELATIONS), np.float32))
            row[relation] += _vote(weight)
    for pair, weights in sentences_of.items():
        if pair in images_of:
            rows, ratios = zip(*images_of[pair], strict=True)
            result[np.ix_(rows, list(weights))] += (
                np.stack(ratios) @ np.stack([*weights.values()]).T
            )


# ------------------------------------------------------------------ evidence beside a model


class Evidence(NamedTuple):
    """Tables, and the weight of evidence beside the cosine, 0 or more."""

    tables: Tables
    weight: float


def found_in(images):
    """What is Found in each image of a `dataset.batches.Images`; None without a detection file."""
    labels = len(images.label_map)
    result = []
    for i in images.source:
        one = None
        if images.detected[i]:
            one = find(*images.boxes[i], images.sizes[i], labels)
        result.append(one)
    return result


def statements_in(sentences, label_map):
    """The Statements of each sentence."""
    known = {}
    for sentence in Progress(dict.fromkeys(sentences), "read sentences", "sentences"):
        known[sentence] = statements_of(build_text_graph(sentence, label_map))
    return [known[sentence] for sentence in sentences]


def fit_on(images, captions):
    """Tables from an ImageSet and the captions of each image; None without any detection file."""
    if not any(images.detected):
        return None
    known = statements_in(list(itertools.chain(*captions)), images.label_map)
    remaining = iter(known)
    statements = [list(itertools.islice(remaining, len(own))) for own in captions]
    return fit(found_in(images), statements, len(images.label_map))


def evidence_of(tables, images, captions):
    """The `scores` of an ImageSet and captions, (I, T)."""
    return scores(tables, found_in(images), statements_in(captions, images.label_map))


WEIGHTS = (0.0, 0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3)


def choose_weight(tables, splits):
    """The weight with the best mean mR on validation, the least of equals: (weight, {weight: mR}).

    splits: (ImageSet, its SplitFeatures) of each validation set.
    """
    added = [evidence_of(tables, images, split.captions) for images, split in splits]
    mean = {}
    for weight in Progress(WEIGHTS, "choose a weight", "weights"):
        total = 0.0
        for (_, split), own in zip(splits, added, strict=True):
            features = split.images, split.texts, split.image_of_text
            total += measure(from_features(*features, evidence=weight * own))["mR"]
        mean[weight] = total / len(splits)
    return max(mean, key=mean.get), mean


def fit_beside(model, data, device, batch_size=64, workers=0):
    """Evidence beside a model, from a `training.inputs.TrainingData`; None without detections.

    Tables are of the training split, the weight of validation. Says what it gives.
    """
    tables = fit_on(data.train_set.image_set, data.train_set.captions_by_image())
    if tables is None:
        return None
    splits = []
    for data_set, images, texts in zip(data.data_sets, data.val_sets, data.val_texts, strict=True):
        records = data_set.records(data_set.validation)
        split = encode_split(model, images, records, device, batch_size, workers, texts)
        splits.append((images, split))
    weight, mean = choose_weight(tables, splits)
    print(
        f"object evidence: validation mR {mean[0.0]:.1f} without, {mean[weight]:.1f} with weight "
        f"{weight}"
    )
    return Evidence(tables, weight)


def as_field(evidence):
    """Evidence as a checkpoint holds it; None for None."""
    if evidence is None:
        return None
    tables = {name: torch.from_numpy(table) for name, table in evidence.tables._asdict().items()}
    return {"weight": evidence.weight, "tables": tables}


def of_checkpoint(checkpoint, choice="auto"):
    """The Evidence that a checkpoint holds; None without, or where it is switched off.

    choice: "auto" for the weight that was chosen on validation, "off", or a weight as text, for
    which a checkpoint without tables gets the `shipped_tables`. Raises ValueError for a choice that
    is none of these, and for damaged tables.
    """
    weight = None if choice in ("auto", "off") else _weight(choice)
    field = checkpoint.get("evidence")
    if choice == "off" or (field is None and choice == "auto"):
        return None
    labels = len(LabelMap(checkpoint["labels"]))
    if field is None:
        return Evidence(shipped_tables(labels), weight)
    tables = _checked_tables(field, labels)
    return Evidence(tables, float(field["weight"]) if weight is None else weight)


SHIPPED = Path(__file__).parent / "models" / "evidence" / "scenes.json"


def shipped_tables(labels):
    """Tables for K labels where there is no data to fit: what all kinds share on the scenes."""
    content = json.loads(SHIPPED.read_text(encoding="utf-8"))
    rows = {}
    for name in ("shared", "places", "arrangements", "relations"):
        rows[name] = np.array(list(content[name].values()), dtype=np.float32)
    return Tables(counts=np.repeat(rows["shared"][None], labels, axis=0), **rows)


def _weight(text):
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise ValueError(f"--evidence {text}: expected auto, off or a weight of 0 or more")
    return weight


def _checked_tables(field, labels):
    """The Tables of a checkpoint's field; ValueError where they are not what `as_field` gives."""
    require(isinstance(field, dict), "evidence", "a dict", field)
    weight = field.get("weight")
    require(is_finite(weight) and weight >= 0, "evidence: weight", "a number of 0 or more", weight)
    tables = field.get("tables")
    check_weights(tables, "evidence: tables")
    shapes = {
        "counts": (labels, UNMENTIONED + 1, len(COUNT_BINS) + 1),
        "shared": (UNMENTIONED + 1, len(COUNT_BINS) + 1),
        "places": (len(PLACES), PLACE_CELLS),
        "arrangements": (len(ARRANGEMENTS), SHAPE_CELLS),
        "relations": (len(RELATIONS), RELATION_CELLS),
    }
    found = {name: tuple(table.shape) for name, table in tables.items()}
    require(found == shapes, "evidence: tables", f"tables of {shapes}", found)
    return Tables(**{name: table.float().numpy() for name, table in tables.items()})


# ------------------------------------------------------------------ why


def kind_names(label_map):
    """The first name of each kind by class id, "other" included: (K)."""
    return [*(line.split(",")[0].strip() for line in label_map.lines), "other"]


class Reason(NamedTuple):
    """What one statement of a sentence adds to the evidence of an image."""

    statement: str  # in words
    evidence: float


def reasons(tables, one, statements, names):
    """The Reasons whose sum is the evidence of an image for a sentence, the strongest first.

    one: what is Found in the image; names: of the kinds by class id. Kinds that the sentence does
    not mention are one reason together.
    """
    found = []
    unmentioned = tables.counts[np.arange(len(names)), UNMENTIONED, one.counts]  # (K)
    rest = unmentioned.sum() if statements.counts else 0.0
    for kind, statement, weight in statements.counts:
        rest -= _vote(weight) * unmentioned[kind]
        value = _vote(weight) * tables.counts[kind, statement, one.counts[kind]]
        found.append(Reason(f"{COUNTS[statement]} {names[kind]}", float(value)))
    for kind, place, weight in statements.places:
        if kind in one.places:
            value = _vote(weight) * tables.places[place, one.places[kind]]
            found.append(Reason(f"{names[kind]}, {PLACES[place]}", float(value)))
    for kind, arrangement, weight in statements.arrangements:
        if kind in one.shapes:
            value = _vote(weight) * tables.arrangements[arrangement, one.shapes[kind]]
            found.append(Reason(f"{names[kind]} {ARRANGEMENTS[arrangement]}", float(value)))
    for kind, other, relation, weight in statements.relations:
        if (kind, other) in one.pairs:
            value = _vote(weight) * tables.relations[relation, one.pairs[kind, other][relation]]
            words = f"{names[kind]} {RELATIONS[relation]} {names[other]}"
            found.append(Reason(words, float(value)))
    if statements.counts:
        found.append(Reason("nothing else said", float(rest)))
    return sorted(found, key=lambda reason: -abs(reason.evidence))


# ------------------------------------------------------------------ the command


def in_json(evidence, label_map):
    """The tables with the names of their rows, for people and other programs."""
    tables = evidence.tables
    names = kind_names(label_map)
    statements = [*COUNTS, "not mentioned"]
    counts = {}
    for name, own in zip(names, tables.counts.tolist(), strict=True):
        counts[name] = dict(zip(statements, own, strict=True))
    return {
        "weight": evidence.weight,
        "count_bins": [0, *COUNT_BINS],
        "relation_bins": RELATION_BINS,
        "counts": counts,
        "shared": dict(zip(statements, tables.shared.tolist(), strict=True)),
        "places": dict(zip(PLACES, tables.places.tolist(), strict=True)),
        "arrangements": dict(zip(ARRANGEMENTS, tables.arrangements.tolist(), strict=True)),
        "relations": dict(zip(RELATIONS, tables.relations.tolist(), strict=True)),
    }


def main(arguments=None):
    """Fit tables beside a model, choose their weight, and write both as a checkpoint."""
    from training.inputs import find_data, read_data  # the command alone reads data sets

    options = parse_options("evidence", __doc__, arguments)
    if Path(options.out).exists():
        raise ValueError(f"--out {options.out}: is there already; name a new file")
    of_data = {**default_options("train"), "augment": [], **vars(options)}
    data_sets = find_data(of_data)  # before a CLIP is downloaded
    device = pick_device(options.device)
    model, checkpoint = load_model(options.checkpoint, device, options.activation)
    label_map = LabelMap(checkpoint["labels"])
    model_config = checkpoint["definition"]
    data = read_data(data_sets, of_data, model_config, label_map)
    evidence = fit_beside(model, data, device, options.batch_size, options.workers)
    if evidence is None:
        raise ValueError("no training image has a detection file; name their folder by --det-json")
    names = ("dataset", "data_root", "det_json", "annotations", "caption_form", "dev_images")
    saved = {**checkpoint["options"], **{name: getattr(options, name) for name in names}}
    save_checkpoint(
        options.out, model, model_config, label_map.lines, saved, evidence=as_field(evidence)
    )
    print(f"written to {options.out}")
    if options.json:
        with written_whole(options.json) as temporary:
            text = json.dumps(in_json(evidence, label_map), indent=1)
            temporary.write_text(text + "\n", encoding="utf-8")
        print(f"written to {options.json}")


if __name__ == "__main__":
    run(main)
