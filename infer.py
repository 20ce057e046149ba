"""Similarity of images and sentences: type a sentence, get the image, or the other way round.

    python infer.py                                    # the five images and sentences of test/
    python infer.py --images tiles/ --det-json det_json_of_tiles/ --queries "two ships" --top-k 5
    python infer.py --images "a/*.tif" b.png --queries sentences.txt --threshold 0.3 --csv hits.csv

Prints the score of every image and sentence: the cosine of their embeddings and, where the model
has it, the weighted object evidence (see evidence.py). Sentences stand by images, the best image of
each sentence marked, and a legend has the best sentence of each image and the best image of each
sentence. Of many images only the best for each sentence are listed.
"""

from options import answer_early

if __name__ == "__main__":
    answer_early("infer", __doc__)  # before torch is imported, which takes seconds

import glob
import json
import math
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from clip_gcn_image_feature_integration import (
    SAMPLES,
    detections_of,
    encode_files,
    encode_texts,
    load_model,
    pick_device,
    say_what_is_missing,
    warn_of_scenes,
)
from dataset.annotations import prepared_sentences, read_text
from dataset.batches import require_readable
from dataset.images import files_below, is_image, open_image, require_detection_folder
from dataset.statements import statements_of
from det_formats.drawing import draw_graph
from det_formats.measures import find
from escaping import escaped, require_utf8
from evidence import evidence_of, kind_names, of_checkpoint
from metrics.likelihood import reasons
from metrics.tables import write_csv
from model import latest_checkpoint
from options import parse_options, run
from T_Graph import build_text_graph
from V_Graph import build_graph
from writing import write_text, written_whole

WIDEST = 20  # images in a printed matrix; beyond, only the best are listed


def find_files(arguments):
    """(image files that files, folders and globs mean, their names for `match_detections`).

    Names are relative to the folder where one folder is given, which detections then mirror;
    otherwise whole paths, whose ends are matched. Raises ValueError with all arguments that mean no
    image.
    """
    paths = []
    empty = []
    for argument in arguments:
        found = _images_of(argument)
        if not found:
            empty.append(argument)
        paths += found
    if empty:
        wrong = ", ".join(empty)
        raise ValueError(f"--images {wrong}: no image file, folder or glob that has any")
    paths = list(dict.fromkeys(paths))  # each once, in the order given
    if len(arguments) == 1 and os.path.isdir(arguments[0]):
        names = [Path(path).relative_to(arguments[0]).as_posix() for path in paths]
    else:
        names = [Path(os.path.abspath(path)).as_posix() for path in paths]
    return paths, names


def _images_of(argument):
    """Paths of the image files that one argument means; a file is taken whatever its suffix."""
    if os.path.isfile(argument):
        return [argument]
    if os.path.isdir(argument):
        candidates = [str(Path(argument, path)) for path in files_below(argument)]
    else:
        candidates = glob.glob(argument, recursive=True)
    return sorted(path for path in candidates if is_image(path))


def read_queries(arguments):
    """Sentences given as strings, or as text files with one a line, blank lines aside."""
    queries = []
    for argument in arguments:
        if os.path.isfile(argument):
            lines = read_text(Path(argument)).splitlines()
            queries += [line.strip() for line in lines if line.strip()]
        elif argument.endswith(".txt"):
            raise ValueError(f"--queries {argument}: no such file")
        elif argument.strip():
            require_utf8(argument, "--queries")
            queries.append(argument.strip())
    if not queries:
        raise ValueError("--queries: expected a sentence or a text file with one a line")
    return queries


def require_enough(found, number, skip_unreadable):
    """Raise ValueError for unreadable files; where they are to be skipped, list them instead.

    found: a clip_gcn_image_feature_integration.EncodedFiles; number: of all files.
    """
    if not found.problems:
        return
    if not skip_unreadable:
        require_readable(found, remedy="infer.py --skip-unreadable leaves them out")
    count = f"{len(found.problems)} of {number} images are unreadable"
    if not found.readable:
        raise ValueError(f"{count}: none is left; the first: {found.problems[0]}")
    lines = [f"warning: {count} and left out:", *found.problems]
    print("\n  ".join(lines), file=sys.stderr)


def save_features(path, names, features):
    """Write names (R) and fused features (R, D) to an .npz file."""
    with written_whole(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, names=np.array(names), fused=features.numpy())


