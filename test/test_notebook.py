"""V-Graph.ipynb runs as it stands and shows what it stores.

After a change that alters its outputs, from the root: `jupyter execute --inplace V-Graph.ipynb`.
"""

import base64
import io
import os
import shutil

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

from conftest import ROOT

NOTEBOOK = ROOT / "V-Graph.ipynb"
NEEDED = ("*.py", "*/*.py", "det_json/*", "models/*.json", "test/*.png")


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(cell):
    """What a cell printed, and its outputs as text; warnings are another matter."""
    printed = [o.text for o in cell.outputs if o.output_type == "stream" and o.name == "stdout"]
    shown = [o.data["text/plain"] for o in cell.outputs if "data" in o]
    return "".join(printed), shown


def check_pictures(notebook):
    """Assert that every code cell shows one small picture that is not blank."""
    for cell in code_cells(notebook):
        (picture,) = [o.data["image/png"] for o in cell.outputs if "image/png" in o.get("data", {})]
        decoded = Image.open(io.BytesIO(base64.b64decode(picture)))
        assert max(decoded.size) <= 640
        assert len(decoded.convert("RGB").getcolors(2**24)) > 1


@pytest.fixture(scope="module")
def stored():
    """The notebook as the file has it."""
    return nbformat.read(NOTEBOOK, 4)


def test_the_stored_notebook_is_valid_small_and_ran_from_top_to_bottom(stored):
    nbformat.validate(stored)
    assert (stored.nbformat, stored.metadata.kernelspec.name) == (4, "python3")
    assert len({cell.id for cell in stored.cells}) == len(stored.cells) <= 8
    assert NOTEBOOK.stat().st_size < 200_000
    cells = code_cells(stored)
    assert [cell.execution_count for cell in cells] == [i + 1 for i in range(len(cells))]
    outputs = [output for cell in cells for output in cell.outputs]
    assert {o.output_type for o in outputs} <= {"stream", "display_data", "execute_result"}
    assert not [o for o in outputs if o.output_type == "stream" and o.name == "stderr"]
    check_pictures(stored)


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_running_it_shows_what_is_stored_and_writes_no_file(stored, tmp_path):
    root = tmp_path / "root"  # a copy, since others may write into the tree meanwhile
    for path in (path for pattern in NEEDED for path in ROOT.glob(pattern)):
        (root / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, root / path.relative_to(ROOT))
    before = files(root)
    environment = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    environment["IPYTHONDIR"] = str(tmp_path / "ipython")
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    notebook = nbformat.read(NOTEBOOK, 4)
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    place = {"metadata": {"path": str(root)}}
    client = NotebookClient(notebook, timeout=120, kernel_name="python3", resources=place)
    run = client.execute(env=environment)
    assert files(root) == before
    check_pictures(run)
    printed = [texts(cell) for cell in code_cells(run)]
    assert printed == [texts(cell) for cell in code_cells(stored)]
