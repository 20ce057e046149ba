"""Low-rank adapters: they start from the pretrained model and end as a plain one."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import clip
from backbones import lora
from backbones.lora import LowRank
from backbones.towers import CLIP, Attention
from clips import same_tensors
from conftest import IMAGE_SIZE, RESNET

RANK, ALPHA = 3, 6.0
TOWERS = ("ViT", "ResNet")
pytestmark = pytest.mark.usefixtures("seeded")


@pytest.fixture(params=TOWERS)
def model_config(request, tiny_model_config):
    """A small CLIP with either image tower."""
    vision = RESNET if request.param == "ResNet" else tiny_model_config["vision"]
    return {**tiny_model_config, "vision": vision}


def build(model_config):
    """A CLIP with random weights whose features differ between images."""
    network = CLIP(model_config)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):  # torch's default lets the signal die away in a ResNet
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):  # the last of a block starts at zero
            nn.init.ones_(module.weight)
    return network


def adapted(network, dropout=0.0, zero=False):
    """The model with adapters whose B is random, so that they matter."""
    lora.adapt(network, RANK, ALPHA, dropout)
    for name in lora.adapter_parameters(network):
        if name.endswith(".B") and not zero:
            nn.init.normal_(network.get_parameter(name), std=0.1)
    return network


def inputs(device="cpu", images=4):
    pixels = torch.randn(
        images, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(1)
    )
    texts = ["a ship", "two planes near a road", "snow", "six storage tanks"]
    return pixels.to(device), clip.tokenize(texts).to(device)


def unit_features(network, device="cpu"):
    """Normalised features of images and of texts, one tensor."""
    pixels, tokens = inputs(device)
    both = torch.cat([network.encode_image(pixels), network.encode_text(tokens)])  # (8, E)
    return F.normalize(both, dim=-1)


def largest(a, b):
    return (a - b).abs().max().item()


def copied(tensors):
    """Names and copies of tensors, from pairs."""
    return {name: tensor.detach().clone() for name, tensor in tensors}


def plain_name(name):
    """A weight's name as a plain model has it, from the name of it or of its A."""
    return name.replace(".parametrizations", "").removesuffix(".original").removesuffix(".0.A")


def parametrized(network):
    """Names of the weights with an adapter, as a plain model has them."""
    return {plain_name(name) for name in lora.adapter_parameters(network) if name.endswith(".A")}


