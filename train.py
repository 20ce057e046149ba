"""Train FG-CROSS.

    python train.py                                             # synthetic scenes, minutes on a CPU
    python train.py --dataset ucm --data-root DIR --precision bf16 --batch-size 64 --epochs 100
    python train.py --dataset rsitmd --data-root DIR --clip ViT-B/32      # fine-tune a CLIP

    python train.py --resume --out models/ucm                   # go on where a run was stopped

Writes `best_model.pth` (best mR on validation, the mean over data sets), `last.pth` to go on from,
and `log.jsonl`, a line an epoch, into models/ or --out. No model is measured on a test split here:
see evaluate.py. Ctrl-C and SIGTERM save before they stop.
"""

import argparse
import json
import shlex
import time
from pathlib import Path

import torch
from tqdm import tqdm

from clip_gcn_image_feature_integration import (
    add_activation_option,
    add_device_options,
    pick_device,
)
from dataloader import add_data_options, add_training_data_options, augmentations
from det_formats.det_json import LABELS, LabelMap, read_label_map
from evaluate import evaluate
from loss import add_loss_options
from model import add_adapters, add_model_options, build, save_checkpoint
from training import resume
from training.curves import curves, require_packages
from training.inputs import read_data, with_features
from training.step import (
    PRECISIONS,
    TRAINED,
    freeze,
    keep_freed_memory,
    make_learner,
    pick_precision,
    set_training_mode,
    start_model,
    train_step,
)
from V_Graph import PUBLISHED_LABELS

LORA = (8, 16, 0.0)


LEAST = {"epochs": 1, "batch_size": 1, "seed": 0, "dev_images": 0, "save_every": 0, "workers": 0}


def make_parser():
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
    add_activation_option(parser)
    option("--image-size", type=int, help="pixels a side, if not the definition's or the weights'")
    option("--train", choices=TRAINED, default="all", help="towers to train; new layers always do")
    option("--lora", type=float, nargs=3, default=LORA, metavar=("RANK", "ALPHA", "DROPOUT"),
           help="adapters of --train lora")
    option("--epochs", type=int, default=20, help="more help while validation still improves")
    option("--lr", type=float, help="of pretrained layers; default 1e-5, of --train lora 2e-4")
    option("--lr-new", type=float, default=2e-3, help="of new layers: all of them without --clip")
    option("--weight-decay", type=float, default=0.1, help="of matrices, not of biases and norms")
    option("--precision", choices=PRECISIONS, help="default fp32, on CUDA half")
    option("--patience", type=int, default=10, help="epochs without a better validation mR")
    option("--seed", type=int, default=0, help="of weights, order, captions, augmentation, splits")
    option("--out", default="models", help="folder for checkpoints and log; one a run")
    option("--save-every", type=int, default=500, help="steps between saves within an epoch")
    option("--resume", action="store_true", help="go on from last.pth in --out, bit for bit")
    option("--tensorboard", action="store_true", help="write its curves (pip install tensorboard)")
    option("--plot", action="store_true", help="draw curve.png (pip install matplotlib)")
    # fmt: on
    return parser


def parse(arguments=None):
    """(options, the checkpoint to resume from or None)."""
    parser = make_parser()
    options = vars(parser.parse_args(arguments))
    if options["resume"]:
        checkpoint = resume.read_state(Path(options["out"]) / "last.pth")
        # An option that is newer than the run does nothing by default.
        saved = {**vars(parser.parse_args([])), **checkpoint["options"]}
        parser.set_defaults(**dict.fromkeys(options))  # None: not on the command line
        given = vars(parser.parse_args(arguments)).items()
        given = {name: value for name, value in given if value is not None}
        given["out"] = options["out"]
        return resume.resumed_options(saved, given), checkpoint
    for name, least in LEAST.items():
        if options[name] < least:
            raise ValueError(
                f"--{name.replace('_', '-')} {options[name]}: expected {least} or more"
            )
    require_sense(options, parser.parse_args([]))
    options["augment"] = augmentations(options)
    options["lr"] = options["lr"] or (2e-4 if options["train"] == "lora" else 1e-5)
    return options, None


