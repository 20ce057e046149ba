"""Retrieval metrics by hand-ranked examples and oracles, and the script that reports them."""

import csv
import hashlib
import json
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import clip
import dataloader as retrieval_data
import dataset.batches as dataloader
import evaluate
from backbones import loading
from clip_gcn_image_feature_integration import SCENES, encode_images, encode_texts, load_model
from dataloader import RetrievalData, sources
from dataset import scenes
from dataset.annotations import normal_form, read_annotations
from det_formats.det_json import read_label_map
from evaluate import merged, metrics, retrieval_metrics
from metrics import ranks
from metrics.intervals import bootstrap, figures
from metrics.ranks import retrieval_ranks
from model import load_checkpoint
from train import parse


def test_hand_ranked_example():
    # Captions 0 and 1 belong to image 0, and so on; each row has the ranks beside it.
    scores = np.array(
        [
            [0.9, 0.1, 0.8, 0.2, 0.3, 0.4],  # caption 0 is first
            [0.7, 0.6, 0.5, 0.4, 0.3, 0.1],  # caption 2 is third
            [0.6, 0.5, 0.4, 0.3, 0.1, 0.2],  # caption 5 is fifth
        ]
    )
    # Ranks of the own image for captions 0 ... 5: 1 3 2 1 3 2.
    found = metrics(*retrieval_ranks(scores, [0, 0, 1, 1, 2, 2]), ks=(1, 2, 3))
    thirds = [100 / 3, 200 / 3]
    image_to_text, text_to_image = found["image_to_text"], found["text_to_image"]
    assert [image_to_text[f"R@{k}"] for k in (1, 2, 3)] == pytest.approx(
        [thirds[0]] * 2 + thirds[1:]
    )
    assert [text_to_image[f"R@{k}"] for k in (1, 2, 3)] == pytest.approx([*thirds, 100])
    assert (image_to_text["mean_rank"], image_to_text["median_rank"]) == (3, 3)
    assert (text_to_image["mean_rank"], text_to_image["median_rank"]) == (2, 2)
    assert found["mR"] == pytest.approx(np.mean([33.333333, 33.333333, 66.666667, *thirds, 100]))
    assert found["mR"] == found["mR_pessimistic"] == found["mR_optimistic"]


# ------------------------------------------------------------------ whole data sets


def caption_set_scores(records):
    """1 where a caption row's text is among an image's captions; (scores, owners, captions)."""
    captions = [caption for record in records for caption in record.captions]
    owners = [i for i, record in enumerate(records) for _ in record.captions]
    scores = [[float(text in record.captions) for text in captions] for record in records]
    return np.array(scores), owners, captions


def test_caption_set_oracle_on_ucm(real_data):
    scores, owners, captions = caption_set_scores(
        read_annotations(real_data / "UCM").splits["test"]
    )
    found = metrics(*retrieval_ranks(scores, owners))
    bounds = found["mR_pessimistic"], found["mR"], found["mR_optimistic"]
    assert [round(value, 1) for value in bounds] == [38.7, 70.4, 100.0]
    groups = [normal_form(text) for text in captions]
    equivalent = metrics(*retrieval_ranks(scores, owners, groups=groups))
    assert equivalent["mR"] == equivalent["mR_pessimistic"] == 100


def test_a_perfect_model_scores_100():
    images = torch.eye(12)
    found = retrieval_metrics(images, images.repeat_interleave(5, 0), np.repeat(np.arange(12), 5))
    assert found["mR"] == found["mR_pessimistic"] == 100
    assert found["image_to_text"]["mean_rank"] == found["text_to_image"]["median_rank"] == 1


def shared_caption_features():
    """Two images with a caption each of their own and one, at 45 degrees, in common."""
    images = torch.eye(2)
    common = F.normalize(torch.ones(2), dim=0)
    return images, torch.stack([images[0], common, images[1], common]), [0, 0, 1, 1]


def test_a_caption_of_two_images_ties_them():
    found = retrieval_metrics(*shared_caption_features(), ks=(1,))
    side = found["text_to_image"]
    assert (side["pessimistic"]["R@1"], side["R@1"], side["optimistic"]["R@1"]) == (50, 75, 100)
    assert side["mean_rank"] == 1.25
    assert found["image_to_text"]["R@1"] == 100
    assert (found["captions"], found["distinct_texts"]) == (4, 3)


