"""What a forward pass keeps for the backward pass, counted."""

import torch

from backbones.towers import CLIP
from benchmarks.memory import forward_bytes, saved_bytes


def test_each_storage_counts_once_and_weights_do_not():
    weight = torch.nn.Parameter(torch.ones(10, 10))
    x = torch.ones(4, 10)

    def forward():
        y = x @ weight  # keeps x, 160 bytes, and the weight
        z = y.exp()  # keeps z, 160 bytes
        return z * z  # keeps z again

    assert saved_bytes(forward, [weight]) == 320


def test_blocks_that_are_computed_again_keep_less(tiny_model_config):
    tiny_model_config["vision"]["layers"] = 8
    tiny_model_config["text"]["layers"] = 8
    network = CLIP(tiny_model_config)
    kept, recomputed = (
        forward_bytes(network, image_size=32, pairs=8, again=again) for again in (False, True)
    )
    # 8 blocks, of which each keeps at least ten times its input: inputs and one block are left.
    assert recomputed < 0.5 * kept
