"""The cache: the same pixels as without it, never old or broken ones, and no trace of failures."""

import multiprocessing
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from backbones import preprocess
from conftest import IMAGE_SIZE, SIZES, box, write_detections, write_image
from dataset import cache, images
from det_formats.det_json import LabelMap, read_label_map

LABEL_MAP = read_label_map()
ROW = 3 * IMAGE_SIZE**2
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are started by fork")


@pytest.fixture
def files(tmp_path):
    """Five images, three shapes; the second without a detection file, the third without objects."""
    paths = []
    detections = []
    for i, number in enumerate((3, 0, 0, 1, 2)):
        paths.append(write_image(tmp_path / "data" / f"{i}.png", SIZES[i % 3]))
        boxes = [box(7 + j, 9 / 7, i + 1) for j in range(number)]
        detections.append(write_detections(tmp_path / "data" / f"{i}.json", boxes))
    detections[1] = None
    return paths, detections


@pytest.fixture
def folder(cache_folder):
    return cache_folder


@pytest.fixture
def read(files, folder):
    """Reads the five images: into RAM where ram_gib allows, else by a pair in the cache folder."""

    def run(
        ram_gib=0, image_size=IMAGE_SIZE, label_map=LABEL_MAP, paths=files[0], detections=files[1]
    ):
        return cache.read_images(paths, detections, image_size, label_map, ram_gib)

    return run


