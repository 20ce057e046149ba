"""Train FG-CROSS.

    python train.py                                             # synthetic scenes, minutes on a CPU
    python train.py --dataset ucm --data-root DIR --precision bf16 --batch-size 64 --epochs 100
    python train.py --dataset rsitmd --data-root DIR --clip ViT-B/32      # fine-tune a CLIP

    python train.py --resume                                    # go on where the latest was stopped
    torchrun --nproc_per_node=2 train.py --clip ViT-B/32 ...    # on two GPUs: training/README.md

Writes `best_model.pth` (best mR on validation, the mean over data sets), `last.pth` to go on from,
and `log.jsonl`, a line an epoch, into a new folder below runs/, or into --out. No model is measured
on a test split here: see evaluate.py. Ctrl-C and SIGTERM save before they stop.
"""

from options import answer_early

if __name__ == "__main__":
    answer_early("train", __doc__)  # before torch is imported, which takes seconds

import json
import os
import shlex
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import torch

import processes
from clip_gcn_image_feature_integration import pick_device
from det_formats.det_json import LABELS, LabelMap, read_label_map
from evaluate import evaluate
from evidence import as_field, fit_beside
from model import (
    add_adapters,
    add_to_checkpoint,
    build,
    load_checkpoint,
    save_checkpoint,
)
from options import for_resuming, for_training, given_options, parse_options, run
from progress import Progress
from training import distributed, resume, run_folder
from training.inputs import encoded_at_once, find_data, read_data, with_features
from training.step import (
    check_start,
    freeze,
    has_statistics,
    keep_freed_memory,
    make_learner,
    pick_precision,
    recompute_blocks,
    set_training_mode,
    start_model,
    train_step,
)
from V_Graph import PUBLISHED_LABELS
from writing import write_text


def parse(arguments=None):
    """(options, the checkpoint to resume from or None)."""
    options = vars(parse_options("train", __doc__, arguments))
    given = given_options("train", __doc__, arguments)
    if not options["resume"]:
        return for_training(options, given), None
    checkpoint = resume.read_state(Path(options["out"]) / "last.pth")
    return for_resuming(checkpoint["options"], given), checkpoint


# ------------------------------------------------------------------ before the loop


def prepare_machine(options, checkpoint):
    """The device to compute on; seeds the generators and fills in the precision's default."""
    keep_freed_memory()
    torch.manual_seed(options["seed"])
    device = pick_device(options["device"])
    if checkpoint is not None:
        resume.use_threads(checkpoint["state"], device)
    options["precision"] = pick_precision(options["precision"], device)
    return device


def remove_leftovers(out):
    """Remove what a killed process left half written; only under the folder's lock."""
    for name in ("last.pth", "best_model.pth", "log.jsonl"):
        for leftover in out.glob(f"{name}.*.tmp"):
            leftover.unlink()


def pick_label_map(options, checkpoint):
    """The labels of the detections: of a file, the published ones, or those of the stopped run."""
    if checkpoint is not None:
        return LabelMap(checkpoint["labels"])
    if options["graph"] == "published":
        return LabelMap(PUBLISHED_LABELS)
    return read_label_map(options["labels"] or LABELS)


def prepare_model(options, checkpoint, label_map):
    """(model, its sizes, start_sha256): new ones, or as the stopped run left them."""
    if checkpoint is not None:
        model_config = checkpoint["definition"]
        model = build(model_config, label_map.lines, options)
        add_adapters(model, options)
        model.load_state_dict(checkpoint["weights"])
        # Runs that began before it was saved have none.
        return model, model_config, checkpoint.get("start_sha256")
    model, model_config, start_sha256 = start_model(options, label_map.lines)
    options["model"] = model_config["name"]
    return model, model_config, start_sha256


def print_what_trains(model, device, options):
    """Say how many parameters learn, and where."""
    total = sum(parameter.numel() for parameter in model.parameters())
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    share = f"{100 * learning / total:.1f} %"
    where = f"{device}, {options['precision']}"
    if processes.several():
        where += f", {processes.world()} processes"
    print(f"{learning:,} of {total:,} parameters ({share}) train, {where}")
    if has_statistics(model) and distributed.is_in_parts(options):
        print("several processes or --chunk: batch normalisation keeps its statistics")


def write_drawn_splits(data_sets, out):
    """Write split.json where a validation split is drawn from the training images."""
    drawn = {data.name: data.drawn_split for data in data_sets if data.drawn_split}
    if drawn:
        write_text(out / "split.json", json.dumps(drawn, indent=1) + "\n")


