"""Look at a data set before believing numbers on it, or at what two data sets share.

    python audit.py --dataset ucm --data-root DIR --json audit.json
    python audit.py --against RSITMD_DIR RSICD_DIR --annotations txt auto

What is wrong is reported, not raised; only a root whose annotations cannot be read is an error.
Captions are the same if they are the same string. A ceiling is the best text-to-image recall that
repeated captions allow: all rows of a text get one order of images, and K images serve their own.
"""

import json
import os
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

import simple_tokenizer
from dataloader import sources
from dataset import images
from dataset.annotations import read_annotations
from det_formats.det_json import LABELS, load_detections, read_label_map
from metrics.ranks import KS
from options import MAX_OBJECTS, parse_options

FINDINGS = (  # keys of the JSON, wherever they stand, that the last line sums up
    ("blank_captions", "images_without_captions", "images_with_duplicates")
    + ("captions_of_another_image", "captions_found_in_train", "captions_too_long")
    + ("missing_images", "ambiguous_images", "unreadable_images", "corrupt_jpegs")
    + ("same_name", "same_stem", "same_content", "unusable_detections")
    + ("objects_outside_vocabulary", "objects_dropped")
)


# ------------------------------------------------------------------ captions


def owners(records):
    """{caption: Counter of its rows by image name}."""
    found = {}
    for record in records:
        for text in record.captions:
            found.setdefault(text, Counter())[record.name] += 1
    return found


def ceiling(found):
    """Best text-to-image recall in percent, {"R@1": ..., ...}, for what `owners` gives."""
    rows = sum(own.total() for own in found.values())
    hits = {k: sum(n for own in found.values() for _, n in own.most_common(k)) for k in KS}
    return {f"R@{k}": 100 * n / rows for k, n in hits.items()}


def found_in(records, train):
    """Rows whose caption is in records of train too, and images all of whose captions are."""
    texts = {text for record in train for text in record.captions}
    hits = [[text in texts for text in record.captions] for record in records]
    rows = {"captions_found_in_train": sum(map(sum, hits)), "of": sum(map(len, hits))}
    return {**rows, "images_wholly": sum(map(all, hits))}


def caption_figures(records, train=None):
    """Counts of a split's captions; train: for an evaluation split the records of "train"."""
    found, rows = owners(records), [len(record.captions) for record in records]
    tokens = {text: len(simple_tokenizer.tokenizer().encode(text)) + 2 for text in found}
    figures = {
        "images": len(records),
        "captions": sum(rows),
        "distinct_captions": len(found),
        "captions_per_image": {"min": min(rows), "max": max(rows)},
        "images_by_captions": {str(n): count for n, count in sorted(Counter(rows).items())},
        "images_with_duplicates": sum(len(set(r.captions)) < len(r.captions) for r in records),
        "images_with_one_text": sum(len(set(r.captions)) == 1 < len(r.captions) for r in records),
        "captions_of_another_image": sum(own.total() for own in found.values() if len(own) > 1),
        "most_tokens": max(tokens.values()),
        "longest_caption": max(tokens, key=tokens.get),
        "captions_too_long": sum(
            found[t].total() for t, n in tokens.items() if n > simple_tokenizer.CONTEXT_LENGTH
        ),
    }
    if train is not None:
        figures["in_train"] = found_in(records, train) if train else None
        figures["ceiling"] = ceiling(found)
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


def inspect(path):
    """(content hash, why it cannot be read, fault of a JPEG) of an image file, None for each."""
    fault = None
    try:
        fault = images.jpeg_fault(path.read_bytes())
        return images.content_hash(images.open_image(path)), None, fault
    except (OSError, ValueError) as error:
        return None, str(error), fault


def locate(names, index, root):
    """({name: relative path}, faults) of annotated images in an `images.index_images`."""
    paths, faults = {}, {"missing_images": [], "ambiguous_images": []}
    for name in names:
        try:
            paths[name] = images.find_image(name, index, root)
        except ValueError as error:
            missing = str(error).startswith(f"{root}: no image")
            kind, entry = ("missing", name) if missing else ("ambiguous", str(error))
            faults[f"{kind}_images"].append(entry)
    return paths, faults


def scan(root, form="auto"):
    """Read a data root's annotations and all images that they name; ValueError without any."""
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder; check --data-root or --against")
    found, index = read_annotations(root, form), images.index_images(root)
    splits = {split: records for split, records in found.splits.items() if records}
    if not splits:
        raise ValueError(f"{root}: every caption is blank; check {found.origin}")
    names = dict.fromkeys(record.name for records in splits.values() for record in records)
    paths, faults = locate(names, index, root)
    files = sorted(set(paths.values()))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        read = pool.map(inspect, [root / file for file in files])
        bar = tqdm(read, "images", len(files), leave=False, unit="image", disable=len(files) < 100)
        seen = dict(zip(files, bar, strict=True))
    faults["unreadable_images"] = [problem for _, problem, _ in seen.values() if problem]
    faults["corrupt_jpegs"] = [f"{file}: {fault}" for file, (*_, fault) in seen.items() if fault]
    hashes = {name: seen[path][0] for name, path in paths.items() if seen[path][0]}
    return Scan(found, splits, index, paths, hashes, faults)


def shared(some, others):
    """[name, other name] of what has one key in two dicts of key to name."""
    return [[name, others[key]] for key, name in some.items() if key in others]


