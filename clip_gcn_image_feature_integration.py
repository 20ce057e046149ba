"""The one encoder: images with their object graphs, and texts, to features.

    python clip_gcn_image_feature_integration.py                       # the sample images
    python clip_gcn_image_feature_integration.py --out features.npz    # and export them

As a script it prints, for each image, norm and cosine of the CLIP, GCN and fused features, checks
that no embedding depends on its batch mates, that every image got its own graph and that an image
without objects keeps its CLIP embedding, and exits with 1 where one of these fails. Without a graph
branch the GCN's features are 0, and only the first can be checked.
"""

from options import answer_early

if __name__ == "__main__":
    answer_early("clip_gcn", __doc__)  # before torch is imported, which takes seconds

import copy
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import torch
import torch.nn.functional as F
from torch.nn.utils import parametrize

import clip
import processes
import simple_tokenizer
from backbones import preprocess
from dataset.batches import Images, ImageSet, require_readable, trim
from dataset.cache import PREPROCESSING, cache_dir, read_boxes
from dataset.feature_store import FeatureStore, digest, key_of_image
from dataset.images import (
    is_image,
    match_detections,
    no_objects,
    require_detection_folder,
)
from dataset.stream import ImageStream
from det_formats.det_json import LabelMap, read_label_map
from model import build, is_checkpoint, latest_checkpoint, load_checkpoint, object_limit
from options import default_options, parse_options, run
from progress import Progress
from V_Graph import detection_arrays
from writing import written_whole

SAMPLES = Path(__file__).parent / "test"  # five images, with graphs in det_json/


SCENES = (
    "warning: this model was trained on synthetic scenes, whose images look like no others; for "
    "real images train on a data set (train.py --dataset NAME --data-root DIR) or take a CLIP "
    "(--checkpoint ViT-B/32)"
)


BATCHES = (
    "warning: the published graph branch gives all images of a batch one vector: features change "
    "with --batch-size and with the order of the images"
)


FEATURES = 2  # raise it whenever towers, graphs or tokenizer give other features than before


TOLERANCE = {"cpu": 1e-6, "cuda": 1e-5}  # between two batches of one image, on unit features


def load_model(name_or_path, device, activation=None):
    """(model, checkpoint) of a file of ours, of the published FG-CROSS, or of any CLIP.

    activation: of a CLIP whose weights do not tell it. The checkpoint dict of a file that is not
    ours has no data set; its other options are the defaults, for a CLIP without graph, and its path
    is that of the file with the weights. Raises ValueError where there is no such file, it is none
    of these, or it has another activation.
    """
    if _is_plain_clip(name_or_path):
        return _load_plain_clip(name_or_path, device, activation)
    model, checkpoint = load_checkpoint(name_or_path, device)
    told = checkpoint["definition"].get("activation", "quickgelu")
    clip.agreed_activation(name_or_path, told, activation)
    if checkpoint["options"]["graph"] == "published":
        print(BATCHES, file=sys.stderr)
    checkpoint["options"] = {**plain_options(), **checkpoint["options"]}
    return model, checkpoint


def _is_plain_clip(name_or_path):
    """Whether it is for `clip.load`: a CLIP's name, or a file or folder that is no checkpoint."""
    if clip.is_clip_source(name_or_path):
        return True
    return Path(name_or_path).exists() and not is_checkpoint(name_or_path)


def _load_plain_clip(name_or_path, device, activation):
    try:
        network, _ = clip.load(name_or_path, activation=activation)
    except ValueError as error:
        if clip.is_clip_source(name_or_path):
            raise
        raise ValueError(
            f"{name_or_path}: not an FG-CROSS checkpoint; as a CLIP: {error}"
        ) from None
    model_config = network.model_config
    labels = read_label_map().lines
    options = {**plain_options(), "activation": model_config["activation"]}
    model = build(model_config, labels, options)
    model.load_state_dict(network.state_dict())
    checkpoint = {
        "definition": model_config,
        "labels": labels,
        "options": options,
        "path": network.path,
    }
    return model.to(device).eval(), checkpoint


def plain_options():
    """The training options of a CLIP that was not trained here; no data set, no graph."""
    options = default_options("train", groups=("data", "model"))
    return {**options, "graph": "none", "seed": 0, "dataset": None}


def warn_of_scenes(checkpoint):
    """Say what to do where a model of the synthetic scenes is about to see other images."""
    if checkpoint["options"]["dataset"] == ["scenes"]:
        print(SCENES, file=sys.stderr)


