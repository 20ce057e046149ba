"""The index: what is in a row, what is done again, what a kill leaves, who may write."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

pytest.importorskip("lancedb", reason="pip install -r requirements-search.txt")

import search
from clip_gcn_image_feature_integration import encode_files, load_model
from conftest import ROOT, box, write_detections, write_image
from det_formats.det_json import load_detections
from galleries import index, write_tiles
from gallery import table


@pytest.fixture
def checkpoint(save_tiny):
    """Path of a tiny model's checkpoint."""
    return save_tiny("tiny.pth")


@pytest.fixture
def folder(tmp_path):
    """Twelve images with detections."""
    return write_tiles(tmp_path)


def rows(path):
    """All rows of an index by id, their vectors as arrays."""
    own_table, _ = table.open_index(path)
    found = own_table.to_arrow().to_pylist()
    return {row["id"]: row for row in found}


def require_equal(first, second, times=True):
    """Two dicts of rows are the same; times: those of files, too."""
    assert first.keys() == second.keys()
    for name, row in first.items():
        other = dict(second[name])
        row = dict(row)
        np.testing.assert_allclose(row.pop("vector"), other.pop("vector"), atol=1e-6)
        if not times:
            for one in (row, other):
                del one["modified"], one["detections"]
        assert row == other


# ------------------------------------------------------------------ rows


def test_a_row_tells_of_its_file_its_objects_and_its_embedding(folder, checkpoint):
    found = rows(index(folder, checkpoint))
    images = sorted((folder / "imgs").rglob("*.png"))
    names = [path.relative_to(folder / "imgs").as_posix() for path in images]
    assert sorted(found) == names
    model, content = load_model(str(checkpoint), "cpu")
    files = [folder / "dets" / name.replace(".png", ".json") for name in names]
    files = [file if file.exists() else None for file in files]
    expected = encode_files(model, content, images, files, "cpu").features.numpy()
    for i, (name, file) in enumerate(zip(names, files, strict=True)):
        row = found[name]
        np.testing.assert_allclose(row["vector"], expected[i], atol=1e-6)
        detections = load_detections(file) if file else []
        assert row["objects"] == len(detections) == len(row["labels"])
        assert (row["detections"] == "") == (file is None)
        for label in ("airplane", "ship", "storage_tank"):
            assert row[label] == sum(d["label"] == label.replace("_", " ") for d in detections)
        own = sorted(d["bbox"] for d in detections)
        boxes = np.reshape(row["boxes"], (-1, 6)).tolist()
        np.testing.assert_allclose(np.ravel(sorted(boxes)), np.ravel(own), atol=1e-5)
        stat = os.stat(images[i])
        assert row["bytes"] == stat.st_size
        assert round(row["modified"].timestamp() * 1e6) == stat.st_mtime_ns // 1000
        assert [row[n] for n in ("left", "top", "width", "height")] == [0, 0, 48, 40]


def test_columns_of_kinds_are_words_of_sql_and_never_twice():
    names = table.kind_columns(["storage tank, tank", "Ground-track field", "path", "path", "??"])
    assert names == ["storage_tank", "ground_track_field", "path_2", "path_3", "kind", "other"]


def test_windows_of_scenes_are_rows_with_their_own_objects(tmp_path, checkpoint):
    write_image(tmp_path / "imgs" / "scene.png", (80, 48))
    boxes = [box(10, 10), box(60, 20), box(79, 47)]
    write_detections(tmp_path / "dets" / "scene.json", boxes)
    found = rows(index(tmp_path, checkpoint, "--tile", "48", "--overlap", "16"))
    assert {name: row["ship"] for name, row in found.items()} == {
        "scene.png#0,0,48,48": 1,
        "scene.png#32,0,48,48": 2,
    }
    second = found["scene.png#32,0,48,48"]
    centres = np.reshape(second["boxes"], (-1, 6))[:, :2].tolist()
    assert sorted(centres) == [[28, 20], [47, 47]]


# ------------------------------------------------------------------ the next run


