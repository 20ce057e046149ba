"""Training: it learns, it is reproducible, it trains what it says, and it says what went wrong."""

import json
import math
import shutil
import sys

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import clip
import dataloader as retrieval_data
import evaluate
import train
import training.inputs as training_data
import training.step as learner
from backbones import preprocess
from conftest import changed, is_new, log_of, weights_of
from dataloader import RetrievalData, sources
from dataset import scenes
from dataset.annotations import prepared, read_annotations
from dataset.augment import AUGMENTATIONS
from dataset.batches import TrainingSet
from det_formats.det_json import read_label_map
from loss import info_nce, positive_mask
from model import VERSION, load_checkpoint
from training import curves

# ------------------------------------------------------------------ learning


@pytest.mark.parametrize("graph", ["object", "none"])
def test_learns_in_48_steps(run, device, graph):
    folder = run("--graph", graph, "--epochs", "16", "--device", device.type, "--drop-graphs", "0")
    losses = [line["loss"] for line in log_of(folder)]
    assert len(losses) == 16
    assert losses[0] > 1.5 and losses[-1] < 0.5 * losses[0]
    fixed = ["--checkpoint", str(folder / "last.pth"), "--split", "train"]
    [result] = evaluate.main([*fixed, "--device", device.type])
    assert result["mR"] > 45  # by chance: about 20


@pytest.mark.parametrize("loss", ["hinge", "hinge-max"])
def test_learns_by_the_hinge(run, loss):
    losses = [line["loss"] for line in log_of(run("--loss", loss, "--epochs", "8"))]
    assert losses[-1] < 0.7 * losses[0]


def test_the_same_seed_gives_the_same_weights(run):
    arguments = ("--epochs", "2", "--augment", *AUGMENTATIONS)
    first, again = (run(*arguments, "--seed", "3", out=out) for out in ("first", "again"))
    assert not changed(weights_of(first), weights_of(again))
    keys = ("loss", "val_mR", "logit_scale")
    assert [[line[k] for k in keys] for line in log_of(first)] == [
        [line[k] for k in keys] for line in log_of(again)
    ]


def test_workers_do_not_change_the_weights(run):
    alone, workers = run(out="alone"), run("--workers", "2", out="workers")
    assert not changed(weights_of(alone), weights_of(workers))


def test_another_seed_gives_other_weights(run, started):
    first = weights_of(run("--seed", "3", out="first"))
    start = dict(started)
    other = weights_of(run("--seed", "4", out="other"))
    assert {"logit_scale", "text_projection", "gcn1.lin.weight"} <= changed(first, other)
    assert {"text_projection", "gcn1.lin.weight"} <= changed(start, started)


