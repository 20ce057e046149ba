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
import shlex
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

from escaping import escaped

# Choices. Where a module has a table of what each one does, a test holds its keys against these.
ACTIVATIONS = ("quickgelu", "gelu")
AUGMENTATIONS = ("crop", "flip", "turn", "erase", "colour")
ANGLE_VERSIONS = ("le90", "le135", "oc")
FORMATS_IN = (
    "dota", "yolo-obb", "yolo", "mmrotate", "coco", "voc", "vhr10", "label-studio", "geojson",
)  # fmt: skip
WITH_NAMES = ("yolo-obb", "yolo", "mmrotate", "coco")  # formats that may need names of classes
FORMATS_OUT = ("dota", "yolo-obb", "coco")
FORMS = ("auto", "txt", "karpathy", "pir")
GRAPHS = ("object", "none", "published", "exchanged", "no-edges", "counts")
LOSSES = ("infonce", "hinge", "hinge-max")
NAMINGS = ("open_clip", "openai", "huggingface")
PRECISIONS = ("fp32", "bf16", "fp16")
TRAINED = ("all", "image", "text", "graph", "lora")

LORA = (8, 16, 0.0)  # rank, alpha, dropout
MAX_OBJECTS = 20  # of an image that its graph holds; as published

GIVEN = object()  # in `only`: any value, as long as the other option is given
WITH_GRAPH = {"graph": tuple(graph for graph in GRAPHS if graph != "none")}
WITH_LABELS = {"graph": tuple(graph for graph in GRAPHS if graph != "published")}
WITH_OBJECTS = {"graph": tuple(graph for graph in GRAPHS if graph not in ("none", "published"))}

GROUPS = {  # of options in --help: their names here, and what a person wants to do with them
    "help": "options",  # argparse's own, where -h stands
    "input": "say what to read",
    "data": "choose data sets and captions",  # of evaluate.py: see DATA
    "model": "choose the model",
    "start": "start from pretrained weights, choose what learns",
    "training": "tune the training",
    "rows": "choose the rows",
    "run": "keep a run, go on with it",
    "device": "fit the machine",
    "output": "choose what is written",
}


class Option(NamedTuple):
    """A row of OPTIONS."""

    flag: str  # "--name", or "name" for an argument without a flag
    scripts: tuple  # which scripts have it
    group: str  # one of GROUPS
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


def _condition(name, values):
    """An entry of `only` as a user would type it: --loss hinge|hinge-max."""
    [flag, *_] = [row.flag for row in OPTIONS if row.name == name]
    return flag if values is GIVEN else f"{flag} {'|'.join(values)}"


def number(text):
    """An argparse type: a number that is neither infinite nor "nan"."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text}: expected a finite number")
    return value


def gate_or_number(text):
    """An argparse type: the word "gate", or a `number`."""
    if text == "gate":
        return text
    try:
        return number(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: expected gate or a number") from None


def evidence_choice(text):
    """An argparse type: auto, off, or a weight of 0 or more."""
    if text in ("auto", "off"):
        return text
    try:
        weight = number(text)
    except (ValueError, argparse.ArgumentTypeError):
        weight = -1
    if weight < 0:
        raise argparse.ArgumentTypeError(f"{text}: expected auto, off or a weight of 0 or more")
    return weight


def output_path(path):
    """An argparse type: a file to be written. Its folder is made before any work is done."""
    if Path(path).is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder; name a file in it")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return path


def output_folder(path):
    """An argparse type: a folder to be written to, which may be there."""
    if Path(path).is_file():
        raise argparse.ArgumentTypeError(f"{path} is a file; name a folder")
    return path


def quoted_words(text):
    """An argparse type: words as on a command line, in one text: a list of them."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from None


READERS = "train evaluate evidence audit"  # of whole data sets

