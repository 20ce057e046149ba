"""Every option of every script, once: who has it, its default, its help, what it goes with.

    python train.py --help      # the options of one script, in groups

A root file because all scripts share it. It imports nothing slow, so that it can stand below
everything, and answers --help and mistyped options at once. To add an
option, add a row to OPTIONS: its bounds and what it goes with are checked and shown in the help.

`run` ends a script: a mistake of the user's is one line that begins with `error:`.
"""

import argparse
import math
import os
import sys
from pathlib import Path
from typing import NamedTuple

from escaping import escaped

# Choices. Where a module has a table of what each one does, a test holds its keys against these.
ACTIVATIONS = ("quickgelu", "gelu")
AUGMENTATIONS = ("crop", "flip", "turn", "erase", "colour")
CLEANERS = ("none", "pir")
FORMS = ("auto", "txt", "karpathy", "pir")
GRAPHS = ("object", "none", "published")
LOSSES = ("infonce", "hinge", "hinge-max")
NAMINGS = ("open_clip", "openai", "huggingface")
PRECISIONS = ("fp32", "bf16", "fp16")
TRAINED = ("all", "image", "text", "graph", "lora")

LORA = (8, 16, 0.0)  # rank, alpha, dropout
MAX_OBJECTS = 20  # of an image that its graph holds; as published

GIVEN = object()  # in `only`: any value, as long as the other option is given
WITH_GRAPH = {"graph": ("object", "published")}

GROUPS = ("data", "training data", "model", "loss", "training", "run", "device", "input", "output")


class Option(NamedTuple):
    """A row of OPTIONS."""

    flag: str  # "--name", or "name" for an argument without a flag
    scripts: tuple  # which scripts have it
    group: str  # its heading in --help
    settings: dict  # of argparse: help, default, type, nargs, choices, metavar, action, required
    least: float  # the smallest number that makes sense
    most: float  # and the largest
    above: float  # the number has to be larger than this
    only: dict  # {name of another option: values for which this one does anything}
    free: bool  # whether it may differ when a run is resumed: it changes no result

    @property
    def name(self):
        """Its name in the parsed options."""
        return self.flag.removeprefix("--").replace("-", "_")


def option(
    flag,
    scripts,
    group,
    least=-math.inf,
    most=math.inf,
    above=-math.inf,
    only=None,
    free=False,
    **settings,
):
    """A row of OPTIONS; scripts: their names with spaces between."""
    scripts = tuple(scripts.split())
    return Option(flag, scripts, group, settings, least, most, above, only or {}, free)


def _flag(name):
    return "--" + name.replace("_", "-")


def _condition(name, values):
    """An entry of `only` as a user would type it: --loss hinge|hinge-max."""
    return _flag(name) if values is GIVEN else f"{_flag(name)} {'|'.join(values)}"


def number(text):
    """An argparse type: a number that is neither infinite nor "nan"."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text}: expected a finite number")
    return value


def output_path(path):
    """An argparse type: a file to be written. Its folder is made before any work is done."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return path


