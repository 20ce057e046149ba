"""Row of bench.py: the memory that training needs, by batch size, and what --recompute costs.

The memory is estimated. Counted are the weights with their gradients and AdamW's two moments, in
fp32, and what the forward pass in bf16 keeps for the backward pass: measured here with one pair and
with two, each storage once. What a GPU's kernels take for themselves is not in it, a GiB or two.
Sizes in the shapes below: B pairs, L positions, D width.
"""

from functools import partial
from unittest.mock import patch

import torch
import torch.nn.functional as F

from backbones import towers
from backbones.model_configs import read_model_config
from backbones.towers import CLIP, Transformer
from benchmarks.encoding import fine_tuning_options, measured_config, training_batch
from benchmarks.frame import compared, require_equal
from benchmarks.indexing import random_model
from training.step import make_learner, recompute_blocks, set_training_mode, train_step

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


def forward_bytes(network, image_size, pairs, again):
    """Bytes that the forward pass of so many pairs keeps, the largest part of the memory.

    again: whether blocks are recomputed.
    """
    inputs = {}  # {transformer: what enters it}
    hooks = []
    for module in network.modules():
        if isinstance(module, Transformer):
            module.recompute = again
            hooks.append(module.register_forward_pre_hook(_note_input(inputs)))
    image = torch.zeros(pairs, 3, image_size, image_size)
    text = torch.zeros(pairs, TOKENS, dtype=torch.long)

    def forward():
        with torch.autocast("cpu", torch.bfloat16):
            return network.encode_image(image), network.encode_text(text)

    with patch.object(towers, "attention", _kernel_attention):
        kept = saved_bytes(forward, network.parameters())
        of_blocks = [_of_one_block(module, x) for module, x in inputs.items()]
    for hook in hooks:
        hook.remove()
    for module in inputs:
        module.recompute = False
    if not again:
        return kept
    # The hooks do not see the blocks' inputs, which are kept, nor the one block that is computed
    # again at a time.
    of_inputs = [len(module.resblocks) * x.nbytes for module, x in inputs.items()]
    return kept + sum(of_inputs) + max(of_blocks)


def _kernel_attention(query, key, value, causal=False, seen=None):
    """Attention as a GPU computes it; what a CPU does in half precision keeps the scores too."""
    return F.scaled_dot_product_attention(query, key, value, seen, is_causal=causal)


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


def measured(model_config):
    """{whether blocks are recomputed: (fixed bytes, bytes a pair)} of a model."""
    network = CLIP(model_config)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    of_weights = 4 * 4 * parameters  # weights, gradients, two moments
    found = {}
    for again in (False, True):
        one, two = (
            forward_bytes(network, model_config["image_size"], pairs, again) for pairs in (1, 2)
        )
        found[again] = (of_weights + 2 * one - two, two - one)
    return found


def by_batch_size(model_config):
    """Figures of a model for `Result.notes`: memory by batch size, without and with --recompute."""
    notes = {}
    name = model_config["name"]
    for again, (fixed, of_pair) in measured(model_config).items():
        sizes = {f"{size} pairs": (fixed + size * of_pair) / GIB for size in BATCH_SIZES}
        label = f"{name} with --recompute" if again else name
        notes[f"GiB estimated, {label}"] = {**sizes, "MiB a pair": of_pair / 2**20}
    return notes


def recompute(device, small):
    """A training step with --recompute beside one without: what it saves, what it costs."""
    pairs, repetitions = (4, 1) if small else (32, 3)
    batch, train_set = training_batch(pairs, device, small)
    options = fine_tuning_options("fp32")
    steps = []
    for again in (True, False):
        network, _ = random_model(measured_config(small), device)
        if again:
            recompute_blocks(network)
        learner = make_learner(network, options, steps=1000)
        set_training_mode(network, options)
        steps.append(partial(train_step, learner, train_set, batch, options, "the bench"))
    with_it, without = steps
    notes = {}
    for model_config in [measured_config(small)] if small else map(read_model_config, MODELS):
        notes.update(by_batch_size(model_config))
    require_equal(abs(with_it() - without()) <= 1e-5, "the losses")
    sides = {"with --recompute": with_it, "without": without}
    what = f"a step of {pairs} pairs, ViT-B/32, fp32"
    return [compared(what, sides, repetitions, notes, warm_up=False)]
