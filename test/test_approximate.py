"""Search by an index of vectors: what it finds of the exact answer, filters, when it is made."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("lancedb", reason="pip install -r requirements-search.txt")

from conftest import box
from galleries import index, write_tiles
from gallery import approximate, table
from gallery.ranking import CANDIDATES, Query
from gallery.searching import Filter, Search

ROWS, WIDTH = 25_000, 32


def clustered(seed, number):
    """Vectors (number, D) around 50 centres that all lie to one side."""
    centres = torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(0)) + 1
    random = torch.Generator().manual_seed(seed)
    own = centres[torch.randint(50, (number,), generator=random)]
    return F.normalize(own + 0.5 * torch.randn(number, WIDTH, generator=random), dim=1)


def tiles_of(vectors, ships):
    """Rows of the table in place of files: row i has the path i.png and ships[i] ships."""
    for i, (vector, number) in enumerate(zip(vectors.numpy(), ships.tolist(), strict=True)):
        boxes = np.array([box(9, 9)] * number, dtype=np.float32).reshape(-1, 6)
        tile = table.Tile((0, 0, 48, 40), vector, np.zeros(number, dtype=int), boxes, None)
        yield f"{i}.png", table.Stamp(1, 1, "1 1"), [tile]


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """The path of an index of ROWS rows, every tenth with a ship, and their vectors (R, D)."""
    folder = tmp_path_factory.mktemp("large")
    settings = table.Settings(
        images="imgs", checkpoint="none", digest="0", labels=["ship"], width=WIDTH,
        precision="fp32", tile=None, overlap=None, bands=None, stretch=None,
    )  # fmt: skip
    vectors = clustered(1, ROWS)
    ships = torch.arange(ROWS) % 10 == 0
    table.put(
        table.create(folder, settings),
        table.rows_of(tiles_of(vectors, ships.int()), settings),
        [],
    )
    return folder, vectors


class Sentences:
    """An Engine that only gives sentences vectors: such as lie in the clusters."""

    def sentences(self, texts):
        return [type("", (), {"vector": vector}) for vector in clustered(2, len(texts))]


@pytest.fixture(scope="module")
def found(large):
    """The index of vectors is made; (table, Parameters, vectors)."""
    folder, vectors = large
    own_table, _ = table.open_index(folder)
    return own_table, approximate.ensure(folder, own_table, Sentences()), vectors


def test_nearly_all_of_the_nearest_are_found(found):
    own_table, parameters, vectors = found
    queries = clustered(3, 40)
    exact = [[f"{row}.png" for row in (vectors @ q).topk(10).indices.tolist()] for q in queries]
    assert approximate.exact_ids(own_table, queries, 10) == exact
    share = approximate.recall(own_table, queries, exact, parameters.probes, parameters.refine)
    assert share >= 0.9
    assert parameters.partitions == ROWS // approximate.PARTITION_ROWS == 6
    assert list(parameters.recalls) == ["sentences", "midpoints of two tiles"]
    assert min(parameters.recalls.values()) >= approximate.TARGET


def test_what_was_chosen_is_kept_beside_the_table(found, large, capsys):
    own_table, parameters, _ = found
    folder, _ = large
    content = json.loads((folder / "approximate.json").read_text(encoding="utf-8"))
    assert content == parameters._asdict()
    version = own_table.version
    again, _ = table.open_index(folder)
    assert approximate.ensure(folder, again, Sentences()) == parameters
    assert again.version == version
    assert capsys.readouterr().out == ""


def test_other_partitions_are_measured_anew(found, large, capsys):
    own_table, parameters, _ = found
    folder, _ = large
    file = folder / "approximate.json"
    file.write_text(json.dumps({**parameters._asdict(), "partitions": 5}), encoding="utf-8")
    assert approximate.ensure(folder, own_table, Sentences()) == parameters
    assert capsys.readouterr().out.startswith("recall@10 against exact search: ")
    file.write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="approximate.json: cannot be read; delete it, it is"):
        approximate.ensure(folder, own_table, Sentences())
    file.write_text(json.dumps(parameters._asdict()), encoding="utf-8")


def test_a_filter_is_fulfilled_by_all_that_is_found_and_leaves_enough(found):
    own_table, _, vectors = found
    query = vectors[5]
    near = table.nearest(own_table, query.numpy(), 10, "ship >= 1", ["id"], probes=1, refine=50)
    rows = torch.arange(0, ROWS, 10)
    best = rows[(vectors[rows] @ query).topk(10).indices]
    ids = near["id"].to_pylist()
    assert all(int(name.removesuffix(".png")) % 10 == 0 for name in ids)
    assert ids[0] == f"{best[0]}.png" and len(ids) == 10
    condition = "path in ('1.png', '2.png', '3.png')"  # of several partitions
    few = table.nearest(own_table, query.numpy(), 10, condition, ["id"], probes=1, refine=50)
    assert sorted(few["id"].to_pylist()) == ["1.png", "2.png", "3.png"]


# ------------------------------------------------------------------ answers


@pytest.fixture
def opened(tmp_path, save_tiny):
    """An index of twelve tiles, opened: opened(evidence="off")."""
    path = index(write_tiles(tmp_path), save_tiny("tiny.pth"))
    return lambda **settings: Search(path, torch.device("cpu"), **settings)


def test_few_rows_are_searched_exactly(opened, capsys):
    own = opened()
    [answer] = own.answers([Query(text="ships")], top_k=3, approximate=True)
    assert answer["exact"]
    assert "12 tiles are few: all are searched, exactly" in capsys.readouterr().out
    assert table.partitions(own.table) is None


@pytest.mark.parametrize("evidence", ["off", 0.25])
def test_an_approximate_answer_says_so_and_is_the_exact_one_where_all_are_near(
    opened, evidence, monkeypatch
):
    """Of twelve tiles the neighbours compared exactly are all."""
    monkeypatch.setattr(approximate, "LEAST_ROWS", 1)
    assert CANDIDATES > 12
    own = opened(evidence=evidence)
    condition = Filter(where="ship >= 1")
    for chosen in (None, condition):
        [exact] = own.answers([Query(text="two ships")], chosen, top_k=3)
        [answer] = own.answers([Query(text="two ships")], chosen, top_k=3, approximate=True)
        assert not answer["exact"] and exact["exact"]
        assert answer["searched"] == exact["searched"]
        assert [hit["id"] for hit in answer["hits"]] == [hit["id"] for hit in exact["hits"]]
        scores = [hit["score"] for hit in exact["hits"]]
        assert [hit["score"] for hit in answer["hits"]] == pytest.approx(scores, abs=1e-6)