def test_equal_captions_fit_equal_images_where_asked_for():
    texts = ["a ship", "Two ships ", "a plane", "two ships"]
    found = retrieval_metrics(*shared_caption_features(), captions=texts, ks=(1,))
    assert found["mR"] == found["mR_pessimistic"] == 100


# ------------------------------------------------------------------ features


def tied_features(images=30, texts=90, width=8, seed=0):
    """Unit features of which some are equal to the bit; every image has a text."""
    generator = torch.Generator().manual_seed(seed)
    image = F.normalize(torch.randn(images, width, generator=generator), dim=-1)
    text = F.normalize(torch.randn(texts, width, generator=generator), dim=-1)
    image[5:9], text[10:40] = image[0], text[40:70]
    return image, text, np.arange(texts) % images


def test_row_order_changes_nothing():
    image, text, owners = tied_features()
    expected = retrieval_metrics(image, text, owners)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        rows, columns = rng.permutation(len(image)), rng.permutation(len(text))
        place = np.argsort(rows)
        found = retrieval_metrics(image[rows], text[columns], place[owners[columns]])
        assert found == expected


@pytest.mark.parametrize("chunk", [1, 7, 30])
def test_chunks_change_nothing(monkeypatch, chunk):
    expected = retrieval_metrics(*tied_features())
    monkeypatch.setattr(ranks, "_CHUNK", chunk)
    assert retrieval_metrics(*tied_features()) == expected


def test_identical_captions_tie_exactly():
    image = F.normalize(torch.randn(12, 512, generator=torch.Generator().manual_seed(0)), dim=-1)
    text = image[:1].repeat(60, 1)  # every caption the same, on products that round
    side = retrieval_metrics(image, text, np.repeat(np.arange(12), 5))["image_to_text"]
    # Five of sixty tied rows are relevant: the first stands at 61 / 6 on average.
    assert side["mean_rank"] == pytest.approx(61 / 6)
    assert (side["pessimistic"]["R@10"], side["optimistic"]["R@1"]) == (0, 100)
    assert side["R@1"] == pytest.approx(100 * 5 / 60)


def test_a_k_beyond_the_gallery_is_an_error():
    image, text, owners = tied_features()
    with pytest.raises(ValueError, match=r"R@31 text_to_image.*30"):
        retrieval_metrics(image, text, owners, ks=(1, 31))
    with pytest.raises(ValueError, match=r"R@91 image_to_text.*90"):
        retrieval_metrics(image, text, owners, ks=(91,))


@pytest.mark.parametrize("which", [0, 1])
def test_nan_is_an_error(which):
    features = tied_features()
    features[which][3, 2] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        retrieval_metrics(*features)


def test_an_image_without_caption_is_an_error():
    image, text, owners = tied_features()
    with pytest.raises(ValueError, match=r"1 images have no caption, the first: 4"):
        retrieval_metrics(image, text, np.where(owners == 4, 5, owners))


# ------------------------------------------------------------------ which data


SAVED = {
    "dataset": ["ucm", "rsicd"],
    "data_root": ["u", "r"],
    "det_json": None,
    "annotations": ["auto", "pir"],
    "max_objects": 20,
    "seed": 3,
}


def test_given_options_replace_a_checkpoints():
    assert merged({"dataset": None, "data_root": None}, SAVED) == SAVED
    assert merged({"max_objects": 9}, SAVED) == {**SAVED, "max_objects": 9}
    assert merged({"dataset": ["ucm", "rsicd"]}, SAVED) == SAVED


def places(given, saved=SAVED):
    found = merged(given, saved)
    return [found[name] for name in ("dataset", "data_root", "det_json", "annotations")]


