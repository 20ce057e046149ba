"""Loads RSITMD, RSICD, UCM or a data set of your own: captions, splits, images, detections.

A data set is a folder: annotations (see dataset/annotations.py), image files anywhere below it,
found by stem, and detections in `det_json/`. The options name one or several, which train together.
What is missing or contradictory is said before training starts.
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import processes
from dataset import images, scenes
from dataset.annotations import read_annotations, with_validation
from dataset.batches import ImageSet, require_none
from dataset.cache import RAM_GIB
from escaping import escaped
from model import object_limit
from progress import Progress

VAL_FRACTION = 0.1  # of the training images, where no validation split is shipped


DEV_SEED = 0  # one dev split for all seeds, so that their models were chosen on the same images


# ------------------------------------------------------------------ which data sets


class Source(NamedTuple):
    """A data set's name and places."""

    name: str
    root: Path
    det_json: str | None  # as --det-json gives it; None: the root's own, if there is one
    form: str  # of the annotations: one of dataset.annotations.FORMS


PLACES = ("data_root", "det_json", "annotations")  # options with a value for each data set


def merged(given, saved):
    """Options of a checkpoint, replaced by those given on the command line (not None).

    A data set that the checkpoint was trained on keeps its places, of which --data-root leaves the
    form of its annotations only; another brings its own.
    """
    given = {name: value for name, value in given.items() if value is not None}
    data_sets = given.get("dataset", saved["dataset"])
    kept = ("annotations",) if "data_root" in given else PLACES
    places = dict.fromkeys(PLACES)  # None, which means the default
    for option in kept:
        places[option] = _values_of(data_sets, saved, option)
    return {**saved, **places, **given}


def _values_of(data_sets, saved, option):
    """A saved option's values of the data sets, None for new ones; None if there is no value."""
    if not saved["dataset"] or not saved[option]:
        return None
    value_of = dict(zip(saved["dataset"], saved[option], strict=True))
    values = [value_of.get(name) for name in data_sets]
    return values if any(values) else None


def sources(options):
    """The data sets that the options (a dict) name; ValueError where the lists do not fit."""
    names = options["dataset"]
    if len(set(names)) < len(names):
        raise ValueError(f"--dataset {' '.join(names)}: a name is there twice")
    roots = _one_each(options, "data_root")
    det_jsons = _one_each(options, "det_json")
    forms = _one_each(options, "annotations")
    found = []
    for name, root, det_json, form in zip(names, roots, det_jsons, forms, strict=True):
        if root is None and name == "scenes":
            root = scenes.FOLDER
        if root is None:
            raise ValueError(f"--dataset {name} needs --data-root, the folder it lies in")
        found.append(Source(name, Path(root), det_json, form or "auto"))
    return found


def _one_each(options, name):
    """The values of an option that goes with --dataset, None for each where it is not given."""
    data_sets = options["dataset"]
    values = options[name] or [None] * len(data_sets)
    if len(values) != len(data_sets):
        flag = "--" + name.replace("_", "-")
        raise ValueError(f"{flag}: {len(values)} given for --dataset {' '.join(data_sets)}")
    return values


def det_json_folder(source):
    """Folder of a Source's detections, there or not; ValueError where a given one is not there."""
    if source.det_json is None:
        return source.root / "det_json"
    images.require_detection_folder(source.det_json)
    return Path(source.det_json)


def prepare_source(source):
    """Generate the synthetic scenes where a Source names them and they are not there yet."""
    if source.name == "scenes" and not scenes.is_complete(source.root):
        scenes.generate(source.root)


def read_data_sets(options):
    """A RetrievalData for each data set that the options name, reported: for training.

    Raises ValueError where detections are asked for by --det-json and no training image has one:
    there would be nothing for a graph branch or the evidence to learn from.
    """
    data_sets = []
    for source in sources(options):
        prepare_source(source)
        data = RetrievalData(options, source)
        if source.det_json is not None:
            data.require_objects("train")
        data_sets.append(data)
    for data in data_sets:
        data.report()
    return data_sets


