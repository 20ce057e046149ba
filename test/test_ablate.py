"""The table: rows are trained alike, runs are not repeated, figures are those of evaluate.py."""

import json
import re
from xml.etree import ElementTree

import numpy as np
import pytest

import ablate
import evaluate
import train
from conftest import box
from dataset import box_captions
from dataset.annotations import read_annotations
from metrics import ablation
from options import parse_options


@pytest.fixture
def small(run, mini, tmp_path, monkeypatch):
    """Runs ablate.py with one epoch of a tiny model: small("global", "fused", seeds=(0, 1))."""
    run()  # for the tiny model config that it patches
    monkeypatch.chdir(tmp_path)

    def start(*rows, seeds=(0,)):
        extra = "--augment --batch-size 8 --epochs 1 --device cpu"
        place = ["--dataset", "mini", "--data-root", str(mini), "--out", str(tmp_path / "table")]
        numbers = map(str, seeds)
        return ablate.main([*place, "--rows", *rows, "--seeds", *numbers, "--extra", extra])

    return start


def test_rows_are_trained_and_measured_once(small, tmp_path, monkeypatch, capsys):
    [whole, fused] = small("global", "fused")
    assert (whole["row"], fused["row"]) == ("global", "fused")
    for content in (whole, fused):
        for split in ("validation", "test"):
            without, with_evidence = content[split]["without"], content[split]["with"]
            assert without["evidence_weight"] is None
            assert with_evidence["evidence_weight"] is not None
            assert len(without["objects"]) == 12
    written = sorted(path.name for path in (tmp_path / "table").iterdir())
    assert written == ["mini-fused-0.json", "mini-global-0.json"]  # no weights are left
    lines = capsys.readouterr().out.splitlines()
    cells = next(line for line in lines if line.startswith("| fused | with |")).split(" | ")
    assert cells[4] == f"{fused['test']['with']['mR']:.1f}"
    assert lines[-1].startswith("the system, by the mean on validation: ")

    monkeypatch.setattr(train, "main", None)  # nothing is trained again
    assert small("global", "fused") == [whole, fused]


def test_a_stopped_run_goes_on(small, tmp_path, monkeypatch):
    whole_run = train.main

    def stop_after(arguments):
        whole_run(arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "main", stop_after)
        with pytest.raises(KeyboardInterrupt):
            small("global")
    assert (tmp_path / "table" / "run-mini-global-0" / "last.pth").is_file()
    [content] = small("global")
    assert json.loads((tmp_path / "table" / "mini-global-0.json").read_text()) == content
    assert not (tmp_path / "table" / "run-mini-global-0").exists()


def test_gains_are_those_of_paired_runs(small, tmp_path, capsys):
    small("global", "fused", seeds=(0, 1))
    table = capsys.readouterr().out.splitlines()
    results = {}
    for row in ("global", "fused"):
        files = [tmp_path / "table" / f"mini-{row}-{seed}.json" for seed in (0, 1)]
        results[row] = [json.loads(file.read_text())["test"]["without"] for file in files]
        content = {"results": results[row]}
        (tmp_path / f"{row}.json").write_text(json.dumps(content))
    files = [str(tmp_path / "fused.json"), str(tmp_path / "global.json")]
    [found] = evaluate.main(["--compare", *files])
    gain = found.difference["mR"]
    line = next(line for line in table if line.startswith("| fused | without |"))
    assert f"{gain.value:+.1f}, {gain.low:+.1f} to {gain.high:+.1f}" in line


def test_a_run_of_other_options_is_no_run_of_this_table(small, tmp_path):
    small("global")
    path = tmp_path / "table" / "mini-global-0.json"
    content = json.loads(path.read_text())
    content["arguments"].append("--epochs")
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="of other options .*name another --out"):
        small("global")


def test_box_captions_are_trained_on_and_the_table_is_of_the_data_set(small):
    [content] = small("box-captions")
    assert content["arguments"][3].endswith("mini-box-captions")
    assert content["test"]["without"]["images"] == 12


def test_box_captions_of_the_scenes_have_a_name_and_a_folder_of_their_own(tmp_path):
    options = parse_options("ablate", "", ["--out", str(tmp_path)])
    arguments = ablate.training_arguments("box-captions", 0, options)
    assert arguments[:4] == [
        *("--dataset", "box-captions"),
        *("--data-root", str(tmp_path / "scenes-box-captions")),
    ]
    assert "--augment" in arguments  # of scenes none, since sentences say left of
    assert "--augment" not in ablate.training_arguments("global", 0, options)