def pick_device(name):
    """The torch device that auto, cpu or cuda means; ValueError for cuda where there is none.

    Of processes that share a run, each on a machine has a GPU of its own.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device; use --device auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if processes.several():
        return torch.device("cuda", processes.local_rank())
    return torch.device("cuda")


def full_precision():
    """A context in which convolutions are true fp32 on CUDA too, where the default is TF32."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


# ------------------------------------------------------------------ images and texts to features

BRANCHES = ("clip", "graph", "fused")


def encode_batch(model, batch, device, precision=torch.float32):
    """Features of a batch's images: {"clip", "graph", "fused"}, each (B, D) on the CPU, fp32.

    batch: a dict of tensors with image or image_features, nodes, adjacency and mask. precision: of
    the image tower alone.
    """
    batch = {name: values.to(device, non_blocking=True) for name, values in batch.items()}
    if "image" in batch:
        device_type = torch.device(device).type
        with torch.autocast(device_type, precision, enabled=precision != torch.float32):
            image_features = model.encode_image(preprocess.normalize(batch["image"])).float()
    else:
        image_features = batch["image_features"]
    parts = model.branches(image_features, batch["nodes"], batch["adjacency"], batch["mask"])
    return {name: part.cpu() for name, part in zip(BRANCHES, parts, strict=True)}


@torch.no_grad()
def encode_images(model, images, device, batch_size=64, workers=0):
    """Features of an ImageSet in its order: {"clip", "graph", "fused"}, each (I, D) on the CPU.

    Only "fused" has unit length; "graph" is zero for an image without objects and for a model
    without graph branch. Always fp32. Processes that share a run all call this: each encodes every
    W-th batch, all get the features.
    """
    model.eval()
    parts = {name: [] for name in BRANCHES}
    on_cuda = torch.device(device).type == "cuda"
    batches = images.batches(
        batch_size,
        workers=workers,
        pin_memory=on_cuda,
        rank=processes.rank(),
        world=processes.world(),
    )
    with full_precision(), parametrize.cached():
        for batch in Progress(batches, "encode images", "batches"):
            for name, features in encode_batch(model, batch, device).items():
                parts[name].append(features)
    whole = {name: processes.in_turn(features) for name, features in parts.items()}
    return {name: torch.cat(features) for name, features in whole.items()}  # (I, D) each


class EncodedFiles(NamedTuple):
    """Image files and what a model makes of them."""

    readable: list  # which of the files, by their numbers, could be read: R of them
    images: Images  # these R
    features: torch.Tensor  # their "fused" features (R, D), of unit length, on the CPU
    problems: list  # what is wrong with the other files


@torch.no_grad()
def encode_files(model, checkpoint, paths, detections, device, batch_size=64):
    """Fused features of any number of image files, as an EncodedFiles.

    detections: a detection file or None for each. Loader processes decode ahead; a few batches are
    in memory at a time. Features are kept for the next call, see dataset/feature_store.py. Raises
    ValueError for a malformed detection file.
    """
    settings = image_settings(checkpoint)
    boxes, _ = read_boxes(detections, settings["label_map"])
    store = _feature_store(model, checkpoint, device)
    seen = boxes
    if settings["max_objects"] == 0:  # features do not depend on what nothing looks at
        seen = [detection_arrays([], settings["label_map"])] * len(paths)
    keys = [key_of_image(path, *own) for path, own in zip(paths, seen, strict=True)]
    known = {} if store is None else store.read(keys)
    found = {i: known[key] for i, key in enumerate(keys) if key in known}
    new = [i for i in range(len(paths)) if i not in found]
    stream = ImageStream(paths, boxes, new, **settings)
    problems = {}
    for batch, fused in _encoded(model, stream, device, batch_size):
        problems.update(batch.problems)
        found.update(zip(batch.indices, zip(batch.sizes, fused, strict=True), strict=True))
        if store is not None:
            store.add([keys[i] for i in batch.indices], batch.sizes, fused)
    if store is not None:
        store.close()
    readable = sorted(found)
    images = Images(
        [paths[i] for i in readable],
        [boxes[i] for i in readable],
        [detections[i] is not None for i in readable],
        **settings,
    )
    images.sizes = [found[i][0] for i in readable]
    features = np.stack([found[i][1] for i in readable]) if readable else np.empty((0, 0))
    listed = [problems[i] for i in sorted(problems)]
    return EncodedFiles(readable, images, torch.from_numpy(features), listed)


