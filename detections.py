"""Detections of your images: from other programs' files, from a detector, and back.

    python detections.py convert yolo-obb runs/obb/predict/labels --names classes.txt \\
        --images tiles/ --out det_json/
    python detections.py export dota det_json/ --images tiles/ --out labels/
    python detections.py check det_json/ --images tiles/
    python detections.py draw det_json/ --images tiles/ --out sheet.png
    python detections.py detect --model yolo.onnx --images tiles/ --out det_json/

`det_formats/README.md` has the formats, and the way from a folder of imagery to detections. Files
of det_json/ mirror the images' paths: `2021/t1.tif` has `2021/t1.json`.
"""

from options import end, parse_command

COMMANDS = {  # and what each is for, in --help
    "convert": "other programs' files to det_json",
    "export": "det_json to other programs' files",
    "check": "what is wrong with a folder of det_json",
    "draw": "a sheet of images with their boxes",
    "detect": "run a detector, an ONNX file",
}


def parse(arguments=None):
    """The options of a command, its name among them; see `options.parse_command`."""
    return parse_command("detections", __doc__, COMMANDS, arguments)


if __name__ == "__main__":
    try:
        parse()  # --help and mistakes are answered before numpy is imported
    except ValueError as error:
        end(error)

import gc
import json
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from dataset.detecting import Settings, write_found
from dataset.folders import (
    ImageFolder,
    check_folder,
    detection_name,
    findings_of,
    first_lines,
    read_folder,
    require_none,
    write_texts,
)
from dataset.images import check_picture_name, files_below, open_image, save_picture
from det_formats.convert import READERS, WRITERS, WRITERS_TOGETHER, Limits, finished, folded
from det_formats.det_json import LABELS, read_label_map, text_of_detections
from det_formats.dota import RESULTS
from det_formats.drawing import draw_sheet
from det_formats.entries import Hints, text_of
from det_formats.foreign import is_number
from det_formats.onnx_detector import OnnxDetector
from escaping import escaped
from options import run
from progress import Progress
from writing import write_text

NUMBERED = ("yolo", "yolo-obb", "mmrotate")  # formats whose classes are numbers
NAMES_FILE = "classes.txt"  # which export writes beside those

# ------------------------------------------------------------------ convert


def input_files(path, suffixes, names_file):
    """(file, name of the image that its own name tells) of a format's files at a path.

    suffixes: one, or a tuple of several.
    """
    suffixes = suffixes if isinstance(suffixes, tuple) else (suffixes,)
    path = Path(path)
    if path.is_file():
        return [(path, path.stem)]
    if not path.is_dir():
        raise ValueError(f"{escaped(path)}: no such file or folder")
    found = []
    for name in files_below(path):
        is_names = names_file is not None and (path / name).samefile(names_file)
        if name.lower().endswith(suffixes) and not is_names:
            suffix = next(one for one in suffixes if name.lower().endswith(one))
            found.append((path / name, name[: -len(suffix)]))
    if not found:
        raise ValueError(f"{escaped(path)}: no file in it ends in {' or '.join(suffixes)}")
    return found


def read_names(path):
    """Names of classes, one a line, by number; None for None."""
    if path is None:
        return None
    try:
        names = [line.strip() for line in text_of(path).splitlines()]
    except (OSError, ValueError) as error:
        raise ValueError(f"{escaped(path)}: not readable as names of classes ({error})") from None
    while names and not names[-1]:
        names.pop()
    if not names or not all(names) or any(":" in name for name in names):
        raise ValueError(
            f"{escaped(path)}: expected the name of a class in each line, and nothing else; of a "
            "data.yaml copy the names"
        )
    return names


