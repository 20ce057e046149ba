"""Typical mistakes end in one line that says what, where and what to do; five as processes."""

import os
import shutil
import subprocess
import sys

import pytest

import audit
import clip
import evaluate
import infer
import options
import T_Graph
import train
import V_Graph
from benchmarks import recall
from conftest import ROOT
from dataset import scenes
from dataset.annotations import read_annotations

SAMPLE = str(ROOT / "test" / "sample_1.png")
BOXES = str(ROOT / "det_json" / "sample_1.json")
MAINS = {
    "train": train.main,
    "evaluate": evaluate.main,
    "infer": infer.main,
    "audit": audit.main,
    "V_Graph": V_Graph.main,
    "T_Graph": T_Graph.main,
    "clip": clip.main,
    "scenes": scenes.main,
    "recall": recall.main,
}
MISTAKES = (  # script, command line, what the message says
    (
        "train",
        "--clip ViT-B/32 --lr-new 1e-4",
        "--lr-new does nothing with --clip and --graph none",
    ),
    ("train", "--train graph", "leaves nothing to train: take --graph object"),
    ("train", f"--out {ROOT}/requirements.txt", "requirements.txt is a file; name a folder"),
    ("train", "--lr 1e-4", "--lr does nothing without --clip"),
    ("train", "--activation gelu", "--activation does nothing without --clip"),
    ("train", "--clip ViT-B/32 --lr 0", "--lr 0.0: expected more than 0"),
    ("train", "--lr-new -1", "--lr-new -1.0: expected more than 0"),
    ("train", "--lr-new nan", "finite number"),
    ("train", "--weight-decay -0.1", "--weight-decay -0.1: expected 0 or more"),
    ("train", "--epochs 0", "--epochs 0: expected 1 or more"),
    ("train", "--batch-size 1", "no negatives"),
    ("train", "--batch-size 0", "--batch-size 0: expected 1 or more"),
    ("train", "--fusion 0", "--fusion 0.0: expected more than 0"),
    ("train", "--fusion 1.5", "--fusion 1.5: expected 1 or less"),
    ("train", "--fusion sum", "--fusion: sum: expected gate or a number"),
    ("train", "--fusion gate --graph published", "--fusion gate: the published graph branch has"),
    (
        "train",
        "--dataset ucm --data-root . --caption-form lower",
        "--caption-form 'lower': expected",
    ),
    ("train", "--dataset ucm --data-root . --caption-form {}a {}b", "--caption-form: 2 given"),
    ("train", "--max-objects 0", "--max-objects 0: expected 1 or more"),
    ("train", "--drop-graphs 1.5", "--drop-graphs 1.5: expected 1 or less"),
    ("train", "--graph none --fusion gate", "--fusion does nothing without --graph object"),
    ("train", "--graph published --max-objects 9", "does nothing without --graph object|exchanged"),
    ("train", "--graph none --drop-graphs 0", "--drop-graphs does nothing without --graph"),
    ("train", "--train lora", "--train lora adapts pretrained weights"),
    ("train", "--lora 8 16 0", "--lora does nothing without --train lora"),
    ("train", "--image-size -96", "--image-size -96: expected 1 or more"),
    ("train", "--workers -1", "--workers -1: expected 0 or more"),
    ("train", "--clip ViT-B/32 --model small", "leave --model out"),
    ("train", "--epoch 3", "unrecognized arguments: --epoch"),
    ("train", "--dataset ucm", "--dataset ucm needs --data-root"),
    ("train", "--dataset ucm --data-root gone", "gone: no such folder; check --data-root"),
    ("train", "--model gone", "model 'gone': not in"),
    ("train", "--image-size 97", "--image-size 97: expected a multiple of 32"),
    ("train", "--labels gone.txt", "gone.txt"),
    ("train", "--clip gone.pt", "--clip gone.pt: no such file"),
    ("train", "--resume --out gone", "--resume: no gone/last.pth"),
    ("evaluate", "--checkpoint gone.pth", "gone.pth: no such checkpoint"),
    ("evaluate", "--compare gone.json gone.json", "gone.json: not readable"),
    ("infer", "--checkpoint gone.pth", "gone.pth: no such checkpoint"),
    ("audit", "--dataset ucm --data-root gone", "gone: no such folder"),
    ("V_Graph", f"gone.json --image {SAMPLE}", "gone.json"),
    ("V_Graph", f"{BOXES} --image gone.png", "gone.png: no such image"),
    ("T_Graph", "planes --labels gone.txt", "gone.txt: not readable as a label file"),
    ("T_Graph", "planes --draw graph.txt", "--draw graph.txt: the suffix is of no image format"),
    ("clip", "export --checkpoint gone.pt --out plain.pt", "gone.pt: no such"),
    ("scenes", "--out .", "holds other files than scenes"),
    ("recall", "20 10", "texts 10: expected one for each image or more"),
    ("recall", "9 10", "images 9: expected 10 or more"),
)


