"""Measure checkpoints on data sets by the field's protocol of retrieval.

    python evaluate.py                                          # the latest run, test split
    python evaluate.py --checkpoint A.pth B.pth --dataset ucm rsicd --data-root U R --json out.json
    python evaluate.py --checkpoint ViT-B/32 --dataset ucm --data-root U --ranks r.csv --html r.html
    python evaluate.py --fine                                   # reads it counts and relations?
    python evaluate.py --compare a.json b.json                  # how two result files differ
    torchrun --nproc_per_node=2 evaluate.py ...                 # encode on two GPUs

Figures follow the field's protocol (see metrics/protocol.py). Ranks are expectations under random
order of the tied (see metrics/ranks.py); the pessimistic and optimistic bounds are printed where
they differ by 0.1 point or more. Codes that sort print one order-dependent value between these
bounds. Intervals are 95 %, of one run over images, of several over seeds too (see
metrics/intervals.py). Each data set is a gallery of its own.

The module shadows the PyPI package of the same name: run from the root of this project.
Sizes in the shapes below: I images, T captions, D the embedding width, Q queries, A texts of each.
"""

from options import answer_early

if __name__ == "__main__":
    answer_early("evaluate", __doc__)  # before torch is imported, which takes seconds

import hashlib
import itertools
import shlex
import sys
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

import clip
import processes
from clip_gcn_image_feature_integration import (
    encode_split,
    encode_texts,
    load_model,
    pick_device,
    plain_options,
    warn_of_scenes,
)
from dataloader import RetrievalData, merged, prepare_source, require_files, sources
from dataset.batches import ImageSet, require_readable
from det_formats.det_json import LabelMap
from evidence import found_in, of_checkpoint, statements_in, weighted_scores
from metrics.fine import fine_measures, fine_table
from metrics.intervals import bootstrap, compare
from metrics.likelihood import scores
from metrics.protocol import from_features, measure
from metrics.queries import query_rows, top_items, worst_and_best
from metrics.ranks import KS, per_image
from metrics.result_page import write_page
from metrics.tables import comparison, read_results, table, write_ranks, write_results
from model import latest_checkpoint, object_limit
from options import DATA, FREE, given_options, parse_options, run

# ------------------------------------------------------------------ a model on a split


def captions_of(records):
    """The captions of all records, one after another."""
    return [caption for record in records for caption in record.captions]


def retrieve(split, images, evidence=None, equivalence=False):
    """The `ranks.Retrieval` of a `SplitFeatures` of an ImageSet.

    evidence: an `evidence.Evidence`, to be added to the cosines. equivalence: whether equal
    captions fit equal images.
    """
    added = None
    if evidence is not None:
        statements = statements_in(split.captions, images.label_map)
        added = partial(weighted_scores, evidence, found_in(images), statements)
    return from_features(
        split.images,
        split.texts,
        split.image_of_text,
        captions=split.captions if equivalence else None,
        evidence=added,
    )


def evaluate(model, images, records, device, batch_size=64, workers=0, text_features=None):
    """Encode a split and measure it: the dict of `measure`. Arguments: those of `encode_split`."""
    split = encode_split(model, images, records, device, batch_size, workers, text_features)
    return measure(retrieve(split, images))


# ------------------------------------------------------------------ what is measured


def options_of_one(options, source):
    """The options with one of the data sets that they name, a `dataloader.Source`, alone."""
    return {
        **options,
        "dataset": [source.name],
        "data_root": [str(source.root)],
        "det_json": None if source.det_json is None else [source.det_json],
        "annotations": [source.form],
    }


class Job(NamedTuple):
    """A checkpoint, by its path or name, and a split of a data set to measure it on."""

    checkpoint: str
    data: RetrievalData
    images: ImageSet  # the split's


def prepare(options, given, load):
    """The jobs that the options name, all their data read: what is wrong there is found at once.

    given: the options of the data, None where the checkpoint's hold. load: gives (model, saved) of
    a checkpoint. A CLIP's name, which may be a download, is loaded after its data are looked at.
    """
    jobs = []
    image_sets = {}  # by their ImageContent
    reported = set()
    for name in options.checkpoint:
        is_name = clip.is_clip_source(name)
        saved_options = plain_options() if is_name else load(name)[1]["options"]
        if not (given["dataset"] or saved_options["dataset"]):
            raise ValueError(f"{name}: a plain CLIP; name its data: --dataset NAME --data-root DIR")
        data_options = merged(given, saved_options)
        named = sources(data_options)
        if options.html and len(options.checkpoint) * len(named) > 1:
            raise ValueError("--html shows one result: give one --checkpoint and one --dataset")
        data_sets = []
        for source in named:
            prepare_source(source)
            data = RetrievalData(options_of_one(data_options, source), source)
            place = data.name, data.annotations.origin
            if place not in reported:
                reported.add(place)
                data.report()
            data_sets.append(data)
        require_files(data_sets, [(options.split,)] * len(data_sets))
        _, saved = load(name)
        if any(source.name != "scenes" for source in named):
            warn_of_scenes(saved)
        for data in data_sets:
            content = image_content(data, options.split, saved)
            if content not in image_sets:
                image_sets[content] = _read_images(data, options.split, saved)
            jobs.append(Job(name, data, image_sets[content]))
    return jobs