def test_only_what_is_new_or_has_changed_is_encoded_again(folder, checkpoint, capsys, tmp_path):
    path = index(folder, checkpoint)
    before = rows(path)
    write_image(folder / "imgs" / "new.png", value=7)
    write_image(folder / "imgs" / "t01.png", value=9)  # other content
    write_detections(folder / "dets" / "t02.json", [box(9, 9)], "airplane")
    write_detections(folder / "dets" / "north" / "t03.json", [])  # had none
    (folder / "imgs" / "t04.png").unlink()
    capsys.readouterr()
    result = tmp_path / "done.json"
    index(folder, checkpoint, "--json", str(result))
    done = json.loads(result.read_text(encoding="utf-8"))
    assert (done["files"], done["same"], done["removed"]) == (4, 8, 1)
    assert "4 images encoded to 4 tiles" in capsys.readouterr().out
    after = rows(path)
    require_equal(after, rows(index(folder, checkpoint, out="straight")))
    assert after["t01.png"]["vector"] != before["t01.png"]["vector"]
    assert after["t02.png"]["airplane"] == 1


def test_a_run_without_work_changes_nothing_but_the_bar(folder, checkpoint):
    path = index(folder, checkpoint)
    before = rows(path)
    index(folder, checkpoint)
    assert rows(path) == before


def test_unreadable_files_are_listed_and_leave_the_index(folder, checkpoint, capsys):
    path = index(folder, checkpoint)
    (folder / "imgs" / "t01.png").write_bytes(b"")
    (folder / "dets" / "t02.json").write_text("[{}]", encoding="utf-8")
    (folder / "imgs" / "dead.png").symlink_to("nowhere.png")
    write_image(folder / "imgs" / "good.png")
    capsys.readouterr()
    index(folder, checkpoint)
    printed = capsys.readouterr().out
    assert "3 images could not be read and are not in the index:" in printed
    for name in ("t01.png", "t02.json", "dead.png"):
        assert name in printed
    assert rows(path).keys() >= {"good.png", "t05.png"}
    assert not rows(path).keys() & {"t01.png", "t02.png", "dead.png"}


def test_the_exit_code_is_1_only_if_all_failed(tmp_path, checkpoint):
    (tmp_path / "imgs").mkdir()
    write_detections(tmp_path / "dets" / "broken.json", [])
    (tmp_path / "imgs" / "broken.png").write_bytes(b"no image")
    index(tmp_path, checkpoint, expect=1)
    write_image(tmp_path / "imgs" / "good.png")
    index(tmp_path, checkpoint, expect=0)
    index(tmp_path, checkpoint, expect=0)  # the good one is there as it was


def test_a_name_that_is_no_text_is_told(folder, checkpoint, capsys):
    (folder / "imgs" / "t01.png").rename(os.fsdecode(bytes(folder / "imgs") + b"/bad\xff.png"))
    found = rows(index(folder, checkpoint))
    assert len(found) == 11
    assert "bad\\udcff.png: the name is not UTF-8; rename it" in capsys.readouterr().out


def test_a_folder_that_cannot_be_listed_is_an_error_and_not_a_deletion(
    folder, checkpoint, monkeypatch
):
    path = index(folder, checkpoint)
    listed = os.scandir

    def refuse(place):
        if str(place).endswith("north"):
            raise PermissionError(13, "Permission denied", str(place))
        return listed(place)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="north"):
        index(folder, checkpoint)
    assert len(rows(path)) == 12


def test_objects_are_not_lost_by_a_forgotten_or_wrong_folder_of_detections(folder, checkpoint):
    path = index(folder, checkpoint)
    before = rows(path)
    arguments = ["index", str(folder / "imgs"), "--out", str(path), "--checkpoint", str(checkpoint)]
    arguments += ["--precision", "fp32"]
    with pytest.raises(ValueError, match="the index has objects; name the folder of their"):
        search.main(arguments)
    with pytest.raises(ValueError, match="none of 12 images has a detection file there"):
        search.main([*arguments, "--det-json", str(folder / "imgs")])
    assert rows(path) == before


def test_daily_runs_do_not_let_the_folder_grow(folder, checkpoint):
    path = index(folder, checkpoint, "--keep-versions", "2")
    sizes = []
    for day in range(4):
        write_image(folder / "imgs" / "t01.png", value=day)
        index(folder, checkpoint, "--keep-versions", "2")
        own_table, _ = table.open_index(path)
        assert len(own_table.list_versions()) == 2
        sizes.append(sum(file.stat().st_size for file in path.rglob("*") if file.is_file()))
    assert max(sizes[1:]) < 1.1 * sizes[0]


# ------------------------------------------------------------------ whose index it is


