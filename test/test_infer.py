"""The scripts that use a trained model: similarity matrices, features, and promises checked."""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import clip
import clip_gcn_image_feature_integration as integration
import infer
import model
from clip_gcn_image_feature_integration import (
    SAMPLES,
    SCENES,
    encode_images,
    encode_texts,
    load_images,
)
from model import load_checkpoint

ROOT = Path(__file__).parent.parent
NAMES = [f"sample_{i}.png" for i in range(1, 6)]
TILES = ["b.png", "north/a.png", "south/a.png"]
SENTENCES = (ROOT / "test" / "queries.txt").read_text(encoding="utf-8").splitlines()


@pytest.fixture
def checkpoint(save_tiny):
    """Path of a tiny model's checkpoint, its options those of train.py."""
    return save_tiny("tiny.pth")


@pytest.fixture
def show(checkpoint, capsys):
    """Runs infer.py on the tiny model: (scores, printed lines)."""

    def start(*arguments):
        scores = infer.main(
            ["--checkpoint", str(checkpoint), "--device", "cpu", *map(str, arguments)]
        )
        return scores, capsys.readouterr().out.splitlines()

    return start


@pytest.fixture
def tiles(tmp_path):
    """A folder of images in two folders, and one of detections that mirrors it."""
    places = {"north/a.png": 1, "south/a.png": 2, "b.png": 3}
    for name, number in places.items():
        for folder, source in (
            ("tiles", ROOT / "test" / f"sample_{number}.png"),
            ("dets", ROOT / "det_json" / f"sample_{number}.json"),
        ):
            target = (tmp_path / folder / name).with_suffix(source.suffix)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    (tmp_path / "tiles" / "notes.txt").write_text("no image", encoding="utf-8")
    return tmp_path / "tiles", tmp_path / "dets"


def legend(lines):
    """Names of the images as the legend lists them, and each query's best."""
    images = [m[1] for line in lines if (m := re.fullmatch(r"  Img\d+: (.+)", line))]
    best = [m[1] for line in lines if (m := re.fullmatch(r"  Query \d+: .+ -> (.+)", line))]
    return images, best


def matrix(lines):
    """The printed matrix as lists of cells."""
    start = lines.index("Similarity Score Matrix (Text-Image):")
    rows = [line for line in lines[start:] if re.match(r"Query \d+:", line)]
    return [row.split(":")[1].split() for row in rows]


def expected_scores(checkpoint, names, detections, queries):
    """Cosines with every image and every sentence encoded on its own."""
    network, saved = load_checkpoint(checkpoint)
    columns = []
    for name, file in zip(names, detections, strict=True):
        images = load_images([name], [Path(name).name], file and Path(file).parent, saved)
        columns.append(encode_images(network, images, "cpu")["fused"][0])
    rows = [encode_texts(network, [query], "cpu")[0] for query in queries]
    return torch.stack(rows) @ torch.stack(columns).T


# ------------------------------------------------------------------ infer.py


def test_default_prints_the_matrix_of_the_samples(show, checkpoint):
    scores, lines = show()
    expected = expected_scores(
        checkpoint,
        [ROOT / "test" / name for name in NAMES],
        [ROOT / "det_json" / f"sample_{i}.json" for i in range(1, 6)],
        SENTENCES,
    )
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)
    counts, title, heads, *rows = lines
    assert counts.startswith("0 of 5 images without a detection file, 0 objects")
    assert title == "Similarity Score Matrix (Text-Image):"
    assert heads.split() == ["Img1", "Img2", "Img3", "Img4", "Img5"]
    assert [row.split(":")[0] for row in rows[:5]] == [f"Query {q}" for q in range(1, 6)]
    for row, cells in zip(scores.tolist(), matrix(lines), strict=True):
        assert [cell.rstrip("*") for cell in cells] == [f"{value:.2f}" for value in row]
        assert [i for i, cell in enumerate(cells) if "*" in cell] == [int(np.argmax(row))]
    images, best = legend(lines)
    assert images == NAMES
    assert best == [NAMES[i] for i in scores.argmax(dim=1)]
    assert all(any(query in line for line in lines) for query in SENTENCES)


def test_columns_stand_below_their_heads(show):
    _, (_, _, top, *rows) = show()
    heads = [head.end() for head in re.finditer(r"Img\d", top)]
    for line in rows[:5]:  # the last place is the mark's
        assert [number.end() + 1 for number in re.finditer(r"-?\d\.\d\d", line)] == heads