def repeats(splits, keys):
    """{"train": [[name, other name of same key], ...], "train/test": ..., ...}; keys by name."""
    firsts, found = {}, {}
    for split, records in splits.items():
        first = firsts[split] = {}
        names = [record.name for record in records if record.name in keys]
        pairs = [[first.setdefault(keys[name], name), name] for name in names]
        found[split] = [[one, other] for one, other in pairs if one != other]
    for a, b in combinations(splits, 2):
        found[f"{a}/{b}"] = shared(firsts[a], firsts[b])
    return found


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
    unusable, objects = [], {}
    every = [path for own in found.index.values() for path in own]
    try:
        files = images.match_detections(every, folder)
    except ValueError as error:  # then none can be trusted
        files, unusable = dict.fromkeys(every), [str(error)]
    for path in sorted(set(found.paths.values())):
        try:
            objects[path] = load_detections(files[path]) if files[path] else []
        except ValueError as error:
            objects[path] = []
            unusable.append(str(error))
    labels = Counter(d["label"] for own in objects.values() for d in own)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about unknown labels, which are counted here
        other = {k: n for k, n in labels.items() if label_map.class_id(k) == len(label_map) - 1}
    result = {"folder": str(folder), "unusable_detections": unusable, "splits": {}}
    for split, records in found.splits.items():
        paths = [found.paths[r.name] for r in records if r.name in found.paths]
        result["splits"][split] = coverage(paths, files, objects, max_objects)
    return {**result, "labels": dict(labels.most_common()), "objects_outside_vocabulary": other}


# ------------------------------------------------------------------ the two reports


def audit(name, found, det_json, label_map, max_objects=MAX_OBJECTS):
    """All that is counted in a Scan, as a dict for JSON."""
    train, splits = found.splits.get("train", []), found.splits
    names = {r.name: images.without_suffix(r.name) for records in splits.values() for r in records}
    same = {"same_name": repeats(splits, names), "same_content": repeats(splits, found.hashes)}
    figures = {s: caption_figures(r, None if s == "train" else train) for s, r in splits.items()}
    return {
        "dataset": name,
        "origin": found.annotations.origin,
        "blank_captions": found.annotations.blank,
        "images_without_captions": found.annotations.empty,
        "splits": figures,
        "images": {"read": len(found.hashes), **found.faults, **same},
        "detections": detection_figures(found, det_json, label_map, max_objects),
    }


def compare(a, b):
    """What two Scans share, as a dict for JSON: images by stem and by content, captions."""
    records = [[record for own in found.splits.values() for record in own] for found in (a, b)]
    stems = [{images.without_suffix(r.name).name: r.name for r in own} for own in records]
    contents = [{digest: name for name, digest in found.hashes.items()} for found in (a, b)]
    result = {"same_stem": shared(*stems), "same_content": shared(*contents)}
    result["captions_in_common"] = len(owners(records[0]).keys() & owners(records[1]).keys())
    for name, own, other in (("A", a, b), ("B", b, a)):
        train = other.splits.get("train")
        result[name] = {
            "origin": own.annotations.origin,
            "images_read": len(own.hashes),
            **own.faults,
            "in_train_of_other": {s: train and found_in(r, train) for s, r in own.splits.items()},
        }
    return result


def short(value):
    """Numbers and lists on one line."""
    if isinstance(value, dict):
        return ", ".join(f"{k.replace('_', ' ')} {short(v)}" for k, v in value.items()) or "none"
    if isinstance(value, list) and value:
        first = ", ".join(v if isinstance(v, str) else " = ".join(v) for v in value[:5])
        return f"{len(value)} ({first}{', ...' if len(value) > 5 else ''})"
    return f"{value:.2f}" if isinstance(value, float) else str(0 if value == [] else value)


def report_lines(result, indent=""):
    """A dict of dicts as lines, what is in a key further in."""
    for key, value in result.items():
        title = indent + key.replace("_", " ")
        if isinstance(value, dict) and {dict, list} & set(map(type, value.values())):
            yield title
            yield from report_lines(value, indent + "  ")
        else:
            yield f"{title}: {short(value)}"


def total(value, key, inside=False):
    """Sum of all numbers and lengths of lists below a key of nested dicts."""
    if isinstance(value, dict):
        return sum(total(own, key, inside or name == key) for name, own in value.items())
    return (len(value) if isinstance(value, list) else value) if inside else 0


def main(arguments=None):
    options = parse_options("audit", __doc__, arguments)
    if options.against:
        forms = options.annotations or ["auto"]
        if options.data_root or options.det_json or len(forms) > 2:
            raise ValueError("--against A B goes with --annotations, one or two, and --json alone")
        result = compare(*map(scan, options.against, forms * 2))
    else:
        source, *others = sources(vars(options))
        if others:
            raise ValueError("--dataset: expected one data set; two are compared by --against")
        det_json = Path(source.det_json or source.root / "det_json")
        if source.det_json and not det_json.is_dir():
            raise ValueError(f"{det_json}: no such folder; check --det-json")
        label_map, found = read_label_map(options.labels or LABELS), scan(source.root, source.form)
        result = audit(source.name, found, det_json, label_map, options.max_objects)
    print("\n".join(report_lines(result)))
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(f"written to {options.json}")
    counts = {key: total(result, key) for key in FINDINGS}
    print(f"findings: {short({key: n for key, n in counts.items() if n})}")
    return result


if __name__ == "__main__":
    main()
