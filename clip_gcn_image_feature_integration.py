"""The one encoder: images with their object graphs, and texts, to features.

    python clip_gcn_image_feature_integration.py                       # the sample images
    python clip_gcn_image_feature_integration.py --out features.npz    # and export them

As a script it prints, for each image, norm and cosine of the CLIP, GCN and fused features, checks
that every image got its own graph, that an image without objects keeps its CLIP embedding, and
that no embedding depends on its batch mates, and exits with 1 where one of these fails.
"""

from options import answer_early

if __name__ == "__main__":
    answer_early("clip_gcn", __doc__)  # before torch is imported, which takes seconds

import copy
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils import parametrize
from tqdm import tqdm

import clip
import simple_tokenizer
from backbones import preprocess
from dataset.batches import ImageSet, require_readable, trim
from dataset.images import (
    is_image,
    match_detections,
    no_objects,
    require_detection_folder,
)
from det_formats.det_json import LabelMap, read_label_map
from model import build, is_checkpoint, latest_checkpoint, load_checkpoint
from options import default_options, parse_options, run

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


TOLERANCE = {"cpu": 1e-6, "cuda": 1e-5}  # between two batches of one image, on unit features


def load_model(name_or_path, device, activation=None):
    """(model, checkpoint) of a file of ours, of the published FG-CROSS, or of any CLIP.

    activation: of a CLIP whose weights do not tell it. The checkpoint dict of a file that is not
    ours has no data set; its other options are the defaults, for a CLIP without graph, and its path
    is that of the file with the weights. Raises ValueError where there is no such file, or it is
    none of these.
    """
    if _is_plain_clip(name_or_path):
        return _load_plain_clip(name_or_path, device, activation)
    model, checkpoint = load_checkpoint(name_or_path, device)
    if checkpoint["options"]["graph"] == "published":
        print(BATCHES, file=sys.stderr)
    checkpoint["options"] = {**_plain_options(), **checkpoint["options"]}
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
    options = {**_plain_options(), "activation": model_config["activation"]}
    model = build(model_config, labels, options)
    model.load_state_dict(network.state_dict())
    checkpoint = {
        "definition": model_config,
        "labels": labels,
        "options": options,
        "path": network.path,
    }
    return model.to(device).eval(), checkpoint


def _plain_options():
    """The training options of a CLIP that was not trained here; no data set, no graph."""
    options = default_options("train", groups=("data", "model"))
    return {**options, "graph": "none", "seed": 0, "dataset": None}


def warn_of_scenes(checkpoint):
    """Say what to do where a model of the synthetic scenes is about to see other images."""
    if checkpoint["options"]["dataset"] == ["scenes"]:
        print(SCENES, file=sys.stderr)


def pick_device(name):
    """The torch device that auto, cpu or cuda means; ValueError for cuda where there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device; use --device auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def full_precision():
    """A context in which convolutions are true fp32 on CUDA too, where the default is TF32."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


@torch.no_grad()
def encode_images(model, images, device, batch_size=64, workers=0):
    """Features of an ImageSet in its order: {"clip", "graph", "fused"}, each (I, D) on the CPU.

    Only "fused" has unit length; "graph" is zero for an image without objects and for a model
    without graph branch. Always fp32.
    """
    model.eval()
    parts = {"clip": [], "graph": [], "fused": []}
    on_cuda = torch.device(device).type == "cuda"
    batches = images.batches(batch_size, workers=workers, pin_memory=on_cuda)
    with full_precision(), parametrize.cached():
        for batch in tqdm(batches, desc="encode", leave=False, disable=len(images) < 1000):
            batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
            if images.features is None:
                image_features = model.encode_image(preprocess.normalize(batch["image"]))
            else:
                image_features = batch["image_features"]
            clip_part, graph_part, fused_part = model.branches(
                image_features, batch["nodes"], batch["adjacency"], batch["mask"]
            )
            parts["clip"].append(clip_part.cpu())
            parts["graph"].append(graph_part.cpu())
            parts["fused"].append(fused_part.cpu())
    return {name: torch.cat(features) for name, features in parts.items()}  # (I, D) each


@torch.no_grad()
def encode_texts(model, texts, device, batch_size=256):
    """Unit features of texts (T, D) on the CPU.

    Texts with the same tokens are encoded once, so that their features are equal to the bit.
    """
    model.eval()
    tokens = simple_tokenizer.tokenize(texts, context_length=len(model.positional_embedding))
    distinct, inverse = torch.unique(tokens, dim=0, return_inverse=True)
    parts = []
    with parametrize.cached():
        for part in distinct.split(batch_size):
            features = model.encode_text(trim(part).to(device))
            parts.append(F.normalize(features, dim=-1).cpu())
    return torch.cat(parts)[inverse]  # (T, D)


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

    bare = copy.copy(images)  # no image has objects
    bare.boxes = [(class_ids[:0], boxes[:0]) for class_ids, boxes in images.boxes]
    features = encode_images(model, bare, device)
    clip_alone = F.normalize(features["clip"].to(device), dim=-1).cpu()
    kept = torch.equal(features["fused"], clip_alone)
    results.append(Result("without objects, exactly CLIP's embedding", kept, "compared to the bit"))
    return results


def load_images(paths, names, det_json, checkpoint, skip_unreadable=False):
    """ImageSet of image files as a checkpoint's model takes them; ValueError lists unreadable ones.

    names: their paths as `det_json`, the folder of their detections, mirrors them; None for no
    graphs. skip_unreadable: leave those out that cannot be read, and list them on standard error;
    the set's `paths` are those of the others.
    """
    options = checkpoint["options"]
    detections = [None] * len(names)
    if det_json:
        require_detection_folder(det_json)
        found = match_detections(names, det_json)
        detections = [found[name] for name in names]
        if options["graph"] == "none":
            print("this model has no graph branch: detections change nothing")
    settings = {
        "image_size": checkpoint["definition"]["image_size"],
        "label_map": LabelMap(checkpoint["labels"]),
        "max_objects": options["max_objects"],
        "published": options["graph"] == "published",
    }
    images = ImageSet(paths, detections, **settings)
    if skip_unreadable and images.problems:
        kept = _readable(images)
        names = [names[i] for i in kept]
        detections = [detections[i] for i in kept]
        images = ImageSet([paths[i] for i in kept], detections, **settings)
    require_readable(images, remedy="infer.py --skip-unreadable leaves them out")
    print(images.counts())
    if det_json and not any(len(class_ids) for class_ids, _ in images.boxes):
        print(f"warning: {no_objects(names, detections, det_json)}", file=sys.stderr)
    for kind, evidence in images.findings():
        print(f"warning: {kind}: {evidence}", file=sys.stderr)
    return images


def _readable(images):
    """Which images of an ImageSet could be read; lists the others on standard error."""
    readable = [i for i, digest in enumerate(images.hashes) if digest is not None]
    count = f"{len(images.problems)} of {len(images)} images are unreadable"
    if not readable:
        raise ValueError(f"{count}: none is left; the first: {images.problems[0]}")
    lines = [f"warning: {count} and left out:", *images.problems]
    print("\n  ".join(lines), file=sys.stderr)
    return readable


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
        np.savez(options.out, names=names, **arrays)
        shape = tuple(features["clip"].shape)
        print(f"{options.out}: clip, graph and fused features, each {shape}")
    return 0 if all(result.kept for result in results) else 1


if __name__ == "__main__":
    run(lambda: sys.exit(main()))
