"""Forty one-line faults that the tests must catch, and the script that puts them in, one at a time.

    python test/faults.py               # all, in minutes; exits with 1 if one gets through
    python test/faults.py --only 3 17   # some of them, by their numbers

Run the tests first: they must pass on the code as it is. Then each fault goes into a copy of the
tracked files, as they are in the working tree. There pytest runs the files that should catch it,
and stops at the first failure. A fault is caught where a test fails. Where pytest cannot even
collect the tests, or runs for too long, it is not: such a fault shows nothing about the tests.

If code is rewritten, carry its faults over by their names, which say what is wrong.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

TIMEOUT = 600  # seconds for the tests of one fault
TESTS_FAILED = 1  # pytest's exit status; others mean that it could not run them


class Fault(NamedTuple):
    """One wrong line."""

    name: str  # what is wrong, in words that hold for any way to write the code
    file: str  # relative to the root of the project
    old: str  # text that stands exactly once in the file
    new: str  # text that takes its place
    tests: tuple  # the test files that should catch it


# ------------------------------------------------------------------ graphs

GRAPHS = (
    Fault(
        name="graph: a distance is a fraction of the image's longer side, not of its diagonal",
        file="V_Graph.py",
        old="(-EDGE_DECAY * math.hypot(*size))",
        new="(-EDGE_DECAY * max(size))",
        tests=("test/test_graph.py",),
    ),
    Fault(
        name="graph: of too many objects those of the lowest scores are kept, not of the highest",
        file="V_Graph.py",
        old="-w * h, -score))",
        new="-w * h, score))",
        tests=("test/test_graph.py",),
    ),
    Fault(
        name="graph: a node's y is divided by the image's width instead of its height",
        file="V_Graph.py",
        old="2 * cy / height - 1",
        new="2 * cy / width - 1",
        tests=("test/test_graph.py",),
    ),
    Fault(
        name="graph: the angle under the sine is not doubled",
        file="V_Graph.py",
        old="np.sin(2 * angle)",
        new="np.sin(angle)",
        tests=("test/test_graph.py",),
    ),
    Fault(
        name="detections: a score above 1 is accepted",
        file="det_formats/det_json.py",
        old="if not 0 <= score <= 1:",
        new="if not 0 <= score:",
        tests=("test/test_det_json.py",),
    ),
)

# ------------------------------------------------------------------ towers, model, loss

MODEL = (
    Fault(
        name="towers: the causal mask begins one later, so that each token sees the next one",
        file="backbones/towers.py",
        old=".triu(1)",
        new=".triu(2)",
        tests=("test/test_towers.py",),
    ),
    Fault(
        name="towers: a text's feature is read at the last position instead of the end token",
        file="backbones/towers.py",
        old="text.argmax(dim=-1)]  # (B, D)",
        new="-1]  # (B, D)",
        tests=("test/test_towers.py",),
    ),
    Fault(
        name="lora: adapters are merged in training mode, so that dropout is merged too",
        file="backbones/lora.py",
        old="module.parametrizations.eval()",
        new="module.parametrizations",
        tests=("test/test_lora.py",),
    ),
    Fault(
        name="model: the graph convolution lacks the self loops",
        file="model.py",
        old="adjacency * pairs + torch.diag_embed(real)",
        new="adjacency * pairs",
        tests=("test/test_model.py",),
    ),
    Fault(
        name="model: the sum over objects includes the padding",
        file="model.py",
        old="(x * mask[..., None]).sum(dim=1)",
        new="x.sum(dim=1)",
        tests=("test/test_model.py",),
    ),
    Fault(
        name="model: the graph's features are not normalised before they are fused",
        file="model.py",
        old="        graph_features = F.normalize(graph_features, dim=-1)\n",
        new="",
        tests=("test/test_model.py",),
    ),
    Fault(
        name="model: an image without objects keeps its CLIP embedding only up to rounding",
        file="model.py",
        old=(
            "return torch.where("
            "mask.any(1, keepdim=True), F.normalize(fused, dim=-1), image_features)"
        ),
        new="return F.normalize(fused, dim=-1)",
        tests=("test/test_model.py",),
    ),
    Fault(
        name="hinge: the margin is subtracted instead of added, for the images' negatives",
        file="loss.py",
        old="images = (margin + scores",
        new="images = (-margin + scores",
        tests=("test/test_loss.py",),
    ),
    Fault(
        name="InfoNCE: the scores are not transposed for the texts' half",
        file="loss.py",
        old="F.cross_entropy(logits.T, target)",
        new="F.cross_entropy(logits, target)",
        tests=("test/test_loss.py",),
    ),
    Fault(
        name="loss: the mask of positives is transposed, texts by images",
        file="loss.py",
        old="is_caption.any(dim=1)",
        new="is_caption.any(dim=1).T",
        tests=("test/test_loss.py",),
    ),
)

# ------------------------------------------------------------------ data

DATA = (
    Fault(
        name="batches: what is drawn for an image is the same in every epoch",
        file="dataset/batches.py",
        old="np.random.default_rng((self.seed, epoch, i))",
        new="np.random.default_rng((self.seed, i))",
        tests=("test/test_batches.py",),
    ),
    Fault(
        name="batches: going on in an epoch skips as many images as batches are done",
        file="dataset/batches.py",
        old="order[start * batch_size :]",
        new="order[start:]",
        tests=("test/test_batches.py",),
    ),
    Fault(
        name="augment: boxes turn the other way than the pixels",
        file="dataset/augment.py",
        old="(centres - affine[:, 2]) @ inverse.T",
        new="(centres - affine[:, 2]) @ inverse",
        tests=("test/test_augment.py",),
    ),
    Fault(
        name="overlap: beside a drawn dev split val is not held out of training",
        file="dataloader.py",
        old='self.held_out.append("val")',
        new="pass",
        tests=("test/test_overlap.py",),
    ),
    Fault(
        name="cache: a file that changed without changing its size is taken for the old one",
        file="dataset/cache.py",
        old="return found.st_size, found.st_mtime_ns",
        new="return found.st_size",
        tests=("test/test_cache.py",),
    ),
    Fault(
        name="images: a detection file that two images end in is given to both",
        file="dataset/images.py",
        old="images_ending_in[tail])",
        new="[])",
        tests=("test/test_images.py",),
    ),
    Fault(
        name="annotations: captions in a list go to the names in turn, not in runs",
        file="dataset/annotations.py",
        old="names[i // captions_per_name]",
        new="names[i % len(names)]",
        tests=("test/test_annotations.py",),
    ),
    Fault(
        name="annotations: the drawn validation split ignores the seed",
        file="dataset/annotations.py",
        old="random_state=seed",
        new="random_state=0",
        tests=("test/test_annotations.py",),
    ),
    Fault(
        name="overlap: training images are compared with the last data set's test images only",
        file="dataset/overlap.py",
        old="found.update(hashes)",
        new="found = set(hashes)",
        tests=("test/test_overlap.py",),
    ),
)

# ------------------------------------------------------------------ metrics

METRICS = (
    Fault(
        name="ranks: items that tie with the best relevant one count as better",
        file="metrics/ranks.py",
        old="higher = scores > best",
        new="higher = scores >= best",
        tests=("test/test_ranks.py",),
    ),
    Fault(
        name="ranks: the expected rank among the tied ignores how many of them are relevant",
        file="metrics/ranks.py",
        old="(self.tied + 1) / (self.relevant + 1)",
        new="(self.tied + 1) / 2",
        tests=("test/test_ranks.py",),
    ),
    Fault(
        name="intervals: the bounds are those of a 90 % interval",
        file="metrics/intervals.py",
        old="PERCENTILES = (2.5, 97.5)",
        new="PERCENTILES = (5.0, 95.0)",
        tests=("test/test_intervals.py",),
    ),
    Fault(
        name="intervals: a table of other order keeps its order under the other's names",
        file="metrics/intervals.py",
        old="rows = [row_of[name] for name in names]",
        new="rows = list(row_of.values())",
        tests=("test/test_intervals.py",),
    ),
    Fault(
        name="evaluate: a checkpoint's data options win over those of the command line",
        file="evaluate.py",
        old="return {**saved, **places, **given}",
        new="return {**given, **saved, **places}",
        tests=("test/test_evaluate.py",),
    ),
    Fault(
        name="tables: the deviation over seeds is the population's, not the sample's",
        file="metrics/tables.py",
        old="from statistics import mean, stdev",
        new="from statistics import mean, pstdev as stdev",
        tests=("test/test_tables.py",),
    ),
)

# ------------------------------------------------------------------ training

TRAINING = (
    Fault(
        name="step: the warm-up begins at a rate of zero, a step late",
        file="training/step.py",
        old="return (step + 1) / rise",
        new="return step / rise",
        tests=("test/test_step.py",),
    ),
    Fault(
        name="step: biases and norms decay too",
        file="training/step.py",
        old="parameter.ndim >= 2",
        new="parameter.ndim >= 1",
        tests=("test/test_step.py",),
    ),
    Fault(
        name="inputs: features of frozen towers are found again for images of other pixels",
        file="training/inputs.py",
        old="[tower, versions, images.image_size, images.hashes]",
        new="[tower, versions, images.image_size]",
        tests=("test/test_inputs.py",),
    ),
    Fault(
        name="resume: the state of the random generators is not put back",
        file="training/resume.py",
        old='    set_random_states(state["random"], device)\n',
        new="",
        tests=("test/test_resume.py",),
    ),
    Fault(
        name="resume: patience lasts an epoch longer",
        file="training/resume.py",
        old='idle < options["patience"]',
        new='idle <= options["patience"]',
        tests=("test/test_train.py", "test/test_resume.py"),
    ),
    Fault(
        name="train: the last epoch's model counts as the best",
        file="train.py",
        old='if score > progress["best_score"]:',
        new="if True:",
        tests=("test/test_train.py",),
    ),
)

# ------------------------------------------------------------------ CLIPs of others, commands

COMMANDS = (
    Fault(
        name="naming: Hugging Face's keys and queries are exchanged",
        file="backbones/naming.py",
        old='for letter in "qkv"]',
        new='for letter in "kqv"]',
        tests=("test/test_loading.py", "test/test_export.py"),
    ),
    Fault(
        name="tokenize: a text that is too long loses its end token",
        file="simple_tokenizer.py",
        old="ids = [*ids[: context_length - 1], encoder.end]",
        new="ids = ids[:context_length]",
        tests=("test/test_tokenizer.py",),
    ),
    Fault(
        name="infer: queries are not cleaned as the model's captions were",
        file="infer.py",
        old='prepared(query, options["clean"], options["template"])',
        new='prepared(query, "none", options["template"])',
        tests=("test/test_infer.py",),
    ),
    Fault(
        name="scenes: above and below are exchanged, as if y pointed up",
        file="dataset/scenes.py",
        old='(1, "above", "below")',
        new='(1, "below", "above")',
        tests=("test/test_scenes.py",),
    ),
)

FAULTS = (*GRAPHS, *MODEL, *DATA, *METRICS, *TRAINING, *COMMANDS)


# ------------------------------------------------------------------ putting them in


def project_root():
    """The root of the git checkout that this file lies in."""
    command = ["git", "rev-parse", "--show-toplevel"]
    found = subprocess.run(
        command, cwd=Path(__file__).parent, check=True, capture_output=True, text=True
    )
    return Path(found.stdout.strip())


def copy_tree(root, folder):
    """Copy what git tracks, as it is in the working tree, into a folder."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=root, check=True, capture_output=True, text=True
    )
    for name in listed.stdout.split("\0"):
        if name and (root / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, folder / name)