class RetrievalData:
    """A data set: splits of records, image files, detections.

    options: a dict of the data's options (see options.py); source: one of `sources`. Construction
    reads annotations and file names; `image_set(split)` decodes. Raises ValueError where a folder
    is missing, or annotations or detections are not certain.

    name, root         of the source
    annotations        as dataset.annotations gives them, a validation split among them
    drawn_split        names by split where a validation split was drawn, to be saved; else None
    validation         the split to choose a model on: "val", or "dev" with --dev-images
    held_out           the splits that no training image may stand in: all for validation or test
    index, detections  image files by stem; detection files by image file, or None
    det_json           folder of the detections, or None
    """

    def __init__(self, options, source):
        self.options = options
        self.name = source.name
        self.root = source.root
        if not self.root.is_dir():
            raise ValueError(f"{self.root}: no such folder; check --data-root")
        folder = det_json_folder(source)
        self.det_json = folder if folder.is_dir() else None
        self._read_splits(source.form)
        self.index = images.index_images(self.root)
        self.detections = {}
        if self.det_json is not None:
            all_paths = [path for paths in self.index.values() for path in paths]
            self.detections = images.match_detections(all_paths, self.det_json)

    def _read_splits(self, form):
        annotations = read_annotations(self.root, form, self.options["caption_form"])
        dev_images = self.options["dev_images"]
        self.annotations, self.drawn_split = with_validation(
            annotations,
            fraction=VAL_FRACTION,
            seed=DEV_SEED if dev_images else self.options["seed"],
            dev_images=dev_images,
        )
        self.validation = "dev" if dev_images else "val"
        held_out = ["test", "val", "dev"] if dev_images else ["test", "val"]
        self.held_out = [split for split in held_out if self.has(split)]

    def has(self, split):
        """Whether there is such a split."""
        return bool(self.annotations.splits.get(split))

    def records(self, split):
        """The split's records; ValueError that names the splits there are."""
        if not self.has(split):
            known = ", ".join(name for name in self.annotations.splits if self.has(name))
            message = f"{self.root}: no split '{split}'; there are {known}"
            if split == "dev" and self.options["dev_images"]:
                message += "; --dev-images is not below the number of training images"
            raise ValueError(message)
        return self.annotations.splits[split]

    def files(self, split):
        """(image files, their detection files or None, problems) in the order of the records."""
        paths = []
        detections = []
        problems = []
        for record in self.records(split):
            try:
                path = images.find_image(record.name, self.index, self.root)
            except ValueError as error:
                problems.append(str(error))
                continue
            paths.append(self.root / path)
            detections.append(self.detections.get(path))
        return paths, detections, problems

    def require_objects(self, split):
        """Raise ValueError where no image of a split has an object from the detections."""
        paths, files, _ = self.files(split)
        if paths and not images.have_objects(files):
            raise ValueError(self.no_objects(paths, files))

    def no_objects(self, paths, files):
        """The line that says why none of these images has an object."""
        names = [path.relative_to(self.root).as_posix() for path in paths]
        return images.no_objects(names, files, self.det_json)

    def image_set(self, split, image_size, label_map):
        """The split's ImageSet, in the order of its records; says what is missing."""
        return joint_image_set([self], split, image_size, label_map)

    def report(self):
        """Print the origin and sizes of the splits, and what was blank."""
        splits = self.annotations.splits
        sizes = ", ".join(f"{escaped(name)} {len(records)}" for name, records in splits.items())
        print(f"{self.name}: {self.annotations.origin}; images: {sizes}")
        self._report_left_out(self.annotations.blank, "blank captions dropped")
        self._report_left_out(self.annotations.empty, "images left out for want of captions")

    def _report_left_out(self, places, what):
        if places:
            first = ", ".join(escaped(place) for place in places[:10])
            more = ", ..." if len(places) > 10 else ""
            print(f"{self.name}: {len(places)} {what}: {first}{more}")


def require_files(data_sets, split_names):
    """Raise ValueError where an image file is missing, before any is decoded.

    split_names: of each data set, the names of the splits that are looked at. Only where one is
    missing all others are opened, so that the error names the unreadable ones too.
    """
    paths = []
    problems = []
    for data, names in zip(data_sets, split_names, strict=True):
        for split in names:
            own_paths, _, own_problems = data.files(split)
            paths += own_paths
            problems += own_problems
    if problems:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            faults = pool.map(images.fault_of, paths)
            title = "look for unreadable images too"
            problems += filter(None, Progress(faults, title, "images", total=len(paths)))
    require_none(problems)


def joint_image_set(data_sets, split, image_size, label_map):
    """One ImageSet of a split of all data sets, one after another.

    It says what is missing, and on standard error what seems wrong with the detections.
    """
    parts = []  # (data set, number of its first image, and of the next one's)
    paths = []
    detections = []
    problems = []
    captions = 0
    for data in data_sets:
        own_paths, own_detections, own_problems = data.files(split)
        parts.append((data, len(paths), len(paths) + len(own_paths)))
        paths += own_paths
        detections += own_detections
        problems += own_problems
        captions += sum(len(record.captions) for record in data.records(split))
    options = data_sets[0].options  # the same for all
    result = ImageSet(
        paths,
        detections,
        image_size=image_size,
        label_map=label_map,
        max_objects=object_limit(options),
        # Processes that share a run share the pixels too, as a file that is decoded once.
        ram_gib=0 if processes.several() else RAM_GIB,
        exchange=options["seed"] if options["graph"] == "exchanged" else None,
        edges=options["graph"] != "no-edges",
        published=options["graph"] == "published",
    )
    result.problems = problems + result.problems
    names = " + ".join(data.name for data in data_sets)
    print(f"{names} {split}: {captions} captions, {result.counts()}")
    for data, first, after in parts:
        indices = range(first, after)
        for line in [*result.losses(indices), *_doubts(data, result, detections, indices)]:
            print(f"warning: {data.name} {split}: {line}", file=sys.stderr)
    return result


def _doubts(data, image_set, detections, indices):
    """What seems wrong with the detections of a data set's images in an ImageSet: lines."""
    if data.det_json is None or not indices:
        return []
    if not any(len(image_set.boxes[i][0]) for i in indices):
        paths = [image_set.paths[i] for i in indices]
        return [data.no_objects(paths, [detections[i] for i in indices])]
    return [f"{kind}: {evidence}" for kind, evidence in image_set.findings(indices)]