def _loaders():
    """How many processes decode ahead: one a core that this process may use, eight at most."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return min(8, len(os.sched_getaffinity(0)))
    return min(8, os.cpu_count() or 1)


def image_settings(checkpoint):
    """How images and graphs are made for a checkpoint's model: arguments of `batches.Images`."""
    options = checkpoint["options"]
    return {
        "image_size": checkpoint["definition"]["image_size"],
        "label_map": LabelMap(checkpoint["labels"]),
        "max_objects": object_limit(options),
        "edges": options["graph"] != "no-edges",
        "published": options["graph"] == "published",
    }


def _encoded(model, stream, device, batch_size):
    """The batches of an ImageStream, each with its fused features (B, D) as an array."""
    model.eval()
    on_cuda = torch.device(device).type == "cuda"
    batches = stream.batches(batch_size, workers=_loaders(), pin_memory=on_cuda)
    with full_precision(), parametrize.cached():
        for batch in Progress(batches, "encode images", "batches"):
            if batch.indices:
                yield batch, encode_batch(model, batch.tensors, device)["fused"].numpy()
            else:
                yield batch, []


def _feature_store(model, checkpoint, device):
    """The FeatureStore of a model; None for the published branch, by which batch mates count.

    Its name is a digest of all that features depend on besides an image and, with a graph branch,
    its boxes.
    """
    options = checkpoint["options"]
    if options["graph"] == "published":
        return None
    names = ("graph", "fusion", "max_objects")
    model_digest = digest(
        digest_of_weights(model.state_dict(), checkpoint["definition"]),
        [options[name] for name in names],
        [FEATURES, PREPROCESSING, PIL.__version__, torch.__version__],
        torch.device(device).type,
    )
    return FeatureStore(cache_dir(), model_digest)


def digest_of_weights(weights, model_config):
    """A digest, hexadecimal, of a dict of tensors and of what no shape tells."""
    found = hashlib.blake2b(json.dumps(model_config, sort_keys=True).encode(), digest_size=16)
    for name, tensor in weights.items():
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


@torch.no_grad()
def encode_texts(model, texts, device, batch_size=64):
    """Unit features of texts (T, D) on the CPU.

    Texts with the same tokens are encoded once, so that their features are equal to the bit. Those
    of one length go together: a batch is as long as its longest text, and in a small one hardly any
    is shorter.
    Processes that share a run share the batches, as in `encode_images`.
    """
    model.eval()
    tokens = simple_tokenizer.tokenize(texts, context_length=len(model.positional_embedding))
    distinct, inverse = torch.unique(tokens, dim=0, return_inverse=True)
    by_length = distinct.argmax(dim=1).argsort(stable=True)  # the end token has the highest id
    own = by_length.split(batch_size)[processes.rank() :: processes.world()]
    encoded = []
    with parametrize.cached():
        for part in Progress(own, "encode texts", "batches"):
            of_part = model.encode_text(trim(distinct[part]).to(device))
            encoded.append(F.normalize(of_part, dim=-1).cpu())
    features = torch.empty(len(distinct), model.text_projection.shape[1])
    features[by_length] = torch.cat(processes.in_turn(encoded))
    return features[inverse]  # (T, D)


class SplitFeatures(NamedTuple):
    """A split, encoded: I images and their T captions, one image's after another's."""

    images: torch.Tensor  # "fused" features (I, D)
    texts: torch.Tensor  # (T, D)
    captions: list  # (T)
    image_of_text: np.ndarray  # (T)


def encode_split(model, images, records, device, batch_size=64, workers=0, text_features=None):
    """The SplitFeatures of an ImageSet, in the order of its records.

    text_features: those of the captions (T, D), where they are known.
    """
    captions = [caption for record in records for caption in record.captions]
    counts = [len(record.captions) for record in records]
    if text_features is None:
        text_features = encode_texts(model, captions, device)
    return SplitFeatures(
        images=encode_images(model, images, device, batch_size, workers)["fused"],
        texts=text_features,
        captions=captions,
        image_of_text=np.repeat(np.arange(len(records)), counts),
    )


# ------------------------------------------------------------------ the script


class Result(NamedTuple):
    """Whether a model keeps a promise."""

    promise: str
    kept: bool
    detail: str