@contextmanager
def without_collector():
    """No search for cycles meanwhile: a quarter of the time goes into it, and there are none."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class Read(NamedTuple):
    """What the files of a format say, all together."""

    found: dict  # image: (place, Detection) pairs; of an image that was looked at, perhaps none
    owners: dict  # image: the file that is of it alone, and the name it has there
    tellers: dict  # image, where files are of many: {label: the file that has it}
    problems: list  # "file: place: what is wrong"
    unclear: set  # images of which something could not be read
    lost: list  # files of many images that could not be read


def read_files(files, reader, images, hints, label_map):
    """Read the (file, name) pairs of a format; returns a Read."""
    read = Read(found={}, owners={}, tellers={}, problems=[], unclear=set(), lost=[])
    for file, name in Progress(files, "read", "files"):
        try:
            read_file(file, name, reader, images, hints, label_map, read)
        except (OSError, ValueError) as error:
            read.problems.append(f"{escaped(file)}: {error}")
            note_unclear(name, images, read)
            if not images.like(name):
                read.lost.append(file)
    return read


def read_file(file, name, reader, images, hints, label_map, read):
    """Add what a file says to a Read. What is wrong with single entries is among its problems."""
    shown = escaped(file)
    refused = set()  # images whose first entry was, with all that follows
    for entry in reader.entries(file, name):
        if entry.image in refused:
            continue
        place = f"{shown}: {entry.place}"
        try:
            path = images.find(entry.image)
            require_owner(path, (file, entry.image), read)
            if entry.content is None:
                require_first(path, file, read)
                read.owners[path] = (file, entry.image)
                read.found.setdefault(path, [])
                continue
            size = _size_for(reader, path, images)
            detection = reader.detection(entry.content, size, hints)
            if path not in read.owners:
                note_teller(path, folded(detection.label, label_map), file, read)
            read.found.setdefault(path, []).append((place, detection))
        except ValueError as error:
            read.problems.append(f"{place}: {error}")
            note_unclear(entry.image, images, read)
            if entry.content is None:
                refused.add(entry.image)


def require_owner(path, own, read):
    """Raise ValueError where an image belongs to another file, or has another name in this one."""
    if read.owners.get(path, own) != own:
        other, _ = read.owners[path]
        raise ValueError(f"{escaped(path)} is in {escaped(other)} already; leave one out")


def require_first(path, file, read):
    """Raise ValueError where a file of many images has told of an image that is this file's."""
    for other in read.tellers.get(path, {}).values():
        if other != file:
            raise ValueError(f"{escaped(path)} is in {escaped(other)} already; leave one out")


def note_teller(path, label, file, read):
    """Note which file has an image's objects of a label; ValueError where another has them too."""
    other = read.tellers.setdefault(path, {}).setdefault(label, file)
    if other != file:
        raise ValueError(f"{escaped(other)} has {escaped(label)} of {escaped(path)}; leave one out")


def labels_of(detections):
    """The labels in {image: detections}, as a set."""
    labels = set()
    for own in detections.values():
        labels.update(one["label"] for one in own)
    return labels


def unknown_labels(labels, label_map):
    """A line for each label that a LabelMap does not know."""
    return [
        f"label '{escaped(label)}' is in no line of the label map; it stays as it is"
        for label in sorted(labels)
        if not label_map.knows(label)
    ]


def note_unclear(name, images, read):
    """Note that of the image of a name, or of all that it may mean, something was not read."""
    try:
        read.unclear.add(images.find(name))
    except ValueError:  # which is told
        read.unclear.update(images.like(name))


def _size_for(reader, path, images):
    """The size of an image; for a reader of map coordinates, its georeference."""
    if hasattr(reader, "georeference"):
        return reader.georeference(images.root / path)
    return images.size(path)