# ------------------------------------------------------------------ parts of the loop


def steps_in_epoch(train_set, options):
    return len(train_set.batches(0, options["batch_size"]))


def batches_with_bar(train_set, options, progress, device):
    """The batches of the epoch that are left, shown by a bar."""
    first = progress["step"]
    batches = train_set.batches(
        progress["epoch"],
        options["batch_size"],
        workers=options["workers"],
        pin_memory=device.type == "cuda",
        start=first,
        rank=processes.rank(),
        world=processes.world(),
    )
    return Progress(batches, f"epoch {progress['epoch']}", "steps", done=first)


def validate(model, data, options):
    """{data set: result on its validation split}, and the mean mR."""
    results = {}
    for data_set, images, texts in zip(data.data_sets, data.val_sets, data.val_texts, strict=True):
        results[data_set.name] = evaluate(
            model,
            images,
            data_set.records(data_set.validation),
            model.logit_scale.device,
            batch_size=encoded_at_once(options),
            workers=options["workers"],
            text_features=texts,
        )
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


def print_epoch(line, best_score):
    """Show a line of the log to the user."""
    print(
        f"epoch {line['epoch']:3d} | loss {line['loss']:8.4f} | val mR {line['val_mR']:5.1f} | "
        f"best {best_score:5.1f} | data {line['data_seconds']:.1f} s, "
        f"compute {line['compute_seconds']:.1f} s, validation {line['val_seconds']:.1f} s"
    )


def save_progress(out, learner, content, progress, lock):
    """Write last.pth; of several processes the first one does."""
    if processes.is_first():
        lock.require_held()
        resume.save_state(out / "last.pth", learner, content, progress)


def resume_command(out):
    """What to type to go on with a run."""
    start = "python"
    if processes.several():
        start = f"torchrun --nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE', 'N')}"
    if os.environ.get("LOCAL_WORLD_SIZE") != str(processes.world()) and processes.several():
        start = "torchrun (as before, on all machines)"
    return f"{start} train.py --resume --out {shlex.quote(str(out))}"


def stop(out, progress, signal_number):
    """End the process after a signal, all being saved; the exit code is the shell's for it."""
    processes.wait()  # or else torchrun ends the first one, which still saves
    print(
        f"\nstopped and saved in epoch {progress['epoch']}; go on with: {resume_command(out)}",
        flush=True,
    )
    raise SystemExit(128 + signal_number)


# ------------------------------------------------------------------ the loop


def training_loop(learner, data, options, content, progress, lines, lock):
    """Train, validate, log and save, until no epoch is left.

    content: what all checkpoints hold, arguments of `save_checkpoint`. progress (see resume.py) and
    lines, those of the log, say how far the run has come; they grow with it. lock: the folder's,
    which is looked at before each save; None in all processes but the first, which alone writes.
    """
    out = Path(options["out"])
    device = learner.model.logit_scale.device
    log_file = out / "log.jsonl" if processes.is_first() else os.devnull
    with resume.signals_noted() as noted, open(log_file, "a", encoding="utf-8") as log:
        saved_at = time.perf_counter()
        while progress["epoch"] <= options["epochs"]:
            epoch = progress["epoch"]
            set_training_mode(learner.model, options)
            batches = batches_with_bar(data.train_set, options, progress, device)
            waiting = time.perf_counter()
            for batch in batches:
                begin = time.perf_counter()
                place = f"epoch {epoch}, step {progress['step']}"
                loss = train_step(learner, data.train_set, batch, options, place)
                progress["step"] += 1
                progress["loss"] += loss
                progress["data_seconds"] += begin - waiting
                progress["compute_seconds"] += time.perf_counter() - begin
                batches.note = f"loss {loss:.3f}"
                signal_number = processes.largest(noted[0] if noted else 0)
                if signal_number or time.perf_counter() - saved_at >= resume.SAVE_SECONDS:
                    save_progress(out, learner, content, progress, lock)
                    saved_at = time.perf_counter()
                if signal_number:
                    stop(out, progress, signal_number)
                waiting = time.perf_counter()

            begin = time.perf_counter()
            results, score = validate(learner.model, data, options)
            val_seconds = time.perf_counter() - begin
            if score > progress["best_score"]:
                progress["best_score"] = score
                progress["best_epoch"] = epoch
                if processes.is_first():
                    lock.require_held()
                    best = out / "best_model.pth"
                    save_checkpoint(best, **content, epoch=epoch, best_score=score)

            line = log_line(progress, results, score, learner, val_seconds)
            lines.append(line)
            log.write(json.dumps(line) + "\n")
            log.flush()
            print_epoch(line, progress["best_score"])

            resume.next_epoch(progress)
            save_progress(out, learner, content, progress, lock)
            saved_at = time.perf_counter()
            signal_number = processes.largest(noted[0] if noted else 0)
            if signal_number and progress["epoch"] <= options["epochs"]:
                stop(out, progress, signal_number)