class ImageContent(NamedTuple):
    """All that decides what an ImageSet holds: checkpoints for which it is equal share the set.

    So the images are decoded twice where one model has a graph branch and another has none.
    """

    files: tuple
    detections: tuple  # a file or None for each image
    problems: tuple  # images that were not found
    image_size: int
    labels: tuple
    max_objects: int
    graph: str  # where graphs are not an image's own, or have no edges: --graph
    exchange_seed: int | None  # None where no graphs are exchanged


def image_content(data, split, saved):
    """The ImageContent of a split of RetrievalData for a checkpoint's model."""
    files, detections, problems = data.files(split)
    exchanged = data.options["graph"] == "exchanged"
    return ImageContent(
        files=tuple(files),
        detections=tuple(detections),
        problems=tuple(problems),
        image_size=saved["definition"]["image_size"],
        labels=tuple(saved["labels"]),
        max_objects=object_limit(data.options),
        graph=data.options["graph"],
        exchange_seed=data.options["seed"] if exchanged else None,
    )


def _read_images(data, split, saved):
    """The ImageSet of a split for a checkpoint's model; ValueError for images that are not read."""
    images = data.image_set(split, saved["definition"]["image_size"], LabelMap(saved["labels"]))
    require_readable(images)
    return images


# ------------------------------------------------------------------ scores of any texts

TEXTS = 2000  # whose evidence for all images is in memory at once


class Scored(NamedTuple):
    """Scores of texts for the images that they are asked of, and their means over all images."""

    own: np.ndarray  # (Q, A)
    blind: np.ndarray  # (Q, A)


