"""Precision, trained parameters, optimizer and schedule, and one step."""

import math

import pytest
import torch

from backbones.model_configs import read_model_config
from conftest import RESNET, changed, is_new, log_of, weights_of
from dataloader import RetrievalData, sources
from dataset.batches import TrainingSet
from det_formats.det_json import read_label_map
from train import parse
from training.step import (
    PRECISIONS,
    freeze,
    make_learner,
    make_optimizer,
    make_schedule,
    pick_precision,
    start_model,
    train_step,
)

# ------------------------------------------------------------------ precision


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_precisions_run(run, started, device, precision):
    folder = run("--precision", precision, "--device", device.type)
    assert math.isfinite(log_of(folder)[0]["loss"])
    weights = weights_of(folder)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    assert {"text_projection", "gcn1.lin.weight"} <= changed(started, weights)


def picked(name, device):
    return PRECISIONS[pick_precision(name, torch.device(device))]


def test_precision_defaults_to_fp32_on_the_cpu():
    assert picked(None, "cpu") == torch.float32
    assert picked("bf16", "cpu") == torch.bfloat16
    assert picked("fp16", "cpu") == torch.float16


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
    assert picked(None, "cuda") == precision
    assert picked("fp32", "cuda") == torch.float32


def test_no_model_and_no_clip_mean_small():
    options = parse([])[0]
    assert options["model"] is None
    assert start_model(options, read_label_map().lines)[1] == read_model_config("small")


# ------------------------------------------------------------------ one step


@pytest.fixture
def trained(five, tiny_model, tiny_model_config):
    """Trains a new tiny model for some steps: trained(3, scaler=...); the learner afterwards."""

    def do(steps, **changes):
        settings = parse(["--dataset", "five", "--data-root", str(five), "--precision", "fp32"])[0]
        data = RetrievalData(settings, *sources(settings))
        images = data.image_set("train", tiny_model_config["image_size"], read_label_map())
        train_set = TrainingSet(
            images,
            data.records("train"),
            model_config=tiny_model_config,
            augment=[],
            drop_graphs=0,
            seed=0,
        )
        learner = make_learner(tiny_model().train(), settings, 8)._replace(**changes)
        for epoch in range(steps):
            for batch in train_set.batches(epoch, 5):
                assert math.isfinite(train_step(learner, train_set, batch, settings, "a step"))
        return learner

    return do


@pytest.mark.parametrize("largest", [1e-3, 1.0, 1e3])
def test_the_scale_of_the_loss_changes_nothing(trained, monkeypatch, largest):
    """Gradients are divided by it before they are clipped: powers of two leave no trace."""
    monkeypatch.setattr("training.step.MAX_GRAD_NORM", largest)
    plain = trained(3).model.state_dict()
    scaled = trained(3, scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10)).model.state_dict()
    assert not changed(plain, scaled)


def test_gradients_are_clipped_at_their_norm(trained, monkeypatch):
    monkeypatch.setattr("training.step.MAX_GRAD_NORM", 1e-3)
    gradients = [p.grad for p in trained(1).model.parameters()]
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
    assert norm == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_a_step_whose_gradients_overflow_is_left_out_and_the_scale_halved(trained, tiny_model):
    start = tiny_model().state_dict()
    learner = trained(1, scaler=torch.amp.GradScaler("cpu", init_scale=2.0**127))
    assert not changed(start, learner.model.state_dict())
    assert learner.scaler.get_scale() == 2.0**126
    fine = trained(1, scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10))
    assert changed(start, fine.model.state_dict()) and fine.scaler.get_scale() == 2.0**10


@pytest.mark.parametrize(
    ("precision", "enabled"), [("fp32", False), ("bf16", False), ("fp16", True)]
)
def test_only_fp16_scales_the_loss(tiny_model, precision, enabled):
    options = {"clip": None, "lr": 1e-5, "lr_new": 1e-3, "weight_decay": 0.1}
    learner = make_learner(tiny_model(), {**options, "precision": precision}, 10)
    assert learner.scaler.is_enabled() == enabled and learner.precision == PRECISIONS[precision]


# ------------------------------------------------------------------ freezing


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


# ------------------------------------------------------------------ optimizer


def rates(network, options):
    """{name: (learning rate, weight decay)} of the parameters that train."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    return {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in make_optimizer(network, options).param_groups
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
    freeze(network, "graph")
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
    schedule = make_schedule(optimizer, 100)
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
    make_schedule(optimizer, steps)
    assert optimizer.param_groups[0]["lr"] == 1.0