def test_an_epoch_equals_a_plain_loop(run, started):
    network, saved = load_checkpoint(run("--drop-graphs", "0") / "last.pth")
    options = saved["options"]
    network.load_state_dict(started)
    data = RetrievalData(options, *sources(options))
    images = data.image_set("train", saved["definition"]["image_size"], read_label_map())
    train_set = TrainingSet(
        images,
        data.records("train"),
        model_config=saved["definition"],
        augment=[],
        drop_graphs=0,
        seed=options["seed"],
    )
    batches = train_set.batches(1, 8)
    groups = [
        {"params": [p for p in network.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in network.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    for batch, share in zip(batches, (1, 1, 0.5), strict=True):  # warm-up, top, half way down
        for group in optimizer.param_groups:
            group["lr"] = share * options["lr_new"]
        graph = (batch[key] for key in ("nodes", "adjacency", "mask"))
        image_features = network.encode_image(preprocess.normalize(batch["image"]))
        fused = network.branches(image_features, *graph)[2]
        texts = F.normalize(network.encode_text(batch["text"]), dim=-1)
        mask = positive_mask(batch["index"], batch["text_id"], batch["caption_ids"])
        network.zero_grad()
        info_nce(fused @ texts.T, mask, network.logit_scale).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    for name, tensor in network.state_dict().items():
        # The gradient of a key's bias is rounding alone, which AdamW enlarges.
        if not name.endswith("attn.in_proj_bias"):
            torch.testing.assert_close(saved["weights"][name], tensor, rtol=0, atol=1e-5)


def test_only_training_images_to_be_cropped_are_kept_larger(run, monkeypatch):
    sizes, read = {}, retrieval_data.joint_image_set

    def remember(data_sets, split, image_size, label_map):
        sizes[split] = image_size
        return read(data_sets, split, image_size, label_map)

    monkeypatch.setattr(retrieval_data, "joint_image_set", remember)
    monkeypatch.setattr(training_data, "joint_image_set", remember)
    run("--augment", "crop", "colour")
    assert sizes == {"train": 43, "val": 32}
    run("--augment", "flip")
    assert sizes == {"train": 32, "val": 32}


# ------------------------------------------------------------------ what is written

FIELDS = {"epoch", "loss", "val_mR", "val", "logit_scale", "lr"}
FIELDS |= {"data_seconds", "compute_seconds", "val_seconds"}
SIDES = ("image_to_text", "text_to_image")


def test_checkpoints_and_log_are_written(run, mini, capsys):
    folder = run("--epochs", "3")
    assert sorted(path.name for path in folder.iterdir()) == [
        "best_model.pth",
        "last.pth",
        "log.jsonl",
    ]
    log = log_of(folder)
    assert [line["epoch"] for line in log] == [1, 2, 3]
    assert all(set(line) == FIELDS and set(line["val"]) == {"mini"} for line in log)
    for line in log:
        found = line["val"]["mini"]
        assert found["mR"] == line["val_mR"]
        recalls = [found[side][f"R@{k}"] for side in SIDES for k in (1, 5, 10)]
        assert found["mR"] == pytest.approx(sum(recalls) / 6)
        assert all(line[f"{part}_seconds"] > 0 for part in ("data", "compute", "val"))
    best = max(log, key=lambda line: line["val_mR"])  # the first where two are equal
    saved = load_checkpoint(folder / "best_model.pth")[1]
    assert (saved["epoch"], saved["best_score"]) == (best["epoch"], best["val_mR"])
    assert load_checkpoint(folder / "last.pth")[1]["epoch"] == 3
    assert (saved["options"]["dataset"], saved["options"]["data_root"]) == (["mini"], [str(mini)])
    assert list(saved["origin"]) == ["mini"] and f"text lists in {mini}" in saved["origin"]["mini"]
    assert saved["version"] == VERSION and len(saved["data_digest"]) == 32
    assert saved["options"]["model"] == saved["definition"]["name"] == "tiny"
    assert len(saved["labels"]) == len(read_label_map().lines)
    assert "best validation mR" in capsys.readouterr().out


def test_best_model_gives_its_logged_validation_score(run):
    folder = run("--epochs", "3")
    arguments = ["--split", "val", "--device", "cpu"]
    [found] = evaluate.main(["--checkpoint", str(folder / "best_model.pth"), *arguments])
    assert found["mR"] == pytest.approx(max(line["val_mR"] for line in log_of(folder)), abs=0.5)


def scripted_scores(monkeypatch, scores):
    """Lets validation find these mR, epoch by epoch."""
    values = iter(scores)
    sides = {"image_to_text": {}, "text_to_image": {}}
    monkeypatch.setattr(train, "evaluate", lambda *arguments: {"mR": next(values), **sides})


def test_best_model_is_the_best_on_validation(run, monkeypatch):
    scripted_scores(monkeypatch, [10.0, 30.0, 20.0, 30.0])
    folder = run("--epochs", "4")
    best = load_checkpoint(folder / "best_model.pth")[1]
    last = load_checkpoint(folder / "last.pth")[1]
    assert (best["epoch"], best["best_score"]) == (2, 30.0)
    progress = last["state"]["progress"]
    assert (last["epoch"], progress["best_epoch"], progress["best_score"]) == (4, 2, 30.0)
    assert changed(best["weights"], last["weights"])


def test_training_stops_when_validation_no_longer_improves(run, monkeypatch, capsys):
    scripted_scores(monkeypatch, [10.0, 30.0, 20.0, 30.0, 99.0])
    folder = run("--epochs", "5", "--patience", "2")
    assert [line["val_mR"] for line in log_of(folder)] == [10.0, 30.0, 20.0, 30.0]
    assert "stopped" in capsys.readouterr().out


def test_a_drawn_validation_split_is_written(run, mini, tmp_path, monkeypatch):
    shipped = tmp_path / "shipped"  # the same data set without its validation split
    shipped.mkdir()
    for name in ("images", "det_json", "train_filename.txt", "train_caps.txt"):
        (shipped / name).symlink_to(mini / name)
    monkeypatch.setattr("dataloader.VAL_FRACTION", 0.5)  # R@10 needs ten images
    folder = run("--data-root", str(shipped), "--seed", "5")
    drawn = json.loads((folder / "split.json").read_text(encoding="utf-8"))["mini"]
    names = [record.name for record in read_annotations(shipped).splits["train"]]
    assert len(drawn["train"]) == len(drawn["val"]) == 12
    assert sorted(drawn["train"] + drawn["val"]) == sorted(names)
    options = load_checkpoint(folder / "last.pth")[1]["options"]
    data = RetrievalData(options, *sources(options))
    assert drawn == {s: [record.name for record in data.records(s)] for s in ("train", "val")}


# ------------------------------------------------------------------ several data sets


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Another data set of 32 scenes."""
    folder = tmp_path_factory.mktemp("other")
    scenes.generate(folder, seed=5, splits={"train": 10, "val": 11, "test": 11})
    return folder


def both(*roots):
    return "--dataset", "mini", "other", "--data-root", *map(str, roots)


def test_two_data_sets_train_together(run, mini, other):
    folder = run(*both(mini, other), "--epochs", "2")
    log, saved = log_of(folder), load_checkpoint(folder / "best_model.pth")[1]
    for line in log:
        assert list(line["val"]) == ["mini", "other"] and set(line) == FIELDS
        scores = [result["mR"] for result in line["val"].values()]
        assert scores[0] != scores[1] and line["val_mR"] == pytest.approx(sum(scores) / 2)
    best = max(log, key=lambda line: line["val_mR"])
    assert (saved["epoch"], saved["best_score"]) == (best["epoch"], best["val_mR"])
    assert list(saved["origin"]) == ["mini", "other"] and str(other) in saved["origin"]["other"]
    nothing = {"by_name": [], "by_content": [], "no_caption_left": [], "captions": 0}
    assert saved["left_out"] == {"mini": nothing, "other": nothing}
    arguments = ["--checkpoint", str(folder / "best_model.pth"), "--split", "val"]
    found = evaluate.main([*arguments, "--device", "cpu"])
    assert [result["dataset"] for result in found] == ["mini", "other"]
    for result in found:
        assert result["mR"] == pytest.approx(best["val"][result["dataset"]]["mR"], abs=0.5)


def test_every_image_of_both_is_drawn_once_an_epoch(run, mini, other, monkeypatch):
    drawn, step = [], train.train_step

    def remember(learner, train_set, batch, *others):
        drawn.extend(train_set.image_set.paths[i] for i in batch["index"])
        return step(learner, train_set, batch, *others)

    monkeypatch.setattr(train, "train_step", remember)
    run(*both(mini, other), "--batch-size", "2", "--epochs", "2")
    names = [
        (root, r.name) for root in (mini, other) for r in read_annotations(root).splits["train"]
    ]
    assert len(names) == 34
    assert sorted(drawn) == sorted(2 * [root / "images" / name for root, name in names])


def test_what_is_left_out_is_saved_and_never_drawn(run, mini, other, tmp_path, monkeypatch):
    root = tmp_path / "overlapping"
    shutil.copytree(mini, root)
    names = [record.name for record in read_annotations(root).splits["train"]]
    test = [record.name for record in read_annotations(other).splits["test"]]
    (root / "images" / names[4]).unlink()
    Image.open(other / "images" / test[2]).save(root / "images" / names[4].replace("png", "bmp"))
    captions = [c for r in read_annotations(root).splits["train"][:1] for c in r.captions]
    with open(root / "test_caps.txt", "a", encoding="utf-8") as file:
        file.write("".join(f"{caption.upper()}\n" for caption in captions))
    with open(root / "test_filename.txt", "a", encoding="utf-8") as file:
        file.write(f"{names[7]}\n" * len(captions))
    drawn, step = set(), train.train_step

    def remember(learner, train_set, batch, *others):
        drawn.update(train_set.image_set.paths[i] for i in batch["index"])
        return step(learner, train_set, batch, *others)

    monkeypatch.setattr(train, "train_step", remember)
    arguments = ("--batch-size", "1", "--epochs", "2", "--drop-test-captions")
    left_out = load_checkpoint(run(*both(root, other), *arguments) / "last.pth")[1]["left_out"]
    assert left_out["mini"]["by_content"] == [names[4]]
    assert left_out["mini"]["by_name"] == [names[7]]
    assert left_out["mini"]["no_caption_left"][0] == names[0]
    assert left_out["mini"]["captions"] >= len(captions)
    gone = {name for reason in list(left_out["mini"].values())[:3] for name in reason}
    found = {path.name for path in drawn if root in path.parents}
    assert found == set(names) - gone and len(drawn) > len(found)


def test_training_and_evaluation_see_the_same_captions(run, mini, monkeypatch):
    how = ("--clean", "pir", "--template", "a satellite photo of {}.")
    seen, tokens, encode = [], set(), evaluate.encode_texts

    def remember_texts(network, texts, *others):
        seen.append(list(texts))
        return encode(network, texts, *others)

    step = train.train_step

    def remember_tokens(learner, train_set, batch, *others):
        tokens.update(tuple(row[row > 0].tolist()) for row in batch["text"])
        return step(learner, train_set, batch, *others)

    monkeypatch.setattr(evaluate, "encode_texts", remember_texts)
    monkeypatch.setattr(train, "train_step", remember_tokens)
    folder = run(*how, "--epochs", "2")
    saved = load_checkpoint(folder / "last.pth")[1]
    assert (saved["options"]["clean"], saved["options"]["template"]) == (how[1], how[3])
    evaluate.main(["--checkpoint", str(folder / "last.pth"), "--split", "train"])
    splits = read_annotations(mini).splits
    expected = {
        split: [prepared(text, how[1], how[3]) for r in splits[split] for text in r.captions]
        for split in ("train", "val")
    }
    assert all(text.startswith("a satellite photo of ") for text in expected["train"])
    assert seen == [expected["val"], expected["val"], expected["train"]]
    known = {tuple(row[row > 0].tolist()) for row in clip.tokenize(expected["train"])}
    assert len(tokens) > 24 and tokens <= known


# ------------------------------------------------------------------ curves


def test_a_plot_is_drawn_after_every_epoch(run, monkeypatch):
    pytest.importorskip("matplotlib")
    lines, plot = [], curves.plot_log

    def remember(log, path):
        lines.append([line["epoch"] for line in log])
        plot(log, path)
        assert Image.open(path).format == "PNG"

    monkeypatch.setattr(curves, "plot_log", remember)
    folder = run("--plot", "--epochs", "2")
    assert lines == [[1], [1, 2]] and (folder / "curve.png").is_file()


def test_tensorboard_has_the_logs_numbers(run):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = run("--tensorboard", "--epochs", "2")
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    for name in ("loss", "val_mR", "logit_scale", "data_seconds", "compute_seconds"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        for (step, value), line in zip(found, log_of(folder), strict=True):
            assert step == line["epoch"] and value == pytest.approx(line[name], rel=1e-6)


@pytest.mark.parametrize(
    ("option", "package", "module"),
    [
        ("--plot", "matplotlib", "matplotlib.figure"),
        ("--tensorboard", "tensorboard", "torch.utils.tensorboard"),
    ],
)
def test_a_missing_package_is_an_error_before_training(run, monkeypatch, option, package, module):
    before = (run() / "log.jsonl").read_bytes()
    for name in (package, module):
        monkeypatch.setitem(sys.modules, name, None)  # to import it is an ImportError
    steps = []
    monkeypatch.setattr(train, "train_step", lambda *_: steps.append(1) or 0.0)
    with pytest.raises(ValueError, match=f"pip install {package}"):
        run(option)
    folder = run()  # and not an error without the option
    assert len(steps) == 3 and (folder / "log.jsonl").read_bytes() != before


# ------------------------------------------------------------------ failures


def test_a_loss_that_is_not_finite_names_step_rate_and_images(run, mini, monkeypatch):
    calls = []

    def broken(image_features, *others):
        calls.append(1)
        scale = math.nan if len(calls) == 2 else 1.0
        return image_features.square().sum() * scale

    monkeypatch.setattr(learner, "batch_loss", broken)
    with pytest.raises(FloatingPointError) as failure:
        run("--lr-new", "0.004")
    message = str(failure.value)
    assert "loss nan in epoch 1, step 1" in message
    # Of three steps the first is the warm-up: the second has the whole rate.
    assert "4.00e-03" in message
    assert message.count(".png") == 8 and str(mini) in message


def test_wrong_options_are_errors_that_name_them(run, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="nowhere.*--data-root"):
        run("--data-root", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="nowhere.pt: no such file"):
        run("--clip", str(tmp_path / "nowhere.pt"))
    with pytest.raises(ValueError, match="nowhere.txt.*--labels"):
        run("--labels", str(tmp_path / "nowhere.txt"))
    with pytest.raises(ValueError, match="--clip.*--model"):
        run("--clip", "some.pt", "--model", "small")
    for given, said in (
        ("--train graph --graph none", "--train graph with --graph none"),
        ("--activation gelu", "--activation is for --clip"),
        ("--lora 4 8 0", "--lora is for --train lora"),
        ("--train lora --lora 2.5 8 0", "--lora: the rank is 2.5"),
        ("--train lora --lora 0 8 0", "rank 0"),
        ("--graph published --fusion gate", "--graph published .*leave --fusion out"),
        ("--graph published --max-objects 9", "leave --max-objects out"),
        ("--image-size 24", "--image-size 24: expected a multiple of 16"),
        ("--image-size 0", "--image-size 0: expected"),
    ):
        with pytest.raises(ValueError, match=said):
            run(*given.split())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--device cuda"):
        run("--device", "cuda")


def test_nothing_left_to_train_on_is_an_error(run, mini, tmp_path):
    root = tmp_path / "same"
    shutil.copytree(mini, root)
    for name in ("filename", "caps"):
        shutil.copy(root / f"train_{name}.txt", root / f"test_{name}.txt")
    with pytest.raises(ValueError, match="no training image"):
        run("--data-root", str(root))


def test_broken_images_of_both_splits_are_one_error(run, mini, tmp_path):
    root = tmp_path / "broken"
    shutil.copytree(mini, root)
    splits = read_annotations(root).splits
    gone, broken = splits["train"][3].name, splits["val"][5].name
    (root / "images" / gone).unlink()
    (root / "images" / broken).write_bytes(b"broken")
    with pytest.raises(ValueError, match="^2 images are missing or unreadable") as failure:
        run("--data-root", str(root))
    assert gone in str(failure.value) and broken in str(failure.value)


# ------------------------------------------------------------------ a pretrained start


def test_a_pretrained_start_has_its_weights(run, started, pretrained):
    path, weights = pretrained
    folder = run("--clip", str(path))
    assert all(torch.equal(started[name], tensor) for name, tensor in weights.items())
    assert load_checkpoint(folder / "last.pth")[1]["options"]["model"] == "tiny"
    assert {name for name in started if name not in weights} == set(filter(is_new, started))
    assert "positional_embedding" in changed(started, weights_of(folder))


def test_a_pretrained_start_without_graph_is_that_clip(run, started, pretrained):
    path, weights = pretrained
    run("--clip", str(path), "--graph", "none")
    assert not changed(started, weights)
