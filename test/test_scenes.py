"""Synthetic scenes: seeded to the pixel, described truthfully, detected with the stated errors."""

import hashlib
import json
import math
import re
from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT
from dataset import scenes
from dataset.annotations import read_annotations
from dataset.scenes import PAIRS, SPLITS, generate_twins, scene, twins
from dataset.sentences import ARRANGEMENTS, NUMBERS, ROADS, WORDS, relations
from dataset.shapes import GROUNDS, KINDS, SIDE, Item
from det_formats.det_json import load_detections, read_label_map

TEST = range(SPLITS["train"] + SPLITS["val"], sum(SPLITS.values()))
# Of all sentences of the test split: the generator is frozen.
DIGEST = "56a8c823f0b914a567972e25f1e9672f5bf429d93f7bb6177900d35acdffb470"
# Of the sentences of the first sixty pairs of twins.
TWINS_DIGEST = "39cdbf2fe106934cf83ca6a4396f0c5c345d878e17a165e3c2664f5564b8ba18"
SMALL = {"train": 3, "val": 2, "test": 2}
KIND_OF = {name: kind for kind, entry in KINDS.items() for name in entry.names}
GROUND_OF = {phrase: ground for ground, entry in GROUNDS.items() for phrase in entry[0]}


@pytest.fixture(scope="module")
def some():
    """Three hundred scenes of the test split."""
    return [scene(0, index) for index in TEST]


def one_of(words):
    return "|".join(sorted(map(re.escape, words), key=len, reverse=True))


HOW = "|".join(f" {words}" for words in ARRANGEMENTS.values())
OBJECTS = rf"(?:an?|{one_of(NUMBERS)}) (?:{one_of(KIND_OF)})s?(?:{HOW})?"
GROUND = rf"(?P<ground>{one_of(GROUND_OF)})(?P<road>{one_of(ROADS)})?"
WORD = one_of(word for both in WORDS.values() for side in both for word in side)


def count_of(text):
    """(kind, count) that a phrase like "two planes in a row" states."""
    number, name = re.sub(HOW, "", text).split(" ", 1)
    count = 1 if number in ("a", "an") else NUMBERS.index(number)
    return KIND_OF[name if count == 1 else name.removesuffix("s")], count


def body(sentence):
    """A sentence in lower case without its full stop."""
    assert sentence.endswith(" .") and sentence[0].isupper()
    return sentence[0].lower() + sentence[1:-2]


def parsed(pattern, sentence):
    found = re.fullmatch(pattern, body(sentence))
    assert found, sentence
    return found


def counts(items):
    return Counter(item.kind for item in items)


def positions(items, kind):
    return np.array([(item.x, item.y) for item in items if item.kind == kind])


# ------------------------------------------------------------------ seeds and sizes


def test_scenes_have_1_to_20_objects_that_lie_within_and_apart(some):
    for pixels, sentences, _, canvas in some:
        assert pixels.shape == (SIDE, SIDE, 3) and pixels.dtype == np.uint8
        assert len(sentences) == 5
        for i, a in enumerate(canvas.items):
            assert 0 < a.x < SIDE and 0 < a.y < SIDE
            assert all(math.dist((a.x, a.y), (b.x, b.y)) > 3 for b in canvas.items[:i])
    sizes = [len(canvas.items) for *_, canvas in some]
    assert min(sizes) == 1 and 10 < max(sizes) <= 20
    assert {item.kind for *_, canvas in some for item in canvas.items} == set(KINDS)
    assert {canvas.ground for *_, canvas in some} == set(GROUNDS)


def test_every_kind_is_in_the_label_map():
    label_map = read_label_map(ROOT / "det_json" / "labels.txt")
    class_ids = [{label_map.class_id(name) for name in kind.names} for kind in KINDS.values()]
    assert all(len(own) == 1 and len(label_map) - 1 not in own for own in class_ids)
    assert len(set.union(*class_ids)) == len(KINDS)


# ------------------------------------------------------------------ sentences


