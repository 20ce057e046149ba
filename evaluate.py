"""Retrieval metrics by the field's protocol, and the script that measures checkpoints.

    python evaluate.py                                          # models/best_model.pth, test split
    python evaluate.py --checkpoint A.pth B.pth --dataset ucm rsicd --data-root U R --json out.json
    python evaluate.py --checkpoint ViT-B/32 --dataset ucm --data-root U --ranks r.csv --html r.html
    python evaluate.py --compare a.json b.json                  # how two result files differ

Image to text: best rank of any of the image's captions. Text to image: rank of its image. R@K is
the share of queries with a rank of at most K, mR the mean of the six. Ranks are expectations under
random order of the tied (see ranks.py); the pessimistic and optimistic bounds are printed where
they differ by 0.1 point or more. Codes that sort print one order-dependent value between these
bounds. Intervals are 95 %, over images (see intervals.py). Each data set is a gallery of its own.

The module shadows the PyPI package of the same name: run from the root of this project.
Sizes in the shapes below: I images, T caption rows, E the embedding width.
"""

import hashlib
import math
import shlex
import sys
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import metrics.tables as report
from clip_gcn_image_feature_integration import (
    encode_images,
    encode_texts,
    load_model,
    pick_device,
    warn_of_scenes,
)
from dataloader import RetrievalData, sources
from dataset.annotations import normal_form
from dataset.batches import require_readable
from det_formats.det_json import LabelMap
from metrics import page
from metrics.intervals import bootstrap, compare
from metrics.ranks import (
    DIRECTIONS,
    KS,
    per_image,
    query_rows,
    retrieval,
    top_items,
    worst_and_best,
)
from options import DATA, FREE, parse_options


def _mean(values):
    """Exactly rounded, so that the order of the values does not matter."""
    return math.fsum(values) / len(values)


def metrics(image_to_text, text_to_image, ks=KS):
    """Recalls in percent with bounds, mR, mean and median of the expected ranks, as a dict."""
    result = {}
    for name, ranks, gallery in (
        ("image_to_text", image_to_text, len(text_to_image.better)),
        ("text_to_image", text_to_image, len(image_to_text.better)),
    ):
        if max(ks) > gallery:
            raise ValueError(f"R@{max(ks)} {name}: the gallery has only {gallery} items")
        recalls = {f"R@{k}": [100 * _mean(r) for r in ranks.recall(k)] for k in ks}
        result[name] = {key: values[1] for key, values in recalls.items()}
        result[name]["mean_rank"] = _mean(ranks.expected())
        result[name]["median_rank"] = float(np.median(ranks.expected()))
        result[name]["pessimistic"] = {key: values[0] for key, values in recalls.items()}
        result[name]["optimistic"] = {key: values[2] for key, values in recalls.items()}
    both = [result[direction] for direction in DIRECTIONS]
    result["mR"] = _mean([side[f"R@{k}"] for side in both for k in ks])
    for bound in ("pessimistic", "optimistic"):
        result[f"mR_{bound}"] = _mean([side[bound][f"R@{k}"] for side in both for k in ks])
    return result


# ------------------------------------------------------------------ features, models


def from_features(image_features, text_features, image_of_text, captions=None):
    """The `ranks.Retrieval` of features (I, E) and (T, E), scored by their products in float64.

    image_of_text: (T,). With `captions`, the T strings, identical ones (stripped, case folded)
    count as the same caption. Equal features are scored once, in an order of their own: ties are
    exact, and neither batch size nor row order matters.
    """
    distinct_images, image_index = _distinct(image_features)
    distinct_texts, text_index = _distinct(text_features)
    scores = (distinct_images @ distinct_texts.T)[image_index]  # (I, distinct texts)
    groups = None
    if captions is not None:
        groups = np.unique([normal_form(text) for text in captions], return_inverse=True)[1]
    return retrieval(scores, image_of_text, text_index, groups)


