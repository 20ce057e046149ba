"""A trial: how often the true sentence beats a false one, on training and validation images.

    python trial_check.py runs/trial/best_model.pth

Also prints the mean cosine of the two sentences' embeddings.
"""

import sys

import numpy as np
import torch

from clip_gcn_image_feature_integration import encode_split, encode_texts
from dataloader import read_data_sets
from dataset.counterfactual import counterfactuals
from det_formats.det_json import read_label_map
from model import load_checkpoint

IMAGES = 300  # of each split


def main():
    device = torch.device("cpu")
    model, checkpoint = load_checkpoint(sys.argv[1])
    [data] = read_data_sets(checkpoint["options"])
    label_map = read_label_map()
    for split in ("train", "val"):
        images = data.image_set(split, checkpoint["definition"]["image_size"], label_map)
        records = data.records(split)
        rng = np.random.default_rng(0)
        features = encode_split(model, images, records, device, 128, 0).images
        pairs = {"number": [], "kind": [], "relation": []}
        for i in range(IMAGES):
            for caption in records[i].captions:
                boxes = images.boxes[i]
                found = counterfactuals(caption, *boxes, images.sizes[i], label_map, rng)
                for name, texts in found.items():
                    pairs[name].append((i, caption, texts[int(rng.integers(len(texts)))]))
        for name, own in pairs.items():
            true = encode_texts(model, [text for _, text, _ in own], device)
            false = encode_texts(model, [text for _, _, text in own], device)
            image = features[[i for i, _, _ in own]]
            right = (((true - false) * image).sum(-1) > 0).float().mean()
            alike = (true * false).sum(-1).mean()
            print(f"{split} {name}: {len(own)} pairs, {100 * right:.1f} % right, cosine {alike:.3f}")


if __name__ == "__main__":
    main()
