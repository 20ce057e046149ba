"""One table that says what helps: rows trained alike, over seeds, with and without evidence.

    python ablate.py --dataset scenes --rows global fused shuffled --seeds 0 1 2 --out ablation/
    python ablate.py --dataset ucm --data-root DIR --out ablation/       # all rows, seed 0

A row is a set of options of train.py. All rows of a data set have the same recipe, and those of a
seed the same order of data and the same first weights of the parts that they share. Each is
measured once on the test split (of rsicd: `val`; its validation is drawn from train), with the
object evidence and without. "The system" is the row with the best mean on validation.

Each run leaves one small JSON file in --out, its weights go. What is there is not run again; a run
that was stopped goes on. At the end the table is printed, of all files of the data set in --out. A
row is compared with the runs of `global` that have its seeds.
"""

from options import answer_early

if __name__ == "__main__":
    answer_early("ablate", __doc__)  # before torch is imported, which takes seconds

import json
import shlex
import shutil
import time
from pathlib import Path
from statistics import mean, stdev

import evaluate
import train
from dataloader import Source, det_json_folder, prepare_source
from dataset import box_captions, scenes
from metrics.intervals import difference, figures
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
BASE = ("global", "without")  # what the others are compared with


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
    return [*arguments, *recipe, *ROWS[row], "--seed", str(seed), *shlex.split(options.extra)]


def write_box_captions(options, out):
    """Write the data root of the row box-captions, which has sentences made from the boxes."""
    source = Source(
        name=options.dataset,
        root=Path(options.data_root or "data/scenes"),
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
    validation = "dev" if "--dev-images" in arguments else "val"
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
    content = json.loads(path.read_text(encoding="utf-8"))
    before = content.get("arguments", [])
    if before != training_arguments(row, seed, options):
        raise ValueError(f"{path}: of other options ({shlex.join(before)}); name another --out")
    return content


def all_runs(options):
    """The contents of all files of the data set in --out, of any row and seed."""
    contents = []
    for row in ROWS:
        for path in Path(options.out).glob(f"{options.dataset}-{row}-*.json"):
            seed = path.stem.rpartition("-")[2]
            if path == path_of(row, seed, options) and seed.isdecimal():
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
        "seconds": round(time.monotonic() - begin),
        **measure_row(folder, arguments, options),
    }
    write_text(path, json.dumps(content) + "\n")
    shutil.rmtree(folder)  # which this run made


# ------------------------------------------------------------------ the table


def of_detected(result):
    """A result's table by image, of the images with a detected object alone."""
    kept = [i for i, count in enumerate(result["objects"]) if count]

    def part(values):
        if isinstance(values, dict):
            return {name: part(column) for name, column in values.items()}
        return [values[i] for i in kept]

    return part(result["per_image"])


def spread(values):
    """Mean ± sample deviation of figures, in words."""
    return f"{mean(values):.1f} ± {stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def row_cells(name, choice, runs, base):
    """A row of the table; base: runs of the row that it is compared with, or None.

    Of these those of the same seeds count, if there are all of them.
    """
    validation = [content["validation"][choice]["mR"] for content in runs]
    results = [content["test"][choice] for content in runs]
    whole = [result["per_image"] for result in results]
    detected = [of_detected(result) for result in results]
    any_detected = all(table["names"] for table in detected)
    cells = [
        name,
        choice,
        str(len(runs)),
        spread(validation),
        spread([result["mR"] for result in results]),
        spread([figures([table])["mR"] for table in detected]) if any_detected else "-",
    ]
    if base is None or (name, choice) == BASE:
        return [*cells, "", ""]
    seeds = [run["seed"] for run in runs]
    alike = [run for run in base if run["seed"] in seeds]
    same_seeds = [run["seed"] for run in alike] == seeds
    base = alike if same_seeds else base
    of_base = [content["test"][BASE[1]] for content in base]
    for own, others in (
        (whole, [result["per_image"] for result in of_base]),
        (detected, [of_detected(result) for result in of_base]),
    ):
        if not own[0]["names"]:
            cells.append("-")
            continue
        gain = difference(own, others, same_seeds)["mR"]
        cells.append(f"{gain.value:+.1f}, {gain.low:+.1f} to {gain.high:+.1f}")
    return cells


HEADS = (
    "row", "evidence", "seeds", "validation mR", "test mR", "images with detections",
    "gain over global", "gain, with detections",
)  # fmt: skip


FINE = {  # heading: measure and figure of metrics/fine.py
    "counting, best of ten": ("counting", "top1"),
    "kind swap, best of ten": ("kind_swap", "top1"),
    "within a class, mR": ("within_class", "mR"),
    "twins": ("twins", "right"),
}


def fine_cells(choice, runs):
    """The fine measures of a row, blind answers in brackets; "-" where there is none."""
    cells = []
    for measure, figure in FINE.values():
        fine = [{**run["test"]["with"]["fine"], "twins": run.get("twins")} for run in runs]
        sides = [(own[measure] or {}).get(f"{choice}_evidence") for own in fine]
        if None in sides:
            cells.append("-")
            continue
        cell = spread([side[figure] for side in sides])
        if f"blind_{figure}" in sides[0]:
            cell += f" ({mean(side[f'blind_{figure}'] for side in sides):.1f})"
        cells.append(cell)
    return cells


def by_row(contents):
    """{row: contents of its runs by seed}, in the order of ROWS."""
    found = {}
    for row in ROWS:
        own = [content for content in contents if content["row"] == row]
        if own:
            found[row] = sorted(own, key=lambda content: content["seed"])
    return found


def markdown(heads, rows):
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def seed_cells(name, choice, runs):
    """A row of the table of single runs."""
    cells = [name, choice, " ".join(str(content["seed"]) for content in runs)]
    for split in ("validation", "test"):
        cells.append(" ".join(f"{content[split][choice]['mR']:.1f}" for content in runs))
    return cells


def table(contents):
    """Three Markdown tables of all runs' contents, and a line that names the system."""
    runs_of = by_row(contents)
    rows, fine_rows, seed_rows, validation = [], [], [], {}
    for name, runs in runs_of.items():
        for choice in ("without", "with"):
            rows.append(row_cells(name, choice, runs, runs_of.get(BASE[0])))
            fine_rows.append([name, choice, *fine_cells(choice, runs)])
            seed_rows.append(seed_cells(name, choice, runs))
            scores = [content["validation"][choice]["mR"] for content in runs]
            validation[f"{name}, {choice} evidence"] = mean(scores)
    best = max(validation, key=validation.get)
    return "\n\n".join(
        (
            markdown(HEADS, rows),
            markdown(["row", "evidence", *FINE], fine_rows),
            markdown(["row", "evidence", "seeds", "validation mR", "test mR"], seed_rows),
            f"the system, by the mean on validation: {best}",
        )
    )


def main(arguments=None):
    options = parse_options("ablate", __doc__, arguments)
    unknown = sorted(set(options.rows or ()) - set(ROWS))
    if unknown:
        raise ValueError(f"--rows {' '.join(unknown)}: expected some of {', '.join(ROWS)}")
    if options.data_root is None and options.dataset != "scenes":
        raise ValueError(f"--dataset {options.dataset} needs --data-root, the folder it lies in")
    Path(options.out).mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for row in options.rows or ROWS:
            print(f"\n{row}, seed {seed}", flush=True)
            do_run(row, seed, options)
    contents = all_runs(options)
    print("\n" + table(contents))
    return contents


if __name__ == "__main__":
    run(main)
