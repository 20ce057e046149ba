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
from backbones.towers import CLIP
from conftest import IMAGE_SIZE, RESNET

RANK, ALPHA = 3, 6.0
TOWERS = ("ViT", "ResNet")


@pytest.fixture(autouse=True)
def seeded_and_in_full_precision(monkeypatch):
    """The same weights each time, and convolutions in fp32 on CUDA, too, where TF32 is default."""
    torch.manual_seed(0)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


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


def shapes(network):
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def copied(tensors):
    """Names and copies of tensors, from pairs."""
    return {name: tensor.detach().clone() for name, tensor in tensors}


def parametrized(network):
    """Names of the weights with an adapter, as a plain model has them."""
    names = (name for name in lora.adapter_parameters(network) if name.endswith(".A"))
    return {name.replace(".parametrizations", "").removesuffix(".0.A") for name in names}


def block(prefix):
    names = ("attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    return {f"{prefix}.{name}" for name in names}


# ------------------------------------------------------------------ one weight


def test_two_by_two_by_hand():
    adapter = LowRank(2, 2, rank=1, alpha=3, dropout=0.0)
    with torch.no_grad():
        adapter.A.copy_(torch.tensor([[[1.0, 2.0]]]))
        adapter.B.copy_(torch.tensor([[[10.0], [-1.0]]]))
    found = adapter(torch.tensor([[5.0, 6.0], [7.0, 8.0]]))
    # B A is [[10, 20], [-1, -2]], times 3 / 1.
    assert found.tolist() == [[35.0, 66.0], [4.0, 2.0]]


def test_the_product_is_scaled_by_alpha_over_rank():
    adapter = LowRank(2, 2, rank=2, alpha=1, dropout=0.0)
    with torch.no_grad():
        adapter.A.copy_(torch.tensor([[[1.0, 2.0], [4.0, 0.0]]]))
        adapter.B.copy_(torch.tensor([[[2.0, 1.0], [0.0, 8.0]]]))
    # B A is [[6, 4], [32, 0]], times 1 / 2.
    assert adapter(torch.zeros(2, 2)).tolist() == [[3.0, 2.0], [16.0, 0.0]]


def test_a_fused_weight_has_an_adapter_for_each_of_its_parts():
    adapter = LowRank(3, 2, rank=1, alpha=1, dropout=0.0, parts=3)
    with torch.no_grad():
        adapter.A.copy_(torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]], [[5.0, 6.0]]]))
        adapter.B.copy_(torch.tensor([[[1.0]], [[10.0]], [[100.0]]]))
    found = adapter(torch.zeros(3, 2))
    assert found.tolist() == [[1.0, 2.0], [30.0, 40.0], [500.0, 600.0]]


@pytest.mark.parametrize("part", range(3))
def test_a_loss_on_one_part_trains_that_part_alone(part):
    adapter = LowRank(12, 4, RANK, ALPHA, dropout=0.0, parts=3)
    nn.init.normal_(adapter.B)
    adapter(torch.randn(12, 4))[4 * part : 4 * part + 4].square().sum().backward()
    others = [i for i in range(3) if i != part]
    for matrix in (adapter.A, adapter.B):
        assert matrix.grad[part].all() and not matrix.grad[others].any()


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
    assert full.all()
    kept = torch.stack([draw[0] != 0 for draw in draws])  # (draws, columns)
    for draw, columns in zip(draws, kept, strict=True):
        torch.testing.assert_close(draw, 4 * full * columns)
    # 20,000 columns, each kept with probability 1 / 4: within five standard deviations.
    assert abs(kept.double().mean().item() - 0.25) < 5 * math.sqrt(0.25 * 0.75 / kept.numel())
    # So is the mean of every entry: that of no dropout, with a variance of 3 entry^2 a draw.
    error = torch.stack(draws).mean(0) / full - 1
    assert error.abs().max() < 5 * math.sqrt(3 / len(draws))


def test_without_training_nothing_is_dropped():
    adapter = LowRank(4, 4, RANK, ALPHA, dropout=0.5)
    nn.init.normal_(adapter.B)
    weight = torch.randn(4, 4)
    expected = weight + ALPHA / RANK * adapter.B[0] @ adapter.A[0]
    torch.testing.assert_close(adapter.eval()(weight), expected)
    drawn = [adapter.train()(weight) for _ in range(20)]
    assert any(not torch.equal(draw, drawn[0]) for draw in drawn)


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
        assert parametrized(adapted(tiny_model(**changes))) == expected


def test_of_a_resnet_the_attention_pooling_is_adapted(tiny_model_config):
    network = adapted(build({**tiny_model_config, "vision": RESNET}))
    pooling = {f"visual.attnpool.{name}_proj.weight" for name in "qkvc"}
    assert parametrized(network) == pooling | block("transformer.resblocks.0")