def test_a_data_set_keeps_its_places_by_name():
    assert places({"dataset": ["rsicd"]}) == [["rsicd"], ["r"], None, ["pir"]]
    turned = {"dataset": ["rsicd", "ucm"]}
    assert places(turned) == [["rsicd", "ucm"], ["r", "u"], None, ["pir", "auto"]]
    detected = {**SAVED, "det_json": ["d", None]}
    assert places({"dataset": ["ucm"]}, detected) == [["ucm"], ["u"], ["d"], ["auto"]]
    assert places({"det_json": ["x", "y"]}) == [["ucm", "rsicd"], ["u", "r"], ["x", "y"]] + [
        ["auto", "pir"]
    ]


def test_another_data_set_brings_its_own_places():
    assert places({"dataset": ["scenes"]}) == [["scenes"], None, None, None]
    assert places({"dataset": ["own"], "data_root": ["o"]}) == [["own"], ["o"], None, None]
    mixed = {"dataset": ["scenes", "rsicd"]}
    assert places(mixed) == [["scenes", "rsicd"], [None, "r"], None, [None, "pir"]]


def test_another_root_drops_the_places_in_the_old_one():
    detected = {**SAVED, "dataset": ["ucm"], "data_root": ["u"], "det_json": ["d"]}
    assert places({"data_root": ["c"]}, detected) == [["ucm"], ["c"], None, ["auto"]]
    both = {"data_root": ["c"], "det_json": ["e"]}
    assert places(both, detected) == [["ucm"], ["c"], ["e"], ["auto"]]
    moved = {"dataset": ["rsicd"], "data_root": ["c"]}
    assert places(moved, SAVED) == [["rsicd"], ["c"], None, ["pir"]]  # its form came along
    form = {**moved, "annotations": ["txt"]}
    assert places(form, SAVED) == [["rsicd"], ["c"], None, ["txt"]]
    no_data = {**SAVED, "dataset": None, "data_root": None, "annotations": None}
    own = {"dataset": ["ucm"], "data_root": ["c"]}
    assert places(own, no_data) == [["ucm"], ["c"], None, None]


# ------------------------------------------------------------------ the script


@pytest.fixture
def checkpoint(save_tiny, mini):
    left_out = {"mini": {"by_name": ["a"], "captions": 2}}
    arguments = "--dataset", "mini", "--data-root", str(mini)
    return save_tiny("tiny.pth", *arguments, epoch=7, left_out=left_out)


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


def test_script_measures_a_checkpoint(tmp_path, checkpoint, mini, device, capsys):
    out = tmp_path / "new" / "result.json"
    arguments = ["--checkpoint", str(checkpoint), "--json", str(out), "--device", device.type]
    [result] = evaluate.main(arguments)
    content = json.loads(out.read_text(encoding="utf-8"))
    [written] = content["results"]
    assert content["command"] == f"python evaluate.py {' '.join(arguments)}"
    assert (written["dataset"], written["split"], written["epoch"]) == ("mini", "test", 7)
    digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert written["checkpoint_sha256"] == digest
    assert written["checkpoint"] == str(checkpoint)
    assert written["left_out"] == {"mini": {"by_name": ["a"], "captions": 2}}
    assert str(mini) in written["origin"]
    assert written["caption_equivalence"] is False
    assert (written["images"], written["captions"]) == (12, 60)
    assert written == json.loads(json.dumps(result))
    printed = capsys.readouterr().out
    assert f"mR {result['mR']:.1f}, 95 % interval" in printed
    assert printed.endswith(f"written to {out}\n")


def test_results_hold_the_figures_by_image_and_their_intervals(checkpoint, mini):
    [result] = run(checkpoint)
    records = read_annotations(mini).splits["test"]
    table = result["per_image"]
    assert table["names"] == [record.name for record in records]
    assert table["captions"] == [len(record.captions) for record in records]
    of_images = figures(table)
    assert of_images["mR"] == pytest.approx(result["mR"], abs=0.01)
    assert result["intervals"] == bootstrap(table)
    for direction in ("image_to_text", "text_to_image"):
        for k in (1, 5, 10):
            value, (low, high) = (
                part[direction][f"R@{k}"] for part in (result, result["intervals"])
            )
            assert of_images[direction][f"R@{k}"] == pytest.approx(value, abs=0.01)
            assert low - 0.01 <= value <= high + 0.01