def test_the_table_is_of_all_runs_and_compares_equal_seeds(small, tmp_path, capsys):
    runs = small("global", seeds=(0, 1))
    capsys.readouterr()
    assert small("fused", seeds=(1,))[:2] == runs
    table = capsys.readouterr().out.splitlines()
    line = next(line for line in table if line.startswith("| fused | without |"))
    alone = ablation.row_cells("fused", "without", small("fused", seeds=(1,))[2:], runs[1:])
    assert line == f"| {' | '.join(alone)} |"
    assert "on validation: global, w" in table[-1]  # fused has fewer seeds


def test_the_figure_has_each_gain_at_its_place(small, tmp_path):
    runs = small("global", "fused")
    by_row = {run["row"]: [run] for run in runs}
    root = ElementTree.fromstring(ablation.figure(runs, ablate.ROWS, "mini"))
    tag = "{http://www.w3.org/2000/svg}"
    # The first panel's axis tells which x is which gain.
    ticks = [t for t in root.iter(f"{tag}text") if re.fullmatch(r"0|[+-][0-9]+", t.text)]
    first = ticks[: len(ticks) // 2]
    values = [float(tick.text) for tick in first]
    places = [float(tick.get("x")) for tick in first]
    found = [float(circle.get("cx")) for circle in root.iter(f"{tag}circle")][2:]  # after legends
    expected = []
    for row, choice in (("global", "with"), ("fused", "without"), ("fused", "with")):
        gain, _ = ablation.gains(row, choice, by_row[row], by_row["global"])
        expected.append(np.interp(gain.value, values, places))
    assert len(found) == 2 * len(expected)
    np.testing.assert_allclose(found[:3], expected, atol=0.1)


def test_an_unknown_row_is_refused(small):
    with pytest.raises(ValueError, match="--rows best: expected some of global"):
        small("best")


def test_a_row_of_another_label_map_has_no_gain_in_other_queries(small):
    whole, published = small("global", "published")
    sets = [run["test"]["with"]["fine"]["counting"]["names"] for run in (whole, published)]
    assert sets[0] != sets[1]
    cells = ablation.fine_gain_cells("published", "without", [published], [whole])
    assert cells[0] == "-"
    assert ablation.fine_gain_cells("global", "with", [whole], [whole])[0] != "-"


def test_a_file_that_is_no_run_is_told(small, tmp_path):
    small("global")
    path = tmp_path / "table" / "mini-global-0.json"
    content = json.loads(path.read_text())
    for name in ("row", "test"):
        path.write_text(json.dumps({**content, name: {}}))
        with pytest.raises(ValueError, match="mini-global-0.json: not the file of a run"):
            small("global")


def test_sentences_of_other_boxes_are_not_taken(small, mini, tmp_path):
    small("box-captions")
    out = tmp_path / "table" / "mini-box-captions"
    box_captions.write(mini, out, "auto", mini / "det_json")
    with pytest.raises(ValueError, match="mini-box-captions: sentences of other boxes; remove it"):
        box_captions.write(mini, out, "auto", tmp_path)
    path = tmp_path / "table" / "mini-box-captions-0.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "places": ["elsewhere", None, None]}))
    with pytest.raises(ValueError, match="mini-box-captions-0.json: of .*elsewhere"):
        small("box-captions")


# ------------------------------------------------------------------ sentences from boxes


def detection(label, x, y):
    return {"label": label, "bbox": box(x, y)}


def test_sentences_say_what_the_boxes_hold():
    found = [detection("plane", 50, 50), detection("oil-tank", 5, 5), detection("plane", 90, 9)]
    assert box_captions.sentences_of(found, (100, 100)) == [
        "there are two planes and an oil tank in the image .",
        "a plane in the middle of the image .",
    ]
    many = [detection("ship", 1, 1)] * 11 + [detection("bus", 1, 1)] * 2
    assert box_captions.sentences_of(many, (100, 100)) == [
        "there are many ships and two buses in the image ."
    ]
    assert box_captions.sentences_of([], (100, 100)) == []


def test_only_training_gets_sentences_and_nothing_is_copied(mini, tmp_path):
    box_captions.write(mini, tmp_path / "new", "auto", mini / "det_json")
    before, after = read_annotations(mini).splits, read_annotations(tmp_path / "new").splits
    assert [r.captions for r in after["val"]] == [r.captions for r in before["val"]]
    assert [r.captions for r in after["test"]] == [r.captions for r in before["test"]]
    for old, new in zip(before["train"], after["train"], strict=True):
        assert new.captions[: len(old.captions)] == old.captions
        assert len(new.captions) - len(old.captions) in (0, 1, 2)
    assert (tmp_path / "new" / "images").is_symlink()
