"""The shape of the source tree: who imports whom, and how large a file may be."""

import ast
from pathlib import Path

import pytest
import torch

from model import definition_names, read_definition
from towers import CLIP

ROOT = Path(__file__).parent.parent
LEVELS = (  # a script imports only from levels above its own in this list
    ("V_Graph", "simple_tokenizer", "loss", "towers", "images", "augment", "shapes"),
    ("model", "annotations", "scenes"),
    ("clip",),
    ("dataloader",),
    ("clip_gcn_image_feature_integration",),
    ("evaluate",),
    ("train", "infer"),
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
EXCEPTIONS = {("V_Graph", "images")}  # its command draws, its functions do not
SOURCES = sorted(ROOT.glob("*.py"))
LONGEST = 320


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