def test_stated_counts_ground_and_road_hold(some):
    for _, sentences, _, canvas in some:
        there = parsed(rf"there (?:is|are) (?P<list>.+) on {GROUND}", sentences[1])
        with_ = parsed(rf"{GROUND} with (?P<list>.+)", sentences[3])
        for found in (there, with_):
            stated = dict(map(count_of, re.split(r", | and ", found["list"])))
            assert stated == counts(canvas.items)
            assert GROUND_OF[found["ground"]] == canvas.ground
            assert (found["road"] is not None) == canvas.road
        one = len(canvas.items) == 1
        assert body(sentences[1]).startswith("there is " if one else "there are ")


def test_sentences_are_those_that_published_figures_depend_on(some):
    text = "\n".join(sentence for _, sentences, _, _ in some for sentence in sentences)
    assert hashlib.sha256(text.encode()).hexdigest() == DIGEST


def holds(word, a, b, size):
    """Whether the words between points a (A, 2) and b (B, 2) are true, by a rule of our own."""
    if "left" in word:
        return a[:, 0].max() < b[:, 0].min()
    if "right of" in word:
        return a[:, 0].min() > b[:, 0].max()
    if word == "above":  # y points down
        return a[:, 1].max() < b[:, 1].min()
    if word == "below":
        return a[:, 1].min() > b[:, 1].max()
    gaps = np.hypot(*(a[:, None] - b[None]).transpose(2, 0, 1))
    if word in ("far from", "away from"):
        return gaps.min() > 50
    if word in ("surrounded by", "in the middle of"):
        a, b, gaps, word = b, a, gaps.T, "around"
    if word in ("around", "in a ring around"):
        inside = (a.min(0) < b[0]).all() and (a.max(0) > b[0]).all()
        return len(b) == 1 and len(a) > 3 and inside
    assert word in ("right beside", "close to", "next to")
    # Each of the one group has one of the other within reach, whichever was named first.
    return min(gaps.min(axis=1).max(), gaps.min(axis=0).max()) < 1.6 * size


def test_stated_relations_hold(some):
    seen = set()
    for _, sentences, _, canvas in some:
        for sentence, tail in ((sentences[0], f" on {GROUND}"), (sentences[2], "")):
            pattern = rf"(?P<a>{OBJECTS}) (?P<word>{WORD}) (?P<b>{OBJECTS}){tail}"
            found = re.fullmatch(pattern, body(sentence))
            if found is None:  # no relation is true: where the group is, or only what it is
                part = r"(?: in the (?:[a-z]+ )*(?:corner|part|centre) of the image)?"
                found = parsed(rf"(?P<a>{OBJECTS}){part}{tail}", sentence)
            stated = [count_of(found[key]) for key in ("a", "b") if key in found.groupdict()]
            for kind, count in stated:
                assert counts(canvas.items)[kind] == count
            if len(stated) == 2:
                points = [positions(canvas.items, kind) for kind, _ in stated]
                kinds = {kind for kind, _ in stated}
                size = max(item.w for item in canvas.items if item.kind in kinds)
                assert holds(found["word"], *points, size), sentence
                seen.add(found["word"])
    assert all(seen & {*there, *back} for there, back in WORDS.values())


