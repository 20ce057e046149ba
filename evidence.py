"""Object evidence: how much an image's detections speak for the graph of a sentence.

    python evidence.py --checkpoint ViT-B/32 --dataset ucm --data-root DIR --out clip-ucm.pth

The score of an image and a sentence is the cosine of their embeddings + weight x evidence. Evidence
is a log-likelihood ratio, log P(detections | sentence) - log P(detections), summed over what the
sentence states: how many of a kind there are, where they lie, how they are arranged, and how two
kinds lie to each other. T_Graph.py reads the sentence, dataset/statements.py turns its graph into
statements, det_formats/measures.py puts what is detected into bins, and metrics/likelihood.py has
the tables in which both are looked up.

train.py fits tables and weight at its end. This command does so for a CLIP that is taken as it is,
or for another detector's files. Sizes in the shapes below: I images, T sentences, K labels.
"""

from options import answer_early

if __name__ == "__main__":
    answer_early("evidence", __doc__)  # before torch is imported, which takes seconds

import itertools
import json
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import clip
from backbones.checkpoint_content import check_weights, is_finite, require
from clip_gcn_image_feature_integration import encode_split, load_model, pick_device
from dataloader import merged
from dataset.statements import ARRANGEMENTS, COUNTS, PLACES, UNMENTIONED, statements_of
from det_formats.det_json import LabelMap, read_label_map
from det_formats.measures import (
    COUNT_BINS,
    PLACE_CELLS,
    RELATION_BINS,
    RELATION_CELLS,
    RELATIONS,
    SHAPE_CELLS,
    find,
)
from metrics.likelihood import Tables, fit, scores
from metrics.protocol import from_features, measure
from model import add_to_checkpoint, save_checkpoint
from options import default_options, parse_options, run
from progress import Progress
from T_Graph import build_text_graph
from writing import write_text

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
        if images.has_file[i]:
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
    if not any(images.has_file):
        return None
    known = statements_in(list(itertools.chain(*captions)), images.label_map)
    remaining = iter(known)
    statements = [list(itertools.islice(remaining, len(own))) for own in captions]
    return fit(found_in(images), statements, len(images.label_map))


def evidence_of(tables, images, captions):
    """The `scores` of an ImageSet and captions, (I, T)."""
    return scores(tables, found_in(images), statements_in(captions, images.label_map))


def weighted_scores(evidence, found, statements, images, texts):
    """The weighted `scores` of some images and texts, by arrays of their numbers: (M, N).

    found: of all images. statements: of all texts. With these three given (functools.partial) it is
    the evidence that `metrics.protocol.from_features` takes.
    """
    some_found = [found[i] for i in images]
    some_statements = [statements[t] for t in texts]
    return evidence.weight * scores(evidence.tables, some_found, some_statements)


def _weighted_block(weight, matrix, images, texts):
    """weight x some images and texts of the evidence (I, T)."""
    return weight * matrix[np.ix_(images, texts)]


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
            weighted = partial(_weighted_block, weight, own)
            total += measure(from_features(*features, evidence=weighted))["mR"]
        mean[weight] = total / len(splits)
    return max(mean, key=mean.get), mean


def fit_beside(model, data, device, batch_size=64, workers=0):
    """Evidence beside a model, from a `training.inputs.TrainingData`; None without detection files.

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

    choice: "auto" for the weight that was chosen on validation, "off", or a weight, for which a
    checkpoint without tables gets the `shipped_tables`. Raises ValueError for damaged tables.
    """
    weight = None if choice in ("auto", "off") else choice
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


# ------------------------------------------------------------------ the command


def kind_names(label_map):
    """The first name of each kind by class id, "other" included: (K)."""
    return [*(line.split(",")[0].strip() for line in label_map.lines), "other"]


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


NAME_THE_DATA = "{}: not trained here; name its data: --dataset NAME"
OF_DATA = ("dataset", "data_root", "det_json", "annotations", "caption_form", "dev_images")


def main(arguments=None):
    """Fit tables beside a model, choose their weight, and write both as a checkpoint."""
    from training.inputs import find_data, read_data  # the command alone reads data sets

    options = parse_options("evidence", __doc__, arguments, unset=OF_DATA)
    given = {name: getattr(options, name) for name in OF_DATA}
    if Path(options.out).exists():
        raise ValueError(f"--out {options.out}: is there already; name a new file")
    usual = {**default_options("train"), "dataset": None}
    label_map = read_label_map(options.labels) if options.labels else None
    if clip.is_clip_source(options.checkpoint):  # before a CLIP is downloaded
        if not options.dataset:
            raise ValueError(NAME_THE_DATA.format(options.checkpoint))
        find_data(merged(given, usual))
    device = pick_device(options.device)
    model, checkpoint = load_model(options.checkpoint, device, options.activation)
    is_plain = "path" in checkpoint
    if options.labels and not is_plain:
        raise ValueError(f"--labels: {options.checkpoint} has its own; leave it out")
    if not (options.dataset or checkpoint["options"]["dataset"]):
        raise ValueError(NAME_THE_DATA.format(options.checkpoint))
    if label_map is None:
        label_map = LabelMap(checkpoint["labels"])
    of_data = {**merged(given, {**usual, **checkpoint["options"]}), "augment": []}
    data = read_data(find_data(of_data), of_data, checkpoint["definition"], label_map)
    evidence = fit_beside(model, data, device, options.batch_size, options.workers)
    if evidence is None:
        raise ValueError("no training image has a detection file; name their folder by --det-json")
    if is_plain:
        saved = {**checkpoint["options"], **{name: of_data[name] for name in OF_DATA}}
        save_checkpoint(
            options.out,
            model,
            checkpoint["definition"],
            label_map.lines,
            saved,
            evidence=as_field(evidence),
        )
    else:
        add_to_checkpoint(options.checkpoint, out=options.out, evidence=as_field(evidence))
    print(f"written to {options.out}")
    if options.json:
        write_text(options.json, json.dumps(in_json(evidence, label_map), indent=1) + "\n")
        print(f"written to {options.json}")


if __name__ == "__main__":
    run(main)