def same(first, second):
    assert all(torch.equal(first.pixels[i], second.pixels[i]) for i in range(5))
    assert first.sizes == second.sizes and first.hashes == second.hashes
    assert first.problems == second.problems == []
    for own, other in zip(first.boxes, second.boxes, strict=True):
        for a, b in zip(own, other, strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape and (a == b).all()


def refuse(*arguments):
    raise AssertionError("an image was decoded, though the cache has it")


# ------------------------------------------------------------------ the same with and without


@pytest.mark.parametrize("ram_gib", [0, 4])
@pytest.mark.parametrize("threads", [1, 8])
def test_all_is_as_in_the_files(read, files, monkeypatch, ram_gib, threads):
    monkeypatch.setattr(os, "cpu_count", lambda: threads)  # five images wait if there is one
    decoded = read(ram_gib)
    for i, path in enumerate(files[0]):
        image = Image.open(path)
        expected = preprocess.pixels_of(preprocess.resize_and_crop(image, IMAGE_SIZE))
        assert decoded.pixels[i].dtype == torch.uint8
        assert (decoded.pixels[i].numpy() == expected).all()
        assert decoded.sizes[i] == SIZES[i % 3] and isinstance(decoded.sizes[i], tuple)
        assert decoded.hashes[i] == images.content_hash(image)
    assert [len(class_ids) for class_ids, _ in decoded.boxes] == [3, 0, 0, 1, 2]
    class_ids, boxes = decoded.boxes[4]
    assert class_ids.tolist() == [LABEL_MAP.class_id("ship")] * 2
    assert boxes.tolist() == [box(7, 9 / 7, 5), box(8, 9 / 7, 5)]
    assert decoded.boxes[1][1].shape == decoded.boxes[2][1].shape == (0, 6)


def test_beyond_the_limit_pixels_are_a_map_of_an_array_file(read, files, folder):
    in_memory = read(5 * ROW / 2**30).pixels
    assert isinstance(in_memory, torch.Tensor) and not folder.parent.exists()
    mapped = read((5 * ROW - 1) / 2**30).pixels
    assert isinstance(mapped, cache.MappedPixels)
    assert len(mapped) == 5 and mapped.shape == (5, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert sorted(os.listdir(folder)) == [f"{mapped.path.stem}.json", mapped.path.name]
    assert len(os.listdir(files[0][0].parent)) == 10  # nothing beside the data
    assert (np.load(mapped.path, mmap_mode="r") == in_memory.numpy()).all()
    assert read(0, paths=[], detections=[]).sizes == []


def test_a_cache_is_read_without_decoding_and_without_a_word(read, files, monkeypatch, capsys):
    fresh = read()
    monkeypatch.setattr(images, "open_image", refuse)
    item = fresh.pixels[3]
    item += 1  # an item may be changed, and the cache stays
    same(read(), fresh)
    assert not torch.equal(read().pixels[3], item)
    monkeypatch.chdir(files[0][0].parent)
    same(read(paths=[path.name for path in files[0]]), fresh)
    assert capsys.readouterr().out == ""


def test_an_unknown_label_is_reported_from_the_cache_too(read, files):
    write_detections(files[1][0], [box(3, 4)], label="heffalump")
    for _ in range(2):
        with pytest.warns(UserWarning, match="heffalump"):
            decoded = read(label_map=read_label_map())
        assert decoded.boxes[0][0].tolist() == [len(LABEL_MAP) - 1]


# ------------------------------------------------------------------ which files, and when


def test_other_sizes_labels_images_and_detections_have_files_of_their_own(read, files, folder):
    read()
    read(image_size=16)
    boxes = read(label_map=LabelMap(["plane", "ship"])).boxes
    assert boxes[0][0].tolist() == [1, 1, 1]
    backwards = read(paths=files[0][::-1], detections=files[1][::-1])
    assert backwards.sizes == read().sizes[::-1]
    assert not any(len(class_ids) for class_ids, _ in read(detections=[None] * 5).boxes)
    assert len(os.listdir(folder)) == 2 * 5


def rebuilt(read, folder, capsys, word):
    """The next reading says one line and is right; the one after is silent."""
    same(read(), read(4))
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{folder}{os.sep}5-images-") and line.endswith("; it is rebuilt")
    assert f": {word}" in line
    same(read(), read(4))
    assert capsys.readouterr().out == "" and len(os.listdir(folder)) == 2


def touch(path):
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def change_size_alone(path):
    time_before = path.stat().st_mtime_ns
    write_image(path, (50, 30))
    os.utime(path, ns=(0, time_before))


CHANGES = {
    "time of an image": lambda files: touch(files[0][4]),
    "size of an image": lambda files: change_size_alone(files[0][2]),
    "time of detections": lambda files: touch(files[1][0]),
    "version": lambda files: setattr(cache, "PREPROCESSING", cache.PREPROCESSING + 1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_stale_cache_is_rebuilt_with_one_line(read, files, folder, capsys, monkeypatch, change):
    monkeypatch.setattr(cache, "PREPROCESSING", cache.PREPROCESSING)
    read()
    change(files)
    rebuilt(read, folder, capsys, "stale")


def with_another_byte(content, place):
    changed = bytearray(content)
    changed[place] ^= 1
    return bytes(changed)


DAMAGES = {  # of the file with this suffix, and what is said of it
    "empty": (".npy", lambda content: b"", "truncated"),
    "half a digest": (".npy", lambda content: content[:-1], "truncated"),
    "another shape": (".npy", lambda content: content.replace(b"(5, ", b"(4, "), "foreign"),
    "another digest": (".npy", lambda content: with_another_byte(content, -2), "foreign"),
    "no text": (".npy", lambda content: content[:-1] + b"\xff", "foreign"),
    "a longer file": (".npy", lambda content: content + b"\0", "truncated"),
    "a diary": (".npy", lambda content: b"my diary", "foreign"),
    "a broken header": (".json", lambda content: with_another_byte(content, 300), "foreign"),
    "no header": (".json", None, "not readable"),
}


@pytest.mark.parametrize(("suffix", "change", "word"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_pair_is_rebuilt_with_one_line(read, folder, capsys, suffix, change, word):
    path = read().pixels.path.with_suffix(suffix)
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_bytes()))
    rebuilt(read, folder, capsys, word)


# ------------------------------------------------------------------ what cannot be read or written


@pytest.mark.parametrize("ram_gib", [0, 4])
def test_unreadable_images_are_listed_and_nothing_is_kept(read, files, folder, ram_gib):
    read(ram_gib)
    before = {path: path.read_bytes() for path in folder.glob("*")}
    files[0][1].write_bytes(b"no image")
    files[0][3].unlink()
    decoded = read(ram_gib)
    assert [Path(problem.split(":")[0]).name for problem in decoded.problems] == ["1.png", "3.png"]
    for found in (decoded.sizes, decoded.hashes):
        assert [value is None for value in found] == [False, True, False, True, False]
    assert [len(class_ids) for class_ids, _ in decoded.boxes] == [3, 0, 0, 1, 2]
    assert {path: path.read_bytes() for path in folder.glob("*")} == before


@pytest.mark.parametrize("room", [0, 128 + 2 * ROW, 128 + 5 * ROW + 10])
def test_a_full_disk_is_an_error_with_the_remedy_and_leaves_nothing(read, folder, room):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))  # writing beyond fails
    try:
        with pytest.raises(ValueError) as failure:
            read()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(folder) in str(failure.value) and "FGCROSS_CACHE" in str(failure.value)
    assert os.listdir(folder) == []
    same(read(), read(4))


def end_at(moment, read):
    """Read in a process of its own that is killed while it decodes or gives one of two names."""
    replaced = []

    def decode(path, open_image=images.open_image):
        if moment == "decoding" and Path(path).stem == "3":
            os._exit(9)
        return open_image(path)

    def replace(source, target, replace=os.replace):
        if moment == len(replaced):
            os._exit(9)
        replaced.append(target)
        replace(source, target)

    torch.set_num_threads(1)
    images.open_image = decode
    os.replace = replace
    read()


@needs_fork
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("moment", ["decoding", 0, 1])
def test_a_killed_process_leaves_no_cache_that_is_believed(read, files, folder, moment, old):
    if old:
        read()
    write_image(files[0][2], (50, 30))
    process = multiprocessing.get_context("fork").Process(target=end_at, args=(moment, read))
    process.start()
    process.join(60)
    assert process.exitcode == 9
    left = list(folder.glob("*.tmp"))
    assert left
    same(read(), read(4))
    assert all(path.exists() for path in left)  # they might be of a process that is at work
    for path in left:
        os.utime(path, (0, 0))
    touch(files[0][4])
    same(read(), read(4))
    assert len(os.listdir(folder)) == 2


# ------------------------------------------------------------------ several processes


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


@needs_fork
def test_processes_that_build_at_once_all_end_with_the_right_pixels(read, folder):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    results = context.Queue()
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
    assert len(os.listdir(folder)) == 2
    same(read(), expected)


def test_a_set_in_use_stays_but_its_pickle_is_the_name_of_a_file_not_to_be_rebuilt(read, files):
    decoded = read()
    kept = [decoded.pixels[i] for i in range(5)]
    content = pickle.dumps(decoded.pixels)
    assert len(content) < 500 < ROW
    same(decoded._replace(pixels=pickle.loads(content)), decoded)
    for path in files[0]:
        write_image(path, (30, 30))
    read()
    assert all(torch.equal(decoded.pixels[i], kept[i]) for i in range(5))
    for _ in ("rebuilt", "removed"):
        with pytest.raises(ValueError, match=f"{decoded.pixels.path.name}: removed or rebuilt"):
            pickle.loads(content)
        decoded.pixels.path.unlink(missing_ok=True)


# ------------------------------------------------------------------ folder and memory


def test_the_default_folder_is_below_the_users_cache(files, monkeypatch, tmp_path):
    monkeypatch.setattr(cache.sys, "platform", "linux")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("FGCROSS_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache.cache_dir() == tmp_path / ".cache" / "fg-cross"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    decoded = cache.read_images(*files, IMAGE_SIZE, LABEL_MAP, ram_gib=0)
    assert decoded.pixels.path.parent == tmp_path / "xdg" / "fg-cross"


def peak():
    """Most memory that the process has had, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


def test_memory_stays_bounded_while_a_cache_is_built(cache_folder, tmp_path):
    count = 99
    image_size = 512
    path = write_image(tmp_path / "a.png", (8, 8))
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = peak()
    except OSError:
        pytest.skip("this system does not say how much memory a process has had")
    cache.read_images([path] * count, [None] * count, image_size, LABEL_MAP, ram_gib=0)
    assert peak() - before < count * 3 * image_size**2 / 3
