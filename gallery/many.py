"""The same indexing as `gallery.indexing`, on a cluster: stages of Ray Data.

    files -> tiles           tasks on CPUs, a file whole in one task
    tiles -> vectors, rows   actors that build the model once, a GPU each or a CPU each
    rows -> files of rows    tasks that write through lance-ray, where nobody sees them yet
    one commit               by the process that was started, so that readers see all or nothing

Ray does the scheduling: it restarts what dies and does its share again. A file of rows that was
written by a worker that died is in no commit, and `table.tidy` removes it.

Images and index have to lie where all machines see them under one path; the code and the model
travel with the work. Ray and lance-ray are optional: pip install -r requirements-ray.txt
"""

import logging
import os
import pickle
import socket
import time
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from backbones.towers import without_numbers
from clip_gcn_image_feature_integration import image_settings
from dataset.batches import Images
from gallery import indexing, table
from gallery.reading import tiles_of_file
from model import build
from progress import Progress

INSTALL = "pip install -r requirements-ray.txt"
ROOT = Path(__file__).parent.parent

PORTION = 2**36  # bytes of images, about, between two commits: a kill costs no more
FILES = 256  # images that a task reads: what a dead one costs
MEMORY = 2**30  # bytes that Ray sets aside for such a task
READS = 4  # batches that an actor takes at once
ROWS = 2**16  # of a file that is written


# ------------------------------------------------------------------ the cluster


@contextmanager
def cluster(address, **settings):
    """Ray, started on this machine for "local", else the running cluster at an address.

    settings: further arguments of `ray.init`. At the end Ray is left, and a local one stopped.
    Raises ValueError where Ray is not installed or no cluster answers.
    """
    try:
        import lance_ray  # noqa: F401  here, so that it is missed before any work is done
        import ray
    except ImportError:
        raise ValueError(f"--ray: needs Ray Data and lance-ray: {INSTALL}") from None
    runtime = {"working_dir": str(ROOT), "excludes": _not_code()}
    try:
        if address not in ("local", "auto"):
            _require_answer(address)
        ray.init(address=address, runtime_env=runtime, logging_level="warning", **settings)
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--ray {address}: no cluster answers ({reason})") from None
    try:
        yield
    finally:
        ray.shutdown()