def verify(model, images, device):
    """What the model promises, checked on an ImageSet: a list of Result."""
    tolerance = TOLERANCE[torch.device(device).type]
    features = encode_images(model, images, device)
    alone = encode_images(model, images, device, batch_size=1)
    difference = (features["fused"] - alone["fused"]).abs().max().item()
    results = [
        Result(
            "no dependence on batch mates", difference <= tolerance, f"difference {difference:.1e}"
        )
    ]
    if model.graph == "none":
        return results

    exchanged = copy.copy(images)  # every image with another's graph
    exchanged.source = np.roll(images.source, 1)
    changes = encode_images(model, exchanged, device)["fused"] - features["fused"]
    has_objects = torch.tensor([len(class_ids) > 0 for class_ids, _ in images.boxes])
    least = 0.0
    if has_objects.any():
        least = changes[has_objects].abs().amax(dim=1).min().item()
    kept = least > tolerance or len(images) < 2
    promise = "own graph: another image's changes the embedding"
    results.append(Result(promise, kept, f"least change {least:.1e}"))

    features = encode_images(model, images.without_objects(), device)
    clip_alone = F.normalize(features["clip"].to(device), dim=-1).cpu()
    kept = torch.equal(features["fused"], clip_alone)
    results.append(Result("without objects, exactly CLIP's embedding", kept, "compared to the bit"))
    return results


def detections_of(names, det_json):
    """The detection file of each image, or None.

    names: paths of the images as `det_json`, the folder of their detections, mirrors them; None for
    no graphs. Raises ValueError where there is no such folder.
    """
    if not det_json:
        return [None] * len(names)
    require_detection_folder(det_json)
    found = match_detections(names, det_json)
    return [found[name] for name in names]


def load_images(paths, names, det_json, checkpoint):
    """ImageSet of image files as a checkpoint's model takes them, all in memory.

    names, det_json: as of `detections_of`. Raises ValueError that lists unreadable images. For
    many files see `encode_files`.
    """
    detections = detections_of(names, det_json)
    images = ImageSet(paths, detections, **image_settings(checkpoint))
    require_readable(images)
    say_what_is_missing(images, names, detections, det_json)
    return images


def say_what_is_missing(images, names, detections, det_json):
    """Print counts of Images, and on standard error what seems wrong with them."""
    print(images.counts())
    warnings = images.losses()
    if det_json and not any(len(class_ids) for class_ids, _ in images.boxes):
        warnings.append(no_objects(names, detections, det_json))
    warnings += [f"{kind}: {evidence}" for kind, evidence in images.findings()]
    for line in warnings:
        print(f"warning: {line}", file=sys.stderr)


def main(arguments=None):
    options = parse_options("clip_gcn", __doc__, arguments)
    device = pick_device(options.device)
    name = options.checkpoint or latest_checkpoint()
    model, checkpoint = load_model(name, device, options.activation)
    paths = sorted(path for path in SAMPLES.iterdir() if is_image(path))
    names = [path.name for path in paths]
    images = load_images(paths, names, SAMPLES.parent / "det_json", checkpoint)
    features = encode_images(model, images, device, options.batch_size)
    print("image            objects  |CLIP|  |GCN|  |fused|  cos(CLIP,GCN)  cos(CLIP,fused)")
    for i, name in enumerate(names):
        objects = len(images.boxes[i][0])
        of_clip, of_graph, fused = (features[branch][i] for branch in ("clip", "graph", "fused"))
        print(
            f"{name:16s} {objects:7d}  "
            f"{of_clip.norm():6.3f}  {of_graph.norm():6.3f}  {fused.norm():6.3f}   "
            f"{F.cosine_similarity(of_clip, of_graph, dim=0):12.3f}  "
            f"{F.cosine_similarity(of_clip, fused, dim=0):15.3f}"
        )
    results = verify(model, images, device)
    for result in results:
        print(f"{'ok    ' if result.kept else 'FAILED'} {result.promise} ({result.detail})")
    if options.out:
        arrays = {branch: values.numpy() for branch, values in features.items()}
        with written_whole(options.out) as temporary, open(temporary, "wb") as file:
            np.savez(file, names=names, **arrays)
        shape = tuple(features["clip"].shape)
        print(f"{options.out}: clip, graph and fused features, each {shape}")
    return 0 if all(result.kept for result in results) else 1


if __name__ == "__main__":
    run(lambda: sys.exit(main()))