def add_evidence(out, data, options):
    """Fit the object evidence beside the best model, and write it into best_model.pth."""
    if not any(data.train_set.image_set.has_file):
        print("no training image has a detection file: there is no object evidence to fit")
        return
    path = out / "best_model.pth"
    device = pick_device(options["device"])
    model, _ = load_checkpoint(path, device)
    again = resume_command(out)
    print(f"trained; now the object evidence is fitted. If it is stopped here, fit it by: {again}")
    evidence = fit_beside(model, data, device, encoded_at_once(options), options["workers"])
    add_to_checkpoint(path, evidence=as_field(evidence))


AFTER_A_LOSS = "start the same command again with --resume, to go on from the last save"


def main(arguments=None):
    """Train as the command line says; returns the best mean mR on validation."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    options = vars(parse_options("train", __doc__, words))
    with processes.group(options["device"], AFTER_A_LOSS), ExitStack() as held:
        out = None
        lock = None
        with processes.first_of_machine_first():
            if processes.is_first():
                out = run_folder.choose(options)
                lock = held.enter_context(run_folder.locked(out))
        out = processes.from_first(out)
        with processes.first_of_machine_first():
            options, checkpoint = parse([*words, "--out", str(out)])
        return train(options, checkpoint, lock)


def train(options, checkpoint, lock):
    """Train in the folder of --out, whose lock is held; checkpoint: of a run that goes on.

    lock: None in all processes but the first of a run.
    """
    out = Path(options["out"])
    is_first = processes.is_first()
    with processes.first_of_machine_first():
        if is_first and checkpoint is None and not options["overwrite"]:
            run_folder.require_free(out)
        print(" ".join(f"{name}={value}" for name, value in sorted(options.items())))
        device = prepare_machine(options, checkpoint)
        if is_first:
            remove_leftovers(out)
        # What is looked at in moments comes first: a model may be a download.
        if checkpoint is None:
            check_start(options)
        label_map = pick_label_map(options, checkpoint)
        data_sets = find_data(options)
        model, model_config, start_sha256 = prepare_model(options, checkpoint, label_map)
        distributed.check(options, model_config)
        if checkpoint is not None:
            distributed.check_resumed(options, model_config, checkpoint["state"])
        data = read_data(data_sets, options, model_config, label_map)
        distributed.check_images(options, len(data.train_set))
        freeze(model, options["train"])
        if options["recompute"]:
            recompute_blocks(model)
    model.to(device, memory_format=torch.channels_last)
    print_what_trains(model, device, options)
    if options["train"] == "graph":
        data = with_features(data, model, model_config, device, options)

    steps = options["epochs"] * steps_in_epoch(data.train_set, options)
    learner = make_learner(model, options, steps)
    with processes.first_of_machine_first():
        if checkpoint is None:
            progress, lines = resume.begin(out)
        else:
            progress, lines = resume.go_on(learner, checkpoint, data.digest, out)
    if is_first:
        write_drawn_splits(data.data_sets, out)
    content = {
        "model": model,
        "model_config": model_config,
        "labels": label_map.lines,
        "options": options,
        "origin": {data_set.name: data_set.annotations.origin for data_set in data.data_sets},
        "left_out": data.left_out,
        "data_digest": data.digest,
        "start_sha256": start_sha256,
    }
    begin = time.perf_counter()
    training_loop(learner, data, options, content, progress, lines, lock)
    processes.leave()  # what is left is done by one
    if not is_first:
        return progress["best_score"]
    lock.require_held()
    add_evidence(out, data, options)
    print(
        f"best validation mR {progress['best_score']:.1f} in epoch {progress['best_epoch']}, "
        f"{time.perf_counter() - begin:.0f} s; {out}"
    )
    return progress["best_score"]


if __name__ == "__main__":
    run(main)