def test_written_options_are_the_datas_and_those_of_training(tmp_path, checkpoint, mini):
    how = ["--graph-control", "no-edges", "--caption-equivalence", "--batch-size", "5"]
    run(checkpoint, *how, "--json", tmp_path / "result.json")
    content = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    [written] = content["results"]
    assert "options" not in written and written["caption_equivalence"] is True
    trained = parse(["--dataset", "mini", "--data-root", str(mini)])[0]
    names = vars(evaluate.parse([])[0]).keys() & trained.keys() - {
        "device",
        "batch_size",
        "activation",
    }
    assert written["data_options"] == {
        **{name: trained[name] for name in names},
        "annotations": ["auto"],
        "graph_control": "no-edges",
    }
    assert written["training_options"] == json.loads(json.dumps(trained))
    assert (trained["batch_size"], trained["graph_control"]) == (128, "own")


def test_data_options_that_are_not_given_are_the_checkpoints():
    options, given = evaluate.parse(["--workers", "2", "--split", "val"])
    assert options.split == "val"
    assert given.pop("workers") == 2
    known = {"dataset", "data_root", "det_json", "annotations", "clean", "template"}
    assert known | {"graph_control", "cache_gb", "cache_dir"} <= set(given)
    assert set(given.values()) == {None}


@pytest.mark.parametrize("option", [["--augment", "flip"], ["--drop-graphs", "0.5"]])
def test_options_of_training_data_are_refused(option, capsys):
    assert parse(option)
    with pytest.raises(SystemExit):
        evaluate.parse(option)
    assert option[0] in capsys.readouterr().err


def test_missing_and_unreadable_images_are_one_error(tmp_path, checkpoint):
    root = tmp_path / "broken"
    scenes.generate(root, splits={"train": 2, "val": 2, "test": 11})
    gone, broken, *_ = (record.name for record in read_annotations(root).splits["test"])
    (root / "images" / gone).unlink()
    (root / "images" / broken).write_bytes(b"broken")
    with pytest.raises(ValueError, match="^2 images are missing or unreadable") as failure:
        run(checkpoint, "--data-root", root)
    assert gone in str(failure.value) and broken in str(failure.value)


def test_script_measures_another_split_and_another_data_set(checkpoint, other):
    assert run(checkpoint, "--split", "train")[0]["images"] == 24
    [found] = run(checkpoint, "--dataset", "other", "--data-root", other)
    assert (found["images"], found["data_options"]["data_root"]) == (13, [str(other)])
    with pytest.raises(ValueError, match="no split 'dev'.*train, val, test"):
        run(checkpoint, "--split", "dev")


def test_caption_equivalence_never_lowers_a_figure(checkpoint):
    [strict] = run(checkpoint, "--split", "train")
    [equivalent] = run(checkpoint, "--split", "train", "--caption-equivalence")
    for side in ("image_to_text", "text_to_image"):
        assert all(equivalent[side][f"R@{k}"] >= strict[side][f"R@{k}"] for k in (1, 5, 10))


def test_script_agrees_with_encoding_one_by_one_and_sorting(checkpoint):
    [found] = run(checkpoint, "--split", "val")
    network, saved = load_checkpoint(checkpoint)
    data = RetrievalData(saved["options"], *sources(saved["options"]))
    records = data.records("val")
    image_set = data.image_set("val", saved["definition"]["image_size"], read_label_map())
    images = encode_images(network, image_set, "cpu", batch_size=1)["fused"]
    hits = []
    for i, record in enumerate(records):
        for caption in record.captions:
            scores = images @ encode_texts(network, [caption], "cpu")[0]
            hits.append(i in torch.argsort(scores, descending=True)[:5].tolist())
    assert found["text_to_image"]["R@5"] == pytest.approx(100 * np.mean(hits))


# ------------------------------------------------------------------ several at once


def measured(results):
    """What was measured, without what a command or a file is called."""
    keys = ("dataset", "images", "mR", "image_to_text", "text_to_image", "per_image", "intervals")
    return [{key: result[key] for key in keys} for result in results]


