"""What a training run reads: data sets, their digest, and the features of frozen towers.

With --train graph no tower learns, so each image and each caption is encoded once, and training
sees the features. They are kept in --cache-dir, in files named by all that they depend on: the
tower's weights, the pixels' content and preparation, the captions.
"""

import contextlib
import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import NamedTuple

import ftfy
import PIL
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from clip_gcn_image_feature_integration import encode_images, encode_texts
from dataloader import joint_image_set, read_data_sets
from dataset.augment import stored_size
from dataset.batches import TrainingSet, require_readable
from dataset.cache import PREPROCESSING, default_cache_dir
from dataset.overlap import without_test
from metrics.ranks import KS
from training import resume

FEATURES = 1  # raise it whenever towers or tokenizer give other features than before


class TrainingData(NamedTuple):
    """All that a run reads."""

    data_sets: list
    train_set: TrainingSet
    val_sets: list  # an ImageSet for each data set
    val_texts: list  # for each the features (T, E) of its captions, None where a tower learns
    left_out: dict  # see overlap.without_test
    digest: str  # of images, captions and detections


def read_data(options, model_config, label_map):
    """TrainingData as the options say, without features."""
    data_sets = read_data_sets(options)
    val_records = [data.records(data.validation) for data in data_sets]
    for data, records in zip(data_sets, val_records, strict=True):
        if len(records) < max(KS):
            raise ValueError(
                f"{data.name}: {len(records)} validation images; R@{max(KS)} needs more"
            )
    augment, image_size = options["augment"], model_config["image_size"]
    images = joint_image_set(data_sets, "train", stored_size(image_size, augment), label_map)
    val_sets = [data.image_set(data.validation, image_size, label_map) for data in data_sets]
    require_readable(images, *val_sets)
    records, left_out = without_test(data_sets, images, options["drop_test_captions"])
    if not any(record.captions for record in records):
        raise ValueError("no training image is left: all are in a test split")
    train_set = TrainingSet(
        images,
        records,
        model_config,
        augment=augment,
        drop_graphs=options["drop_graphs"],
        seed=options["seed"],
    )
    digest = resume.data_digest((images, records), *zip(val_sets, val_records, strict=True))
    val_texts = [None] * len(data_sets)
    return TrainingData(data_sets, train_set, val_sets, val_texts, left_out, digest)


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
    folder = Path(options["cache_dir"] or default_cache_dir())
    visual, text = tower_keys(model, model_config)
    size = options["batch_size"], options["workers"]

    def add_features(images):
        versions = [FEATURES, PREPROCESSING, PIL.__version__, torchvision.__version__]
        key = _key(visual, versions, images.image_size, images.hashes)
        images.features = cached(
            folder / f"{len(images)}-image-features-{key}.safetensors",
            lambda: encode_images(model, images, device, *size)["clip"],
        )
        images.pixels = None  # not needed any more

    def text_features(captions):
        key = _key(text, [FEATURES, ftfy.__version__], captions)
        path = folder / f"{len(captions)}-text-features-{key}.safetensors"
        return cached(path, lambda: encode_texts(model, captions, device))

    for images in (data.train_set.image_set, *data.val_sets):
        add_features(images)
    data.train_set.text_features = text_features(data.train_set.captions)
    records = [data_set.records(data_set.validation) for data_set in data.data_sets]
    captions = [[text for record in own for text in record.captions] for own in records]
    return data._replace(val_texts=[text_features(own) for own in captions])


def tower_keys(model, model_config):
    """Digests of the image tower and of the text tower: weights, and what no shape tells."""
    new, towers = model.new_parameters(), {"visual": [], "text": []}
    for name, tensor in model.state_dict().items():
        if name not in new and name != "logit_scale":
            towers["visual" if name.startswith("visual.") else "text"].append((name, tensor))
    return tuple(_digest(weights, model_config) for weights in towers.values())


def _digest(weights, model_config):
    digest = hashlib.blake2b(json.dumps(model_config, sort_keys=True).encode(), digest_size=16)
    for name, tensor in weights:
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _key(*parts):
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def cached(path, compute):
    """The features in a file, or computed and put there; an unreadable file is made anew."""
    if path.is_file():
        try:
            return load_file(path)["features"]
        except (SafetensorError, OSError, KeyError) as error:
            print(f"{path}: not readable ({error}); it is rebuilt")
    features = compute().contiguous()
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"features": features}, temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: not written ({error}); name another --cache-dir") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return features
