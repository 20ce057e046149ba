"""Retrieval metrics against loops over random tie orders, and the script that reports them."""

import hashlib
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import evaluate
import scenes
import train
from annotations import normal_form, read_annotations
from clip_gcn_image_feature_integration import encode_images, encode_texts
from dataloader import RetrievalData
from evaluate import merged, metrics, retrieval_metrics, retrieval_ranks, table
from model import load_checkpoint, save_checkpoint
from V_Graph import read_labels

OWNERS = np.array([0, 0, 1, 2, 2, 2, 3, 4, 4, 5, 5, 5])  # the image of each caption
IMAGES = 6
SHUFFLES = 20000  # shared by the queries of a matrix
KS = (1, 3, 5)


def score_matrix(kind, columns=12):
    scores = np.random.default_rng(0).uniform(-1, 1, (IMAGES, columns))
    return {"distinct": scores, "rounded": scores.round(), "equal": 0 * scores}[kind]


def queries(scores, owners=OWNERS):
    """(scores of a query, whether each gallery item is relevant), image to text first."""
    scores = np.asarray(scores)
    to_text = [(row, owners == i) for i, row in enumerate(scores)]
    to_image = [(scores[:, t], np.arange(len(scores)) == owners[t]) for t in range(len(owners))]
    return to_text, to_image


def first_relevant(scores, relevant, order):
    """Rank, from 1, of the first relevant item, the tied being in the given order."""
    ranked = order[np.argsort(-scores[order], kind="stable")]
    return 1 + int(np.flatnonzero(relevant[ranked])[0])


