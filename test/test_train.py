"""Training: it learns, it is reproducible, it trains what it says, and it says what went wrong."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import clip
import clip_gcn_image_feature_integration
import evaluate
import infer
import scenes
import train
import V_Graph
from annotations import read_annotations
from augment import AUGMENTATIONS
from dataloader import RetrievalData, TrainingSet
from loss import info_nce, positive_mask
from model import load_checkpoint, read_definition
from towers import CLIP
from V_Graph import read_labels

ROOT = Path(__file__).parent.parent
SCRIPTS = (
    "train",
    "evaluate",
    "infer",
    "V_Graph",
    "scenes",
    "clip_gcn_image_feature_integration",
)
OTHERS = ("annotations", "augment", "clip", "dataloader", "images", "loss", "model")
OTHERS += ("shapes", "simple_tokenizer", "towers")
RESNET = {"width": 8, "layers": [1, 1, 1, 1], "heads": 4}


@pytest.fixture
def run(mini, tmp_path, tiny_definition, monkeypatch):
    """Trains a tiny model: run("--epochs", "2", vision=...); returns its folder."""

    def start(*arguments, out="out", vision=None):
        definition = {**tiny_definition, "vision": vision or tiny_definition["vision"]}
        monkeypatch.setattr(train, "read_definition", lambda name: definition)
        fixed = ["--dataset", "mini", "--data-root", str(mini), "--out", str(tmp_path / out)]
        device = [] if "--device" in arguments else ["--device", "cpu"]
        small = ["--augment", *device, "--batch-size", "8", "--epochs", "1"]
        train.main([*fixed, *small, *arguments])
        return tmp_path / out

    return start


@pytest.fixture
def started(monkeypatch):
    """The weights that training starts from, once it has run."""
    before, start = {}, train.start_model

    def remember(*arguments):
        network, definition = start(*arguments)
        before.update({k: v.clone() for k, v in network.state_dict().items()})
        return network, definition

    monkeypatch.setattr(train, "start_model", remember)
    return before


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text("utf-8").splitlines()]


def weights_of(folder, name="last.pth"):
    return load_checkpoint(folder / name)[1]["weights"]


def equal(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def changed(before, after):
    """Names of the weights that differ."""
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


# ------------------------------------------------------------------ learning


@pytest.mark.parametrize("graph", ["object", "none"])
def test_learns_in_48_steps(run, device, graph):
    folder = run("--graph", graph, "--epochs", "16", "--device", device.type, "--drop-graphs", "0")
    losses = [line["loss"] for line in log_of(folder)]
    assert len(losses) == 16
    assert losses[0] > 1.5 and losses[-1] < 0.5 * losses[0]
    fixed = ["--checkpoint", str(folder / "last.pth"), "--split", "train"]
    assert evaluate.main([*fixed, "--device", device.type])["mR"] > 45  # by chance: about 20


@pytest.mark.parametrize("loss", ["hinge", "hinge-max"])
def test_learns_by_the_hinge(run, loss):
    losses = [line["loss"] for line in log_of(run("--loss", loss, "--epochs", "8"))]
    assert losses[-1] < 0.7 * losses[0]


def test_the_same_seed_gives_the_same_weights(run):
    arguments = ("--epochs", "2", "--augment", *AUGMENTATIONS)
    first, again = (run(*arguments, "--seed", "3", out=out) for out in ("first", "again"))
    assert equal(weights_of(first), weights_of(again))
    keys = ("loss", "val_mR", "logit_scale")
    assert [[line[k] for k in keys] for line in log_of(first)] == [
        [line[k] for k in keys] for line in log_of(again)
    ]


def test_workers_do_not_change_the_weights(run):
    alone, workers = run(out="alone"), run("--workers", "2", out="workers")
    assert equal(weights_of(alone), weights_of(workers))


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
    data = RetrievalData(options)
    images = data.image_set("train", saved["definition"]["image_size"], read_labels())
    how = saved["definition"], [], 0, options["seed"]
    batches = TrainingSet(images, data.records("train"), *how).batches(1, 8)
    groups = [
        {"params": [p for p in network.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in network.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    for batch, share in zip(batches, (1, 1, 0.5), strict=True):  # warm-up, top, half way down
        for group in optimizer.param_groups:
            group["lr"] = share * options["lr_new"]
        graph = (batch[key] for key in ("nodes", "adjacency", "mask"))
        features = network(clip.normalize(batch["image"]), *graph, batch["text"])
        mask = positive_mask(batch["index"], batch["text_id"], batch["caption_ids"])
        network.zero_grad()
        info_nce(features[0] @ features[1].T, mask, network.logit_scale).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    for name, tensor in network.state_dict().items():
        # The gradient of a key's bias is rounding alone, which AdamW enlarges.
        if not name.endswith("attn.in_proj_bias"):
            torch.testing.assert_close(saved["weights"][name], tensor, rtol=0, atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_precisions_run(run, started, device, precision):
    folder = run("--precision", precision, "--device", device.type)
    assert math.isfinite(log_of(folder)[0]["loss"])
    weights = weights_of(folder)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    assert {"text_projection", "gcn1.lin.weight"} <= changed(started, weights)


def test_precision_defaults_to_fp32_on_the_cpu():
    assert train.pick_precision(None, torch.device("cpu")) == torch.float32
    assert train.pick_precision("bf16", torch.device("cpu")) == torch.bfloat16
    assert train.pick_precision("fp16", torch.device("cpu")) == torch.float16


@pytest.mark.parametrize(
    ("capability", "precision"),
    [
        ((7, 0), torch.float16),
        ((7, 5), torch.float16),
        ((8, 0), torch.bfloat16),
        ((8, 9), torch.bfloat16),
        ((12, 0), torch.bfloat16),
    ],
    ids=str,
)
def test_precision_on_cuda_is_bf16_where_the_hardware_has_it(monkeypatch, capability, precision):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert train.pick_precision(None, torch.device("cuda")) == precision
    assert train.pick_precision("fp32", torch.device("cuda")) == torch.float32


def test_only_training_images_to_be_cropped_are_kept_larger(run, monkeypatch):
    sizes, read = {}, RetrievalData.image_set

    def remember(self, split, n_px, vocabulary):
        sizes[split] = n_px
        return read(self, split, n_px, vocabulary)

    monkeypatch.setattr(RetrievalData, "image_set", remember)
    run("--augment", "crop", "colour")
    assert sizes == {"train": 43, "val": 32}
    run("--augment", "flip")
    assert sizes == {"train": 32, "val": 32}


# ------------------------------------------------------------------ what is written


def test_checkpoints_and_log_are_written(run, mini, capsys):
    folder = run("--epochs", "3")
    assert sorted(path.name for path in folder.iterdir()) == [
        "best_model.pth",
        "last.pth",
        "log.jsonl",
    ]
    log = log_of(folder)
    assert [line["epoch"] for line in log] == [1, 2, 3]
    fields = {"loss", "val_mR", "val_image_to_text", "val_text_to_image", "logit_scale", "lr"}
    assert all(fields <= set(line) for line in log)
    best = max(log, key=lambda line: line["val_mR"])  # the first where two are equal
    saved = load_checkpoint(folder / "best_model.pth")[1]
    assert (saved["epoch"], saved["best_score"]) == (best["epoch"], best["val_mR"])
    assert load_checkpoint(folder / "last.pth")[1]["epoch"] == 3
    assert saved["options"]["data_root"] == str(mini)
    assert saved["options"]["model"] == saved["definition"]["name"] == "tiny"
    assert len(saved["labels"]) == len(read_labels().lines)
    assert "best validation mR" in capsys.readouterr().out


def test_best_model_gives_its_logged_validation_score(run):
    folder = run("--epochs", "3")
    arguments = ["--split", "val", "--device", "cpu"]
    found = evaluate.main(["--checkpoint", str(folder / "best_model.pth"), *arguments])
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
    assert (last["epoch"], last["best_score"]) == (4, 30.0)
    assert not equal(best["weights"], last["weights"])


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
    drawn = json.loads((folder / "split.json").read_text(encoding="utf-8"))
    names = [record.name for record in read_annotations(shipped).splits["train"]]
    assert len(drawn["train"]) == len(drawn["val"]) == 12
    assert sorted(drawn["train"] + drawn["val"]) == sorted(names)
    data = RetrievalData(load_checkpoint(folder / "last.pth")[1]["options"])
    assert drawn == {s: [record.name for record in data.records(s)] for s in ("train", "val")}


# ------------------------------------------------------------------ failures


def test_a_loss_that_is_not_finite_names_step_rate_and_images(run, mini, monkeypatch):
    calls = []

    def broken(image_features, *others):
        calls.append(1)
        scale = math.nan if len(calls) == 2 else 1.0
        return image_features.square().sum() * scale

    monkeypatch.setattr(train, "batch_loss", broken)
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
    with pytest.raises(ValueError, match="nowhere.pt: no weights"):
        run("--clip", str(tmp_path / "nowhere.pt"))
    with pytest.raises(ValueError, match="nowhere.txt.*--labels"):
        run("--labels", str(tmp_path / "nowhere.txt"))
    with pytest.raises(ValueError, match="--clip.*--model"):
        run("--clip", "some.pt", "--model", "small")
    with pytest.raises(ValueError, match="--train graph with --graph none"):
        run("--train", "graph", "--graph", "none")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--device cuda"):
        run("--device", "cuda")


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


def test_no_model_and_no_clip_mean_small():
    options = train.parse([])
    assert options["model"] is None
    assert train.start_model(options, read_labels().lines)[1] == read_definition("small")


# ------------------------------------------------------------------ freezing


def is_new(name):
    return name.split(".")[0] in {"node_projection", "gcn1", "gcn2", "gcn3", "mlp", "gate"}


def is_visual(name):
    return name.startswith("visual.")


def is_text(name):
    return not (is_new(name) or is_visual(name) or name == "logit_scale")


FROZEN = {"graph": {is_visual, is_text}, "image": {is_text}, "text": {is_visual}}


def test_everything_trains_by_default(run, started):
    moved = changed(started, weights_of(run("--fusion", "gate", vision=RESNET)))
    still = {name for name in started if name not in moved}
    # Attention softmax does not see the key's bias.
    assert all("k_proj.bias" in name for name in still)


@pytest.mark.parametrize("part", FROZEN)
@pytest.mark.parametrize("tower", ["vit", "resnet"])
def test_frozen_towers_keep_their_weights_and_buffers(run, started, part, tower):
    frozen = FROZEN[part]
    vision = RESNET if tower == "resnet" else None
    moved = changed(started, weights_of(run("--train", part, vision=vision)))
    assert not any(rule(name) for name in moved for rule in frozen)
    for rule in {is_new, is_visual, is_text} - frozen:
        assert any(rule(name) for name in moved)
    assert "logit_scale" in moved
    buffers = {name for name in started if "running_" in name or "num_batches" in name}
    assert bool(buffers) == (tower == "resnet")
    assert buffers <= moved if part == "image" else not buffers & moved


@pytest.mark.parametrize("part", ["all", *FROZEN])
def test_frozen_towers_without_pretrained_weights_are_said_to_stay_random(
    run, pretrained, capsys, part
):
    run("--train", part)
    lines = [line for line in capsys.readouterr().out.splitlines() if "stay random" in line]
    said = f"--train {part} without --clip: the frozen towers stay random"
    assert lines == ([] if part == "all" else [said])
    run("--train", part, "--clip", str(pretrained[0]))
    assert "stay random" not in capsys.readouterr().out


# ------------------------------------------------------------------ a pretrained start


@pytest.fixture
def pretrained(tmp_path, tiny_definition, monkeypatch):
    """The path of a CLIP state dict, and that state dict, of a definition that clip.load knows."""
    monkeypatch.setattr(clip, "definition_names", lambda: ["tiny"])
    monkeypatch.setattr(clip, "read_definition", lambda name: tiny_definition)
    torch.manual_seed(7)
    weights = CLIP(tiny_definition).state_dict()
    path = tmp_path / "clip.pt"
    torch.save(weights, path)
    return path, weights


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
    assert equal(started, weights)


def rates(network, options):
    """{name: (learning rate, weight decay)} of the parameters that train."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    return {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in train.make_optimizer(network, options).param_groups
        for parameter in group["params"]
    }