def test_an_index_of_another_checkpoint_is_refused_with_both_hashes(folder, checkpoint, save_tiny):
    path = index(folder, checkpoint)
    other = save_tiny("other.pth", "--seed", "1")
    with pytest.raises(ValueError, match=r"another checkpoint, .*tiny.pth with the hash \w{32}; "):
        index(folder, other)
    with pytest.raises(ValueError, match=r"other.pth has \w{32}"):
        search.main(["query", str(path), "ships", "--checkpoint", str(other)])


def test_an_index_made_with_other_settings_is_refused(folder, checkpoint):
    index(folder, checkpoint)
    with pytest.raises(ValueError, match="made with tile None, now 16; give the same"):
        index(folder, checkpoint, "--tile", "16", "--overlap", "0")


def test_a_folder_with_other_files_is_no_index(folder, checkpoint):
    with pytest.raises(ValueError, match="holds other files, as north; name a new folder"):
        index(folder, checkpoint, out="imgs")
    with pytest.raises(ValueError, match="index: no index; make one"):
        search.main(["query", str(folder / "index"), "ships"])
    with pytest.raises(ValueError, match="give the path without file:"):
        index(folder, checkpoint, "--out", f"file://{folder}/index")
    with pytest.raises(ValueError, match=r"LanceDB takes no \? in a path"):
        index(folder, checkpoint, out="a?b")


def test_one_process_writes_at_a_time(folder, checkpoint):
    path = index(folder, checkpoint)
    with (
        table.writing(path),
        pytest.raises(ValueError, match=rf"process {os.getpid()} on .* writes this index"),
    ):
        index(folder, checkpoint)


# ------------------------------------------------------------------ a kill


def test_what_was_killed_before_its_first_commit_is_begun_anew(folder, checkpoint):
    (folder / "index" / "tiles.lance" / "data").mkdir(parents=True)
    (folder / "index" / "tiles.lance" / "data" / "half.lance").write_bytes(b"half")
    assert len(rows(index(folder, checkpoint))) == 12
    assert not list((folder / "index").rglob("half.lance"))


CHILD = """
import gallery.indexing, search, sys
gallery.indexing.COMMIT_ROWS = 2  # many commits
search.main(sys.argv[1:])
"""


def kill_while_indexing(folder, checkpoint, after, wait):
    """Start an index in a process and kill it, `wait` seconds after its `after`th commit."""
    path = folder / "killed"
    arguments = [
        "index", str(folder / "imgs"), "--out", str(path), "--det-json", str(folder / "dets"),
        "--checkpoint", str(checkpoint), "--device", "cpu", "--precision", "fp32",
        "--batch-size", "4",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, *arguments],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    versions = path / "tiles.lance" / "_versions"
    while process.poll() is None and (
        not versions.is_dir() or len(list(versions.iterdir())) < after
    ):
        time.sleep(0.002)
    time.sleep(wait)
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def check_kills(folder, checkpoint, kills, longest_wait):
    """Kill so often, most of them while it works; returns how often it had not ended."""
    killed = 0
    whole = rows(index(folder, checkpoint, "--batch-size", "4"))
    moments = random.Random(0)
    for _ in range(kills):
        path = folder / "killed"
        shutil.rmtree(path, ignore_errors=True)
        wait = moments.uniform(0, longest_wait)
        killed += kill_while_indexing(folder, checkpoint, moments.randint(1, 10), wait)
        left = rows(path)
        assert left.keys() <= whole.keys()
        require_equal(left, {name: whole[name] for name in left})
        index(folder, checkpoint, "--batch-size", "4", out="killed")
        require_equal(rows(path), whole)
    return killed


def test_a_kill_leaves_the_last_commit_and_the_next_run_ends_as_a_straight_one(folder, checkpoint):
    assert check_kills(write_tiles(folder, number=24), checkpoint, kills=1, longest_wait=0.01) == 1


@pytest.mark.slow
def test_ten_kills(folder, checkpoint):
    assert check_kills(write_tiles(folder, number=24), checkpoint, kills=10, longest_wait=0.2) >= 5


def test_bf16_is_close_to_fp32(folder, checkpoint):
    exact = rows(index(folder, checkpoint))
    rough = rows(index(folder, checkpoint, "--precision", "bf16", out="rough"))
    for name, row in exact.items():
        cosine = torch.tensor(row["vector"]) @ torch.tensor(rough[name]["vector"])
        assert 0.999 < cosine < 1.001
