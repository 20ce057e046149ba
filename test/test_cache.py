"""The cache: the same pixels as without it, never old or broken ones, and no trace of failures."""

import io
import multiprocessing
import os
import pickle
import re
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from backbones import preprocess
from conftest import IMAGE_SIZE, SIZES, box, write_detections
from dataset import cache, images
from det_formats.det_json import LabelMap, read_label_map

LABEL_MAP = read_label_map()
ROW = 3 * IMAGE_SIZE**2


def write_image(path, size=(40, 40), seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def files(tmp_path):
    """Five images, three shapes; the second without a detection file, the third without objects."""
    paths = [
        write_image(tmp_path / "data" / f"{i}.png", SIZES[i % 3], seed=i + 1) for i in range(5)
    ]
    detections = [
        write_detections(
            tmp_path / "data" / f"{i}.json", [box(7 + j, 9 / 7, i + 1) for j in range(n)]
        )
        for i, n in enumerate((3, 0, 0, 1, 2))
    ]
    return paths, [None if i == 1 else path for i, path in enumerate(detections)]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "user" / "cache"


@pytest.fixture
def read(files, folder):
    """Reads the five images: into RAM where cache_gb allows, else by a file in the cache folder."""

    def run(
        cache_gb=0, image_size=IMAGE_SIZE, label_map=LABEL_MAP, paths=files[0], detections=files[1]
    ):
        return cache.read_images(paths, detections, image_size, label_map, cache_gb, folder)

    return run


def same(first, second):
    assert [torch.equal(first.pixels[i], second.pixels[i]) for i in range(5)] == [True] * 5
    assert first.sizes == second.sizes and first.hashes == second.hashes
    assert first.problems == second.problems == []
    for own, other in zip(first.boxes, second.boxes, strict=True):
        for a, b in zip(own, other, strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape and (a == b).all()


def refuse(*arguments):
    raise AssertionError("an image was decoded, though the cache has it")


# ------------------------------------------------------------------ the same with and without


@pytest.mark.parametrize("cache_gb", [0, 4])
def test_all_is_as_in_the_files(read, files, cache_gb):
    decoded = read(cache_gb)
    for i, path in enumerate(files[0]):
        image = Image.open(path)
        expected = np.asarray(preprocess.resize_and_crop(IMAGE_SIZE)(image)).transpose(2, 0, 1)
        assert (
            decoded.pixels[i].dtype == torch.uint8 and (decoded.pixels[i].numpy() == expected).all()
        )
        assert decoded.sizes[i] == SIZES[i % 3] and isinstance(decoded.sizes[i], tuple)
        assert decoded.hashes[i] == images.content_hash(image)
    assert [len(class_ids) for class_ids, _ in decoded.boxes] == [3, 0, 0, 1, 2]
    class_ids, boxes = decoded.boxes[4]
    assert class_ids.tolist() == [LABEL_MAP.class_id("ship")] * 2
    assert boxes.tolist() == [box(7, 9 / 7, 5), box(8, 9 / 7, 5)]
    assert decoded.boxes[1][1].shape == decoded.boxes[2][1].shape == (0, 6)


def test_the_limit_is_the_size_of_the_pixels(read, folder):
    assert isinstance(read(5 * ROW / 2**30).pixels, torch.Tensor)
    assert not folder.parent.exists()
    mapped = read((5 * ROW - 1) / 2**30)
    assert isinstance(mapped.pixels, cache.MappedPixels) and len(os.listdir(folder)) == 1
    assert len(mapped.pixels) == 5 and mapped.pixels.shape == (5, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert read(0, paths=[], detections=[]).sizes == []


def test_a_cache_file_is_read_without_decoding_and_without_a_word(read, monkeypatch, capsys):
    fresh = read()
    monkeypatch.setattr(images, "open_image", refuse)
    same(read(), fresh)
    monkeypatch.undo()
    same(read(4), fresh)
    assert capsys.readouterr().out == ""


def test_an_unknown_label_is_reported_from_the_cache_too(read, files):
    write_detections(files[1][0], [box(3, 4)], label="heffalump")
    for _ in range(2):
        with pytest.warns(UserWarning, match="heffalump"):
            decoded = read(label_map=read_label_map())
        assert decoded.boxes[0][0].tolist() == [len(LABEL_MAP) - 1]


def test_items_may_be_changed_and_the_cache_stays(read):
    first = read()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of arrays that are read-only
        item = first.pixels[3]
    item += 1
    same(read(), read(4))


# ------------------------------------------------------------------ which file, and when


def test_other_sizes_labels_images_and_detections_have_files_of_their_own(read, files, folder):
    read()
    read(image_size=16)
    boxes = read(label_map=LabelMap(["plane", "ship"])).boxes
    assert boxes[0][0].tolist() == [1, 1, 1]
    backwards = read(paths=files[0][::-1], detections=files[1][::-1])
    assert backwards.sizes == read().sizes[::-1]
    assert not any(len(class_ids) for class_ids, _ in read(detections=[None] * 5).boxes)
    assert len(os.listdir(folder)) == 5


def test_relative_paths_name_the_same_cache(read, files, folder, monkeypatch):
    read()
    monkeypatch.chdir(files[0][0].parent)
    monkeypatch.setattr(images, "open_image", refuse)
    read(paths=[path.name for path in files[0]])


def change_image(files):
    write_image(files[0][2], (50, 30), seed=9)


def touch_image(files):
    os.utime(files[0][4], ns=(0, files[0][4].stat().st_mtime_ns + 1))


def change_detections(files):
    write_detections(files[1][3], [box(1, 2), box(3, 4)])


def touch_detections(files):
    os.utime(files[1][0], ns=(0, 5))


def raise_version(files):
    cache.PREPROCESSING += 1


@pytest.mark.parametrize(
    "change", [change_image, touch_image, change_detections, touch_detections, raise_version]
)
def test_a_stale_cache_is_rebuilt_with_one_line(read, files, folder, capsys, monkeypatch, change):
    monkeypatch.setattr(cache, "PREPROCESSING", cache.PREPROCESSING)
    read()
    change(files)
    rebuilt(read, folder, capsys, "stale")


def rebuilt(read, folder, capsys, word):
    """The next reading says one line and is right; the one after is silent."""
    same(read(), read(4))
    (name,) = os.listdir(folder)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{folder / name}: {word}") and line.endswith("; it is rebuilt")
    same(read(), read(4))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("length", [0, 7, 16, 30, 4000, 4096, 4096 + 2 * ROW, -100, -1])
def test_a_truncated_cache_is_rebuilt_with_one_line(read, folder, capsys, length):
    content = read().pixels.path.read_bytes()
    next(folder.iterdir()).write_bytes(content[:length])
    rebuilt(read, folder, capsys, "truncated")


def test_a_cache_that_has_grown_is_rebuilt(read, folder, capsys):
    with open(read().pixels.path, "ab") as file:
        file.write(b"\0")
    rebuilt(read, folder, capsys, "truncated")


@pytest.mark.parametrize("place", [0, 15, 24, -1, -300])
def test_a_foreign_cache_is_rebuilt_with_one_line(read, folder, capsys, place):
    path = read().pixels.path
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    rebuilt(read, folder, capsys, "foreign")


def test_another_kind_of_file_is_foreign(read, folder, capsys):
    read().pixels.path.write_text("my diary")
    rebuilt(read, folder, capsys, "foreign")


def test_a_set_in_use_stays_as_it_is_while_its_cache_is_rebuilt(read, files):
    before = read()
    kept = [before.pixels[i] for i in range(5)]
    for path in files[0]:
        write_image(path, (30, 30), seed=99)
    read()
    assert all(torch.equal(before.pixels[i], kept[i]) for i in range(5))


# ------------------------------------------------------------------ what cannot be read or written


@pytest.mark.parametrize("cache_gb", [0, 4])
def test_unreadable_images_are_listed_and_nothing_is_kept(read, files, folder, cache_gb):
    files[0][1].write_bytes(b"no image")
    files[0][3].unlink()
    decoded = read(cache_gb)
    assert len(decoded.problems) == 2
    assert "1.png: not readable" in decoded.problems[0]
    assert "3.png: no such image" in decoded.problems[1]
    for found in (decoded.sizes, decoded.hashes):
        assert [value is None for value in found] == [False, True, False, True, False]
    assert [len(class_ids) for class_ids, _ in decoded.boxes] == [3, 0, 0, 1, 2]
    assert not folder.exists() or not os.listdir(folder)


def test_an_image_that_is_gone_is_not_taken_from_the_cache(read, files, capsys):
    read()
    files[0][3].unlink()
    assert "3.png" in read().problems[0]
    assert "stale" in capsys.readouterr().out


def test_nothing_is_written_beside_the_data(read, files, folder):
    root = files[0][0].parent
    before = {path: path.stat().st_mtime_ns for path in [root, *root.iterdir()]}
    root.chmod(0o555)
    try:
        same(read(), read(4))
    finally:
        root.chmod(0o755)
    assert {path: path.stat().st_mtime_ns for path in [root, *root.iterdir()]} == before


def test_a_folder_that_cannot_be_made_is_an_error_with_the_remedy(read, folder):
    folder.parent.write_text("a file where the folder should be")
    with pytest.raises(ValueError, match="cache: no cache of .* GiB .*--cache-dir.*--cache-gb"):
        read()


def test_a_folder_in_place_of_the_file_is_an_error_with_the_remedy(read, folder, capsys):
    path = read().pixels.path
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match=f"{re.escape(str(folder))}: .*--cache-dir"):
        read()
    assert os.listdir(folder) == [path.name]
    assert "not readable" in capsys.readouterr().out


@pytest.mark.parametrize("room", [0, 4096 + 2 * ROW, 4096 + 5 * ROW + 10])
def test_a_full_disk_is_an_error_with_the_remedy_and_leaves_nothing(read, folder, room):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))  # writing beyond fails
    try:
        with pytest.raises(ValueError) as failure:
            read()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(folder) in str(failure.value) and "--cache-dir" in str(failure.value)
    assert os.listdir(folder) == []
    same(read(), read(4))


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("old", [False, True])
def test_a_failure_half_way_leaves_things_as_they_were(
    read, files, folder, monkeypatch, old, error
):
    def fail(path, open_image=images.open_image):
        if Path(path).stem == "3":
            raise error
        return open_image(path)

    before = [read().pixels.path.name] if old else []
    touch_image(files)
    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(images, "open_image", fail)
        read()
    assert os.listdir(folder) == before
    same(read(), read(4))


