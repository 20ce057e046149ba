"""Training: it learns, it is reproducible, it writes what it says, and it says what went wrong."""

import hashlib
import json
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import clip
import clip_gcn_image_feature_integration as integration
import evaluate
import train
import training.step
from backbones import preprocess
from conftest import changed, is_new, log_of, weights_of
from dataloader import RetrievalData, sources
from dataset import scenes
from dataset.annotations import prepared, read_annotations
from dataset.batches import TrainingSet
from det_formats.det_json import read_label_map
from loss import directions, info_nce, positive_mask
from model import VERSION, load_checkpoint
from options import AUGMENTATIONS

# ------------------------------------------------------------------ learning


@pytest.mark.parametrize(
    ("given", "epochs", "share", "least"),
    [
        (("--drop-graphs", "0"), 12, 0.6, 45),  # mR by chance: about 20
        (("--graph", "none", "--loss", "hinge-max"), 6, 0.7, 20),
    ],
    ids=["InfoNCE", "hinge"],
)
def test_learns_in_a_few_steps(run, device, given, epochs, share, least):
    on_device = ("--device", device.type)
    folder = run(*given, *on_device, "--epochs", str(epochs))
    losses = [line["loss"] for line in log_of(folder)]
    assert len(losses) == epochs and losses[0] > 1.5 and losses[-1] < share * losses[0]
    fixed = ["--checkpoint", str(folder / "last.pth"), "--split", "train"]
    [result] = evaluate.main([*fixed, *on_device])
    assert result["mR"] > least


def test_the_seed_alone_decides_the_weights(run, started):
    arguments = ("--epochs", "2", "--augment", *AUGMENTATIONS)
    folder = run(*arguments, "--seed", "3", out="first")
    first, start = weights_of(folder), dict(started)
    again = run(*arguments, "--seed", "3", "--workers", "2", out="again")
    assert not changed(first, weights_of(again))
    keys = ("loss", "val_mR", "logit_scale")
    lines = []
    for out in (folder, again):
        lines.append([[line[key] for key in keys] for line in log_of(out)])
    assert lines[0] == lines[1]
    other = weights_of(run(*arguments, "--seed", "4", out="other"))
    assert {"logit_scale", "text_projection", "gcn1.lin.weight"} <= changed(first, other)
    assert {"text_projection", "gcn1.lin.weight"} <= changed(start, started)