# fmt: off
OPTIONS = (
    # ------------------------------------------------------------------ what a script reads
    option("--checkpoint", "evaluate", "input", nargs="+", metavar="FILE",
           help="models to measure, from train.py, the published FG-CROSS, or any that clip.load "
                "takes; default the latest run's best_model.pth"),
    option("--checkpoint", "infer clip_gcn", "input", metavar="FILE",
           help="the model: from train.py, the published FG-CROSS, or what clip.load takes; "
                "default the latest run's best_model.pth"),
    option("--checkpoint", "export evidence", "input", required=True, metavar="FILE",
           help="the model: from train.py, or what clip.load takes"),
    option("--activation", "evaluate infer clip_gcn export evidence", "input", choices=ACTIVATIONS,
           help="of CLIP weights that do not tell it; give it when the error asks for it"),
    option("--split", "evaluate", "input", default="test",
           help="val to choose between models, test to report; or train, dev"),
    option("--evidence", "evaluate infer", "input", default="auto", type=evidence_choice,
           metavar="WEIGHT",
           help="auto, off, or its weight beside the cosine; auto: as chosen on validation"),
    option("--caption-equivalence", "evaluate", "input", action="store_true",
           help="equal captions fit equal images: for data sets whose sentences repeat"),
    option("--fine", "evaluate", "input", action="store_true",
           help="measure too whether counts, kinds and relations are read: metrics/README.md"),
    option("--compare", "evaluate", "input", nargs=2, metavar="JSON",
           help="only compare two files of --json"),
    option("--images", "infer", "input", nargs="+", metavar="PATH",
           help="files, folders or globs; default the samples in test/"),
    option("--queries", "infer", "input", nargs="+", metavar="TEXT",
           help="sentences, or text files with one a line; default those of the samples"),
    option("--det-json", "infer", "input", metavar="DIR",
           help="folder of detections that mirrors --images; default none; for the samples, "
                "det_json/"),
    option("--skip-unreadable", "infer detections-detect", "input", action="store_true",
           help="leave out images that cannot be read, and list them; default an error"),
    option("--against", "audit", "input", nargs=2, metavar=("A", "B"),
           help="two data roots: report what they share"),
    option("detections", "V_Graph", "input", help="a file of det_json/"),
    option("--image", "V_Graph", "input", required=True, metavar="FILE",
           help="the image that the detections belong to"),
    option("sentence", "T_Graph", "input", help="a sentence, in quotes"),
    option("--north-up", "T_Graph", "input", action="store_true",
           help='"north of" means above, and so on: the images have north at their top'),
    option("--seed", "scenes", "input", type=int, default=0, help="another one: other scenes"),
    # ------------------------------------------------------------------ data
    option("--dataset", "train evidence", "data", nargs="+", default=["scenes"], metavar="NAME",
           help="scenes, ucm, rsicd, rsitmd or names of your own; several train together"),
    option("--dataset", "evaluate", "data", nargs="+", default=["scenes"], metavar="NAME",
           help="scenes, ucm, rsicd, rsitmd or names of your own; each is measured by itself"),
    option("--dataset", "audit", "data", nargs="+", default=["scenes"], metavar="NAME",
           help="scenes, ucm, rsicd, rsitmd or a name of your own, one alone"),
    option("--data-root", READERS, "data", free=True, nargs="+", metavar="DIR",
           help="a folder for each data set; only scenes has a default, data/scenes"),
    option("--det-json", READERS, "data", free=True, nargs="+", metavar="DIR",
           help="a folder of detections for each; default <data root>/det_json"),
    option("--annotations", READERS, "data", free=True, nargs="+", choices=FORMS,
           metavar="FORM",
           help="form of the captions of each: auto finds it; where a folder holds several, "
                f"{', '.join(FORMS[1:])}"),
    option("--dataset", "ablate", "data", default="scenes", metavar="NAME",
           help="scenes, ucm, rsicd or a name of your own; the first three have recipes"),
    option("--data-root", "ablate", "data", metavar="DIR",
           help="its folder; only scenes has a default, data/scenes"),
    option("--det-json", "ablate", "data", metavar="DIR",
           help="folder of detections; default <data root>/det_json"),
    option("--annotations", "ablate", "data", choices=FORMS, metavar="FORM",
           help="form of the captions; default auto"),
    option("--rows", "ablate", "rows", nargs="+", metavar="ROW",
           help="rows of the table; default all of them"),
    option("--seeds", "ablate", "rows", nargs="+", type=int, default=[0], metavar="SEED",
           help="each row is trained with each; three or more show the noise"),
    option("--extra", "ablate", "rows", default=[], type=quoted_words, metavar="OPTIONS",
           help='further options of train.py for all rows: --extra="--epochs 1"; default none'),
    option("--figure", "ablate", "output", type=output_path, metavar="FILE",
           help="draw the gains with their intervals to this SVG file"),
    option("--out", "ablate", "run", required=True, type=output_folder, metavar="DIR",
           help="folder for the runs' files; what is there is not run again"),
    option("--caption-form", "train evaluate evidence", "data", nargs="+", metavar="FORM",
           help="pir: cleaned as PIR and HarMA do, to compare with them; a text with {} goes "
                'around every caption, as "a satellite photo of {}"; or both; {} alone: as they '
                "are"),
    option("--dev-images", "train evaluate evidence", "data", least=0, type=int, default=0,
           help="draw so many images from train as split dev, to choose the model on them and "
                "keep val unseen"),
    # ------------------------------------------------------------------ model
    option("--model", "train", "model",
           help="sizes, a file in models/, for training from scratch; default small"),
    option("--image-size", "train", "model", least=1, type=int,
           help="pixels a side: more for small objects, at a cost; default the model's own"),
    option("--graph", "train", "model", choices=GRAPHS, default="none",
           help="a branch beside CLIP's: object, the GCN; counts, a bag of counts; published, the "
                "published pass; exchanged, no-edges: controls, with another image's graph or "
                "without edges; none was found to gain beside object evidence"),
    option("--fusion", "train", "model", above=0, most=1, only=WITH_GRAPH, type=gate_or_number,
           default=0.5, metavar="gate|SHARE",
           help="the graph's share of the sum, up to 1; gate: learned, per image"),
    option("--labels", "train evidence audit V_Graph T_Graph", "model", only=WITH_LABELS,
           metavar="FILE",
           help="labels of the detections, for a detector of your own, a label and its aliases a "
                "line; default det_json/labels.txt"),
    option("--max-objects", "train audit V_Graph", "model", least=1, only=WITH_OBJECTS, type=int,
           default=MAX_OBJECTS, help="objects that a graph holds; raise for crowded images"),
    # ------------------------------------------------------------------ pretrained weights
    option("--clip", "train", "start",
           help="a name or file for clip.load: best on small data sets; default from scratch"),
    option("--train", "train", "start", choices=TRAINED, default="all",
           help="what learns besides new layers, which always do; graph and lora take less memory; "
                "graph needs --graph object or counts, lora needs --clip"),
    option("--lr", "train", "start", above=0, only={"clip": GIVEN}, type=number,
           help="rate of pretrained layers and adapters; lower it where they unlearn; default "
                "1e-5, of --train lora 2e-4"),
    option("--lora", "train", "start", least=0, only={"train": ("lora",)},
           type=number, nargs=3, default=LORA, metavar=("RANK", "ALPHA", "DROPOUT"),
           help="adapters: a higher rank learns more"),
    option("--activation", "train", "start", only={"clip": GIVEN}, choices=ACTIVATIONS,
           help="of CLIP weights that do not tell it; give it when the error asks for it"),
    # ------------------------------------------------------------------ training
    option("--epochs", "train", "training", least=1, type=int, default=20,
           help="raise while validation still improves"),
    option("--lr-new", "train", "training", above=0, type=number, default=2e-3,
           help="rate of new layers, which --graph brings, and without --clip of all; lower it "
                "where the loss jumps"),
    option("--weight-decay", "train", "training", least=0, type=number, default=0.1,
           help="of matrices; raise where training fits and validation does not"),
    option("--loss", "train", "training", choices=LOSSES, default="infonce",
           help="hinge: as published; hinge-max: hardest negative only (VSE++'s max violation)"),
    option("--augment", "train", "training", nargs="*", choices=AUGMENTATIONS, metavar="KIND",
           help=f"of {', '.join(AUGMENTATIONS)}, those that keep sentences true; default all, with "
                "scenes none, since sentences say left of"),
    option("--drop-graphs", "train", "training", least=0, most=1, only=WITH_GRAPH, type=number,
           default=0.1,
           help="share of images shown without graph; raise where many will have no detections"),
    option("--seed", "train", "training", least=0, type=int, default=0,
           help="of all that is random; take several to see the noise"),
    # ------------------------------------------------------------------ the run
    option("--out", "train", "run", free=True, type=output_folder, metavar="DIR",
           help="folder for checkpoints and log; default a new one, runs/<data set>-1, -2 ...; "
                "with --resume the latest run's"),
    option("--resume", "train", "run", free=True, action="store_true",
           help="go on from last.pth in --out, bit for bit"),
    option("--overwrite", "train", "run", free=True, action="store_true", only={"out": GIVEN},
           help="begin anew in a folder that holds a model, which stays until there is a new one"),
    # ------------------------------------------------------------------ device
    option("--device",
           "train evaluate infer clip_gcn evidence detections-detect search-index search-query "
           "search-serve search-classify bench",
           "device", free=True, choices=("auto", "cpu", "cuda"), default="auto",
           help="auto: cuda if any"),
    option("--batch-size", "train", "device", least=1, type=int, default=128,
           help="of all processes together; InfoNCE's negatives come from the batch; halve on "
                "out-of-memory, or see --chunk"),
    option("--chunk", "train", "device", least=1, type=int,
           help="for batches beyond memory: encode chunks of so many pairs, twice, with the "
                "gradients of the whole batch; default the batch at once"),
    option("--batch-size", "evaluate infer clip_gcn evidence", "device", least=1, type=int,
           default=64,
           help="halve on out-of-memory"),
    option("--precision", "train", "device", choices=PRECISIONS,
           help="fp32 where a loss is not finite; default fp32, on CUDA half"),
    option("--recompute", "train", "device", free=True, action="store_true",
           only={"train": tuple(name for name in TRAINED if name != "graph")},
           help="compute the transformers' inner values again in the backward pass: less memory, "
                "a fifth to a third more time"),
    option("--workers", "train evaluate evidence", "device", least=0, free=True, type=int,
           default=0,
           help="loader processes; raise where a GPU waits for data"),
    # ------------------------------------------------------------------ what a script writes
    option("--top-k", "infer", "output", least=0, type=int, default=0,
           help="list so many best images for each sentence; default 10 where there are more "
                "than 20 images, with --threshold all that reach it"),
    option("--threshold", "infer", "output", type=number,
           help="list and write to --csv only images with this score or more; default all"),
    option("--explain", "infer", "output", metavar="DIR",
           help="say why an image was found, and draw its objects to this folder"),
    option("--save-features", "infer", "output", type=output_path, metavar="FILE",
           help="write the images' names and features to this .npz file"),
    option("--csv", "infer", "output", type=output_path, metavar="FILE",
           help="write query, rank, image and score to this file, a row a pair"),
    option("--json", "infer", "output", type=output_path, metavar="FILE",
           help="write matrix, names and ranking to this file"),
    option("--json", "evaluate", "output", type=output_path, metavar="FILE",
           help="write figures, intervals, hashes and options to this file"),
    option("--out", "evidence", "output", required=True, type=output_path, metavar="FILE",
           help="the new checkpoint"),
    option("--json", "evidence", "output", type=output_path, metavar="FILE",
           help="write the tables to this file, to be read"),
    option("--json", "audit", "output", type=output_path, metavar="FILE",
           help="write all that is counted to this file"),
    option("--ranks", "evaluate", "output", type=output_path, metavar="FILE",
           help="write every query's rank and rival to this CSV file"),
    option("--html", "evaluate", "output", type=output_path, metavar="FILE",
           help="show the worst and best queries in this file"),
    option("--draw", "V_Graph", "output", metavar="FILE",
           help="write boxes, labels and edges over the image to this file"),
    option("--draw", "T_Graph", "output", metavar="FILE", help="draw the graph to this file"),
    option("--out", "clip_gcn", "output", type=output_path, metavar="FILE",
           help="write the features to this .npz file"),
    option("--out", "scenes", "output", metavar="DIR",
           help="folder to write the data set to; default data/scenes, of twins data/twins"),
    option("--twins", "scenes", "output", action="store_true",
           help="write pairs of scenes that only relations and places tell apart"),
    option("--samples", "scenes", "output", action="store_true",
           help="write the samples in test/ and det_json/ instead, as they are committed"),
    option("--out", "export", "output", required=True, metavar="PATH",
           help="a .pt or .safetensors file, or a folder"),
    option("--naming", "export", "output", choices=NAMINGS, default="open_clip",
           help="open_clip: a state dict; openai: an archive for OpenAI's package; huggingface: a "
                "new folder for transformers"),
    # ------------------------------------------------------------------ detections.py
    option("format", "detections-convert", "input", choices=FORMATS_IN, metavar="FORMAT",
           help=f"one of {', '.join(FORMATS_IN)}"),
    option("input", "detections-convert", "input", metavar="INPUT",
           help="its file, or the folder of its files"),
    option("format", "detections-export", "input", choices=FORMATS_OUT, metavar="FORMAT",
           help=f"one of {', '.join(FORMATS_OUT)}"),
    option("det_json", "detections-export detections-check detections-draw", "input",
           metavar="DET_JSON", help="folder of detections in our format"),
    option("--images",
           "detections-convert detections-export detections-check detections-draw "
           "detections-detect",
           "input", required=True, metavar="DIR",
           help="folder of the images: boxes are in their pixels"),
    option("--names", "detections-convert", "input", only={"format": WITH_NAMES}, metavar="FILE",
           help="names of the classes, one a line, by number; of COCO results an id before each"),
    option("--angle-version", "detections-convert", "input", choices=ANGLE_VERSIONS, default="le90",
           only={"format": ("mmrotate",)}, help="of the detector's config"),
    option("--labels", "detections-convert detections-detect", "input", metavar="FILE",
           help="label map, whose names are written; default det_json/labels.txt"),
    option("--model", "detections-detect", "input", required=True, metavar="FILE",
           help="the detector: an ONNX file that ultralytics exported, task obb or detect"),
    option("--window", "detections-detect", "input", least=1, type=int,
           help="side in pixels of the windows that large images are seen through; default the "
                "model's image size"),
    option("--overlap", "detections-detect", "input", least=0, type=int,
           help="pixels that windows share: more than an object is long, or it may be found in "
                "pieces; default a fifth of the window"),
    option("--scales", "detections-detect", "input", above=0, most=8, type=number, nargs="+",
           default=[1.0],
           help="see windows so many times as large, and merge: 1 2 3 for small cars, 0.5 1 for "
                "long piers; default 1"),
    option("--least-score", "detections-detect", "input", least=0, most=1, type=number,
           default=0.25, help="leave out objects below; lower where many are missed"),
    option("--nms", "detections-detect", "input", least=0, most=1, type=number, metavar="IOU",
           default=0.55, help="of boxes of one label that overlap more, keep the best"),
    option("--batch-size", "detections-detect", "device", least=1, type=int, default=8,
           help="windows at once, if the model takes several; halve on out-of-memory"),
    option("--unlisted", "detections-convert", "input", choices=("empty", "missing"),
           help="what images are that no file tells of: empty, nothing was found; missing, not "
                "looked at; default by format"),
    option("--skip-bad", "detections-convert", "input", action="store_true",
           help="leave out entries that cannot be read, and list them; default an error"),
    option("--least-score", "detections-convert", "input", least=0, most=1, type=number,
           default=0.0, help="leave out objects below; raise where many are wrong"),
    option("--least-side", "detections-convert", "input", least=0, type=number, default=0.0,
           help="leave out objects whose shorter side has fewer pixels"),
    option("--nms", "detections-convert", "input", least=0, most=1, type=number, metavar="IOU",
           help="of boxes of one label that overlap more, keep the best; default all are kept"),
    option("--out", "detections-convert detections-detect", "output", required=True, metavar="DIR",
           help="folder for the files of detections"),
    option("--out", "detections-export", "output", required=True, metavar="DIR",
           help="folder for the other program's files"),
    option("--out", "detections-draw", "output", required=True, metavar="FILE",
           help="the picture, a .png file"),
    option("--scores", "detections-export", "output", action="store_true",
           only={"format": ("dota", "yolo-obb")},
           help="write scores too, which annotation tools do not take; COCO has them always"),
    option("--count", "detections-draw", "output", least=1, type=int, default=12,
           help="how many images it shows"),
    option("--overwrite", "detections-convert detections-export", "output", action="store_true",
           help="replace files in --out that have other content; default an error"),
    option("--json", "detections-convert", "output", type=output_path, metavar="FILE",
           help="write what was counted to this file, and each entry left out"),
    option("--again", "detections-detect", "output", action="store_true",
           help="look anew at images that have a file in --out; default they are skipped"),
    option("--json", "detections-detect", "output", type=output_path, metavar="FILE",
           help="write what was counted to this file, and what could not be read"),
    option("--json", "detections-check", "output", type=output_path, metavar="FILE",
           help="write all that is counted to this file"),
    # ------------------------------------------------------------------ search.py
    option("images", "search-index", "input", metavar="IMAGES",
           help="folder of images or scenes, with the folders below it"),
    option("gallery", "search-query search-serve search-export search-duplicates search-classify",
           "input", metavar="INDEX", help="the folder that search.py index made"),
    option("text", "search-query", "input", nargs="?", metavar="SENTENCE",
           help="what to look for, in quotes"),
    option("labels", "search-classify", "input", metavar="LABELS",
           help="text file with a class a line"),
    option("--queries", "search-query", "input", metavar="FILE",
           help="text file with a sentence a line, in the place of one sentence"),
    option("--image", "search-query", "input", metavar="FILE",
           help="look for tiles like this image, alone or beside the sentence"),
    option("--image-detections", "search-query", "input", only={"image": GIVEN}, metavar="FILE",
           help="the detections of --image; default none"),
    option("--vector", "search-query", "input", metavar="FILE",
           help="look for tiles near this embedding, a .npy file"),
    option("--weights", "search-query", "input", least=0, nargs="+", type=number,
           help="of sentence, image and vector, as far as given, in this order; default equal"),
    option("--not", "search-query", "input", metavar="SENTENCE",
           help="what shall not be there: half of its score is taken off"),
    option("--where", "search-query", "input", metavar="CONDITION",
           help='only tiles that fulfil it: "storage_tank >= 2 and ship = 0"; gallery/README.md'),
    option("--near", "search-query", "input", type=number, nargs=2, metavar=("LAT", "LON"),
           help="only tiles whose centre is around this place, in degrees"),
    option("--within", "search-query", "input", above=0, only={"near": GIVEN}, type=number,
           default=10.0, metavar="KM", help="so many kilometres around --near"),
    option("--bbox", "search-query", "input", type=number, nargs=4,
           metavar=("WEST", "SOUTH", "EAST", "NORTH"),
           help="only tiles whose centre lies in it, in degrees"),
    option("--top-k", "search-query", "input", least=1, type=int, default=10,
           help="how many tiles a query gets"),
    option("--ann", "search-query", "input", action="store_true",
           help="search approximately, by an index of vectors that is made once: for millions"),
    option("--threshold", "search-duplicates", "input", above=0, most=1, type=number,
           default=0.97, help="least cosine of two tiles that count as the same"),
    option("--against", "search-duplicates", "input", metavar="INDEX",
           help="another index: which of its tiles stand in this one too"),
    option("--prompt", "search-classify", "input", nargs="+", default=["a satellite photo of {}"],
           metavar="TEXT", help="sentences around a class; the mean of several is taken"),
    option("--evidence", "search-query search-serve", "input", default="auto",
           type=evidence_choice, metavar="WEIGHT",
           help="auto, off, or its weight beside the cosine; auto: as chosen on validation"),
    option("--checkpoint", "search-index", "input", metavar="FILE",
           help="the model: from train.py, or what clip.load takes; default the latest run's "
                "best_model.pth"),
    option("--checkpoint", "search-query search-serve search-classify", "input", metavar="FILE",
           help="where the model that made the index lies now; default where it was"),
    option("--activation", "search-index search-query search-serve search-classify", "input",
           choices=ACTIVATIONS,
           help="of CLIP weights that do not tell it; give it when the error asks for it"),
    option("--images", "search-query search-serve", "input", metavar="DIR",
           help="where the indexed images lie now; default where they were"),
    option("--det-json", "search-index", "input", metavar="DIR",
           help="folder of detections that mirrors the images; default none"),
    option("--tile", "search-index", "input", least=16, type=int, metavar="PIXELS",
           help="cut images into windows of this side; default each image is one tile"),
    option("--overlap", "search-index", "input", least=0, only={"tile": GIVEN}, type=int,
           metavar="PIXELS",
           help="that neighbouring windows share; default a quarter of the side"),
    option("--bands", "search-index", "input", least=1, type=int, nargs=3,
           metavar=("RED", "GREEN", "BLUE"), help="bands of multi-band scenes, from 1"),
    option("--stretch", "search-index", "input", least=0, most=100, type=number, nargs=2,
           metavar=("LOW", "HIGH"),
           help="percentiles of a scene that become black and white: 2 98 for 16 bits"),
    option("--workers", "search-index", "device", least=1, type=int, default=2,
           help="threads that read images; raise where the model waits for them; not with --ray"),
    option("--ray", "search-index", "device", nargs="?", const="local", metavar="ADDRESS",
           help="encode on a Ray cluster, auto where this machine is one of it; without ADDRESS on "
                "all cores of this machine"),
    option("--precision", "search-index", "device", choices=("fp32", "bf16"),
           help="of the image tower; default bf16 where the machine computes in it natively"),
    option("--batch-size", "search-index", "device", least=1, type=int, default=64,
           help="tiles at once; halve on out-of-memory"),
    option("--keep-versions", "search-index", "output", least=1, type=int, default=3,
           help="of the index on the disk; a commit is a version, older ones are removed"),
    option("--port", "search-serve", "output", least=1, most=65535, type=int, default=7860,
           help="of this machine; nobody else reaches it"),
    option("--out", "search-index", "output", required=True, metavar="INDEX",
           help="folder of the index, made anew or brought up to date"),
    option("--html", "search-query", "output", type=output_path, metavar="FILE",
           help="write a page with the tiles, their objects and a map"),
    option("--geojson", "search-query", "output", type=output_path, metavar="FILE",
           help="write where the tiles lie, in WGS84"),
    option("--csv", "search-query search-duplicates search-classify", "output", type=output_path,
           metavar="FILE", help="write a row for each tile that is listed"),
    option("--json", "search-index search-query search-duplicates search-classify", "output",
           type=output_path, metavar="FILE", help="write all that is found, and the options"),
    option("--geoparquet", "search-export", "output", required=True, type=output_path,
           metavar="FILE", help="write embeddings and footprints to this file"),
    # ------------------------------------------------------------------ bench.py
    option("--row", "bench", "rows", nargs="+", metavar="ROW",
           help="rows of the table; default all of them"),
    option("--small", "bench", "rows", action="store_true",
           help="each row at a tiny size: are its sides still equal? the times mean nothing"),
    option("--json", "bench", "output", type=output_path, metavar="FILE",
           help="write all figures and the machine to this file"),
    option("images", "recall", "input", type=int, least=10, metavar="IMAGES",
           help="how many; ten at least, for R@10"),
    option("texts", "recall", "input", type=int, least=10, metavar="TEXTS",
           help="how many captions; one for each image at least"),
    option("--debug",
           "train evaluate infer clip_gcn evidence ablate audit V_Graph T_Graph scenes export "
           "detections-convert detections-export detections-check detections-draw "
           "detections-detect search-index search-query search-serve search-export "
           "search-duplicates search-classify bench recall",
           "help", free=True, action="store_true",
           help="show where in the code an error was raised"),
)
# fmt: on

