"""Rows of bench.py: a training step and the towers' features, beside open_clip's own.

open_clip has the same weights and the same precision, and pads captions to 77 tokens, as it always
does. Captions are made up: as long as those of RSITMD's test split, and about as often
repeated.
"""

import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F

import model
from backbones import preprocess
from backbones.model_configs import read_model_config
from benchmarks.frame import compared, operations_of, require_equal, with_share_of_limit
from benchmarks.indexing import plain_checkpoint, random_model, write_photos
from clip_gcn_image_feature_integration import encode_split, encode_texts, full_precision
from dataset.annotations import Record
from dataset.batches import ImageSet, TrainingSet
from det_formats.det_json import LabelMap
from evaluate import retrieve
from metrics.protocol import measure
from options import default_options
from training.step import (
    PRECISIONS,
    make_learner,
    set_training_mode,
    train_step,
)

LENGTHS = {  # tokens of RSITMD's 2,260 test captions, start and end included: how many have so many
    6: 16, 7: 43, 8: 80, 9: 112, 10: 245, 11: 241, 12: 280, 13: 249, 14: 214, 15: 175, 16: 151,
    17: 124, 18: 71, 19: 72, 20: 50, 21: 34, 22: 26, 23: 20, 24: 19, 25: 13, 26: 9, 27: 9, 28: 2,
    29: 1, 30: 3, 31: 1,
}  # fmt: skip
REPEATED = 153  # of these captions, about, which others equal

SMALL = {
    "name": "small-vit",
    "embed_dim": 64,
    "image_size": 64,
    "vision": {"patch_size": 16, "width": 64, "layers": 2, "heads": 1},
    "text": {"context_length": 77, "vocab_size": 49408, "width": 64, "layers": 2, "heads": 1},
}
WORDS = "a the two many some green small large white road river ships planes trees near of".split()


# ------------------------------------------------------------------ what is encoded