def test_the_number_of_trained_parameters_is_that_of_the_formula(tiny_model_config):
    def count(network):
        return sum(network.get_parameter(n).numel() for n in lora.adapter_parameters(network))

    # Of width D a block has 3 (D + D) for q, k, v, D + D behind them and twice D + 4 D, by rank.
    text, image = 18 * 32 * RANK, 18 * 32 * RANK * 2
    assert count(adapted(build(tiny_model_config))) == text + image
    # Its pooling has 32 * 8 channels and leads to the common width of 32.
    pooling = RANK * (3 * (256 + 256) + 256 + 32)
    assert count(adapted(build({**tiny_model_config, "vision": RESNET}))) == text + pooling


@pytest.mark.parametrize("training", [False, True])
def test_it_starts_from_exactly_the_pretrained_features(model_config, device, training):
    network = build(model_config).to(device).train(training)
    plain = copy.deepcopy(network)
    adapted(network, dropout=0.5, zero=True)
    with torch.no_grad():
        assert torch.equal(unit_features(network, device), unit_features(plain, device))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
def test_merged_equals_adapted(model_config, device, training, gradients):
    network = adapted(build(model_config).to(device).train(training))
    plain = build(model_config).to(device).train(training)
    plain.load_state_dict({**plain.state_dict(), **originals(network)})
    with torch.set_grad_enabled(gradients):
        before = unit_features(network, device)
        after = unit_features(lora.merge(network), device)
        assert largest(before, after) <= 1e-6
        assert largest(after, unit_features(plain, device)) > 1e-2


def originals(network):
    """The pretrained weights of an adapted model, by a plain model's names."""
    return {
        name.replace(".parametrizations", "").removesuffix(".original"): tensor
        for name, tensor in network.state_dict().items()
        if name not in lora.adapter_parameters(network)
    }


def test_merged_weights_are_those_of_the_formula(model_config):
    network = adapted(build(model_config), dropout=0.5).train()
    state, expected = network.state_dict(), copied(originals(network).items())
    for name in parametrized(network):
        owner, _, last = name.rpartition(".")
        a, b = (state[f"{owner}.parametrizations.{last}.0.{letter}"] for letter in "AB")
        rows = expected[name].chunk(len(a))
        sums = [w + ALPHA / RANK * (y @ x) for w, x, y in zip(rows, a, b, strict=True)]
        expected[name] = torch.cat(sums)
    found = lora.merge(network).state_dict()  # in training mode, and without dropout
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-6)


def test_eager_and_fused_attention_both_see_the_adapters(tiny_model_config, device):
    network = adapted(build(tiny_model_config).to(device))
    with torch.no_grad():  # evaluation takes torch's fused attention, training does not
        fused, eager = (unit_features(network.train(mode), device) for mode in (False, True))
    assert largest(fused, eager) <= 1e-6


def test_a_merged_state_dict_loads_into_a_plain_clip(model_config):
    network, plain = adapted(build(model_config)).eval(), build(model_config).eval()
    with torch.no_grad():
        before = unit_features(network)
    assert lora.merge(network) is network and not lora.is_adapted(network)
    assert shapes(network) == shapes(plain)
    assert type(network.transformer.resblocks[0].attn) is nn.MultiheadAttention
    plain.load_state_dict(network.state_dict())
    with torch.no_grad():
        assert largest(unit_features(plain), before) <= 1e-6


def test_merging_a_model_without_adapters_changes_nothing(model_config):
    network = build(model_config)
    before = copied(network.state_dict().items())
    assert lora.merge(network) is network
    after = network.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_merged_model_takes_adapters_again(model_config):
    network = lora.merge(adapted(build(model_config))).eval()
    with torch.no_grad():
        before = unit_features(network)
        assert torch.equal(unit_features(adapted(network, zero=True)), before)


# ------------------------------------------------------------------ training


def freeze_all_but_adapters(network):
    trained = lora.adapter_parameters(network)
    for name, parameter in network.named_parameters():
        parameter.requires_grad = name in trained
    return [network.get_parameter(name) for name in sorted(trained)]


