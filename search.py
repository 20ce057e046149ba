"""Search your own imagery: sentences to tiles, with the objects marked.

    python search.py index tiles/ --out tiles.index --det-json det_json/
    python search.py query tiles.index "two planes beside a hangar" --html report.html
    python search.py serve tiles.index
    python search.py duplicates tiles.index
    python search.py classify tiles.index classes.txt --csv classes.csv
    python search.py export tiles.index --geoparquet tiles.parquet

`gallery/README.md` has all of it: large scenes, filters, maps, how fast it is. An index needs
LanceDB: pip install -r requirements-search.txt
"""

from options import end, parse_command

COMMANDS = {  # and what each is for, in --help
    "index": "encode a folder of images, or what is new in it",
    "query": "find tiles by a sentence, an image, a vector",
    "serve": "a page in the browser, on this machine",
    "export": "embeddings and footprints as GeoParquet",
    "duplicates": "tiles that are nearly the same, here or in another index",
    "classify": "the class of each tile, from a list of classes",
}


def parse(arguments=None):
    """The options of a command, its name among them; see `options.parse_command`."""
    return parse_command("search", __doc__, COMMANDS, arguments)


if __name__ == "__main__":
    try:
        parse()  # --help and mistakes are answered before torch is imported
    except ValueError as error:
        end(error)

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch

import clip
from clip_gcn_image_feature_integration import load_model, pick_device, warn_of_scenes
from dataset.annotations import read_text
from dataset.folders import first_lines
from escaping import escaped
from gallery import groups, many, output, table
from gallery.geoparquet import write_geoparquet
from gallery.indexing import digest_of, pick_precision, plan, update
from gallery.ranking import Query
from gallery.rasters import reading_of
from gallery.searching import Filter, Search
from metrics.tables import write_csv
from model import latest_checkpoint
from options import run
from writing import write_text

SHOWN = 5  # tiles of a group of duplicates that a line names

# ------------------------------------------------------------------ index


def index(options):
    """Bring an index up to date with a folder; 1 where there was work and all of it failed."""
    table.require_own(options.out)
    if not Path(options.images).is_dir():
        raise ValueError(f"{escaped(options.images)}: no such folder")
    reading_of(options.bands, options.stretch)
    if options.tile is not None and options.overlap is None:
        options.overlap = options.tile // 4
    if options.tile is not None and options.overlap >= options.tile:
        raise ValueError(f"--overlap {options.overlap}: expected less than --tile {options.tile}")
    if options.ray is None:
        return _index(options, pick_device(options.device))
    with many.cluster(options.ray):
        return _index(options, many.pick_device(options.device))


def _index(options, device):
    """As `index`, once there is something that computes; device: of this process or of workers."""
    by_ray = options.ray is not None
    name = options.checkpoint or latest_checkpoint()
    model, checkpoint = load_model(name, "cpu" if by_ray else device, options.activation)
    if checkpoint["options"]["graph"] == "published":
        raise ValueError(
            f"{escaped(name)}: the published graph branch gives all images of a batch one vector, "
            "which no index can hold; take another model"
        )
    warn_of_scenes(checkpoint)
    pick = many.pick_precision if by_ray else pick_precision
    settings = _settings(options, name, model, checkpoint, pick(options.precision, device))
    with table.writing(options.out):
        own_table = None
        known = {}
        if table.exists(options.out):
            own_table, before = table.open_index(options.out)
            table.require_same(options.out, before, settings)
            known = table.stamps(own_table)
        todo = plan(options.images, options.det_json, known)
        if own_table is None:
            own_table = table.create(options.out, settings)
        encoder = (model, checkpoint, device, options.batch_size)
        if by_ray:
            done = many.update(own_table, settings, todo, *encoder)
        else:
            done = update(own_table, settings, todo, *encoder, options.workers)
        table.tidy(own_table, options.keep_versions)
        rows = own_table.count_rows()
    _say_done(done, rows, options)
    return 1 if done.problems and not done.files and not done.same else 0


def _settings(options, name, model, checkpoint, precision):
    """The table.Settings that the options mean."""
    is_file = not clip.is_clip_source(name)
    return table.Settings(
        images=os.path.abspath(options.images),
        checkpoint=os.path.abspath(name) if is_file else name,
        digest=digest_of(model, checkpoint),
        labels=list(checkpoint["labels"]),
        width=int(model.text_projection.shape[1]),
        precision=precision,
        tile=options.tile,
        overlap=options.overlap,
        bands=options.bands,
        stretch=options.stretch,
    )


def _say_done(done, rows, options):
    """Print what an indexing did, unreadable files last, and write it to --json."""
    rate = done.tiles / done.seconds if done.tiles else 0
    line = (
        f"{options.out}: {rows} tiles; {done.files} images encoded to {done.tiles} tiles with "
        f"{done.objects} objects in {done.seconds:.1f} s, {rate:.0f} tiles/s; {done.same} as they "
        f"were, {done.removed} gone"
    )
    if done.empty:
        line += f"; {done.empty} windows without data left out"
    print(line)
    if done.problems:
        print(f"{len(done.problems)} images could not be read and are not in the index:")
        for problem in first_lines(done.problems):
            print(f"  {problem}")
    if options.json:
        content = {"rows": rows, **done._asdict(), "options": vars(options)}
        write_text(options.json, json.dumps(content, indent=1) + "\n")