def block(prefix):
    names = ("attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    return {f"{prefix}.{name}" for name in names}


# ------------------------------------------------------------------ one weight


@pytest.mark.parametrize(
    ("alpha", "a", "b", "weight", "expected"),
    [
        # B A is [[10, 20], [-1, -2]], times 3 / 1.
        (3, [[[1, 2]]], [[[10], [-1]]], [[5, 6], [7, 8]], [[35, 66], [4, 2]]),
        # B A is [[6, 4], [32, 0]], times 1 / 2.
        (1, [[[1, 2], [4, 0]]], [[[2, 1], [0, 8]]], [[0, 0], [0, 0]], [[3, 2], [16, 0]]),
        # Three parts of one row each.
        (
            1,
            [[[1, 2]], [[3, 4]], [[5, 6]]],
            [[[1]], [[10]], [[100]]],
            [[0, 0], [0, 0], [1, 0]],
            [[1, 2], [30, 40], [501, 600]],
        ),
    ],
)
def test_a_weight_by_hand(alpha, a, b, weight, expected):
    a, b, weight = (torch.tensor(values, dtype=torch.float32) for values in (a, b, weight))
    parts, rank, columns = a.shape
    adapter = LowRank(len(weight), columns, rank, alpha, dropout=0.0, parts=parts)
    with torch.no_grad():
        adapter.A.copy_(a)
        adapter.B.copy_(b)
    assert adapter(weight).tolist() == expected


def test_a_starts_uniform_and_b_at_zero():
    adapter = LowRank(6, 400, rank=50, alpha=1, dropout=0.0, parts=3)
    assert not adapter.B.any()
    assert adapter.A.shape == (3, 50, 400) and adapter.B.shape == (3, 2, 50)
    a = adapter.A.detach()
    # Within 1 / sqrt(400), of variance bound^2 / 3; the variance of 60,000 squares is known, too.
    assert a.abs().max() <= 0.05 and a.min() < -0.0499 and a.max() > 0.0499
    deviation = 0.05**2 * math.sqrt(4 / 45 / a.numel())
    assert abs(a.square().mean().item() - 0.05**2 / 3) < 5 * deviation


def test_dropout_takes_whole_input_features_in_all_parts_and_enlarges_the_others():
    adapter = LowRank(6, 50, rank=2, alpha=2, dropout=0.75, parts=3)
    nn.init.normal_(adapter.B)
    weight = torch.zeros(6, 50)
    with torch.no_grad():
        full, draws = adapter.eval()(weight), [adapter.train()(weight) for _ in range(400)]
    torch.testing.assert_close(full, (adapter.B @ adapter.A).flatten(0, 1).detach())
    assert full.all()
    kept = torch.stack([draw[0] != 0 for draw in draws])  # (draws, columns)
    for draw, columns in zip(draws, kept, strict=True):
        torch.testing.assert_close(draw, 4 * full * columns)
    # 20,000 columns, each kept with probability 1 / 4: within five standard deviations.
    assert abs(kept.double().mean().item() - 0.25) < 5 * math.sqrt(0.25 * 0.75 / kept.numel())
    # So is the mean of every entry: that of no dropout, with a variance of 3 entry^2 a draw.
    error = torch.stack(draws).mean(0) / full - 1
    assert error.abs().max() < 5 * math.sqrt(3 / len(draws))


def test_autocast_leaves_the_product_in_full_precision(device):
    adapter = LowRank(12, 16, RANK, ALPHA, dropout=0.0, parts=3).to(device)
    nn.init.normal_(adapter.B)
    weight = torch.randn(12, 16, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        inside = adapter(weight)
    assert inside.dtype == torch.float32 and torch.equal(inside, adapter(weight))


# ------------------------------------------------------------------ a model


def test_all_projections_of_both_towers_are_adapted_and_nothing_else(tiny_model):
    for changes in ({"fusion": "gate"}, {"graph": "none"}):
        expected = block("visual.transformer.resblocks.0") | block("transformer.resblocks.0")
        expected |= block("visual.transformer.resblocks.1")
        network = adapted(tiny_model(**changes))
        assert parametrized(network) == expected
        # Of width D a block has 3 (D + D) for q, k, v, D + D behind them, twice D + 4 D, by rank.
        assert count(network) == 3 * 18 * 32 * RANK


def test_of_a_resnet_the_attention_pooling_is_adapted(tiny_model_config):
    network = adapted(build({**tiny_model_config, "vision": RESNET}))
    pooling = {f"visual.attnpool.{name}_proj.weight" for name in "qkvc"}
    assert parametrized(network) == pooling | block("transformer.resblocks.0")
    # Its pooling has 32 * 8 channels and leads to the common width of 32.
    assert count(network) == 18 * 32 * RANK + RANK * (3 * (256 + 256) + 256 + 32)


def count(network):
    return sum(network.get_parameter(n).numel() for n in lora.adapter_parameters(network))


@pytest.mark.parametrize("training", [False, True])
def test_it_starts_from_exactly_the_pretrained_features(model_config, device, training):
    network = build(model_config).to(device).train(training)
    plain = copy.deepcopy(network)
    adapted(network, dropout=0.5, zero=True)
    with torch.no_grad():
        assert torch.equal(unit_features(network, device), unit_features(plain, device))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
def test_merged_is_a_plain_clip_that_equals_the_adapted_one(
    model_config, device, training, gradients
):
    network = adapted(build(model_config).to(device).train(training))
    unadapted = build(model_config).to(device).train(training)
    unadapted.load_state_dict({**unadapted.state_dict(), **originals(network)})
    plain = copy.deepcopy(unadapted)
    with torch.set_grad_enabled(gradients):
        before = unit_features(network, device)
        assert lora.merge(network) is network and not lora.is_adapted(network)
        assert type(network.transformer.resblocks[0].attn) is Attention
        plain.load_state_dict(network.state_dict())  # strictly: a plain model's names and shapes
        for merged in (network, plain):
            assert largest(before, unit_features(merged, device)) <= 1e-6
        assert largest(before, unit_features(unadapted, device)) > 1e-2


def originals(network):
    """The pretrained weights of an adapted model, by a plain model's names."""
    return {
        plain_name(name): tensor
        for name, tensor in network.state_dict().items()
        if name not in lora.adapter_parameters(network)
    }


# ------------------------------------------------------------------ training


def contrastive(network, device="cpu"):
    images, texts = unit_features(network, device).chunk(2)
    logits = 10 * images @ texts.T  # (B, B)
    target = torch.arange(len(logits), device=device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


@pytest.mark.parametrize("precision", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_few_steps_lower_the_loss_and_leave_the_originals(model_config, device, precision):
    network = adapted(build(model_config).to(device).train(), zero=True)
    before = copied(network.named_parameters())
    trained = lora.adapter_parameters(network)
    for name, parameter in network.named_parameters():
        parameter.requires_grad = name in trained
    optimizer = torch.optim.Adam((network.get_parameter(name) for name in sorted(trained)), 1e-2)
    losses = []
    for _ in range(12):
        enabled = precision is not None
        with torch.autocast(device.type, precision or torch.bfloat16, enabled=enabled):
            loss = contrastive(network, device)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in trained), name


def test_adapting_freezes_nothing_and_frees_nothing(model_config):
    network = build(model_config)
    for i, parameter in enumerate(network.parameters()):
        parameter.requires_grad = i % 3 == 0
    before = {name: (id(p), p.requires_grad) for name, p in network.named_parameters()}
    adapted(network)
    trained = lora.adapter_parameters(network)
    assert all(network.get_parameter(name).requires_grad for name in trained)
    lora.merge(network)
    assert {name: (id(p), p.requires_grad) for name, p in network.named_parameters()} == before


# ------------------------------------------------------------------ copies


def test_a_copy_is_independent_and_may_be_merged(model_config):
    network = adapted(build(model_config), dropout=0.5).eval()
    twin = copy.deepcopy(network)
    state = copied(network.state_dict().items())
    with torch.no_grad():
        before = unit_features(network)
        assert torch.equal(unit_features(twin), before)
        lora.merge(twin.train()).eval()  # in training mode, and without dropout
        assert largest(unit_features(twin), before) <= 1e-6
        nn.init.zeros_(twin.transformer.resblocks[0].mlp.c_fc.weight)
        # torch's own remove_parametrizations on the copy would leave no weight here.
        assert torch.equal(unit_features(network), before)
    assert lora.is_adapted(network) and not lora.is_adapted(twin)
    assert same_tensors(network.state_dict(), state)


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("option", "values", "message"),
    [
        ("rank", (0, -4), ": expected at least 1"),
        ("alpha", (0, -1.0, math.nan, math.inf), ": expected a number above 0"),
        ("dropout", (1.0, -0.1), r": expected a number in \[0, 1\)"),
    ],
)
def test_impossible_sizes_are_refused_and_the_model_stays_plain(
    tiny_model, option, values, message
):
    network = tiny_model()
    for value in values:
        with pytest.raises(ValueError, match=f"{option} {value}{message}"):
            lora.adapt(network, **{"rank": 4, "alpha": 8, "dropout": 0.1, option: value})
    assert not lora.is_adapted(network) and not lora.adapter_parameters(network)


def test_a_model_is_adapted_once_only(tiny_model):
    network = adapted(tiny_model())
    before = list(network.state_dict())
    with pytest.raises(ValueError, match=r"adapted already; call merge\(model\) first"):
        lora.adapt(network, RANK, ALPHA, 0.0)
    assert list(network.state_dict()) == before
