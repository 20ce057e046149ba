"""Retrieval metrics by the field's protocol, and the script that measures a checkpoint.

    python evaluate.py                                          # models/best_model.pth, test split
    python evaluate.py --checkpoint models/ucm/best_model.pth --json result.json

Image to text: best rank of any of the image's captions. Text to image: rank of its image. R@K is
the share of queries with a rank of at most K, mR the mean of the six. Exact ties are real here
(identical captions have identical features), so ranks are expectations under random order of the
tied, computed exactly; the pessimistic and optimistic bounds are printed where they differ by 0.1
point or more. Codes that sort print one order-dependent value between these bounds.

The module shadows the PyPI package of the same name: run from the root of this project.
Sizes in the shapes below: I images, T caption rows, U distinct texts, Q queries, G gallery items.
"""

import argparse
import hashlib
import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from annotations import normal_form
from clip_gcn_image_feature_integration import (
    add_encoder_options,
    encode_images,
    encode_texts,
    output_path,
    pick_device,
)
from dataloader import RetrievalData, add_data_options, require_readable
from model import load_checkpoint
from V_Graph import Vocabulary

KS = (1, 5, 10)
_CHUNK = 1024  # queries ranked at once


class Ranks(NamedTuple):
    """Where each query's best relevant item stands: all (Q,) integer arrays."""

    better: np.ndarray  # items that score higher
    tied: np.ndarray  # items that score the same, itself included
    relevant: np.ndarray  # relevant ones among the tied

    def expected(self):
        """Expected rank if the tied are in random order (minimum of r draws from 1 ... m)."""
        return self.better + (self.tied + 1) / (self.relevant + 1)

    def recall(self, k):
        """(pessimistic, expected, optimistic) probability (Q,) of a rank of at most k.

        Expected: 1 - C(m - r, k') / C(m, k'), with k' places left for m tied, r of them relevant.
        """
        places = np.clip(k - self.better, 0, self.tied)
        miss = np.ones(len(places))
        for j in range(k):
            left = np.maximum(self.tied - self.relevant - j, 0) / np.maximum(self.tied - j, 1)
            miss = np.where(j < places, miss * left, miss)
        worst = self.better + self.tied - self.relevant + 1
        return (worst <= k).astype(float), 1 - miss, (self.better < k).astype(float)


def rank(scores, relevant, rows):
    """Ranks of the best relevant item of each query.

    scores: (Q, G); relevant: (Q, G), how many of an item's gallery rows are relevant to the query;
    rows: (G,), how many gallery rows the item stands for.
    """
    best = np.where(relevant > 0, scores, -np.inf).max(axis=1, keepdims=True)  # (Q, 1)
    equal = scores == best
    better = ((scores > best) * rows).sum(axis=1)
    return Ranks(better, (equal * rows).sum(axis=1), (equal * relevant).sum(axis=1))


