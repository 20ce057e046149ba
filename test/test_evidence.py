"""Object evidence: tables by hand, scores by a naive loop, what it is fitted on, its reasons."""

import json
import math

import networkx as nx
import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import evidence
import infer
from clip_gcn_image_feature_integration import load_model
from conftest import box
from dataset.statements import (
    ARRANGEMENTS,
    COUNTS,
    PLACES,
    UNMENTIONED,
    Statements,
    count_statement,
    statements_of,
)
from det_formats.det_json import LABELS as LABELS_FILE
from det_formats.measures import COUNT_BINS, RELATIONS, find
from evidence import Evidence
from metrics.likelihood import LARGEST, OWN, TABLE_STEP, fit, reasons, scores
from model import load_checkpoint

SIZE = (100, 100)
LABELS = 3


def graph(*nodes, edges=()):
    """A sentence's graph: nodes as (kinds, count, form) or with place and attributes behind."""
    result = nx.DiGraph(sentence="", unknown=())
    for i, (kinds, count, form, *more) in enumerate(nodes):
        place, attributes = more or (None, ())
        corner = None
        if place and place.endswith(" corner"):
            place, corner = "corner", place.removesuffix(" corner")
        said = {"place": place, "corner": corner, "attributes": attributes}
        result.add_node(i, kinds=kinds, count=count, count_form=form, **said)
    for i, relation, j in edges:
        result.add_edge(i, j, relation=relation)
    return result


def seen(*objects):
    """What is Found of (kind, x, y) in an image of SIZE."""
    class_ids = np.array([kind for kind, _, _ in objects], dtype=int)
    boxes = np.array([box(x, y) for _, x, y in objects]).reshape(-1, 6)
    return find(class_ids, boxes, SIZE, LABELS)