class Scorer:
    """Scores any texts for the images of a split as `retrieve` does, without and with evidence.

    Texts of equal tokens have equal cosines, to the bit.
    """

    def __init__(self, model, images, split, evidence, device):
        self._model = model
        self._device = device
        self._label_map = images.label_map
        self._features = split.images.double().numpy()  # (I, D)
        self._evidence = evidence
        self._found = None if evidence is None else found_in(images)

    def scored(self, images, texts):
        """(`Scored` by the cosine, with evidence or None) of Q lists of A texts, images (Q,)."""
        images = np.array(images)
        numbers = {}  # of the distinct texts
        for text in itertools.chain(*texts):
            numbers.setdefault(text, len(numbers))
        features = encode_texts(self._model, list(numbers), self._device).double().numpy()
        index = np.array([[numbers[text] for text in own] for own in texts])  # (Q, A)
        mean = self._features.mean(axis=0)  # (D)
        parts = []
        step = max(1, TEXTS // index.shape[1])
        for start in range(0, len(index), step):
            part = slice(start, start + step)
            of_texts = features[index[part]]  # (queries, A, D)
            own = (of_texts * self._features[images[part], None]).sum(axis=-1)
            blind = (of_texts * mean).sum(axis=-1)
            added = self._added(images[part], texts[part])
            parts.append((own, blind, own + added.own, blind + added.blind))
        own, blind, own_added, blind_added = (
            np.concatenate(part) for part in zip(*parts, strict=True)
        )
        if self._evidence is None:
            return Scored(own, blind), None
        return Scored(own, blind), Scored(own_added, blind_added)

    def _added(self, images, texts):
        """Weighted evidence as `Scored`, 0 without any."""
        if self._evidence is None:
            return Scored(0.0, 0.0)
        tables, weight = self._evidence
        statements = statements_in(list(itertools.chain(*texts)), self._label_map)
        all_scores = scores(tables, self._found, statements).astype(np.float64)
        all_scores = all_scores.reshape(len(self._found), len(texts), -1)  # (I, queries, A)
        own = all_scores[images, np.arange(len(texts))]
        return Scored(weight * own, weight * all_scores.mean(axis=0))


# ------------------------------------------------------------------ the script


def _result(job, saved, options, given, found, evidence):
    """A result as it is written to --json. evidence: an Evidence or None."""
    records = job.data.records(options.split)
    is_plain_clip = "path" in saved
    table_by_image = per_image(found, [record.name for record in records], KS)
    return {
        "dataset": job.data.name,
        "split": options.split,
        "origin": job.data.annotations.origin,
        "checkpoint": job.checkpoint,
        # Of the file, for a CLIP's name or folder too.
        "checkpoint_sha256": saved["sha256"],
        # Of what --clip named in training; a plain CLIP is where it starts.
        "start_sha256": saved["sha256"] if is_plain_clip else saved.get("start_sha256"),
        "definition": saved["definition"],
        "epoch": saved.get("epoch"),
        "caption_equivalence": options.caption_equivalence,
        "evidence_weight": None if evidence is None else evidence.weight,
        "data_options": {name: job.data.options[name] for name in given},
        "training_options": saved["options"],
        "left_out": saved.get("left_out"),
        **measure(found),
        "intervals": bootstrap([table_by_image]),
        "objects": [len(class_ids) for class_ids, _ in job.images.boxes],
        "per_image": table_by_image,
    }


def _page_arguments(job, split, result, found, queries):
    """What `write_page` takes: a result's worst and best queries, each with its top items."""
    captions = captions_of(job.data.records(split))
    chosen = worst_and_best(queries)
    for own in chosen.values():
        for query in own:
            query["items"] = top_items(found, captions, query["direction"], query["query"])
    files, detections, _ = job.data.files(split)
    return result, chosen, files, detections


def _require_alone(name, all_given):
    """Raise ValueError where other options stand beside one that uses none of them."""
    for other in sorted(set(all_given) - {name, "debug"}):
        flag = other.replace("_", "-")
        raise ValueError(f"--{flag} does nothing with --{name}: leave it out")


def _compare_files(paths):
    """Print how two result files differ, and return the comparisons."""
    first, second = [read_results(path) for path in paths]
    try:
        found = compare(first, second, FREE)
    except ValueError as error:
        raise ValueError(f"--compare {' '.join(paths)}: {error}") from None
    print(comparison(found))
    places_of_first = {f"{result['dataset']} {result['split']}" for result in first}
    places_of_second = {f"{result['dataset']} {result['split']}" for result in second}
    for place in sorted(places_of_first ^ places_of_second):
        print(f"{place}: in one of the files only")
    return found


def main(arguments=None):
    """Measure, print and write; returns a list of results, by checkpoint and data set.

    Of several processes all encode; the first one alone measures, prints and writes.
    """
    options = parse_options("evaluate", __doc__, arguments, unset=DATA)
    given = {name: getattr(options, name) for name in DATA}  # None: the checkpoint's shall hold
    with processes.group(options.device, "start the same command again"):
        if options.compare:
            _require_alone("compare", given_options("evaluate", __doc__, arguments))
            return _compare_files(options.compare)
        with processes.first_of_machine_first():
            options.checkpoint = options.checkpoint or [latest_checkpoint()]
        return _measured(options, given, arguments)


def _measured(options, given, arguments):
    """What `main` gives, of parsed options."""
    device = pick_device(options.device)

    digests = {}

    @lru_cache(maxsize=1)  # several are read twice: only one at a time shall be in memory
    def load(checkpoint):
        model, saved = load_model(checkpoint, device, options.activation)
        content = Path(saved.get("path", checkpoint)).read_bytes()
        saved["sha256"] = hashlib.sha256(content).hexdigest()
        if digests.setdefault(checkpoint, saved["sha256"]) != saved["sha256"]:
            raise ValueError(f"{checkpoint}: changed meanwhile; evaluate it when its run has ended")
        return model, saved

    with processes.first_of_machine_first():
        jobs = prepare(options, given, load)
    results, rows, page = [], [], None
    for job in jobs:
        model, saved = load(job.checkpoint)
        evidence = of_checkpoint(saved, options.evidence)
        records = job.data.records(options.split)
        split = encode_split(
            model, job.images, records, device, options.batch_size, options.workers
        )
        if not (processes.is_first() or options.fine):  # all of them encode --fine's texts
            continue
        found = retrieve(split, job.images, evidence, options.caption_equivalence)
        result = _result(job, saved, options, given, found, evidence)
        if options.fine:
            plain = retrieve(split, job.images, None, options.caption_equivalence)
            result["fine"] = fine_measures(
                scorer=Scorer(model, job.images, split, evidence, device),
                records=records,
                label_map=job.images.label_map,
                class_ids=[job.images.boxes[source][0] for source in job.images.source],
                root=job.data.root,
                caption_form=job.data.options["caption_form"],
                retrievals=(plain, None if evidence is None else found),
            )
        results.append(result)
        if options.ranks or options.html:
            queries = query_rows(found, result["per_image"]["names"], captions_of(records))
            for query in queries:
                rows.append({"checkpoint": job.checkpoint, "dataset": job.data.name, **query})
            if options.html:
                page = _page_arguments(job, options.split, result, found, queries)
    if not processes.is_first():
        return results
    print(table(results, FREE), flush=True)  # before a file is written: one may fail
    for result in results:
        if options.fine:
            place = f"{result['checkpoint']}, {result['dataset']} {result['split']}"
            print("\n" + fine_table(result["fine"], place), flush=True)
    words = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "evaluate.py", *words])
    further = ("checkpoint", "dataset") if len(results) > 1 else ()
    problems = []
    for path, write, content in (
        (options.json, write_results, (command, results)),
        (options.ranks, write_ranks, (rows, further)),
        (options.html, write_page, page),
    ):
        if path:
            problems += _written(path, write, content)
    if problems:
        raise OSError("; ".join(problems))
    return results


def _written(path, write, content):
    """Write a file by write(path, *content) and say so; a list of what went wrong."""
    try:
        write(path, *content)
    except OSError as error:  # which names the path
        return [str(error)]
    except ValueError as error:
        return [f"{path}: not written ({error})"]
    print(f"written to {path}")
    return []


if __name__ == "__main__":
    run(main)
