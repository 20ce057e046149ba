"""The script that measures checkpoints, against what it should have read and computed."""

import csv
import hashlib
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import clip
import dataloader
import evaluate
from clip_gcn_image_feature_integration import SCENES
from conftest import ROOT
from dataloader import PLACES, merged
from dataset import batches, scenes
from dataset.annotations import read_annotations
from det_formats.det_json import read_label_map
from metrics.intervals import bootstrap, figures
from metrics.protocol import retrieval_metrics
from metrics.ranks import DIRECTIONS
from metrics.tables import read_results, write_results
from options import DATA
from train import parse

# ------------------------------------------------------------------ which data

SAVED = {
    "dataset": ["ucm", "rsicd"],
    "data_root": ["u", "r"],
    "det_json": None,
    "annotations": ["auto", "pir"],
    "max_objects": 20,
}
DETECTED = {**SAVED, "det_json": ["d", None]}
ALONE = {**SAVED, "dataset": ["ucm"], "data_root": ["u"], "det_json": ["d"], "annotations": ["pir"]}
NO_DATA = {**SAVED, "dataset": None, "data_root": None, "annotations": None}


@pytest.mark.parametrize(
    ("saved", "given", "data_root", "det_json", "annotations"),
    [
        # A data set keeps its places by name, another brings its own.
        (SAVED, {"data_root": None}, ["u", "r"], None, ["auto", "pir"]),
        (SAVED, {"dataset": ["rsicd", "ucm"]}, ["r", "u"], None, ["pir", "auto"]),
        (DETECTED, {"dataset": ["ucm"]}, ["u"], ["d"], ["auto"]),
        (SAVED, {"det_json": ["x", "y"]}, ["u", "r"], ["x", "y"], ["auto", "pir"]),
        (SAVED, {"dataset": ["scenes", "rsicd"]}, [None, "r"], None, [None, "pir"]),
        (NO_DATA, {"dataset": ["own"], "data_root": ["o"]}, ["o"], None, None),
        # Another root drops the places in the old one; the form came along.
        (ALONE, {"data_root": ["c"]}, ["c"], None, ["pir"]),
        (ALONE, {"data_root": ["c"], "det_json": ["e"]}, ["c"], ["e"], ["pir"]),
    ],
)
def test_given_options_replace_a_checkpoints(saved, given, data_root, det_json, annotations):
    found = merged({**given, "max_objects": 9}, saved)
    assert found["dataset"] == given.get("dataset", saved["dataset"])
    assert [found[name] for name in PLACES] == [data_root, det_json, annotations]
    assert (found["max_objects"], merged(given, saved)["max_objects"]) == (9, 20)


# ------------------------------------------------------------------ one checkpoint


@pytest.fixture
def checkpoint(save_tiny, mini):
    left_out = {"mini": {"by_name": ["a"], "captions": 2}}
    arguments = "--dataset", "mini", "--data-root", str(mini)
    return save_tiny("tiny.pth", *arguments, epoch=7, left_out=left_out, start_sha256="5a")


@pytest.fixture
def other(tmp_path):
    """A second data set, of 13 test images."""
    scenes.generate(tmp_path / "other", seed=5, splits={"train": 2, "val": 11, "test": 13})
    return tmp_path / "other"


def run(checkpoints, *arguments):
    """The results of evaluate.py on one checkpoint or several."""
    checkpoints = checkpoints if isinstance(checkpoints, list) else [checkpoints]
    return evaluate.main(
        ["--checkpoint", *map(str, checkpoints), "--device", "cpu", *map(str, arguments)]
    )


def test_a_result_tells_what_was_measured_on_what(tmp_path, checkpoint, mini, device, capsys):
    out = tmp_path / "new" / "result.json"
    arguments = ["--checkpoint", str(checkpoint), "--json", str(out), "--device", device.type]
    arguments += ["--caption-form", "pir", "--batch-size", "5"]
    [result] = evaluate.main(arguments)
    printed = capsys.readouterr().out
    assert f"mR {result['mR']:.1f}, 95 % interval" in printed
    assert printed.endswith(f"written to {out}\n")
    content = json.loads(out.read_text(encoding="utf-8"))
    assert content["command"] == f"python evaluate.py {' '.join(arguments)}"
    [written] = content["results"]
    assert written == json.loads(json.dumps(result))
    trained = parse(["--dataset", "mini", "--data-root", str(mini), "--graph", "object"])[0]
    assert (trained["batch_size"], trained["caption_form"]) == (128, None)
    of_data = {name: trained[name] for name in DATA}
    expected = {
        "dataset": "mini",
        "split": "test",
        "checkpoint": str(checkpoint),
        "checkpoint_sha256": hashlib.sha256(checkpoint.read_bytes()).hexdigest(),
        "epoch": 7,
        "caption_equivalence": False,
        "data_options": {**of_data, "annotations": ["auto"], "caption_form": ["pir"]},
        "training_options": json.loads(json.dumps(trained)),
        "left_out": {"mini": {"by_name": ["a"], "captions": 2}},
        "images": 12,
        "captions": 60,
        "intervals": bootstrap([written["per_image"]]),
        "start_sha256": "5a",
    }
    assert {name: written[name] for name in expected} == expected
    assert str(mini) in written["origin"]
    records = read_annotations(mini).splits["test"]
    table = written["per_image"]
    assert table["names"] == [record.name for record in records]
    assert table["captions"] == [len(record.captions) for record in records]
    of_images = figures([table])
    assert of_images["mR"] == pytest.approx(written["mR"], abs=0.01)
    for direction in DIRECTIONS:
        own = {recall: written[direction][recall] for recall in ("R@1", "R@5", "R@10")}
        assert of_images[direction] == pytest.approx(own, abs=0.01)


