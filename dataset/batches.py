"""Batches: images with their object graphs and, for training, one sentence each.

Randomness is keyed by (seed, epoch, image), so neither the number of workers nor the order of
reading changes what is drawn. Nothing is replaced or skipped silently.

Sizes in the shapes below: B images, N objects (padded), F node features, C captions of an image.
"""

import copy
import os
import signal
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

import simple_tokenizer
from dataset.annotations import normal_form
from dataset.augment import draw_affine, draw_colour, draw_hole, move_boxes
from dataset.cache import RAM_GIB, read_images
from dataset.images import losses
from det_formats import sanity
from V_Graph import GraphArrays, batch_from_boxes, published_arrays

GRAPH = ("nodes", "adjacency", "mask")  # what a batch holds of graphs

GRAPHS_GIB = 1  # of graphs of a split that are kept in RAM; of a larger one they are made anew

AT_ONCE = 256  # images whose graphs are made together

# ------------------------------------------------------------------ images with graphs


class Images(Dataset):
    """Image files with the boxes of their detections: what a set and a stream have in common.

    paths: image files; boxes: (class ids, boxes) of each, as `V_Graph.detection_arrays`; has_file:
    whether each has a detection file; source: whose graph an image gets; max_objects: the most
    objects of a graph, 0 for a model without graph branch; edges=False leaves the edges out;
    published=True gives graphs by `V_Graph.published_arrays`; sizes: (width, height) of each in
    pixels, as far as known.
    """

    def __init__(
        self, paths, boxes, has_file, *, image_size, label_map, max_objects, edges, published
    ):
        self.paths = [Path(path) for path in paths]
        self.boxes = boxes
        self.sizes = [None] * len(self.paths)
        self.has_file = has_file
        self.source = np.arange(len(self.paths))
        self.missing = has_file.count(False)
        self.image_size = image_size
        self.label_map = label_map
        self.max_objects = max_objects
        self.edges = edges
        self.published = published
        self.dropped = sum(self._dropped(class_ids) for class_ids, _ in boxes)

    def _dropped(self, class_ids):
        """How many objects of an image its graph leaves out."""
        if self.published:
            other = len(self.label_map) - 1
            return int((class_ids >= other).sum())
        if self.max_objects == 0:
            return 0
        return max(0, len(class_ids) - self.max_objects)

    def __len__(self):
        return len(self.paths)

    def graphs(self, boxes, sizes):
        """Nodes (B, N, F), adjacency (B, N, N) and mask (B, N) of B images: a dict of tensors.

        boxes: (class ids, boxes) of each; sizes: (width, height) of each in pixels.
        """
        if self.published:
            single = [published_arrays(class_ids, own) for class_ids, own in boxes]
            arrays = GraphArrays(*(np.stack(values) for values in zip(*single, strict=True)))
        else:
            arrays = batch_from_boxes(boxes, sizes, self.max_objects, len(self.label_map))
        if not self.edges:
            arrays = arrays._replace(adjacency=np.zeros_like(arrays.adjacency))
        return {name: torch.from_numpy(getattr(arrays, name)) for name in GRAPH}

    def counts(self):
        """What is missing or left out, in words."""
        missing = f"{self.missing} of {len(self)} images without a detection file"
        if self.max_objects == 0:
            return missing
        kind = "of other labels" if self.published else f"beyond {self.max_objects}"
        return f"{missing}, {self.dropped} objects {kind} dropped"

    def findings(self, indices=None):
        """What seems wrong with the boxes of these images (default all), by `sanity.findings`."""
        if indices is None:
            indices = range(len(self))
        boxes = {self.paths[i]: self.boxes[i][1] for i in indices}
        sizes = {self.paths[i]: self.sizes[i] for i in indices}
        return sanity.findings(boxes, sizes)

    def losses(self, indices=None):
        """What these images (default all) lose on the way to image_size, by `images.losses`."""
        if indices is None:
            indices = range(len(self))
        sizes = {self.paths[i]: self.sizes[i] for i in indices}
        return losses(sizes, self.image_size)