def ranking(scores, names, queries, top_k, threshold=-math.inf):
    """For each query its best images: [{"query", "images": [{"image", "score"}]}].

    scores: (queries, images). Only scores at or above the threshold count; equal ones stand in the
    order of the images.
    """
    values, indices = scores.sort(dim=1, descending=True, stable=True)
    result = []
    for q, query in enumerate(queries):
        hits = []
        for i, score in zip(indices[q, :top_k].tolist(), values[q, :top_k].tolist(), strict=True):
            if score >= threshold:
                hits.append({"image": names[i], "score": score})
        result.append({"query": query, "images": hits})
    return result


def best_of_images(scores, names, queries, threshold=-math.inf):
    """For each image its best query: [{"image", "query", "score"}].

    scores: (queries, images). Query and score are None where no score is at or above the threshold.
    """
    values, indices = scores.sort(dim=0, descending=True, stable=True)
    result = []
    for i, name in enumerate(names):
        score = values[0, i].item()
        if score >= threshold:
            result.append({"image": name, "query": queries[indices[0, i]], "score": score})
        else:
            result.append({"image": name, "query": None, "score": None})
    return result


def matrix_lines(scores, threshold=-math.inf):
    """The matrix (queries, images) as published.

    Each query's best image is marked with * where its score is at or above the threshold.
    """
    best = scores.sort(dim=1, descending=True, stable=True).indices[:, 0].tolist()
    heads = [f"Img{i + 1}" for i in range(scores.shape[1])]
    lines = [
        "Similarity Score Matrix (Text-Image):",
        " " * 10 + "".join(f"{head:>8s}" for head in heads),
    ]
    for q, row in enumerate(scores.tolist()):
        line = f"{f'Query {q + 1}:':10s}"
        for i, value in enumerate(row):
            mark = "*" if i == best[q] and value >= threshold else " "
            line += f"{value:7.2f}{mark}"
        lines.append(line.rstrip())
    return lines


def legend_lines(ranked, of_images, threshold=-math.inf):
    """What the columns and rows of the matrix are, each with its best match.

    ranked, of_images: as of `ranking` and `best_of_images`.
    """
    none = f"none at or above {threshold:g}"
    lines = ["Images with their best sentence, and queries with their best image (*):"]
    for i, entry in enumerate(of_images):
        best = none if entry["query"] is None else escaped(entry["query"])
        lines.append(f"  Img{i + 1}: {escaped(entry['image'])} -> {best}")
    for q, entry in enumerate(ranked):
        best = escaped(entry["images"][0]["image"]) if entry["images"] else none
        lines.append(f"  Query {q + 1}: {escaped(entry['query'])} -> {best}")
    return lines


def print_ranking(ranked, threshold=-math.inf):
    """Print every query with its best images, one a line."""
    for entry in ranked:
        print(f"\n{escaped(entry['query'])}")
        if not entry["images"]:
            print(f"  none at or above {threshold:g}")
        for place, hit in enumerate(entry["images"], start=1):
            print(f"  {place:3d}. {hit['score']:.3f} {escaped(hit['image'])}")


def begin_folder(path):
    """Make the folder of --explain; ValueError where that cannot be or holds pictures already."""
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--explain {escaped(path)}: no folder; name another one")
    if any(folder.glob("query-*.png")):
        raise ValueError(f"--explain {escaped(path)}: holds pictures already; name a new folder")
    folder.mkdir(parents=True, exist_ok=True)


def explain(query, hits, images, names, evidence, prefix):
    """Print what speaks for a query's hits (indices of Images) and against, and draw their objects.

    The pictures are prefix-1.png, -2.png ...; an image without a detection file has none.
    """
    kinds = kind_names(images.label_map)
    graph = build_text_graph(query, images.label_map)
    print(f"\nwhy: {escaped(query)}")
    if graph.graph["unknown"]:
        print(f"  matched by pixels only: {', '.join(graph.graph['unknown'])}")
    for place, i in enumerate(hits, start=1):
        print(f"  {place}. {escaped(names[i])}")
        if not images.has_file[i]:
            print("     no detection file")
            continue
        class_ids, boxes = images.boxes[i]
        one = find(class_ids, boxes, images.sizes[i], len(kinds))
        for reason in reasons(evidence.tables, one, statements_of(graph), kinds):
            print(f"     {evidence.weight * reason.evidence:+.3f} {escaped(reason.statement)}")
        found = [f"{n} {escaped(kinds[k])}" for k, n in sorted(Counter(class_ids.tolist()).items())]
        print(f"     detected: {', '.join(found) or 'nothing'}")
        objects = [
            {"label": kinds[kind], "bbox": box.tolist()}
            for kind, box in zip(class_ids, boxes, strict=True)
        ]
        picture = draw_graph(open_image(images.paths[i]), build_graph(objects, images.sizes[i]))
        with written_whole(f"{prefix}-{place}.png") as temporary:
            picture.save(temporary, format="PNG")


