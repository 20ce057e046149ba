"""search.py from end to end: what its commands print and write, and what they say of mistakes."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("lancedb", reason="pip install -r requirements-search.txt")

import search
from conftest import box, write_detections, write_image
from galleries import index, write_tiles
from gallery.ranking import Query
from gallery.searching import Filter, Search


@pytest.fixture
def found(tmp_path, save_tiny):
    """Path of an index of twelve tiles without graph branch."""
    return index(write_tiles(tmp_path), save_tiny("tiny.pth", "--graph", "none"))


def mistake(arguments):
    """What search.py says of arguments that are wrong."""
    with pytest.raises(ValueError) as error:
        search.main([str(argument) for argument in arguments])
    return str(error.value)


def test_many_queries_from_a_file_go_to_all_outputs(found, tmp_path, capsys):
    (tmp_path / "queries.txt").write_text("two ships\n\nan airplane\n", encoding="utf-8")
    out = tmp_path / "out"
    search.main(
        [
            "query", str(found), "--queries", str(tmp_path / "queries.txt"), "--top-k", "3",
            "--json", f"{out}/a.json", "--csv", f"{out}/a.csv", "--html", f"{out}/a.html",
        ]
    )  # fmt: skip
    content = json.loads((out / "a.json").read_text(encoding="utf-8"))
    assert [answer["query"]["text"] for answer in content["answers"]] == [
        "two ships",
        "an airplane",
    ]
    assert [len(answer["hits"]) for answer in content["answers"]] == [3, 3]
    assert len((out / "a.csv").read_text(encoding="utf-8").splitlines()) == 7
    page = (out / "a.html").read_text(encoding="utf-8")
    for answer in content["answers"]:
        for hit in answer["hits"]:
            assert hit["path"] in page
    assert capsys.readouterr().out.count("12 tiles searched exactly") == 2


def test_an_image_and_a_vector_are_queries(found, tmp_path, capsys):
    search.main(["query", str(found), "--image", str(tmp_path / "imgs" / "t05.png")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[3].split()[:2] == ["1", "1.000"] and "t05.png" in lines[3]
    np.save(tmp_path / "v.npy", np.ones(32, dtype=np.float32))
    search.main(
        ["query", str(found), "ships", "--vector", str(tmp_path / "v.npy"), "--not", "snow"]
    )
    assert "ships without snow" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "nothing to look for: give a sentence, --queries, --image or --vector"),
        (["ships", "--where", "shp > 1"], "--where: no column 'shp'"),
        (["ships", "--where", "ship > 1; drop"], "--where: "),
        (["ships", "--near", "99", "0"], "latitude is between"),
        (["ships", "--bbox", "0", "9", "1", "2"], "lies north of north"),
        (["ships", "--within", "3"], "--within does nothing without --near"),
        (["ships", "--weights", "1", "2"], "--weights: expected 1 numbers"),
        (["ships", "--vector", "{tmp}/none.npy"], "not a .npy file"),
        (["ships", "--vector", "{tmp}/short.npy"], "expected 32 finite numbers"),
        (["--image", "{tmp}/none.png"], "none.png: no such image"),
        (["ships", "--queries", "{tmp}/empty.txt"], "leave the sentence out"),
        (["--queries", "{tmp}/empty.txt"], "no sentence in it"),
        (["?"], "no tile|[a-z]"),
        (["ships", "--geojson", "{tmp}/a.geojson"], "footprint"),
        (["ships", "--top-k", "0"], "--top-k 0: expected 1 or more"),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_a_line(found, tmp_path, arguments, words):
    np.save(tmp_path / "short.npy", np.ones(3, dtype=np.float32))
    (tmp_path / "empty.txt").write_text("\n", encoding="utf-8")
    arguments = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    if arguments == ["?"]:  # a sentence without words is one like others
        search.main(["query", str(found), *arguments])
        return
    message = mistake(["query", found, *arguments])
    assert words in message and "\n" not in message


def test_mistakes_of_other_commands(found, tmp_path, save_tiny):
    checkpoint = save_tiny("again.pth")
    out = ["--out", tmp_path / "new", "--checkpoint", checkpoint]
    assert "no such folder" in mistake(["index", tmp_path / "none", *out])
    assert "--overlap 64: expected less" in mistake(
        ["index", tmp_path / "imgs", *out, "--tile", "32", "--overlap", "64"]
    )
    assert "lower first" in mistake(["index", tmp_path / "imgs", *out, "--stretch", "98", "2"])
    assert "no image below it" in mistake(["index", tmp_path / "dets", *out])
    assert not (tmp_path / "new").exists()
    published = save_tiny("published.pth", "--graph", "published")
    message = mistake(
        ["index", tmp_path / "imgs", "--out", tmp_path / "new", "--checkpoint", published]
    )
    assert "gives all images of a batch one vector" in message
    (tmp_path / "one.txt").write_text("ship\n", encoding="utf-8")
    assert "two classes or more" in mistake(["classify", found, tmp_path / "one.txt"])
    assert "no {} for the class" in mistake(
        ["classify", found, tmp_path / "one.txt", "--prompt", "a photo"]
    )
    other = index(tmp_path, checkpoint, out="other")
    assert "made with another checkpoint" in mistake(["duplicates", found, "--against", other])


def test_duplicates_are_found_here_and_in_another_index(tmp_path, save_tiny, capsys):
    checkpoint = save_tiny("tiny.pth", "--graph", "none")
    first = write_tiles(tmp_path / "first")
    (first / "imgs" / "copy.png").write_bytes((first / "imgs" / "t05.png").read_bytes())
    second = write_tiles(tmp_path / "second", number=2)
    one, two = index(first, checkpoint), index(second, checkpoint)
    capsys.readouterr()
    search.main(
        ["duplicates", str(one), "--threshold", "0.99999", "--csv", str(tmp_path / "d.csv")]
    )
    assert "1 groups with 2 of 13 tiles" in capsys.readouterr().out
    lines = (tmp_path / "d.csv").read_text(encoding="utf-8").splitlines()
    assert sorted(lines) == ["1,copy.png", "1,t05.png", "group,tile"]
    search.main(["duplicates", str(one), "--against", str(two), "--threshold", "0.99999"])
    printed = capsys.readouterr().out
    assert "2 of 2 tiles of" in printed and "north/t00.png = north/t00.png" in printed


def test_classes_of_folders_are_compared_with_their_names(tmp_path, save_tiny, capsys):
    for i, name in enumerate(("ship", "ship", "harbor")):
        write_tiles(tmp_path, number=0)
        path = tmp_path / "imgs" / name / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (i * 80, 0, 0)).save(path)
    write_detections(tmp_path / "dets" / "ship" / "0.json", [])
    found = index(tmp_path, save_tiny("tiny.pth"))
    (tmp_path / "classes.txt").write_text("ship\nharbor\n", encoding="utf-8")
    search.main(
        ["classify", str(found), str(tmp_path / "classes.txt"), "--json", str(tmp_path / "c.json")]
    )
    content = json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))
    right = sum(row["tile"].startswith(row["class"] + "/") for row in content["tiles"])
    assert content["accuracy"]["right"] == right and content["accuracy"]["of"] == 3
    assert f"right, {right} of 3" in capsys.readouterr().out


def test_an_open_search_sees_what_is_indexed_later(tmp_path, save_tiny):
    """Its version may have been removed meanwhile."""
    checkpoint = save_tiny("tiny.pth")
    path = index(write_tiles(tmp_path), checkpoint)
    own = Search(path, torch.device("cpu"))
    query = Query(text="ships")
    assert own.answers([query])[0]["searched"] == 12
    for name in ("one", "two"):
        write_image(tmp_path / "imgs" / f"{name}.png")
        index(tmp_path, checkpoint, "--keep-versions", "1")
    [answer] = own.answers([query], Filter(where="path like '%o%'"))
    assert {hit["path"] for hit in answer["hits"]} >= {"one.png", "two.png"}


def test_a_damaged_index_is_told_in_a_line(found):
    for file in (found / "tiles.lance" / "data").iterdir():
        file.write_bytes(file.read_bytes()[:100])
    assert "the index cannot be read (" in mistake(["query", found, "ships"])
    assert "the index cannot be read (" in mistake(["duplicates", found])


# ------------------------------------------------------------------ places


@pytest.fixture
def placed(tmp_path, save_tiny):
    """An index of a GeoTIFF of 96 x 64 pixels of 0.01 degrees, cut to tiles of 32."""
    rasterio = pytest.importorskip("rasterio", reason="pip install -r requirements-geo.txt")
    (tmp_path / "imgs").mkdir()
    pixels = np.random.default_rng(0).integers(1, 255, (3, 64, 96), dtype=np.uint8)
    with rasterio.open(
        tmp_path / "imgs" / "scene.tif", "w", driver="GTiff", width=96, height=64, count=3,
        dtype="uint8", crs="EPSG:4326", photometric="rgb",
        transform=rasterio.Affine(0.01, 0, 11.0, 0, -0.01, 48.0),
    ) as image:  # fmt: skip
        image.write(pixels)
    write_detections(tmp_path / "dets" / "scene.json", [box(40, 10), box(80, 50)])
    return index(tmp_path, save_tiny("tiny.pth"), "--tile", "32", "--overlap", "0")


def test_tiles_of_scenes_are_found_by_their_place(placed, tmp_path, capsys):
    def ids(*arguments):
        search.main(["query", str(placed), "ships", "--json", f"{tmp_path}/a.json", *arguments])
        [answer] = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["answers"]
        return {hit["id"].split("#")[1] for hit in answer["hits"]}, answer

    everything, answer = ids()
    assert len(everything) == 6
    by_id = {hit["id"].split("#")[1]: hit for hit in answer["hits"]}
    corner = by_id["32,0,32,32"]
    assert np.allclose(
        corner["footprint"], [[11.32, 48], [11.64, 48], [11.64, 47.68], [11.32, 47.68]]
    )
    assert (corner["lat"], corner["lon"]) == pytest.approx((47.84, 11.48))
    assert corner["counts"] == {"ship": 1}
    assert ids("--bbox", "11.3", "47.7", "11.7", "48")[0] == {"32,0,32,32"}
    # 0.32 degrees are 35.6 km along a meridian, 23.9 km along a parallel
    assert ids("--near", "47.84", "11.48", "--within", "20")[0] == {"32,0,32,32"}
    around = ids("--near", "47.84", "11.48", "--within", "30")[0]
    assert around == {"0,0,32,32", "32,0,32,32", "64,0,32,32"}
    assert ids("--where", "ship = 1")[0] == {"32,0,32,32", "64,32,32,32"}


def test_hits_with_places_make_maps(placed, tmp_path):
    out = tmp_path / "out"
    search.main(
        ["query", str(placed), "ships", "--geojson", f"{out}/a.geojson", "--html", f"{out}/a.html"]
    )
    collection = json.loads((out / "a.geojson").read_text(encoding="utf-8"))
    assert len(collection["features"]) == 6
    assert "Map of the footprints of 6" in (out / "a.html").read_text(encoding="utf-8")
    search.main(["export", str(placed), "--geoparquet", f"{out}/a.parquet"])
    geopandas = pytest.importorskip("geopandas")
    frame = geopandas.read_parquet(out / "a.parquet")
    assert len(frame) == 6 and frame.geometry.notna().all()
    assert frame.total_bounds == pytest.approx([11, 47.36, 11.96, 48])
