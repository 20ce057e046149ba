"""What the READMEs say of the code: the map of rooms, names of options, links."""

import re
import shlex

import pytest

import detections
import search
from conftest import ROOT
from options import CHANGED_NOTHING, FIXED, OPTIONS, for_training, given_options, parse_options

READMES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *ROOT.glob("[!.]*/README.md")])
TORCHRUN = {"--nnodes", "--nproc_per_node", "--rdzv_backend", "--rdzv_endpoint"}
FLAGS = {row.flag for row in OPTIONS} | {"--help", "--inplace", "--only"} | TORCHRUN
GONE = {f"--{name.replace('_', '-')}" for name in (*CHANGED_NOTHING, *FIXED)}
GONE |= {"--clean", "--template", "--graph-control", "--image-encoder-ratio", "--patience"}
MOST_LINES = 250


def test_the_map_names_every_module_and_folder():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = "\n".join(line for line in text.splitlines() if line.startswith("|"))
    named = set(re.findall(r"`([\w./-]+)`", rows))
    rooms = [path.parent.name for path in ROOT.glob("*/__init__.py")]
    modules = {path.name for path in ROOT.glob("*.py")}
    for room in rooms:
        modules |= {p.stem for p in (ROOT / room).glob("*.py") if p.stem != "__init__"}
    folders = {f"{room}/" for room in [*rooms, "det_json", "models", "results", "test"]}
    assert not modules - named, "not on the map"
    assert not folders - named, "not on the map"
    files = {name for name in named if name.endswith(".py") and "/" not in name}
    assert files <= {path.name for path in ROOT.glob("*.py")}, "on the map alone"


def test_the_readme_is_read_in_one_sitting():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= MOST_LINES


@pytest.mark.parametrize("path", READMES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_options_in_a_readme_exist(path):
    text = path.read_text(encoding="utf-8")
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z_-]*[a-z]", text))
    allowed = FLAGS | (GONE if path.name == "CHANGELOG.md" else set())  # what is called otherwise
    assert named <= allowed


COMMANDS = {
    "train.py": "train",
    "evaluate.py": "evaluate",
    "infer.py": "infer",
    "audit.py": "audit",
    "evidence.py": "evidence",
    "ablate.py": "ablate",
    "bench.py": "bench",
    "V_Graph.py": "V_Graph",
    "T_Graph.py": "T_Graph",
    "clip_gcn_image_feature_integration.py": "clip_gcn",
}


def commands_in(path):
    """(script, words) of the command lines in a README, without what its shell adds."""
    text = path.read_text(encoding="utf-8").replace("\\\n", "")
    start = r"(?:OMP_NUM_THREADS=1 )?(?:python|torchrun(?: +--\S+)+)"
    for line in re.findall(rf"^{start} +(.+)$", text, flags=re.MULTILINE):
        script, *words = shlex.split(line, comments=True)
        if script in COMMANDS and words != ["--help"]:
            yield COMMANDS[script], words


def words_behind(script, path):
    """Words behind `python SCRIPT.py` in a README, but for lines with placeholders."""
    text = path.read_text(encoding="utf-8").replace("\\\n", "")
    for line in re.findall(rf"^python {script}.py (.+)$", text, flags=re.MULTILINE):
        if "FORMAT" not in line:
            yield shlex.split(line, comments=True)


@pytest.mark.parametrize("path", READMES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_commands_in_a_readme_are_accepted(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # folders of outputs are made
    for words in words_behind("detections", path):
        detections.parse(words)
    for words in words_behind("search", path):
        search.parse(words)
    for script, words in commands_in(path):
        parsed = parse_options(script, "", words)
        if script == "train" and not parsed.resume:
            for_training(vars(parsed), given_options("train", "", words))


@pytest.mark.parametrize("path", READMES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_nothing_is_left_to_be_filled_in(path):
    text = path.read_text(encoding="utf-8")
    assert not re.findall(r"^\{\w+\}$", text, flags=re.MULTILINE)


@pytest.mark.parametrize("path", READMES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_links_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text):
        assert (path.parent / target).exists(), target