def require_sense(options, defaults):
    """Raise ValueError for options that contradict each other, or that would do nothing."""
    if options["clip"] and options["model"]:
        raise ValueError("--clip brings its own sizes: leave --model out")
    if options["activation"] and not options["clip"]:
        raise ValueError("--activation is for --clip; from scratch, write it into the definition")
    if options["train"] == "graph" and options["graph"] == "none":
        raise ValueError("--train graph with --graph none leaves nothing to train")
    if options["train"] != "lora" and tuple(options["lora"]) != LORA:
        raise ValueError("--lora is for --train lora")
    if options["lora"][0] % 1:
        raise ValueError(f"--lora: the rank is {options['lora'][0]}, expected a whole number")
    for name in ("fusion", "labels", "max_objects") if options["graph"] == "published" else ():
        if options[name] != getattr(defaults, name):
            option = "--" + name.replace("_", "-")
            raise ValueError(f"--graph published is as it was published: leave {option} out")


def start(options, checkpoint):
    """(model, definition, vocabulary), fresh or as a stopped run left them."""
    if checkpoint is None:
        label_map = read_label_map(options["labels"] or LABELS)
        if options["graph"] == "published":
            label_map = LabelMap(PUBLISHED_LABELS)
        model, model_config = start_model(options, label_map.lines)
        options["model"] = model_config["name"]
        return model, model_config, label_map
    model = build(checkpoint["definition"], checkpoint["labels"], options)
    add_adapters(model, options)
    model.load_state_dict(checkpoint["weights"])
    return model, checkpoint["definition"], LabelMap(checkpoint["labels"])


def train_one_epoch(learner, train_set, options, progress, after_step):
    """The rest of an epoch, from progress["step"] on; counts in progress, calls after_step()."""
    set_training_mode(learner.model, options["train"])
    epoch, first = progress["epoch"], progress["step"]
    pin_memory = learner.model.logit_scale.device.type == "cuda"
    batches = train_set.batches(epoch, options["batch_size"], options["workers"], pin_memory, first)
    bar = tqdm(batches, f"epoch {epoch}", first + len(batches), initial=first, leave=False)
    waiting = time.perf_counter()
    for batch in bar:
        begin = time.perf_counter()
        place = f"epoch {epoch}, step {progress['step']}"
        value = train_step(learner, train_set, batch, options, place)
        progress["step"] += 1
        progress["loss"] += value
        progress["data_seconds"] += begin - waiting
        progress["compute_seconds"] += time.perf_counter() - begin
        bar.set_postfix(loss=f"{value:.3f}")
        after_step()
        waiting = time.perf_counter()


def validate(model, data, options):
    """{data set: result on its validation split}, and the mean mR."""
    results, device = {}, model.logit_scale.device
    how = device, options["batch_size"], options["workers"]
    for data_set, images, texts in zip(data.data_sets, data.val_sets, data.val_texts, strict=True):
        records = data_set.records(data_set.validation)
        results[data_set.name] = evaluate(model, images, records, *how, texts)
    return results, sum(result["mR"] for result in results.values()) / len(results)


def log_line(progress, results, score, learner, val_seconds):
    """What log.jsonl keeps of an epoch."""
    kept = ("mR", "image_to_text", "text_to_image")
    return {
        "epoch": progress["epoch"],
        "loss": progress["loss"] / progress["step"],
        "val_mR": score,
        "val": {name: {key: result[key] for key in kept} for name, result in results.items()},
        "logit_scale": learner.model.logit_scale.exp().item(),
        "lr": [group["lr"] for group in learner.optimizer.param_groups],
        "data_seconds": progress["data_seconds"],
        "compute_seconds": progress["compute_seconds"],
        "val_seconds": val_seconds,
    }


