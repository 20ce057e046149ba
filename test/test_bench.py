"""The benchmark at a tiny size: its sides compute the same, and what it writes can be read."""

import json
import time

import pytest

pytest.importorskip("lancedb", reason="pip install -r requirements-search.txt")

import bench
from benchmarks.frame import compared, require_equal
from benchmarks.search import World


@pytest.mark.parametrize("row", bench.ROWS)
def test_a_row_names_its_sides_and_their_ratios(row, tmp_path, capsys):
    path = tmp_path / "bench.json"
    bench.main(["--small", "--device", "cpu", "--row", row, "--json", str(path)])
    content = json.loads(path.read_text(encoding="utf-8"))
    assert list(content["rows"]) == [row]
    assert content["machine"]["cores"] >= 1
    for result in content["rows"][row]:
        ours, *others = result["seconds"]
        assert list(result["ratios"]) == others != []
        for median, least, largest in result["ratios"].values():
            assert 0 < least <= median <= largest
        assert min(result["seconds"].values()) > 0
    assert f"{row}: " in capsys.readouterr().out


def test_ratios_are_of_neighbouring_turns_and_the_warm_up_does_not_count(monkeypatch):
    # A clock that each side moves: warm-up 9 and 9, then ours 1, 2, 4 and the other's 2, 6, 4.
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def side(*steps):
        left = iter(steps)

        def go():
            clock[0] += next(left)

        return go

    found = compared("x", {"ours": side(9, 1, 2, 4), "other": side(9, 2, 6, 4)}, 3)
    assert found.seconds == {"ours": 2, "other": 4}
    assert found.ratios == {"other": (2, 1, 3)}  # of 2/1, 6/2, 4/4


def test_sides_that_differ_end_the_row():
    with pytest.raises(RuntimeError, match="the vectors are not the same on all sides"):
        require_equal(False, "the vectors")


def test_vectors_are_like_features_of_one_model():
    world = World(clusters=20, width=256)
    images, sentences = world.images(2000), world.sentences(200)
    assert float((images @ images.T).mean()) == pytest.approx(0.42, abs=0.05)  # some are of one
    assert abs(float((sentences @ images.T).mean())) < 0.15
    assert float((images.norm(dim=1) - 1).abs().max()) < 1e-5


def test_a_row_that_is_none_is_refused_with_the_list():
    with pytest.raises(ValueError, match="--row fast: expected some of training-step"):
        bench.main(["--row", "fast"])