class ImageSet(Images):
    """Images with their graphs, decoded once: see cache.py.

    paths: image files; detections: a detection file or None for each. ram_gib: of pixels, up to
    which they are kept in RAM, else in a file. exchange: a seed, to give every image another's
    graph; edges=False leaves the edges out; published=True gives graphs by
    `V_Graph.published_arrays`. An item is a dict of image
    (3, image_size, image_size) uint8, nodes (N, F), adjacency (N, N), mask (N) and index; no
    randomness. For an array of numbers, (B), it holds the items of all, stacked. Where `features`
    (I, E), those of a frozen tower, are set, their row stands as image_features in the image's
    place.
    Images that cannot be read are in `problems`: call `require_readable` before using a set.
    """

    def __init__(
        self,
        paths,
        detections,
        *,
        image_size,
        label_map,
        max_objects,
        ram_gib=RAM_GIB,
        exchange=None,
        edges=True,
        published=False,
    ):
        paths = [Path(path) for path in paths]
        decoded = read_images(paths, detections, image_size, label_map, ram_gib)
        super().__init__(
            paths,
            decoded.boxes,
            [file is not None for file in detections],
            image_size=image_size,
            label_map=label_map,
            max_objects=max_objects,
            edges=edges,
            published=published,
        )
        self.features = None
        self.pixels = decoded.pixels
        self.sizes = decoded.sizes
        self.hashes = decoded.hashes
        self.problems = decoded.problems
        if exchange is not None:  # a cycle through all images, so that none keeps its own
            order = np.random.default_rng(exchange).permutation(len(paths))
            self.source[order] = np.roll(order, 1)

    @cached_property
    def kept_graphs(self):
        """The graphs of all images, stacked; None where they are too many to be kept."""
        if self.problems or not len(self):
            return None
        one = self.graphs(self.boxes[:1], self.sizes[:1])
        needed = len(self) * sum(values.nbytes for values in one.values())
        if needed > GRAPHS_GIB * 2**30:
            return None
        found = {}
        for name, values in one.items():
            found[name] = values.new_empty(len(self), *values.shape[1:])
        for first in range(0, len(self), AT_ONCE):
            portion = slice(first, first + AT_ONCE)
            for name, values in self.graphs(self.boxes[portion], self.sizes[portion]).items():
                found[name][portion] = values
        return found

    def with_boxes(self, boxes):
        """The same images with other objects: (class ids, boxes) of each."""
        other = copy.copy(self)
        other.boxes = boxes
        vars(other).pop("kept_graphs", None)
        return other

    def without_objects(self):
        """The same images, none of which has an object."""
        return self.with_boxes([(class_ids[:0], boxes[:0]) for class_ids, boxes in self.boxes])

    def __getitem__(self, i):
        return {**self.graphs_of(i), **self._image_of(i)}

    def _image_of(self, i):
        """What an item holds beside its graph."""
        item = {"index": torch.as_tensor(i)}
        if self.features is None:
            item["image"] = self.pixels[i]
        else:
            item["image_features"] = self.features[i]
        return item

    def graphs_of(self, i):
        """Nodes, adjacency and mask of image i, or of an array of images, (B), stacked."""
        sources = self.source[i]
        numbers = np.atleast_1d(sources)
        if self.kept_graphs is not None:
            chosen = torch.from_numpy(numbers)
            found = {}
            for name, values in self.kept_graphs.items():
                found[name] = values.index_select(0, chosen)  # faster than indexing by an array
        else:
            boxes = [self.boxes[number] for number in numbers]
            sizes = [self.sizes[number] for number in numbers]
            found = self.graphs(boxes, sizes)
        if np.ndim(sources) == 0:
            return only_graph(found)
        return found

    def item(self, i, affine=None, graph=True):
        """Item i, its detections moved by `affine` (2, 3), or without its graph."""
        if self.max_objects == 0 or (affine is None and graph):
            return self[i]
        source = self.source[i]
        size = self.sizes[source]
        class_ids, boxes = self.boxes[source]
        if not graph:
            class_ids = class_ids[:0]
            boxes = boxes[:0]
        if affine is not None:
            class_ids, boxes, size = move_boxes(class_ids, boxes, size, affine)
        return {**only_graph(self.graphs([(class_ids, boxes)], [size])), **self._image_of(i)}

    def batches(self, batch_size, workers=0, pin_memory=False, rank=0, world=1):
        """The images in order, in batches of stacked items.

        Of `world` processes that share them, process `rank` gets the batches rank, rank + world ...
        """
        _ = self.kept_graphs  # made here, not by each loader process
        numbers = np.arange(len(self))
        all_batches = [numbers[first : first + batch_size] for first in numbers[::batch_size]]
        return Loader(
            self,
            batch_size=None,  # an item of the sampler is a batch already
            sampler=all_batches[rank::world],
            num_workers=workers,
            pin_memory=pin_memory,
            worker_init_fn=leave_group,
        )


def only_graph(graphs):
    """The graph of `Images.graphs` of one image: nodes (N, F), adjacency (N, N) and mask (N)."""
    return {name: values[0] for name, values in graphs.items()}


# ------------------------------------------------------------------ loader processes


_STOPS = (signal.SIGINT, signal.SIGTERM)


_CAN_BLOCK = hasattr(signal, "pthread_sigmask")  # not on Windows


class Loader(DataLoader):
    """A DataLoader whose processes leave Ctrl-C and `timeout` to the script, which may save first.

    Signals to the whole process group would end a loader process, and with it the script.
    """

    def __iter__(self):
        if not _CAN_BLOCK:
            return super().__iter__()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)  # until `leave_group`
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_group(_):
    """Begin a loader process: forget signals to the group so far, and leave it."""
    for number in _STOPS:
        signal.signal(number, signal.SIG_IGN)
    if _CAN_BLOCK:
        os.setpgid(0, 0)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by it the script ends its loaders


