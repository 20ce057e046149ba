"""What a training run reads: data sets, their digest, and the features of frozen towers.

With --train graph no tower learns, so each image and each caption is encoded once, and training
sees the features. They are kept in `dataset.cache.cache_dir()`, in files named by all that they
depend on: the tower's weights, the pixels' content and preparation, the captions.
"""

import hashlib
import json
from typing import NamedTuple

import ftfy
import PIL
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

import processes
from clip_gcn_image_feature_integration import (
    FEATURES,
    digest_of_weights,
    encode_images,
    encode_texts,
)
from dataloader import joint_image_set, read_data_sets, require_files
from dataset.augment import stored_size
from dataset.batches import TrainingSet, require_readable
from dataset.cache import PREPROCESSING, cache_dir
from dataset.overlap import without_held_out
from metrics.ranks import KS
from training import resume
from writing import written_whole


class TrainingData(NamedTuple):
    """All that a run reads."""

    data_sets: list
    train_set: TrainingSet
    val_sets: list  # an ImageSet for each data set
    val_texts: list  # for each the features (T, E) of its captions, None where a tower learns
    left_out: dict  # see overlap.without_held_out
    digest: str  # of images, captions and detections


def find_data(options):
    """The data sets that the options name, looked at as far as no image has to be decoded.

    So mistakes are found before a model is downloaded or built. Raises ValueError where captions or
    detections are not as they should be, a validation split is too small for R@10, or an image is
    missing.
    """
    data_sets = read_data_sets(options)
    for data in data_sets:
        number = len(data.records(data.validation))
        if number < max(KS):
            raise ValueError(f"{data.name}: {number} validation images; R@{max(KS)} needs more")
    require_files(data_sets, [("train", data.validation) for data in data_sets])
    return data_sets


def read_data(data_sets, options, model_config, label_map):
    """TrainingData of the data sets of `find_data`, without features.

    Raises ValueError where an image cannot be read, or no training image is left.
    """
    val_records = [data.records(data.validation) for data in data_sets]
    image_size = model_config["image_size"]
    larger = stored_size(image_size, options["augment"])  # to be cropped
    images = joint_image_set(data_sets, "train", larger, label_map)
    val_sets = [data.image_set(data.validation, image_size, label_map) for data in data_sets]
    require_readable(images, *val_sets)
    records, left_out = without_held_out(data_sets, images)
    if not any(record.captions for record in records):
        raise ValueError("no training image is left: all are in a validation or test split")
    train_set = TrainingSet(
        images,
        records,
        model_config=model_config,
        augment=options["augment"],
        drop_graphs=options["drop_graphs"],
        seed=options["seed"],
    )
    return TrainingData(
        data_sets=data_sets,
        train_set=train_set,
        val_sets=val_sets,
        val_texts=[None] * len(data_sets),
        left_out=left_out,
        digest=resume.data_digest((images, records), *zip(val_sets, val_records, strict=True)),
    )


def encoded_at_once(options):
    """How many images are encoded at once where nothing is learnt from them."""
    # That of all processes may not fit into one. More than 64 would hardly be faster.
    return min(options["batch_size"], 64)


# ------------------------------------------------------------------ frozen towers


def with_features(data, model, model_config, device, options):
    """TrainingData whose images and captions are features of the model's towers, as they are now.

    Image features are CLIP's, not normalised; text features have unit length.
    """
    if options["augment"]:
        raise ValueError(
            f"--resume: this --train graph run was begun with --augment "
            f"{' '.join(options['augment'])}, which an earlier version allowed; start it anew"
        )
    folder = cache_dir()
    image_tower, text_tower = tower_keys(model, model_config)
    for images in [data.train_set.image_set, *data.val_sets]:
        images.features = image_features(folder, image_tower, model, images, device, options)
        images.pixels = None  # not needed any more
    captions = data.train_set.captions
    data.train_set.text_features = text_features(folder, text_tower, model, captions, device)
    val_texts = []
    for data_set in data.data_sets:
        records = data_set.records(data_set.validation)
        captions = [text for record in records for text in record.captions]
        val_texts.append(text_features(folder, text_tower, model, captions, device))
    return data._replace(val_texts=val_texts)


def image_features(folder, tower, model, images, device, options):
    """Features (I, E) of an ImageSet, from the folder or computed; tower: its digest."""
    machine = [torch.__version__, torch.device(device).type]
    versions = [FEATURES, PREPROCESSING, PIL.__version__, *machine]
    key = _digest_of([tower, versions, images.image_size, images.hashes])
    path = folder / f"{len(images)}-image-features-{key}.safetensors"
    portions = {"batch_size": encoded_at_once(options), "workers": options["workers"]}
    return cached(path, lambda: encode_images(model, images, device, **portions)["clip"])


def text_features(folder, tower, model, captions, device):
    """Features (T, E) of captions, from the folder or computed; tower: its digest."""
    machine = [torch.__version__, torch.device(device).type]
    key = _digest_of([tower, [FEATURES, ftfy.__version__, *machine], captions])
    path = folder / f"{len(captions)}-text-features-{key}.safetensors"
    return cached(path, lambda: encode_texts(model, captions, device))


def tower_keys(model, model_config):
    """Digests of the image tower and of the text tower: weights, and what no shape tells."""
    new = model.new_parameters()
    visual, text = {}, {}
    for name, tensor in model.state_dict().items():
        if name in new or name == "logit_scale":
            continue
        if name.startswith("visual."):
            visual[name] = tensor
        else:
            text[name] = tensor
    return digest_of_weights(visual, model_config), digest_of_weights(text, model_config)


def _digest_of(parts):
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def cached(path, compute):
    """The features in a file, or computed and put there.

    A file that cannot be read is made anew, and a line says so. Processes that share a run compute
    together if one of them has no file. Raises ValueError where the file cannot be written.
    """
    features = _read_features(path)
    if not processes.largest(features is None):
        return features
    features = compute().contiguous()
    if processes.local_rank() == 0:
        try:
            with written_whole(path) as temporary:
                temporary.write_bytes(save({"features": features}))
        except OSError as error:
            raise ValueError(f"{error} FGCROSS_CACHE may name another folder") from None
    return features


def _read_features(path):
    """The features in a file; None where there is none that can be read."""
    if not path.is_file():
        return None
    try:
        return load_file(path)["features"]
    except (SafetensorError, OSError, KeyError) as error:
        print(f"{path}: not readable ({error}); it is rebuilt")
        return None
