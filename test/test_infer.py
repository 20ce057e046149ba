"""Similarity matrices: what is asked for, what is printed and written, and by which model."""

import csv
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import infer
from clip_gcn_image_feature_integration import (
    SAMPLES,
    SCENES,
    encode_images,
    encode_texts,
    load_images,
)
from conftest import ROOT, write_image
from model import load_checkpoint

NAMES = [f"sample_{i}.png" for i in range(1, 6)]
TILES = ["b.png", "north/a.png", "south/a.png"]
SENTENCES = (SAMPLES / "queries.txt").read_text(encoding="utf-8").splitlines()


@pytest.fixture
def checkpoint(save_tiny):
    """Path of a tiny model's checkpoint, its options those of train.py."""
    return save_tiny("tiny.pth")


@pytest.fixture
def show(checkpoint, capsys):
    """Runs infer.py on the tiny model, or another: (scores, printed lines)."""

    def start(*arguments, model=checkpoint):
        fixed = ["--checkpoint", str(model), "--device", "cpu"]
        scores = infer.main([*fixed, *map(str, arguments)])
        return scores, capsys.readouterr().out.splitlines()

    return start


@pytest.fixture
def tiles(tmp_path):
    """A folder of images in two folders, and one of detections that mirrors it."""
    for name, number in zip(TILES, (3, 1, 2), strict=True):
        for folder, source in (
            ("tiles", SAMPLES / f"sample_{number}.png"),
            ("dets", ROOT / "det_json" / f"sample_{number}.json"),
        ):
            target = (tmp_path / folder / name).with_suffix(source.suffix)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    (tmp_path / "tiles" / "notes.txt").write_text("no image", encoding="utf-8")
    return tmp_path / "tiles", tmp_path / "dets"


def legend(lines):
    """Of the legend: the names of the images, their best sentences, each query's best image."""
    images = [m.groups() for line in lines if (m := re.fullmatch(r"  Img\d+: (.+) -> (.+)", line))]
    best = [m[1] for line in lines if (m := re.fullmatch(r"  Query \d+: .+ -> (.+)", line))]
    return [name for name, _ in images], [sentence for _, sentence in images], best