FREE = {row.name for row in OPTIONS if "train" in row.scripts and row.free}
# What a checkpoint says of its data: where nothing is given, evaluate.py takes it from there.
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
    for name, title in GROUPS.items():
        in_group = [row for row in rows if row.group == name]
        if not in_group:
            continue
        of_checkpoint = script == "evaluate" and name == "data"
        if name == "help":
            group = parser
        else:
            group = parser.add_argument_group(
                f"{title} (default: the checkpoint's)" if of_checkpoint else title
            )
        for row in in_group:
            default = "" if of_checkpoint else _default(row)
            text = row.settings["help"] + default + _conditions(row, names)
            settings = {**row.settings, "help": text}
            if row.settings.get("type") in (int, number):
                settings.setdefault("metavar", "N")
            group.add_argument(row.flag, **settings)


def _default(row):
    """A row's default, for its help, unless the help states it."""
    default = row.settings.get("default")
    if default is None or "default" in row.settings["help"]:
        return ""
    words = default if isinstance(default, (list, tuple)) else [default]
    return f" (default {' '.join(str(word) for word in words)})"


def _conditions(row, names):
    """What a row goes with, for its help, as far as the script has those options too."""
    conditions = []
    for name, values in row.only.items():
        if name in names:
            conditions.append(_condition(name, values))
    return f" [only with {' and '.join(conditions)}]" if conditions else ""