def pairs(ranked):
    """The rows of --csv, one for each query and image: {"query", "rank", "image", "score"}."""
    rows = []
    for entry in ranked:
        for rank, hit in enumerate(entry["images"], start=1):
            rows.append({"query": entry["query"], "rank": rank, **hit})
    return rows


def main(arguments=None):
    options = parse_options("infer", __doc__, arguments)
    det_json = options.det_json
    if options.images:
        paths, mirrored_names = find_files(options.images)
    else:
        paths, mirrored_names = find_files([str(SAMPLES)])
        det_json = det_json or SAMPLES.parent / "det_json"
    if det_json:
        require_detection_folder(det_json)  # before a model is loaded
    queries = read_queries(options.queries or [str(SAMPLES / "queries.txt")])
    if options.explain:
        begin_folder(options.explain)
    device = pick_device(options.device)
    checkpoint_path = options.checkpoint or latest_checkpoint()
    model, checkpoint = load_model(checkpoint_path, device, options.activation)
    if options.images:
        warn_of_scenes(checkpoint)
    evidence = of_checkpoint(checkpoint, options.evidence)
    if options.explain and evidence is None:
        raise ValueError("--explain: this model has no object evidence, or it is switched off")
    texts = prepared_sentences(queries, checkpoint["options"]["caption_form"])
    detections = detections_of(mirrored_names, det_json)
    found = encode_files(model, checkpoint, paths, detections, device, options.batch_size)
    require_enough(found, len(paths), options.skip_unreadable)
    mirrored_names = [mirrored_names[i] for i in found.readable]
    detections = [detections[i] for i in found.readable]
    if det_json and evidence is None and checkpoint["options"]["graph"] == "none":
        print("this model has no graph branch: detections change nothing")
    say_what_is_missing(found.images, mirrored_names, detections, det_json)
    scores = encode_texts(model, texts, device) @ found.features.T  # (queries, images)
    if evidence is not None:
        added = evidence_of(evidence.tables, found.images, queries)  # (images, queries)
        scores = scores + evidence.weight * torch.from_numpy(added).T
        print(f"scores are cosine + {evidence.weight:g} x object evidence")
    if not torch.isfinite(scores).all():
        raise ValueError(f"{checkpoint_path}: the model gives scores that are not finite")

    if options.images:
        names = [path.as_posix() for path in found.images.paths]  # as they were given
    else:
        names = [path.name for path in found.images.paths]
    if options.save_features:
        save_features(options.save_features, names, found.features)
    fits = len(names) <= WIDEST
    threshold = -math.inf if options.threshold is None else options.threshold
    top_k = options.top_k
    if not top_k and options.threshold is not None:
        top_k = len(names)  # all that reach it
    elif not top_k and not fits:
        top_k = 10
    ranked = ranking(scores, names, queries, top_k or 1, threshold)
    of_images = best_of_images(scores, names, queries, threshold)
    if fits:
        lines = [*matrix_lines(scores, threshold), "", *legend_lines(ranked, of_images, threshold)]
        print("\n".join(lines))
    if top_k:
        print_ranking(ranked, threshold)
    if options.explain:
        for q, query in enumerate(queries):
            reaching = len(ranked[q]["images"])  # as many as reach the threshold
            best = scores[q].sort(descending=True, stable=True).indices[:reaching].tolist()
            explain(query, best, found.images, names, evidence, f"{options.explain}/query-{q + 1}")
    if options.csv:
        all_ranked = ranking(scores, names, queries, len(names), threshold)
        write_csv(options.csv, ["query", "rank", "image", "score"], pairs(all_ranked))
    if options.json:
        content = {
            "images": names,
            "queries": queries,
            "scores": scores.tolist(),
            "best": ranked,
            "best_of_images": of_images,
        }
        write_text(options.json, json.dumps(content, indent=2) + "\n")
    return scores


if __name__ == "__main__":
    run(main)