def main(arguments=None):
    options, checkpoint = parse(arguments)
    print(" ".join(f"{name}={value}" for name, value in sorted(options.items())))
    require_packages(options)
    keep_freed_memory()
    torch.manual_seed(options["seed"])
    device = pick_device(options["device"])
    if checkpoint:
        resume.use_threads(checkpoint["state"], device)
    options["precision"] = pick_precision(options["precision"], device)
    out = Path(options["out"])
    out.mkdir(parents=True, exist_ok=True)
    if not checkpoint:
        resume.require_finished(out)
    for leftover in out.glob("*.pth.*.tmp"):  # of a run that was killed while it saved
        leftover.unlink()

    model, model_config, label_map = start(options, checkpoint)
    data = read_data(options, model_config, label_map)
    model.to(device, memory_format=torch.channels_last)
    freeze(model, options["train"])
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    share = f"{learning:,} of {total:,} parameters ({100 * learning / total:.1f} %)"
    print(f"{share} train, {device}, {options['precision']}")
    if options["train"] == "graph":
        data = with_features(data, model, model_config, device, options)

    steps = len(data.train_set.batches(0, options["batch_size"]))
    learner = make_learner(model, options, options["epochs"] * steps)
    progress, lines, log = resume.begin_or_restore(learner, checkpoint, data.digest, out)
    drawn = {d.name: d.drawn_split for d in data.data_sets if d.drawn_split}
    if drawn:
        (out / "split.json").write_text(json.dumps(drawn, indent=1) + "\n", encoding="utf-8")
    content = {
        "model": model,
        "model_config": model_config,
        "labels": label_map.lines,
        "options": options,
        "origin": {data_set.name: data_set.annotations.origin for data_set in data.data_sets},
        "left_out": data.left_out,
        "data_digest": data.digest,
    }
    draw = curves(options, out, progress["epoch"])
    begin = time.perf_counter()

    def save_and_stop_if(due, noted):
        if due or noted:
            resume.save_state(out / "last.pth", learner, content, progress)
        if noted:
            again = f"python train.py --resume --out {shlex.quote(str(out))}"
            print(f"\nstopped and saved in epoch {progress['epoch']}; go on with: {again}")
            raise SystemExit(128 + noted[0])

    with resume.signals_noted() as noted, open(log, "a", encoding="utf-8") as file:

        def after_step():
            every, done = options["save_every"], (progress["epoch"] - 1) * steps + progress["step"]
            save_and_stop_if(every and done % every == 0, noted)

        while resume.goes_on(progress, options):
            epoch = progress["epoch"]
            train_one_epoch(learner, data.train_set, options, progress, after_step)
            validating = time.perf_counter()
            results, score = validate(model, data, options)
            seconds = time.perf_counter() - validating
            if score > progress["best_score"]:
                progress.update(best_score=score, best_epoch=epoch)
                save_checkpoint(out / "best_model.pth", **content, epoch=epoch, best_score=score)
            lines.append(log_line(progress, results, score, learner, seconds))
            file.write(json.dumps(lines[-1]) + "\n")
            file.flush()
            draw(lines)
            print(
                f"epoch {epoch:3d} | loss {lines[-1]['loss']:8.4f} | val mR {score:5.1f} | "
                f"best {progress['best_score']:5.1f} | data {progress['data_seconds']:.1f} s, "
                f"compute {progress['compute_seconds']:.1f} s, validation {seconds:.1f} s"
            )
            resume.next_epoch(progress)
            save_and_stop_if(True, resume.goes_on(progress, options) and noted)
    if progress["epoch"] <= options["epochs"]:
        print(f"stopped: no better validation mR for {options['patience']} epochs")
    print(
        f"best validation mR {progress['best_score']:.1f} in epoch {progress['best_epoch']}, "
        f"{time.perf_counter() - begin:.0f} s; {out}"
    )
    return progress["best_score"]


if __name__ == "__main__":
    main()
