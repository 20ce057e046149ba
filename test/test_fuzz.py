"""Damaged files, drawn at random from a fixed seed: readers refuse them in one line, or read them.

A reader may raise ValueError or OSError that names the file, and nothing else. It may neither hang
nor ask for much memory.
"""

import copy
import json
import math
import os
import random
import signal
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import model
from backbones import model_configs
from backbones.lora import adapt
from backbones.towers import CLIP
from conftest import ROOT, box, write_detections, write_image, write_karpathy
from dataset.annotations import read_annotations
from dataset.cache import read_images
from det_formats.det_json import LabelMap, load_detections, read_label_map
from metrics.intervals import compare
from metrics.tables import read_results
from model import load_checkpoint, save_checkpoint
from options import default_options, for_resuming, for_training
from training import resume
from training.resume import NEW_RUN, read_state, save_state
from training.step import make_learner
from V_Graph import detection_arrays

resource = pytest.importorskip("resource")  # it bounds the memory
if not Path("/proc/self/statm").is_file():
    pytest.skip("the bound on the memory needs Linux", allow_module_level=True)

MEMORY = 2**30  # bytes that a reader may ask for beyond what the process has
SECONDS = 20  # after which a reader counts as hanging

TEXT = {"context_length": 16, "vocab_size": 40, "width": 8, "layers": 1, "heads": 2}
VIT = {
    "name": "vit",
    "embed_dim": 8,
    "image_size": 16,
    "vision": {"patch_size": 8, "width": 8, "layers": 1, "heads": 2},
    "text": TEXT,
}
RESNET = {
    "name": "resnet",
    "embed_dim": 8,
    "image_size": 32,
    "vision": {"width": 2, "layers": [1, 1, 1, 1], "heads": 2},
    "text": TEXT,
}
LABELS = ["ship, boat", "plane", "tennis court"]
CAPTIONS = {"a.png": ("a ship", "two ships"), "b.png": ("a plane", "ein Flüßchen")}

# ------------------------------------------------------------------ damage

ODD = (
    *(None, True, -1, 0, 1, 7, 10**9, 10**30, 10**400, 0.5, -0.0, 1e308),
    *(math.nan, math.inf, -math.inf, "", " ", "x", "../x", "a\nb", "\0", "\ud800", "9" * 5000),
    *([], {}, [[]], [1], ["x"], {"x": 1}, {"R@1": []}),
)


def odd_tensors(tensor):
    """Tensors that are no replacement for one."""
    yield tensor * math.nan if tensor.is_floating_point() else tensor + 1
    yield tensor.flatten()[:-1].clone()
    yield tensor[None].clone()
    yield tensor.to(torch.int32)
    yield tensor.to(torch.complex64)
    yield torch.zeros(()).expand(10**6, 10**6)  # four bytes in the file
    yield torch.zeros(1, 10**4)
    yield torch.zeros(4, 4).to_sparse()
    yield torch.zeros(0)
    yield torch.empty(10**6, 10**6, device="meta")


def replacement(value, rng, tensors):
    """Something else in the place of a value."""
    if tensors and torch.is_tensor(value) and rng.random() < 0.8:
        return rng.choice(list(odd_tensors(value)))
    if tensors and rng.random() < 0.1:
        return torch.ones(2)
    if isinstance(value, str) and value and rng.random() < 0.3:
        place = rng.randrange(len(value))
        return value[:place] + rng.choice(["", "é", "\n", " ", "0", ","]) + value[place + 1 :]
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number and abs(value) < 10**15 and rng.random() < 0.4:
        return rng.choice([-value, value + 1, value * 10**9, float(value), str(value)])
    return copy.deepcopy(rng.choice(ODD))