@without_collector()
def convert(options):
    """Write the detections in another program's files as our own; returns what was counted."""
    reader = READERS[options.format]
    names = read_names(options.names)
    if names is None and options.format in NUMBERED:
        raise ValueError(f"{options.format}: classes are numbers; give their names by --names FILE")
    hints = Hints(names=names, angle_version=options.angle_version)
    images = ImageFolder(options.images)
    files = input_files(options.input, reader.SUFFIX, options.names)
    label_map = read_label_map(options.labels or LABELS)
    read = read_files(files, reader, images, hints, label_map)

    limits = Limits(score=options.least_score, side=options.least_side, iou=options.nms)
    kept = {}
    below = suppressed = 0
    for path, own in Progress(read.found.items(), "convert", "images"):
        result = finished(own, label_map, limits)
        kept[path] = result.detections
        read.problems.extend(result.problems)
        if result.problems:
            read.unclear.add(path)
        below += result.below
        suppressed += result.suppressed
    if not options.skip_bad:
        remedy = "mend them, or leave them out by --skip-bad"
        require_none(read.problems, "entries cannot be read", remedy)
    # Nothing left of an image does not mean that nothing was found.
    unclear = [path for path in sorted(read.unclear) if not kept.get(path)]
    for path in unclear:
        kept.pop(path, None)
    told = kept.keys() | unclear
    unlisted = [path for path in images.paths if path not in told]
    # A file of many images that could not be read may hold any of them.
    as_empty = (options.unlisted or reader.UNLISTED) == "empty" and not read.lost
    if as_empty:
        kept.update({path: [] for path in unlisted})
    doubts = findings_of(kept, images)
    texts = {detection_name(path): text_of_detections(kept[path]) for path in sorted(kept)}
    written = write_texts(texts, options.out, options.overwrite)

    for line in [*unknown_labels(labels_of(kept), label_map), *doubts]:
        print(f"warning: {line}")
    counts = {
        "files": len(files),
        "images": len(images.paths),
        "written": written,
        "the_same_before": len(kept) - written,
        "others_in_out": len(set(files_below(options.out)) - set(texts)),
        "objects": sum(len(own) for own in kept.values()),
        "unlisted": len(unlisted),
        "unlisted_as": "empty" if as_empty else "missing",
        "below_threshold": below,
        "suppressed": suppressed,
        "bad": read.problems,
        "unclear": unclear,
    }
    _report_convert(counts, options)
    return counts


def _report_convert(counts, options):
    bad = counts["bad"]
    for line in first_lines(bad):
        print(f"left out: {line}")
    print(
        f"{options.format}: {counts['objects']} objects of {counts['files']} files; "
        f"{counts['unlisted']} of {counts['images']} images are in none, taken as "
        f"{counts['unlisted_as']}; {counts['below_threshold']} objects below a threshold, "
        f"{counts['suppressed']} suppressed, {len(bad)} entries left out as bad"
    )
    if counts["unclear"]:
        names = ", ".join(escaped(path) for path in counts["unclear"][:5])
        print(f"{len(counts['unclear'])} images get no file, as nothing sound is left: {names}")
    print(
        f"{escaped(options.out)}: {counts['written']} files written, {counts['the_same_before']} "
        f"were there already, {counts['others_in_out']} others stay"
    )
    if options.json:
        write_text(options.json, json.dumps(counts, indent=1) + "\n")


# ------------------------------------------------------------------ export


def export(options):
    """Write our files as another program's, the names of the classes beside them."""
    images = ImageFolder(options.images)
    found = read_folder(options.det_json, images)
    names = sorted(labels_of(found))
    sizes = {path: images.size(path) for path in found}
    if options.format in WRITERS_TOGETHER:
        writer = WRITERS_TOGETHER[options.format]
        texts = {writer.FILE: writer.written_together(found, sizes, names)}
    else:
        texts = _texts_by_image(found, sizes, names, options)
    written = write_texts(texts, options.out, options.overwrite)
    objects = sum(len(own) for own in found.values())
    print(
        f"{escaped(options.out)}: {objects} objects of {len(found)} images as {options.format}, "
        f"{written} of {len(texts)} files new; {len(images.paths) - len(found)} images have no "
        "file of detections and get none: come back with --unlisted missing"
    )


def require_no_numbers(detections, path):
    """Raise ValueError for a label that DOTA's lines could not tell from a number."""
    for one in detections:
        if is_number(one["label"]):
            raise ValueError(f"{escaped(path)}: label '{escaped(one['label'])}': a number; rename")


def _texts_by_image(found, sizes, names, options):
    """{file: text} of a format with a file an image."""
    writer = WRITERS[options.format]
    texts = {}
    for path, own in found.items():
        name = PurePosixPath(path).with_suffix(writer.SUFFIX)
        if options.format == "dota":
            require_no_numbers(own, path)
        if options.format == "dota" and name.name.startswith(RESULTS):
            raise ValueError(f"{escaped(path)}: DOTA would take its file for results; rename it")
        texts[name.as_posix()] = writer.written(own, sizes[path], names, options.scores)
    if options.format in NUMBERED:
        if NAMES_FILE in texts:
            raise ValueError(f"{NAMES_FILE} would be of an image and of the classes; rename one")
        for name in names:
            if name != " ".join(name.split()):
                raise ValueError(f"label {name!r}: no line of {NAMES_FILE} can hold it; rename it")
        texts[NAMES_FILE] = "".join(f"{name}\n" for name in names)
    return texts