def test_stated_places_and_rows_hold(some):
    places = rows = 0
    for _, sentences, _, canvas in some:
        for sentence in sentences:
            place = re.match(rf"({OBJECTS}) in the (.+?) of the image", body(sentence))
            if place:
                x, y = positions(canvas.items, count_of(place[1])[0]).mean(axis=0) / SIDE
                words = place[2].split()
                assert ("left" in words) == (x < 0.38) and ("right" in words) == (x > 0.62)
                assert ("upper" in words) == (y < 0.38) and ("lower" in words) == (y > 0.62)
                assert ("centre" in words) == (0.38 <= min(x, y) and max(x, y) <= 0.62)
                places += 1
            row = re.match(rf"({OBJECTS})", body(sentence))
            if row and row[1].endswith("in a row"):
                points = positions(canvas.items, count_of(row[1])[0])
                across = np.linalg.svd(points - points.mean(axis=0))[1][1]
                assert len(points) > 2 and across < 1e-6
                rows += 1
    assert places > 100 and rows > 20


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([(20, 60)], [(60, 61)], ["left"]),
        ([(60, 60)], [(20, 61)], ["right"]),
        ([(60, 20)], [(61, 60)], ["above"]),
        ([(60, 60)], [(61, 20)], ["below"]),
        ([(20, 20)], [(60, 60)], ["left", "above", "apart"]),
        ([(20, 60)], [(26, 61)], ["beside"]),  # six pixels are not yet left
        ([(20, 60)], [(27, 61)], ["left", "beside"]),
        ([(20, 60), (40, 60)], [(30, 61)], ["beside"]),  # on both sides: neither left nor right
        ([(20, 60), (80, 60)], [(26, 61)], []),  # the second has no neighbour
        ([(50, 60), (70, 60), (60, 50), (60, 70)], [(60, 60)], ["around"]),
        ([(50, 60), (70, 60), (60, 50)], [(60, 60)], ["beside"]),  # three are no ring
        ([(50, 60), (60, 50), (53, 53), (52, 56)], [(60, 60)], ["beside"]),  # nor is a quarter
    ],
)
def test_relations_of_hand_made_groups(a, b, expected):
    groups = [[Item("ship", x, y, 10.0, 5.0, 0.0, 0) for x, y in points] for points in (a, b)]
    assert relations(*groups) == expected


# ------------------------------------------------------------------ detections


def detection_of(item, left):
    """The detection of an item by label and distance, taken out of those left; or None."""
    near = [
        detection
        for detection in left
        if detection["label"] == KINDS[item.kind].names[0]
        and math.dist(detection["bbox"][:2], (item.x, item.y)) < 0.3 * item.w
        and abs(detection["bbox"][2] / item.w - 1) < 0.3
    ]
    if not near:
        return None
    best = min(near, key=lambda detection: math.dist(detection["bbox"][:2], (item.x, item.y)))
    left.remove(best)
    return best


def test_detections_have_the_stated_errors(some):
    errors = []
    objects = false = 0
    for _, _, detections, canvas in some:
        left = list(detections)
        for truth in canvas.items:
            objects += 1
            detection = detection_of(truth, left)
            if detection is not None:
                x, y, w, h, angle, score = detection["bbox"]
                assert 0.3 <= score <= 1
                place = [(x - truth.x) / truth.w, (y - truth.y) / truth.h]
                errors.append([*place, w / truth.w - 1, h / truth.h - 1, angle - truth.angle])
        false += len(left)
    assert objects > 1000
    assert 1 - len(errors) / objects == pytest.approx(0.10, abs=0.025)
    assert false / objects == pytest.approx(0.05, abs=0.02)
    assert np.mean(errors, axis=0) == pytest.approx(np.zeros(5), abs=0.006)
    assert np.std(errors, axis=0) == pytest.approx(np.full(5, 0.05), abs=0.006)


# ------------------------------------------------------------------ twins and splits


def facts_of(canvas):
    """All (kind, kind, relation) that hold."""
    groups = defaultdict(list)
    for item in canvas.items:
        groups[item.kind].append(item)
    pairs = [(a, b) for a in groups for b in groups if a != b]
    return {(a, b, relation) for a, b in pairs for relation in relations(groups[a], groups[b])}


def test_twins_in_the_test_split_differ_in_their_relations(some):
    pairs = related = 0
    for first, second in zip(some[::2], some[1::2], strict=True):
        a, b = first[3], second[3]
        if (a.ground, a.road, counts(a.items)) == (b.ground, b.road, counts(b.items)):
            assert first[1] != second[1]
            pairs += 1
            related += facts_of(a) != facts_of(b)
    # Of 100 pairs laid out as twins the others had no room for every object; where the relations
    # are the same, places and arrangement differ.
    assert pairs >= 40 and related >= 0.75 * pairs


def layout_key(canvas):
    return tuple(sorted((i.kind, round(i.x / 2), round(i.y / 2)) for i in canvas.items))


@pytest.mark.parametrize(
    "others", [range(100), pytest.param(range(TEST.start), marks=pytest.mark.slow)]
)
def test_no_layout_of_the_test_split_is_in_another(some, others, monkeypatch):
    blank = np.zeros((SIDE, SIDE, 3), dtype=np.uint8)  # what is laid out does not depend on pixels
    monkeypatch.setattr(scenes, "draw", lambda *arguments: blank)
    test = {layout_key(canvas) for *_, canvas in some}
    assert len(test) == len(TEST)
    assert not test & {layout_key(scene(0, index)[3]) for index in others}