def test_images_are_files_folders_and_globs(show, tiles):
    folder, _ = tiles
    everything = [f"{folder.as_posix()}/{name}" for name in TILES]
    query = ("--queries", "a plane")
    assert legend(show("--images", folder, *query)[1])[0] == everything
    assert legend(show("--images", f"{folder}/**/*.png", *query)[1])[0] == everything
    assert legend(show("--images", f"{folder}/*/a.png", *query)[1])[0] == everything[1:]
    chosen = (folder / "south" / "a.png", folder / "b.png")
    assert legend(show("--images", *chosen, *query)[1])[0] == [everything[2], everything[0]]
    both = show("--images", folder / "north", folder / "b.png", *query)[1]
    assert legend(both)[0] == [everything[1], everything[0]]
    assert legend(show("--images", folder, folder / "b.png", *query)[1])[0] == everything


def test_images_are_called_as_they_were_given(show, tiles, tmp_path, monkeypatch):
    folder, _ = tiles
    monkeypatch.chdir(folder / "north")
    table, dump = tmp_path / "m.csv", tmp_path / "m.json"
    written = ("--csv", table, "--json", dump)
    _, lines = show("--images", "a.png", "../south", "../*.png", "--queries", "snow", *written)
    names = ["a.png", "../south/a.png", "../b.png"]
    assert legend(lines)[0] == names
    assert table.read_text(encoding="utf-8").splitlines()[0] == ",".join(["query", *names])
    assert json.loads(dump.read_text(encoding="utf-8"))["images"] == names


def test_mirrored_detections_go_to_their_images(show, tiles, checkpoint):
    folder, detections = tiles
    scores, lines = show("--images", folder, "--det-json", detections, "--queries", *SENTENCES)
    files = [(detections / name).with_suffix(".json") for name in TILES]
    expected = expected_scores(checkpoint, legend(lines)[0], files, SENTENCES)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)
    assert lines[0].startswith("0 of 3 images without a detection file")


def test_detections_of_single_images_are_matched_by_the_ends_of_their_paths(
    show, tiles, monkeypatch
):
    folder, detections = tiles
    query = ("--det-json", detections, "--queries", *SENTENCES)
    whole, _ = show("--images", folder, *query)
    monkeypatch.chdir(folder / "north")
    apart, lines = show("--images", "a.png", "../south", "../*.png", *query)
    assert lines[0].startswith("0 of 3 images without a detection file")
    torch.testing.assert_close(apart, whole[:, [1, 2, 0]], rtol=0, atol=1e-5)


def test_detections_that_fit_several_images_are_an_error(show, tiles):
    folder, detections = tiles
    (detections / "north" / "a.json").rename(detections / "a.json")
    (detections / "south" / "a.json").unlink()
    with pytest.raises(ValueError, match="a.json") as failure:
        show("--images", folder, "--det-json", detections)
    assert "north/a and south/a" in str(failure.value)


def test_detections_change_the_scores(show, tiles, checkpoint):
    folder, detections = tiles
    with_graphs, _ = show("--images", folder, "--det-json", detections)
    without, lines = show("--images", folder)
    assert (with_graphs - without).abs().amax(dim=0).min() > 1e-4
    assert lines[0].startswith("3 of 3 images without a detection file")
    expected = expected_scores(checkpoint, legend(lines)[0], [None] * 3, SENTENCES)
    torch.testing.assert_close(without, expected, rtol=0, atol=1e-5)


def test_queries_are_sentences_and_text_files(show, tmp_path):
    file = tmp_path / "sentences.txt"
    file.write_bytes("\ufeffa ship\r\n\r\n  two planes  \r\n".encode())
    scores, lines = show("--queries", " a car ", file, "snow")
    assert scores.shape == (4, 5)
    found = [re.sub(r" -> .*", "", line).strip() for line in lines if " -> " in line]
    assert found == [
        "Query 1: a car",
        "Query 2: a ship",
        "Query 3: two planes",
        "Query 4: snow",
    ]