def test_several_checkpoints_and_data_sets_are_measured_as_alone(
    save_tiny, mini, other, monkeypatch, capsys
):
    files = [
        save_tiny(f"{seed}.pth", "--dataset", "mini", "--data-root", str(mini), "--seed", seed)
        for seed in "01"
    ]
    both = ["--dataset", "mini", "other", "--data-root", mini, other]
    alone = [
        run(file, "--dataset", name, "--data-root", root)[0]
        for file in files
        for name, root in (("mini", mini), ("other", other))
    ]
    reads = []
    read = dataloader.read_images
    monkeypatch.setattr(dataloader, "read_images", lambda *a: reads.append(a) or read(*a))
    capsys.readouterr()
    results = run(files, *both)
    assert measured(results) == measured(alone)
    assert len({result["mR"] for result in results}) > 2
    assert len(reads) == 2  # the seeds differ, the images do not
    heads, *rows = capsys.readouterr().out.splitlines()[-7:]
    names = [str(files[0]), str(files[1]), "mean"]
    assert [row.startswith(name) for row, name in zip(rows, names * 2, strict=True)] == [True] * 6
    assert heads.split()[0] == "checkpoint"


def test_each_checkpoint_keeps_its_own_data_options(save_tiny, plain_clip, mini):
    places = ["--dataset", "mini", "--data-root", str(mini)]
    differences = [
        [],
        ["--clean", "pir", "--graph-control", "no-edges"],
        ["--graph-control", "exchanged"],
        ["--graph-control", "exchanged", "--seed", "1"],
        ["--max-objects", "2"],
    ]
    files = [save_tiny(f"{i}.pth", *places, *how) for i, how in enumerate(differences)]
    files.append(plain_clip)  # its images are larger
    together = run(files, *places)
    assert measured(together) == measured([run(file, *places)[0] for file in files])
    assert len({str(result["image_to_text"]) for result in together}) == len(files)
    assert together[1]["data_options"]["clean"] == "pir"


def test_html_and_ranks_show_the_queries_of_the_result(tmp_path, checkpoint, capsys):
    page, table = tmp_path / "new" / "page.html", tmp_path / "ranks.csv"
    [result] = run(checkpoint, "--html", page, "--ranks", table)
    rows = list(csv.DictReader(table.open(newline="", encoding="utf-8")))
    assert len(rows) == 12 + 60 and "checkpoint" not in rows[0]
    for direction in ("image_to_text", "text_to_image"):
        ranks = [float(row["rank"]) for row in rows if row["direction"] == direction]
        assert np.mean(ranks) == pytest.approx(result[direction]["mean_rank"], abs=1e-5)
    text = page.read_text(encoding="utf-8")
    worst = max(rows[12:], key=lambda row: float(row["rank"]))
    assert f"mR {result['mR']:.1f}" in text and worst["caption"] in text
    assert text.count("<article>") == 12 + 30
    assert f"written to {page}" in capsys.readouterr().out


def test_html_of_several_results_is_an_error(tmp_path, checkpoint, mini, other):
    arguments = ["--html", tmp_path / "page.html"]
    with pytest.raises(ValueError, match="--html shows one result"):
        run([checkpoint, checkpoint], *arguments)
    both = ["--dataset", "mini", "other", "--data-root", mini, other]
    with pytest.raises(ValueError, match="--html shows one result"):
        run(checkpoint, *arguments, *both)


def test_ranks_of_several_results_name_them(tmp_path, checkpoint, mini, other):
    table = tmp_path / "ranks.csv"
    run(checkpoint, "--ranks", table, "--dataset", "mini", "other", "--data-root", mini, other)
    rows = list(csv.DictReader(table.open(newline="", encoding="utf-8")))
    assert [row["dataset"] for row in rows] == ["mini"] * 72 + ["other"] * 78
    assert {row["checkpoint"] for row in rows} == {str(checkpoint)}


