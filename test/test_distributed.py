"""Several processes are one run: loss, gradients, batches, weights and figures; and their ends."""

import json
import math
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import evaluate
import processes
import train
import training.step
from backbones import model_configs
from conftest import ROOT, equal_batches, log_of, weights_of
from dataloader import RetrievalData, sources
from dataset.batches import TrainingSet
from det_formats.det_json import read_label_map
from model import add_adapters, build
from options import default_options, for_training, run
from train import parse
from training import distributed, resume
from training.step import (
    freeze,
    make_learner,
    recompute_blocks,
    set_training_mode,
    train_step,
)

pytest.importorskip("resource")  # forked processes are Unix's
TINY = {
    "embed_dim": 32,
    "image_size": 32,
    "vision": {"patch_size": 16, "width": 32, "layers": 2, "heads": 2},
    "text": {"context_length": 77, "vocab_size": 49408, "width": 32, "layers": 1, "heads": 2},
}

# ------------------------------------------------------------------ as torchrun starts them


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """Calls a function in several processes: together(2, function, *arguments); their exit codes.

    What they print is in `together.printed(rank)`, their errors in `together.errors(rank)`.
    """
    folder = tmp_path_factory.mktemp("together")
    context = multiprocessing.get_context("forkserver")  # which has imported all already
    context.set_forkserver_preload(["test_distributed", "torch._dynamo"])  # which DDP imports
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "test")]))
        patch.setenv("OMP_NUM_THREADS", "1")
        context.Process(target=print).start()

    def start(world, function, *arguments):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        started = []
        for rank in range(world):
            environment = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": world,
                "LOCAL_WORLD_SIZE": world,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "FGCROSS_CACHE": os.environ["FGCROSS_CACHE"],
            }
            outputs = folder / f"{rank}.txt", folder / f"{rank}.err"
            given = environment, outputs, function, arguments
            started.append(context.Process(target=child, args=given))
            started[-1].start()
        for process in started:
            process.join(120)
            assert process.exitcode is not None, "does not end"
        return [process.exitcode for process in started]

    start.printed = lambda rank: (folder / f"{rank}.txt").read_text(encoding="utf-8")
    start.errors = lambda rank: (folder / f"{rank}.err").read_text(encoding="utf-8")
    return start


