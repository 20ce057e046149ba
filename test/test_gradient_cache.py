"""The gradient cache: a batch in chunks has the batch's gradients, and the memory of a chunk."""

import math

import pytest
import torch
import torch.nn.functional as F

import training.step
from conftest import RESNET
from dataloader import RetrievalData, sources
from dataset.batches import TrainingSet
from det_formats.det_json import read_label_map
from model import add_adapters
from train import parse
from training import gradient_cache
from training.step import embeddings, freeze, make_learner, own_loss, set_training_mode, train_step

LOSSES = ("infonce", "hinge", "hinge-max")
PAIRS = 8  # of a batch


@pytest.fixture
def step(mini, tiny_model, tiny_model_config, monkeypatch):
    """A learner, its data, a batch and the options: step("--loss", "hinge", features=True, ...)."""
    monkeypatch.setattr(training.step, "MAX_GRAD_NORM", math.inf)

    def build(*arguments, features=False, **changes):
        given = ["--dataset", "mini", "--data-root", str(mini), "--precision", "fp32"]
        options = {**parse([*given, "--graph", "object", *arguments])[0], **changes}
        data = RetrievalData(options, *sources(options))
        images = data.image_set("train", 32, read_label_map())
        train_set = TrainingSet(
            images,
            data.records("train"),
            model_config=tiny_model_config,
            augment=options["augment"],
            drop_graphs=0,
            seed=0,
        )
        network = tiny_model(fusion="gate", graph=options["graph"])
        add_adapters(network, options)
        freeze(network, options["train"])
        set_training_mode(network, options)
        if features:
            torch.manual_seed(1)
            images.features = torch.randn(len(images), 32)
            train_set.text_features = F.normalize(torch.randn(len(train_set.captions), 32), dim=-1)
        learner = make_learner(network, options, 4)
        if options["precision"] == "fp16":  # a scale at which nothing overflows
            learner = learner._replace(scaler=torch.amp.GradScaler("cpu", init_scale=2.0**6))
        return learner, train_set, next(iter(train_set.batches(1, PAIRS))), options

    return build


def gradients(learner, train_set, batch, options):
    """(loss, {name: gradient}) of one step."""
    loss = train_step(learner, train_set, batch, options, "a step")
    named = learner.model.named_parameters()
    return loss, {name: p.grad for name, p in named if p.grad is not None}


def require_close(found, expected, tolerance=1e-5):
    """Assert that gradients are equal up to a share of the largest."""
    assert found.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    atol = tolerance * max(1.0, largest)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=atol, msg=name)


@pytest.mark.parametrize("size", [1, 3, 4])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_gradients_are_those_of_the_whole_batch(step, loss, size):
    given = ("--loss", loss, "--augment", "crop", "flip")
    expected_loss, expected = gradients(*step(*given))
    found_loss, found = gradients(*step(*given, chunk=size))
    assert found_loss == pytest.approx(expected_loss, rel=1e-6)
    assert len(found) > 30 and ("logit_scale" in found) == (loss == "infonce")
    require_close(found, expected)


@pytest.mark.parametrize("kind", ["lora", "dropout", "graph", "fp16"])
def test_they_are_with_adapters_frozen_towers_and_a_scaled_loss(step, kind):
    changes = {
        "lora": {"train": "lora"},
        "dropout": {"train": "lora", "lora": (4, 8, 0.5)},
        "graph": {"train": "graph", "augment": [], "features": True},
        "fp16": {"precision": "fp16", "graph": "none"},
    }[kind]
    expected = gradients(*step(**changes))[1]
    found = gradients(*step(**changes, chunk=3))[1]
    require_close(found, expected, 2e-3 if kind == "fp16" else 1e-5)


def test_dropout_draws_the_same_numbers_both_times(step):
    learner, train_set, batch, options = step(train="lora", lora=(4, 8, 0.5))
    for name, parameter in learner.model.named_parameters():
        if name.endswith(".B"):  # at first zero, so that nothing would show
            torch.nn.init.normal_(parameter, std=0.1)
    seen = []

    def encode(chunk):
        seen.append(embeddings(learner, chunk, train_set.image_size))
        return seen[-1]

    cache = gradient_cache.fill(encode, batch, 3, learner.model.logit_scale)
    leaves = (cache.image_features, cache.text_features, cache.logit_scale)
    own_loss(*leaves, batch, options).backward()
    after = torch.get_rng_state()
    gradient_cache.backward(cache, encode, learner.wrapped, learner.model.logit_scale)
    assert torch.equal(torch.get_rng_state(), after)  # as if there were no second time
    first, second = seen[:3], seen[3:]
    for (images, texts), (again, texts_again) in zip(first, second, strict=True):
        assert torch.equal(images, again) and torch.equal(texts, texts_again)
    other = embeddings(learner, cache.chunks[0], train_set.image_size)
    assert not torch.equal(other[0], first[0][0])


class SavedBytes:
    """Bytes of storages that are kept for steps back at the moment, and the most there have been.

    Each storage counts once, and those of parameters do not.
    """

    def __init__(self, parameters):
        self.known = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self.users = {}  # of a storage: how many saved tensors have it
        self.now = 0
        self.peak = 0

    def pack(self, tensor):
        return Saved(self, tensor)

    def unpack(self, saved):
        return saved.tensor

    def add(self, storage):
        key = storage.data_ptr()
        if key in self.known:
            return
        self.users[key] = self.users.get(key, 0) + 1
        if self.users[key] == 1:
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)

    def remove(self, storage):
        key = storage.data_ptr()
        if key in self.known:
            return
        self.users[key] -= 1
        if self.users[key] == 0:
            self.now -= storage.nbytes()


class Saved:
    """A tensor that counts until autograd lets go of it."""

    def __init__(self, counter, tensor):
        self.counter = counter
        self.tensor = tensor
        counter.add(tensor.untyped_storage())

    def __del__(self):
        self.counter.remove(self.tensor.untyped_storage())


def peak_of_step(learner, train_set, batch, options):
    """The most bytes that a step keeps for its way back."""
    counter = SavedBytes(learner.model.parameters())
    with torch.autograd.graph.saved_tensors_hooks(counter.pack, counter.unpack):
        train_step(learner, train_set, batch, options, "a step")
    assert counter.now == 0
    return counter.peak


@pytest.mark.parametrize("size", [2, 4])
def test_the_memory_is_that_of_one_chunk(step, size):
    learner, train_set, batch, options = step()
    whole = peak_of_step(learner, train_set, batch, options)
    [*chunks] = gradient_cache.split(batch, size)
    alone = max(peak_of_step(learner, train_set, chunk, options) for chunk in chunks)
    found = peak_of_step(learner, train_set, batch, {**options, "chunk": size})
    print(f"{whole:,} bytes of the batch, {alone:,} of a chunk alone, {found:,} with the cache")
    assert alone < whole * size / PAIRS * 1.2
    assert found <= 1.1 * alone


def test_a_resnet_keeps_its_statistics_in_chunks(tiny_model_config):
    import model

    config = {**tiny_model_config, "vision": RESNET}
    network = model.build(config, read_label_map().lines, {"graph": "none", "fusion": 0.5})
    options = parse(["--graph", "none"])[0]
    norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for changes, is_training in (({}, True), ({"chunk": 2}, False), ({"train": "text"}, False)):
        set_training_mode(network, {**options, **changes})
        assert {norm.training for norm in norms} == {is_training} and network.training
