"""Look at a data set before believing numbers on it, or at what two data sets share.

    python audit.py --dataset ucm --data-root DIR --json audit.json
    python audit.py --against RSITMD_DIR RSICD_DIR --annotations txt auto

What is wrong is reported, not raised; only a root whose annotations cannot be read is an error.
Captions are the same if they are the same string. A ceiling is the best text-to-image recall that
repeated captions allow: all rows of a text get one order of images, and K images serve their own.
"""

from options import answer_early

if __name__ == "__main__":
    answer_early("audit", __doc__)  # before torch is imported, which takes seconds

import json
import os
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import simple_tokenizer
from dataloader import det_json_folder, sources
from dataset import images, scenes
from dataset.annotations import read_annotations
from det_formats import sanity
from det_formats.det_json import LABELS, load_detections, read_label_map
from escaping import escaped
from metrics.ranks import KS
from options import MAX_OBJECTS, parse_options, run
from progress import Progress
from writing import write_text

FINDINGS = (  # keys of the JSON, wherever they stand, that the last line sums up
    "blank_captions",
    "images_without_captions",
    "captions_with_lone_surrogates",
    "images_with_duplicates",
    "captions_of_another_image",
    "captions_found_in_train",
    "captions_too_long",
    "missing_images",
    "ambiguous_images",
    "unreadable_images",
    "corrupt_jpegs",
    "same_name",
    "same_stem",
    "same_content",
    "unusable_detections",
    "no_objects",
    "implausible_boxes",
    "objects_outside_vocabulary",
    "objects_dropped",
)


# ------------------------------------------------------------------ captions


def owners(records):
    """{caption: Counter of its rows by image name}."""
    found = {}
    for record in records:
        for text in record.captions:
            found.setdefault(text, Counter())[record.name] += 1
    return found


def ceiling(rows_by_image):
    """Best text-to-image recall in percent, {"R@1": ..., ...}, for what `owners` gives."""
    rows = sum(own.total() for own in rows_by_image.values())
    result = {}
    for k in KS:
        hits = 0
        for own in rows_by_image.values():
            hits += sum(count for _, count in own.most_common(k))
        result[f"R@{k}"] = 100 * hits / rows
    return result


def found_in(records, train):
    """Rows whose caption is in records of train too, and images all of whose captions are."""
    train_texts = {text for record in train for text in record.captions}
    found = 0
    wholly = 0
    for record in records:
        hits = sum(text in train_texts for text in record.captions)
        found += hits
        wholly += hits == len(record.captions)
    rows = sum(len(record.captions) for record in records)
    return {"captions_found_in_train": found, "of": rows, "images_wholly": wholly}


def caption_figures(records, train=None):
    """Counts of a split's captions; train: for an evaluation split the records of "train"."""
    encode = simple_tokenizer.tokenizer().encode
    rows_by_image = owners(records)
    tokens = {}
    for text in Progress(rows_by_image, "count tokens", "captions"):
        tokens[text] = len(encode(text)) + 2  # with start and end
    sizes = [len(record.captions) for record in records]
    with_duplicates = 0
    with_one_text = 0
    for record in records:
        distinct = len(set(record.captions))
        with_duplicates += distinct < len(record.captions)
        with_one_text += distinct == 1 and len(record.captions) > 1
    of_another = 0
    too_long = 0
    for text, own in rows_by_image.items():
        if len(own) > 1:
            of_another += own.total()
        if tokens[text] > simple_tokenizer.CONTEXT_LENGTH:
            too_long += own.total()
    figures = {
        "images": len(records),
        "captions": sum(sizes),
        "distinct_captions": len(rows_by_image),
        "captions_per_image": {"min": min(sizes), "max": max(sizes)},
        "images_by_captions": {str(size): n for size, n in sorted(Counter(sizes).items())},
        "images_with_duplicates": with_duplicates,
        "images_with_one_text": with_one_text,
        "captions_of_another_image": of_another,
        "most_tokens": max(tokens.values()),
        "longest_caption": max(tokens, key=tokens.get),
        "captions_too_long": too_long,
    }
    if train is not None:
        figures["in_train"] = found_in(records, train) if train else None
        figures["ceiling"] = ceiling(rows_by_image)
    return figures