def test_two_result_files_are_compared(tmp_path, save_tiny, mini, other, capsys):
    place = ["--dataset", "mini", "--data-root", str(mini)]
    runs = [save_tiny(f"{seed}.pth", *place, "--seed", seed) for seed in "0123"]
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    both = ["--dataset", "mini", "other", "--data-root", mini, other]
    a, b = run(runs[:2], "--json", files[0]), run(runs[2:], "--json", files[1], *both)
    capsys.readouterr()
    [found] = evaluate.main(["--compare", *map(str, files)])
    means = [np.mean([r["mR"] for r in own if r["dataset"] == "mini"]) for own in (a, b)]
    first, *_, last = capsys.readouterr().out.splitlines()
    assert found.difference["mR"].value == pytest.approx(means[0] - means[1], abs=0.02)
    assert first.startswith(
        f"mini test, 12 images, 2 and 2 runs: mR {means[0]:.1f} - {means[1]:.1f} = "
    )
    assert last == "other test: in one of the files only"
    with pytest.raises(ValueError, match=r"gone\.json: not readable .*--json"):
        evaluate.main(["--compare", str(files[0]), str(tmp_path / "gone.json")])


# ------------------------------------------------------------------ plain CLIPs, and warnings


def test_a_plain_clip_is_measured_without_graph(plain_clip, mini, capsys):
    [found] = run(plain_clip, "--dataset", "mini", "--data-root", mini)
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
    assert found["checkpoint_sha256"] == hashlib.sha256(plain_clip.read_bytes()).hexdigest()
    assert "synthetic scenes" not in "".join(capsys.readouterr())


def test_a_plain_clip_needs_a_data_set(plain_clip):
    with pytest.raises(ValueError, match=r"plain\.pt: a plain CLIP.*--dataset"):
        run(plain_clip)
    with pytest.raises(ValueError, match="--dataset ucm needs --data-root"):
        run(plain_clip, "--dataset", "ucm")


def test_a_name_without_weights_and_a_foreign_file_are_errors(tmp_path, monkeypatch):
    monkeypatch.setattr(clip, "MODELS", tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    no_network = "http://127.0.0.1:9"  # the port of nothing
    monkeypatch.setattr(clip, "find_openai", partial(loading.find_openai, base_url=no_network))
    with pytest.raises(ValueError, match=f"^ViT-B/32: .* put it as ViT-B-32.pt into {tmp_path}"):
        load_model("ViT-B/32", "cpu")
    torch.save({"some": torch.zeros(2)}, tmp_path / "foreign.pt")
    with pytest.raises(ValueError, match=r"foreign\.pt: not an FG-CROSS checkpoint; as a CLIP"):
        load_model(str(tmp_path / "foreign.pt"), "cpu")


def test_a_clip_by_its_name_has_the_digest_of_its_file(plain_clip, mini, tmp_path, monkeypatch):
    monkeypatch.setattr(clip, "MODELS", tmp_path)
    digest = hashlib.sha256(plain_clip.read_bytes()).hexdigest()
    plain_clip.rename(tmp_path / "ViT-B-32.pt")
    [found] = run("ViT-B/32", "--dataset", "mini", "--data-root", mini)
    assert (found["checkpoint"], found["checkpoint_sha256"]) == ("ViT-B/32", digest)


def test_a_result_tells_the_activation_of_a_plain_clip(plain_clip, mini, tmp_path):
    torch.save(clip.load(plain_clip)[0].state_dict(), tmp_path / "silent.pt")
    found = {}
    for activation in ("gelu", "quickgelu"):
        how = ["--activation", activation, "--dataset", "mini", "--data-root", mini]
        [found[activation]] = run(tmp_path / "silent.pt", *how)
        assert found[activation]["definition"]["activation"] == activation
        assert found[activation]["training_options"]["activation"] == activation
    assert found["gelu"]["mR"] != found["quickgelu"]["mR"]


def test_a_model_of_scenes_on_other_images_is_warned_of(save_tiny, mini, monkeypatch, capsys):
    monkeypatch.setattr(retrieval_data.scenes, "generate", lambda root: None)
    place = ["--data-root", str(mini)]
    scenes_model, mini_model = save_tiny("s.pth"), save_tiny("m.pth", "--dataset", "mini", *place)
    for model, name, warned in (
        (scenes_model, "mini", True),
        (scenes_model, "scenes", False),
        (mini_model, "mini", False),
        (mini_model, "scenes", False),
    ):
        run(model, "--dataset", name, *place)
        assert capsys.readouterr().err.count(SCENES) == warned
    assert "--checkpoint ViT-B/32" in SCENES and "train.py --dataset" in SCENES