def sentences(number, seed=0):
    """Made-up captions with the lengths and repetitions of RSITMD's test captions.

    Each word is one token; start and end token come beside.
    """
    random = np.random.default_rng(seed)
    lengths = list(LENGTHS)
    shares = np.array(list(LENGTHS.values())) / sum(LENGTHS.values())
    drawn = []
    for length in random.choice(lengths, size=number, p=shares):
        drawn.append(" ".join(random.choice(WORDS, size=length - 2)))
    for _ in range(number * REPEATED // sum(LENGTHS.values())):
        first, second = random.integers(number, size=2)
        drawn[first] = drawn[second]
    return drawn


def measured_config(small):
    """The model config that the rows measure: ViT-B/32, or one that fits into a test."""
    return SMALL if small else read_model_config("ViT-B-32")


def both_models(device, small):
    """(our model and its checkpoint, open_clip's model) with equal random weights, quickgelu."""
    model_config = measured_config(small)
    ours, checkpoint = random_model(model_config, device)
    vision, text = model_config["vision"], model_config["text"]
    theirs = open_clip.model.CLIP(
        embed_dim=model_config["embed_dim"],
        vision_cfg={
            "image_size": model_config["image_size"],
            "patch_size": vision["patch_size"],
            "width": vision["width"],
            "layers": vision["layers"],
            "head_width": vision["width"] // vision["heads"],
        },
        text_cfg=text,
        quick_gelu=True,
    )
    theirs.load_state_dict(ours.state_dict())
    return ours, checkpoint, theirs.to(device).eval()


def padded_features(theirs, texts, device, batch_size=256):
    """Unit features (T, D) by open_clip: each text, at 77 tokens."""
    parts = []
    for start in range(0, len(texts), batch_size):
        tokens = open_clip.tokenize(texts[start : start + batch_size]).to(device)
        parts.append(theirs.encode_text(tokens, normalize=True).cpu())
    return torch.cat(parts)


def close(one, other, tolerance=1e-5):
    """Whether two tensors differ by no more than the tolerance anywhere."""
    return float((one - other).abs().max()) <= tolerance


# ------------------------------------------------------------------ features


def image_features(device, small):
    """Features of images in memory, ViT-B/32, in fp32 and bf16."""
    number, repetitions = (2, 1) if small else (64, 5)
    ours, checkpoint, theirs = both_models(device, small)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        images = _image_set(Path(folder), number, checkpoint)
    pixels = preprocess.normalize(images.pixels.to(device))
    results = []
    for name in ("fp32", "bf16"):
        precision = PRECISIONS[name]

        of_ours = partial(_unit_features, ours, pixels, precision)
        of_theirs = partial(_unit_features, theirs, pixels, precision)
        tolerance = 1e-5 if name == "fp32" else 5e-3  # different photos differ by 3e-2
        require_equal(close(of_ours(), of_theirs(), tolerance), "the image features")
        sides = {"ours": of_ours, "open_clip": of_theirs}
        what = f"{number} images, ViT-B/32, {name}"
        result = compared(what, sides, repetitions, warm_up=False)
        operations = operations_of(of_ours)
        results.append(with_share_of_limit(result, operations, device, precision, small))
    return results


@torch.no_grad()
def _unit_features(model, pixels, precision):
    """Unit features (B, D) of normalised pixels (B, 3, H, W), on the CPU."""
    half = torch.autocast(pixels.device.type, precision, enabled=precision != torch.float32)
    with half, full_precision():
        return F.normalize(model.encode_image(pixels).float(), dim=-1).cpu()


@torch.no_grad()
def text_features(device, small):
    """Features of captions as of RSITMD's test split, fp32; open_clip's of every tenth of them."""
    number, repetitions = (60, 1) if small else (sum(LENGTHS.values()), 3)
    ours, _, theirs = both_models(device, small)
    texts = sentences(number)
    tenth = texts[::10]
    found = encode_texts(ours, texts, device)
    require_equal(close(found[::10], padded_features(theirs, tenth, device)), "the text features")
    return [
        compared(
            f"{number:,} captions as of RSITMD, ViT-B/32, fp32",
            {
                "ours": lambda: encode_texts(ours, texts, device),
                "open_clip, 77 tokens, a tenth of them, x 10": lambda: padded_features(
                    theirs, tenth, device
                ),
            },
            repetitions,
            shares={"open_clip, 77 tokens, a tenth of them, x 10": len(tenth) / number},
            warm_up=False,
        )
    ]


# ------------------------------------------------------------------ a test set


def evaluating(device, small):
    """A test set of RSITMD's shape, a tenth of its size: encode, then measure.

    Evaluation codes that load (image, caption) pairs, as the published one, encode an image once
    for each caption. So does one of the other sides.
    """
    number, captions, repetitions = (10, 51, 1) if small else (45, 226, 3)
    ours, checkpoint, theirs = both_models(device, small)
    texts = sentences(captions)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        images = _image_set(Path(folder), number, checkpoint)
    owned = [[] for _ in range(number)]
    for place, text in enumerate(texts):
        owned[place % number].append(text)
    records = [Record(f"{i}.jpg", tuple(own)) for i, own in enumerate(owned)]

    counts = [len(record.captions) for record in records]

    def ours_measured():
        return measure(retrieve(encode_split(ours, images, records, device), images))

    @torch.no_grad()
    def each_once():
        pixels = preprocess.normalize(images.pixels.to(device))
        of_images = theirs.encode_image(pixels, normalize=True).cpu()
        of_texts = padded_features(theirs, [text for own in owned for text in own], device)
        scores = of_images @ of_texts.T  # (I, T)
        return scores, _recalls(scores, counts)

    @torch.no_grad()
    def pair_by_pair():
        of_images, of_texts = [], []
        for i, record in enumerate(records):
            pixels = images.pixels[i][None].expand(len(record.captions), -1, -1, -1)
            pixels = preprocess.normalize(pixels.to(device))
            of_images.append(theirs.encode_image(pixels, normalize=True).cpu())
            of_texts.append(padded_features(theirs, list(record.captions), device))
        scores = torch.stack([own[0] for own in of_images]) @ torch.cat(of_texts).T  # (I, T)
        return scores, _recalls(scores, counts)

    # Scores of random weights lie close together: recalls of other last bits may differ.
    split = encode_split(ours, images, records, device)
    scores = split.images @ split.texts.T  # (I, T)
    for other in (each_once, pair_by_pair):
        require_equal(close(other()[0], scores), "the cosines")
    recalls = ours_measured()["mR"], _recalls(scores, counts)
    require_equal(abs(recalls[0] - recalls[1]) < 0.01, "the recalls")
    sides = {
        "ours": ours_measured,
        "open_clip, an image encoding a caption": pair_by_pair,
        "open_clip, each image once": each_once,
    }
    what = f"{number} images, {captions} captions, ViT-B/32"
    return [compared(what, sides, repetitions, warm_up=False)]


def _recalls(scores, counts):
    """mR in percent of scores (I, T); counts: captions of each image, one image's after another's.

    Plain: no ties are looked for.
    """
    image_of_text = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    order = scores.argsort(dim=1, descending=True)
    first = (image_of_text[order] == torch.arange(len(counts))[:, None]).float().argmax(dim=1)
    own = scores[image_of_text, torch.arange(scores.shape[1])]
    better = (scores > own).sum(dim=0)
    shares = [(ranks < k).float().mean() for ranks in (first, better) for k in (1, 5, 10)]
    return 100 * float(torch.stack(shares).mean())


def _image_set(folder, number, checkpoint, max_objects=0):
    """An ImageSet of so many photos, without detections, in memory; max_objects: of a graph."""
    write_photos(folder / "images", number)
    paths = sorted((folder / "images").iterdir())
    return ImageSet(
        paths,
        [None] * number,
        image_size=checkpoint["definition"]["image_size"],
        label_map=LabelMap(checkpoint["labels"]),
        max_objects=max_objects,
    )


# ------------------------------------------------------------------ a training step


def training_step(device, small):
    """A whole training step, ViT-B/32, captions as long as RSITMD's, in fp32 and bf16."""
    pairs, repetitions = (4, 1) if small else (32, 5)
    batch_of, train_set = training_batch(pairs, device, small)
    pixels = preprocess.normalize(batch_of["image"].to(device))
    padded = open_clip.tokenize(train_set.captions).to(device)
    padded = padded[batch_of["index"].to(device)]
    results = []
    steps = {}
    for name in ("fp32", "bf16"):
        precision = PRECISIONS[name]
        ours, _, theirs = both_models(device, small)
        options = fine_tuning_options(name)
        learner = make_learner(ours, options, steps=1000)
        set_training_mode(ours, options)

        our_step = partial(train_step, learner, train_set, batch_of, options, "the bench")
        their_step = _plain_step(theirs.train(), pixels, padded, precision, options)
        steps[name] = our_step
        tolerance = 1e-5 if name == "fp32" else 5e-3  # captions of other images: 2e-2
        require_equal(abs(our_step() - their_step()) <= tolerance, "the first losses")
        sides = {"ours": our_step, "open_clip, 77 tokens": their_step}
        if name == "bf16":
            sides["ours in fp32"] = steps["fp32"]
        what = f"{pairs} pairs, ViT-B/32, {name}"
        result = compared(what, sides, repetitions, warm_up=False)
        operations = operations_of(our_step)
        results.append(with_share_of_limit(result, operations, device, precision, small))
    return results


def fine_tuning_options(precision, **changes):
    """train.py's options of a fine-tuned CLIP."""
    options = default_options("train")
    plain = {"graph": "none", "clip": "random", "augment": (), "precision": precision}
    return {**options, "lr": 1e-5, **plain, **changes}


def training_batch(pairs, device, small, detections=None):
    """(a batch, its TrainingSet) of distinct photos and captions."""
    checkpoint = plain_checkpoint(measured_config(small))
    texts = list(dict.fromkeys(sentences(4 * pairs)))[:pairs]
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        if detections is None:
            images = _image_set(Path(folder), pairs, checkpoint)
        else:
            images = _image_set(Path(folder), pairs, checkpoint, max_objects=20)
            images = images.with_boxes(detections)
    records = [Record(path.name, (text,)) for path, text in zip(images.paths, texts, strict=True)]
    train_set = TrainingSet(
        images,
        records,
        model_config=checkpoint["definition"],
        augment=(),
        drop_graphs=0,
        seed=0,
    )
    return next(iter(train_set.batches(1, pairs))), train_set


def _plain_step(theirs, pixels, padded, precision, options):
    """A step of open_clip's model with its loss, as its own training script does it."""
    optimizer = torch.optim.AdamW(
        theirs.parameters(), lr=options["lr"], betas=(0.9, 0.98), fused=True
    )
    contrastive = open_clip.ClipLoss()
    device_type = pixels.device.type

    def step():
        with torch.autocast(device_type, precision, enabled=precision != torch.float32):
            image_features, text_features, logit_scale = theirs(pixels, padded)
        loss = contrastive(image_features.float(), text_features.float(), logit_scale)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


def graph_branch(device, small):
    """A training step with the graph branch, 20 objects an image, beside one without."""
    pairs, repetitions = (4, 1) if small else (32, 5)
    random = np.random.default_rng(0)
    labels = plain_checkpoint(measured_config(small))["labels"]
    kinds = len(LabelMap(labels))
    detections = []
    for _ in range(pairs):
        boxes = random.uniform((1, 1, 5, 5, -1.5, 0.3), (255, 255, 60, 60, 1.5, 1), size=(20, 6))
        detections.append((random.integers(kinds, size=20), boxes))
    steps = {}
    for graph, own in (("object", detections), ("none", None)):
        batch, train_set = training_batch(pairs, device, small, own)
        objects = int(batch["mask"].sum())
        require_equal(objects == (0 if own is None else 20 * pairs), "the objects")
        torch.manual_seed(0)
        options = fine_tuning_options("fp32", graph=graph)
        network = model.build(measured_config(small), labels, options).to(device)
        learner = make_learner(network, options, steps=1000)
        set_training_mode(network, options)
        steps[graph] = partial(train_step, learner, train_set, batch, options, "the bench")
    sides = {"with the graph branch": steps["object"], "--graph none": steps["none"]}
    return [compared(f"a step of {pairs} pairs, ViT-B/32, fp32", sides, repetitions)]