def _is_needed(row):
    """Whether a script does not run without it."""
    return row.settings.get("required", not row.flag.startswith("--"))


def _as_typed(row):
    """An option that is needed, as in the usage."""
    metavar = row.settings.get("metavar")
    return row.flag if metavar is None else f"{row.flag} {metavar}"


def make_parser(script, doc):
    """The argparse parser of a script; doc: its docstring, whose first line is the description."""
    needed = [_as_typed(row) for row in OPTIONS if script in row.scripts and _is_needed(row)]
    usage = " ".join(["%(prog)s", *needed, "[options]"])  # argparse would list them all
    parser = Parser(description=doc.split("\n")[0], usage=usage)
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


def parse_command(script, doc, commands, arguments=None):
    """The options of a script with commands, `command` among them.

    commands: {name: what it is for}; the rows of OPTIONS name them as SCRIPT-NAME. Raises
    ValueError for a number out of bounds and for an option that would do nothing.
    """
    options = _command_parser(script, doc, commands).parse_args(arguments)
    unset = _command_parser(script, doc, commands, unset=True).parse_args(arguments)
    given = {name for name, value in vars(unset).items() if value is not None}
    row_name = f"{script}-{options.command}"
    check_numbers(row_name, vars(options))
    check_conditions(row_name, vars(options), given)
    return options


