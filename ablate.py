"""One table that says what helps: rows trained alike, over seeds, with and without evidence.

    python ablate.py --dataset scenes --rows global fused shuffled --seeds 0 1 2 --out ablation/
    python ablate.py --dataset ucm --data-root DIR --out ablation/       # all rows, seed 0

A row is a set of options of train.py. All rows of a data set have the same recipe, and those of a
seed the same order of data and the same first weights of the parts that they share. Each is
measured once on the test split (of rsicd: `val`; its validation is drawn from train), with the
object evidence and without. "The system" is the row with the best mean on validation, of those with
the most seeds.

Each run leaves one small JSON file in --out, its weights go. What is there is not run again; a run
that was stopped goes on. At the end the table is printed, of all files of the data set in --out. A
row is compared with the runs of `global` that have its seeds; where one of these is missing, with
all.
"""

from options import answer_early

if __name__ == "__main__":
    answer_early("ablate", __doc__)  # before torch is imported, which takes seconds

import json
import shlex
import shutil
import time
from pathlib import Path

import evaluate
import processes
import train
from dataloader import Source, det_json_folder, prepare_source
from dataset import box_captions, scenes
from metrics.ablation import figure, tables
from options import parse_options, run
from writing import write_text

ROWS = {  # name: options of train.py
    "global": ["--graph", "none"],
    "fused": ["--graph", "object"],
    "shuffled": ["--graph", "exchanged"],
    "counts": ["--graph", "counts"],
    "no-edges": ["--graph", "no-edges"],
    "published": ["--graph", "published"],
    "box-captions": ["--graph", "none"],  # and sentences made from the boxes
}

RECIPES = {  # data set: options of train.py that all its rows share
    "scenes": [],
    "ucm": "--precision bf16 --batch-size 64 --weight-decay 1 --epochs 100".split(),
    "rsicd": "--precision bf16 --weight-decay 0.5 --epochs 40 --dev-images 1000".split(),
}
TEST_SPLIT = {"rsicd": "val"}  # where it is not "test"


# ------------------------------------------------------------------ one run


def training_arguments(row, seed, options):
    """What train.py is called with for a row, its folder aside."""
    name, root, form = options.dataset, options.data_root, options.annotations
    det_json = options.det_json
    recipe = RECIPES.get(name, [])
    if row == "box-captions":
        root, form = str(Path(options.out) / f"{name}-box-captions"), "karpathy"
        if name == "scenes":  # a name that is the generator's own folder's
            name, recipe = "box-captions", ["--augment"]
    arguments = ["--dataset", name]
    for flag, value in (("--data-root", root), ("--annotations", form), ("--det-json", det_json)):
        arguments += [flag, value] if value else []
    return [*arguments, *recipe, *ROWS[row], "--seed", str(seed), *options.extra]


def write_box_captions(options, out):
    """Write the data root of the row box-captions, which has sentences made from the boxes."""
    source = Source(
        name=options.dataset,
        root=Path(options.data_root or scenes.FOLDER),
        det_json=options.det_json,
        form=options.annotations or "auto",
    )
    prepare_source(source)
    box_captions.write(source.root, out, source.form, det_json_folder(source))


def train_row(row, seed, arguments, options):
    """Train a row, or go on with it; returns its folder."""
    folder = Path(options.out) / f"run-{options.dataset}-{row}-{seed}"
    if row == "box-captions":
        write_box_captions(options, Path(options.out) / f"{options.dataset}-box-captions")
    going_on = ["--resume"] if (folder / "last.pth").is_file() else []
    train.main([*going_on, *arguments, "--out", str(folder)])
    return folder


def has_dev(arguments):
    """Whether arguments of train.py draw the images of validation from training."""
    return parse_options("train", __doc__, arguments).dev_images > 0


def measure_row(folder, arguments, options):
    """A trained row's results: on "validation" and "test", each "without" evidence and "with".

    The test split's with evidence holds the fine measures (metrics/README.md), without and with. Of
    the scenes there are "twins" too.
    """
    checkpoint = ["--checkpoint", str(folder / "best_model.pth")]
    checkpoint += ["--dataset", options.dataset]  # box captions are of training alone
    if options.data_root:
        checkpoint += ["--data-root", options.data_root]
        checkpoint += ["--annotations", options.annotations or "auto"]
        checkpoint += ["--det-json", options.det_json] if options.det_json else []
    validation = "dev" if has_dev(arguments) else "val"
    splits = {"validation": validation, "test": TEST_SPLIT.get(options.dataset, "test")}
    found = {}
    for name, split in splits.items():
        found[name] = {}
        for choice, weight in (("without", "off"), ("with", "auto")):
            place = ["--split", split, "--evidence", weight]
            fine = ["--fine"] if (name, choice) == ("test", "with") else []
            [found[name][choice]] = evaluate.main([*checkpoint, *place, *fine])
    if options.dataset == "scenes":
        root = Path(options.out) / "twins"
        scenes.generate_twins(root)
        place = ["--dataset", "twins", "--data-root", str(root), "--fine"]
        [result] = evaluate.main([*checkpoint[:2], *place])
        found["twins"] = result["fine"]["twins"]
    return found


