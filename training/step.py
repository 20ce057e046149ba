"""One training step and what it needs: precision, trained parameters, optimizer, schedule.

The loop over steps and epochs is in train.py.
"""

import ctypes
import hashlib
import math
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

import clip
import processes
from backbones import preprocess
from backbones.lora import adapter_parameters
from backbones.model_configs import check_image_size, read_model_config
from backbones.towers import Transformer
from dataset.augment import augmented
from loss import batch_loss, clamp_logit_scale, positive_mask
from model import add_adapters, build
from training import distributed, gradient_cache

WARMUP = 0.1  # fraction of all steps before the decay
MAX_GRAD_NORM = 1.0  # norm at which gradients are clipped

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

TRAINED = {  # --train: the towers whose weights change; lora has adapters beside both
    "all": ("visual", "text"),
    "image": ("visual",),
    "text": ("text",),
    "graph": (),
    "lora": (),
}


def keep_freed_memory():
    """Let glibc reuse large buffers instead of handing them back after every operation.

    A third of a convolutional training step on the CPU is page faults otherwise. Elsewhere than on
    Linux with glibc this does nothing.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt:
            mallopt(-4, 0)  # M_MMAP_MAX: no buffer of its own mapping
            mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: keep what is freed


def pick_precision(name, device):
    """The key in PRECISIONS to compute with: --precision, else what suits the device."""
    if name is not None:
        return name
    if device.type != "cuda":
        return "fp32"
    # is_bf16_supported() counts emulation, which is slower than fp16
    if torch.cuda.get_device_capability(device) >= (8, 0):
        return "bf16"
    return "fp16"


# ------------------------------------------------------------------ the model before training


def check_start(options):
    """ValueError where --model, --image-size or --clip name nothing that `start_model` can take."""
    name = options["clip"]
    if name is None:
        _model_config_from_scratch(options)
    elif not (clip.is_clip_source(name) or Path(name).exists()):
        raise ValueError(
            f"--clip {name}: no such file; give a file or folder of weights, "
            f"hf-hub:owner/name:path, or one of {', '.join(clip.available_models())}"
        )


def start_model(options, labels):
    """(model, its sizes, start_sha256) before the first step.

    Weights are those of --clip where it is given, else random. labels: lines of the label map.
    start_sha256: of the file with --clip's weights, by which runs from one start are known; None
    without. Raises ValueError for an --image-size that does not fit.
    """
    if options["clip"] is None:
        model, model_config = _from_scratch(options, labels)
        start_sha256 = None
    else:
        model, model_config, start_sha256 = _from_clip(options, labels)
    add_adapters(model, options)
    return model, model_config, start_sha256


def _from_scratch(options, labels):
    if options["train"] != "all":
        print(f"--train {options['train']} without --clip: the frozen towers stay random")
    model_config = _model_config_from_scratch(options)
    return build(model_config, labels, options), model_config


def _model_config_from_scratch(options):
    model_config = read_model_config(options["model"] or "small")
    if options["image_size"] is None:
        return model_config
    check_image_size(model_config, options["image_size"])
    return {**model_config, "image_size": options["image_size"]}


def _from_clip(options, labels):
    pretrained, _ = clip.load(
        options["clip"], activation=options["activation"], image_size=options["image_size"]
    )
    model = build(pretrained.model_config, labels, options)
    # The new layers, which no CLIP has, keep their random weights.
    model.load_state_dict({**model.state_dict(), **pretrained.state_dict()})
    start_sha256 = hashlib.sha256(Path(pretrained.path).read_bytes()).hexdigest()
    return model, pretrained.model_config, start_sha256


def freeze(model, train):
    """Switch gradients off but for what --train names, the new layers and the temperature."""
    always = model.new_parameters() | adapter_parameters(model) | {"logit_scale"}
    for name, parameter in model.named_parameters():
        tower = "visual" if name.startswith("visual.") else "text"
        parameter.requires_grad = tower in TRAINED[train] or name in always


def recompute_blocks(model):
    """Let transformers keep no inner values of their blocks for the backward pass (--recompute).

    Raises ValueError where no transformer learns: it would do nothing.
    """
    learning = []
    for module in model.modules():
        if isinstance(module, Transformer):
            if any(parameter.requires_grad for parameter in module.parameters()):
                learning.append(module)
    if not learning:
        raise ValueError("--recompute: no transformer learns here; leave it out")
    for module in learning:
        module.recompute = True


def has_statistics(model):
    """Whether there is batch normalisation in a model."""
    return any(isinstance(module, _BatchNorm) for module in model.modules())


def set_training_mode(model, options):
    """Training mode, except that batch normalisation may keep its statistics.

    It does in a frozen tower, and where no part of a batch has those of the whole.
    """
    model.train()
    if "visual" not in TRAINED[options["train"]] or distributed.is_in_parts(options):
        for module in model.visual.modules():
            if isinstance(module, _BatchNorm):
                module.eval()


# ------------------------------------------------------------------ optimizer and schedule


def make_optimizer(model, options):
    """AdamW with up to four groups: pretrained or new parameters, decayed or not.

    Without --clip all parameters are new. Adapters count as pretrained: their rate is --lr.
    """
    new = model.new_parameters()
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_new = options["clip"] is None or name in new
        is_matrix = parameter.ndim >= 2
        if (is_new, is_matrix) not in groups:
            groups[is_new, is_matrix] = {
                "params": [],
                "lr": options["lr_new"] if is_new else options["lr"],
                "weight_decay": options["weight_decay"] if is_matrix else 0.0,
            }
        groups[is_new, is_matrix]["params"].append(parameter)
    return torch.optim.AdamW(list(groups.values()), betas=(0.9, 0.98), fused=True)


def make_schedule(optimizer, steps):
    """Linear warm-up over the WARMUP fraction of the steps, then cosine decay to zero."""
    rise = max(1, int(WARMUP * steps))

    def factor(step):
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


class Learner(NamedTuple):
    """What a training step needs and changes."""

    model: torch.nn.Module
    wrapped: torch.nn.Module  # what a step calls: the model, or what is around it
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LambdaLR
    scaler: torch.amp.GradScaler  # does nothing but in fp16
    precision: torch.dtype


def make_learner(model, options, steps):
    """A Learner before the first of so many steps."""
    device = model.logit_scale.device
    optimizer = make_optimizer(model, options)
    return Learner(
        model=model,
        wrapped=distributed.wrapped(model, options),
        optimizer=optimizer,
        schedule=make_schedule(optimizer, steps),
        scaler=torch.amp.GradScaler(device.type, enabled=options["precision"] == "fp16"),
        precision=PRECISIONS[options["precision"]],
    )


# ------------------------------------------------------------------ one step


def training_pixels(batch, image_size):
    """A batch's images augmented and normalised, (B, 3, image_size, image_size), in fp32.

    In bf16 the places to sample pixels at would be off by as much as a pixel.
    """
    pixels = augmented(
        preprocess.normalize(batch["image"]),
        image_size,
        affine=batch.get("affine"),
        colour=batch.get("colour"),
        hole=batch.get("hole"),
    )
    # Convolutions take a third less time with channels last; transformers do not care.
    return pixels.contiguous(memory_format=torch.channels_last)


def embeddings(learner, batch, image_size):
    """Unit embeddings of a batch's images and texts, each (B, E).

    What is wrapped around the model is called, not its methods, so that it sees each step.
    """
    model = learner.model
    device = model.logit_scale.device
    batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
    encoded = "image" not in batch  # the features of frozen towers stand in its place
    images = batch["image_features"] if encoded else training_pixels(batch, image_size)
    half = torch.autocast(
        device.type, learner.precision, enabled=learner.precision != torch.float32
    )
    with half, parametrize.cached():  # an adapted weight is read several times
        return learner.wrapped(
            images,
            batch["text_features"] if encoded else batch["text"],
            batch["nodes"],
            batch["adjacency"],
            batch["mask"],
            encoded=encoded,
            features_only=True,
        )


def own_loss(image_features, text_features, logit_scale, batch, options):
    """The loss of this process's pairs, features (b, E), among those of all processes.

    Its mean over the processes is that of the whole batch, (B, E).
    """
    rows = distributed.own_rows(len(image_features))
    features = distributed.gathered_features(image_features, text_features)  # (B, E) each
    ids = distributed.gathered_ids(batch, logit_scale.device)
    return batch_loss(*features, logit_scale, positive_mask(*ids), options, rows)


def _not_finite(what, place, optimizer, train_set, batch):
    """The FloatingPointError of a step: what was not finite, where, on which images."""
    rates = ", ".join(f"{group['lr']:.2e}" for group in optimizer.param_groups)
    names = ", ".join(str(train_set.image_set.paths[i]) for i in batch["index"].tolist())
    return FloatingPointError(
        f"{what} in {place}, learning rates {rates}; lower them or use --precision fp32. Images of "
        f"the batch: {names}"
    )


def train_step(learner, train_set, batch, options, place):
    """One batch forward and back; returns its loss as a number.

    Of several processes each has its part of the batch; the number and the new weights are the
    same in all. With the option chunk the batch is encoded in chunks, see gradient_cache.py.
    Raises FloatingPointError with place, learning rates and image names where the loss or the
    norm of the gradient is not finite; the weights are as they were then. In fp16 the scaler leaves
    out a step whose gradient overflows, which is part of its search for a scale.
    """
    model, wrapped, optimizer, schedule, scaler, _ = learner
    encode = partial(embeddings, learner, image_size=train_set.image_size)
    cache = None
    if options["chunk"] is None:
        leaves = (*encode(batch), model.logit_scale)
    else:
        cache = gradient_cache.fill(encode, batch, options["chunk"], model.logit_scale)
        leaves = (cache.image_features, cache.text_features, cache.logit_scale)
    loss = own_loss(*leaves, batch, options)
    value = processes.mean(loss.item())
    if not math.isfinite(value):
        raise _not_finite(f"loss {value}", place, optimizer, train_set, batch)
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()
    if cache is not None:
        gradient_cache.backward(cache, encode, wrapped, model.logit_scale)
    scaler.unscale_(optimizer)
    trained = [weight for group in optimizer.param_groups for weight in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM).item()
    if not math.isfinite(norm) and scaler.get_scale() <= 1:  # 1 but in fp16, which searches
        raise _not_finite(f"gradient of norm {norm}", place, optimizer, train_set, batch)
    scaler.step(optimizer)
    scaler.update()
    schedule.step()
    clamp_logit_scale(model.logit_scale)
    return value