def _command_parser(script, doc, commands, unset=False):
    """The parser of all commands; unset: an option that is not given is None."""
    parser = Parser(description=doc.split("\n")[0])
    parsers = parser.add_subparsers(dest="command", required=True)
    for name, purpose in commands.items():
        command = parsers.add_parser(name, help=purpose)
        add_options(command, f"{script}-{name}")
        if unset:
            command.set_defaults(**dict.fromkeys(default_options(f"{script}-{name}")))
    return parser


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


def _show_in_a_line(message, *_):
    """Print a warning without the place in the code, which --debug shows."""
    print(f"warning: {message}", file=sys.stderr)


def answer_early(script, doc):
    """Answer --help and mistakes in the options before slow packages are imported.

    For the head of a script; it parses once more when it runs. Of several processes that torchrun
    starts with the same options, the first one answers.
    """
    if os.environ.get("RANK", "0") != "0":
        if {"-h", "--help"} & set(sys.argv):
            raise SystemExit(0)
        return
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
    warnings.showwarning = _show_in_a_line
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
            reason = str(error).partition("\n")[0] or "no more is told"
            end(f"out of memory ({reason}); halve --batch-size")
        raise


# ------------------------------------------------------------------ options of older files

# What older versions let one choose: options that changed no result, and values that are fixed now.
CHANGED_NOTHING = ("plot", "tensorboard", "cache_gb", "cache_dir", "save_every")
FIXED = {"margin": 0.2, "drop_test_captions": False}


