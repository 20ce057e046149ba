"""One batch on several processes: who has which rows, features gathered with their gradients.

`--batch-size` is that of all W processes together. Each encodes its own B / W pairs, gathers the
features of all, and computes the loss of its own rows (see loss.py). The mean of the losses is the
batch's loss, and so DistributedDataParallel's mean of the gradients is the batch's gradient, up to
rounding: a run of W processes is that of one, and may go on with another number of them.

All processes draw the same random numbers, so that the dropout of --train lora, which acts on the
weights, is that of the batch. The batch normalisation of a ResNet that learns is an exception: in
one process it takes the batch's statistics.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import processes
from backbones.towers import is_resnet
from training.resume import processes_of

# ------------------------------------------------------------------ before the first step


def check(options, model_config):
    """Raise ValueError where the options cannot be trained in as many processes or parts.

    model_config: of the model.
    """
    world = processes.world()
    batch_size, chunk = options["batch_size"], options["chunk"]
    if batch_size % world:
        raise ValueError(
            f"--batch-size {batch_size}: {world} processes share it; take a multiple of {world}, "
            "or another number of processes"
        )
    if chunk is not None and chunk >= batch_size // world:
        raise ValueError(
            f"--chunk {chunk} does nothing: a process has {batch_size // world} pairs of a batch; "
            "take less, or leave it out"
        )
    if not is_in_parts(options):
        return
    if options["graph"] == "published":
        raise ValueError(
            "--graph published makes one vector of the whole batch: train it in one process and "
            "without --chunk"
        )
    learns = options["train"] in ("all", "image")
    if is_resnet(model_config["vision"]) and learns and options["clip"] is None:
        raise ValueError(
            f"--model {model_config['name']}: a ResNet from scratch needs the statistics of whole "
            "batches; start from --clip, take the --model of a ViT, or train it in one process "
            "and without --chunk"
        )


def check_images(options, images):
    """Raise ValueError where so many images to train on make no batch for several processes."""
    batch_size = options["batch_size"]
    if processes.several() and batch_size > images:
        raise ValueError(
            f"--batch-size {batch_size}: more than the {images} training images; several "
            "processes need whole batches, take less"
        )


def check_resumed(options, model_config, state):
    """Raise ValueError where a run cannot go on with this number of processes.

    state: that of the checkpoint. A ResNet that learns takes the batch's statistics in one process.
    """
    learns = options["train"] in ("all", "image")
    if not (is_resnet(model_config["vision"]) and learns) or options["chunk"] is not None:
        return
    before = processes_of(state)
    if (before > 1) != processes.several():
        as_before = "several processes" if before > 1 else "one process"
        raise ValueError(
            f"--resume: the batch normalisation of a ResNet differs between one process and "
            f"several; go on with {as_before}, as it was begun"
        )


def is_in_parts(options):
    """Whether a batch is encoded in parts: by several processes, or in chunks.

    Batch normalisation keeps its statistics then: no part has those of the batch.
    """
    return processes.several() or options["chunk"] is not None


def wrapped(model, options):
    """The module that a step calls: the model, by several processes in DistributedDataParallel.

    Parameters that no loss reaches are frozen, since DistributedDataParallel waits for their
    gradients; an optimizer that has them leaves them as they are, as in one process.
    """
    if not processes.several():
        return model
    if options["loss"] != "infonce":
        model.logit_scale.requires_grad_(False)
    if not model.transformer.resblocks:  # of words alone, whose places do not count
        model.positional_embedding.requires_grad_(False)
    return DistributedDataParallel(model)


# ------------------------------------------------------------------ in a step


def own_rows(size):
    """The rows of the batch that this process has, a slice, where each has so many."""
    first = processes.rank() * size
    return slice(first, first + size)


class _Gather(torch.autograd.Function):
    """Rows (b, D) of each process to those of all (B, D); back, the sum of all gradients."""

    @staticmethod
    def forward(context, own):
        parts = [torch.empty_like(own) for _ in range(processes.world())]
        dist.all_gather(parts, own.contiguous())
        context.rows = own_rows(len(own))
        return torch.cat(parts)  # (B, D)

    @staticmethod
    def backward(context, gradient):
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total[context.rows]


def gathered(own):
    """Rows (b, ...) of each process to those of all (B, ...), in the order of the batch.

    Gradients flow back to the process that a row came from.
    """
    return _Gather.apply(own) if processes.several() else own


def gathered_features(image_features, text_features):
    """Both features (b, E) to those of the whole batch (B, E), in one exchange, in fp32."""
    both = torch.cat([image_features.float(), text_features.float()], dim=1)  # (b, 2 E)
    return gathered(both).chunk(2, dim=1)


def gathered_ids(batch, device):
    """(image ids (B), text ids (B), caption ids (B, C)) of the whole batch on the device."""
    width = processes.largest(batch["caption_ids"].shape[1])
    missing = width - batch["caption_ids"].shape[1]
    caption_ids = F.pad(batch["caption_ids"], (0, missing), value=-1)  # (b, C)
    ids = (batch["index"], batch["text_id"], caption_ids)
    return tuple(gathered(part.to(device)) for part in ids)
