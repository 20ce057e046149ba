"""The shape of the source tree: who imports whom, what scripts share."""

import ast
import os
import subprocess
import sys

import pytest

import ablate
import audit
import bench
import clip
import clip_gcn_image_feature_integration
import detections
import evaluate
import evidence
import infer
import loss
import options
import search
import T_Graph
import train
import V_Graph
from backbones import towers
from conftest import ROOT
from dataset import scenes
from training import step

ROOMS = {  # a folder, and the folders that its modules may import from
    "det_formats": (),
    "backbones": (),
    "dataset": ("backbones", "det_formats"),
    "metrics": ("dataset", "det_formats"),
    "training": ("backbones", "dataset", "metrics"),
    "gallery": ("backbones", "dataset", "det_formats", "metrics"),
    "benchmarks": ("backbones", "dataset", "det_formats", "gallery", "metrics", "training"),
}
# Which no other module imports.
COMMANDS = ("train", "infer", "audit", "ablate", "bench", "detections", "search")
SOURCES = sorted([*ROOT.glob("*.py"), *(p for room in ROOMS for p in (ROOT / room).glob("*.py"))])
SCRIPTS = {
    "train": train,
    "evaluate": evaluate,
    "evidence": evidence,
    "ablate": ablate,
    "bench": bench,
    "T_Graph": T_Graph,
    "infer": infer,
    "audit": audit,
    "detections": detections,
    "search": search,
    "V_Graph": V_Graph,
    "clip": clip,
    "clip_gcn_image_feature_integration": clip_gcn_image_feature_integration,
    "dataset.scenes": scenes,
}


def module_name(path):
    """dataset/scenes.py: dataset.scenes; dataset/__init__.py: dataset."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_name(path): path for path in SOURCES}


def imported(tree):
    """Names of the modules that a syntax tree imports, inside of functions too."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are written from the root"
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


IMPORTS = {name: imported(parsed(path)) & set(MODULES) for name, path in MODULES.items()}


def test_every_folder_of_code_is_a_room():
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_from_their_neighbours_only(room):
    own = [name for name in MODULES if name.split(".")[0] == room]
    found = {other.split(".")[0] for name in own for other in IMPORTS[name]}
    assert found & set(ROOMS) - {room} <= set(ROOMS[room])


def test_no_module_imports_itself_through_others():
    left = {name: set(found) - {name} for name, found in IMPORTS.items()}
    while ready := [name for name, found in left.items() if not found]:
        for name in ready:
            del left[name]
        left = {name: found - set(ready) for name, found in left.items()}
    assert not left


def test_commands_are_imported_by_none():
    users = {name for name, found in IMPORTS.items() if found & set(COMMANDS)}
    assert users <= {"ablate", "bench"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_devices_are_never_assumed(path):
    assert ".cuda(" not in path.read_text(encoding="utf-8")


# ------------------------------------------------------------------ scripts


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """In an empty folder: all imported, then each script run with --help; (process, folder)."""
    folder = tmp_path_factory.mktemp("empty")
    code = f"""
import runpy, sys
import {", ".join(MODULES)}
print("imported")
for name, path in {[(name, str(MODULES[name])) for name in SCRIPTS]}:
    sys.argv = [path, "--help"]
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as end:
        print(name, "ended with", end.code)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True
    )
    return process, folder


def test_the_scripts_are_those_that_run():
    ends = 'if __name__ == "__main__":'
    found = {n for n, path in MODULES.items() if ends in path.read_text(encoding="utf-8")}
    assert found == set(SCRIPTS)


def test_importing_does_nothing(session):
    process, folder = session
    assert process.stdout.startswith("imported\n")
    assert process.stderr == ""
    assert not list(folder.iterdir())


def test_every_script_prints_its_help(session):
    process, _ = session
    assert process.returncode == 0
    for name in SCRIPTS:
        assert f"usage: {name.split('.')[-1]}.py" in process.stdout
        assert f"{name} ended with 0\n" in process.stdout


@pytest.mark.parametrize("command", SCRIPTS.values(), ids=SCRIPTS)
def test_an_unknown_option_is_refused(command, capsys):
    with pytest.raises(SystemExit) as end:
        command.main(["--no-such-option"])
    assert end.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1


# ------------------------------------------------------------------ options


def test_what_options_name_is_what_modules_know():
    assert options.PRECISIONS == tuple(step.PRECISIONS)
    assert options.TRAINED == tuple(step.TRAINED)
    assert options.ACTIVATIONS == tuple(towers.ACTIVATIONS)
    assert options.FIXED["margin"] == loss.MARGIN


def test_scripts_have_few_options():
    most = {"train": 34, "evaluate": 20}
    for script, number in most.items():
        assert len(options.default_options(script)) <= number


@pytest.mark.parametrize("script", ["train", "evaluate", "infer", "V_Graph"])
def test_help_shows_defaults(script):
    for row in options.OPTIONS:
        default = row.settings.get("default")
        if script not in row.scripts or default is None:
            continue
        text = options.make_parser(script, "").format_help()
        own = " ".join(text.split(f"\n  {row.flag} ")[1].split("\n  --")[0].split())
        of_checkpoint = script == "evaluate" and row.group == "data"
        assert of_checkpoint or "default" in own, own
    assert ("(default: the checkpoint's):" in text) == (script == "evaluate")
    assert text.startswith("usage: ") and text.split("\n")[0].endswith("[options]")