# ------------------------------------------------------------------ twins of equal counts


@pytest.fixture(scope="module")
def pairs():
    """The first sixty of the pairs."""
    return [twins(0, pair) for pair in range(60)]


def is_told(sentence, states, canvas):
    """Whether a sentence of twins is true of a canvas, by rules of our own."""
    if states == "place":
        found = parsed(rf"(?P<a>{OBJECTS}) in the (?P<place>.+) of the image on {GROUND}", sentence)
        kind, count = count_of(found["a"])
        x, y = positions(canvas.items, kind).mean(axis=0) / SIDE
        lies = {"left": x < 0.4, "right": x > 0.6, "upper": y < 0.4, "lower": y > 0.6}
        lies["centre"] = max(abs(x - 0.5), abs(y - 0.5)) < 0.2
        assert counts(canvas.items)[kind] == count
        return all(lies.get(word, True) for word in found["place"].split())
    found = parsed(
        rf"(?P<a>{OBJECTS}) (?P<word>{WORD}) (?P<b>{OBJECTS})(?: on {GROUND})?", sentence
    )
    stated = [count_of(found[key]) for key in ("a", "b")]
    assert all(counts(canvas.items)[kind] == count for kind, count in stated)
    points = [positions(canvas.items, kind) for kind, _ in stated]
    widths = {item.kind: item.w for item in canvas.items}  # those of a group are equal
    return holds(found["word"], *points, np.mean([widths[kind] for kind, _ in stated]) + 2)


def test_each_sentence_of_twins_is_true_of_one_and_false_of_the_other(pairs):
    seen = Counter()
    for pair in pairs:
        for twin, other in (pair, pair[::-1]):
            for sentence, states in twin.sentences:
                assert is_told(sentence, states, twin.canvas), sentence
                assert not is_told(sentence, states, other.canvas), sentence
                seen[states] += 1
    assert set(seen) == {"direction", "beside", "around", "apart", "place"}
    assert seen["place"] < seen.total() / 2


def test_twins_have_equal_counts_and_as_many_sentences(pairs):
    for first, second in pairs:
        a, b = first.canvas, second.canvas
        assert (a.ground, a.road, counts(a.items)) == (b.ground, b.road, counts(b.items))
        assert 1 <= len(first.sentences) == len(second.sentences) <= 3
        for twin in (first, second):
            labels = [KINDS[item.kind].names[0] for item in twin.canvas.items]
            assert [detection["label"] for detection in twin.clean] == labels
            for detection, item in zip(twin.clean, twin.canvas.items, strict=True):
                box = [item.x, item.y, item.w, item.h, item.angle, 1.0]
                assert detection["bbox"] == pytest.approx(box, abs=0.001)
    assert any(twin.detections != twin.clean for pair in pairs for twin in pair)


def test_twins_are_those_that_figures_depend_on_and_no_scenes(pairs, some):
    all_twins = [twin for pair in pairs for twin in pair]
    text = "\n".join(str(sentence) for twin in all_twins for sentence in twin.sentences)
    assert hashlib.sha256(text.encode()).hexdigest() == TWINS_DIGEST
    layouts = {layout_key(twin.canvas) for twin in all_twins}
    assert len(layouts) == 120
    assert not layouts & {layout_key(canvas) for *_, canvas in some}
    assert PAIRS == 1000


