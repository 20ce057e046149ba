"""Any number of image files with their graphs, decoded only when they are asked for.

Loader processes decode ahead while the model computes; a few batches are in memory at a time.
Sizes in the shapes below: B images.
"""

from typing import NamedTuple

import torch

from dataset.batches import Images, Loader, leave_group
from dataset.cache import decode

FEW = 64  # images for which starting a loader process takes longer than decoding


class StreamBatch(NamedTuple):
    """Images of one batch: those that could be read, and what is wrong with the others."""

    indices: list  # the numbers of the B images that could be read
    sizes: list  # their (width, height) in pixels
    tensors: dict  # their image, nodes, adjacency and mask; empty where B is 0
    problems: dict  # {index: what is wrong}


class ImageStream(Images):
    """The images of `indices` among files as a stream.

    paths, boxes and settings: as of Images. An item is a dict of index, image and its size, or of
    index and problem.
    """

    def __init__(self, paths, boxes, indices, **settings):
        super().__init__(paths, boxes, [], **settings)
        self.indices = indices

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, number):
        i = self.indices[number]
        decoded = decode(self.paths[i], self.image_size)
        if decoded.problem is not None:
            return {"index": i, "problem": decoded.problem}
        return {"index": i, "size": decoded.size, "image": torch.from_numpy(decoded.pixels)}

    def batches(self, batch_size, workers, pin_memory=False):
        """The images in order, as StreamBatch."""
        return Loader(
            self,
            batch_size,
            num_workers=workers if len(self) > FEW else 0,
            pin_memory=pin_memory,
            collate_fn=self._collate,
            worker_init_fn=leave_group,
        )

    def _collate(self, items):
        """A StreamBatch of items."""
        problems = {item["index"]: item["problem"] for item in items if "problem" in item}
        read = [item for item in items if "problem" not in item]
        indices = [item["index"] for item in read]
        sizes = [item["size"] for item in read]
        tensors = {}
        if read:
            tensors = self.graphs([self.boxes[i] for i in indices], sizes)
            tensors["image"] = torch.stack([item["image"] for item in read])
        return StreamBatch(indices, sizes, tensors, problems)