# ------------------------------------------------------------------ check, draw


def check(options):
    """Print what is right and wrong with a folder; exit code 1 where there are errors."""
    report = check_folder(options.det_json, ImageFolder(options.images))
    missing, stray = report["images_without_file"], report["files_without_image"]
    print(
        f"{report['objects']} objects; of {report['images']} images {report['images_with_file']} "
        f"have a file, {report['images_with_objects']} an object"
    )
    for label, count in report["labels"].items():
        print(f"  {count:7d} {escaped(label)}")
    for what, names in (("images without a file", missing), ("files without an image", stray)):
        if names:
            more = ", ..." if len(names) > 5 else ""
            print(f"{len(names)} {what}: {', '.join(escaped(name) for name in names[:5])}{more}")
    for kind in ("warnings", "errors"):
        for line in first_lines(report[kind]):
            print(f"{kind.removesuffix('s')}: {line}")
    print(f"{len(report['errors'])} errors, {len(report['warnings'])} warnings")
    if options.json:
        write_text(options.json, json.dumps(report, indent=1) + "\n")
    if report["errors"]:
        raise SystemExit(1)


def draw(options):
    """Write a sheet of images that have objects, evenly over their order."""
    check_picture_name(options.out, "--out")
    images = ImageFolder(options.images)
    if any(
        Path(options.out).absolute() == (images.root / path).absolute() for path in images.paths
    ):
        raise ValueError(f"--out {escaped(options.out)}: one of the images; name another file")
    found = {path: own for path, own in read_folder(options.det_json, images).items() if own}
    if not found:
        raise ValueError(f"{escaped(options.det_json)}: no object in it that could be drawn")
    paths = list(found)
    count = min(options.count, len(paths))
    chosen = [paths[i * len(paths) // count] for i in range(count)]
    cells = [(path, open_image(images.root / path), found[path]) for path in chosen]
    save_picture(draw_sheet(cells), options.out)
    print(f"{escaped(options.out)}: {count} of {len(paths)} images with objects")


# ------------------------------------------------------------------ detect


def detect(options):
    """Run a detector over the images that have no file yet; returns what was counted."""
    label_map = read_label_map(options.labels or LABELS)
    images = ImageFolder(options.images)
    detector = OnnxDetector(options.model, options.device)
    side = options.window or min(detector.image_size)
    settings = Settings(
        side=side,
        overlap=side // 5 if options.overlap is None else options.overlap,
        scales=options.scales,
        least_score=options.least_score,
        most_overlap=options.nms,
        batch_size=options.batch_size,
    )
    if settings.overlap >= side:
        raise ValueError(f"--overlap {settings.overlap}: expected less than the window's {side}")
    files = {}
    for path in images.paths:
        file = Path(options.out) / detection_name(path)
        if options.again or not file.exists():
            files[images.root / path] = file
    for line in unknown_labels(set(detector.names), label_map):
        print(f"warning: {line}")
    written = write_found(detector, files, settings, label_map)
    counts = {
        "images": len(images.paths),
        "skipped": len(images.paths) - len(files),
        "written": written.images,
        "objects": written.objects,
        "left_out": written.left_out,
        "unreadable": written.unreadable,
    }
    _report_detect(counts, options)
    return counts


def _report_detect(counts, options):
    for line in first_lines(counts["left_out"]):
        print(f"left out: {line}")
    print(
        f"{escaped(options.out)}: {counts['objects']} objects of {counts['written']} images; "
        f"{counts['skipped']} of {counts['images']} images had a file and were skipped, "
        f"{len(counts['unreadable'])} cannot be read; {len(counts['left_out'])} boxes left out"
    )
    if options.json:
        write_text(options.json, json.dumps(counts, indent=1) + "\n")
    if not options.skip_unreadable:
        require_none(
            counts["unreadable"],
            "images cannot be read, all others are done",
            "mend these and repeat, or pass them over by --skip-unreadable",
        )
    for line in first_lines(counts["unreadable"]):
        print(f"warning: {line}")


# ------------------------------------------------------------------ the command


def main(arguments=None):
    options = parse(arguments)
    commands = {
        "convert": convert,
        "export": export,
        "check": check,
        "draw": draw,
        "detect": detect,
    }
    return commands[options.command](options)


if __name__ == "__main__":
    run(main)