def put_in(fault, folder):
    """Write a fault into a copy of the project.

    Raises ValueError where the right text does not stand exactly once in the file, or a test file
    is missing.
    """
    path = folder / fault.file
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if text.count(fault.old) != 1:
        raise ValueError(
            f"{fault.name}: {fault.old!r} stands {text.count(fault.old)} times in {fault.file}, "
            "expected once; carry the fault over to the code as it is now"
        )
    for test in fault.tests:
        if not (folder / test).is_file():
            raise ValueError(f"{fault.name}: no {test}; name the files that test it now")
    path.write_text(text.replace(fault.old, fault.new), encoding="utf-8")


def run_tests(tests, folder):
    """(pytest's exit status or None if it took too long, the first test that failed or "")."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-rfE", *tests]
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        return None, ""
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, flags=re.MULTILINE)
    return done.returncode, failed[1] if failed else ""


def try_fault(fault, root):
    """(verdict, the test that caught it or what pytest ended with) of one fault."""
    with tempfile.TemporaryDirectory(prefix="fault-") as name:
        folder = Path(name)
        copy_tree(root, folder)
        put_in(fault, folder)
        status, test = run_tests(fault.tests, folder)
    if status is None:
        return "TOO LONG", f"more than {TIMEOUT} s"
    if status == TESTS_FAILED:
        return "caught", test
    if status == 0:
        return "NOT CAUGHT", ", ".join(fault.tests)
    return "NOT RUN", f"pytest ended with {status}"


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    numbers = range(1, len(FAULTS) + 1)
    parser.add_argument(
        "--only",
        type=int,
        nargs="+",
        choices=numbers,
        default=numbers,
        metavar="N",
        help="numbers of faults, from 1; default all",
    )
    options = parser.parse_args(arguments)
    root = project_root()
    caught = 0
    for number in options.only:
        fault = FAULTS[number - 1]
        begin = time.perf_counter()
        verdict, detail = try_fault(fault, root)
        seconds = time.perf_counter() - begin
        if verdict == "caught":
            caught += 1
        print(f"{number:3d} {verdict:10s} {seconds:4.0f} s  {fault.name}")
        print(f"    {detail}", flush=True)
    print(f"{caught} of {len(options.only)} caught")
    return 0 if caught == len(options.only) else 1


if __name__ == "__main__":
    sys.exit(main())