def contrastive(network, device="cpu"):
    images, texts = unit_features(network, device).chunk(2)
    logits = 10 * images @ texts.T  # (B, B)
    target = torch.arange(len(logits), device=device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def steps(network, number, precision=None, device="cpu"):
    """Train the adapters alone; losses, step by step."""
    optimizer, losses = torch.optim.Adam(freeze_all_but_adapters(network), 1e-2), []
    for _ in range(number):
        with torch.autocast(device, precision or torch.bfloat16, enabled=precision is not None):
            loss = contrastive(network, device)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("precision", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_few_steps_lower_the_loss_and_leave_the_originals(model_config, device, precision):
    network = adapted(build(model_config).to(device).train(), zero=True)
    before = copied(network.named_parameters())
    losses = steps(network, 12, precision, device.type)
    assert losses[-1] < 0.5 * losses[0]
    trained = lora.adapter_parameters(network)
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in trained), name


def test_gradients_reach_every_b_at_the_start_and_every_a_afterwards(model_config):
    network = adapted(build(model_config), zero=True)
    for nonzero in ("B", "AB"):
        network.zero_grad()
        contrastive(network).backward()
        for name in lora.adapter_parameters(network):
            assert network.get_parameter(name).grad.any() == (name[-1] in nonzero), name
            nn.init.normal_(network.get_parameter(name), std=0.1)


def test_adapting_freezes_nothing_and_frees_nothing(model_config):
    network = build(model_config)
    for i, parameter in enumerate(network.parameters()):
        parameter.requires_grad = i % 3 == 0
    before = {name: (id(p), p.requires_grad) for name, p in network.named_parameters()}
    adapted(network)
    trained = lora.adapter_parameters(network)
    assert all(network.get_parameter(name).requires_grad for name in trained)
    plain_name = {
        name: name.replace(".parametrizations", "").removesuffix(".original")
        for name, _ in network.named_parameters()
    }
    found = {
        plain_name[name]: (id(p), p.requires_grad)
        for name, p in network.named_parameters()
        if name not in trained
    }
    assert found == before
    lora.merge(network)
    assert {name: (id(p), p.requires_grad) for name, p in network.named_parameters()} == before


def test_dropout_is_active_in_training_only(tiny_model_config):
    network = adapted(build(tiny_model_config), dropout=0.5)
    with torch.no_grad():
        first, second = (unit_features(network.eval()) for _ in range(2))
        third, fourth = (unit_features(network.train()) for _ in range(2))
    assert torch.equal(first, second) and largest(third, fourth) > 1e-3


def test_a_model_in_evaluation_gets_adapters_in_evaluation(tiny_model_config):
    for mode in (False, True):
        network = adapted(build(tiny_model_config).train(mode))
        assert {m.training for m in network.modules() if isinstance(m, LowRank)} == {mode}


# ------------------------------------------------------------------ files and copies


def test_an_adapted_state_dict_survives_a_file(model_config, tmp_path):
    network, path = adapted(build(model_config)).eval(), tmp_path / "adapted.pt"
    torch.save(network.state_dict(), path)
    again = adapted(build(model_config), zero=True).eval()
    again.load_state_dict(torch.load(path, weights_only=True))
    with torch.no_grad():
        assert torch.equal(unit_features(again), unit_features(network))


def test_a_copy_is_independent_and_may_be_merged(model_config):
    network = adapted(build(model_config)).eval()
    twin = copy.deepcopy(network)
    state = copied(network.state_dict().items())
    with torch.no_grad():
        before = unit_features(network)
        assert torch.equal(unit_features(twin), before)
        assert largest(unit_features(lora.merge(twin)), before) <= 1e-6
        nn.init.zeros_(twin.transformer.resblocks[0].mlp.c_fc.weight)
        # torch's own remove_parametrizations on the copy would leave no weight here.
        assert torch.equal(unit_features(network), before)
    assert lora.is_adapted(network) and not lora.is_adapted(twin)
    after = network.state_dict()
    assert all(torch.equal(after[name], state[name]) for name in state)


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "rank 0: expected at least 1"),
        ({"rank": -4}, "rank -4: expected at least 1"),
        ({"alpha": 0}, "alpha 0: expected a number above 0"),
        ({"alpha": -1.0}, "alpha -1.0: expected"),
        ({"alpha": math.nan}, "alpha nan: expected"),
        ({"dropout": 1.0}, r"dropout 1.0: expected a number in \[0, 1\)"),
        ({"dropout": -0.1}, "dropout -0.1: expected"),
    ],
    ids=str,
)
def test_impossible_sizes_are_refused_and_the_model_stays_plain(tiny_model, changes, message):
    network = tiny_model()
    with pytest.raises(ValueError, match=message):
        lora.adapt(network, **{"rank": 4, "alpha": 8, "dropout": 0.1, **changes})
    assert not lora.is_adapted(network) and not lora.adapter_parameters(network)


def test_a_model_is_adapted_once_only(tiny_model):
    network = adapted(tiny_model())
    before = shapes(network)
    with pytest.raises(ValueError, match=r"adapted already; call merge\(model\) first"):
        lora.adapt(network, RANK, ALPHA, 0.0)
    assert shapes(network) == before