# ------------------------------------------------------------------ images and detections


class Scan(NamedTuple):
    """A data root: its annotations, and what was found of the images that they name."""

    annotations: tuple  # as read_annotations gives them
    splits: dict  # split -> records; splits without any are left out
    index: dict  # all image files, named or not, as index_images gives them
    paths: dict  # image name -> relative path
    hashes: dict  # image name -> content hash, of readable images
    faults: dict  # kind -> names or messages
    sizes: dict  # relative path -> (width, height) in pixels, of readable images


class Inspection(NamedTuple):
    """What was found in an image file."""

    content_hash: str | None = None
    size: tuple | None = None  # (width, height) in pixels
    problem: str | None = None  # why it cannot be read
    fault: str | None = None  # of a JPEG


def inspect(path):
    """The Inspection of an image file."""
    fault = None
    try:
        fault = images.jpeg_fault(path.read_bytes())
        image = images.open_image(path)
    except (OSError, ValueError) as error:
        return Inspection(problem=str(error), fault=fault)
    return Inspection(images.content_hash(image), image.size, fault=fault)


def locate(names, index, root):
    """({name: relative path}, faults) of annotated images in an `images.index_images`."""
    paths = {}
    faults = {"missing_images": [], "ambiguous_images": []}
    for name in names:
        try:
            paths[name] = images.find_image(name, index, root)
        except ValueError as error:
            if str(error).startswith(f"{escaped(root)}: no image"):
                faults["missing_images"].append(name)
            else:
                faults["ambiguous_images"].append(str(error))
    return paths, faults


def scan(root, form="auto"):
    """Read a data root's annotations and all images that they name; ValueError without any."""
    root = Path(root)
    if not root.is_dir():
        remedy = "check --data-root or --against"
        if Path(root) == Path(scenes.FOLDER):
            remedy = "python -m dataset.scenes makes it"
        raise ValueError(f"{root}: no such folder; {remedy}")
    annotations = read_annotations(root, form, leave_out_broken=True)
    splits = {split: records for split, records in annotations.splits.items() if records}
    if not splits:
        raise ValueError(f"{root}: every caption is blank; check {annotations.origin}")
    index = images.index_images(root)
    names = dict.fromkeys(record.name for records in splits.values() for record in records)
    paths, faults = locate(names, index, root)
    inspected = inspect_all(root, sorted(set(paths.values())))
    faults["unreadable_images"] = []
    faults["corrupt_jpegs"] = []
    for file, found in inspected.items():
        if found.problem:
            faults["unreadable_images"].append(found.problem)
        if found.fault:
            faults["corrupt_jpegs"].append(f"{file}: {found.fault}")
    hashes = {}
    sizes = {}
    for name, file in paths.items():
        if inspected[file].content_hash:
            hashes[name] = inspected[file].content_hash
            sizes[file] = inspected[file].size
    return Scan(annotations, splits, index, paths, hashes, faults, sizes)


