"""Fine measures: which texts are set against a true one, and figures against naive loops."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
from clip_gcn_image_feature_integration import encode_images, encode_texts, load_model
from dataset.annotations import Record, read_annotations
from dataset.batches import ImageSet
from dataset.scenes import generate_twins
from dataset.vocabulary import plurals
from det_formats.det_json import load_detections, read_label_map
from evidence import Evidence, as_field, evidence_of, fit_on, of_checkpoint
from metrics import fine
from metrics.fine import accuracy, fine_table, per_query, within_classes
from metrics.fine_sets import (
    Query,
    counted_right,
    counting_set,
    kind_swap_set,
    read_twins,
    scene_classes,
)
from metrics.protocol import measure, retrieval_metrics
from metrics.ranks import retrieval

LABELS = read_label_map()
SETS = {"counting": counting_set, "kind_swap": kind_swap_set}


def records(*captions, name="a"):
    return [Record(f"{name}{i}.png", own) for i, own in enumerate(captions)]


# ------------------------------------------------------------------ counting


@pytest.mark.parametrize(
    ("caption", "others"),
    [
        ("Two  planes and a ship .", ["Three planes and a ship .", "Eleven planes and a ship ."]),
        ("there are 4 cars", ["there are 2 cars", "there are 11 cars"]),
        ("ten aircraft in a row", ["two aircraft in a row", "eleven aircraft in a row"]),
    ],
)
def test_other_numbers_stand_in_the_same_spelling(caption, others):
    [query] = counting_set(records((caption,)), LABELS)
    assert query.texts[0] == " ".join(caption.split())
    assert [query.texts[1], query.texts[-1]] == others
    assert len(set(query.texts)) == 10


@pytest.mark.parametrize(
    "caption",
    [
        "a plane",  # one
        "one plane",
        "several planes",
        "two roads",  # of no label
        "runway 27 with planes",
        "two rows of cars",
        "a pair of ships",
        "two dozen ships",
        "a two-story building",
        "at least two planes",
        "two planes beside the two planes",  # stated twice
    ],
)
def test_what_states_no_exact_number_of_a_kind_is_left_out(caption):
    assert counting_set(records((caption,)), LABELS) == []


def test_a_larger_number_and_one_of_several_are_drawn_by_the_seed():
    [query] = counting_set(records(("15 ships",)), LABELS)
    numbers = [int(text.split()[0]) for text in query.texts]
    assert numbers[0] == query.count == 15 and set(numbers[1:]) < set(range(2, 12))
    several = records(*[("three ships and five planes",)] * 30)
    found = counting_set(several, LABELS)
    assert {query.count for query in found} == {3, 5}
    assert found == counting_set(several, LABELS) != counting_set(several, LABELS, seed=1)
    assert [query.image for query in found] == list(range(30))


def test_the_detector_is_right_where_one_of_the_kinds_has_the_number():
    query = Query(0, (), kinds=(3, 5), count=2)
    for class_ids, right in (([3, 3, 1], True), ([5, 5, 3], True), ([3, 5], False), ([], False)):
        assert counted_right(query, np.array(class_ids, dtype=int)) is right


# ------------------------------------------------------------------ kind swap


def swapped(caption, *further, seed=0):
    [first, *_] = kind_swap_set(records((caption, *further)), LABELS, seed)
    return first.texts[1:]


def test_kinds_are_exchanged_with_article_and_number():
    names = [line.split(",")[0] for line in LABELS.lines]
    for text in swapped("A plane on grass ."):
        name = text.split(" ", 1)[1].removesuffix(" on grass .")
        assert name in names and name != "airplane"
        assert text.startswith("An " if name[0] in "aeiou" else "A ")
    several = {plurals(name)[0] for name in names}
    for caption in ("Two buses on grass .", "Two aircraft on grass ."):
        for text in swapped(caption):
            name = text.removeprefix("Two ").removesuffix(" on grass .")
            assert name in several
    assert [plurals(name)[0] for name in ("factory", "bus", "aircraft")] == [
        "factories",
        "buses",
        "aircraft",
    ]
    for text in swapped("Ships beside a road , the ships are large ."):
        name = text.split(" beside ")[0]
        assert text == f"{name} beside a road , the {name[0].lower()}{name[1:]} are large ."


def test_kinds_that_any_caption_of_the_image_mentions_do_not_stand_in():
    ten = ("a dam", "a ship", "a stadium", "a harbor", "a bridge", "an airport", "a chimney")
    assert not {f"{name} on grass" for name in ten} & set(swapped("a plane on grass", *ten))
    assert kind_swap_set(records(("grass",), ("no planes",)), LABELS) == []


def test_kinds_of_the_split_stand_in_first():
    captions = [line.split(",")[0] for line in LABELS.lines[:11]]
    found = kind_swap_set(records(*[(f"a {name}",) for name in captions]), LABELS)
    for query, caption in zip(found, captions, strict=True):
        own = {text.split(" ", 1)[1] for text in query.texts}
        assert caption in own and own < set(captions)
    assert swapped("a plane", seed=0) == swapped("a plane", seed=0) != swapped("a plane", seed=1)


# ------------------------------------------------------------------ figures


def test_accuracy_by_hand():
    scores = np.array([3.0, 1.0, 2.0])
    others = np.array([[1.0, 2.0], [1.0, 1.0], [3.0, 1.0]])
    pairs, top1 = per_query(scores, others)
    assert pairs.tolist() == [1, 0.5, 0.5]
    assert top1 == pytest.approx([1, 1 / 3, 0])
    found = accuracy(scores, others)
    assert found == pytest.approx({"pairs": 200 / 3, "top1": 400 / 9})


def test_accuracy_equals_random_orders_of_the_tied():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 4, 50)
    others = rng.integers(0, 4, (50, 3))
    pairs = top1 = 0.0
    for score, own in zip(scores, others, strict=True):
        for _ in range(200):
            noise = rng.uniform(0, 0.5, 4)
            beaten = score + noise[0] > own + noise[1:]
            pairs += beaten.mean() / 200
            top1 += beaten.all() / 200
    expected = {"pairs": 2 * pairs, "top1": 2 * top1}
    assert accuracy(scores, others) == pytest.approx(expected, abs=1)


def test_within_classes_each_class_is_a_gallery_of_its_own():
    rng = np.random.default_rng(0)
    images, texts = torch.randn(2, 40, 8, generator=torch.Generator().manual_seed(0))
    classes = ["a"] * 10 + ["b"] * 20 + ["c"] * 9 + [None]
    order = rng.permutation(40)
    classes = [classes[i] for i in order]
    found = retrieval((images @ texts.T).numpy(), np.arange(40))
    names = [f"{i}.png" for i in range(40)]
    result = within_classes(found, classes, names)
    sizes = [result[key] for key in ("classes", "images", "captions", "images_left_out")]
    assert sizes == [2, 30, 30, 10]
    expected = 0.0
    for name, size in (("a", 10), ("b", 20)):
        own = [i for i, one in enumerate(classes) if one == name]
        expected += size / 30 * retrieval_metrics(images[own], texts[own], np.arange(size))["mR"]
    assert result["mR"] == pytest.approx(expected)
    table = result["per_image"]
    assert sorted(table["names"]) == sorted(
        names[i] for i, c in enumerate(classes) if c in ("a", "b")
    )
    hits = 100 * np.mean(table["image_to_text"]["R@5"])
    assert hits == pytest.approx(result["image_to_text"]["R@5"], abs=0.01)


def test_one_class_is_the_ordinary_protocol_and_none_is_none():
    scores = np.random.default_rng(1).integers(0, 5, (10, 6)).astype(float)  # with ties
    found = retrieval(scores, [*range(10), 3, 3], [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5])
    result = within_classes(found, ["a"] * 10, list("abcdefghij"))
    whole = measure(found)
    assert {key: result[key] for key in whole if key in result} == {
        key: whole[key] for key in whole if key in result
    }
    assert within_classes(found, [None] * 10, list("abcdefghij")) is None
    assert within_classes(found, ["a"] * 9 + ["b"], list("abcdefghij")) is None


# ------------------------------------------------------------------ files


def test_scene_classes(tmp_path):
    names = ["airport_1.jpg", "x/Beach_20.tif", "00012.jpg", "a_b_3.png"]
    assert scene_classes(tmp_path, names) == ["airport", "beach", None, None]
    assert scene_classes(tmp_path, ["scene_1.png", "scene_2.png"]) == [None, None]
    (tmp_path / "classes.json").write_text('["field", "forest"]', encoding="utf-8")
    names = ["1.tif", "100.tif", "101.tif", "imgs/200.jpg", "201.tif", "0.tif", "a.tif"]
    classes = ["field", "field", "forest", "forest", None, None, None]
    assert scene_classes(tmp_path, names) == classes
    (tmp_path / "classes.json").write_text('{"1": "field"}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"classes\.json: expected a list of names"):
        scene_classes(tmp_path, names)


@pytest.mark.parametrize(
    "content",
    [
        "[",
        "[]",
        "{}",
        '[{"images": ["a"], "sentences": [{"text": "t", "of": 0}]}]',
        '[{"images": ["a", "b"], "sentences": []}]',
        '[{"images": ["a", 1], "sentences": [{"text": "t", "of": 0}]}]',
        '[{"images": ["a", "b"], "sentences": [{"text": "t", "of": 2}]}]',
        '[{"images": ["a", "b"], "sentences": [{"text": 1, "of": 0}]}]',
        '[{"images": ["a", "b"], "sentences": [{"text": "t", "of": 0, "states": []}]}]',
    ],
)
def test_twins_of_another_form_are_an_error(tmp_path, content):
    assert read_twins(tmp_path) is None
    (tmp_path / "twins.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"twins\.json: expected"):
        read_twins(tmp_path)


# ------------------------------------------------------------------ a model


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A data set of 24 twins."""
    folder = tmp_path_factory.mktemp("twins")
    generate_twins(folder, pairs=12)
    return folder


