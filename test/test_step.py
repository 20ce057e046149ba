"""Precision, trained parameters, optimizer and schedule, and one step."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from backbones.model_configs import MODELS
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
    recompute_blocks,
    start_model,
    train_step,
)

OPTIONS = {"clip": None, "lr": 1e-5, "lr_new": 1e-3, "weight_decay": 0.1, "precision": "fp32"}

# ------------------------------------------------------------------ precision


@pytest.mark.parametrize("graph", ["object", "none"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precisions_run_on_fp32_weights(run, started, device, precision, graph):
    folder = run("--precision", precision, "--device", device.type, "--graph", graph)
    assert math.isfinite(log_of(folder)[0]["loss"])
    weights = weights_of(folder)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    learnt = changed(started, weights)
    assert "text_projection" in learnt and ("gcn1.lin.weight" in learnt) == (graph == "object")


@pytest.mark.parametrize(
    ("name", "device", "capability", "precision"),
    [
        (None, "cpu", None, torch.float32),
        ("fp16", "cpu", None, torch.float16),
        ("fp32", "cuda", (8, 0), torch.float32),
        (None, "cuda", (7, 5), torch.float16),
        (None, "cuda", (8, 0), torch.bfloat16),
    ],
)
def test_precision_is_the_given_one_or_suits_the_device(
    monkeypatch, name, device, capability, precision
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert PRECISIONS[pick_precision(name, torch.device(device))] == precision


@pytest.mark.parametrize("precision", PRECISIONS)
def test_only_fp16_scales_the_loss(tiny_model, precision):
    learner = make_learner(tiny_model(), {**OPTIONS, "precision": precision}, 10)
    assert learner.scaler.is_enabled() == (precision == "fp16")
    assert learner.precision == PRECISIONS[precision]


# ------------------------------------------------------------------ one step


@pytest.fixture
def trained(five, tiny_model, tiny_model_config):
    """Trains a new tiny model for some steps: trained(3, scaler=...); the learner afterwards.

    frozen: on random features in place of pixels and words; wrap: goes around the model.
    """

    def do(steps, logit_scale=None, frozen=False, wrap=None, network=None, **changes):
        words = ["--dataset", "five", "--data-root", str(five), "--graph", "object"]
        options = parse([*words, "--precision", "fp32"])[0]
        data = RetrievalData(options, *sources(options))
        images = data.image_set("train", tiny_model_config["image_size"], read_label_map())
        records, how = data.records("train"), {"augment": [], "drop_graphs": 0, "seed": 0}
        train_set = TrainingSet(images, records, model_config=tiny_model_config, **how)
        network = (network or tiny_model()).train()
        if logit_scale is not None:
            torch.nn.init.constant_(network.logit_scale, logit_scale)
        if frozen:
            images.features = torch.randn(len(images), 32)
            train_set.text_features = F.normalize(torch.randn(len(train_set.captions), 32), dim=-1)
        learner = make_learner(network, options, 8)._replace(**changes)
        if wrap is not None:
            learner = learner._replace(wrapped=wrap(network))
        for epoch in range(steps):
            for batch in train_set.batches(epoch, 5):
                assert math.isfinite(train_step(learner, train_set, batch, options, "a step"))
        return learner

    return do


@pytest.mark.parametrize("largest", [1e-3, 1.0, 1e3])
def test_the_scale_of_the_loss_changes_nothing(trained, monkeypatch, largest):
    """Gradients are divided by it before they are clipped: powers of two leave no trace."""
    monkeypatch.setattr("training.step.MAX_GRAD_NORM", largest)
    plain = trained(2).model
    scaled = trained(2, scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10)).model
    assert not changed(plain.state_dict(), scaled.state_dict())
    if largest == 1e-3:
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in plain.parameters()))
        assert norm == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_a_step_whose_gradients_overflow_is_left_out_and_the_scale_halved(trained, tiny_model):
    start = tiny_model().state_dict()
    learner = trained(1, scaler=torch.amp.GradScaler("cpu", init_scale=2.0**127))
    assert not changed(start, learner.model.state_dict())
    assert learner.scaler.get_scale() == 2.0**126
    fine = trained(1, scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10))
    assert changed(start, fine.model.state_dict()) and fine.scaler.get_scale() == 2.0**10


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_a_gradient_that_no_scale_makes_finite_ends_training(trained, tiny_model):
    network = tiny_model().train()
    network.gcn1.bias.register_hook(lambda gradient: gradient * math.nan)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**3)
    with pytest.raises(FloatingPointError, match="gradient of norm nan in a step"):
        trained(5, network=network, scaler=scaler)
    assert scaler.get_scale() == 1


def test_a_gradient_that_is_not_finite_ends_training_before_the_weights_change(trained, tiny_model):
    network = tiny_model().train()
    start = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.gcn1.bias.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(FloatingPointError, match=r"gradient of norm (nan|inf) in a step.*a\.png"):
        trained(1, network=network)
    assert not changed(start, network.state_dict())


def test_a_step_pulls_the_temperature_back_to_its_bound(trained):
    assert trained(1, logit_scale=9.0).model.logit_scale.exp() < 100


class Wrapped(torch.nn.Module):
    """Counts a model's calls."""

    def __init__(self, network):
        super().__init__()
        self.network = network
        self.calls = 0

    def forward(self, *arguments, **options):
        self.calls += 1
        return self.network(*arguments, **options)


