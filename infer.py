"""Similarity of images and sentences: type a sentence, get the image, or the other way round.

    python infer.py                                    # the five images and sentences of test/
    python infer.py --images tiles/ --det-json det_json_of_tiles/ --queries "two ships" --top-k 5
    python infer.py --images "a/*.tif" b.png --queries sentences.txt --csv matrix.csv

Prints the cosine of every image's fused and every sentence's text embedding, sentences by images,
the best image of each sentence marked, and a legend.
"""

from options import answer_early

if __name__ == "__main__":
    answer_early("infer", __doc__)  # before torch is imported, which takes seconds

import csv
import glob
import json
import os
from pathlib import Path

import torch

from clip_gcn_image_feature_integration import (
    SAMPLES,
    encode_images,
    encode_texts,
    load_images,
    load_model,
    pick_device,
    warn_of_scenes,
)
from dataset.annotations import prepared, read_text
from dataset.images import is_image
from model import latest_checkpoint
from options import parse_options, run

WIDEST = 20  # images in a printed matrix; beyond, only the best are listed


def find_files(arguments):
    """(image files that files, folders and globs mean, their names for `match_detections`).

    Names are relative to the folder where one folder is given, which detections then mirror;
    otherwise whole paths, whose ends are matched. Raises ValueError where an argument means no
    image.
    """
    paths = []
    for argument in arguments:
        found = _images_of(argument)
        if not found:
            raise ValueError(f"--images {argument}: no image file, folder or glob that has any")
        paths += found
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
        candidates = [str(path) for path in Path(argument).rglob("*")]
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
            queries.append(argument.strip())
    if not queries:
        raise ValueError("--queries: expected a sentence or a text file with one a line")
    return queries


def prepare(queries, options):
    """Sentences as the captions that the model was trained on: its options `clean`, `template`."""
    texts = [prepared(query, options["clean"], options["template"]) for query in queries]
    if "" in texts:
        query = queries[texts.index("")]
        raise ValueError(f"--queries '{query}': no word is left, cleaned as the model's captions")
    return texts


def matrix_lines(scores):
    """The matrix (queries, images) as published, each query's best image marked with *."""
    best = scores.sort(dim=1, descending=True, stable=True).indices[:, 0].tolist()
    heads = [f"Img{i + 1}" for i in range(scores.shape[1])]
    lines = [
        "Similarity Score Matrix (Text-Image):",
        " " * 10 + "".join(f"{head:>8s}" for head in heads),
    ]
    for q, row in enumerate(scores.tolist()):
        line = f"{f'Query {q + 1}:':10s}"
        for i, value in enumerate(row):
            mark = "*" if i == best[q] else " "
            line += f"{value:7.2f}{mark}"
        lines.append(line.rstrip())
    return lines


def ranking(scores, names, queries, top_k):
    """For each query its best images: [{"query", "images": [{"image", "score"}]}]."""
    values, indices = scores.sort(dim=1, descending=True, stable=True)
    result = []
    for q, query in enumerate(queries):
        best = zip(indices[q, :top_k].tolist(), values[q, :top_k].tolist(), strict=True)
        hits = [{"image": names[i], "score": score} for i, score in best]
        result.append({"query": query, "images": hits})
    return result


def print_matrix(scores, names, queries, ranked):
    """Print the matrix and what its rows and columns are."""
    print("\n".join(matrix_lines(scores)))
    print("\nImages, and queries with their best match (*):")
    for i, name in enumerate(names):
        print(f"  Img{i + 1}: {name}")
    for q, query in enumerate(queries):
        best = ranked[q]["images"][0]["image"]
        print(f"  Query {q + 1}: {query} -> {best}")


def print_ranking(ranked):
    """Print every query with its best images, one a line."""
    for entry in ranked:
        print(f"\n{entry['query']}")
        for place, hit in enumerate(entry["images"], start=1):
            print(f"  {place:3d}. {hit['score']:.3f} {hit['image']}")


def write_csv(path, scores, names, queries):
    """The matrix as a table: a row a query, a column an image."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["query", *names])
        for query, row in zip(queries, scores.tolist(), strict=True):
            writer.writerow([query, *(f"{value:.6f}" for value in row)])


def main(arguments=None):
    options = parse_options("infer", __doc__, arguments)
    device = pick_device(options.device)
    name = options.checkpoint or latest_checkpoint()
    model, checkpoint = load_model(name, device, options.activation)
    det_json = options.det_json
    if options.images:
        warn_of_scenes(checkpoint)
        paths, names = find_files(options.images)
    else:
        paths, names = find_files([str(SAMPLES)])
        det_json = det_json or SAMPLES.parent / "det_json"
    queries = read_queries(options.queries or [str(SAMPLES / "queries.txt")])
    images = load_images(paths, names, det_json, checkpoint)
    image_features = encode_images(model, images, device, options.batch_size)["fused"]
    texts = prepare(queries, checkpoint["options"])
    scores = encode_texts(model, texts, device) @ image_features.T  # (queries, images)
    if not torch.isfinite(scores).all():
        raise ValueError(f"{name}: the model gives scores that are not finite")

    if options.images:
        names = [Path(path).as_posix() for path in paths]  # as they were given
    top_k = options.top_k
    fits = len(names) <= WIDEST
    if not fits and not top_k:
        top_k = 10
    ranked = ranking(scores, names, queries, top_k or 1)
    if fits:
        print_matrix(scores, names, queries, ranked)
    if top_k:
        print_ranking(ranked)
    if options.csv:
        write_csv(options.csv, scores, names, queries)
    if options.json:
        content = {"images": names, "queries": queries, "scores": scores.tolist(), "best": ranked}
        Path(options.json).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return scores


if __name__ == "__main__":
    run(main)
