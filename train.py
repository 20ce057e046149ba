"""Train FG-CROSS.

    python train.py                                             # synthetic scenes, minutes on a CPU
    python train.py --dataset ucm --data-root DIR --precision bf16 --epochs 40
    python train.py --dataset rsitmd --data-root DIR --clip ViT-B/32      # fine-tune a CLIP

Writes `best_model.pth` (best mR on the validation split), `last.pth` and `log.jsonl`, a line an
epoch, into models/ or --out. The test split is never touched here: see evaluate.py.
"""

import argparse
import ctypes
import json
import math
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import clip
from augment import augmented, stored_size
from clip_gcn_image_feature_integration import add_device_options, pick_device
from dataloader import (
    RetrievalData,
    TrainingSet,
    add_data_options,
    add_training_data_options,
    augmentations,
    require_readable,
)
from evaluate import KS, evaluate
from loss import add_loss_options, batch_loss, keep_learnable, positive_mask
from model import add_model_options, build, read_definition, save_checkpoint
from V_Graph import LABELS, read_labels

WARMUP = 0.1  # fraction of all steps before the decay
LARGEST_GRADIENT = 1.0  # norm at which gradients are clipped
TRAINED = {"all": ("visual", "text"), "image": ("visual",), "text": ("text",), "graph": ()}


def parse(arguments=None):
    """All options of training: those of data, model and loss, and the schedule's."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_data_options(parser)
    add_training_data_options(parser)
    add_model_options(parser)
    add_loss_options(parser)
    add_device_options(parser, batch_size=128)
    option = parser.add_argument_group("training").add_argument
    # fmt: off
    option("--clip", help="pretrained start, a name or file for clip.load; else from scratch")
    option("--train", choices=TRAINED, default="all", help="towers to train; new layers always do")
    option("--epochs", type=int, default=20, help="more help while validation still improves")
    option("--lr", type=float, default=1e-5, help="of pretrained layers; lower if mR falls at once")
    option("--lr-new", type=float, default=2e-3, help="of new layers: all of them without --clip")
    option("--weight-decay", type=float, default=0.1, help="of matrices, not of biases and norms")
    option("--precision", choices=("fp32", "bf16", "fp16"), help="default fp32, on CUDA half")
    option("--patience", type=int, default=10, help="epochs without a better validation mR")
    option("--seed", type=int, default=0, help="of weights, order, captions, augmentation, splits")
    option("--out", default="models", help="folder for checkpoints and log; one a run")
    # fmt: on
    options = vars(parser.parse_args(arguments))
    if options["clip"] and options["model"]:
        raise ValueError("--clip brings its own sizes: leave --model out")
    if options["train"] == "graph" and options["graph"] == "none":
        raise ValueError("--train graph with --graph none leaves nothing to train")
    options["augment"] = augmentations(options)
    return options


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
    """The autocast dtype that --precision means on a device."""
    if name is None:
        name = "fp32"
        if device.type == "cuda":
            # is_bf16_supported() counts emulation, which is slower than fp16
            name = "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def start_model(options, labels):
    """A model and its definition: --clip's weights where given, else from scratch."""
    if options["clip"] is None:
        if options["train"] != "all":
            print(f"--train {options['train']} without --clip: the frozen towers stay random")
        definition = read_definition(options["model"] or "small")
        return build(definition, labels, options), definition
    pretrained, _ = clip.load(options["clip"])
    model = build(pretrained.definition, labels, options)
    model.load_state_dict({**model.state_dict(), **pretrained.state_dict()})
    return model, pretrained.definition


def freeze(model, train):
    """Leave gradients to what --train names, the new layers and the temperature."""
    new = model.new_parameters()
    for name, parameter in model.named_parameters():
        tower = "visual" if name.startswith("visual.") else "text"
        parameter.requires_grad = tower in TRAINED[train] or name in new or name == "logit_scale"


def make_optimizer(model, options):
    """AdamW with a group for each of pretrained or new, decayed or not."""
    groups = {}
    new = model.new_parameters()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (options["clip"] is None or name in new, parameter.ndim >= 2)
            groups.setdefault(key, []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "lr": options["lr_new"] if is_new else options["lr"],
                "weight_decay": options["weight_decay"] if decayed else 0.0,
            }
            for (is_new, decayed), parameters in groups.items()
        ],
        betas=(0.9, 0.98),
        fused=True,
    )


def make_schedule(optimizer, steps):
    """Linear warm-up over a fraction of the steps, then cosine decay to zero."""
    rise = max(1, int(WARMUP * steps))

    def factor(step):
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def set_training_mode(model, train):
    """Training mode, except that a frozen image tower keeps its batch statistics."""
    model.train()
    if "visual" not in TRAINED[train]:
        model.visual.eval()


