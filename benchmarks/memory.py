"""Estimate the memory that training a CLIP needs, by batch size.

    python -m benchmarks.memory

Counted are the weights with their gradients and AdamW's two moments, in fp32, and what the forward
pass in bf16 keeps for the backward pass: measured here with one pair and with two, each storage
once. What a GPU's kernels take for themselves is not in it, a GiB or two. Sizes in the shapes
below: B pairs, L positions, D width.
"""

import sys

import torch

from backbones.model_configs import read_model_config
from backbones.towers import CLIP, Transformer

MODELS = ("ViT-B-32", "ViT-L-14")
BATCH_SIZES = (32, 128, 512, 2048)
TOKENS = 25  # of the longest of 32 captions of RSITMD
GIB = 2**30


def saved_bytes(function, parameters):
    """Bytes of what a forward pass keeps for the backward pass, the parameters aside."""
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()  # held until all is counted: no storage takes another's place
    del result
    return sum(kept.values())


def forward_bytes(network, image_size, pairs, recompute):
    """Bytes that the forward pass of so many pairs keeps, the largest part of the memory."""
    inputs = {}  # {transformer: what enters it}
    hooks = []
    for module in network.modules():
        if isinstance(module, Transformer):
            module.recompute = recompute
            hooks.append(module.register_forward_pre_hook(_note_input(inputs)))
    image = torch.zeros(pairs, 3, image_size, image_size)
    text = torch.zeros(pairs, TOKENS, dtype=torch.long)

    def forward():
        with torch.autocast("cpu", torch.bfloat16):
            return network.encode_image(image), network.encode_text(text)

    kept = saved_bytes(forward, network.parameters())
    for hook in hooks:
        hook.remove()
    if not recompute:
        return kept
    # The hooks do not see the blocks' inputs, which are kept, nor the one block that is computed
    # again at a time.
    of_blocks = [_of_one_block(module, x) for module, x in inputs.items()]
    of_inputs = [len(module.resblocks) * x.nbytes for module, x in inputs.items()]
    return kept + sum(of_inputs) + max(of_blocks)


def _note_input(inputs):
    def hook(module, arguments):
        inputs[module] = arguments[0].detach()  # (B, L, D)

    return hook


def _of_one_block(module, x):
    """Bytes that one block keeps for the backward pass, its bf16 weights included."""
    block = module.resblocks[0]

    def forward():
        with torch.autocast("cpu", torch.bfloat16):
            return block(x)

    return saved_bytes(forward, block.parameters())


def measured(name):
    """{recompute: (fixed bytes, bytes a pair)} of a model."""
    model_config = read_model_config(name)
    network = CLIP(model_config)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    of_weights = 4 * 4 * parameters  # weights, gradients, two moments
    found = {}
    for recompute in (False, True):
        one, two = (
            forward_bytes(network, model_config["image_size"], pairs, recompute) for pairs in (1, 2)
        )
        found[recompute] = (of_weights + 2 * one - two, two - one)
    return found


def main():
    heads = [f"{size} pairs" for size in BATCH_SIZES]
    print(f"| model | MiB a pair | {' | '.join(heads)} |")
    print("|---" * (2 + len(heads)) + "|")
    for name in MODELS:
        for recompute, (fixed, of_pair) in measured(name).items():
            sizes = [f"{(fixed + size * of_pair) / GIB:.1f} GiB" for size in BATCH_SIZES]
            label = f"{name}, `--recompute`" if recompute else name
            print(f"| {label} | {of_pair / 2**20:.1f} | {' | '.join(sizes)} |")


if __name__ == "__main__":
    sys.exit(main())