def test_top_k_csv_and_json_agree_with_the_matrix(show, tmp_path):
    table, dump = tmp_path / "new" / "m.csv", tmp_path / "other" / "new" / "m.json"
    queries = ["two ships", 'a "plane", on grass']
    scores, lines = show(
        "--queries", *queries, "--top-k", "3", "--csv", table, "--json", dump
    )  # fmt: skip
    with open(table, newline="", encoding="utf-8") as file:
        head, *rows = csv.reader(file)
    assert head == ["query", *NAMES] and [row[0] for row in rows] == queries
    found = np.array([[float(cell) for cell in row[1:]] for row in rows])
    assert found == pytest.approx(scores.numpy(), abs=1e-6)
    content = json.loads(dump.read_text(encoding="utf-8"))
    assert (content["images"], content["queries"]) == (NAMES, queries)
    assert content["scores"] == scores.tolist()
    for q, entry in enumerate(content["best"]):
        order = np.argsort(-scores[q].numpy())[:3]
        assert entry["query"] == queries[q]
        assert [hit["image"] for hit in entry["images"]] == [NAMES[i] for i in order]
        assert [hit["score"] for hit in entry["images"]] == scores[q][order.copy()].tolist()
        start = lines.index(queries[q])
        assert lines[start + 1 : start + 4] == [
            f"  {place:3d}. {scores[q, i]:.3f} {NAMES[i]}" for place, i in enumerate(order, 1)
        ]


def test_more_images_than_a_matrix_holds_are_ranked(show, tmp_path):
    for i in range(infer.WIDEST + 1):
        pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i:02d}.png")
    scores, lines = show("--images", tmp_path, "--queries", "a ship")
    assert "Similarity Score Matrix (Text-Image):" not in lines
    ranked = [line.split()[-1] for line in lines if re.match(r" +\d+\. ", line)]
    order = torch.argsort(scores[0], descending=True)[:10].tolist()
    assert ranked == [f"{tmp_path.as_posix()}/{i:02d}.png" for i in order]


def test_a_negative_top_k_is_an_error(show):
    with pytest.raises(ValueError, match="--top-k -1"):
        show("--top-k", "-1")


def test_printed_and_ranked_best_agree_where_images_tie(show, tmp_path):
    for name in ("c.png", "a.png", "b.png", "d.png"):
        shutil.copy(ROOT / "test" / "sample_1.png", tmp_path / name)
    dump = tmp_path / "out.json"
    _, lines = show("--images", tmp_path, "--queries", *SENTENCES, "--json", dump)
    best = json.loads(dump.read_text(encoding="utf-8"))["best"]
    assert legend(lines)[1] == [entry["images"][0]["image"] for entry in best]


def test_wrong_images_are_errors_that_name_them(show, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "notes.txt").write_text("no image", encoding="utf-8")
    for wrong in (tmp_path / "gone.png", empty, f"{tmp_path}/*.jpeg", tmp_path / "notes.txt"):
        with pytest.raises(ValueError, match=re.escape(str(wrong))):
            show("--images", wrong)
    with pytest.raises(ValueError, match=r"--images .*gone"):
        show("--images", ROOT / "test" / "sample_1.png", tmp_path / "gone")


def test_wrong_queries_are_errors_that_name_the_option(show, tmp_path):
    blank = tmp_path / "blank.txt"
    blank.write_text("\n \n", encoding="utf-8")
    for wrong in (blank, "  "):
        with pytest.raises(ValueError, match="--queries"):
            show("--queries", wrong)
    mistyped = str(tmp_path / "blunk.txt")
    with pytest.raises(ValueError, match=f"--queries {re.escape(mistyped)}: no such file"):
        show("--queries", "a ship", mistyped)


def test_queries_that_are_not_utf8_are_an_error_that_names_the_file(show, tmp_path):
    file = tmp_path / "latin.txt"
    file.write_bytes("zwei Häfen".encode("latin-1"))
    with pytest.raises(ValueError, match=f"{re.escape(str(file))}.*UTF-8"):
        show("--queries", file)


def test_unreadable_images_are_one_error_that_names_them(show, tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"broken")
    with pytest.raises(ValueError, match="^2 images are missing or unreadable") as failure:
        show("--images", tmp_path)
    assert "a.png" in str(failure.value) and "b.png" in str(failure.value)