@pytest.mark.parametrize("clip_weights", [None, "some.pt"])
def test_new_layers_have_their_own_rate_and_biases_do_not_decay(tiny_model, clip_weights):
    options = {"clip": clip_weights, "lr": 1e-5, "lr_new": 1e-3, "weight_decay": 0.1}
    network = tiny_model(fusion="gate")
    found = rates(network, options)
    assert found.keys() == {name for name, _ in network.named_parameters()}
    for name, parameter in network.named_parameters():
        rate = 1e-3 if clip_weights is None or is_new(name) else 1e-5
        decay = 0.1 if parameter.ndim >= 2 else 0.0
        assert found[name] == (rate, decay)
    assert found["logit_scale"][1] == found["gcn1.bias"][1] == found["ln_final.weight"][1] == 0


def test_frozen_parameters_are_not_given_to_the_optimizer(tiny_model):
    network = tiny_model()
    train.freeze(network, "graph")
    options = {"clip": "some.pt", "lr": 1e-5, "lr_new": 1e-3, "weight_decay": 0.1}
    found = rates(network, options)
    assert {name for name in found if not is_new(name)} == {"logit_scale"}


def test_both_rates_are_logged(run, pretrained):
    folder = run("--clip", str(pretrained[0]), "--lr", "0.001", "--lr-new", "0.01", "--epochs", "2")
    final, first = (log_of(folder)[i]["lr"] for i in (-1, 0))
    assert max(final) == pytest.approx(0, abs=1e-12)
    assert len(first) == 4 and max(first) == pytest.approx(10 * min(first))


