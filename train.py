"""Train FG-CROSS.

    python train.py                                             # synthetic scenes, minutes on a CPU
    python train.py --dataset ucm --data-root DIR --precision bf16 --batch-size 64 --epochs 100
    python train.py --dataset rsitmd --data-root DIR --clip ViT-B/32      # fine-tune a CLIP

    python train.py --resume --out models/ucm                   # go on where a run was stopped

Writes `best_model.pth` (best mR on validation, the mean over data sets), `last.pth` to go on from,
and `log.jsonl`, a line an epoch, into models/ or --out. No model is measured on a test split here:
see evaluate.py. Ctrl-C and SIGTERM save before they stop.
"""

import json
import shlex
import time
from pathlib import Path

import torch
from tqdm import tqdm

from clip_gcn_image_feature_integration import pick_device
from det_formats.det_json import LABELS, LabelMap, read_label_map
from evaluate import evaluate
from model import add_adapters, build, save_checkpoint
from options import for_resuming, for_training, given_options, parse_options
from training import resume
from training.curves import curves, require_packages
from training.inputs import read_data, with_features
from training.step import (
    freeze,
    keep_freed_memory,
    make_learner,
    pick_precision,
    set_training_mode,
    start_model,
    train_step,
)
from V_Graph import PUBLISHED_LABELS


def parse(arguments=None):
    """(options, the checkpoint to resume from or None)."""
    options = vars(parse_options("train", __doc__, arguments))
    if not options["resume"]:
        return for_training(options), None
    checkpoint = resume.read_state(Path(options["out"]) / "last.pth")
    given = {**given_options("train", __doc__, arguments), "out": options["out"]}
    return for_resuming(checkpoint["options"], given), checkpoint


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
