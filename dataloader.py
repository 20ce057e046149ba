"""Data sets to batches: images with their object graphs and, for training, one sentence each.

A data set is a folder: annotations (see annotations.py), image files anywhere below it, found by
stem, and detections in `det_json/`. All is checked before training starts; nothing is replaced or
skipped silently. Randomness is keyed by (seed, epoch, image), so neither the number of workers nor
the order of reading changes what is drawn.

Sizes in the shapes below: B images, N objects (padded), F node features, C captions of an image.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import clip
import images
import scenes
from annotations import normal_form, read_annotations, with_validation
from augment import AUGMENTATIONS, draw_affine, draw_colour, move_boxes
from V_Graph import arrays_from_boxes, detection_arrays, load_detections

VAL_FRACTION = 0.1  # of the training images, where no validation split is shipped


def add_data_options(parser):
    """The options of the data; they are saved in checkpoints and hold for evaluation too."""
    option = parser.add_argument_group("data").add_argument
    # fmt: off
    option("--dataset", default="scenes", help="scenes, ucm, rsicd, rsitmd, or a name of your own")
    option("--data-root", help="its folder; only scenes has a default, data/scenes")
    option("--det-json", help="folder of detections; default <data root>/det_json")
    option("--graph-control", choices=("own", "exchanged", "no-edges"), default="own",
           help="for control experiments: another image's graph, or no edges")
    option("--cache-gb", type=float, default=4, help="RAM for a split's images; others are re-read")
    option("--workers", type=int, default=0, help="loader processes; raise where a GPU waits")
    # fmt: on


def add_training_data_options(parser):
    """What is done to training images only."""
    option = parser.add_argument_group("training data").add_argument
    # fmt: off
    option("--augment", nargs="*", choices=AUGMENTATIONS,
           help="default all; scenes none, since sentences say left of")
    option("--drop-graphs", type=float, default=0.1,
           help="share of images shown without graph, so that CLIP's branch stands alone")
    # fmt: on


def augmentations(options):
    """What `--augment` means: the given list, else the data set's default."""
    if options["augment"] is not None:
        return options["augment"]
    return [] if options["dataset"] == "scenes" else list(AUGMENTATIONS)


# ------------------------------------------------------------------ images with graphs