def test_workers_are_not_those_of_training(save_tiny, mini, monkeypatch):
    trained = save_tiny("tiny.pth", "--dataset", "mini", "--data-root", str(mini), "--workers", "8")
    workers, encode = [], evaluate.encode_split

    def remember(*arguments):
        workers.append(arguments[-1])
        return encode(*arguments)

    monkeypatch.setattr(evaluate, "encode_split", remember)
    run(trained)
    run(trained, "--workers", "1")
    assert workers == [0, 1]


def test_another_split_another_data_set_and_equal_captions(checkpoint, other):
    [strict] = run(checkpoint, "--split", "train")
    [equivalent] = run(checkpoint, "--split", "train", "--caption-equivalence")
    assert strict["images"] == 24 and equivalent["caption_equivalence"] is True
    for side in DIRECTIONS:
        assert all(equivalent[side][f"R@{k}"] >= strict[side][f"R@{k}"] for k in (1, 5, 10))
        assert equivalent[side]["mean_rank"] < strict[side]["mean_rank"]
    [found] = run(checkpoint, "--dataset", "other", "--data-root", other)
    assert (found["images"], found["data_options"]["data_root"]) == (13, [str(other)])
    with pytest.raises(ValueError, match="no split 'dev'.*train, val, test"):
        run(checkpoint, "--split", "dev")


def test_html_and_ranks_show_the_queries_of_the_result(tmp_path, checkpoint, mini, capsys):
    page, table = tmp_path / "new" / "page.html", tmp_path / "ranks.csv"
    [result] = run(checkpoint, "--html", page, "--ranks", table)
    assert capsys.readouterr().out.endswith(f"written to {table}\nwritten to {page}\n")
    rows = list(csv.DictReader(table.open(newline="", encoding="utf-8")))
    assert len(rows) == 12 + 60 and "checkpoint" not in rows[0]
    for direction in DIRECTIONS:
        ranks = [float(row["rank"]) for row in rows if row["direction"] == direction]
        assert np.mean(ranks) == pytest.approx(result[direction]["mean_rank"], abs=1e-5)
    text = page.read_text(encoding="utf-8")
    worst = max(rows[12:], key=lambda row: float(row["rank"]))
    assert f"mR {result['mR']:.1f}" in text and worst["caption"] in text
    assert text.count("<article ") == 12 + 30
    both = ["--dataset", "mini", "other", "--data-root", mini, mini]
    for several in ([[checkpoint, checkpoint]], [checkpoint, *both]):
        with pytest.raises(ValueError, match="--html shows one result"):
            run(*several, "--html", page)


# ------------------------------------------------------------------ several at once


def measured(results):
    """What was measured, without what a command or a file is called."""
    keys = ("dataset", "images", "mR", *DIRECTIONS, "per_image", "intervals")
    return [{key: result[key] for key in keys} for result in results]


def test_several_checkpoints_and_data_sets_are_measured_as_alone(
    save_tiny, mini, other, tmp_path, monkeypatch, capsys
):
    mini_alone = ["--dataset", "mini", "--data-root", str(mini)]
    files = [save_tiny(f"{seed}.pth", *mini_alone, "--seed", seed) for seed in "01"]
    alone = [
        run(file, "--dataset", name, "--data-root", root)[0]
        for file in files
        for name, root in (("mini", mini), ("other", other))
    ]
    reads = []
    read = batches.read_images
    monkeypatch.setattr(batches, "read_images", lambda *a, **k: reads.append(a) or read(*a, **k))
    both = ["--dataset", "mini", "other", "--data-root", mini, other]
    results = run(files, *both, "--ranks", tmp_path / "ranks.csv")
    assert measured(results) == measured(alone)
    assert len({result["mR"] for result in results}) > 2
    assert len(reads) == 2  # the seeds differ, the images do not
    assert capsys.readouterr().out.count("\nmean ± standard deviation of 2") == 2
    rows = list(csv.DictReader((tmp_path / "ranks.csv").open(newline="", encoding="utf-8")))
    assert [row["dataset"] for row in rows] == (["mini"] * 72 + ["other"] * 78) * 2
    assert [row["checkpoint"] for row in rows] == [str(files[0])] * 150 + [str(files[1])] * 150