def test_a_file_that_another_process_has_put_there_and_holds_is_used(read, monkeypatch):
    """As on Windows, where a file that is mapped cannot be replaced."""

    def replace(source, target):
        Path(target).write_bytes(Path(source).read_bytes())
        raise PermissionError

    monkeypatch.setattr(os, "replace", replace)
    same(read(), read(4))


def test_an_old_file_that_cannot_be_replaced_is_an_error(read, files, monkeypatch):
    read()
    touch_image(files)

    def replace(source, target):
        raise PermissionError

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(ValueError, match="stale.*--cache-dir"):
        read()


# ------------------------------------------------------------------ several threads and processes


class SlowFile(io.BufferedWriter):
    def seek(self, place):
        super().seek(place)
        time.sleep(0.002)  # long enough for another thread to seek elsewhere


def test_rows_of_several_threads_come_to_their_places(read, monkeypatch):
    def slow(path, mode):
        return open(path, mode) if mode == "rb" else SlowFile(io.FileIO(path, mode.strip("b")))

    monkeypatch.setattr(cache, "open", slow, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    same(read(), read(4))


def build_together(read, barrier, results):
    """Read in a process of its own, decoding when all the others do."""
    torch.set_num_threads(1)

    def wait(path, open_image=images.open_image):
        if Path(path).stem == "0":
            barrier.wait(30)
        return open_image(path)

    images.open_image = wait
    decoded = read()
    pixels = np.stack([decoded.pixels[i].numpy() for i in range(5)])
    results.put((pixels.tobytes(), decoded.sizes, decoded.hashes))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are started by fork")
def test_processes_that_build_at_once_all_end_with_the_right_pixels(read, folder):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(3), context.Queue()
    arguments = (read, barrier, results)
    processes = [context.Process(target=build_together, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    expected = read(4)
    pixels = expected.pixels.numpy().tobytes()
    assert found == [(pixels, expected.sizes, expected.hashes)] * 3
    assert len(os.listdir(folder)) == 1
    same(read(), expected)


def test_a_pickle_is_a_name_not_the_pixels(read):
    decoded = read()
    assert len(pickle.dumps(decoded.pixels)) < 500 < ROW
    same(pickle.loads(pickle.dumps(decoded)), decoded)


@pytest.mark.parametrize("gone", [False, True])
def test_a_pickle_of_a_file_that_was_rebuilt_is_an_error(read, files, gone):
    decoded = read()
    content = pickle.dumps(decoded.pixels)
    if gone:
        decoded.pixels.path.unlink()
    else:
        touch_image(files)
        read()
    with pytest.raises(ValueError, match=f"{decoded.pixels.path.name}: removed or rebuilt"):
        pickle.loads(content)


# ------------------------------------------------------------------ folder and memory


def test_the_default_folder_is_below_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(cache.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.default_cache_dir() == tmp_path / "xdg" / "fg-cross"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.default_cache_dir() == tmp_path / ".cache" / "fg-cross"
    monkeypatch.setattr(cache.sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert cache.default_cache_dir() == tmp_path / "local" / "fg-cross"


def test_the_default_folder_is_used(files, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(cache.sys, "platform", "linux")
    decoded = cache.read_images(*files, IMAGE_SIZE, LABEL_MAP, 0)
    assert decoded.pixels.path.parent == tmp_path / "xdg" / "fg-cross"


def peak():
    """Most memory that the process has had, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


def test_memory_stays_bounded_while_a_cache_is_built(folder, tmp_path):
    count, image_size = 99, 512
    paths = [write_image(tmp_path / f"{i}.png", (8, 8), seed=i) for i in range(count)]
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = peak()
    except OSError:
        pytest.skip("this system does not say how much memory a process has had")
    cache.read_images(paths, [None] * count, image_size, LABEL_MAP, 0, folder)
    assert peak() - before < count * 3 * image_size**2 / 3