class ImageSet(Dataset):
    """Images with their graphs, decoded once as far as the cache allows.

    paths: image files; detections: a detection file or None for each. exchange: a seed, to give
    every image another's graph; edges=False leaves the edges out. An item is a dict of image
    (3, n_px, n_px) uint8, nodes (N, F), adjacency (N, N), mask (N) and index; no randomness.
    Images that cannot be read are in `problems`: call `require_readable` before using a set.
    """

    def __init__(
        self,
        paths,
        detections,
        n_px,
        vocabulary,
        max_objects,
        cache_gb=4,
        exchange=None,
        edges=True,
    ):
        self.paths, self.n_px, self.vocabulary = [Path(p) for p in paths], n_px, vocabulary
        self.max_objects, self.edges = max_objects, edges
        self.transform = clip.resize_and_crop(n_px)
        self.cached = min(len(paths), int(cache_gb * 2**30 / (3 * n_px**2)))
        self.pixels = torch.empty(self.cached, 3, n_px, n_px, dtype=torch.uint8)
        self.sizes = self._read_images()
        self.problems = [size for size in self.sizes if isinstance(size, str)]
        self.boxes = [
            detection_arrays([] if file is None else load_detections(file), vocabulary)
            for file in detections
        ]
        self.source = np.arange(len(paths))  # whose graph an image gets
        if exchange is not None:  # a cycle through all images, so that none keeps its own
            order = np.random.default_rng(exchange).permutation(len(paths))
            self.source[order] = np.roll(order, 1)
        self.missing = sum(file is None for file in detections)
        self.dropped = sum(max(0, len(slots) - max_objects) for slots, _ in self.boxes)

    def _read_images(self):
        """Decode all, keep what the cache holds; (width, height) of each, or what is wrong."""

        def read(i):
            try:
                image = images.open_image(self.paths[i])
            except ValueError as error:
                return str(error)
            if i < self.cached:
                self.pixels[i] = self._decode(image)
            return image.size

        few = len(self.paths) < 100
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            read_all = pool.map(read, range(len(self.paths)))
            bar = tqdm(read_all, "images", len(self.paths), leave=False, unit="image", disable=few)
            return list(bar)

    def _decode(self, image):
        array = np.array(self.transform(image))  # (n_px, n_px, 3)
        return torch.from_numpy(array).permute(2, 0, 1)

    def __len__(self):
        return len(self.paths)

    def _image(self, i):
        return self.pixels[i] if i < self.cached else self._decode(images.open_image(self.paths[i]))

    def item(self, i, affine=None, graph=True):
        """Item i, its detections moved by `affine` (2, 3), or without its graph."""
        source = self.source[i]
        size, (slots, boxes) = self.sizes[source], self.boxes[source]
        if not graph:
            slots, boxes = slots[:0], boxes[:0]
        if affine is not None:
            slots, boxes, size = move_boxes(slots, boxes, size, affine)
        arrays = arrays_from_boxes(slots, boxes, size, self.max_objects, len(self.vocabulary))
        return {
            "image": self._image(i),
            "nodes": torch.from_numpy(arrays.nodes),
            "adjacency": torch.from_numpy(arrays.adjacency if self.edges else 0 * arrays.adjacency),
            "mask": torch.from_numpy(arrays.mask),
            "index": i,
        }

    def __getitem__(self, i):
        return self.item(i)

    def batches(self, batch_size, workers=0, pin_memory=False):
        """The images in order, in batches of stacked items."""
        return DataLoader(self, batch_size, num_workers=workers, pin_memory=pin_memory)

    def counts(self):
        """What is missing or left out, in words."""
        return (
            f"{self.missing} of {len(self)} images without a detection file, "
            f"{self.dropped} objects beyond {self.max_objects} dropped"
        )


def require_readable(*image_sets):
    """Raise one ValueError for all missing and unreadable images, with the first ten."""
    problems = [problem for image_set in image_sets for problem in image_set.problems]
    if problems:
        first = "\n  ".join(problems[:10])
        raise ValueError(f"{len(problems)} images are missing or unreadable:\n  {first}")


# ------------------------------------------------------------------ training


class TrainingSet(Dataset):
    """An ImageSet with one caption per image and epoch, drawn by (seed, epoch, image).

    Items are asked for by (epoch, i); they add the caption's tokens and ids and, as far as there is
    augmentation, affine (2, 3) and colour (2, 3).
    """

    def __init__(self, image_set, records, definition, augment, drop_graphs, seed):
        self.image_set, self.augment, self.seed = image_set, augment, seed
        self.n_px, self.drop_graphs = definition["image_size"], drop_graphs
        captions = [caption for record in records for caption in record.captions]
        self.first = np.cumsum([0] + [len(record.captions) for record in records])
        length = definition["text"]["context_length"]
        self.tokens = clip.tokenize(captions, length)  # (captions, length)
        forms = {}
        ids = [forms.setdefault(normal_form(caption), len(forms)) for caption in captions]
        self.text_ids = torch.tensor(ids)

    def __len__(self):
        return len(self.image_set)

    def __getitem__(self, key):
        epoch, i = key
        rng = np.random.default_rng((self.seed, epoch, i))
        own = range(self.first[i], self.first[i + 1])
        caption = own[int(rng.integers(len(own)))]
        graph = rng.random() >= self.drop_graphs
        affine = draw_affine(rng, self.augment) if set(self.augment) - {"colour"} else None
        item = self.image_set.item(i, affine, graph)
        if affine is not None:
            item["affine"] = torch.from_numpy(affine).float()
        if "colour" in self.augment:
            item["colour"] = torch.from_numpy(draw_colour(rng)).float()
        return {
            **item,
            "text": self.tokens[caption],
            "text_id": self.text_ids[caption],
            "caption_ids": self.text_ids[own.start : own.stop],
        }

    def batches(self, epoch, batch_size, workers=0, pin_memory=False):
        """The epoch's batches, images shuffled by (seed, epoch); a last, smaller one is dropped."""
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self))
        sampler = [(epoch, int(i)) for i in order]
        return DataLoader(
            self,
            batch_size,
            sampler=sampler,
            num_workers=workers,
            pin_memory=pin_memory,
            collate_fn=collate,
            drop_last=len(self) >= batch_size,
        )