class Learner(NamedTuple):
    """What a training step needs and changes."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LambdaLR
    scaler: torch.amp.GradScaler  # does nothing but in fp16
    precision: torch.dtype


def train_one_epoch(learner, train_set, batches, options, epoch):
    """One pass over the training images; returns the mean loss.

    Raises FloatingPointError with step, learning rate and image names where the loss is not finite.
    """
    model, optimizer, schedule, scaler, precision = learner
    set_training_mode(model, options["train"])
    device, total = model.logit_scale.device, 0.0
    bar = tqdm(batches, desc=f"epoch {epoch}", unit="batch", leave=False)
    for step, batch in enumerate(bar):
        batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
        positives = positive_mask(batch["index"], batch["text_id"], batch["caption_ids"])
        moves = batch.get("affine"), batch.get("colour")
        pixels = augmented(clip.normalize(batch["image"]), train_set.n_px, *moves)
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            image_features, text_features = model(
                pixels, batch["nodes"], batch["adjacency"], batch["mask"], batch["text"]
            )
        loss = batch_loss(image_features, text_features, model.logit_scale, positives, options)
        value = loss.item()
        if not math.isfinite(value):
            rates = ", ".join(f"{group['lr']:.2e}" for group in optimizer.param_groups)
            names = ", ".join(str(train_set.image_set.paths[i]) for i in batch["index"].tolist())
            raise FloatingPointError(
                f"loss {value} in epoch {epoch}, step {step}, learning rates {rates}; lower "
                f"them or use --precision fp32. Images of the batch: {names}"
            )
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), LARGEST_GRADIENT)
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        keep_learnable(model.logit_scale)
        total += value
        bar.set_postfix(loss=f"{value:.3f}")
    return total / len(batches)


def read_data(options, out, definition, vocabulary):
    """RetrievalData, TrainingSet, validation ImageSet; writes down a validation split it drew."""
    data = RetrievalData(options)
    data.report()
    if data.drawn_split:
        text = json.dumps(data.drawn_split, indent=1)
        (out / "split.json").write_text(text + "\n", encoding="utf-8")
    if len(data.records("val")) < max(KS):
        raise ValueError(f"{len(data.records('val'))} validation images; R@{max(KS)} needs more")
    augment, n_px = options["augment"], definition["image_size"]
    images = data.image_set("train", stored_size(n_px, augment), vocabulary)
    val_images = data.image_set("val", n_px, vocabulary)
    require_readable(images, val_images)
    train_set = TrainingSet(
        images,
        data.records("train"),
        definition,
        augment=augment,
        drop_graphs=options["drop_graphs"],
        seed=options["seed"],
    )
    return data, train_set, val_images


def log_line(epoch, loss, result, learner, train_seconds, val_seconds):
    """What log.jsonl keeps of an epoch."""
    return {
        "epoch": epoch,
        "loss": loss,
        "val_mR": result["mR"],
        "val_image_to_text": result["image_to_text"],
        "val_text_to_image": result["text_to_image"],
        "logit_scale": learner.model.logit_scale.exp().item(),
        "lr": [group["lr"] for group in learner.optimizer.param_groups],
        "train_seconds": train_seconds,
        "val_seconds": val_seconds,
    }


def main(arguments=None):
    options = parse(arguments)
    print(" ".join(f"{name}={value}" for name, value in sorted(options.items())))
    keep_freed_memory()
    torch.manual_seed(options["seed"])
    device = pick_device(options["device"])
    precision = pick_precision(options["precision"], device)
    out = Path(options["out"])
    out.mkdir(parents=True, exist_ok=True)

    vocabulary = read_labels(options["labels"] or LABELS)
    model, definition = start_model(options, vocabulary.lines)
    options["model"] = definition["name"]
    data, train_set, val_images = read_data(options, out, definition, vocabulary)
    model.to(device)
    freeze(model, options["train"])
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    print(f"{learning:,} of {total:,} parameters train, {device}, {precision}")

    batch_size, workers, epochs = options["batch_size"], options["workers"], options["epochs"]
    optimizer = make_optimizer(model, options)
    schedule = make_schedule(optimizer, epochs * len(train_set.batches(0, batch_size)))
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    learner = Learner(model, optimizer, schedule, scaler, precision)

    best, best_epoch, begin = -1.0, 0, time.perf_counter()
    with open(out / "log.jsonl", "w", encoding="utf-8") as log:
        for epoch in range(1, epochs + 1):
            start = time.perf_counter()
            batches = train_set.batches(epoch, batch_size, workers, device.type == "cuda")
            loss = train_one_epoch(learner, train_set, batches, options, epoch)
            trained = time.perf_counter()
            result = evaluate(model, val_images, data.records("val"), device, batch_size, workers)
            better, best = result["mR"] > best, max(best, result["mR"])
            if better:
                best_epoch = epoch
            for name in ("last.pth", "best_model.pth") if better else ("last.pth",):
                save_checkpoint(
                    out / name,
                    model,
                    definition,
                    vocabulary.lines,
                    options,
                    epoch=epoch,
                    best_score=best,
                    origin=data.annotations.origin,
                )
            seconds = trained - start, time.perf_counter() - trained
            log.write(json.dumps(log_line(epoch, loss, result, learner, *seconds)) + "\n")
            log.flush()
            print(
                f"epoch {epoch:3d} | loss {loss:8.4f} | val mR {result['mR']:5.1f} | "
                f"best {best:5.1f} | {seconds[0]:5.1f} s + {seconds[1]:.1f} s"
            )
            if epoch - best_epoch >= options["patience"]:
                print(f"stopped: no better validation mR for {options['patience']} epochs")
                break
    seconds = time.perf_counter() - begin
    print(f"best validation mR {best:.1f} in epoch {best_epoch}, {seconds:.0f} s; {out}")
    return best


if __name__ == "__main__":
    main()