# ------------------------------------------------------------------ schedule


def test_schedule_warms_up_and_decays_to_zero():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [parameter], "lr": 2.0}])
    schedule = train.make_schedule(optimizer, 100)
    rate = []
    for _ in range(100):
        rate.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rate[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rate[10] == max(rate) == 2.0
    assert all(a > b for a, b in zip(rate[10:], rate[11:], strict=False))
    assert rate[55] == pytest.approx(1.0)  # the middle of the decay
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_short_schedules_begin_with_the_whole_rate(steps):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    train.make_schedule(optimizer, steps)
    assert optimizer.param_groups[0]["lr"] == 1.0


# ------------------------------------------------------------------ scripts


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """In an empty folder: all imported, then each script run with --help; (process, folder)."""
    folder = tmp_path_factory.mktemp("empty")
    code = f"""
import runpy, sys
import {", ".join(SCRIPTS + OTHERS)}
print("imported")
for name in {SCRIPTS}:
    sys.argv = [name + ".py", "--help"]
    try:
        runpy.run_path(r"{ROOT}/" + name + ".py", run_name="__main__")
    except SystemExit as end:
        print(name, "ended with", end.code)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True
    )
    return process, folder


def test_importing_does_nothing(session):
    process, folder = session
    assert process.stdout.startswith("imported\n")
    assert process.stderr == ""
    assert not list(folder.iterdir())


def test_every_script_prints_its_help(session):
    process, _ = session
    assert process.returncode == 0
    for name in SCRIPTS:
        assert f"usage: {name}.py" in process.stdout
        assert f"{name} ended with 0\n" in process.stdout


@pytest.mark.parametrize(
    "command",
    [train, evaluate, infer, V_Graph, scenes, clip_gcn_image_feature_integration],
    ids=SCRIPTS,
)
def test_an_unknown_option_is_refused(command, capsys):
    with pytest.raises(SystemExit) as end:
        command.main(["--no-such-option"])
    assert end.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_training_has_few_options_and_each_has_help(capsys):
    options = train.parse([])
    assert len(options) <= 33
    with pytest.raises(SystemExit):
        train.parse(["--help"])
    text = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')}" in text for name in options)