# fmt: off
OPTIONS = (
    # ------------------------------------------------------------------ data
    option("--dataset", "train evaluate audit", "data", nargs="+", default=["scenes"],
           help="scenes, ucm, rsicd, rsitmd or names of your own; several train together"),
    option("--data-root", "train evaluate audit", "data", free=True, nargs="+",
           help="a folder for each; only scenes has one, data/scenes"),
    option("--det-json", "train evaluate audit", "data", free=True, nargs="+",
           help="folders of detections; default <data root>/det_json"),
    option("--annotations", "train evaluate audit", "data", free=True, nargs="+", choices=FORMS,
           help="format of the captions; needed where a folder holds several"),
    option("--clean", "train evaluate", "data", choices=CLEANERS, default="none",
           help="pir: captions as PIR and HarMA"),
    option("--template", "train evaluate", "data",
           help='around every caption: "a satellite photo of {}"'),
    option("--dev-images", "train evaluate", "data", least=0, type=int, default=0,
           help="validate on so many images drawn from train, keeping the shipped val unseen"),
    option("--graph-control", "train evaluate", "data", only=WITH_GRAPH,
           choices=("own", "exchanged", "no-edges"),
           default="own", help="for control experiments: another image's graph, or no edges"),
    option("--cache-gb", "train evaluate", "data", least=0, free=True, type=number, default=4,
           help="RAM for a split's images, else a file"),
    option("--cache-dir", "train evaluate", "data", free=True,
           help="folder of that file; default below your user's cache"),
    option("--workers", "train evaluate", "data", least=0, free=True, type=int, default=0,
           help="loader processes; raise where a GPU waits"),
    option("--augment", "train", "training data", nargs="*", choices=AUGMENTATIONS,
           help="default all; scenes none, since sentences say left of"),
    option("--drop-graphs", "train", "training data", least=0, most=1,
           only=WITH_GRAPH, type=number, default=0.1,
           help="share of images shown without graph, so that CLIP's branch stands alone"),
    option("--drop-test-captions", "train", "training data", action="store_true",
           help="leave out training captions that are found in a test split"),
    # ------------------------------------------------------------------ model and loss
    option("--model", "train", "model",
           help="model config in models/ to train from scratch; default small"),
    option("--graph", "train", "model", choices=GRAPHS, default="object",
           help="none: a plain CLIP; published: the published pass, for comparison only"),
    option("--fusion", "train", "model", only={"graph": ("object",)},
           choices=("sum", "gate"), default="sum",
           help="gate: learned, per image"),
    option("--image-encoder-ratio", "train", "model", least=0,
           only={**WITH_GRAPH, "fusion": ("sum",)}, type=number, nargs=2, default=(0.5, 0.5),
           metavar=("CLIP", "GRAPH"), help="weights of the branches in --fusion sum"),
    option("--labels", "train audit V_Graph", "model", only={"graph": ("object",)},
           help="labels of the detections, a label and its aliases a line; default "
                "det_json/labels.txt"),
    option("--max-objects", "train audit V_Graph", "model", least=1,
           only={"graph": ("object",)}, type=int, default=MAX_OBJECTS,
           help="objects that a graph holds; raise for crowded images"),
    option("--loss", "train", "loss", choices=LOSSES, default="infonce",
           help="hinge: as published; hinge-max: hardest negative only (VSE++'s max violation)"),
    option("--margin", "train", "loss", above=0, only={"loss": ("hinge", "hinge-max")},
           type=number, default=0.2, help="of the hinge, in cosine"),
    # ------------------------------------------------------------------ training
    option("--clip", "train", "training",
           help="pretrained start, a name or file for clip.load; else from scratch"),
    option("--image-size", "train", "training", least=1, type=int,
           help="pixels a side, if not the model config's or the weights'"),
    option("--train", "train", "training", choices=TRAINED, default="all",
           help="towers to train; new layers always do"),
    option("--lora", "train", "training", least=0, only={"train": ("lora",)},
           type=number, nargs=3, default=LORA,
           metavar=("RANK", "ALPHA", "DROPOUT"), help="adapters of --train lora"),
    option("--activation", "train", "training", only={"clip": GIVEN}, choices=ACTIVATIONS,
           help="of CLIP weights that do not tell it; the error says when it is needed"),
    option("--epochs", "train", "training", least=1, type=int, default=20,
           help="more help while validation still improves"),
    option("--lr", "train", "training", above=0, only={"clip": GIVEN}, type=number,
           help="of pretrained layers; default 1e-5, of --train lora 2e-4"),
    option("--lr-new", "train", "training", above=0, type=number, default=2e-3,
           help="of new layers: all of them without --clip"),
    option("--weight-decay", "train", "training", least=0, type=number, default=0.1,
           help="of matrices, not of biases and norms"),
    option("--precision", "train", "training", choices=PRECISIONS,
           help="default fp32, on CUDA half"),
    option("--patience", "train", "training", least=1, type=int, default=10,
           help="epochs without a better validation mR"),
    option("--seed", "train", "training", least=0, type=int, default=0,
           help="of weights, order, captions, augmentation, splits"),
    # ------------------------------------------------------------------ the run
    option("--out", "train", "run", free=True,
           help="folder for checkpoints and log; default a new one, runs/<data set>-1, -2 ...; "
                "with --resume the latest run's"),
    option("--overwrite", "train", "run", free=True, action="store_true",
           help="begin anew in a folder that holds a model, which stays until there is a new one"),
    option("--save-every", "train", "run", least=0, free=True, type=int, default=500,
           help="steps between saves within an epoch"),
    option("--resume", "train", "run", free=True, action="store_true",
           help="go on from last.pth in --out, bit for bit"),
    # ------------------------------------------------------------------ device
    option("--device", "train evaluate infer clip_gcn", "device", free=True,
           choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda if any"),
    option("--batch-size", "train", "device", least=1, type=int, default=128,
           help="halve on out-of-memory; InfoNCE's negatives come from the batch"),
    option("--batch-size", "evaluate infer clip_gcn", "device", least=1, type=int, default=64,
           help="halve on out-of-memory"),
    # ------------------------------------------------------------------ what a script reads
    option("--checkpoint", "evaluate", "input", nargs="+",
           help="from train.py, the published FG-CROSS, or a CLIP: what clip.load takes; default "
                "the latest run's best_model.pth"),
    option("--checkpoint", "infer clip_gcn", "input",
           help="from train.py, the published FG-CROSS, or a CLIP: what clip.load takes; default "
                "the latest run's best_model.pth"),
    option("--checkpoint", "export", "input", required=True, help="ours, or what clip.load takes"),
    option("--activation", "evaluate infer clip_gcn export", "input", choices=ACTIVATIONS,
           help="of CLIP weights that do not tell it; the error says when it is needed"),
    option("--split", "evaluate", "input", default="test",
           help="val, train or dev; select on val, report test"),
    option("--caption-equivalence", "evaluate", "input", action="store_true",
           help="equal captions fit equal images"),
    option("--compare", "evaluate", "input", nargs=2, metavar="JSON",
           help="only compare two files of --json"),
    option("--images", "infer", "input", nargs="+",
           help="files, folders or globs; default the samples in test/"),
    option("--queries", "infer", "input", nargs="+",
           help="sentences, or text files with one a line"),
    option("--det-json", "infer", "input",
           help="folder of detections that mirrors --images; default no graphs"),
    option("--skip-unreadable", "infer", "input", action="store_true",
           help="leave out images that cannot be read, and list them; default an error"),
    option("--against", "audit", "input", nargs=2, metavar=("A", "B"),
           help="two data roots: report what they share"),
    option("detections", "V_Graph", "input", help="a file of det_json/"),
    option("--image", "V_Graph", "input", required=True,
           help="the image that the detections belong to"),
    option("--seed", "scenes", "input", type=int, default=0, help="another seed: other scenes"),
    # ------------------------------------------------------------------ what a script writes
    option("--top-k", "infer", "output", least=0, type=int, default=0,
           help="list so many best images for each sentence"),
    option("--threshold", "infer", "output", least=-1, most=1, type=number,
           help="list and write to --csv only images with this cosine or more"),
    option("--csv", "infer", "output", type=output_path,
           help="write query, rank, image and score to this file, a row a pair"),
    option("--json", "infer", "output", type=output_path,
           help="write matrix, names and ranking to this file"),
    option("--json", "evaluate", "output", type=output_path,
           help="write figures, intervals, hashes and options to this file"),
    option("--json", "audit", "output", type=output_path,
           help="write all that is counted to this file"),
    option("--ranks", "evaluate", "output", type=output_path,
           help="write every query's rank and rival to this CSV file"),
    option("--html", "evaluate", "output", type=output_path,
           help="show the worst and best queries in this file"),
    option("--draw", "V_Graph", "output",
           help="write boxes, labels and edges over the image to this file"),
    option("--out", "clip_gcn", "output", type=output_path,
           help="write the features to this .npz file"),
    option("--out", "scenes", "output", default="data/scenes",
           help="folder to write the data set to"),
    option("--samples", "scenes", "output", action="store_true",
           help="write test/ and det_json/ as committed instead"),
    option("--out", "export", "output", required=True,
           help="a .pt or .safetensors file, or a folder"),
    option("--naming", "export", "output", choices=NAMINGS, default="open_clip",
           help="open_clip: a state dict; openai: an archive for OpenAI's package; huggingface: a "
                "new folder for transformers"),
    option("--debug", "train evaluate infer clip_gcn audit V_Graph scenes export", "output",
           free=True, action="store_true", help="show where in the code an error was raised"),
)
# fmt: on

FREE = {row.name for row in OPTIONS if "train" in row.scripts and row.free}
# What a checkpoint says of its data. Where nothing is given, evaluate.py takes it from there, all
# but evaluate.MACHINE.
DATA = tuple(row.name for row in OPTIONS if row.group == "data" and "evaluate" in row.scripts)


# ------------------------------------------------------------------ parsing


class Parser(argparse.ArgumentParser):
    """An argparse parser that reports a mistake in one line, and takes no shortened options."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message):
        end(f"{message}; see python {self.prog} --help")


def add_options(parser, script):
    """Add the options of a script to an argparse parser, in their groups."""
    rows = [row for row in OPTIONS if script in row.scripts]
    names = {row.name for row in rows}
    for title in GROUPS:
        in_group = [row for row in rows if row.group == title]
        if not in_group:
            continue
        group = parser.add_argument_group(title)
        for row in in_group:
            settings = {**row.settings, "help": row.settings["help"] + _conditions(row, names)}
            group.add_argument(row.flag, **settings)


def _conditions(row, names):
    """What a row goes with, for its help, as far as the script has those options too."""
    conditions = []
    for name, values in row.only.items():
        if name in names:
            conditions.append(_condition(name, values))
    return f" [only with {' and '.join(conditions)}]" if conditions else ""


def make_parser(script, doc):
    """The argparse parser of a script; doc: its docstring, whose first line is the description."""
    parser = Parser(description=doc.split("\n")[0])
    add_options(parser, script)
    return parser


def parse_options(script, doc, arguments=None, unset=()):
    """The options of a script, as an argparse namespace, from the command line or a list.

    unset: names of options that are None where they are not given. Raises ValueError for a number
    out of bounds.
    """
    parser = make_parser(script, doc)
    parser.set_defaults(**dict.fromkeys(unset))
    options = parser.parse_args(arguments)
    check_numbers(script, vars(options))
    return options


def given_options(script, doc, arguments=None):
    """Only those options of a script that stand on the command line, as a dict."""
    parser = make_parser(script, doc)
    parser.set_defaults(**dict.fromkeys(default_options(script)))  # None: not on the command line
    options = vars(parser.parse_args(arguments))
    return {name: value for name, value in options.items() if value is not None}


def default_options(script, groups=GROUPS):
    """The defaults of a script's options, as a dict; groups: of these headings alone."""
    found = {}
    for row in OPTIONS:
        if script in row.scripts and row.group in groups:
            switch = row.settings.get("action") == "store_true"
            found[row.name] = row.settings.get("default", False if switch else None)
    return found


# ------------------------------------------------------------------ the end of a script


def end(message, code=2):
    """End the process with a mistake of the user's, in one line on standard error."""
    lines = [escaped(line) for line in str(message).split("\n")]
    print("\n".join(["error: " + lines[0], *lines[1:]]), file=sys.stderr)
    raise SystemExit(code)


def answer_early(script, doc):
    """Answer --help and mistakes in the options before slow packages are imported.

    For the head of a script; it parses once more when it runs.
    """
    try:
        if script == "train" and "--resume" not in sys.argv:
            for_training(vars(parse_options(script, doc)), given_options(script, doc))
        else:
            parse_options(script, doc)
    except ValueError as error:
        end(error)


def run(main):
    """Run a script's main, and end the process with its exit code.

    A mistake of the user's (ValueError, OSError) or a failure that the user can mend ends in one
    line and with exit code 2; --debug shows the traceback.
    """
    if "--debug" in sys.argv:
        main()
        return
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        end("interrupted", code=130)
    except (ValueError, OSError, FloatingPointError) as error:
        end(error)
    except (MemoryError, RuntimeError) as error:
        # torch has an OutOfMemoryError of its own; torch is not imported here.
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            end(f"out of memory ({str(error).splitlines()[0]}); halve --batch-size")
        raise


# ------------------------------------------------------------------ what goes together


def check_numbers(script, options):
    """Raise ValueError for a number out of the bounds of its row."""
    for row in OPTIONS:
        if script not in row.scripts:
            continue
        value = options[row.name]
        for one in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(one, (int, float)) and not isinstance(one, bool):
                if one < row.least:
                    raise ValueError(f"{row.flag} {one}: expected {row.least} or more")
                if one > row.most:
                    raise ValueError(f"{row.flag} {one}: expected {row.most} or less")
                if one <= row.above:
                    raise ValueError(f"{row.flag} {one}: expected more than {row.above}")


def check_training(options, given):
    """Raise ValueError for options of train.py that contradict each other or would do nothing.

    given: those that stand on the command line.
    """
    for row in OPTIONS:
        if "train" in row.scripts and row.name in given:
            for name, values in row.only.items():
                if values is GIVEN:
                    does_something = options[name] is not None
                else:
                    does_something = options[name] in values
                if not does_something:
                    condition = _condition(name, values)
                    raise ValueError(f"{row.flag} does nothing without {condition}: leave it out")
    if options["clip"] and options["model"]:
        raise ValueError("--clip brings its own sizes: leave --model out")
    if options["train"] == "lora" and not options["clip"]:
        raise ValueError("--train lora adapts pretrained weights: name them by --clip")
    if options["train"] == "graph" and options["graph"] == "none":
        raise ValueError("--train graph with --graph none leaves nothing to train")
    if options["train"] == "graph" and options["augment"]:
        raise ValueError("--train graph takes images as they are: leave --augment out")
    if options["lora"][0] % 1 or options["lora"][0] < 1:
        raise ValueError(f"--lora: the rank is {options['lora'][0]}, expected a whole number")
    if options["batch_size"] == 1 and options["loss"] == "infonce":
        raise ValueError("--batch-size 1: InfoNCE has no negatives then; take 2 or more")
    if not any(options["image_encoder_ratio"]):
        raise ValueError("--image-encoder-ratio 0 0 leaves no feature: raise one of them")


def for_training(options, given):
    """The options of a new run, checked; defaults that depend on other options are filled in.

    given: those that stand on the command line.
    """
    check_numbers("train", options)
    check_training(options, given)
    options = dict(options)
    if options["augment"] is None:
        # Features of frozen towers are of whole images; the scenes' sentences say left and right.
        as_they_are = options["train"] == "graph" or "scenes" in options["dataset"]
        options["augment"] = [] if as_they_are else list(AUGMENTATIONS)
    if options["lr"] is None:
        options["lr"] = 2e-4 if options["train"] == "lora" else 1e-5
    return options


def for_resuming(saved, given):
    """The options of a run that goes on: the saved ones, those that are free as given now.

    given: only what stands on the command line. An option that is newer than the run has its
    default, one that is gone is left out. Raises ValueError with the list of differences where an
    option would alter the result.
    """
    saved = {name: saved.get(name, usual) for name, usual in default_options("train").items()}
    differences = []
    for name, value in given.items():
        if name not in FREE and _as_list(value) != _as_list(saved[name]):
            differences.append(f"  {_flag(name)}: {saved[name]} in the run, {value} now")
    if differences:
        raise ValueError(
            "--resume: these options alter the result; leave them out to go on, or start a new "
            "run in another --out:\n" + "\n".join(differences)
        )
    of_this_call = {"resume": False, "overwrite": False, "debug": False}
    free = {name: value for name, value in given.items() if name in FREE}
    return {**saved, **of_this_call, **free}


def _as_list(value):
    return list(value) if isinstance(value, tuple) else value