def collate(items):
    """Stack items; texts are cut after the longest, caption ids padded with -1 to (B, C)."""
    batch = {
        key: torch.stack([item[key] for item in items])
        for key in ("image", "nodes", "adjacency", "mask", "affine", "colour", "text_id")
        if key in items[0]
    }
    batch["index"] = torch.tensor([item["index"] for item in items])
    batch["text"] = trim(torch.stack([item["text"] for item in items]))
    batch["caption_ids"] = torch.nn.utils.rnn.pad_sequence(
        [item["caption_ids"] for item in items], batch_first=True, padding_value=-1
    )
    return batch


def trim(tokens):
    """Token ids (B, L) cut after the last end token of the batch: what follows changes nothing."""
    return tokens[:, : int(tokens.argmax(dim=1).max()) + 1]


# ------------------------------------------------------------------ a data set by its options


class RetrievalData:
    """A data set as the options (a dict) name it: splits of records, image files, detections.

    Construction reads annotations and file names; `image_set(split)` decodes.
    """

    def __init__(self, options):
        self.options, self.name = options, options["dataset"]
        root = options["data_root"] or ("data/scenes" if self.name == "scenes" else None)
        if root is None:
            raise ValueError(f"--dataset {self.name} needs --data-root, the folder it lies in")
        self.root = Path(root)
        if self.name == "scenes":
            scenes.generate(self.root)
        if not self.root.is_dir():
            raise ValueError(f"{self.root}: no such folder; check --data-root")
        det_json = Path(options["det_json"] or self.root / "det_json")
        if options["det_json"] and not det_json.is_dir():
            raise ValueError(f"{det_json}: no such folder; check --det-json")
        self.annotations, self.drawn_split = with_validation(
            read_annotations(self.root), VAL_FRACTION, options["seed"]
        )
        self.index = images.index_images(self.root)
        every = [path for paths in self.index.values() for path in paths]
        self.detections = images.match_detections(every, det_json) if det_json.is_dir() else {}

    def records(self, split):
        """The split's records; ValueError that names the splits there are."""
        if not self.annotations.splits.get(split):
            known = ", ".join(name for name, records in self.annotations.splits.items() if records)
            raise ValueError(f"{self.root}: no split '{split}'; there are {known}")
        return self.annotations.splits[split]

    def image_set(self, split, n_px, vocabulary):
        """The split's ImageSet, in the order of its records; says what is missing."""
        records, options, problems, found = self.records(split), self.options, [], []
        for record in records:
            try:
                found.append(images.find_image(record.name, self.index, self.root))
            except ValueError as error:
                problems.append(str(error))
        exchanged = options["graph_control"] == "exchanged"
        result = ImageSet(
            [self.root / path for path in found],
            [self.detections.get(path) for path in found],
            n_px,
            vocabulary,
            options["max_objects"],
            options["cache_gb"],
            exchange=options["seed"] if exchanged else None,
            edges=options["graph_control"] != "no-edges",
        )
        result.problems = problems + result.problems
        captions = sum(len(record.captions) for record in records)
        print(f"{self.name} {split}: {captions} captions, {result.counts()}")
        return result

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
