"""Queries: the order of tiles against naive loops, evidence, filters, and why a tile is found."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("lancedb", reason="pip install -r requirements-search.txt")

import search
from clip_gcn_image_feature_integration import encode_files, encode_texts
from conftest import box
from det_formats.det_json import LABELS, read_label_map
from det_formats.measures import find
from evidence import Evidence, as_field, shipped_tables
from galleries import index, write_tiles
from gallery import ranking
from gallery.answers import OTHERS
from gallery.objects import Objects, bins_of
from gallery.ranking import WITHOUT, Query, best
from gallery.searching import Filter, Search
from metrics.likelihood import scores
from test_evidence import LABELS as KINDS
from test_evidence import SIZE, random_world

SENTENCE = "two ships beside an airplane"


@pytest.fixture
def opened(tmp_path, save_tiny):
    """Builds an index of twelve tiles and opens it: opened("--graph", "none")."""
    field = as_field(Evidence(shipped_tables(len(read_label_map(LABELS))), weight=0.25))

    def build(*arguments, **settings):
        checkpoint = save_tiny("tiny.pth", *arguments, evidence=field)
        path = index(write_tiles(tmp_path), checkpoint)
        return Search(path, torch.device("cpu"), **settings)

    return build


# ------------------------------------------------------------------ the best rows


@pytest.mark.parametrize("block", [7, 1000])
def test_the_best_rows_are_those_of_a_sort(block, monkeypatch):
    monkeypatch.setattr(ranking, "BLOCK", block)
    random = torch.Generator().manual_seed(0)
    vectors = torch.randn(50, 8, generator=random)
    queries = torch.randn(3, 8, generator=random)
    added = torch.randn(3, 50, generator=random)
    values, rows = best(vectors, queries, added, top_k=9)
    for q in range(3):
        all_scores = [float(queries[q] @ v + a) for v, a in zip(vectors, added[q], strict=True)]
        expected = sorted(range(50), key=lambda row: -all_scores[row])[:9]
        assert rows[q].tolist() == expected
        assert values[q].tolist() == pytest.approx([all_scores[row] for row in expected], abs=1e-5)


def test_equal_scores_stand_in_the_order_of_the_rows():
    vectors = torch.ones(6, 2)
    _, rows = best(vectors, torch.ones(1, 2), None, top_k=6)
    assert rows.tolist() == [[0, 1, 2, 3, 4, 5]]


def test_more_than_there_is_gives_all_and_nothing_gives_nothing():
    assert best(torch.ones(2, 3), torch.ones(1, 3), None, top_k=9)[1].shape == (1, 2)
    assert best(torch.ones(0, 3), torch.ones(1, 3), None, top_k=9)[1].shape == (1, 0)


# ------------------------------------------------------------------ evidence


@pytest.mark.parametrize("seed", range(3))
def test_evidence_of_all_rows_is_that_of_single_images(seed):
    _, stated = random_world(seed)
    rng = np.random.default_rng(seed)
    class_ids, boxes, found = [], [], []
    for _ in range(30):
        number = rng.integers(9)
        class_ids.append(rng.integers(KINDS, size=number))
        own = [box(*rng.uniform(5, 95, 2)) for _ in range(number)]
        boxes.append(np.reshape(own, (-1, 6)))
        found.append(find(class_ids[-1], boxes[-1], SIZE, KINDS))
    detected = rng.random(30) < 0.8
    counts = np.stack([np.bincount(ids, minlength=KINDS) for ids in class_ids])
    objects = Objects(class_ids, boxes, np.array([SIZE] * 30), bins_of(counts), detected)
    own_tables = shipped_tables(KINDS)
    expected = scores(
        own_tables, [f if d else None for f, d in zip(found, detected, strict=True)], stated
    )
    for t, statements in enumerate(stated):
        np.testing.assert_array_equal(objects.evidence(own_tables, statements), expected[:, t])


# ------------------------------------------------------------------ queries


def test_the_score_is_the_cosine_and_the_weighted_evidence(opened):
    own = opened()
    [answer] = own.answers([Query(text=SENTENCE)], top_k=12)
    [text] = encode_texts(own.engine.model, [SENTENCE], "cpu")
    [sentence] = own.engine.sentences([SENTENCE])
    found = own.rows.objects.evidence(own.engine.evidence.tables, sentence.statements)
    expected = own.rows.vectors @ text + 0.25 * torch.from_numpy(found)
    ids = own.rows.arrow["id"].to_pylist()
    by_id = {hit["id"]: hit["score"] for hit in answer["hits"]}
    assert by_id == pytest.approx(dict(zip(ids, expected.tolist(), strict=True)), abs=1e-6)
    ranks = [hit["score"] for hit in answer["hits"]]
    assert ranks == sorted(ranks, reverse=True)
    assert answer["searched"] == 12 and answer["exact"]


def test_evidence_can_be_weighted_anew_or_left_out(opened):
    own = opened(evidence=0.5)
    assert own.engine.evidence.weight == 0.5
    assert opened(evidence="off").engine.evidence is None


def test_parts_of_a_query_are_added_by_their_weights(opened):
    own = opened(evidence="off")
    like, other = own.rows.vectors[3].numpy(), 2 * own.rows.vectors[5].numpy()
    [text, unwanted] = encode_texts(own.engine.model, ["ships", "roads"], "cpu")
    query = Query(text="ships", image_vector=like, vector=other, weights=(2, 1, 1), without="roads")
    vectors = own.rows.vectors
    expected = 0.5 * text + 0.25 * vectors[3] + 0.25 * vectors[5] - WITHOUT * unwanted
    torch.testing.assert_close(own.engine.vector(query), expected, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="--weights: expected 1 numbers"):
        own.engine.vector(Query(text="ships", weights=(1, 2)))
    with pytest.raises(ValueError, match="needs a sentence, an image or a vector"):
        own.engine.vector(Query())


def test_a_tile_itself_is_the_most_like_it(opened):
    own = opened()
    [answer] = own.answers([Query(vector=own.vector_of("t05.png"))], top_k=1)
    assert answer["hits"][0]["id"] == "t05.png"
    assert answer["hits"][0]["score"] == pytest.approx(1, abs=1e-6)
    with pytest.raises(ValueError, match=r"no tile \.\./t05.png in the index"):
        own.vector_of("../t05.png")


def test_an_image_is_encoded_as_those_of_the_index(opened, tmp_path):
    own = opened()
    path = tmp_path / "imgs" / "t05.png"
    found = own.encode_image(path, tmp_path / "dets" / "t05.json")
    np.testing.assert_allclose(found, own.vector_of("t05.png"), atol=1e-6)


@pytest.mark.parametrize(
    "condition", ["ship >= 1", "ship = 0 and airplane > 0", "path like 'north/%'", "ship > 99"]
)
def test_filters_look_at_the_rows_that_fulfil_them(opened, condition):
    own = opened()
    [answer] = own.answers([Query(text="ships")], Filter(where=condition), top_k=12)
    test = {
        "ship >= 1": lambda hit: hit["counts"].get("ship", 0) >= 1,
        "ship = 0 and airplane > 0": lambda hit: set(hit["counts"]) == {"airplane"},
        "path like 'north/%'": lambda hit: hit["path"].startswith("north/"),
        "ship > 99": lambda hit: False,
    }[condition]
    [everything] = own.answers([Query(text="ships")], top_k=12)
    expected = [hit["id"] for hit in everything["hits"] if test(hit)]
    assert [hit["id"] for hit in answer["hits"]] == expected
    assert answer["searched"] == len(expected)


def test_words_of_no_label_are_named(opened):
    own = opened()
    [answer] = own.answers([Query(text="two ships beside a pagoda")], top_k=1)
    assert answer["pixels_only"] == ["pagoda"]


# ------------------------------------------------------------------ why


@pytest.mark.parametrize("graph", ["object", "none", "counts"])
def test_pixels_and_objects_sum_to_the_score_and_leaving_out_is_what_it_says(
    opened, graph, tmp_path
):
    """Against the model itself, asked with a detection file from which an object is missing."""
    own = opened("--graph", graph)
    query = Query(text=SENTENCE)
    [answer] = own.answers([query], top_k=12)
    [hit] = [hit for hit in answer["hits"] if hit["id"] == "t02.png"]  # with two tanks
    assert hit["pixels"] + hit["objects"] == pytest.approx(hit["score"])
    image = tmp_path / "imgs" / "t02.png"
    detections = json.loads((tmp_path / "dets" / "t02.json").read_text(encoding="utf-8"))
    assert len(hit["boxes"]) == len(detections) == 2

    def score(kept, evidence=True):
        file = tmp_path / "less.json"
        file.write_text(json.dumps(kept), encoding="utf-8")
        model, checkpoint = own.engine.model, own.engine.checkpoint
        encoded = encode_files(model, checkpoint, [image], [file], "cpu")
        cosine = float(encoded.features[0] @ own.engine.vector(query))
        if not evidence:
            return cosine
        [sentence] = own.engine.sentences([SENTENCE])
        ids, boxes = encoded.images.boxes[0]
        found = find(ids, boxes, (48, 40), len(own.engine.kinds))
        added = scores(own.engine.evidence.tables, [found], [sentence.statements])
        return cosine + 0.25 * float(added[0, 0])

    assert hit["score"] == pytest.approx(score(detections), abs=1e-5)
    assert hit["pixels"] == pytest.approx(score([], evidence=False), abs=1e-5)
    for one in hit["boxes"]:
        kept = [d for d in detections if d["bbox"][:2] != pytest.approx(one["box"][:2], abs=1e-4)]
        assert len(kept) == 1
        assert one["matters"] == pytest.approx(score(detections) - score(kept), abs=1e-5)


def test_statements_sum_to_the_evidence(opened):
    own = opened()
    [answer] = own.answers([Query(text=SENTENCE)], top_k=12)
    [sentence] = own.engine.sentences([SENTENCE])
    found = own.rows.objects.evidence(own.engine.evidence.tables, sentence.statements)
    ids = own.rows.arrow["id"].to_pylist()
    for hit in answer["hits"]:
        total = sum(line["evidence"] for line in hit["statements"])
        assert total == pytest.approx(0.25 * found[ids.index(hit["id"])], abs=1e-6)
        assert bool(hit["statements"]) == hit["detected"]


def test_a_query_fits_nothing_if_nearly_all_others_have_a_better_best_hit(opened):
    own = opened()
    queries = [Query(text=text) for text in (SENTENCE, *OTHERS)]
    answers = own.answers(queries, top_k=1)
    tops = [answer["hits"][0]["score"] for answer in answers]
    for answer, top in zip(answers, tops, strict=True):
        assert answer["fit"] == pytest.approx(np.mean([other < top for other in tops[1:]]))
        assert answer["fits"] == (answer["fit"] >= 0.15)
    [answer] = own.answers([Query(vector=own.vector_of("t05.png"))])
    assert answer["fit"] is None and answer["fits"]
    [answer] = own.answers([queries[0]], Filter(where="ship = 0"))
    assert answer["fit"] is None and answer["fits"]


def test_an_image_that_is_gone_is_explained_as_far_as_is_known(opened, tmp_path):
    own = opened()
    query, chosen = Query(text=SENTENCE), Filter(where="path = 't02.png'")
    [before] = own.answers([query], chosen)[0]["hits"]
    (tmp_path / "imgs").rename(tmp_path / "moved")
    [hit] = own.answers([query], chosen)[0]["hits"]
    assert "only the evidence of its objects is known: " in hit["note"]
    assert "t02.png: no such image" in hit["note"]
    assert hit["score"] == before["score"]
    evidence = sum(line["evidence"] for line in hit["statements"])
    assert hit["objects"] == pytest.approx(evidence, abs=1e-6)
    with pytest.raises(ValueError, match="--images nowhere: no such folder"):
        Search(tmp_path / "index", torch.device("cpu"), images="nowhere")
    moved = Search(tmp_path / "index", torch.device("cpu"), images=tmp_path / "moved")
    [hit] = moved.answers([query], chosen)[0]["hits"]
    assert hit["note"] is None and hit["pixels"] == pytest.approx(before["pixels"], abs=1e-6)


def test_each_command_runs(opened, tmp_path, capsys):
    opened("--graph", "none")
    path = str(tmp_path / "index")
    out = tmp_path / "out"
    out.mkdir()
    search.main(["query", path, "two ships", "--csv", str(out / "hits.csv"), "--top-k", "3"])
    assert "12 tiles searched exactly" in capsys.readouterr().out
    search.main(["duplicates", path, "--threshold", "0.9999"])
    with pytest.raises(ValueError, match="--against: the same index"):
        search.main(["duplicates", path, "--against", path])
    (tmp_path / "classes.txt").write_text("north\nimgs\nsouth\n", encoding="utf-8")
    search.main(["classify", path, str(tmp_path / "classes.txt"), "--csv", str(out / "c.csv")])
    assert len((out / "c.csv").read_text(encoding="utf-8").splitlines()) == 13
    search.main(["export", path, "--geoparquet", str(out / "tiles.parquet")])
    assert "12 tiles, 12 without a footprint" in capsys.readouterr().out
