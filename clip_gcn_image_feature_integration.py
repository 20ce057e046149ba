"""The one encoder: images with their object graphs, and texts, to features.

    python clip_gcn_image_feature_integration.py                       # the sample images
    python clip_gcn_image_feature_integration.py --out features.npz    # and export them

As a script it prints, for each image, norm and cosine of the CLIP, GCN and fused features, checks
that every image got its own graph, that an image without objects keeps its CLIP embedding, and
that no embedding depends on its batch mates, and exits with 1 where one of these fails.
"""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils import parametrize
from tqdm import tqdm

import clip
import simple_tokenizer
from backbones import preprocess
from dataset.batches import ImageSet, require_readable, trim
from dataset.images import is_image, match_detections
from det_formats.det_json import LABELS, LabelMap, read_label_map
from model import build, is_checkpoint, load_checkpoint
from options import default_options, parse_options

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


# fmt: on


def load_model(name_or_path, device, activation=None):
    """(model, checkpoint) of a file of ours, of the published FG-CROSS, or of any CLIP.

    activation: of a CLIP whose weights do not tell it. The checkpoint dict of a file that is not
    ours has no data set; its other options are the defaults, for a CLIP without graph, and its path
    is that of the file with the weights. Raises ValueError where there is no such file, or it is
    none of these.
    """
    options = default_options("train", groups=("data", "model"))
    options |= {"graph": "none", "seed": 0, "dataset": None}
    is_name = clip.is_clip_source(name_or_path)
    if not is_name and (not Path(name_or_path).exists() or is_checkpoint(name_or_path)):
        model, checkpoint = load_checkpoint(name_or_path, device)
        if checkpoint["options"]["graph"] == "published":
            print(BATCHES, file=sys.stderr)
        checkpoint["options"] = {**options, **checkpoint["options"]}
        return model, checkpoint
    try:
        plain, _ = clip.load(name_or_path, activation=activation)
    except ValueError as error:
        if is_name:
            raise
        raise ValueError(
            f"{name_or_path}: not an FG-CROSS checkpoint; as a CLIP: {error}"
        ) from None
    labels = read_label_map(LABELS).lines
    model = build(plain.model_config, labels, options)
    model.load_state_dict(plain.state_dict())
    options["activation"] = plain.model_config["activation"]
    checkpoint = {"definition": plain.model_config, "labels": labels, "options": options}
    checkpoint["path"] = plain.path
    return model.to(device).eval(), checkpoint


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
    """Features of an ImageSet in its order: {"clip", "graph", "fused"}, each (I, E) on the CPU.

    Only "fused" has unit length; "graph" is zero for an image without objects and for a model
    without graph branch. Always fp32.
    """
    model.eval()
    parts, keys = [], ("nodes", "adjacency", "mask")
    batches = images.batches(batch_size, workers, pin_memory=torch.device(device).type == "cuda")
    with full_precision(), parametrize.cached():
        for batch in tqdm(batches, desc="encode", leave=False, disable=len(images) < 1000):
            batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
            if images.features is None:
                image_features = model.encode_image(preprocess.normalize(batch["image"]))
            else:
                image_features = batch["image_features"]
            branches = model.branches(image_features, *(batch[key] for key in keys))
            parts.append([features.cpu() for features in branches])
    columns = (torch.cat(column) for column in zip(*parts, strict=True))
    return dict(zip(("clip", "graph", "fused"), columns, strict=True))


@torch.no_grad()
def encode_texts(model, texts, device, batch_size=256):
    """Unit features of texts (T, E) on the CPU.

    Texts with the same tokens are encoded once, so that their features are equal to the bit.
    """
    model.eval()
    tokens = simple_tokenizer.tokenize(texts, context_length=len(model.positional_embedding))
    distinct, inverse = torch.unique(tokens, dim=0, return_inverse=True)
    with parametrize.cached():
        parts = [
            F.normalize(model.encode_text(trim(part).to(device)), dim=-1).cpu()
            for part in distinct.split(batch_size)
        ]
    return torch.cat(parts)[inverse]