def test_twins_are_a_data_set_of_a_test_split(tmp_path, written):
    folder = tmp_path / "twins"
    assert generate_twins(folder, pairs=2) == 4
    before = tree(folder)
    records = read_annotations(folder).splits["test"]
    listed = json.loads((folder / "twins.json").read_text(encoding="utf-8"))
    for pair, entry in enumerate(listed):
        for number, twin in enumerate(twins(0, pair)):
            record = records[2 * pair + number]
            own = [one for one in entry["sentences"] if one["of"] == number]
            assert record.captions == tuple(one["text"] for one in own)
            assert [(one["text"], one["states"]) for one in own] == twin.sentences
            assert record.name == entry["images"][number]
            assert np.array_equal(
                np.asarray(Image.open(folder / "images" / record.name)), twin.pixels
            )
            for place, boxes in (("det_json", twin.detections), ("clean_json", twin.clean)):
                assert load_detections(folder / place / f"twin_{2 * pair + number}.json") == boxes
    assert generate_twins(folder, pairs=2) == 4 and tree(folder) == before
    for write, place in ((scenes.generate, folder), (generate_twins, written)):
        with pytest.raises(ValueError, match="holds other scenes"):
            write(place)
    (tmp_path / "mine").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="holds other files than scenes"):
        generate_twins(tmp_path)


# ------------------------------------------------------------------ files


def tree(folder):
    """Content and time of every file."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in files
    }


def contents(folder):
    return {name: content for name, (content, _) in tree(folder).items()}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    assert scenes.generate(folder, splits=SMALL) == 7
    return folder


def test_files_follow_the_rsitmd_layout(written):
    for split, size in SMALL.items():
        names = (written / f"{split}_filename.txt").read_text(encoding="utf-8").splitlines()
        captions = (written / f"{split}_caps.txt").read_text(encoding="utf-8").splitlines()
        assert len(captions) == 5 * size
        assert len(names) == (5 * size if split == "test" else size)
    splits = read_annotations(written).splits
    assert {split: len(records) for split, records in splits.items()} == SMALL
    for index, record in enumerate(record for records in splits.values() for record in records):
        pixels, sentences, detections, _ = scene(0, index)
        assert record.name == f"scene_{index}.png" and record.captions == tuple(sentences)
        image = Image.open(written / "images" / record.name)
        assert np.array_equal(np.asarray(image), pixels)
        assert load_detections(written / "det_json" / f"scene_{index}.json") == detections


def test_what_is_there_is_left_alone_and_so_is_another_seed(tmp_path, written):
    before = tree(written)
    assert scenes.generate(written, splits=SMALL) == 7
    assert tree(written) == before
    scenes.generate(tmp_path, seed=1, splits=SMALL)
    assert contents(tmp_path)["images/scene_0.png"] != before["images/scene_0.png"][0]
    with pytest.raises(ValueError, match="holds other scenes"):
        scenes.generate(tmp_path, splits=SMALL)
    assert scenes.is_complete(tmp_path)


def test_an_interrupted_data_set_says_so_and_is_written_anew(tmp_path, written, monkeypatch):
    def interrupted(seed, index):
        if index == 4:
            raise KeyboardInterrupt
        return scene(1, index)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(scenes, "scene", interrupted)
        scenes.generate(tmp_path, splits=SMALL)
    stamps = [json.loads((f / "scenes.json").read_text("utf-8")) for f in (written, tmp_path)]
    assert stamps[1] == {**stamps[0], "complete": False} and stamps[0]["complete"] is True
    scenes.generate(tmp_path, splits=SMALL)
    assert contents(tmp_path) == contents(written)


@pytest.mark.parametrize("name", ["images/scene_0.png", "train_caps.txt", "dataset.json"])
def test_a_folder_of_other_files_is_an_error_and_stays_as_it_is(tmp_path, name):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("mine", encoding="utf-8")
    before = sorted(tmp_path.rglob("*")), tree(tmp_path)
    with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path))}: .*--dataset"):
        scenes.generate(tmp_path, splits=SMALL)
    assert (sorted(tmp_path.rglob("*")), tree(tmp_path)) == before


def test_samples_are_those_committed(tmp_path):
    scenes.samples(tmp_path, tmp_path)
    for number in range(1, 6):
        files = [f / f"sample_{number}.json" for f in (tmp_path, ROOT / "det_json")]
        assert load_detections(files[0]) == load_detections(files[1])
        files = [f / f"sample_{number}.png" for f in (tmp_path, ROOT / "test")]
        assert np.array_equal(*(np.asarray(Image.open(file)) for file in files))
    queries = (tmp_path / "queries.txt").read_bytes()
    assert queries == (ROOT / "test" / "queries.txt").read_bytes()
    assert len(list((ROOT / "test").glob("*.png"))) == 5
