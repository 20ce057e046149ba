"""Data sets as the options name them: captions, splits, image files, detections.

A data set is a folder: annotations (see annotations.py), image files anywhere below it, found by
stem, and detections in `det_json/`. Several can be trained on together; then the images that one of
them tests on are left out of training. All is checked before training starts.
"""

from pathlib import Path
from typing import NamedTuple

from dataset import images, scenes
from dataset.annotations import read_annotations, with_validation
from dataset.batches import ImageSet

VAL_FRACTION = 0.1  # of the training images, where no validation split is shipped


DEV_SEED = 0  # one dev split for all seeds, so that their models were chosen on the same images


# fmt: on


# fmt: on


# ------------------------------------------------------------------ which data sets


class Source(NamedTuple):
    """A data set's name and places."""

    name: str
    root: Path
    det_json: str | None
    form: str


def sources(options):
    """The data sets that the options (a dict) name; ValueError where the lists do not fit."""
    names = options["dataset"]
    if len(set(names)) < len(names):
        raise ValueError(f"--dataset {' '.join(names)}: a name is there twice")
    columns = []
    for name in ("data_root", "det_json", "annotations"):
        given = options[name] or [None] * len(names)
        if len(given) != len(names):
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{option}: {len(given)} given for --dataset {' '.join(names)}")
        columns.append(given)
    found = []
    for name, root, det_json, form in zip(names, *columns, strict=True):
        root = root or ("data/scenes" if name == "scenes" else None)
        if root is None:
            raise ValueError(f"--dataset {name} needs --data-root, the folder it lies in")
        found.append(Source(name, Path(root), det_json, form or "auto"))
    return found


def read_data_sets(options):
    """A RetrievalData for each data set that the options name, reported."""
    data_sets = [RetrievalData(options, source) for source in sources(options)]
    for data in data_sets:
        data.report()
    return data_sets


class RetrievalData:
    """A data set: splits of records, image files, detections.

    Construction reads annotations and file names; `image_set(split)` decodes.
    """

    def __init__(self, options, source):
        self.options, self.name, self.root = options, source.name, source.root
        if self.name == "scenes":
            scenes.generate(self.root)
        if not self.root.is_dir():
            raise ValueError(f"{self.root}: no such folder; check --data-root")
        det_json = Path(source.det_json or self.root / "det_json")
        if source.det_json and not det_json.is_dir():
            raise ValueError(f"{det_json}: no such folder; check --det-json")
        dev_images = options["dev_images"]
        self.annotations, self.drawn_split = with_validation(
            read_annotations(self.root, source.form, options["clean"], options["template"]),
            VAL_FRACTION,
            DEV_SEED if dev_images else options["seed"],
            dev_images,
        )
        self.validation = "dev" if dev_images else "val"
        held_out = ("test", "val") if dev_images else ("test",)
        self.held_out = [split for split in held_out if self.has(split)]
        self.index = images.index_images(self.root)
        every = [path for paths in self.index.values() for path in paths]
        self.detections = images.match_detections(every, det_json) if det_json.is_dir() else {}

    def has(self, split):
        """Whether there is such a split."""
        return bool(self.annotations.splits.get(split))

    def records(self, split):
        """The split's records; ValueError that names the splits there are."""
        if not self.has(split):
            known = ", ".join(name for name, records in self.annotations.splits.items() if records)
            few = "; --dev-images is not below the number of training images"
            few = few if split == "dev" and self.options["dev_images"] else ""
            raise ValueError(f"{self.root}: no split '{split}'; there are {known}{few}")
        return self.annotations.splits[split]

    def files(self, split):
        """(image files, their detection files or None, problems) in the order of the records."""
        paths, detections, problems = [], [], []
        for record in self.records(split):
            try:
                path = images.find_image(record.name, self.index, self.root)
            except ValueError as error:
                problems.append(str(error))
            else:
                paths.append(self.root / path)
                detections.append(self.detections.get(path))
        return paths, detections, problems

    def image_set(self, split, image_size, label_map):
        """The split's ImageSet, in the order of its records; says what is missing."""
        return joint_image_set([self], split, image_size, label_map)

    def report(self):
        """Print the origin and sizes of the splits, and what was blank."""
        notes = self.annotations
        sizes = ", ".join(f"{split} {len(records)}" for split, records in notes.splits.items())
        print(f"{self.name}: {notes.origin}; images: {sizes}")
        for places, what in (
            (notes.blank, "blank captions dropped"),
            (notes.empty, "images left out for want of captions"),
        ):
            if places:
                more = ", ..." if len(places) > 10 else ""
                print(f"{self.name}: {len(places)} {what}: {', '.join(places[:10])}{more}")


def joint_image_set(data_sets, split, image_size, label_map):
    """One ImageSet of a split of all data sets, one after another; says what is missing."""
    options, parts = data_sets[0].options, [data.files(split) for data in data_sets]
    paths, detections, problems = (sum(column, []) for column in zip(*parts, strict=True))
    result = ImageSet(
        paths,
        detections,
        image_size=image_size,
        label_map=label_map,
        max_objects=options["max_objects"],
        cache_gb=options["cache_gb"],
        cache_dir=options["cache_dir"],
        exchange=options["seed"] if options["graph_control"] == "exchanged" else None,
        edges=options["graph_control"] != "no-edges",
        published=options["graph"] == "published",
    )
    result.problems = problems + result.problems
    captions = sum(len(record.captions) for data in data_sets for record in data.records(split))
    names = " + ".join(data.name for data in data_sets)
    print(f"{names} {split}: {captions} captions, {result.counts()}")
    return result