def check_against_orders(ranks, cases):
    """Expected ranks and recalls against shuffles, the bounds against the best and worst order."""
    rng = np.random.default_rng(0)
    for q, (scores, relevant) in enumerate(cases):
        orders = (rng.permutation(len(scores)) for _ in range(SHUFFLES // len(cases)))
        found = np.array([first_relevant(scores, relevant, order) for order in orders])
        error = 4 * max(found.std(), 1e-9) / math.sqrt(len(found))
        assert ranks.expected()[q] == pytest.approx(found.mean(), abs=error)
        worst = first_relevant(scores, relevant, np.argsort(relevant, kind="stable"))
        best = first_relevant(scores, relevant, np.argsort(~relevant, kind="stable"))
        for k in KS:
            pessimistic, expected, optimistic = (part[q] for part in ranks.recall(k))
            hits = found <= k
            share = hits.mean()
            error = 4 * math.sqrt(max(share * (1 - share), 1 / len(found)) / len(found)) + 1e-9
            if share in (0, 1) and (worst <= k) == (best <= k):
                error = 1e-9  # no tie decides this one
            assert expected == pytest.approx(share, abs=error)
            assert (pessimistic, optimistic) == (worst <= k, best <= k)


# ------------------------------------------------------------------ ranks


@pytest.mark.parametrize("kind", ["distinct", "rounded", "equal"])
def test_ranks_are_the_mean_over_orders_of_the_tied(kind):
    scores = score_matrix(kind)
    for ranks, cases in zip(retrieval_ranks(scores, OWNERS), queries(scores), strict=True):
        check_against_orders(ranks, cases)


def test_expected_recall_of_two_relevant_among_five_tied():
    # A miss of both in k draws: (3/5), (3/5)(2/4), (3/5)(2/4)(1/3), 0.
    ranks = evaluate.Ranks(*(np.array([n]) for n in (0, 5, 2)))
    found = [ranks.recall(k)[1][0] for k in (1, 2, 3, 4, 5)]
    assert found == pytest.approx([0.4, 0.7, 0.9, 1.0, 1.0])
    assert ranks.expected()[0] == pytest.approx(1 * 0.4 + 2 * 0.3 + 3 * 0.2 + 4 * 0.1)
    assert [ranks.recall(k)[0][0] for k in (3, 4)] == [0, 1]
    assert ranks.recall(1)[2][0] == 1


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


@pytest.mark.parametrize("kind", ["distinct", "rounded", "equal"])
def test_distinct_texts_equal_repeated_columns(kind):
    text_index = np.array([3, 0, 1, 1, 2, 2, 0, 4, 3, 3, 4, 1])
    scores = score_matrix(kind, columns=5)
    short = metrics(*retrieval_ranks(scores, OWNERS, text_index), KS)
    assert short == metrics(*retrieval_ranks(scores[:, text_index], OWNERS), KS)


@pytest.mark.parametrize("kind", ["distinct", "rounded", "equal"])
def test_caption_groups_equal_a_loop(kind):
    scores = score_matrix(kind)
    groups = np.array([0, 1, 2, 0, 3, 4, 5, 1, 1, 6, 7, 2])
    of_image = [set(groups[i == OWNERS]) for i in range(IMAGES)]
    to_text, to_image = queries(scores)
    to_text = [
        (row, np.array([g in of_image[i] for g in groups])) for i, (row, _) in enumerate(to_text)
    ]
    to_image = [
        (column, np.array([groups[t] in own for own in of_image]))
        for t, (column, _) in enumerate(to_image)
    ]
    found = retrieval_ranks(scores, OWNERS, groups=groups)
    for ranks, cases in zip(found, (to_text, to_image), strict=True):
        check_against_orders(ranks, cases)


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
    monkeypatch.setattr(evaluate, "_CHUNK", chunk)
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


# ------------------------------------------------------------------ the script


def test_table_prints_the_figures():
    text = table(retrieval_metrics(*tied_features()), "mini test")
    side = retrieval_metrics(*tied_features())["text_to_image"]
    assert "mini test: 30 images, 90 captions (60 distinct)" in text
    row = next(line for line in text.splitlines() if line.startswith("text to image"))
    expected = [side["R@1"], side["R@5"], side["R@10"], side["mean_rank"], side["median_rank"]]
    assert row.split()[3:] == [f"{value:.1f}" for value in expected]


@pytest.mark.parametrize(("gap", "shown"), [(0.0, False), (0.09, False), (0.11, True)])
@pytest.mark.parametrize("bound", ["pessimistic", "optimistic"])
def test_bounds_are_printed_where_they_differ_by_a_tenth(bound, gap, shown):
    side = {"R@1": 20.0, "R@5": 50.0, "R@10": 70.0, "mean_rank": 9.0, "median_rank": 5.0}
    recalls = {key: side[key] for key in ("R@1", "R@5", "R@10")}
    sign = 1 if bound == "optimistic" else -1
    wide = {**recalls, "R@5": recalls["R@5"] + sign * gap}
    sides = {**side, "pessimistic": recalls, "optimistic": recalls}
    result = {
        "images": 10,
        "captions": 50,
        "distinct_texts": 40,
        "image_to_text": {**sides, bound: wide},
        "text_to_image": sides,
        "mR": 46.0,
        "mR_pessimistic": 46.0,
        "mR_optimistic": 46.0,
        f"mR_{bound}": 46.0 + sign * gap,
    }
    lines = table(result, "mini").splitlines()
    ties = [line for line in lines if "ties" in line]
    assert len(ties) == (2 if shown else 0)
    if shown:
        low, high = sorted([50.0, 50.0 + sign * gap])
        assert ties[0].strip() == f"ties: R@5 between {low:.1f} and {high:.1f}"
        assert lines[-1].startswith("mR 46.0 (ties: between ")


def test_given_options_replace_a_checkpoints():
    saved = {"dataset": "ucm", "data_root": "a", "det_json": "b", "max_objects": 20, "seed": 3}
    assert merged({"dataset": None, "data_root": None}, saved) == saved
    assert merged({"max_objects": 9}, saved) == {**saved, "max_objects": 9}
    assert merged({"dataset": "ucm"}, saved) == saved


def test_another_data_set_brings_its_own_folders():
    saved = {"dataset": "ucm", "data_root": "a", "det_json": "b"}
    other = merged({"dataset": "scenes"}, saved)
    assert other == {"dataset": "scenes", "data_root": None, "det_json": None}
    moved = merged({"data_root": "c"}, saved)
    assert moved == {"dataset": "ucm", "data_root": "c", "det_json": None}
    both = merged({"data_root": "c", "det_json": "d"}, saved)
    assert both == {"dataset": "ucm", "data_root": "c", "det_json": "d"}


@pytest.fixture
def checkpoint(tmp_path, tiny_model, tiny_definition, mini):
    path = tmp_path / "tiny.pth"
    options = train.parse(["--dataset", "mini", "--data-root", str(mini)])
    save_checkpoint(path, tiny_model(), tiny_definition, read_labels().lines, options, epoch=7)
    return path


def test_script_measures_a_checkpoint(tmp_path, checkpoint, mini, device, capsys):
    out = tmp_path / "new" / "result.json"
    arguments = ["--checkpoint", str(checkpoint), "--json", str(out), "--device", device.type]
    result = evaluate.main(arguments)
    written = json.loads(out.read_text(encoding="utf-8"))
    assert (written["dataset"], written["split"], written["epoch"]) == ("mini", "test", 7)
    digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert written["checkpoint_sha256"] == digest
    assert written["data_options"]["data_root"] == str(mini)
    assert written["caption_equivalence"] is False
    assert (written["images"], written["captions"]) == (12, 60)
    for key in ("mR", "image_to_text", "text_to_image", "mR_pessimistic", "mR_optimistic"):
        assert written[key] == result[key]
    assert f"mR {result['mR']:.1f}" in capsys.readouterr().out


def test_written_options_are_the_datas_and_those_of_training(tmp_path, checkpoint, mini):
    fixed = ["--checkpoint", str(checkpoint), "--device", "cpu", "--batch-size", "5"]
    how = ["--graph-control", "no-edges", "--caption-equivalence"]
    evaluate.main([*fixed, *how, "--json", str(tmp_path / "result.json")])
    written = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert "options" not in written and written["caption_equivalence"] is True
    assert written["data_options"] == {
        "dataset": "mini",
        "data_root": str(mini),
        "det_json": None,
        "graph_control": "no-edges",
        "cache_gb": 4,
        "workers": 0,
    }
    trained = train.parse(["--dataset", "mini", "--data-root", str(mini)])
    assert written["training_options"] == json.loads(json.dumps(trained))
    assert (trained["batch_size"], trained["graph_control"]) == (128, "own")


def test_data_options_that_are_not_given_are_the_checkpoints():
    options, given = evaluate.parse(["--workers", "2", "--split", "val"])
    assert options.split == "val"
    assert given.pop("workers") == 2
    assert set(given) == {"dataset", "data_root", "det_json", "graph_control", "cache_gb"}
    assert set(given.values()) == {None}


@pytest.mark.parametrize("option", [["--augment", "flip"], ["--drop-graphs", "0.5"]])
def test_options_of_training_data_are_refused(option, capsys):
    assert train.parse(option)
    with pytest.raises(SystemExit):
        evaluate.parse(option)
    assert option[0] in capsys.readouterr().err


def test_missing_and_unreadable_images_are_one_error(tmp_path, checkpoint):
    root = tmp_path / "broken"
    scenes.generate(root, splits={"train": 2, "val": 2, "test": 11})
    gone, broken, *_ = (record.name for record in read_annotations(root).splits["test"])
    (root / "images" / gone).unlink()
    (root / "images" / broken).write_bytes(b"broken")
    fixed = ["--checkpoint", str(checkpoint), "--device", "cpu", "--data-root", str(root)]
    with pytest.raises(ValueError, match="^2 images are missing or unreadable") as failure:
        evaluate.main(fixed)
    assert gone in str(failure.value) and broken in str(failure.value)


def test_script_measures_another_split_and_another_data_set(tmp_path, checkpoint):
    other = tmp_path / "other"
    scenes.generate(other, seed=5, splits={"train": 2, "val": 11, "test": 13})
    fixed = ["--checkpoint", str(checkpoint), "--device", "cpu"]
    assert evaluate.main([*fixed, "--split", "train"])["images"] == 24
    assert evaluate.main([*fixed, "--dataset", "other", "--data-root", str(other)])["images"] == 13
    with pytest.raises(ValueError, match="no split 'dev'.*train, val, test"):
        evaluate.main([*fixed, "--split", "dev"])


def test_caption_equivalence_never_lowers_a_figure(checkpoint):
    fixed = ["--checkpoint", str(checkpoint), "--device", "cpu", "--split", "train"]
    strict, equivalent = evaluate.main(fixed), evaluate.main([*fixed, "--caption-equivalence"])
    for side in ("image_to_text", "text_to_image"):
        assert all(equivalent[side][f"R@{k}"] >= strict[side][f"R@{k}"] for k in (1, 5, 10))


def test_script_agrees_with_encoding_one_by_one_and_sorting(checkpoint):
    found = evaluate.main(["--checkpoint", str(checkpoint), "--device", "cpu", "--split", "val"])
    network, saved = load_checkpoint(checkpoint)
    data = RetrievalData(saved["options"])
    records = data.records("val")
    image_set = data.image_set("val", saved["definition"]["image_size"], read_labels())
    images = encode_images(network, image_set, "cpu", batch_size=1)["fused"]
    hits = []
    for i, record in enumerate(records):
        for caption in record.captions:
            scores = images @ encode_texts(network, [caption], "cpu")[0]
            hits.append(i in torch.argsort(scores, descending=True)[:5].tolist())
    assert found["text_to_image"]["R@5"] == pytest.approx(100 * np.mean(hits))