def verify(model, images, device):
    """What the model promises, checked on images: list of (promise, kept, detail)."""
    features = encode_images(model, images, device)
    fused, results = features["fused"], []
    alone = encode_images(model, images, device, batch_size=1)["fused"]
    worst = (fused - alone).abs().max().item()
    tolerance = TOLERANCE[torch.device(device).type]
    results.append(("no dependence on batch mates", worst <= tolerance, f"difference {worst:.1e}"))
    if model.graph == "none":
        return results
    own, empty = images.source.copy(), images.boxes
    try:
        images.source = np.roll(own, 1)
        moved = (encode_images(model, images, device)["fused"] - fused).abs().amax(dim=1)
        images.boxes = [(class_ids[:0], boxes[:0]) for class_ids, boxes in empty]
        bare = encode_images(model, images, device)
    finally:
        images.source, images.boxes = own, empty
    has = torch.tensor([len(class_ids) > 0 for class_ids, _ in images.boxes])
    least = moved[has].min().item() if has.any() else 0.0
    promise = "own graph: another image's changes the embedding"
    results.append((promise, least > tolerance or len(own) < 2, f"least change {least:.1e}"))
    same = torch.equal(bare["fused"], F.normalize(bare["clip"].to(device), dim=-1).cpu())
    results.append(("without objects, exactly CLIP's embedding", same, "compared to the bit"))
    return results


def load_images(paths, names, det_json, checkpoint):
    """ImageSet of image files as a checkpoint's model takes them; ValueError lists unreadable ones.

    names: their paths as `det_json`, the folder of their detections, mirrors them; None for no
    graphs.
    """
    if det_json and not Path(det_json).is_dir():
        raise ValueError(f"{det_json}: no such folder; check --det-json")
    image_size, label_map = checkpoint["definition"]["image_size"], LabelMap(checkpoint["labels"])
    found = match_detections(names, det_json) if det_json else {}
    if det_json and checkpoint["options"]["graph"] == "none":
        print("this model has no graph branch: detections change nothing")
    detections = [found.get(name) for name in names]
    published = checkpoint["options"]["graph"] == "published"
    max_objects = checkpoint["options"]["max_objects"]
    images = ImageSet(
        paths,
        detections,
        image_size=image_size,
        label_map=label_map,
        max_objects=max_objects,
        published=published,
    )
    require_readable(images)
    print(images.counts())
    return images


def main(arguments=None):
    options = parse_options("clip_gcn", __doc__, arguments)
    device = pick_device(options.device)
    model, checkpoint = load_model(options.checkpoint, device, options.activation)
    paths = sorted(path for path in SAMPLES.iterdir() if is_image(path))
    names = [path.name for path in paths]
    images = load_images(paths, names, SAMPLES.parent / "det_json", checkpoint)
    features = encode_images(model, images, device, options.batch_size)
    print("image            objects  |CLIP|  |GCN|  |fused|  cos(CLIP,GCN)  cos(CLIP,fused)")
    cosine = partial(F.cosine_similarity, dim=0)
    for i, path in enumerate(images.paths):
        row = {name: values[i] for name, values in features.items()}
        norms = "  ".join(f"{row[name].norm():6.3f}" for name in ("clip", "graph", "fused"))
        print(
            f"{path.name:16s} {len(images.boxes[i][0]):7d}  {norms}   "
            f"{cosine(row['clip'], row['graph']):12.3f}  {cosine(row['clip'], row['fused']):15.3f}"
        )
    results = verify(model, images, device)
    for promise, kept, detail in results:
        print(f"{'ok    ' if kept else 'FAILED'} {promise} ({detail})")
    if options.out:
        np.savez(options.out, names=names, **{k: v.numpy() for k, v in features.items()})
        print(
            f"{options.out}: clip, graph and fused features, each {tuple(features['clip'].shape)}"
        )
    return 0 if all(kept for _, kept, _ in results) else 1


if __name__ == "__main__":
    sys.exit(main())