def child(environment, outputs, function, arguments):
    """What such a process does."""
    os.environ.update({name: str(value) for name, value in environment.items()})
    for number, path in zip((1, 2), outputs, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    multiprocessing.set_start_method(None, force=True)  # the loader's, as in any other process
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    function(*arguments)


# ------------------------------------------------------------------ loss and gradients

CASES = {
    "infonce": {},
    "hinge": {"loss": "hinge"},
    "hinge-max": {"loss": "hinge-max"},
    "lora": {"train": "lora"},
    "dropout": {"train": "lora", "lora": (4, 8, 0.5)},
    "graph": {"train": "graph", "loss": "hinge"},
    "words": {"text_layers": 0},
    "chunk": {"chunk": 1},
    "hinge in chunks": {"chunk": 1, "loss": "hinge"},
    "dropout in chunks": {"chunk": 1, "train": "lora", "lora": (4, 8, 0.5)},
    "recomputed in chunks": {"chunk": 1, "recompute": True},
}
PAIRS = 4  # of a batch


def one_step(root, text_layers=1, **changes):
    """(loss, {name: gradient}) of one step on the data set `five`."""
    training.step.MAX_GRAD_NORM = math.inf
    given = [
        "--dataset",
        "five",
        "--data-root",
        str(root),
        "--precision",
        "fp32",
        "--graph",
        "object",
    ]
    options = {**parse(given)[0], **changes}
    data = RetrievalData(options, *sources(options))
    images = data.image_set("train", 32, read_label_map())
    config = {**TINY, "name": "tiny", "text": {**TINY["text"], "layers": text_layers}}
    train_set = TrainingSet(
        images, data.records("train"), model_config=config, augment=[], drop_graphs=0, seed=3
    )
    torch.manual_seed(0)
    network = build(config, read_label_map().lines, {**options, "fusion": "gate"})
    add_adapters(network, options)
    freeze(network, options["train"])
    set_training_mode(network, options)
    if options["recompute"]:
        recompute_blocks(network)
    if options["train"] == "graph":
        images.features = torch.randn(len(images), 32)
        train_set.text_features = F.normalize(torch.randn(len(train_set.captions), 32), dim=-1)
    learner = make_learner(network, options, 4)
    where = {"rank": processes.rank(), "world": processes.world()}
    [batch] = train_set.batches(1, PAIRS, **where)
    loss = train_step(learner, train_set, batch, options, "a step")
    named = network.named_parameters()
    return loss, {name: p.grad for name, p in named if p.grad is not None}


def save_steps(root, out):
    with processes.group("cpu", "start again"):
        found = {name: one_step(root, **changes) for name, changes in CASES.items()}
        torch.save(found, out / f"{processes.rank()}.pt")


@pytest.fixture
def unclipped(monkeypatch):
    monkeypatch.setattr(training.step, "MAX_GRAD_NORM", math.inf)


def test_loss_and_gradients_are_those_of_one_process(together, five, tmp_path, unclipped):
    assert together(2, save_steps, five, tmp_path) == [0, 0], together.errors(0)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for case, changes in CASES.items():
        loss, expected = one_step(five, **{**changes, "chunk": None, "recompute": False})
        assert first[case][0] == second[case][0] == pytest.approx(loss, rel=1e-6), case
        found = first[case][1]
        assert found.keys() == second[case][1].keys() == expected.keys(), case
        largest = max(float(gradient.abs().max()) for gradient in expected.values())
        for name, gradient in expected.items():
            assert torch.equal(found[name], second[case][1][name]), (case, name)
            difference = float((found[name] - gradient).abs().max())
            assert difference <= 1e-5 * max(1, largest), (case, name)


# ------------------------------------------------------------------ batches


def test_batches_are_the_same_whatever_the_number_of_processes(five):
    options = parse(["--dataset", "five", "--data-root", str(five)])[0]
    data = RetrievalData(options, *sources(options))
    images = data.image_set("train", 32, read_label_map())
    train_set = TrainingSet(
        images,
        data.records("train"),
        model_config={**TINY, "name": "tiny"},
        augment=["crop", "flip"],
        drop_graphs=0.5,
        seed=0,
    )
    for start in (0, 1):
        whole = list(train_set.batches(2, 2, start=start))
        parts = [train_set.batches(2, 2, start=start, rank=rank, world=2) for rank in (0, 1)]
        assert len(whole) == len(parts[0]) == len(parts[1]) == 2 - start
        for batch, *own in zip(whole, *parts, strict=True):
            for key in ("index", "image", "affine", "nodes", "text_id"):
                assert torch.equal(batch[key], torch.cat([part[key] for part in own]))
    whole = [batch["index"].tolist() for batch in train_set.batches(2, 4)]
    quarters = [[] for _ in whole]
    for rank in range(4):
        for rows, batch in zip(quarters, train_set.batches(2, 4, rank=rank, world=4), strict=True):
            rows += batch["index"].tolist()
    assert quarters == whole
    # For encoding, whole batches are shared.
    expected = list(images.batches(2))
    equal_batches(images.batches(2, rank=0, world=2), expected[::2])
    equal_batches(images.batches(2, rank=1, world=2), expected[1::2])
    assert len(images.batches(2, rank=3, world=4)) == 0


# ------------------------------------------------------------------ what cannot be


@pytest.mark.parametrize(("before", "now"), [(1, 2), (2, 1)])
def test_a_resnet_that_learns_keeps_to_one_process_or_several(before, now, monkeypatch):
    monkeypatch.setattr(processes, "several", lambda: now > 1)
    options = {**default_options("train"), "clip": "clip.pt"}
    config = model_configs.read_model_config("small")
    as_before = "several processes" if before > 1 else "one process"
    with pytest.raises(ValueError, match=f"go on with {as_before}, as it was begun"):
        distributed.check_resumed(options, config, {"processes": before})
    for changes in ({"train": "text"}, {"chunk": 2}):  # whose statistics are kept anyway
        distributed.check_resumed({**options, **changes}, config, {"processes": before})


MISTAKES = (  # processes, options, what is said
    (4, {"batch_size": 6}, "--batch-size 6: 4 processes share it; take a multiple of 4"),
    (2, {"chunk": 4}, "--chunk 4 does nothing: a process has 4 pairs of a batch; take less"),
    (2, {"batch_size": 26}, "--batch-size 26: more than the 24 training images"),
    (
        1,
        {"chunk": 2, "graph": "published"},
        "--graph published makes one vector of the whole batch",
    ),
    (
        1,
        {"chunk": 2, "model": "small"},
        "--model small: a ResNet from scratch needs the statistics",
    ),
)


@pytest.mark.parametrize(("world", "changes", "said"), MISTAKES)
def test_what_cannot_be_shared_is_refused(world, changes, said, monkeypatch):
    monkeypatch.setattr(processes, "world", lambda: world)
    monkeypatch.setattr(processes, "several", lambda: world > 1)
    options = {**default_options("train"), "batch_size": 8, **changes}
    config = model_configs.read_model_config(options["model"] or "ViT-B-32")
    with pytest.raises(ValueError) as failure:
        distributed.check(options, config)
        distributed.check_images(options, 24)
    assert str(failure.value).startswith(said) and "\n" not in str(failure.value)


@pytest.mark.parametrize("changes", [{"chunk": None}, {"train": "text"}, {"clip": "clip.pt"}])
def test_a_resnet_is_taken_where_its_statistics_are_those_it_had(changes):
    options = {**default_options("train"), "batch_size": 8, "chunk": 2, **changes}
    distributed.check(options, model_configs.read_model_config("small"))


def test_a_chunk_that_is_the_batch_is_refused():
    usual = default_options("train")
    with pytest.raises(ValueError, match="--chunk 8 does nothing with --batch-size 8: take less"):
        for_training({**usual, "batch_size": 8, "chunk": 8}, given={"chunk": 8, "batch_size": 8})


def test_an_environment_that_is_not_torchruns_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="WORLD_SIZE is 2, but RANK, .* start several .* torchrun"):
        with processes.group("cpu", ""):
            pytest.fail("begun")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with processes.group("cpu", ""):
        assert not processes.several() and (processes.rank(), processes.world()) == (0, 1)


