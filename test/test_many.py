"""gallery/many.py: on a local Ray of two workers an index has the same rows as the plain run's."""

import os
import signal
import sys

import numpy as np
import pytest

from conftest import box, write_detections, write_image

pytestmark = pytest.mark.slow
pytest.importorskip("lancedb")
pytest.importorskip("lance_ray")
ray = pytest.importorskip("ray")
rasterio = pytest.importorskip("rasterio")

from clip_gcn_image_feature_integration import load_model  # noqa: E402
from gallery import indexing, many, table  # noqa: E402

PLACE = rasterio.Affine(10, 0, 0, 0, -10, 0)  # rasterio warns of images without one


@pytest.fixture(scope="module")
def two_workers():
    """A Ray of two CPUs for the tests of this file, and nothing of it afterwards."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers know no tests
    small = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": 150 * 2**20}
    with many.cluster("local", **small):
        yield


@pytest.fixture
def images(tmp_path):
    """30 images, ten of them with a ship; a file that is no image, a scene that breaks off."""
    folder = tmp_path / "images"
    for number in range(30):
        write_image(folder / f"{number % 3}" / f"{number:02d}.png", (70, 50))
        if number % 3 == 0:
            boxes = [box(20 + number, 30.5, angle=0.3)]
            write_detections(tmp_path / "det_json" / "0" / f"{number:02d}.json", boxes)
    (folder / "broken.png").write_bytes(b"no image")
    write_scene(folder / "scene.tif")
    os.truncate(folder / "scene.tif", 3 * 64 * 64 * 3)  # of its four blocks not the last
    return folder


def write_scene(path):
    """A TIFF of 128 x 128 pixels of noise, in blocks of 64 x 64."""
    noise = np.random.default_rng(0).integers(0, 256, (3, 128, 128), dtype=np.uint8)
    shape = {"count": 3, "height": 128, "width": 128, "dtype": "uint8", "transform": PLACE}
    blocks = {"tiled": True, "blockxsize": 64, "blockysize": 64, "interleave": "pixel"}
    with rasterio.open(path, "w", driver="GTiff", photometric="rgb", **shape, **blocks) as scene:
        scene.write(noise)


class Index:
    """An index of these images, by the plain run or by Ray."""

    def __init__(self, folder, images, checkpoint, tile):
        self.images = images
        self.model, self.checkpoint = load_model(checkpoint, "cpu")
        self.settings = table.Settings(
            images=str(images),
            checkpoint="tiny.pth",
            digest="0",
            labels=list(self.checkpoint["labels"]),
            width=32,
            precision="fp32",
            tile=tile,
            overlap=None if tile is None else 8,
            bands=None,
            stretch=None,
        )
        self.table = table.create(folder, self.settings)

    def update(self, run, *more):
        det_json = self.images.parent / "det_json"
        todo = indexing.plan(self.images, det_json, table.stamps(self.table))
        return run(self.table, self.settings, todo, self.model, self.checkpoint, "cpu", 4, *more)

    def plainly(self):
        return self.update(indexing.update, 1)

    def by_ray(self):
        return self.update(many.update)

    def rows(self):
        """(all columns but the vectors, vectors (R, 32)) in the order of ids."""
        rows = table.read(self.table, self.table.schema.names).sort_by("id")
        return rows.drop_columns("vector"), table.vectors_of(rows["vector"])


@pytest.fixture
def pair(tmp_path, images, save_tiny):
    """Two empty indexes of the same images: pair(tile=32)."""

    def make(tile=None):
        checkpoint = save_tiny("tiny.pth")
        names = ("plain", "ray")
        return [Index(tmp_path / name, images, checkpoint, tile) for name in names]

    return make


def require_equal(plain, by_ray):
    (expected, expected_vectors), (found, vectors) = plain.rows(), by_ray.rows()
    assert found.schema.equals(expected.schema, check_metadata=True)
    assert found.to_pylist() == expected.to_pylist()
    np.testing.assert_allclose(vectors, expected_vectors, rtol=0, atol=1e-6)


def counts_of(done):
    """A Done without its seconds."""
    return done._replace(seconds=0)


def test_only_what_changed_is_encoded_and_each_portion_is_one_commit(
    two_workers, pair, images, monkeypatch
):
    monkeypatch.setattr(many, "PORTION", 30_000)  # bytes: of scene.tif with those before it
    plain, by_ray = pair()
    for index in (plain, by_ray):
        index.plainly()
    write_image(images / "0" / "00.png", (64, 64))  # another size, with the same objects
    write_image(images / "new.png")
    (images / "1" / "01.png").write_bytes(b"broken now")
    (images / "2" / "02.png").unlink()
    before = by_ray.table.version
    expected, done = plain.plainly(), by_ray.by_ray()
    assert counts_of(done) == counts_of(expected)
    assert (done.files, done.removed, done.same, len(done.problems)) == (2, 1, 27, 3)
    assert by_ray.table.version == before + 3  # what is gone; up to scene.tif; the others
    require_equal(plain, by_ray)


class Dying(many.Encoder):
    """Is killed at its third batch, once."""

    calls = 0

    def __call__(self, batch):
        self.calls += 1
        if self.calls == 3 and os.path.exists(self.flag):
            os.unlink(self.flag)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(batch)


# 70 x 50 pixels in windows of 32 that share 8: at 0, 24, 38 across and 0, 18 down.
@pytest.mark.parametrize(("tile", "tiles"), [(None, 30), (32, 30 * 3 * 2)])
def test_the_rows_are_those_of_the_plain_run_though_a_worker_is_killed(
    two_workers, pair, tile, tiles, tmp_path, monkeypatch
):
    flag = tmp_path / "flag"
    flag.touch()
    monkeypatch.setattr(Dying, "flag", str(flag), raising=False)
    monkeypatch.setattr(many, "Encoder", Dying)
    plain, by_ray = pair(tile)
    expected, done = plain.plainly(), by_ray.by_ray()
    assert not flag.exists()
    assert counts_of(done) == counts_of(expected)
    assert (done.files, done.tiles, len(done.problems)) == (30, tiles, 2)
    assert "broken.png" in done.problems[0] and "scene.tif" in done.problems[1]
    require_equal(plain, by_ray)


def test_a_gpu_that_no_machine_has_is_told(two_workers):
    assert many.pick_device("auto") == "cpu"
    with pytest.raises(ValueError, match="--device cuda: the cluster has no GPU; use --device"):
        many.pick_device("cuda")


@pytest.mark.parametrize("address", ["127.0.0.1:1", "cluster"])
def test_an_address_where_nothing_answers_is_told(address):
    with pytest.raises(ValueError, match=f"--ray {address}: no cluster answers"):
        with many.cluster(address):
            pass


def test_missing_packages_are_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "lance_ray", None)
    with pytest.raises(ValueError, match="--ray: needs Ray Data and lance-ray: pip install -r"):
        with many.cluster("local"):
            pass
