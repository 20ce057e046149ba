"""A contrastive batch larger than memory: the gradient cache.

Gao, Zhang, Han and Callan, "Scaling Deep Contrastive Learning Batch Size under Memory Limited
Setup" (RepL4NLP 2021). The loss needs the features of the whole batch, but a tower's gradient at a
pair needs only that pair's activations and the loss's gradient at its features. So the batch is
encoded in chunks without a graph; the loss gives the gradients at the features; then each chunk is
encoded once more, with a graph that ends at once in a step back from these gradients. The result
is the gradient of the whole batch up to rounding, for a second encoding and the memory of a chunk.

Sizes in the shapes below: B pairs of this process, E the embedding width.
"""

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch.nn.parallel import DistributedDataParallel


class Cache(NamedTuple):
    """A batch whose features are known; the last three are leaves, to compute the loss of."""

    chunks: list  # batches, dicts of tensors
    random_state: tuple  # of the generators before each chunk
    image_features: torch.Tensor  # (B, E)
    text_features: torch.Tensor  # (B, E)
    logit_scale: torch.Tensor


def split(batch, size):
    """A batch, a dict of tensors, in chunks of up to `size` pairs."""
    pairs = len(next(iter(batch.values())))
    chunks = []
    for start in range(0, pairs, size):
        chunks.append({name: values[start : start + size] for name, values in batch.items()})
    return chunks


def fill(encode, batch, size, logit_scale):
    """The Cache of a batch in chunks of up to `size` pairs.

    encode: a batch to image features and text features, each (b, E); logit_scale: the parameter.
    All chunks draw the same random numbers: the dropout of an adapted weight is that of the batch.
    """
    chunks = split(batch, size)
    random_state = _random_state(logit_scale.device)
    image_parts = []
    text_parts = []
    with torch.no_grad():
        for chunk in chunks:
            _set_random_state(random_state, logit_scale.device)
            image_features, text_features = encode(chunk)
            image_parts.append(image_features)
            text_parts.append(text_features)
    return Cache(
        chunks=chunks,
        random_state=random_state,
        image_features=torch.cat(image_parts).requires_grad_(),
        text_features=torch.cat(text_parts).requires_grad_(),
        logit_scale=logit_scale.detach().clone().requires_grad_(logit_scale.requires_grad),
    )


def backward(cache, encode, wrapped, logit_scale):
    """Add the gradients of the parameters, after the loss's step back to the leaves of a Cache.

    encode, logit_scale: as for `fill`. wrapped: the module that `encode` calls; of several
    processes, whose gradients are averaged once, with the last chunk. Dropout draws as it did.
    """
    device = logit_scale.device
    first = 0
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for chunk in cache.chunks:
            is_last = chunk is cache.chunks[-1]
            alone = isinstance(wrapped, DistributedDataParallel) and not is_last
            with wrapped.no_sync() if alone else nullcontext():
                _set_random_state(cache.random_state, device)
                image_features, text_features = encode(chunk)
                rows = slice(first, first + len(image_features))
                known = [
                    (image_features, cache.image_features.grad[rows]),
                    (text_features, cache.text_features.grad[rows]),
                ]
                if is_last:  # with the last chunk, so that it is averaged like the others
                    known.append((logit_scale, cache.logit_scale.grad))
                # Nothing flows back to a frozen tower, nor from the hinge to the scale.
                known = [
                    (tensor, gradient)
                    for tensor, gradient in known
                    if tensor.requires_grad and gradient is not None
                ]
                tensors, gradients = zip(*known, strict=True)
                torch.autograd.backward(tensors, gradients)
            first = rows.stop


def _random_state(device):
    """The states of the generators that a model on this device draws from."""
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), on_device


def _set_random_state(state, device):
    on_cpu, on_device = state
    torch.set_rng_state(on_cpu)
    if on_device is not None:
        torch.cuda.set_rng_state(on_device, device)
