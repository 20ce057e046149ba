"""No validation or test image in training: what any data set holds out is left out of all."""

import os
from concurrent.futures import ThreadPoolExecutor

from dataset import images
from dataset.annotations import normal_form
from progress import Progress


def without_held_out(data_sets, image_set):
    """Training records without what the data sets hold out: (records, left out).

    data_sets: of dataloader.RetrievalData; image_set: the joint one of "train", readable.
    Held out are the test and validation splits, a drawn "dev" among them (`held_out` of a data
    set). A test split is here each of them but the one to choose a model on, so beside a "dev"
    "val" too. An image is left out, its record's captions empty, for the first of these reasons
    that holds:

        by_name          a held-out split of its own data set names it
        by_content       an image of any data set's held-out splits has the same pixels
        no_caption_left  all its captions are test captions of other data sets

    Captions go that stand (stripped, case folded) in a test split of another data set. Those that
    stand in one of their own stay: the shipped split is what the field trains and tests on, and
    UCM's train and test share most sentences by design.

    Left out is, by the name of the data set, a dict of these reasons, each with the list of its
    images' names, and "captions", the number of captions dropped from images that stay or that
    have none left.
    """
    held_out_hashes = _held_out_hashes(data_sets)
    captions_of = {data.name: _test_captions(data) for data in data_sets}
    hashes = iter(image_set.hashes)
    records = []
    left_out = {}
    for data in data_sets:
        held_out_names = _held_out_names(data)
        others = [captions for name, captions in captions_of.items() if name != data.name]
        test_captions = set().union(*others)
        out = {"by_name": [], "by_content": [], "no_caption_left": [], "captions": 0}
        for record in data.records("train"):
            content_hash = next(hashes)
            kept = tuple(
                caption for caption in record.captions if normal_form(caption) not in test_captions
            )
            if images.without_suffix(record.name) in held_out_names:
                out["by_name"].append(record.name)
                kept = ()
            elif content_hash in held_out_hashes:
                out["by_content"].append(record.name)
                kept = ()
            else:
                out["captions"] += len(record.captions) - len(kept)
                if not kept:
                    out["no_caption_left"].append(record.name)
            records.append(record._replace(captions=kept))
        left_out[data.name] = out
        _report(data.name, out)
    return records, left_out


def _held_out_names(data):
    """The names, without extension, in the data set's held-out splits."""
    return {
        images.without_suffix(record.name)
        for split in data.held_out
        for record in data.records(split)
    }


def _test_captions(data):
    """The normal forms of all captions in the data set's test splits."""
    return {
        normal_form(caption)
        for split in data.held_out
        if split != data.validation
        for record in data.records(split)
        for caption in record.captions
    }


def _held_out_hashes(data_sets):
    """Content hashes of all readable images in held-out splits; says how many are not readable."""
    found = set()
    for data in data_sets:
        for split in data.held_out:
            paths, _, problems = data.files(split)
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                hashes = pool.map(_hash, paths)
                title = f"compare {data.name} {split}"
                hashes = list(Progress(hashes, title, "images", total=len(paths)))
            found.update(hashes)
            unreadable = hashes.count(None) + len(problems)
            if unreadable:
                print(
                    f"{data.name} {split}: {unreadable} images not readable, so not "
                    "compared by content with the training images"
                )
    return found - {None}


def _hash(path):
    """The content hash of an image file, None where it cannot be read."""
    try:
        return images.content_hash(images.open_image(path))
    except ValueError:
        return None


def _report(name, out):
    """Print what was left out of a data set's training images, if anything."""
    by_name = len(out["by_name"])
    by_content = len(out["by_content"])
    no_caption_left = len(out["no_caption_left"])
    captions = out["captions"]
    if by_name or by_content or no_caption_left or captions:
        print(
            f"{name}: left out of training, being held out: {by_name} images by name, "
            f"{by_content} by content, {captions} captions of other data sets' test splits; "
            f"{no_caption_left} images have no caption left"
        )