def inspect_all(root, files):
    """{file: what `inspect` says of it}, on all cores; files: relative paths."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(inspect, [root / file for file in files])
        shown = Progress(results, "look at", "images", total=len(files))
        return dict(zip(files, shown, strict=True))


def shared(some, others):
    """[name, other name] of what has one key in two dicts of key to name."""
    return [[name, others[key]] for key, name in some.items() if key in others]


def repeats(splits, keys):
    """Pairs of images with the same key: {"train": [[name, other name], ...], "train/test": ...}.

    Within a split every further image stands beside the first of its key. keys: by name.
    """
    pairs = {}
    firsts = {}  # split -> {key: name of the first image}
    for split, records in splits.items():
        pairs[split] = []
        firsts[split] = {}
        for record in records:
            if record.name in keys:
                first = firsts[split].setdefault(keys[record.name], record.name)
                if first != record.name:
                    pairs[split].append([first, record.name])
    for a, b in combinations(splits, 2):
        pairs[f"{a}/{b}"] = shared(firsts[a], firsts[b])
    return pairs


def coverage(paths, files, objects, max_objects):
    """Counts for image paths; files and objects are dicts by path."""
    sizes = [len(objects[path]) for path in paths]
    return {
        "images": len(paths),
        "with_file": sum(files[path] is not None for path in paths),
        "with_objects": sum(size > 0 for size in sizes),
        "objects": sum(sizes),
        "objects_dropped": sum(max(0, size - max_objects) for size in sizes),
    }


def detection_figures(found, folder, label_map, max_objects):
    """Coverage by split, labels, and files that cannot be used: those count as without objects."""
    unusable = []
    all_paths = [path for paths in found.index.values() for path in paths]
    try:
        files = images.match_detections(all_paths, folder)
    except ValueError as error:  # then none can be trusted
        files = dict.fromkeys(all_paths)
        unusable.append(str(error))
    objects = {}
    for path in sorted(set(found.paths.values())):
        objects[path] = []
        if files[path]:
            try:
                objects[path] = load_detections(files[path])
            except ValueError as error:
                unusable.append(str(error))
    coverages = {}
    for split, records in found.splits.items():
        paths = [found.paths[record.name] for record in records if record.name in found.paths]
        coverages[split] = coverage(paths, files, objects, max_objects)
    without_objects = []
    if folder.is_dir() and objects and not any(objects.values()) and not unusable:
        names = list(objects)
        without_objects.append(images.no_objects(names, [files[name] for name in names], folder))
    boxes = {path: [d["bbox"] for d in found_here] for path, found_here in objects.items()}
    implausible = sanity.findings(boxes, found.sizes)
    labels = Counter(d["label"] for detections in objects.values() for d in detections)
    return {
        "folder": str(folder),
        "unusable_detections": unusable,
        "no_objects": without_objects,
        "implausible_boxes": [f"{kind}: {evidence}" for kind, evidence in implausible],
        "splits": coverages,
        "labels": dict(labels.most_common()),
        "objects_outside_vocabulary": unknown_labels(labels, label_map),
    }


def unknown_labels(labels, label_map):
    """Those of {label: count} that the label map counts as "other"."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about unknown labels, which are counted here
        return {
            label: count
            for label, count in labels.items()
            if label_map.class_id(label) == label_map.other
        }


# ------------------------------------------------------------------ the two reports


def audit(name, found, det_json, label_map, max_objects=MAX_OBJECTS):
    """All that is counted in a Scan, as a dict for JSON."""
    train = found.splits.get("train", [])
    captions = {}
    for split, records in found.splits.items():
        captions[split] = caption_figures(records, train=None if split == "train" else train)
    stems = {
        record.name: images.without_suffix(record.name)
        for records in found.splits.values()
        for record in records
    }
    return {
        "dataset": name,
        "origin": found.annotations.origin,
        "blank_captions": found.annotations.blank,
        "images_without_captions": found.annotations.empty,
        "captions_with_lone_surrogates": list(found.annotations.broken),
        "splits": captions,
        "images": {
            "read": len(found.hashes),
            **found.faults,
            "same_name": repeats(found.splits, stems),
            "same_content": repeats(found.splits, found.hashes),
        },
        "detections": detection_figures(found, det_json, label_map, max_objects),
    }


def compare(a, b):
    """What two Scans share, as a dict for JSON: images by stem and by content, captions."""
    return {
        "same_stem": shared(_names_by_stem(a), _names_by_stem(b)),
        "same_content": shared(_names_by_content(a), _names_by_content(b)),
        "captions_in_common": len(owners(_records(a)).keys() & owners(_records(b)).keys()),
        "A": _beside_other(a, b),
        "B": _beside_other(b, a),
    }