def require_readable(*image_sets, remedy="mend or remove them"):
    """Raise one ValueError for all missing and unreadable images of ImageSets."""
    require_none([problem for images in image_sets for problem in images.problems], remedy)


def require_none(problems, remedy="mend or remove them"):
    """Raise one ValueError for problems with images, one a line, with the first twenty."""
    if not problems:
        return
    lines = [f"{len(problems)} images are missing or unreadable; {remedy}:", *problems[:20]]
    if len(problems) > 20:
        lines.append(f"and {len(problems) - 20} more")
    raise ValueError("\n  ".join(lines))


# ------------------------------------------------------------------ training


class TrainingSet(Dataset):
    """An ImageSet with one caption per image and epoch, drawn by (seed, epoch, image).

    records: one for each image; an image whose record has no captions is left out. Items are asked
    for by (epoch, i); they add the caption's tokens and ids and, as far as there is augmentation,
    affine (2, 3), colour (2, 3) and hole (2). With `text_features` (captions, E), those of a frozen
    tower, set, they add the caption's row.
    """

    def __init__(self, image_set, records, *, model_config, augment, drop_graphs, seed):
        self.image_set = image_set
        self.image_size = model_config["image_size"]
        self.augment = augment
        self.drop_graphs = drop_graphs
        self.seed = seed
        self.captions = [caption for record in records for caption in record.captions]
        self.tokens = simple_tokenizer.tokenize(
            self.captions, model_config["text"]["context_length"]
        )  # (captions, context_length)
        self.text_ids = _text_ids(self.captions)  # (captions)
        self.text_features = None
        counts = [len(record.captions) for record in records]
        self.first = np.cumsum([0, *counts])  # where an image's captions begin
        self.used = np.flatnonzero(counts)  # the images that have captions

    def __len__(self):
        return len(self.used)

    def __getitem__(self, key):
        epoch, i = key
        rng = np.random.default_rng((self.seed, epoch, i))
        first = int(self.first[i])
        after = int(self.first[i + 1])
        caption = first + int(rng.integers(after - first))
        graph = rng.random() >= self.drop_graphs
        affine = None
        if self._moves_objects():
            affine = draw_affine(rng, self.augment)
        item = self.image_set.item(i, affine, graph)
        if affine is not None:
            item["affine"] = torch.from_numpy(affine).float()
        if "colour" in self.augment:
            item["colour"] = torch.from_numpy(draw_colour(rng)).float()
        if "erase" in self.augment:
            item["hole"] = torch.from_numpy(draw_hole(rng)).float()
        if self.text_features is not None:
            item["text_features"] = self.text_features[caption]
        item["text"] = self.tokens[caption]
        item["text_id"] = self.text_ids[caption]
        item["caption_ids"] = self.text_ids[first:after]
        return item

    def _moves_objects(self):
        """Whether augmentation gives an image another graph each time."""
        return bool(set(self.augment) & {"crop", "flip", "turn"})

    def captions_by_image(self):
        """The captions of each image of the set, in its order."""
        ends = zip(self.first[:-1], self.first[1:], strict=True)
        return [self.captions[first:after] for first, after in ends]

    def batches(self, epoch, batch_size, workers=0, pin_memory=False, start=0, rank=0, world=1):
        """The epoch's batches from number `start` on, images shuffled by (seed, epoch).

        A last, smaller batch is dropped. Of `world` processes that share each batch, process `rank`
        gets its part: of as many rows as the others', one part after another.
        """
        if self.image_set.max_objects == 0 or not self._moves_objects():
            _ = self.image_set.kept_graphs  # made here, not by each loader process
        order = np.random.default_rng((self.seed, epoch)).permutation(self.used)
        if len(order) >= batch_size:
            order = order[: len(order) // batch_size * batch_size]
        order = order[start * batch_size :]
        own = np.arange(len(order)) % batch_size // (batch_size // world) == rank
        return Loader(
            self,
            batch_size // world,
            sampler=[(epoch, int(i)) for i in order[own]],
            num_workers=workers,
            pin_memory=pin_memory,
            collate_fn=collate,
            worker_init_fn=leave_group,
        )


def _text_ids(captions):
    """A number for each caption, the same for captions that count as the same: (captions)."""
    id_of_form = {}
    ids = []
    for caption in captions:
        form = normal_form(caption)
        id_of_form.setdefault(form, len(id_of_form))
        ids.append(id_of_form[form])
    return torch.tensor(ids)


def collate(items):
    """Stack items; texts are cut after the longest, caption ids padded with -1 to (B, C)."""
    batch = {}
    for key in items[0]:
        values = [item[key] for item in items]
        if key == "caption_ids":
            batch[key] = pad_sequence(values, batch_first=True, padding_value=-1)
        else:
            batch[key] = torch.stack(values)
    batch["text"] = trim(batch["text"])
    return batch


def trim(tokens):
    """Token ids (B, L) cut after the last end token of the batch: what follows changes nothing."""
    last_end = int(tokens.argmax(dim=1).max())  # the end token has the highest id
    return tokens[:, : last_end + 1]