def _require_answer(address):
    """Raise OSError or ValueError where nothing listens at host:port; Ray waits for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in host:  # ray:// is of Ray's client, which is none
        raise ValueError("expected auto or HOST:PORT")
    socket.create_connection((host, int(port)), timeout=10).close()


def _not_code():
    """What does not go to the workers: images and indexes may lie beside the code."""
    names = []
    for one in ROOT.iterdir():
        if one.suffix != ".py" and not (one / "__init__.py").is_file():
            names.append(f"/{one.name}")
    return names


def pick_device(name):
    """The device of the workers, "cuda" or "cpu", that auto, cpu or cuda means.

    Raises ValueError for cuda where the cluster has no GPU.
    """
    if name == "cuda" and not _count("GPU"):
        raise ValueError("--device cuda: the cluster has no GPU; use --device auto")
    return "cuda" if name != "cpu" and _count("GPU") else "cpu"


def pick_precision(name, device):
    """As `indexing.pick_precision`, on a worker: this machine may be of another kind."""
    import ray

    pick = ray.remote(indexing.pick_precision).options(num_gpus=_gpus(device))
    return ray.get(pick.remote(name, device))


def _count(kind):
    import ray

    return int(ray.cluster_resources().get(kind, 0))


def _gpus(device):
    """How many GPUs an actor holds."""
    return 1 if device == "cuda" else 0


# ------------------------------------------------------------------ what the stages do


class Decoder:
    """Tiles of files. Reads go pickled: with their boxes and pixels as they are."""

    def __init__(self, cut):
        self.cut = cut

    def __call__(self, batch):
        import pyarrow as pa

        for packed in batch["file"].to_pylist():
            file, stamp = pickle.loads(packed)
            for read in tiles_of_file(file, self.cut):
                yield pa.table({"read": pa.array([pickle.dumps((read, stamp))], pa.binary())})


class Encoder:
    """Rows of tiles, in an actor that builds the model once.

    Beside the columns of the index there are `_empty` and `_problem`, which belong to the end of a
    file: a row with these and the path alone.
    """

    def __init__(self, packed, settings, schema, device, batch_size):
        """packed: a reference to what `_packed` makes."""
        import ray

        self.model, checkpoint = _unpacked(ray.get(packed), device)
        self.graphs = Images([], [], [], **image_settings(checkpoint))
        self.settings = settings
        self.schema = schema
        self.device = device
        self.batch_size = batch_size

    def __call__(self, batch):
        import pyarrow as pa

        pairs = [pickle.loads(packed) for packed in batch["read"].to_pylist()]
        precision = indexing.PRECISIONS[self.settings.precision]
        encoded = indexing.encode(
            [read for read, _ in pairs],
            self.graphs,
            self.model,
            self.device,
            self.batch_size,
            precision,
        )
        files = []
        ends = []
        for (read, vector), (_, stamp) in zip(encoded, pairs, strict=True):
            if read.window is None:
                ends.append(read)
            else:
                files.append((read.file.name, stamp, [indexing.tile_of(read, vector)]))
        rows = table.rows_of(files, self.settings)
        return pa.concat_tables([_with_ends(rows), _ends_of(ends, rows.schema)])


def _with_ends(rows):
    """Rows with the columns of ends, which are null."""
    import pyarrow as pa

    rows = rows.append_column("_empty", pa.nulls(len(rows), pa.int64()))
    return rows.append_column("_problem", pa.nulls(len(rows), pa.string()))


def _ends_of(reads, schema):
    """Rows of the ends of files: all columns of the index but for the path are null."""
    import pyarrow as pa

    columns = {field.name: pa.nulls(len(reads), field.type) for field in schema}
    columns["path"] = pa.array([read.file.name for read in reads], pa.string())
    rows = pa.Table.from_arrays(list(columns.values()), schema=schema)
    rows = rows.append_column("_empty", pa.array([read.empty for read in reads], pa.int64()))
    return rows.append_column("_problem", pa.array([read.problem for read in reads], pa.string()))


class Report(NamedTuple):
    """What a worker has written."""

    written: object  # a Written, or None
    done: int  # files that ended well
    empty: int  # windows without data in these
    problems: dict  # {name: line} of the other files that ended


class Written(NamedTuple):
    """Rows that no commit knows yet."""

    fragments: list  # lance.FragmentMetadata
    paths: set
    tiles: int
    objects: int


class Writer:
    """Reports of rows, which it writes beside the index."""

    def __init__(self, uri, schema, version):
        """uri: of the Lance table; version: of its files."""
        self.uri = uri
        self.schema = schema
        self.version = version

    def __call__(self, batch):
        import pyarrow as pa
        import pyarrow.compute as pc

        is_end = batch["_empty"].is_valid()
        rows = batch.filter(pc.invert(is_end)).select(self.schema.names)
        ends = batch.filter(is_end)
        problems = ends.filter(ends["_problem"].is_valid())
        report = Report(
            written=self.write(rows) if len(rows) else None,
            done=len(ends) - len(problems),
            empty=pc.sum(ends["_empty"]).as_py() or 0,
            problems=dict(
                zip(problems["path"].to_pylist(), problems["_problem"].to_pylist(), strict=True)
            ),
        )
        return pa.table({"report": pa.array([pickle.dumps(report)], pa.binary())})

    def write(self, rows):
        """The Written of some rows, at least one."""
        import pyarrow.compute as pc
        from lance_ray import LanceFragmentWriter

        write = LanceFragmentWriter(self.uri, schema=self.schema, data_storage_version=self.version)
        fragments = write(rows.cast(self.schema))["fragment"].to_pylist()
        return Written(
            fragments=[pickle.loads(fragment) for fragment in fragments],
            paths=set(rows["path"].to_pylist()),
            tiles=len(rows),
            objects=pc.sum(rows["objects"]).as_py(),
        )

    def without(self, written, paths):
        """A Written once more, without the rows of some paths; None if none is left."""
        import pyarrow as pa
        import pyarrow.compute as pc
        from lance.file import LanceFileReader

        parts = []
        for fragment in written.fragments:
            for file in fragment.files:
                reader = LanceFileReader(f"{self.uri}/data/{file.path}")
                parts.append(reader.read_all().to_table())
        rows = pa.concat_tables(parts)
        rows = rows.filter(pc.invert(pc.is_in(rows["path"], pa.array(list(paths), pa.string()))))
        return self.write(rows) if len(rows) else None


def _packed(model, checkpoint):
    """A model as it goes to the workers: what `build` takes, and its weights.

    Not a path of a checkpoint: so all workers have the weights of the digest that the index names,
    and need neither that file nor a download.
    """
    weights = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    own = {name: checkpoint[name] for name in ("definition", "labels", "options")}
    return weights, own


def _unpacked(packed, device):
    """(model, checkpoint) of what `_packed` made."""
    weights, checkpoint = packed
    with without_numbers():
        model = build(checkpoint["definition"], checkpoint["labels"], checkpoint["options"])
    copies = {name: tensor.clone() for name, tensor in weights.items()}  # shared ones are read-only
    model.load_state_dict(copies, assign=True)
    return model.to(torch.device(device)).eval(), checkpoint


# ------------------------------------------------------------------ the whole


def update(own_table, settings, todo, model, checkpoint, device, batch_size):
    """Bring an index up to a Plan, within a `cluster`; returns the indexing.Done."""
    import ray

    table.remove(own_table, todo.gone)
    begin = time.monotonic()
    packed = ray.put(_packed(model, checkpoint))
    stages = _Stages(own_table, settings, packed, checkpoint, device, batch_size)
    run = _Run(own_table, stages)
    files = run.files(_portions(todo), todo.stamps, todo.known)
    for _ in Progress(files, "index", "images", total=len(todo.todo)):
        pass
    return indexing.Done(
        files=run.done,
        tiles=run.tiles,
        empty=run.empty,
        removed=len(todo.gone),
        same=todo.same,
        problems=[
            *todo.problems,
            *(run.problems[one.name] for one in todo.todo if one.name in run.problems),
        ],
        seconds=time.monotonic() - begin,
        objects=run.objects,
    )


def _portions(todo):
    """Lists of the Files that are to be done; each list becomes one commit."""
    portion = []
    size = 0
    for file in todo.todo:
        portion.append(file)
        size += todo.stamps[file.name].bytes
        if size >= PORTION:
            yield portion
            portion = []
            size = 0
    if portion:
        yield portion


class _Stages:
    """Files to Reports, by Ray Data."""

    def __init__(self, own_table, settings, packed, checkpoint, device, batch_size):
        dataset = own_table.to_lance()
        uri = dataset.uri if "://" in dataset.uri else os.path.abspath(dataset.uri)
        self.writer = Writer(uri, dataset.schema, dataset.data_storage_version)
        self._decoder = Decoder(indexing.cut_of(settings, checkpoint))
        self._arguments = (packed, settings, dataset.schema, device, batch_size)
        self._batch_size = batch_size
        self._device = device
        self._is_cut = settings.tile is not None

    def reports(self, files, stamps):
        """Yield the Report of everything that is written of some Files."""
        import ray

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False  # there is ours
        context.issue_detectors_config.detectors = []
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        blocks = min(len(files), max(200, len(files) // FILES))
        if self._is_cut:
            blocks = len(files)  # a scene is work enough for a task
        items = [{"file": pickle.dumps((_absolute(one), stamps[one.name]))} for one in files]
        reads = ray.data.from_items(items, override_num_blocks=blocks).map_batches(
            self._decoder,
            batch_size=None,
            batch_format="pyarrow",
            memory=MEMORY,  # without it Ray joins this stage with the actors' on CPUs
        )
        rows = reads.map_batches(
            Encoder,
            fn_constructor_args=self._arguments,
            batch_size=READS * self._batch_size,
            batch_format="pyarrow",
            num_gpus=_gpus(self._device),
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=self._actors()),
        )
        written = rows.map_batches(self.writer, batch_size=ROWS, batch_format="pyarrow")
        for row in written.iter_rows():
            yield pickle.loads(row["report"])

    def _actors(self):
        """How many models there are at most: one a GPU, or on three of four CPUs."""
        if self._device == "cuda":
            return _count("GPU")
        return max(1, 3 * _count("CPU") // 4)


def _absolute(file):
    """A File by paths that do not depend on where a process runs."""
    detections = file.detections and os.path.abspath(file.detections)
    return file._replace(path=Path(os.path.abspath(file.path)), detections=detections)


class _Run:
    """Commits portions and counts what was done."""

    def __init__(self, own_table, stages):
        self.table = own_table
        self.stages = stages
        self.done = self.tiles = self.empty = self.objects = 0
        self.problems = {}  # {name: line}

    def files(self, portions, stamps, known):
        """Do all; gives something for each file that is done. known: paths in the index."""
        for portion in portions:
            written = []
            problems = {}
            for report in self.stages.reports(portion, stamps):
                if report.written is not None:
                    written.append(report.written)
                problems.update(report.problems)
                self.done += report.done
                self.empty += report.empty
                yield from range(report.done + len(report.problems))
            self._commit(written, problems, [one.name for one in portion if one.name in known])
            self.problems.update(problems)

    def _commit(self, written, problems, replaced):
        """Put in what was written, without files with a problem, for the rows of `replaced`."""
        whole = []
        for one in written:
            if not one.paths.isdisjoint(problems):  # a scene that broke off after some tiles
                one = self.stages.writer.without(one, problems)
            if one is not None:
                whole.append(one)
        self.tiles += sum(one.tiles for one in whole)
        self.objects += sum(one.objects for one in whole)
        fragments = [fragment for one in whole for fragment in one.fragments]
        table.put_fragments(self.table, fragments, replaced)