def listed(content):
    """Nested content with lists in the place of tuples, so that it can be changed."""
    if isinstance(content, dict):
        return {key: listed(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [listed(value) for value in content]
    return content


def damage_once(content, rng, tensors):
    """Change one place of nested content, at any depth; returns the content."""
    parent, node = None, content
    while isinstance(node, (dict, list)) and node and (parent is None or rng.random() < 0.8):
        parent = node
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        node = node[key]
    if parent is None or rng.random() < 0.02:
        return replacement(content, rng, tensors)
    way = rng.choice(["replace", "replace", "replace", "delete", "swap", "add"])
    if way == "replace":
        parent[key] = replacement(node, rng, tensors)
    elif way == "delete":
        del parent[key]
    elif way == "swap":
        other = rng.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
        parent[key], parent[other] = parent[other], parent[key]
    elif isinstance(parent, list):
        parent.insert(key, replacement(node, rng, tensors))
    else:
        parent[rng.choice(["x", "", 3, f"{key}x"])] = parent.pop(key)
    return content


def damaged_content(content, rng, tensors=False):
    content = listed(copy.deepcopy(content))
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        content = damage_once(content, rng, tensors)
    return content


def damaged_bytes(whole, rng):
    """A file's bytes cut off, or with some flipped, taken out or repeated."""
    whole = bytearray(whole)
    place = rng.randrange(len(whole))
    way = rng.choice(["cut", "flip", "remove", "repeat", "nul"])
    if way == "cut":
        del whole[place:]
    elif way == "flip":
        for _ in range(rng.choice([1, 3, 30])):
            whole[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
    elif way == "remove":
        del whole[place : place + rng.choice([1, 10, 100])]
    elif way == "repeat":
        whole[place:place] = whole[place : place + 50]
    else:
        whole[place : place + 4] = bytes(4)
    return bytes(whole)


# ------------------------------------------------------------------ whole files and their readers


class Reader(NamedTuple):
    """A reader, and whole files of which it reads damaged copies."""

    files: list  # of paths: each is damaged by itself
    read: object  # reads a damaged file at its place
    named: object  # the path that an error has to name, of a damaged file
    form: str  # "torch", "json" or "bytes"


def by_path(path):
    return path


def checkpoint_files(folder):
    """Checkpoints of each kind, and a `last.pth`."""
    files = []
    usual = {**default_options("train"), "graph": "object"}
    for name, config, changes in (
        ("vit", VIT, {}),
        ("plain", VIT, {"graph": "none"}),
        ("lora", VIT, {"train": "lora", "clip": "start.pt"}),
        ("resnet", RESNET, {"fusion": "gate"}),
    ):
        options = for_training({**usual, **changes}, {})
        network = model.build(config, LABELS, options)
        if "train" in changes:
            adapt(network, 2, 4.0, 0.0)
            options["lora"] = (2, 4.0, 0.0)
        files.append(folder / f"{name}.pth")
        save_checkpoint(files[-1], network, config, LABELS, options, epoch=1, left_out={})
    published = {"graph": "published", "fusion": 0.5}
    files.append(folder / "published.pth")
    torch.save(model.build(VIT, LABELS, published).state_dict(), files[-1])

    options = for_training({**usual, "precision": "fp32"}, {})
    network = model.build(VIT, LABELS, options)
    learner = make_learner(network, options, 10)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    learner.optimizer.step()
    checkpoint = {"model": network, "model_config": VIT, "labels": LABELS, "options": options}
    save_state(folder / "last.pth", learner, {**checkpoint, "data_digest": "0"}, NEW_RUN)
    return files, folder / "last.pth"


def read_model_config(path):
    config = model_configs.read_model_config(path.stem)
    with torch.device("meta"):
        CLIP(config)


def go_on(path):
    """Resume from a `last.pth`, and train a step: a misfit of an optimizer would crash there."""
    checkpoint = read_state(path)
    options = for_resuming(checkpoint["options"], {"device": "cpu"})
    network = model.build(checkpoint["definition"], checkpoint["labels"], options)
    learner = make_learner(network, {**options, "precision": "fp32"}, 10)
    resume.go_on(learner, checkpoint, "0", path.parent)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    learner.optimizer.step()
    learner.schedule.step()


def cache_reader(folder, cache):
    """(files, read): a pair of files in the cache, and what reads it and compares the result."""
    image = write_image(folder / "a.png")
    detections = write_detections(folder / "det_json" / "a.json", [box(3, 4)])

    def read(_):
        found = read_images([image], [detections], 8, LabelMap(LABELS), ram_gib=0)
        # No digest is taken of the pixels, which are many: they may differ.
        return found.pixels[0].shape, found.hashes, found.boxes[0][1].tolist()

    whole = read(None)

    def read_again(_):
        assert read(None) == whole

    return list(cache.iterdir()), read_again


@pytest.fixture
def readers(tmp_path, cache_folder, monkeypatch):
    """{name: Reader} of every kind of file."""
    torch.manual_seed(0)
    configs = tmp_path / "models"
    configs.mkdir()
    monkeypatch.setattr(model_configs, "MODELS", configs)
    for config in (VIT, RESNET):
        sizes = {field: value for field, value in config.items() if field != "name"}
        (configs / f"{config['name']}.json").write_text(json.dumps(sizes), encoding="utf-8")
    checkpoints, state = checkpoint_files(tmp_path)

    result = tmp_path / "result.json"
    result.write_bytes((ROOT / "test" / "fixtures" / "c1a5ef9" / "result.json").read_bytes())
    whole_result = read_results(result)
    detections = write_detections(tmp_path / "d.json", [box(1, 2), box(3, 4)])
    labels = tmp_path / "labels.txt"
    labels.write_text("# of ours\n" + "\n".join(LABELS), encoding="utf-8")
    caption_sets = {"train": CAPTIONS, "test": {"c.png": ("a car",)}}
    write_karpathy(tmp_path / "karpathy", caption_sets)
    for form in ("pir", "txt"):
        (tmp_path / form).mkdir()
    entries = [{"image": f"train/{n}", "caption": list(c)} for n, c in CAPTIONS.items()]
    (tmp_path / "pir" / "x_train.json").write_text(json.dumps(entries), encoding="utf-8")
    captions = [caption for own in CAPTIONS.values() for caption in own]
    (tmp_path / "txt" / "train_filename.txt").write_text("\n".join(CAPTIONS), encoding="utf-8")
    (tmp_path / "txt" / "train_caps.txt").write_text("\n".join(captions), encoding="utf-8")
    cache_files, read_cache = cache_reader(tmp_path / "images", cache_folder)

    def detections_of(path):
        detection_arrays(load_detections(path), LabelMap(LABELS))

    def annotations_of(path):
        read_annotations(path.parent)

    def result_of(path):
        compared = read_results(path)
        try:
            compare(compared, whole_result)
        except ValueError:  # which names what differs: --compare names the files
            pass

    def annotations(form):
        files = sorted((tmp_path / form).iterdir())
        kind = "bytes" if form == "txt" else "json"
        return Reader(files, annotations_of, lambda path: path.parent, kind)

    return {
        "checkpoints": Reader(checkpoints, load_checkpoint, by_path, "torch"),
        "last.pth": Reader([state], go_on, lambda path: path.parent, "torch"),
        "results": Reader([result], result_of, by_path, "json"),
        "detections": Reader([detections], detections_of, by_path, "json"),
        "labels": Reader([labels], read_label_map, by_path, "bytes"),
        "text lists": annotations("txt"),
        "Karpathy": annotations("karpathy"),
        "PIR": annotations("pir"),
        "model configs": Reader(
            [configs / "vit.json", configs / "resnet.json"], read_model_config, by_path, "json"
        ),
        "caches": Reader(cache_files, read_cache, by_path, "bytes"),
    }


# ------------------------------------------------------------------ one damaged file


class Hangs(BaseException):
    """Raised by the alarm; no `except Exception` stops it."""


@pytest.fixture
def bounded():
    """The address space ends a little beyond what the process has; an alarm ends what hangs."""

    def hangs(*_):
        raise Hangs

    limits = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, hangs)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + MEMORY, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)
    signal.signal(signal.SIGALRM, before)


def write_damaged(path, whole, content, form, rng):
    """Write a damaged copy over a file; whole: its bytes, content: what it holds, if of a form."""
    if form == "bytes" or rng.random() < 0.3:
        path.write_bytes(damaged_bytes(whole, rng))
    elif form == "torch":
        torch.save(damaged_content(content, rng, tensors=True), path)
    else:
        path.write_text(json.dumps(damaged_content(content, rng)), encoding="utf-8")


def outcome_of(reader, path):
    """ "accepted", "refused", or what a reader did that it must not do."""
    signal.alarm(SECONDS)
    try:
        reader.read(path)
    except (ValueError, OSError) as error:
        message = str(error)
        if str(reader.named(path)) not in message:
            return f"names no file: {message[:200]}"
        if "\n" in message:
            return f"several lines: {message[:200]}"
        return "refused"
    except (Exception, Hangs) as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        signal.alarm(0)
    return "accepted"


def content_of(path, form):
    if form == "torch":
        return torch.load(path, weights_only=True)
    return json.loads(path.read_bytes()) if form == "json" else None


def fuzzed(reader, examples, seed):
    """{outcome: how often} of so many damaged files."""
    rng = random.Random(seed)
    whole = {path: path.read_bytes() for path in reader.files}
    contents = {path: content_of(path, reader.form) for path in reader.files}
    found = {"refused": 0, "accepted": 0}
    for _ in range(examples):
        path = rng.choice(reader.files)
        write_damaged(path, whole[path], contents[path], reader.form, rng)
        outcome = outcome_of(reader, path)
        found[outcome] = found.get(outcome, 0) + 1
        path.write_bytes(whole[path])
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("examples", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_damaged_files_are_refused_by_name_or_read(readers, bounded, examples):
    """Prints a table of what became of them: pytest -s."""
    each = examples // len(readers)
    faults = []
    print(f"\n{'reader':15s}{'examples':>10s}{'refused':>10s}{'accepted':>10s}{'faults':>10s}")
    for name, reader in readers.items():
        for path in reader.files:
            assert outcome_of(reader, path) == "accepted", path
        found = fuzzed(reader, each, seed=name)
        refused, accepted = found.pop("refused"), found.pop("accepted")
        print(f"{name:15s}{each:10d}{refused:10d}{accepted:10d}{sum(found.values()):10d}")
        faults += [f"{name}: {count} times {fault}" for fault, count in found.items()]
    assert not faults, "\n".join(faults)