def read_rows(path):
    """The rows of a CSV file, its head among them."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def expected_scores(checkpoint, images, detections):
    """Cosines with every image and every sentence encoded on its own."""
    network, saved = load_checkpoint(checkpoint)
    columns = []
    for image, file in zip(images, detections, strict=True):
        alone = load_images([image], [image.name], file and file.parent, saved)
        columns.append(encode_images(network, alone, "cpu")["fused"][0])
    rows = [encode_texts(network, [query], "cpu")[0] for query in SENTENCES]
    return torch.stack(rows) @ torch.stack(columns).T


# ------------------------------------------------------------------ the printed matrix


def test_default_prints_the_matrix_of_the_samples(show, checkpoint):
    scores, lines = show()
    images = [SAMPLES / name for name in NAMES]
    detections = [ROOT / "det_json" / f"sample_{i}.json" for i in range(1, 6)]
    expected = expected_scores(checkpoint, images, detections)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)
    counts, title, heads, *rows = lines
    assert counts.startswith("0 of 5 images without a detection file, 0 objects")
    assert title == "Similarity Score Matrix (Text-Image):"
    assert heads.split() == ["Img1", "Img2", "Img3", "Img4", "Img5"]
    ends = [head.end() for head in re.finditer(r"Img\d", heads)]
    for q, (values, row) in enumerate(zip(scores.tolist(), rows[:5], strict=True)):
        name, cells = row.split(":")
        assert name == f"Query {q + 1}"
        assert [cell.rstrip("*") for cell in cells.split()] == [f"{value:.2f}" for value in values]
        marked = [i for i, cell in enumerate(cells.split()) if "*" in cell]
        assert marked == [int(np.argmax(values))]
        # Numbers stand below their heads, whose last place is the mark's.
        assert [number.end() + 1 for number in re.finditer(r"-?\d\.\d\d", row)] == ends
    best_sentences = [SENTENCES[q] for q in scores.argmax(dim=0)]
    assert legend(lines) == (NAMES, best_sentences, [NAMES[i] for i in scores.argmax(dim=1)])
    assert all(any(query in line for line in lines) for query in SENTENCES)


def test_printed_and_ranked_best_agree_where_images_tie(show, tmp_path):
    for name in ("c.png", "a.png", "b.png", "d.png"):
        shutil.copy(SAMPLES / "sample_1.png", tmp_path / name)
    _, lines = show("--images", tmp_path, "--json", tmp_path / "out.json")
    best = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["best"]
    assert legend(lines)[2] == [entry["images"][0]["image"] for entry in best]
    _, again = show("--queries", "a ship", "A SHIP", "a  ship")  # equal tokens, equal scores
    assert legend(again)[1] == ["a ship"] * 5
    marks = [line for line in lines if "*" in line and line.startswith("Query")]
    assert [line.split(":")[1].split()[0][-1] for line in marks] == ["*"] * len(SENTENCES)


def test_top_k_csv_and_json_agree_with_the_matrix(show, tmp_path):
    table, dump = tmp_path / "new" / "m.csv", tmp_path / "other" / "new" / "m.json"
    queries = ["two ships", 'a "plane", on grass']
    scores, lines = show("--queries", *queries, "--top-k", 3, "--csv", table, "--json", dump)
    head, *rows = read_rows(table)
    assert head == ["query", "rank", "image", "score"]
    ranked = torch.argsort(scores, descending=True).tolist()
    expected = [
        [queries[q], str(rank), NAMES[i], pytest.approx(scores[q, i].item(), abs=1e-6)]
        for q in range(2)
        for rank, i in enumerate(ranked[q], start=1)
    ]
    assert [[*row[:3], float(row[3])] for row in rows] == expected  # every pair
    content = json.loads(dump.read_text(encoding="utf-8"))
    assert (content["images"], content["queries"]) == (NAMES, queries)
    assert content["scores"] == scores.tolist()
    for i, entry in enumerate(content["best_of_images"]):
        best = int(scores[:, i].argmax())
        assert entry == {"image": NAMES[i], "query": queries[best], "score": scores[best, i].item()}
    for q, entry in enumerate(content["best"]):
        order = np.argsort(-scores[q].numpy())[:3].tolist()
        assert entry["query"] == queries[q]
        assert [hit["image"] for hit in entry["images"]] == [NAMES[i] for i in order]
        assert [hit["score"] for hit in entry["images"]] == scores[q][order].tolist()
        start = lines.index(queries[q])
        assert lines[start + 1 : start + 4] == [
            f"  {place:3d}. {scores[q, i]:.3f} {NAMES[i]}" for place, i in enumerate(order, 1)
        ]


def test_a_threshold_leaves_only_hits(show, tmp_path):
    table, dump = tmp_path / "hits.csv", tmp_path / "hits.json"
    scores, _ = show()
    every = sorted(scores.flatten().tolist())
    for least, count in ((every[12], 13), (every[-1], 1)):  # at it counts
        _, lines = show("--threshold", least, "--csv", table, "--json", dump)
        hits = [(q, i) for q in range(5) for i in range(5) if scores[q, i] >= least]
        assert len(hits) == count
        assert sorted((row[0], row[2]) for row in read_rows(table)[1:]) == sorted(
            (SENTENCES[q], NAMES[i]) for q, i in hits
        )
        assert sum(bool(re.match(r" +\d+\. ", line)) for line in lines) == count  # all are listed
        without = set(range(5)) - {q for q, _ in hits}
        none = f"none at or above {least:g}"
        assert {SENTENCES[q] for q in without} == {
            sentence for sentence in SENTENCES if lines[lines.index(sentence) + 1] == f"  {none}"
        }
        _, of_images, of_queries = legend(lines)
        assert {q for q in range(5) if of_queries[q] == none} == without
        assert [name == none for name in of_images] == (scores < least).all(dim=0).tolist()
        assert sum("*" in line for line in lines if line.startswith("Query")) == 5 - len(without)
        content = json.loads(dump.read_text(encoding="utf-8"))
        assert sum(len(entry["images"]) for entry in content["best"]) == count
        empty = [entry["query"] is None for entry in content["best_of_images"]]
        assert (
            empty == [name == none for name in of_images] and content["scores"] == scores.tolist()
        )
    _, lines = show("--threshold", -1, "--top-k", 2)
    assert sum(bool(re.match(r" +\d+\. ", line)) for line in lines) == 10
    _, lines = show("--threshold", 30)  # evidence may lift scores above 1
    assert sum("none at or above 30" in line for line in lines) >= 5


def test_more_images_than_a_matrix_holds_are_ranked(show, tmp_path):
    paths = [write_image(tmp_path / f"{i:02d}.png") for i in range(infer.WIDEST + 1)]
    scores, lines = show("--images", tmp_path, "--queries", "a ship")
    assert "Similarity Score Matrix (Text-Image):" not in lines
    ranked = [line.split()[-1] for line in lines if re.match(r" +\d+\. ", line)]
    order = torch.argsort(scores[0], descending=True)[:10].tolist()
    assert ranked == [paths[i].as_posix() for i in order]


# ------------------------------------------------------------------ images and detections


def test_images_are_files_folders_and_globs(tiles):
    folder = str(tiles[0])
    b, north, south = (f"{folder}/{name}" for name in TILES)
    assert infer.find_files([folder]) == ([b, north, south], TILES)  # named as detections are
    for arguments, expected in (
        ([f"{folder}/**/*.png"], [b, north, south]),
        ([f"{folder}/*/a.png"], [north, south]),
        ([south, b], [south, b]),
        ([f"{folder}/north", b], [north, b]),
        ([folder, b], [b, north, south]),
    ):
        assert infer.find_files(arguments) == (expected, expected)


def test_detections_go_to_their_images_and_names_are_as_given(
    show, tiles, checkpoint, tmp_path, monkeypatch
):
    folder, detections = tiles
    images = [folder / name for name in TILES]
    files = [(detections / name).with_suffix(".json") for name in TILES]
    mirrored, lines = show("--images", folder, "--det-json", detections)
    assert lines[0].startswith("0 of 3 images without a detection file")
    bare, lines = show("--images", folder)
    assert lines[0].startswith("3 of 3 images without a detection file")
    for found, own in ((mirrored, files), (bare, [None] * 3)):
        expected = expected_scores(checkpoint, images, own)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (mirrored - bare).abs().amax(dim=0).min() > 1e-4
    monkeypatch.chdir(folder / "north")  # single images are matched by the ends of their paths
    table, dump = tmp_path / "m.csv", tmp_path / "m.json"
    written = ("--det-json", detections, "--csv", table, "--json", dump)
    apart, lines = show("--images", "a.png", "../south", "../*.png", *written)
    torch.testing.assert_close(apart, mirrored[:, [1, 2, 0]], rtol=0, atol=1e-5)
    names = ["a.png", "../south/a.png", "../b.png"]
    assert legend(lines)[0] == json.loads(dump.read_text(encoding="utf-8"))["images"] == names
    assert {row[2] for row in read_rows(table)[1:]} == set(names)


def test_wrong_images_are_errors_that_name_them(show, tmp_path):
    (tmp_path / "empty").mkdir()
    wrong = [str(tmp_path / name) for name in ("gone.png", "empty", "*.jpeg")]
    with pytest.raises(ValueError, match=f"--images {re.escape(', '.join(wrong))}: "):
        infer.find_files([wrong[0], str(SAMPLES), *wrong[1:]])
    with pytest.raises(ValueError, match="gone: .*--det-json"):
        show("--det-json", tmp_path / "gone")


@pytest.mark.parametrize(("count", "more"), [(20, False), (23, True)])
def test_unreadable_images_are_one_error(show, tmp_path, count, more):
    write_image(tmp_path / "good.png")
    for i in range(count):
        (tmp_path / f"{i:02d}.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match="--skip-unreadable") as failure:
        show("--images", tmp_path)
    message = str(failure.value)
    assert message.startswith(f"{count} images are missing or unreadable")
    assert len(re.findall(r"\d\d\.png: ", message)) == 20
    assert message.endswith("and 3 more") == more


def test_unreadable_images_are_left_out_where_asked(show, checkpoint, tiles, capsys):
    folder, detections = tiles
    usual, _ = show("--images", folder, "--det-json", detections)
    for name in ("a.png", "north/z.png", "z.png"):  # before, between and after the others
        (folder / name).write_bytes(b"broken")
    arguments = ["--images", folder, "--det-json", detections, "--skip-unreadable"]
    infer.main(["--checkpoint", str(checkpoint), "--device", "cpu", *map(str, arguments)])
    count, *listed = capsys.readouterr().err.split("warning: ")[-1].splitlines()
    assert count == "3 of 6 images are unreadable and left out:"
    assert [line.split(":")[0] for line in listed] == [
        f"  {folder}/{name}" for name in ("a.png", "north/z.png", "z.png")
    ]
    found, lines = show(*arguments)
    assert torch.equal(found, usual)
    assert legend(lines)[0] == [f"{folder}/{name}" for name in TILES]
    assert lines[0].startswith("0 of 3 images without a detection file")
    for name in TILES:
        (folder / name).unlink()
    with pytest.raises(ValueError, match="3 of 3 images are unreadable: none is left"):
        show(*arguments)


# ------------------------------------------------------------------ queries


def test_queries_are_sentences_and_text_files(tmp_path):
    file = tmp_path / "sentences.txt"
    file.write_bytes("\ufeffa ship\r\n\r\n  two planes  \r\n".encode())
    found = infer.read_queries([" a car ", str(file), "snow"])
    assert found == ["a car", "a ship", "two planes", "snow"]


def test_wrong_queries_are_errors_that_name_them(tmp_path):
    (tmp_path / "blank.txt").write_text("\n \n", encoding="utf-8")
    (tmp_path / "latin.txt").write_bytes("zwei Häfen".encode("latin-1"))
    for queries, message in (
        (["{}/blank.txt"], "--queries: expected"),
        (["  "], "--queries: expected"),
        (["a ship", "{}/blunk.txt"], "--queries .*blunk.txt: no such file"),
        (["{}/latin.txt"], "latin.txt.*UTF-8"),
    ):
        with pytest.raises(ValueError, match=message):
            infer.read_queries([query.format(tmp_path) for query in queries])


def test_queries_are_prepared_as_the_captions_were(save_tiny, show, tmp_path):
    trained = save_tiny("clean.pth", "--caption-form", "pir", "an aerial view: {}")
    dump = tmp_path / "out.json"
    queries = ["Two Ships, anchored!", "a semi-circular court."]
    found, lines = show("--queries", *queries, "--json", dump, model=trained)
    assert json.loads(dump.read_text(encoding="utf-8"))["queries"] == queries
    assert any(line.startswith(f"  Query 1: {queries[0]} -> ") for line in lines)
    texts = ["an aerial view: two ships anchored", "an aerial view: a semi circular court"]
    expected, _ = show("--queries", *texts)  # equal weights
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"'\?!': no word is left"):
        show("--queries", "a ship", "?!", model=trained)


# ------------------------------------------------------------------ models


def test_wrong_checkpoints_are_errors_that_name_them(show, checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"gone\.pth: no such checkpoint.*train\.py"):
        show(model=tmp_path / "gone.pth")
    torch.save({"weights": {}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth: not an FG-CROSS checkpoint"):
        show(model=tmp_path / "other.pth")
    content = torch.load(checkpoint, weights_only=True)
    content["weights"]["text_projection"][:] = float("nan")
    torch.save(content, checkpoint)
    with pytest.raises(ValueError, match=r"tiny\.pth: .*not finite"):
        show()


def test_a_model_of_scenes_on_other_images_is_warned_of(checkpoint, tiles, capsys):
    for arguments, warned in ((["--images", str(tiles[0])], 1), ([], 0)):
        infer.main(["--checkpoint", str(checkpoint), "--device", "cpu", *arguments])
        assert capsys.readouterr().err.count(SCENES) == warned


# ------------------------------------------------------------------ start-up

SLOW_PACKAGES = {"torchvision", "open_clip", "sklearn", "scipy", "pandas", "networkx", "ftfy"}


def test_infer_imports_no_slow_package_but_torch():
    code = """
import sys
import torch
before = set(sys.modules)
import infer
print(*{name.split(".")[0] for name in set(sys.modules) - before})
"""
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "infer" in found.stdout.split()
    assert not SLOW_PACKAGES & set(found.stdout.split())