@pytest.mark.parametrize("graph", [("object", "--drop-graphs", "0"), ("none",)])
def test_an_epoch_equals_a_plain_loop(run, started, graph):
    network, saved = load_checkpoint(run("--graph", *graph) / "last.pth")
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
    groups = [
        {"params": [p for p in network.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in network.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    shares = (1, 1, 0.5)  # of the learning rate: warm-up, top, half way down
    for batch, share in zip(train_set.batches(1, 8), shares, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = share * options["lr_new"]
        graph = (batch[key] for key in ("nodes", "adjacency", "mask"))
        image_features = network.encode_image(preprocess.normalize(batch["image"]))
        fused = network.branches(image_features, *graph)[2]
        texts = F.normalize(network.encode_text(batch["text"]), dim=-1)
        mask = positive_mask(batch["index"], batch["text_id"], batch["caption_ids"])
        network.zero_grad()
        info_nce(directions(fused, texts, mask), network.logit_scale).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    for name, tensor in network.state_dict().items():
        # The gradient of a key's bias is rounding alone, which AdamW enlarges.
        if not name.endswith("attn.in_proj_bias"):
            torch.testing.assert_close(saved["weights"][name], tensor, rtol=0, atol=1e-5)


@pytest.mark.parametrize("graph", ["object", "none"])
def test_a_pretrained_start_has_its_weights(run, started, pretrained, graph):
    path, weights = pretrained
    folder = run("--clip", str(path), "--graph", graph)
    assert all(torch.equal(started[name], tensor) for name, tensor in weights.items())
    new = {name for name in started if name not in weights}
    assert new == set(filter(is_new, started)) and bool(new) == (graph == "object")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    for name in ("last.pth", "best_model.pth"):
        saved = load_checkpoint(folder / name)[1]
        assert (saved["options"]["model"], saved["start_sha256"]) == ("tiny", digest)
    label_map = train.pick_label_map(saved["options"], saved)
    assert train.prepare_model(saved["options"], saved, label_map)[2] == digest  # resumed: the same
    assert "positional_embedding" in changed(started, weights_of(folder))


# ------------------------------------------------------------------ what is written

FIELDS = {"epoch", "loss", "val_mR", "val", "logit_scale", "lr"}
FIELDS |= {"data_seconds", "compute_seconds", "val_seconds"}
SIDES = ("image_to_text", "text_to_image")


def test_checkpoints_and_log_are_written(run, mini, capsys):
    folder = run("--epochs", "3")
    assert "best validation mR" in capsys.readouterr().out
    files = sorted(path.name for path in folder.iterdir())
    assert files == ["best_model.pth", "last.pth", "log.jsonl"]
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


def test_the_best_on_validation_is_kept_and_all_epochs_are_trained(run, monkeypatch, capsys):
    scores = iter([10.0, 30.0, 20.0, 30.0])
    sides = {"image_to_text": {}, "text_to_image": {}}
    monkeypatch.setattr(train, "evaluate", lambda *_, **__: {"mR": next(scores), **sides})
    folder = run("--epochs", "4")
    assert "best validation mR 30.0 in epoch 2, " in capsys.readouterr().out
    assert [line["val_mR"] for line in log_of(folder)] == [10.0, 30.0, 20.0, 30.0]
    best = load_checkpoint(folder / "best_model.pth")[1]
    last = load_checkpoint(folder / "last.pth")[1]
    assert (best["epoch"], best["best_score"]) == (2, 30.0)
    progress = last["state"]["progress"]
    assert (last["epoch"], progress["best_epoch"], progress["best_score"]) == (4, 2, 30.0)
    assert changed(best["weights"], last["weights"])
    before = (folder / "last.pth").read_bytes()
    train.main(["--resume", "--out", str(folder)])  # it stays finished
    assert (folder / "last.pth").read_bytes() == before and len(log_of(folder)) == 4


def test_every_five_minutes_and_every_epoch_are_saved(run, monkeypatch):
    saved, save, step, now = [], train.resume.save_state, train.train_step, [0]

    def slow(*arguments):
        now[0] += 160  # seconds
        return step(*arguments)

    def remember(path, learner, content, progress):
        saved.append((progress["epoch"], progress["step"]))
        save(path, learner, content, progress)

    monkeypatch.setattr(train.resume, "save_state", remember)
    monkeypatch.setattr(train, "train_step", slow)
    monkeypatch.setattr(train.time, "perf_counter", lambda: now[0])
    run("--epochs", "2")
    assert saved == [(1, 2), (2, 0), (2, 2), (3, 0)]  # of three steps an epoch


def test_a_drawn_validation_split_is_written(run):
    folder = run("--dev-images", "10", "--seed", "5")
    drawn = json.loads((folder / "split.json").read_text(encoding="utf-8"))["mini"]
    options = load_checkpoint(folder / "last.pth")[1]["options"]
    data = RetrievalData(options, *sources(options))
    assert len(drawn["train"]) == 14 and len(drawn["dev"]) == 10
    assert drawn == {s: [record.name for record in data.records(s)] for s in ("train", "dev")}


# ------------------------------------------------------------------ data sets


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Another data set of 32 scenes."""
    folder = tmp_path_factory.mktemp("other")
    scenes.generate(folder, seed=5, splits={"train": 10, "val": 11, "test": 11})
    return folder


@pytest.fixture
def drawn(monkeypatch):
    """What the steps of a run draw: "paths" of images, "texts" as tuples of tokens."""
    found, step = {"paths": [], "texts": []}, train.train_step

    def remember(learner, train_set, batch, *others):
        found["paths"].extend(train_set.image_set.paths[i] for i in batch["index"])
        found["texts"].extend(tuple(row[row > 0].tolist()) for row in batch["text"])
        return step(learner, train_set, batch, *others)

    monkeypatch.setattr(train, "train_step", remember)
    return found


def both(*roots):
    return "--dataset", "mini", "other", "--data-root", *map(str, roots)


def test_two_data_sets_train_together(run, mini, other, drawn):
    folder = run(*both(mini, other), "--epochs", "2", "--batch-size", "2")
    trained = [root / "images" / r.name for root in (mini, other) for r in of(root, "train")]
    assert len(trained) == 34 and sorted(drawn["paths"]) == sorted(2 * trained)
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
    found = evaluate.main([*arguments, "--device", "cpu", "--evidence", "off"])
    assert [result["dataset"] for result in found] == ["mini", "other"]
    for result in found:
        assert result["mR"] == pytest.approx(best["val"][result["dataset"]]["mR"], abs=0.5)


def of(root, split):
    return read_annotations(root).splits[split]


def test_what_is_left_out_is_saved_and_never_drawn(run, mini, other, tmp_path, drawn):
    root = tmp_path / "overlapping"
    shutil.copytree(mini, root)
    names, test = (
        [record.name for record in of(*which)] for which in ((root, "train"), (other, "test"))
    )
    (root / "images" / names[4]).unlink()
    Image.open(other / "images" / test[2]).save(root / "images" / names[4].replace("png", "bmp"))
    captions = of(root, "train")[0].captions
    again = tmp_path / "other"
    shutil.copytree(other, again)
    for folder, name in ((root, names[7]), (again, test[0])):
        with open(folder / "test_caps.txt", "a", encoding="utf-8") as file:
            file.write("".join(f"{caption.upper()}\n" for caption in captions))
        with open(folder / "test_filename.txt", "a", encoding="utf-8") as file:
            file.write(f"{name}\n" * len(captions))
    folder = run(*both(root, again), "--batch-size", "1", "--loss", "hinge")
    left_out = load_checkpoint(folder / "last.pth")[1]["left_out"]["mini"]
    assert left_out["by_content"] == [names[4]] and left_out["by_name"] == [names[7]]
    assert left_out["no_caption_left"][0] == names[0] and left_out["captions"] >= len(captions)
    gone = {name for reason in list(left_out.values())[:3] for name in reason}
    found = {path.name for path in drawn["paths"] if root in path.parents}
    assert found == set(names) - gone and len(drawn["paths"]) > len(found)


def test_training_and_evaluation_see_the_same_captions(run, mini, drawn, monkeypatch):
    form = ["pir", "a satellite photo of {}."]
    seen, encode = [], integration.encode_texts

    def remember(network, texts, *others, **named):
        seen.append(list(texts))
        return encode(network, texts, *others, **named)

    monkeypatch.setattr(integration, "encode_texts", remember)
    folder = run("--caption-form", *form, "--epochs", "2")
    saved = load_checkpoint(folder / "last.pth")[1]
    assert saved["options"]["caption_form"] == form
    evaluate.main(["--checkpoint", str(folder / "last.pth"), "--split", "train"])
    expected = {
        split: [prepared(text, form) for r in of(mini, split) for text in r.captions]
        for split in ("train", "val")
    }
    assert all(text.startswith("a satellite photo of ") for text in expected["train"])
    # Each epoch, and once for the weight of the evidence; then by evaluate.py.
    assert seen == [expected["val"]] * 3 + [expected["train"]]
    known = {tuple(row[row > 0].tolist()) for row in clip.tokenize(expected["train"])}
    assert len(set(drawn["texts"])) > 24 and set(drawn["texts"]) <= known


# ------------------------------------------------------------------ failures


def test_a_loss_that_is_not_finite_names_step_rate_and_images(run, mini, monkeypatch):
    calls = []

    def broken(image_features, *others):
        calls.append(1)
        scale = math.nan if len(calls) == 2 else 1.0
        return image_features.square().sum() * scale

    monkeypatch.setattr(training.step, "batch_loss", broken)
    with pytest.raises(FloatingPointError) as failure:
        run("--lr-new", "0.004")
    message = str(failure.value)
    assert "loss nan in epoch 1, step 1" in message
    # Of three steps the first is the warm-up: the second has the whole rate.
    assert "4.00e-03" in message
    assert message.count(".png") == 8 and str(mini) in message


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--data-root nowhere", "nowhere.*--data-root"),
        ("--labels nowhere.txt", "nowhere.txt.*--labels"),
        ("--clip some.pt --model small", "--clip.*--model"),
        ("--train graph --graph none", "--train graph with --graph none"),
        ("--clip some.pt --train lora --lora 2.5 8 0", "--lora: the rank is 2.5"),
        ("--graph published --fusion gate", "--fusion gate: the published"),
        ("--image-size 24", "--image-size 24: expected a multiple of 16"),
    ],
)
def test_wrong_options_are_errors_that_name_them(run, given, said):
    with pytest.raises(ValueError, match=said):
        run(*given.split())