def converted(saved):
    """Saved options of train.py, a dict, as this version names them: what they mean stays.

    What changed no result is left out, and so is what had the value that is fixed now. Another
    value stays: it tells two methods apart. Raises ValueError for a value that has no meaning, or
    none any more.
    """
    options = {name: value for name, value in saved.items() if name not in CHANGED_NOTHING}
    for name, value in FIXED.items():
        if isinstance(options.get(name), (bool, float)) and options[name] == value:
            del options[name]
    if "patience" in options and _never_lost(options):
        del options["patience"]
    if "graph_control" in options:
        options["graph"] = _graph(options.get("graph"), options.pop("graph_control"))
    if "clean" in options or "template" in options:
        options["caption_form"] = _caption_form(
            options.pop("clean", "none"), options.pop("template", None)
        )
    ratio = options.pop("image_encoder_ratio", None)
    if options.get("fusion") == "sum":
        options["fusion"] = _share(ratio)
    return options


def _never_lost(options):
    """Whether a run had at least as many epochs of patience as epochs."""
    patience, epochs = options["patience"], options.get("epochs")
    return isinstance(patience, int) and isinstance(epochs, int) and patience >= epochs


def _graph(graph, control):
    """The --graph of today, of an older --graph and --graph-control."""
    is_control = control in ("exchanged", "no-edges")
    if control == "own" or (is_control and graph == "none"):  # without graphs there was none
        return graph
    if is_control and graph == "object":
        return control
    raise ValueError(
        "field 'options: graph_control': expected own, or exchanged or no-edges with graph object; "
        "train it again with --graph exchanged or --graph no-edges"
    )