def test_wrong_checkpoints_are_errors_that_name_them(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.pth: no such checkpoint.*train\.py"):
        infer.main(["--checkpoint", str(tmp_path / "gone.pth")])
    torch.save({"weights": {}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth: not an FG-CROSS checkpoint"):
        infer.main(["--checkpoint", str(tmp_path / "other.pth")])


def test_a_missing_folder_of_detections_is_an_error_that_names_it(show, tiles, tmp_path):
    with pytest.raises(ValueError, match="gone"):
        show("--images", tiles[0], "--det-json", tmp_path / "gone")


def test_scores_that_are_not_finite_are_an_error(show, checkpoint):
    content = torch.load(checkpoint, weights_only=True)
    content["weights"]["text_projection"][:] = float("nan")
    torch.save(content, checkpoint)
    with pytest.raises(ValueError, match=r"tiny\.pth: .*not finite"):
        show()


def test_queries_are_prepared_as_the_captions_were(save_tiny, checkpoint, tmp_path, capsys):
    cleaning = ("--clean", "pir", "--template", "an aerial view: {}")
    trained = save_tiny("clean.pth", *cleaning)
    dump = tmp_path / "out.json"
    queries = ["Two Ships, anchored!", "a semi-circular court."]
    arguments = ["--device", "cpu", "--queries"]
    found = infer.main(["--checkpoint", str(trained), *arguments, *queries, "--json", str(dump)])
    assert json.loads(dump.read_text(encoding="utf-8"))["queries"] == queries
    assert f"Query 1: {queries[0]} -> " in capsys.readouterr().out
    texts = ["an aerial view: two ships anchored", "an aerial view: a semi circular court"]
    expected = infer.main(["--checkpoint", str(checkpoint), *arguments, *texts])  # equal weights
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"--queries '\?!': no word is left"):
        infer.main(["--checkpoint", str(trained), *arguments, "a ship", "?!"])


# ------------------------------------------------------------------ plain CLIPs, and warnings


def test_a_plain_clip_scores_images_without_graph(plain_clip, capsys):
    found = infer.main(["--checkpoint", str(plain_clip), "--device", "cpu"])
    network, preprocess = clip.load(str(plain_clip))
    with torch.no_grad():
        pixels = torch.stack([preprocess(Image.open(SAMPLES / name)) for name in NAMES])
        images = F.normalize(network.encode_image(pixels), dim=-1)
        texts = F.normalize(network.encode_text(clip.tokenize(SENTENCES)), dim=-1)
    torch.testing.assert_close(found, texts @ images.T, rtol=0, atol=1e-5)
    assert capsys.readouterr().err.count(SCENES) == 0


def test_a_model_of_scenes_on_other_images_is_warned_of(checkpoint, save_tiny, mini, tiles, capsys):
    other = save_tiny("other.pth", "--dataset", "mini", "--data-root", str(mini))
    images = ["--images", str(tiles[0])]
    for path, arguments, warned in (
        (checkpoint, images, True),
        (checkpoint, [], False),
        (other, images, False),
    ):
        infer.main(["--checkpoint", str(path), "--device", "cpu", *arguments])
        assert capsys.readouterr().err.count(SCENES) == warned
    assert integration.main(["--checkpoint", str(checkpoint), "--device", "cpu"]) == 0
    assert SCENES not in capsys.readouterr().err


# ------------------------------------------------------------------ encoding


@pytest.fixture
def samples(checkpoint):
    """The sample images with their graphs, and two of them without."""
    saved = load_checkpoint(checkpoint)[1]
    paths = [SAMPLES / name for name in NAMES]
    found = load_images(paths, NAMES, ROOT / "det_json", saved)
    found.boxes[1] = found.boxes[1][0][:0], found.boxes[1][1][:0]
    return found


@pytest.mark.parametrize("fusion", ["sum", "gate"])
def test_batch_size_changes_no_image(tiny_model, samples, device, fusion):
    network = tiny_model(fusion=fusion).to(device)
    whole = encode_images(network, samples, device)
    assert set(whole) == {"clip", "graph", "fused"}
    for size in (1, 2, 3):
        parts = encode_images(network, samples, device, batch_size=size)
        for name, values in whole.items():
            assert values.shape == (5, 32) and values.device.type == "cpu"
            scale = max(1.0, values.norm(dim=-1).max().item())
            tolerance = (1e-6 if device.type == "cpu" else 1e-4) * scale
            assert (parts[name] - values).abs().max() <= tolerance
    assert (whole["fused"].norm(dim=-1) - 1).abs().max() <= 1e-6


def test_encoding_leaves_training_mode_and_gradients(tiny_model, samples):
    network = tiny_model().train()
    assert not encode_images(network, samples, "cpu")["fused"].requires_grad
    assert not network.training
    assert not encode_texts(network.train(), ["a"], "cpu").requires_grad and not network.training


def test_each_distinct_text_is_encoded_once(tiny_model, device, monkeypatch):
    network, rows = tiny_model().to(device), []
    encode = network.encode_text

    def counted(tokens):
        rows.extend(map(tuple, tokens.tolist()))
        return encode(tokens)

    monkeypatch.setattr(network, "encode_text", counted)
    texts = ["a ship", "two planes on grass", "A Ship", "a ship ", "snow", "a ship"] * 3
    found = encode_texts(network, texts, device, batch_size=2)
    assert len(rows) == len(set(rows)) == 3
    assert found.shape == (18, 32)
    for same in (2, 3, 5, 6, 12):  # the same tokens as the first
        assert torch.equal(found[0], found[same])
    assert not torch.equal(found[0], found[1])


def test_texts_come_back_in_their_order(tiny_model):
    network = tiny_model()
    texts = ["snow", "a ship", "two planes on grass", "a ship", "b"]
    found = encode_texts(network, texts, "cpu", batch_size=2)
    for text, feature in zip(texts, found, strict=True):
        with torch.no_grad():
            expected = F.normalize(network.encode_text(clip.tokenize(text)), dim=-1)[0]
        torch.testing.assert_close(feature, expected, rtol=0, atol=1e-6)


def test_device_option(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert integration.pick_device("auto") == integration.pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="--device cuda"):
        integration.pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert integration.pick_device("auto") == torch.device("cuda")
    assert integration.pick_device("cpu") == torch.device("cpu")


# ------------------------------------------------------------------ promises


def verified(checkpoint, capsys, device, *arguments):
    """Exit status of the script, and {promise: kept}."""
    fixed = ["--checkpoint", str(checkpoint), "--device", str(device)]
    status = integration.main([*fixed, *arguments])
    lines = capsys.readouterr().out.splitlines()
    kept = {line[7:].split(" (")[0]: line[:2] == "ok" for line in lines if line[:2] in ("ok", "FA")}
    return status, kept


def test_a_sound_model_keeps_all_promises(checkpoint, capsys, device):
    status, kept = verified(checkpoint, capsys, device)
    assert status == 0 and len(kept) == 3 and all(kept.values())


def test_features_are_exported(checkpoint, tmp_path, capsys):
    out = tmp_path / "new" / "features.npz"
    verified(checkpoint, capsys, "cpu", "--out", str(out))
    network, saved = load_checkpoint(checkpoint)
    images = load_images([SAMPLES / name for name in NAMES], NAMES, ROOT / "det_json", saved)
    expected = encode_images(network, images, "cpu")
    with np.load(out) as found:
        assert found["names"].tolist() == NAMES
        for name in ("clip", "graph", "fused"):
            assert np.array_equal(found[name], expected[name].numpy())


def batch_mean(self, nodes, adjacency, mask):
    """The published pooling: the mean over all nodes of the whole batch."""
    x = self.node_projection(nodes)
    for layer in (self.gcn1, self.gcn2, self.gcn3):
        x = F.relu(layer(x, adjacency, mask))
    return self.mlp(x.mean(dim=(0, 1))).expand(len(nodes), -1)


def test_the_published_pooling_breaks_two_promises(checkpoint, monkeypatch, capsys, device):
    monkeypatch.setattr(model.FGCross, "encode_graph", batch_mean)
    status, kept = verified(checkpoint, capsys, device)
    assert status == 1
    assert kept == {
        "no dependence on batch mates": False,
        "own graph: another image's changes the embedding": False,
        "without objects, exactly CLIP's embedding": True,
    }


def test_a_vector_for_images_without_objects_breaks_a_promise(
    checkpoint, monkeypatch, capsys, device
):
    fuse = model.FGCross.fuse
    monkeypatch.setattr(
        model.FGCross,
        "fuse",
        lambda self, image, graph, mask: fuse(self, image, graph, mask | True),
    )
    status, kept = verified(checkpoint, capsys, device)
    assert status == 1
    assert [promise for promise, held in kept.items() if not held] == [
        "without objects, exactly CLIP's embedding"
    ]


def test_checking_leaves_the_images_as_they_were(checkpoint, samples, device):
    network = load_checkpoint(checkpoint, device)[0]
    before = encode_images(network, samples, device)["fused"]
    integration.verify(network, samples, device)
    assert torch.equal(encode_images(network, samples, device)["fused"], before)


def test_a_dependence_beyond_the_devices_tolerance_breaks_a_promise(
    checkpoint, samples, device, monkeypatch
):
    network = load_checkpoint(checkpoint, device)[0]
    branches, allowed = network.branches, integration.TOLERANCE[device.type]
    for shift, kept in ((0, True), (2 * allowed, False)):

        def shifted(features, *graph, shift=shift):
            *parts, fused = branches(features, *graph)
            return *parts, fused + shift * (len(features) == 1)

        monkeypatch.setattr(network, "branches", shifted)
        assert integration.verify(network, samples, device)[0][1] is kept


def test_a_model_without_graph_has_one_promise(save_tiny, plain_clip, capsys, device):
    for path in (save_tiny("none.pth", "--graph", "none"), plain_clip):
        assert verified(path, capsys, device) == (0, {"no dependence on batch mates": True})