def _distinct(features):
    """Distinct rows in float64, sorted, and each row's place among them."""
    values, index = torch.unique(torch.as_tensor(features), dim=0, return_inverse=True)
    return values.double().numpy(), index.numpy()


def measure(found, ks=KS):
    """`metrics` of a Retrieval, with the numbers of images and texts."""
    images, texts = found.scores.shape
    counts = {"images": images, "captions": len(found.text_index), "distinct_texts": texts}
    return {**counts, **metrics(*found.ranks(), ks)}


def retrieval_metrics(image_features, text_features, image_of_text, captions=None, ks=KS):
    """The protocol on features, which are given as to `from_features`: the dict of `measure`.

    Raises ValueError on NaN, on an image without caption, and on a k beyond the gallery.
    """
    return measure(from_features(image_features, text_features, image_of_text, captions), ks)


def retrieve(
    model, images, records, device, batch_size=64, workers=0, equivalence=False, text_features=None
):
    """Encode a split, every image and every distinct caption once, to a `ranks.Retrieval`.

    text_features: those of the captions (T, E), where they are known.
    """
    captions = [caption for record in records for caption in record.captions]
    owners = [i for i, record in enumerate(records) for _ in record.captions]
    image_features = encode_images(model, images, device, batch_size, workers)["fused"]
    if text_features is None:
        text_features = encode_texts(model, captions, device)
    return from_features(image_features, text_features, owners, captions if equivalence else None)


def evaluate(model, images, records, device, batch_size=64, workers=0, text_features=None):
    """Encode a split and measure it: the dict of `measure`."""
    how = device, batch_size, workers, False, text_features
    return measure(retrieve(model, images, records, *how))


# ------------------------------------------------------------------ the script


def merged(given, saved):
    """Options of a checkpoint, replaced by those given on the command line (not None).

    A data set that the checkpoint was trained on keeps its places, of which --data-root leaves the
    form of its annotations only; another brings its own.
    """
    given = {name: value for name, value in given.items() if value is not None}
    names = given.get("dataset", saved["dataset"])
    places = {"data_root": None, "det_json": None, "annotations": None}
    for option in places if "data_root" not in given else ("annotations",):
        known = dict(zip(saved["dataset"] or [], saved[option] or [], strict=False))
        if any(known.get(name) for name in names):
            places[option] = [known.get(name) for name in names]
    return {**saved, **places, **given}


def _alone(settings, source):
    """Settings for one of the data sets that they name."""
    det_json = None if source.det_json is None else [source.det_json]
    names = {"dataset": [source.name], "data_root": [str(source.root)]}
    return {**settings, **names, "det_json": det_json, "annotations": [source.form]}


class Job(NamedTuple):
    """A checkpoint, by its path or name, and a split of a data set to measure it on."""

    checkpoint: str
    data: RetrievalData
    images: object  # the split's ImageSet


def prepare(options, given, load):
    """The jobs that the options name, all their data read: what is wrong there is found at once."""
    jobs, decoded = [], {}
    for name in options.checkpoint:
        saved = load(name)[1]
        if not (given["dataset"] or saved["options"]["dataset"]):
            raise ValueError(f"{name}: a plain CLIP; name its data: --dataset NAME --data-root DIR")
        settings = merged(given, saved["options"])
        named = sources(settings)
        if options.html and len(options.checkpoint) * len(named) > 1:
            raise ValueError("--html shows one result: give one --checkpoint and one --dataset")
        if any(source.name != "scenes" for source in named):
            warn_of_scenes(saved)
        for source in named:
            data = RetrievalData(_alone(settings, source), source)
            jobs.append(Job(name, data, _shared_images(decoded, data, options.split, saved)))
    return jobs