def _caption_form(clean, template):
    """The --caption-form of today, of an older --clean and --template."""
    if clean not in ("none", "pir") or not (template is None or isinstance(template, str)):
        raise ValueError(
            "field 'options: clean' or 'options: template': expected none or pir, and a text"
        )
    form = ["pir"] if clean == "pir" else []
    if template is not None:
        form.append(template)
    return form or None


def _share(ratio):
    """The graph's share of the sum, of two weights; equal ones give exactly 0.5."""
    is_pair = isinstance(ratio, (list, tuple)) and len(ratio) == 2
    if not is_pair or not all(isinstance(one, (int, float)) and 0 <= one < 1e300 for one in ratio):
        raise ValueError("field 'options: image_encoder_ratio': expected two weights of 0 or more")
    if not any(ratio):
        raise ValueError("field 'options: image_encoder_ratio': both weights are 0")
    return ratio[1] / (ratio[0] + ratio[1])


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


def check_conditions(script, options, given):
    """Raise ValueError for an option that would do nothing beside the others, as `only` tells.

    given: those that stand on the command line.
    """
    for row in OPTIONS:
        if script in row.scripts and row.name in given:
            for name, values in row.only.items():
                if values is GIVEN:
                    does_something = options[name] is not None
                else:
                    does_something = options[name] in values
                if not does_something:
                    condition = _condition(name, values)
                    raise ValueError(f"{row.flag} does nothing without {condition}: leave it out")