@pytest.fixture
def asked(save_tiny, pairs):
    """(checkpoint with evidence, its ImageSet of the twins, the records)."""
    split = read_annotations(pairs).splits["test"]
    stems = [record.name.removesuffix(".png") for record in split]
    images = ImageSet(
        [pairs / "images" / f"{stem}.png" for stem in stems],
        [pairs / "det_json" / f"{stem}.json" for stem in stems],
        image_size=32,
        label_map=LABELS,
        max_objects=20,
    )
    tables = fit_on(images, [record.captions for record in split])
    evidence = Evidence(tables, 0.05)
    place = ["--dataset", "twins", "--data-root", str(pairs)]
    return save_tiny("tiny.pth", *place, evidence=as_field(evidence)), images, split


def run(checkpoint, *arguments):
    [result] = evaluate.main(
        ["--checkpoint", str(checkpoint), "--device", "cpu", "--fine", *map(str, arguments)]
    )
    return result["fine"]


def test_a_model_is_asked_as_a_loop_would(asked, pairs, tmp_path, capsys):
    checkpoint, images, split = asked
    found = run(checkpoint, "--json", tmp_path / "fine.json")
    [written] = json.loads((tmp_path / "fine.json").read_text(encoding="utf-8"))["results"]
    assert written["fine"] == found
    assert fine_table(found, f"{checkpoint}, twins test") in capsys.readouterr().out
    model, checkpoint = load_model(checkpoint, "cpu")
    tables, weight = of_checkpoint(checkpoint)
    asked_of = {name: make(split, LABELS) for name, make in SETS.items()}
    listed = json.loads((pairs / "twins.json").read_text(encoding="utf-8"))
    texts = {one["text"] for pair in listed for one in pair["sentences"]}
    for queries in asked_of.values():
        for query in queries:
            texts |= set(query.texts)
    texts = sorted(texts)
    features = encode_images(model, images, "cpu")["fused"].double()
    cosines = (features @ encode_texts(model, texts, "cpu").double().T).numpy()
    added = weight * evidence_of(tables, images, texts).astype(float)
    columns = {"without_evidence": cosines.T, "with_evidence": (cosines + added).T}
    scores = {side: dict(zip(texts, own, strict=True)) for side, own in columns.items()}

    for name, make in (("counting", counting_set), ("kind_swap", kind_swap_set)):
        queries = make(split, LABELS)
        assert found[name]["names"] == [split[query.image].name for query in queries]
        for side, score in scores.items():
            own = np.array([[score[text][q.image] for text in q.texts] for q in queries])
            blind = np.array([[score[text].mean() for text in q.texts] for q in queries])
            figures = accuracy(own[:, 0], own[:, 1:])
            of_blind = accuracy(blind[:, 0], blind[:, 1:])
            figures.update({f"blind_{key}": value for key, value in of_blind.items()})
            of_model = {key: found[name][side][key] for key in figures}
            assert of_model == pytest.approx(figures)
            rows = found[name][side]["per_query"]
            assert 100 * np.mean(rows["pairs"]) == pytest.approx(figures["pairs"], abs=0.01)
    number = {record.name: i for i, record in enumerate(split)}
    twins = found["twins"]
    for side, score in scores.items():
        right = []
        for pair in listed:
            first, second = (number[name] for name in pair["images"])
            for sentence in pair["sentences"]:
                better = score[sentence["text"]][first] > score[sentence["text"]][second]
                right.append(better == (sentence["of"] == 0))
        assert twins[side]["right"] == pytest.approx(100 * np.mean(right))
        first = np.mean(right[: len(listed[0]["sentences"])])
        assert twins[side]["per_pair"][0] == pytest.approx(first, abs=1e-4)
    assert (twins["pairs"], twins["sentences"]) == (12, len(right))
    parts = twins["by_statement"].values()
    assert sum(part["sentences"] for part in parts) == twins["sentences"]
    parts = [found["counting"][part]["queries"] for part in ("detector_right", "detector_wrong")]
    assert sum(parts) == found["counting"]["queries"]