# ------------------------------------------------------------------ runs

EPOCHS = 2


def arguments_of(mini, out):
    data = ["--dataset", "mini", "--data-root", str(mini), "--out", str(out)]
    small = ["--model", "tiny", "--device", "cpu", "--batch-size", "8", "--epochs", str(EPOCHS)]
    return [*data, *small, "--augment", "crop", "flip", "--lr-new", "1e-3"]


def run_child(words, models, step=None, prepare=None):
    """train.main in a process; prepare(rank) is called before the step of this number, from 1."""
    model_configs.MODELS = models
    own_step = train.train_step
    calls = []

    def counted(*given):
        calls.append(1)
        if len(calls) == step:
            prepare(processes.rank())
        return own_step(*given)

    train.train_step = counted
    sys.argv = ["train.py", *words]
    run(train.main)


def signal_last(number, rank):
    """Send a signal to the process itself, if it is the last."""
    if rank == processes.world() - 1:
        os.kill(os.getpid(), number)


@pytest.fixture
def models(tmp_path, monkeypatch):
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "tiny.json").write_text(json.dumps(TINY), encoding="utf-8")
    monkeypatch.setattr(model_configs, "MODELS", folder)
    return folder


@pytest.mark.parametrize(
    ("begun_by", "ended_by", "graph"),
    [(2, 1, "object"), pytest.param(1, 2, "none", marks=pytest.mark.slow)],
)
def test_a_run_goes_on_with_another_number_of_processes(
    together, mini, tmp_path, models, begun_by, ended_by, graph
):
    """A signal to one process stops all, and what they save is as one process saves it."""
    straight = tmp_path / "straight"
    train.main([*arguments_of(mini, straight), "--graph", graph])
    out = tmp_path / "out"
    stop = partial(signal_last, signal.SIGTERM)
    words = [*arguments_of(mini, out), "--graph", graph]
    codes = together(begun_by, run_child, words, models, 4, stop)
    assert codes == [143] * begun_by, together.errors(0)
    progress = resume.read_state(out / "last.pth")["state"]["progress"]
    assert (progress["epoch"], progress["step"], len(log_of(out))) == (2, 1, 1)
    files = sorted(path.name for path in out.iterdir())
    assert files == ["best_model.pth", "last.pth", "log.jsonl"]
    if begun_by == 2:
        printed = together.printed(0)
        assert "cpu, fp32, 2 processes\n" in printed
        command = f"torchrun --nproc_per_node=2 train.py --resume --out {out}"
        assert printed.endswith(f"stopped and saved in epoch 2; go on with: {command}\n")
        assert together.printed(1) == together.errors(1) == ""
    assert together(ended_by, run_child, ["--resume", "--out", str(out)], models) == [0] * ended_by
    printed = together.printed(0)
    said = f"resumed by {ended_by} processes, saved by {begun_by}: no longer bit-exact\n"
    assert printed.count(said) == printed.count("best validation mR") == 1
    expected = weights_of(straight)
    for name, tensor in weights_of(out).items():
        if not name.endswith("attn.in_proj_bias"):  # a key's gradient is rounding alone
            # AdamW enlarges what is rounding in single numbers.
            assert (tensor - expected[name]).norm() < 2e-4, name
    for line, straight_line in zip(log_of(out), log_of(straight), strict=True):
        for key in ("loss", "val_mR", "logit_scale"):
            assert line[key] == pytest.approx(straight_line[key], rel=1e-4)
        assert line["lr"] == straight_line["lr"]
    assert "evidence" in torch.load(out / "best_model.pth", weights_only=True)