def path_of(row, seed, options):
    """The file of a run."""
    return Path(options.out) / f"{options.dataset}-{row}-{seed}.json"


def read_run(row, seed, options):
    """The content of a run's file; ValueError where it is of other options."""
    path = path_of(row, seed, options)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        before = content["arguments"]
        if not all(content[name] for name in ("row", "validation", "test")):
            raise ValueError("fields are empty")
        content["test"]["with"]["fine"]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path}: not the file of a run ({error}); remove it") from None
    places = places_of(options)
    if _without_places(before) != _without_places(training_arguments(row, seed, options)):
        raise ValueError(f"{path}: of other options ({shlex.join(before)}); name another --out")
    if content.get("places", places) != places:  # which older files do not hold
        raise ValueError(f"{path}: of {content['places']}, not {places}; name another --out")
    return content


def places_of(options):
    """Where the data lie, as the user says: what box captions are made from."""
    return [options.data_root, options.annotations, options.det_json]


def _without_places(arguments):
    """Arguments of train.py without the folder of sentences from boxes, which lies in --out."""
    return [word for word in arguments if not word.endswith("-box-captions")]


def all_runs(options):
    """The contents of all files of the data set in --out, of any row and seed."""
    contents = []
    for row in ROWS:
        for path in Path(options.out).glob(f"{options.dataset}-{row}-*.json"):
            seed = path.stem.rpartition("-")[2]
            if seed.isdecimal() and path == path_of(row, int(seed), options):
                contents.append(read_run(row, int(seed), options))
    return contents


def do_run(row, seed, options):
    """Train and measure a row, unless its file is there."""
    path = path_of(row, seed, options)
    if path.is_file():
        read_run(row, seed, options)
        print(f"{path}: is there already")
    else:
        write_run(path, row, seed, training_arguments(row, seed, options), options)


def write_run(path, row, seed, arguments, options):
    """Train and measure a row, write its file, and remove its weights."""
    begin = time.monotonic()
    folder = train_row(row, seed, arguments, options)
    content = {
        "row": row,
        "seed": seed,
        "dataset": options.dataset,
        "arguments": arguments,
        "places": places_of(options),
        "seconds": round(time.monotonic() - begin),
        **measure_row(folder, arguments, options),
    }
    write_text(path, json.dumps(content) + "\n")
    shutil.rmtree(folder)  # which this run made


# ------------------------------------------------------------------ the command


def main(arguments=None):
    options = parse_options("ablate", __doc__, arguments)
    unknown = sorted(set(options.rows or ()) - set(ROWS))
    if unknown:
        raise ValueError(f"--rows {' '.join(unknown)}: expected some of {', '.join(ROWS)}")
    if processes.started_together():
        raise ValueError("ablate.py runs in one process: start it without torchrun")
    if options.data_root is None and options.dataset != "scenes":
        raise ValueError(f"--dataset {options.dataset} needs --data-root, the folder it lies in")
    Path(options.out).mkdir(parents=True, exist_ok=True)
    all_runs(options)  # a file of other options ends it before anything is trained
    rows = options.rows or ROWS
    # Dev images would be drawn from images with made sentences.
    if has_dev(training_arguments("global", options.seeds[0], options)):
        if "box-captions" in (options.rows or ()):
            raise ValueError("--rows box-captions: not with --dev-images; name the other rows")
        rows = [row for row in rows if row != "box-captions"]
    for seed in options.seeds:
        for row in rows:
            print(f"\n{row}, seed {seed}", flush=True)
            do_run(row, seed, options)
    contents = all_runs(options)
    print("\n" + tables(contents, ROWS))
    if options.figure:
        write_text(options.figure, figure(contents, ROWS, options.dataset))
        print(f"written to {options.figure}")
    return contents


if __name__ == "__main__":
    run(main)