# ------------------------------------------------------------------ query


def query(options):
    """Print the best tiles of each query, and write what is asked for."""
    sentences = _sentences(options)
    chosen = Filter(
        where=options.where,
        near=options.near and tuple(options.near),
        within=options.within,
        bbox=options.bbox and tuple(options.bbox),
    )
    search = _open(options, evidence=options.evidence, images=options.images)
    chosen.sql(search.settings)  # a mistake in it is told before anything is read
    queries = _queries(options, sentences, search)
    answers = search.answers(queries, chosen, options.top_k, approximate=options.ann)
    for answer in answers:
        print(f"\n{escaped(output.query_name(answer['query']))}")
        print("\n".join(output.table_lines(answer)))
    if options.json:
        content = {"index": options.gallery, "answers": answers, "options": vars(options)}
        write_text(options.json, json.dumps(content, indent=1) + "\n")
    if options.csv:
        output.write_csv_rows(options.csv, answers)
    if options.geojson:
        left_out = output.write_geojson(options.geojson, answers)
        if left_out:
            print(f"{options.geojson}: without {left_out} tiles whose place is not known")
    if options.html:
        from gallery.report import write_report

        write_report(options.html, answers, search.picture)


def _lines(path, option):
    """The lines of a text file that are not blank."""
    if not Path(path).is_file():
        raise ValueError(f"{option} {escaped(path)}: no such file")
    lines = read_text(Path(path)).splitlines()
    return [line.strip() for line in lines if line.strip()]


def _sentences(options):
    """The sentences that the options name; [None] where a query has none."""
    if options.queries is not None:
        if options.text is not None:
            raise ValueError("--queries: names a file of sentences; leave the sentence out")
        sentences = _lines(options.queries, "--queries")
        if not sentences:
            raise ValueError(f"{escaped(options.queries)}: no sentence in it")
        return sentences
    if options.text is None and options.image is None and options.vector is None:
        raise ValueError("nothing to look for: give a sentence, --queries, --image or --vector")
    return [options.text]


def _queries(options, sentences, search):
    """The ranking.Query of each sentence, or None, and the other options."""
    image_vector = vector = None
    if options.image is not None:
        image_vector = search.encode_image(options.image, options.image_detections)
    if options.vector is not None:
        vector = _read_vector(options.vector, search.settings.width)
    others = {
        "image": options.image,
        "image_vector": image_vector,
        "vector": vector,
        "weights": options.weights and tuple(options.weights),
        "without": getattr(options, "not"),
    }
    return [Query(text=text, **others) for text in sentences]


def _read_vector(path, width):
    """An embedding (D) from a .npy file; ValueError where it is none."""
    shown = escaped(path)
    try:
        vector = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"--vector {shown}: not a .npy file ({error})") from None
    good = isinstance(vector, np.ndarray) and vector.shape == (width,) and vector.dtype.kind == "f"
    if not good or not np.isfinite(vector).all() or not vector.any():
        raise ValueError(f"--vector {shown}: expected {width} finite numbers, not all 0")
    return vector


def _open(options, **settings):
    """The Search of an index, as the options say."""
    device = pick_device(options.device)
    return Search(
        options.gallery,
        device,
        checkpoint=options.checkpoint,
        activation=options.activation,
        **settings,
    )


# ------------------------------------------------------------------ serve


def serve(options):
    """Answer queries in the browser until it is stopped."""
    from gallery.app import start

    search = _open(options, evidence=options.evidence, images=options.images)
    start(search, options.port)


# ------------------------------------------------------------------ the whole index


def export(options):
    """Write embeddings and footprints for other programs."""
    own_table, _ = table.open_index(options.gallery)
    if Path(options.gallery).resolve() in Path(options.geoparquet).resolve().parents:
        raise ValueError(f"--geoparquet {escaped(options.geoparquet)}: lies in the index")
    names = ("id", "path", "left", "top", "width", "height", "modified", "lat", "lon", "footprint")
    batches = table.read_in_batches(own_table, [*names, "vector"])
    written, without = write_geoparquet(options.geoparquet, batches)
    print(f"{options.geoparquet}: {written} tiles, {without} without a footprint")