def test_frozen_towers_are_encoded_together(together, mini, tmp_path, models, cache_folder):
    words = ["--graph", "object", "--train", "graph", "--augment", "--workers", "1"]
    two, one = tmp_path / "two", tmp_path / "one"
    assert together(2, run_child, [*arguments_of(mini, two), *words], models) == [0, 0]
    stored = {path.name: path.read_bytes() for path in cache_folder.glob("*features*")}
    assert len(stored) == 4
    train.main([*arguments_of(mini, one), *words])
    assert {path.name: path.read_bytes() for path in cache_folder.glob("*features*")} == stored
    for name, tensor in weights_of(two).items():
        torch.testing.assert_close(tensor, weights_of(one)[name], rtol=0, atol=1e-5, msg=name)


def killed_in_its_third_step(words, models):
    """train.main, which saves each step, in a process of which the last one is killed."""
    resume.SAVE_SECONDS = 0
    run_child(words, models, 3, partial(signal_last, signal.SIGKILL))


def test_a_killed_process_ends_the_run_and_it_goes_on(together, mini, tmp_path, models):
    out = tmp_path / "out"
    begin = time.perf_counter()
    codes = together(2, killed_in_its_third_step, arguments_of(mini, out), models)
    seconds = time.perf_counter() - begin
    assert codes == [2, -signal.SIGKILL] and seconds < 60, together.errors(0)
    said = "error: another process of this run has ended, so this one cannot go on; "
    assert together.errors(0).startswith(said + train.AFTER_A_LOSS + " (")
    assert together.errors(0).count("\n") == 1
    progress = resume.read_state(out / "last.pth")["state"]["progress"]
    assert (progress["epoch"], progress["step"]) == (1, 2) and not (out / "run.lock").exists()
    train.main(["--resume", "--out", str(out)])
    assert len(log_of(out)) == EPOCHS


def test_a_mistake_is_said_once(together, mini, tmp_path, models):
    out = tmp_path / "out"
    words = [*arguments_of(mini, out), "--batch-size", "9"]
    assert together(2, run_child, words, models) == [2, 2]
    said = "error: --batch-size 9: 2 processes share it; take a multiple of 2, or another number "
    assert together.errors(0).endswith(said + "of processes\n") and together.errors(1) == ""
    assert not out.exists()


# ------------------------------------------------------------------ figures


def test_several_processes_measure_the_same_figures(together, save_tiny, mini, tmp_path):
    data = ["--dataset", "mini", "--data-root", str(mini)]
    checkpoint = save_tiny("a.pth", *data)
    words = ["--checkpoint", str(checkpoint), "--device", "cpu", "--batch-size", "5", "--fine"]
    [expected] = evaluate.main([*words, "--json", str(tmp_path / "one.json")])
    assert together(3, evaluate.main, [*words, "--json", str(tmp_path / "three.json")]) == [0] * 3
    assert "written to" in together.printed(0)
    assert together.printed(1) == together.errors(1) == together.printed(2) == ""
    one, three = (
        json.loads((tmp_path / f"{name}.json").read_text("utf-8")) for name in ("one", "three")
    )
    assert one["results"] == three["results"] == [json.loads(json.dumps(expected))]


@pytest.mark.slow
def test_torchrun_starts_training_and_evaluation(mini, plain_clip, tmp_path):
    """The commands as they are typed; the CLIP is a ResNet, which keeps its statistics."""
    out = tmp_path / "out"
    data = ["--dataset", "mini", "--data-root", str(mini), "--device", "cpu"]
    start = ["--clip", str(plain_clip), "--out", str(out), "--epochs", "1", "--batch-size", "8"]
    found = torchrun("train.py", *data, *start, "--chunk", "2")
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("batch normalisation keeps its statistics\n") == 1
    before = torch.jit.load(plain_clip).state_dict()
    for name, tensor in weights_of(out).items():
        if "running_" in name:
            assert torch.equal(tensor, before[name])
    found = torchrun("evaluate.py", "--checkpoint", str(out / "best_model.pth"), *data)
    assert found.returncode == 0 and found.stdout.count("95 % interval") == 1


def torchrun(script, *words):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    return subprocess.run(
        [*command, str(ROOT / script), *words], cwd=ROOT, capture_output=True, text=True
    )