@pytest.mark.parametrize("frozen", [False, True], ids=["pixels", "features"])
def test_what_wraps_the_model_sees_each_step(trained, frozen):
    plain = trained(3, frozen=frozen).model
    learner = trained(3, frozen=frozen, wrap=Wrapped)
    assert learner.wrapped.calls == 3
    assert not changed(plain.state_dict(), learner.model.state_dict())


# ------------------------------------------------------------------ the model, freezing


def test_no_model_and_no_clip_mean_small():
    options = parse([])[0]
    assert options["model"] is None
    labels = read_label_map().lines
    content = json.loads((MODELS / "small.json").read_text(encoding="utf-8"))
    assert start_model(options, labels)[1] == {"name": "small", **content}
    with pytest.raises(ValueError, match="'huge'.*ViT-B-32"):
        start_model({**options, "model": "huge"}, labels)


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
@pytest.mark.parametrize("vision", [None, RESNET], ids=["vit", "resnet"])
def test_frozen_towers_keep_their_weights_and_buffers(run, started, capsys, part, vision):
    moved = changed(started, weights_of(run("--train", part, vision=vision)))
    said = f"--train {part} without --clip: the frozen towers stay random\n"
    assert capsys.readouterr().out.count(said) == 1
    assert not any(rule(name) for name in moved for rule in FROZEN[part])
    for rule in {is_new, is_visual, is_text} - FROZEN[part]:
        assert any(rule(name) for name in moved)
    assert "logit_scale" in moved
    buffers = {name for name in started if "running_" in name or "num_batches" in name}
    assert bool(buffers) == (vision is RESNET)
    assert buffers <= moved if part == "image" else not buffers & moved


def test_only_transformers_that_learn_are_recomputed(tiny_model):
    network = tiny_model()
    freeze(network, "image")
    recompute_blocks(network)
    assert network.visual.transformer.recompute and not network.transformer.recompute


def test_recompute_is_refused_where_no_transformer_learns(tiny_model):
    network = tiny_model()
    freeze(network, "graph")
    with pytest.raises(ValueError, match="--recompute: no transformer learns here; leave it out"):
        recompute_blocks(network)


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
    network = tiny_model(fusion="gate")
    found = rates(network, {**OPTIONS, "clip": clip_weights})
    assert found.keys() == {name for name, _ in network.named_parameters()}
    for name, parameter in network.named_parameters():
        rate = 1e-3 if clip_weights is None or is_new(name) else 1e-5
        assert found[name] == (rate, 0.1 if parameter.ndim >= 2 else 0.0)
    assert found["logit_scale"][1] == found["gcn1.bias"][1] == found["ln_final.weight"][1] == 0
    freeze(network, "graph")  # frozen parameters are not given to the optimizer
    found = rates(network, {**OPTIONS, "clip": clip_weights})
    assert {name for name in found if not is_new(name)} == {"logit_scale"}


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
    for steps in (1, 2, 5):  # short schedules begin with the whole rate
        optimizer = torch.optim.SGD([parameter], lr=1.0)
        make_schedule(optimizer, steps)
        assert optimizer.param_groups[0]["lr"] == 1.0