@pytest.mark.parametrize(("script", "line", "expected"), MISTAKES)
def test_a_mistake_is_one_line(script, line, expected, tmp_path, monkeypatch, capsys):
    (tmp_path / "file.txt").touch()
    monkeypatch.chdir(tmp_path)
    try:
        MAINS[script](line.split())
    except (ValueError, OSError) as error:
        message = str(error)
    except SystemExit as error:
        assert error.code == 2
        message = capsys.readouterr().err.strip().removeprefix("error: ")
    else:
        pytest.fail("no error")
    assert expected in message and "\n" not in message
    assert not {path.name for path in tmp_path.iterdir()} - {"file.txt", "runs"}


@pytest.mark.parametrize("script", ["train", "evaluate"])
def test_data_are_looked_at_before_a_clip_is_loaded(script, mini, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(clip, "load", lambda *_, **__: pytest.fail("loaded"))
    shutil.copytree(mini, "root")
    name = "--clip" if script == "train" else "--checkpoint"
    command = [name, "ViT-B/32", "--dataset", "mini", "--data-root"]
    mistakes = {
        "gone: no such folder; check --data-root": ["gone"],
        "gone: no such folder; check --det-json": ["root", "--det-json", "gone"],
        "1 images are missing or unreadable": ["root"],
    }
    if script == "train":
        mistakes["3 validation images; R@10 needs more"] = ["root", "--dev-images", "3"]
    for split in ("train", "test"):
        (tmp_path / "root" / "images" / read_annotations("root").splits[split][0].name).unlink()
    for message, words in mistakes.items():
        with pytest.raises(ValueError, match=message):
            MAINS[script]([*command, *words])


def process(*words, folder, **more):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        **more,
    )


@pytest.mark.parametrize(
    ("script", "words", "expected"),
    [
        ("train.py", ["--epochs", "0"], "--epochs 0: expected 1 or more"),
        ("evaluate.py", ["--checkpoint", "gone.pth"], "gone.pth: no such checkpoint"),
        ("V_Graph.py", ["gone.json", "--image", SAMPLE], "gone.json"),
    ],
)
def test_a_process_ends_with_the_line_and_code_2(script, words, expected, tmp_path):
    found = process(str(ROOT / script), *words, folder=tmp_path)
    assert found.returncode == 2 and found.stderr.count("\n") == 1
    assert found.stderr.startswith("error: ") and expected in found.stderr


def test_debug_shows_the_traceback(tmp_path):
    words = ["gone.json", "--image", SAMPLE, "--debug"]
    found = process(str(ROOT / "V_Graph.py"), *words, folder=tmp_path)
    assert found.returncode == 1 and "Traceback" in found.stderr


@pytest.mark.parametrize(("told", "shown"), [("", "no more is told"), ("4 GiB\nat", "4 GiB")])
def test_too_little_memory_is_one_line(told, shown, capsys):
    def main():
        raise MemoryError(told)

    with pytest.raises(SystemExit):
        options.run(main)
    expected = f"error: out of memory ({shown}); halve --batch-size\n"
    assert capsys.readouterr().err == expected


def test_a_closed_pipe_is_no_error(tmp_path):
    code = "import options, sys\noptions.run(lambda: [print('x' * 1000) for _ in range(10000)])"
    command = f'{sys.executable} -c "{code}" | head -1'
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run(command, shell=True, env=environment, capture_output=True, text=True)
    assert found.stderr == "" and found.stdout.count("\n") == 1


def test_help_comes_before_torch_is_imported():
    code = (
        "import runpy, sys\n"
        "sys.argv = ['train.py', '--help']\n"
        f"try: runpy.run_path(r'{ROOT / 'train.py'}', run_name='__main__')\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)\n"
    )
    found = process("-c", code, folder=ROOT)
    assert found.stdout.splitlines()[-1] == "0 False"