def test_clean_boxes_and_no_evidence(asked, pairs):
    checkpoint, _, _ = asked
    found = run(checkpoint, "--evidence", "off")
    assert found["counting"]["with_evidence"] is found["twins"]["with_evidence"] is None
    oracle = run(checkpoint, "--det-json", pairs / "clean_json")["counting"]
    assert "detector_wrong" not in oracle  # every object is there
    assert oracle["with_evidence"]["pairs"] > oracle["without_evidence"]["pairs"]


def test_texts_of_equal_tokens_tie(asked, pairs, monkeypatch):
    checkpoint, _, _ = asked
    long = "grass " * 80
    query = Query(3, tuple(long + str(i) for i in range(10)), (0,), 2)
    monkeypatch.setattr(fine, "counting_set", lambda records, label_map: [query])
    counting = run(checkpoint)["counting"]
    for side in ("without_evidence", "with_evidence"):
        figures = {key: counting[side][key] for key in ("pairs", "top1", "blind_pairs")}
        assert figures == pytest.approx({"pairs": 50, "top1": 10, "blind_pairs": 50})


def test_classes_and_twins_of_a_data_set(asked, pairs, tmp_path, save_tiny):
    root = tmp_path / "named"
    shutil.copytree(pairs, root)
    names = (root / "test_filename.txt").read_text(encoding="utf-8")
    for i in range(24):
        name = f"{'field' if i % 2 else 'forest'}_{i}"
        (root / "images" / f"twin_{i}.png").rename(root / "images" / f"{name}.png")
        names = names.replace(f"twin_{i}.png", f"{name}.png")
    (root / "test_filename.txt").write_text(names, encoding="utf-8")
    with pytest.raises(ValueError, match=r"twins\.json: 'twin_0\.png' is no image of the split"):
        run(asked[0], "--data-root", root)
    (root / "twins.json").unlink()
    found = run(asked[0], "--data-root", root)
    within = found["within_class"]["without_evidence"]
    assert (within["classes"], within["images"], found["twins"]) == (2, 24, None)


# ------------------------------------------------------------------ real data


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "split", "counting", "right", "swaps", "classes"),
    [
        ("UCM", "test", 68, 33, 632, (21, 210)),
        ("RSICD", "val", 295, 154, 3146, (30, 1027)),
    ],
)
def test_sizes_on_real_data(real_data, name, split, counting, right, swaps, classes):
    root = real_data / name
    own = read_annotations(root).splits[split]
    queries = counting_set(own, LABELS)
    files = [root / "det_json" / f"{Path(own[query.image].name).stem}.json" for query in queries]
    found = [
        counted_right(query, np.array([LABELS.class_id(d["label"]) for d in load_detections(file)]))
        for query, file in zip(queries, files, strict=True)
    ]
    sizes = Counter(scene_classes(root, [record.name for record in own]))
    kept = [size for label, size in sizes.items() if label is not None and size >= 10]
    result = len(queries), sum(found), len(kind_swap_set(own, LABELS)), (len(kept), sum(kept))
    assert result == (counting, right, swaps, classes)