def duplicates(options):
    """List groups of tiles that are nearly the same, or tiles that stand in two indexes."""
    ids, vectors, settings = _vectors(options.gallery)
    if options.against is not None:
        if os.path.realpath(options.against) == os.path.realpath(options.gallery):
            raise ValueError("--against: the same index; leave it out to find its duplicates")
        _matches(options, ids, vectors, settings)
        return
    found = groups.near_duplicates(vectors, options.threshold)
    inside = sum(len(group) for group in found)
    print(f"{len(found)} groups with {inside} of {len(ids)} tiles, cosine {options.threshold:g}")
    rows = []
    for number, group in enumerate(found, start=1):
        for row in group:
            rows.append({"group": number, "tile": ids[row]})
    lines = [_group_line([ids[row] for row in group]) for group in found]
    for line in first_lines(lines):
        print(f"  {line}")
    if options.csv:
        write_csv(options.csv, ["group", "tile"], rows)
    _write_json(options, {"groups": [[ids[row] for row in group] for group in found]})


def _group_line(names):
    """A group of tiles on the terminal: the first names, and how many more there are."""
    line = " = ".join(escaped(name) for name in names[:SHOWN])
    return line if len(names) <= SHOWN else f"{line} = {len(names) - SHOWN} more"


def _matches(options, ids, vectors, settings):
    """List tiles of another index that stand in this one, by their content."""
    other_ids, other_vectors, others = _vectors(options.against)
    if settings.digest != others.digest:
        raise ValueError(
            f"--against {escaped(options.against)}: made with another checkpoint, "
            f"{others.digest}, not {settings.digest}"
        )
    pairs, number = groups.matches(vectors, other_vectors, options.threshold)
    rows = [
        {"tile": ids[i], "other": other_ids[j], "cosine": round(cosine, 4)}
        for i, j, cosine in pairs
    ]
    distinct = len({row["other"] for row in rows})
    print(
        f"{distinct} of {len(other_ids)} tiles of {escaped(options.against)} stand here too, "
        f"cosine {options.threshold:g}"
    )
    lines = [f"{r['cosine']:.3f} {escaped(r['other'])} = {escaped(r['tile'])}" for r in rows]
    for line in first_lines(lines):
        print(f"  {line}")
    if options.csv:
        write_csv(options.csv, ["tile", "other", "cosine"], rows)
    if number > len(pairs):
        print(f"the best {len(pairs)} of {number} pairs; the others are of the same tiles")
    _write_json(options, {"pairs": rows, "all_pairs": number})


def _vectors(folder):
    """(ids, vectors (R, D), Settings) of an index."""
    own_table, settings = table.open_index(folder)
    arrow = table.read(own_table, ["id", "vector"])
    vectors = table.vectors_of(arrow["vector"])
    return arrow["id"].to_pylist(), vectors, settings


def _write_json(options, content):
    if options.json:
        content = {**content, "options": vars(options)}
        write_text(options.json, json.dumps(content, indent=1) + "\n")


def classify(options):
    """Write the class of each tile; where folders are classes, say how many are right."""
    for prompt in options.prompt:
        if "{}" not in prompt:
            raise ValueError(f"--prompt '{escaped(prompt)}': no {{}} for the class in it")
    classes = list(dict.fromkeys(_lines(options.labels, "LABELS")))
    if len(classes) < 2:
        raise ValueError(f"{escaped(options.labels)}: expected two classes or more, one a line")
    search = _open(options, evidence="off")
    sentences = [prompt.replace("{}", name) for name in classes for prompt in options.prompt]
    vectors = torch.stack([one.vector for one in search.engine.sentences(sentences)])
    by_class = vectors.unflatten(0, (len(classes), len(options.prompt)))  # (classes, prompts, D)
    arrow = table.read(search.table, ["id", "path", "vector"])
    features = table.vectors_of(arrow["vector"])
    best, scores, margins = groups.zero_shot(features, groups.mean_over_prompts(by_class))
    rows = []
    columns = zip(
        arrow["id"].to_pylist(), best.tolist(), scores.tolist(), margins.tolist(), strict=True
    )
    for tile, number, score, margin in columns:
        rows.append({"tile": tile, "class": classes[number], "score": score, "margin": margin})
    print(f"{len(rows)} tiles in {len({row['class'] for row in rows})} of {len(classes)} classes")
    true = [Path(path).parent.name for path in arrow["path"].to_pylist()]
    content = {"tiles": rows}
    strange = sorted(set(true) - set(classes))
    if strange:
        print(f"folders are not compared with classes: '{escaped(strange[0])}' is none")
    else:
        found = groups.accuracy(true, [row["class"] for row in rows])
        content["accuracy"] = found
        share = f"{100 * found['accuracy']:.1f} %"
        print(f"folders are named by classes: {share} right, {found['right']} of {found['of']}")
    if options.csv:
        write_csv(options.csv, ["tile", "class", "score", "margin"], rows)
    _write_json(options, content)


# ------------------------------------------------------------------ the command


def main(arguments=None):
    options = parse(arguments)
    commands = {
        "index": index,
        "query": query,
        "serve": serve,
        "export": export,
        "duplicates": duplicates,
        "classify": classify,
    }
    try:
        return commands[options.command](options)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        if "lance" not in reason.lower() or options.debug:
            raise
        raise ValueError(f"the index cannot be read ({reason}); make it anew") from None


if __name__ == "__main__":
    run(lambda: sys.exit(main()))