def test_each_checkpoint_keeps_its_own_data_options(save_tiny, plain_clip, mini, tmp_path):
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join(reversed(read_label_map().lines)), encoding="utf-8")
    places = ["--dataset", "mini", "--data-root", str(mini)]
    differences = [
        [],
        ["--caption-form", "pir", "--graph", "no-edges"],
        ["--graph", "exchanged"],
        ["--graph", "exchanged", "--seed", "1"],
        ["--max-objects", "2"],
        ["--labels", str(labels)],
    ]
    files = [save_tiny(f"{i}.pth", *places, *how) for i, how in enumerate(differences)]
    files.append(plain_clip)  # its images are larger
    together = run(files, *places)
    assert measured(together) == measured([run(file, *places)[0] for file in files])
    assert len({str(result["image_to_text"]) for result in together}) == len(files)
    assert together[1]["data_options"]["caption_form"] == ["pir"]


def test_two_result_files_are_compared(tmp_path, capsys):
    own, other = str(ROOT / "results" / "ucm-graph.json"), str(tmp_path / "other.json")
    results = read_results(ROOT / "results" / "ucm-none.json")
    write_results(other, "", [*results, {**results[0], "split": "val"}])
    evaluate.main(["--compare", own, other])
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first == "ucm test, 210 images, 5 and 5 runs: mR 39.2 - 37.9 = +1.3 [-1.3, +4.0]"
    assert last == "ucm val: in one of the files only"
    with pytest.raises(ValueError, match=r"gone\.json: not readable .*--json"):
        evaluate.main(["--compare", own, str(tmp_path / "gone.json")])


# ------------------------------------------------------------------ plain CLIPs, and warnings


def test_a_plain_clip_is_measured_without_graph(plain_clip, mini, tmp_path, monkeypatch, capsys):
    place = ["--dataset", "mini", "--data-root", mini]
    monkeypatch.setattr(clip, "find_openai", lambda name: plain_clip)
    found, by_name = run([plain_clip, "ViT-B/32"], *place)
    network, preprocess = clip.load(str(plain_clip))
    records = read_annotations(mini).splits["test"]
    pixels = [preprocess(Image.open(mini / "images" / record.name)) for record in records]
    captions = [text for record in records for text in record.captions]
    with torch.no_grad():
        images = F.normalize(network.encode_image(torch.stack(pixels)), dim=-1)
        texts = F.normalize(network.encode_text(clip.tokenize(captions)), dim=-1)
    expected = retrieval_metrics(images, texts, np.repeat(np.arange(12), 5))
    assert found["mR"] == pytest.approx(expected["mR"], abs=0.5)
    assert (found["training_options"]["graph"], found["epoch"]) == ("none", None)
    assert found["training_options"]["dataset"] is None
    digest = hashlib.sha256(plain_clip.read_bytes()).hexdigest()
    assert found["checkpoint_sha256"] == by_name["checkpoint_sha256"] == digest
    assert found["start_sha256"] == by_name["start_sha256"] == digest  # it tells plain CLIPs apart
    assert by_name["checkpoint"] == "ViT-B/32"
    assert "synthetic scenes" not in "".join(capsys.readouterr())
    with pytest.raises(ValueError, match=r"plain\.pt: a plain CLIP.*--dataset"):
        run(plain_clip)
    torch.save(network.state_dict(), tmp_path / "silent.pt")
    [gelu] = run(tmp_path / "silent.pt", "--activation", "gelu", *place)
    assert found["definition"]["activation"] == "quickgelu"
    assert gelu["definition"]["activation"] == gelu["training_options"]["activation"] == "gelu"
    assert gelu["mR"] != found["mR"]


def test_a_model_of_scenes_on_other_images_is_warned_of(save_tiny, mini, monkeypatch, capsys):
    monkeypatch.setattr(dataloader.scenes, "generate", lambda root: None)
    place = ["--data-root", str(mini)]
    scenes_model, mini_model = save_tiny("s.pth"), save_tiny("m.pth", "--dataset", "mini", *place)
    runs = ((scenes_model, "mini", 1), (scenes_model, "scenes", 0), (mini_model, "mini", 0))
    for model, name, warnings in runs:
        run(model, "--dataset", name, *place)
        assert capsys.readouterr().err.count(SCENES) == warnings
    assert "--checkpoint ViT-B/32" in SCENES and "train.py --dataset" in SCENES
