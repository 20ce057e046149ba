"""The shape of the source tree: who imports whom, how large a file may be, what scripts share."""

import ast
import os
import subprocess
import sys

import pytest
import torch

import audit
import clip
import clip_gcn_image_feature_integration
import evaluate
import infer
import scenes
import train
import V_Graph
from conftest import ROOT
from model import definition_names, read_definition
from towers import CLIP

LEVELS = (  # a script imports only from levels above its own in this list
    ("V_Graph", "simple_tokenizer", "loss", "towers", "images", "augment", "shapes")
    + ("intervals", "ranks", "annotations", "weights", "lora"),
    ("model", "scenes", "report", "pretrained", "export"),
    ("clip", "resume"),
    ("cache", "learner"),
    ("dataloader",),
    ("retrieval_data",),
    ("clip_gcn_image_feature_integration",),
    ("evaluate", "audit", "infer", "training_data"),
    ("train",),
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
EXCEPTIONS = {("V_Graph", "images")}  # its command draws, its functions do not
SOURCES = sorted(ROOT.glob("*.py"))
LONGEST = 320
SCRIPTS = (
    "train",
    "evaluate",
    "infer",
    "audit",
    "V_Graph",
    "scenes",
    "clip",
    "clip_gcn_image_feature_integration",
)
OTHERS = tuple(sorted(set(LEVEL) - set(SCRIPTS)))


def imported(tree):
    """Names of the modules that a syntax tree imports, inside of functions too."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports need a package"
            names.append(node.module)
    return {name.split(".")[0] for name in names}


def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def test_the_table_names_every_script():
    assert {path.stem for path in SOURCES} == set(LEVEL)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_scripts_import_from_lower_levels_only(path):
    found = imported(parsed(path)) & set(LEVEL)
    allowed = {name for name in LEVEL if LEVEL[name] < LEVEL[path.stem]}
    allowed |= {name for importer, name in EXCEPTIONS if importer == path.stem}
    assert not found - allowed


@pytest.mark.parametrize("name", LEVEL)
def test_a_script_stands_as_low_as_its_imports_allow(name):
    found = imported(parsed(ROOT / f"{name}.py")) & set(LEVEL)
    found = {LEVEL[other] for other in found if (name, other) not in EXCEPTIONS}
    assert LEVEL[name] == max(found, default=-1) + 1


def test_functions_of_the_graph_need_no_images():
    """The exception holds for the command alone."""
    tree = parsed(ROOT / "V_Graph.py")
    users = [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and "images" in imported(node)
    ]
    outside = [node for node in tree.body if not isinstance(node, ast.FunctionDef)]
    assert users == ["main"]
    assert all("images" not in imported(node) for node in outside)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_a_file_can_be_read_in_one_sitting(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_devices_are_never_assumed(path):
    assert ".cuda(" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_every_script_begins_with_a_docstring(path):
    assert ast.get_docstring(parsed(path))


def test_the_scripts_are_no_package():
    assert not (ROOT / "__init__.py").exists()
    assert not (ROOT / "test" / "__init__.py").exists()


def test_every_definition_is_read_and_builds_a_model():
    names = definition_names()
    assert names == sorted(path.stem for path in (ROOT / "models").glob("*.json")) and names
    for name in names:
        definition = read_definition(name)
        assert definition["name"] == name
        with torch.device("meta"):  # shapes only, no memory
            network = CLIP(definition)
        assert network.text_projection.shape[1] == definition["embed_dim"]
        assert len(network.positional_embedding) == definition["text"]["context_length"]


def test_an_unknown_definition_is_an_error_that_lists_those_there_are():
    with pytest.raises(ValueError, match="'huge'.*small"):
        read_definition("huge")


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


def test_the_scripts_are_those_that_run():
    ends = 'if __name__ == "__main__":'
    assert {p.stem for p in SOURCES if ends in p.read_text(encoding="utf-8")} == set(SCRIPTS)


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
    [train, evaluate, infer, audit, V_Graph, scenes, clip, clip_gcn_image_feature_integration],
    ids=SCRIPTS,
)
def test_an_unknown_option_is_refused(command, capsys):
    with pytest.raises(SystemExit) as end:
        command.main(["--no-such-option"])
    assert end.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_training_has_few_options_and_each_has_help(capsys):
    options = train.parse([])[0]
    assert len(options) <= 41
    with pytest.raises(SystemExit):
        train.parse(["--help"])
    text = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')}" in text for name in options)