def _joined(parts):
    return Ranks(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def retrieval_ranks(scores, text_to_image, text_index=None, groups=None):
    """Ranks in both directions: (image to text (I), text to image (T)).

    scores: (I, U), images by distinct texts; text_to_image: (T,) the image of each caption row;
    text_index: (T,) the column of each row, by default the row itself (U = T). groups: (T,) ids;
    a caption is relevant to every image that has one of the same group (default: its image alone).
    """
    scores, text_to_image = np.asarray(scores), np.asarray(text_to_image)
    text_index = np.arange(len(text_to_image)) if text_index is None else np.asarray(text_index)
    groups = text_to_image if groups is None else np.asarray(groups)
    _check(scores, text_to_image)
    groups = np.unique(groups, return_inverse=True)[1]
    owns = np.zeros((len(scores), groups.max() + 1), dtype=np.float32)
    owns[text_to_image, groups] = 1  # (I, groups)
    texts = np.zeros((owns.shape[1], scores.shape[1]), dtype=np.float32)
    np.add.at(texts, (groups, text_index), 1)  # (groups, U)
    rows = texts.sum(axis=0).astype(int)
    to_text, to_image = [], []
    for start in range(0, len(scores), _CHUNK):
        part = slice(start, start + _CHUNK)
        to_text.append(rank(scores[part], (owns[part] @ texts).astype(int), rows))
    ones = np.ones(len(scores), dtype=int)
    for start in range(0, len(text_index), _CHUNK):
        part = slice(start, start + _CHUNK)
        relevant = owns[:, groups[part]].T.astype(int)  # (chunk, I)
        to_image.append(rank(scores[:, text_index[part]].T, relevant, ones))
    return _joined(to_text), _joined(to_image)


def _check(scores, text_to_image):
    if np.isnan(scores).any():
        raise ValueError("scores hold NaN: the model or its input is broken")
    without = set(range(len(scores))) - set(text_to_image.tolist())
    if without:
        raise ValueError(f"{len(without)} images have no caption, the first: {min(without)}")


def _mean(values):
    """Exactly rounded, so that the order of the values does not matter."""
    return math.fsum(values) / len(values)


def metrics(image_to_text, text_to_image, ks=KS):
    """Recalls in percent with bounds, mR, mean and median of the expected ranks, as a dict."""
    result = {}
    for name, ranks, gallery in (
        ("image_to_text", image_to_text, len(text_to_image.better)),
        ("text_to_image", text_to_image, len(image_to_text.better)),
    ):
        if max(ks) > gallery:
            raise ValueError(f"R@{max(ks)} {name}: the gallery has only {gallery} items")
        recalls = {f"R@{k}": [100 * _mean(r) for r in ranks.recall(k)] for k in ks}
        result[name] = {key: values[1] for key, values in recalls.items()}
        result[name]["mean_rank"] = _mean(ranks.expected())
        result[name]["median_rank"] = float(np.median(ranks.expected()))
        result[name]["pessimistic"] = {key: values[0] for key, values in recalls.items()}
        result[name]["optimistic"] = {key: values[2] for key, values in recalls.items()}
    both = [result["image_to_text"], result["text_to_image"]]
    result["mR"] = _mean([side[f"R@{k}"] for side in both for k in ks])
    for bound in ("pessimistic", "optimistic"):
        result[f"mR_{bound}"] = _mean([side[bound][f"R@{k}"] for side in both for k in ks])
    return result


def retrieval_metrics(image_features, text_features, text_to_image, captions=None, ks=KS):
    """The protocol on features: a dict of `metrics`, with the numbers of images and texts.

    image_features: (I, E), text_features: (T, E), text_to_image: (T,). With `captions`, the T
    strings, identical ones (stripped, case folded) count as the same caption. Equal features are
    scored once, in an order of their own: ties are exact, and neither batch size nor row order
    matters. Raises ValueError on NaN, and on a k beyond the gallery.
    """
    distinct_images, image_index = _distinct(image_features)
    distinct_texts, text_index = _distinct(text_features)
    scores = (distinct_images @ distinct_texts.T)[image_index]  # (I, U)
    groups = None
    if captions is not None:
        groups = np.unique([normal_form(text) for text in captions], return_inverse=True)[1]
    result = metrics(*retrieval_ranks(scores, text_to_image, text_index, groups), ks)
    counts = {"images": len(image_features), "captions": len(text_features)}
    return {**counts, "distinct_texts": len(distinct_texts), **result}


def _distinct(features):
    """Distinct rows in float64, sorted, and each row's place among them."""
    values, index = torch.unique(torch.as_tensor(features), dim=0, return_inverse=True)
    return values.double().numpy(), index.numpy()


# ------------------------------------------------------------------ a model on a split


def evaluate(model, images, records, device, batch_size=64, workers=0, equivalence=False):
    """Encode a split, every image and every distinct caption once, and measure it."""
    captions = [caption for record in records for caption in record.captions]
    owners = [i for i, record in enumerate(records) for _ in record.captions]
    image_features = encode_images(model, images, device, batch_size, workers)["fused"]
    text_features = encode_texts(model, captions, device)
    same = captions if equivalence else None
    return retrieval_metrics(image_features, text_features, owners, same)


def table(result, title):
    """The metrics as lines for people; bounds where ties leave 0.1 point or more open."""
    lines = [
        f"{title}: {result['images']} images, {result['captions']} captions "
        f"({result['distinct_texts']} distinct)",
        f"{'':15s}{'R@1':>7s}{'R@5':>7s}{'R@10':>7s}{'mean rank':>12s}{'median':>9s}",
    ]
    for name, key in (("image to text", "image_to_text"), ("text to image", "text_to_image")):
        side = result[key]
        recalls = "".join(f"{side[f'R@{k}']:7.1f}" for k in KS)
        lines.append(f"{name:15s}{recalls}{side['mean_rank']:12.1f}{side['median_rank']:9.1f}")
        for k in KS:
            low, high = side["pessimistic"][f"R@{k}"], side["optimistic"][f"R@{k}"]
            if max(high - side[f"R@{k}"], side[f"R@{k}"] - low) >= 0.1:
                lines.append(f"  ties: R@{k} between {low:.1f} and {high:.1f}")
    bounds = f" (ties: between {result['mR_pessimistic']:.1f} and {result['mR_optimistic']:.1f})"
    wide = max(result["mR_optimistic"] - result["mR"], result["mR"] - result["mR_pessimistic"])
    lines.append(f"mR {result['mR']:.1f}{bounds if wide >= 0.1 else ''}")
    return "\n".join(lines)


def merged(given, saved):
    """Options of a checkpoint, replaced by those given on the command line (not None).

    Another data set than the checkpoint's brings its own folders.
    """
    given = {name: value for name, value in given.items() if value is not None}
    if given.get("dataset", saved["dataset"]) != saved["dataset"]:
        saved = {**saved, "data_root": None, "det_json": None}
    elif "data_root" in given:
        saved = {**saved, "det_json": None}
    return {**saved, **given}


def parse(arguments=None):
    """(this script's options, the data's, which are None where the checkpoint's shall hold)."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_data_options(parser)
    data_options = list(vars(parser.parse_args([])))
    parser.set_defaults(**dict.fromkeys(data_options))
    add_encoder_options(parser)
    option = parser.add_argument
    # fmt: off
    option("--split", default="test", help="train, val or test; select on val, report test")
    option("--caption-equivalence", action="store_true", help="equal captions fit equal images")
    option("--json", type=output_path, help="write figures, checkpoint hash and options here")
    # fmt: on
    options = parser.parse_args(arguments)
    return options, {name: getattr(options, name) for name in data_options}


def main(arguments=None):
    options, given = parse(arguments)
    device = pick_device(options.device)
    model, checkpoint = load_checkpoint(options.checkpoint, device)
    settings = merged(given, checkpoint["options"])
    data = RetrievalData(settings)
    data.report()
    vocabulary = Vocabulary(checkpoint["labels"])
    images = data.image_set(options.split, checkpoint["definition"]["image_size"], vocabulary)
    require_readable(images)
    result = evaluate(
        model,
        images,
        data.records(options.split),
        device,
        options.batch_size,
        settings["workers"],
        options.caption_equivalence,
    )
    print(table(result, f"{data.name} {options.split}"))
    if options.json:
        digest = hashlib.sha256(Path(options.checkpoint).read_bytes()).hexdigest()
        content = {
            "dataset": data.name,
            "split": options.split,
            "origin": data.annotations.origin,
            "checkpoint": options.checkpoint,
            "checkpoint_sha256": digest,
            "epoch": checkpoint.get("epoch"),
            "caption_equivalence": options.caption_equivalence,
            "data_options": {name: settings[name] for name in given},
            "training_options": checkpoint["options"],
            **result,
        }
        Path(options.json).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        print(f"written to {options.json}")
    return result


if __name__ == "__main__":
    main()