def _shared_images(decoded, data, split, saved):
    """The split's ImageSet; one that an earlier checkpoint had too is not decoded again."""
    settings, image_size = data.options, saved["definition"]["image_size"]
    exchanged = settings["seed"] if settings["graph_control"] == "exchanged" else None
    published = settings["graph"] == "published"
    how = settings["max_objects"], settings["graph_control"], exchanged, published
    key = str((data.files(split), image_size, saved["labels"], how))
    place = data.name, split, data.annotations.origin
    if place not in decoded:
        decoded[place] = None
        data.report()
    if key not in decoded:
        decoded[key] = data.image_set(split, image_size, LabelMap(saved["labels"]))
        require_readable(decoded[key])
    return decoded[key]


def _content(job, saved, options, given, found):
    """A result as it is written to --json."""
    path, records = Path(saved.get("path", job.checkpoint)), job.data.records(options.split)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    table = per_image(found, [record.name for record in records], KS)
    return {
        "dataset": job.data.name,
        "split": options.split,
        "origin": job.data.annotations.origin,
        "checkpoint": job.checkpoint,
        "checkpoint_sha256": digest,  # of the file, for a CLIP's name or folder too
        "definition": saved["definition"],
        "epoch": saved.get("epoch"),
        "caption_equivalence": options.caption_equivalence,
        "data_options": {name: job.data.options[name] for name in given},
        "training_options": saved["options"],
        "left_out": saved.get("left_out"),
        **measure(found),
        "intervals": bootstrap(table),
        "per_image": table,
    }


def _write_queries(job, options, result, found, rows):
    """Add a result's queries to those for --ranks, and write --html."""
    captions = [text for record in job.data.records(options.split) for text in record.captions]
    own = query_rows(found, result["per_image"]["names"], captions)
    rows += [{"checkpoint": job.checkpoint, "dataset": job.data.name, **row} for row in own]
    if options.html:
        chosen = worst_and_best(own)
        for query in (query for queries in chosen.values() for query in queries):
            query["items"] = top_items(found, captions, query["direction"], query["query"])
        page.write_page(options.html, result, chosen, *job.data.files(options.split)[:2])


def parse(arguments=None):
    """(this script's options, the data's, which are None where the checkpoint's shall hold)."""
    options = parse_options("evaluate", __doc__, arguments, unset=DATA)
    return options, {name: getattr(options, name) for name in DATA}


def _compare_files(paths):
    """Print how two result files differ, and return the comparisons."""
    first, second = map(report.read_results, paths)
    try:
        found = compare(first, second, FREE)
    except ValueError as error:
        raise ValueError(f"--compare {' '.join(paths)}: {error}") from None
    print(report.comparison(found))
    held = [{f"{result['dataset']} {result['split']}" for result in own} for own in (first, second)]
    for place in sorted(held[0] ^ held[1]):
        print(f"{place}: in one of the files only")
    return found


def main(arguments=None):
    """Measure, print and write; returns a list of results, by checkpoint and data set."""
    options, given = parse(arguments)
    if options.compare:
        return _compare_files(options.compare)
    device = pick_device(options.device)
    # Read twice where there are several, so that only one at a time is in memory.
    load = lru_cache(maxsize=1)(partial(load_model, device=device, activation=options.activation))
    results, rows = [], []
    for job in prepare(options, given, load):
        model, saved = load(job.checkpoint)
        records, workers = job.data.records(options.split), job.data.options["workers"]
        how = device, options.batch_size, workers, options.caption_equivalence
        found = retrieve(model, job.images, records, *how)
        results.append(_content(job, saved, options, given, found))
        if options.ranks or options.html:
            _write_queries(job, options, results[-1], found, rows)
    print(report.table(results, FREE))
    if options.json:
        command = sys.argv[1:] if arguments is None else arguments
        report.write_results(options.json, shlex.join(["python", "evaluate.py", *command]), results)
    if options.ranks:
        which = ("checkpoint", "dataset") if len(results) > 1 else ()
        report.write_ranks(options.ranks, rows, which)
    for path in filter(None, (options.json, options.ranks, options.html)):
        print(f"written to {path}")
    return results


if __name__ == "__main__":
    main()