def check_training(options, given):
    """Raise ValueError for options of train.py that contradict each other or would do nothing.

    given: those that stand on the command line.
    """
    check_conditions("train", options, given)
    if options["clip"] and options["model"]:
        raise ValueError("--clip brings its own sizes: leave --model out")
    if options["train"] == "lora" and not options["clip"]:
        raise ValueError("--train lora adapts pretrained weights: name them by --clip")
    if options["train"] == "graph" and options["graph"] == "none":
        raise ValueError(
            "--train graph with --graph none leaves nothing to train: take --graph object or counts"
        )
    if "lr_new" in given and options["clip"] and options["graph"] == "none":
        raise ValueError("--lr-new does nothing with --clip and --graph none: set --lr")
    if options["train"] == "graph" and options["augment"]:
        raise ValueError("--train graph takes images as they are: leave --augment out")
    if options["lora"][0] % 1 or options["lora"][0] < 1:
        raise ValueError(f"--lora: the rank is {options['lora'][0]}, expected a whole number")
    if options["batch_size"] == 1 and options["loss"] == "infonce":
        raise ValueError("--batch-size 1: InfoNCE has no negatives then; take 2 or more")
    if options["chunk"] is not None and options["chunk"] >= options["batch_size"]:
        raise ValueError(
            f"--chunk {options['chunk']} does nothing with --batch-size {options['batch_size']}: "
            "take less, or leave it out"
        )
    if options["fusion"] == "gate" and options["graph"] == "published":
        raise ValueError("--fusion gate: the published graph branch has none; give a number")


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

    saved: `converted`; given: only what stands on the command line. An option that is newer than
    the run has its default, one that is gone is left out. Raises ValueError with the list of
    differences where an option would alter the result, and for a margin of the hinge that is no
    option any more.
    """
    if saved.get("loss") != "infonce" and "margin" in saved:
        raise ValueError(
            f"--resume: the run was begun with --margin {saved['margin']}, which is "
            f"{FIXED['margin']} for all now; start a new run in another --out"
        )
    saved = {name: saved.get(name, usual) for name, usual in default_options("train").items()}
    differences = []
    for name, value in given.items():
        if name not in FREE and _as_list(value) != _as_list(saved[name]):
            flag = "--" + name.replace("_", "-")
            differences.append(f"  {flag}: {saved[name]} in the run, {value} now")
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