def random_world(seed, images=30, sentences=40):
    """Found of random images, and Statements of random sentences."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(images):
        objects = [
            (int(rng.integers(LABELS)), *rng.uniform(5, 95, 2)) for _ in range(rng.integers(9))
        ]
        found.append(seen(*objects) if rng.random() < 0.8 else None)
    stated = []
    for _ in range(sentences):
        nodes = []
        for _ in range(rng.integers(4)):
            kinds = tuple(sorted(rng.permutation(LABELS)[: rng.integers(1, 4)].tolist()))
            form = str(rng.choice(["exact", "at_least", "many", "unknown"]))
            count = int(rng.integers(1, 12)) if form in ("exact", "at_least") else None
            place = None if rng.random() < 0.5 else str(rng.choice(PLACES))
            nodes.append((kinds, count, form, place, tuple(rng.permutation(ARRANGEMENTS)[:1])))
        edges = []
        if len(nodes) > 1:
            edges.append((0, str(rng.choice(RELATIONS)), 1))
        stated.append(statements_of(graph(*nodes, edges=edges)))
    return found, stated


def random_tables(seed):
    """Tables as `fit` gives them, of multiples of TABLE_STEP."""
    found, stated = random_world(seed)
    return fit(found, [stated[i : i + 2] for i in range(len(found))], LABELS)


def naive(tables, one, sentence):
    """The evidence of one image for one sentence, statement by statement."""
    if one is None or not sentence.counts:
        return 0.0
    total = sum(tables.counts[kind, UNMENTIONED, one.counts[kind]] for kind in range(LABELS))
    for kind, statement, weight in sentence.counts:
        weight = round(64 * weight) / 64
        total -= weight * tables.counts[kind, UNMENTIONED, one.counts[kind]]
        total += weight * tables.counts[kind, statement, one.counts[kind]]
    for kind, place, weight in sentence.places:
        if kind in one.places:
            total += round(64 * weight) / 64 * tables.places[place, one.places[kind]]
    for kind, arrangement, weight in sentence.arrangements:
        if kind in one.shapes:
            total += round(64 * weight) / 64 * tables.arrangements[arrangement, one.shapes[kind]]
    for kind, other, relation, weight in sentence.relations:
        if (kind, other) in one.pairs:
            cell = one.pairs[kind, other][relation]
            total += round(64 * weight) / 64 * tables.relations[relation, cell]
    return float(total)


# ------------------------------------------------------------------ statements


@pytest.mark.parametrize(
    ("count", "form", "statement"),
    [
        (0, "exact", "0"), (1, "exact", "1"), (4, "exact", "4"), (5, "exact", "5-6"),
        (6, "exact", "5-6"), (9, "exact", "7-9"), (25, "exact", "10+"),
        (2, "at_least", "at least 2"), (7, "at_least", "at least 3"), (None, "many", "many"),
        (None, "unknown", "some"),
    ],
)  # fmt: skip
def test_counts_are_stated(count, form, statement):
    assert COUNTS[count_statement(count, form)] == statement


def test_a_sentence_is_read_as_statements():
    sentence = graph(
        ((0,), 2, "exact", "top left corner", ("white", "in a row")),
        ((1, 2), None, "many", None, ()),
        ((0,), 1, "exact"),
        edges=[(0, "left", 1), (2, "beside", 0)],
    )
    stated = statements_of(sentence)
    assert stated.counts == [
        (0, COUNTS.index("3"), 1.0),  # two and one
        (1, COUNTS.index("many"), 0.5),
        (2, COUNTS.index("many"), 0.5),
    ]
    assert stated.places == [(0, PLACES.index("top left corner"), 1.0)]
    assert stated.arrangements == [(0, ARRANGEMENTS.index("in a row"), 1.0)]
    left = RELATIONS.index("left")
    assert stated.relations == [(0, 1, left, 0.5), (0, 2, left, 0.5)]  # none within a kind


def test_counts_of_two_mentions_are_summed_as_far_as_they_are_known():
    for forms, statement in (
        ((((0,), 2, "at_least"), ((0,), 1, "exact")), "at least 3"),
        ((((0,), None, "many"), ((0,), 1, "exact")), "many"),
        ((((0,), None, "unknown"), ((0,), 1, "exact")), "some"),
    ):
        assert COUNTS[statements_of(graph(*forms)).counts[0][1]] == statement


# ------------------------------------------------------------------ tables


def test_tables_of_relations_by_hand():
    left = RELATIONS.index("left")
    one = seen((0, 10, 50), (1, 90, 50))  # 0 left of 1: the pairs (0, 1) and (1, 0)
    stated = Statements([], [], [], [(0, 1, left, 1.0)])
    tables = fit([one] * 10, [[stated]] * 10, LABELS)
    usual = (10 + 1 / 8) / 21  # ten of twenty pairs lie so, one in eight cells added
    expected = math.log((10 + OWN * usual) / (10 + OWN) / usual)
    cell = one.pairs[0, 1][left]
    assert tables.relations[left, cell] == pytest.approx(expected, abs=TABLE_STEP)
    other = one.pairs[1, 0][left]
    assert tables.relations[left, other] == pytest.approx(
        math.log(OWN / (10 + OWN)), abs=TABLE_STEP
    )
    beside = RELATIONS.index("beside")
    assert not tables.relations[beside].any()  # nobody said so


def test_a_kind_that_the_detector_misses_says_nothing_and_one_that_it_finds_much():
    two = Statements([(0, COUNTS.index("2"), 1.0), (1, COUNTS.index("2"), 1.0)], [], [], [])
    none = Statements([(2, COUNTS.index("1"), 1.0)], [], [], [])
    images = [seen((1, 20, 20), (1, 40, 20))] * 50 + [seen()] * 50
    tables = fit(images, [[two]] * 50 + [[none]] * 50, LABELS)
    statement = COUNTS.index("2")
    missed, found = tables.counts[0, statement], tables.counts[1, statement]
    assert abs(missed[0]) < 0.2
    assert found[2] > 0.4 and found[0] < -1
    assert tables.counts[1, UNMENTIONED, 0] > 0.4  # left out where there is none


def test_a_kind_without_mentions_takes_what_all_kinds_share():
    rng = np.random.default_rng(0)
    images, stated = [], []
    for _ in range(300):
        kind, count = int(rng.integers(2)), int(rng.integers(1, 4))
        images.append(seen(*[(kind, 20 * i, 50) for i in range(1, count + 1)]))
        stated.append([Statements([(kind, count_statement(count, "exact"), 1.0)], [], [], [])])
    for count in range(1, 4):  # a third kind is as often there, but nobody speaks of it
        images += [seen(*[(2, 20 * i, 50) for i in range(1, count + 1)])] * 50
        stated += [[]] * 50
    tables = fit(images, [own or [Statements([], [], [], [])] for own in stated], LABELS)
    for count in (1, 2, 3):
        row = tables.counts[2, count_statement(count, "exact")]
        assert row.argmax() == count and row[count] > 1


def test_each_image_counts_once_and_none_without_detections():
    found, stated = random_world(1)
    once = [[sentence] for sentence in stated[: len(found)]]
    twice = [own * 2 for own in once]
    for first, second in zip(fit(found, once, LABELS), fit(found, twice, LABELS), strict=True):
        np.testing.assert_allclose(first, second, atol=TABLE_STEP)
    kept = [i for i, one in enumerate(found) if one is not None]
    fewer = fit([found[i] for i in kept], [once[i] for i in kept], LABELS)
    for first, second in zip(fit(found, once, LABELS), fewer, strict=True):
        assert np.array_equal(first, second)


# ------------------------------------------------------------------ scores


@pytest.mark.parametrize("seed", range(3))
def test_scores_equal_a_naive_loop(seed):
    tables = random_tables(seed)
    found, stated = random_world(seed + 10)
    expected = [[naive(tables, one, sentence) for sentence in stated] for one in found]
    assert np.array_equal(scores(tables, found, stated), np.array(expected, dtype=np.float32))


def test_scores_do_not_depend_on_order_or_company_to_the_bit():
    tables = random_tables(0)
    found, stated = random_world(11)
    whole = scores(tables, found, stated)
    rng = np.random.default_rng(0)
    rows, columns = rng.permutation(len(found))[:7], rng.permutation(len(stated))[:9]
    part = scores(tables, [found[i] for i in rows], [stated[t] for t in columns])
    assert np.array_equal(part, whole[np.ix_(rows, columns)])


def test_tables_hold_steps_within_bounds():
    for table in random_tables(2):
        assert np.array_equal(table, np.round(table / TABLE_STEP) * TABLE_STEP)
        assert np.abs(table).max() <= LARGEST and table.dtype == np.float32


def test_without_known_kinds_or_detections_there_is_no_evidence():
    tables = random_tables(0)
    found, stated = random_world(12)
    found[0] = None
    nothing = statements_of(graph())
    result = scores(tables, found, [nothing, *stated])
    assert not result[0].any() and not result[:, 0].any()
    assert scores(tables, [seen()], stated).any()  # an empty file is evidence


def test_a_contradiction_counts_both_ways():
    tables = random_tables(0)
    both = statements_of(graph(((0,), 0, "exact"), ((0,), 3, "exact")))
    assert COUNTS[both.counts[0][1]] == "3" and len(both.counts) == 1
    one = seen((0, 5, 5))
    assert scores(tables, [one], [both])[0, 0] == pytest.approx(naive(tables, one, both))


def test_reasons_add_up_to_the_score():
    tables = random_tables(1)
    found, stated = random_world(13)
    whole = scores(tables, found, stated)
    for i, one in enumerate(found):
        for t, sentence in enumerate(stated):
            if one is not None:
                listed = reasons(tables, one, sentence, ["plane", "ship", "other"])
                assert sum(reason.evidence for reason in listed) == pytest.approx(whole[i, t])
                assert [abs(r.evidence) for r in listed] == sorted(
                    (abs(r.evidence) for r in listed), reverse=True
                )


# ------------------------------------------------------------------ beside a model


def checkpoint_with(weight=0.25):
    tables = random_tables(0)
    return {
        "labels": ["plane", "ship"],
        "evidence": evidence.as_field(Evidence(tables, weight)),
    }


def test_a_checkpoint_gives_back_what_was_put_in():
    found = evidence.of_checkpoint(checkpoint_with())
    assert found.weight == 0.25
    for table, own in zip(found.tables, random_tables(0), strict=True):
        assert np.array_equal(table, own)
    assert evidence.of_checkpoint(checkpoint_with(), "off") is None
    assert evidence.of_checkpoint(checkpoint_with(), 0.5).weight == 0.5
    assert evidence.of_checkpoint({"labels": ["plane"]}) is None


@pytest.mark.parametrize("choice", ["on", "-1", "nan", "inf", ""])
def test_a_weight_is_a_number_of_zero_or_more(choice, capsys):
    with pytest.raises(SystemExit):
        infer.main([f"--evidence={choice}"])
    assert "expected auto, off or a weight of 0 or more" in capsys.readouterr().err


def test_without_tables_a_weight_takes_the_shipped_ones_and_auto_takes_none():
    assert evidence.of_checkpoint({"labels": ["plane"]}) is None
    found = evidence.of_checkpoint({"labels": ["plane", "ship"]}, 0.1)
    assert found.weight == 0.1 and len(found.tables.counts) == LABELS
    two = statements_of(graph(((0,), 2, "exact")))
    plane, other = (0, 20, 20), (0, 60, 20)
    images = [seen(), seen(plane), seen(plane, other), seen(*[plane] * 7)]
    [row] = scores(found.tables, images, [two]).T
    assert row.argmax() == 2 and row[2] > 1
    several = statements_of(graph(((0,), 2, "at_least")))  # the scenes do not say so
    [row] = scores(found.tables, images, [several]).T
    assert row[2] > row[1] > row[0]


@pytest.mark.parametrize(
    "damage",
    [
        lambda field: field.update(weight="much"),
        lambda field: field.update(weight=-1.0),
        lambda field: field.update(tables=None),
        lambda field: field["tables"].pop("places"),
        lambda field: field["tables"].update(counts=torch.zeros(2, 2)),
        lambda field: field["tables"]["relations"].fill_(math.nan),
    ],
)
def test_damaged_tables_are_refused(damage):
    checkpoint = checkpoint_with()
    damage(checkpoint["evidence"])
    with pytest.raises(ValueError, match="evidence"):
        evidence.of_checkpoint(checkpoint)


@pytest.fixture
def arguments(mini):
    return ["--dataset", "mini", "--data-root", str(mini), "--device", "cpu"]


BRANCHES = pytest.mark.parametrize("branch", ["object", "none"])


@BRANCHES
def test_training_fits_evidence_and_evaluation_adds_it(run, branch, capsys):
    path = run("--graph", branch) / "best_model.pth"
    found = evidence.of_checkpoint(load_checkpoint(path)[1])
    assert found.weight in evidence.WEIGHTS and found.tables.counts.any()
    assert "object evidence: validation mR" in capsys.readouterr().out

    def measured(*choice):
        [result] = evaluate.main(["--checkpoint", str(path), "--device", "cpu", *choice])
        return result["mR"], result["evidence_weight"]

    assert measured()[1] == found.weight
    assert measured("--evidence", str(found.weight)) == measured()
    assert measured("--evidence", "off")[1] is None
    assert measured("--evidence", "0")[0] == measured("--evidence", "off")[0]
    assert measured("--evidence", "0.1")[0] > measured("--evidence", "off")[0] + 20  # mini is small


def test_the_command_fits_beside_any_clip(plain_clip, arguments, tmp_path, capsys):
    out, tables = tmp_path / "new.pth", tmp_path / "tables.json"
    start = ["--checkpoint", str(plain_clip), *arguments, "--out", str(out)]
    evidence.main([*start, "--json", str(tables)])
    (before, _), (after, saved) = (load_model(str(path), "cpu") for path in (plain_clip, out))
    for name, tensor in before.state_dict().items():
        assert torch.equal(tensor, after.state_dict()[name])
    found = evidence.of_checkpoint(saved)
    written = json.loads(tables.read_text())
    assert written["weight"] == found.weight
    assert written["counts"]["airplane"]["2"] == found.tables.counts[0, COUNTS.index("2")].tolist()
    assert set(written["relations"]) == set(RELATIONS)
    assert len(written["count_bins"]) == len(COUNT_BINS) + 1
    [result] = evaluate.main(["--checkpoint", str(out), "--device", "cpu"])
    assert result["evidence_weight"] == found.weight
    with pytest.raises(ValueError, match="is there already"):
        evidence.main(start)


def test_the_command_fits_beside_our_own_checkpoint_as_it_was_trained(run, tmp_path):
    form = ["--caption-form", "pir", "--max-objects", "1"]
    path = run(*form) / "best_model.pth"
    evidence.main(["--checkpoint", str(path), "--device", "cpu", "--out", str(tmp_path / "new")])
    before, after = (load_checkpoint(one)[1] for one in (path, tmp_path / "new"))
    assert after["options"] == before["options"] and after["epoch"] == before["epoch"]
    fields = [evidence.of_checkpoint(one) for one in (before, after)]
    assert fields[0].weight == fields[1].weight
    for table, own in zip(fields[0].tables, fields[1].tables, strict=True):
        assert np.array_equal(table, own)
    with pytest.raises(ValueError, match="has its own"):
        new = ["--checkpoint", str(path), "--out", str(tmp_path / "newer"), "--device", "cpu"]
        evidence.main([*new, "--labels", str(LABELS_FILE)])


def test_a_clip_is_told_to_name_its_data(plain_clip, tmp_path):
    with pytest.raises(ValueError, match="not trained here; name its data"):
        evidence.main(["--checkpoint", str(plain_clip), "--out", str(tmp_path / "new.pth")])


def test_without_detections_there_is_nothing_to_fit(plain_clip, arguments, tmp_path):
    (tmp_path / "none").mkdir()
    start = ["--checkpoint", str(plain_clip), *arguments, "--out", str(tmp_path / "new.pth")]
    with pytest.raises(ValueError, match="none of 24 images has a detection file"):
        evidence.main([*start, "--det-json", str(tmp_path / "none")])


@BRANCHES
def test_infer_adds_evidence_and_explains(run, branch, tmp_path, capsys):
    path = run("--graph", branch) / "best_model.pth"
    fixed = ["--checkpoint", str(path), "--device", "cpu"]
    cosines = infer.main([*fixed, "--evidence", "off"])
    with_evidence = infer.main([*fixed, "--evidence", "0.5"])
    assert not torch.allclose(cosines, with_evidence, atol=0.1)
    assert torch.equal(infer.main([*fixed, "--evidence", "0"]), cosines)
    capsys.readouterr()
    query = "two tennis courts beside a runway"
    start = [*fixed, "--evidence", "1", "--queries", query, "--explain", str(tmp_path / "why")]
    scores_of_query = infer.main(start)
    lines = capsys.readouterr().out.split(f"why: {query}\n")[1].splitlines()
    assert lines[0] == "  matched by pixels only: runway"
    best = int(scores_of_query[0].argmax())
    assert lines[1] == f"  1. sample_{best + 1}.png"
    assert any(line.endswith("2 tennis court") for line in lines)
    assert lines[-1].startswith("     detected: ")
    with Image.open(tmp_path / "why" / "query-1-1.png") as picture:
        assert picture.size[0] > 128
    with pytest.raises(ValueError, match="holds pictures already"):
        infer.main(start)
    with pytest.raises(ValueError, match="no object evidence"):
        infer.main([*fixed, "--evidence", "off", "--explain", str(tmp_path / "other")])
    infer.main([*start[:-1], str(tmp_path / "none"), "--threshold", "1000"])
    assert not list((tmp_path / "none").iterdir())  # no image reaches it
