"""No test image in training: what the data sets test on is left out."""

import os
from concurrent.futures import ThreadPoolExecutor

from dataset import images
from dataset.annotations import (
    Record,
    normal_form,
)


def _hashes(data, split):
    """Content hashes of a split's images, None for those that cannot be read."""

    def read(path):
        try:
            return images.content_hash(images.open_image(path))
        except ValueError:
            return None

    paths, _, problems = data.files(split)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(read, paths)) + [None] * len(problems)


def without_test(data_sets, image_set, drop_captions):
    """Training records without what the data sets test on: (records, left out).

    image_set: the joint one of "train", readable. An image is left out, its record's captions
    empty, where its own data set's test split names it or any test split has the same pixels. With
    `drop_captions` captions go too that stand in a test split (stripped, case folded), and images
    that have no others. Left out is a dict of the data sets' names to lists of image names by
    reason and the number of captions. Beside a drawn "dev", "val" counts as a test split too.
    """
    hashes, texts = set(), set()
    for data in data_sets:
        for split in data.held_out:
            found = _hashes(data, split)
            hashes |= set(found) - {None}
            if None in found:
                print(
                    f"{data.name} {split}: {found.count(None)} images not readable, so not "
                    "compared by content with the training images"
                )
            if drop_captions:
                texts |= {normal_form(t) for record in data.records(split) for t in record.captions}
    records, left_out, of_image = [], {}, iter(image_set.hashes)
    for data in data_sets:
        held_out = [record for split in data.held_out for record in data.records(split)]
        names = {images.without_suffix(record.name) for record in held_out}
        out = {"by_name": [], "by_content": [], "no_caption_left": [], "captions": 0}
        for record in data.records("train"):
            content = next(of_image)
            kept = tuple(text for text in record.captions if normal_form(text) not in texts)
            if images.without_suffix(record.name) in names:
                reason = "by_name"
            elif content in hashes:
                reason = "by_content"
            else:
                reason = None if kept else "no_caption_left"
                out["captions"] += len(record.captions) - len(kept)
            if reason:
                out[reason].append(record.name)
            records.append(Record(record.name, () if reason else kept))
        left_out[data.name] = out
        _report(data.name, out)
    return records, left_out


def _report(name, out):
    counts = {key: value if key == "captions" else len(value) for key, value in out.items()}
    if any(counts.values()):
        print(
            f"{name}: left out of training, being in a test split: {counts['by_name']} images by "
            f"name, {counts['by_content']} by content, {counts['captions']} captions; "
            f"{counts['no_caption_left']} images have no caption left"
        )