def _records(found):
    return [record for records in found.splits.values() for record in records]


def _names_by_stem(found):
    return {images.without_suffix(record.name).name: record.name for record in _records(found)}


def _names_by_content(found):
    return {digest: name for name, digest in found.hashes.items()}


def _beside_other(own, other):
    """What is counted of one Scan beside another."""
    train = other.splits.get("train")
    in_train = {}
    for split, records in own.splits.items():
        in_train[split] = found_in(records, train) if train else None
    return {
        "origin": own.annotations.origin,
        "captions_with_lone_surrogates": list(own.annotations.broken),
        "images_read": len(own.hashes),
        **own.faults,
        "in_train_of_other": in_train,
    }


def short(value):
    """A value of the report on one line: of a list the length and the first five entries."""
    if isinstance(value, dict):
        parts = [f"{escaped(key.replace('_', ' '))} {short(own)}" for key, own in value.items()]
        return ", ".join(parts) or "none"
    if isinstance(value, list):
        return _short_list(value)
    if isinstance(value, float):
        return f"{value:.2f}"
    return escaped(value)


def _short_list(entries):
    if not entries:
        return "0"
    first = []
    for entry in entries[:5]:
        first.append(escaped(entry if isinstance(entry, str) else " = ".join(entry)))
    if len(entries) > 5:
        first.append("...")
    return f"{len(entries)} ({', '.join(first)})"


def report_lines(result, indent=""):
    """A dict of dicts as lines, what is in a key further in."""
    for key, value in result.items():
        title = indent + escaped(key.replace("_", " "))
        if _is_nested(value):
            yield title
            yield from report_lines(value, indent + "  ")
        else:
            yield f"{title}: {short(value)}"


def _is_nested(value):
    """Whether a value is a dict with dicts or lists in it, which does not go on one line."""
    if not isinstance(value, dict):
        return False
    return any(isinstance(own, (dict, list)) for own in value.values())


def total(result, key):
    """Sum of what a key counts, wherever in nested dicts it stands."""
    found = 0
    for name, value in result.items():
        if name == key:
            found += _count(value)
        elif isinstance(value, dict):
            found += total(value, key)
    return found


def _count(value):
    """A number as it is, a list's length, and the sum over a dict."""
    if isinstance(value, dict):
        return sum(_count(own) for own in value.values())
    if isinstance(value, list):
        return len(value)
    return value


def main(arguments=None):
    options = parse_options("audit", __doc__, arguments)
    if options.against:
        result = compare_roots(options)
    else:
        result = audit_source(options)
    print("\n".join(report_lines(result)))
    if options.json:
        write_text(options.json, json.dumps(result, indent=2) + "\n")
        print(f"written to {options.json}")
    counts = {key: total(result, key) for key in FINDINGS}
    findings = {key: count for key, count in counts.items() if count}
    print(f"findings: {short(findings)}")
    return result


def compare_roots(options):
    """`compare` of the two roots of `--against`."""
    forms = options.annotations or ["auto"]
    if options.data_root or options.det_json or len(forms) > 2:
        raise ValueError("--against A B goes with --annotations, one or two, and --json alone")
    first, second = options.against
    return compare(scan(first, forms[0]), scan(second, forms[-1]))


def audit_source(options):
    """`audit` of the data set that the options name."""
    named = sources(vars(options))
    if len(named) > 1:
        raise ValueError("--dataset: expected one data set; two are compared by --against")
    [source] = named
    det_json = det_json_folder(source)
    label_map = read_label_map(options.labels or LABELS)
    found = scan(source.root, source.form)
    return audit(source.name, found, det_json, label_map, options.max_objects)


if __name__ == "__main__":
    run(main)
